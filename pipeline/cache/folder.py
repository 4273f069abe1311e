"""The score cache as an artifact: Parquet shards and a manifest that says what they are and what their bytes must be.

The manifest is written last, so its presence means done, and carries a hash of itself. Reading checks every shard's hash and row count, and
the fingerprint against the run's own: a cache is used only where it belongs. Whatever there is of it, memory holds one shard.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.rows import MOST_ROWS, pieces_of, ranges_of, read_rows, rows_per_shard, with_pieces, write_rows
from pipeline.errors import CorruptError, ShotlessError
from pipeline.files import json_text, one_writer, read_json, remove_leftovers
from pipeline.files import sha256_bytes, sha256_file, sha256_json
from pipeline.places import Place, Remote, write_bytes
from pipeline.schema import SCHEMA_VERSION, SCORES

ROWS_PER_SHARD = MOST_ROWS
MANIFEST = "manifest.json"
CACHES = "caches.json"
"""In a target set: which caches belong to it, by the hash of their manifest."""
AGAIN = "run `shotless verify --repair`, `dvc checkout` or `dvc repro`."


@dataclass(frozen=True)
class ScoreCache:
    """A cache read back: rows as in `schema.SCORES`, and the manifest."""

    rows: pa.Table
    manifest: dict[str, Any]


def write_cache(folder: Place, tables: Iterable[pa.Table], fingerprint: Fingerprint, about: dict[str, Any]) -> None:
    """Write shards of the rows of `tables` in their order, then the manifest with `about` in it. Memory holds one shard.

    The bytes follow from the rows, not from how they are divided into tables. A second writer waits for the first;
    a remote store has no lock, and of two writers there one may end with a cache that is refused when it is read.
    """
    with one_writer(folder) if isinstance(folder, Path) else nullcontext():
        write_shards(folder, tables, fingerprint, about)


def write_shards(folder: Place, tables: Iterable[pa.Table], fingerprint: Fingerprint, about: dict[str, Any]) -> None:
    """The same for whoever is the folder's one writer, and stays it for longer."""
    (folder / MANIFEST).unlink(missing_ok=True)  # until all is written, this is no cache
    shards: list[dict[str, Any]] = []
    for number, rows in enumerate(_in_shards(tables, min(ROWS_PER_SHARD, rows_per_shard(fingerprint)))):
        path = folder / f"part-{number:05d}.parquet"
        data = write_rows(rows, path)
        about_it = {"file": path.name, "rows": len(rows), "sha256": sha256_bytes(data), "bytes": len(data)}
        shards.append(about_it | {"pieces": pieces_of(data)})
    named = {shard["file"] for shard in shards}
    for other in [file for file in folder.iterdir() if file.name.startswith("part-") and file.name not in named]:
        other.unlink()
    for left in folder.glob(".*.tmp") if isinstance(folder, Path) else ():
        remove_leftovers(left.with_name(left.name[1:].rpartition(".")[0].rpartition(".")[0]))
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint.model_dump(),
        "fingerprint_sha256": fingerprint.sha256,
        **about,
        "shards": shards,
        "totals": {"rows": sum(shard["rows"] for shard in shards), "bytes": sum(shard["bytes"] for shard in shards)},
    }
    write_bytes(json_text(manifest | {"manifest_sha256": sha256_json(manifest)}).encode(), folder / MANIFEST)


def _in_shards(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    held = SCORES.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table.cast(SCORES)])
        while len(held) >= size:
            yield held.slice(0, size)
            held = held.slice(size)
    if len(held):
        yield held


def read_manifest(folder: Place) -> dict[str, Any]:
    """The manifest of a cache.

    Raises ShotlessError where it is missing: the capture did not end. Raises CorruptError where it is not what was written.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except (FileNotFoundError, IsADirectoryError):
        raise ShotlessError(f"{path}: missing, so this capture did not end; `dvc repro` goes on with it.") from None
    except ValueError as error:
        raise CorruptError(f"{path}: not valid JSON ({error}); {AGAIN}") from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else None
        raise CorruptError(f"{path}: schema version {found}, this version reads {SCHEMA_VERSION}; run `dvc repro`.")
    written = manifest.pop("manifest_sha256", None)
    if (found := sha256_json(manifest)) != written:
        raise CorruptError(f"{path}: its contents have sha256 {found}, and were written with {written}; {AGAIN}")
    return manifest


def manifest_sha256(folder: Place) -> str:
    """The hash that names what a cache holds, shards and all. Raises what `read_manifest` raises."""
    return sha256_json(read_manifest(folder))


def shard_fault(folder: Place, shard: Mapping[str, Any]) -> str | None:
    """What is wrong with the bytes of a shard that a manifest names; None where nothing is."""
    path = folder / shard["file"]
    try:
        if isinstance(path, Remote):
            return _fault_of(path, path.read_bytes(), shard)
        if not path.is_file():
            return f"{path}: the manifest names this shard, and it is missing"
        size, found = path.stat().st_size, sha256_file(path)
    except FileNotFoundError:
        return f"{path}: the manifest names this shard, and it is missing"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    return _difference(path, size, found, shard)


def _fault_of(path: Place, data: bytes, shard: Mapping[str, Any]) -> str | None:
    return _difference(path, len(data), sha256_bytes(data), shard)


def _difference(path: Place, size: int, found: str, shard: Mapping[str, Any]) -> str | None:
    if found == shard["sha256"]:
        return None
    length = "" if size == shard["bytes"] else f" and {size:,} bytes are not {shard['bytes']:,}"
    return f"{path}: sha256 {found} is not the manifest's {shard['sha256']}{length}"


def read_shard(folder: Place, shard: Mapping[str, Any], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard, checked against the manifest before it is read.

    Of a remote one each byte is fetched once: all of them, or where `columns` are asked for these and the footer.

    Raises CorruptError naming the shard and what is wrong with it.
    """
    path = folder / shard["file"]
    if isinstance(path, Remote):
        source = _fetched(path, shard, columns)
    elif fault := shard_fault(folder, shard):
        raise CorruptError(f"{fault}; {AGAIN}")
    else:
        source = path
    schema = SCORES if columns is None else pa.schema([SCORES.field(name) for name in columns])
    table = read_rows(source, schema)
    if len(table) != shard["rows"]:
        raise CorruptError(f"{folder / shard['file']}: {len(table)} rows, the manifest says {shard['rows']}; {AGAIN}")
    return table


def _fetched(path: Remote, shard: Mapping[str, Any], columns: Sequence[str] | None) -> bytes | bytearray:
    """A remote shard's bytes, checked; zeros stand for columns that were not asked for, where the manifest has its pieces."""
    pieces = shard.get("pieces")
    try:
        if pieces is None or columns is None or len(columns) == len(SCORES):
            data = path.read_bytes()
            fault = _fault_of(path, data, shard)
        else:
            numbers = [*sorted(SCORES.get_field_index(name) for name in columns), len(SCORES)]
            data, fault = with_pieces(shard["bytes"], pieces, path.read_ranges(ranges_of(pieces, numbers)), numbers), None
    except FileNotFoundError:
        fault = f"{path}: the manifest names this shard, and it is missing"
    except (OSError, CorruptError) as error:
        fault = f"{path}: {error}"
    else:
        if fault is None:
            return data
    raise CorruptError(f"{fault}; {AGAIN}")


def read_cache(folder: Place, columns: Sequence[str] | None = None) -> ScoreCache:
    """All rows of a cache, or some columns of them, in memory: for label scores. `CacheReader` reads distributions.

    Raises CorruptError naming the shard and what is wrong with it.
    """
    manifest = read_manifest(folder)
    schema = SCORES if columns is None else pa.schema([SCORES.field(name) for name in columns])
    return ScoreCache(
        pa.concat_tables([schema.empty_table(), *(read_shard(folder, shard, columns) for shard in manifest["shards"])]), manifest
    )
