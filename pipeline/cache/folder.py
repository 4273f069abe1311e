"""The score cache as an artifact: a folder of Parquet shards and a `manifest.json`, written last, with the sha256 of each shard.

A cache travels: it is written locally, and read from a folder or a URL (`s3://bucket/few_shot`; s3, gs, abfs and hf through pyarrow, others
through fsspec). Every shard is compared with its hash before it is used. A damaged one is made again from the store, without a model.
"""

import hashlib
import json
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from pipeline.cache.store import Store, write_rows
from pipeline.errors import CorruptError, MismatchError, ShotlessError, UsageError
from pipeline.files import MANIFEST, one_writer, read_manifest, sha256_file, write_manifest
from pipeline.schema import KEY, SCHEMA_VERSION, SCORES
from pipeline.task import Task

SHARD_LEVEL = 19  # zstd level of shards, which are written once and carried about; it saves a tenth over level 3
MOST_ROWS = 2048
"""Rows of each shard but the last. A shard is decoded as a whole: with every entry of a vocabulary of 50,000 it has 400 MB."""
CACHES = "caches.json"
"""In a target set: the caches that its students may learn whole, as {teacher: {"manifest_sha256": sha256_json(manifest)}}."""
AGAIN = "Run `shotless verify --repair`, `dvc checkout` or `dvc repro`."


@dataclass(frozen=True)
class ScoreCache:
    """A cache in memory: rows of `schema.SCORES`, or some of its columns, and the manifest."""

    rows: pa.Table
    manifest: dict[str, Any]


def described_task(task: Task) -> dict[str, Any]:
    """What a manifest says of a task: template, verbalisers by label, and how free answers come about."""
    params = task.params
    return {"template": params.template, "verbalisers": dict(sorted(params.verbalisers.items())), "completion": params.answering}


def check_belongs(manifest: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path | str) -> None:
    """Raise MismatchError with all that differs between a manifest and what a run wants of it, as `{"task": described_task(task)}`."""
    different = [line for key, value in wanted.items() for line in _differences(key, manifest.get(key), value)]
    if different:
        step = f"Run `dvc repro teacher@{str(folder).rpartition('/')[2]}`."
        raise MismatchError(f"{folder}: its scores are not this run's:\n" + "\n".join(different) + f"\n{step}")


def _differences(name: str, found: Any, wanted: Any) -> list[str]:
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return [line for key in {**wanted, **found} for line in _differences(f"{name}.{key}", found.get(key), wanted.get(key))]
    return [] if found == wanted else [f"  {name}: {found!r}, this run has {wanted!r}"]


def write_cache(folder: Path, tables: Iterable[pa.Table], about: Mapping[str, Any]) -> None:
    """Write the rows of `tables` (`schema.SCORES`) in their order as shards, then the manifest. Memory holds one shard.

    The shards' bytes follow from the rows, not from how these are divided into tables. The manifest has `about` (see `teachers.capture`),
    `schema_version`, `shards` (file → rows) and `files` (file → sha256, bytes).
    """
    with one_writer(folder.with_name(f".{folder.name}.lock")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)  # until all shards are written, the folder is not a cache
        shards: dict[str, int] = {}
        for number, rows in enumerate(_in_shards(tables)):
            name = f"part-{number:05d}.parquet"
            write_rows(rows, folder / name, SHARD_LEVEL)
            shards[name] = len(rows)
        for other in {path.name for path in folder.iterdir()} - shards.keys():
            (folder / other).unlink()
        write_manifest(folder, {"schema_version": SCHEMA_VERSION, **about, "shards": shards})


def _in_shards(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    held = SCORES.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table.cast(SCORES)])
        while len(held) >= MOST_ROWS:
            yield held.slice(0, MOST_ROWS)
            held = held.slice(MOST_ROWS)
    if len(held):
        yield held


def cache_manifest(folder: Path | str) -> dict[str, Any]:
    """A cache's manifest. Raises ShotlessError if it is missing, CorruptError if this version cannot read it."""
    try:
        manifest = read_manifest(folder) if isinstance(folder, Path) else json.loads(_read(folder, MANIFEST))
    except ValueError as error:
        raise CorruptError(f"{folder}/{MANIFEST}: not JSON ({error}). Copy the cache again.") from None
    found = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if found != SCHEMA_VERSION or not isinstance(manifest.get("shards"), dict):
        raise CorruptError(f"{folder}/{MANIFEST}: schema version {found}, this version reads {SCHEMA_VERSION}. Run `dvc repro`.")
    return manifest


def read_shard(folder: Path | str, manifest: Mapping[str, Any], name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a shard, or some of their columns. Raises CorruptError if its hash is not that of the manifest."""
    entry, schema, data = manifest["files"][name], _schema(columns), _read(folder, name)
    if (found := hashlib.sha256(data).hexdigest()) != entry["sha256"]:
        size = "" if len(data) == entry["bytes"] else f", {len(data):,} bytes instead of {entry['bytes']:,}"
        raise CorruptError(f"{folder}/{name}: sha256 {found[:12]}…, its manifest says {entry['sha256'][:12]}…{size}. {AGAIN}")
    return pq.ParquetFile(pa.BufferReader(data)).read(schema.names).cast(schema)


def read_cache(folder: Path | str, columns: Sequence[str] | None = None) -> ScoreCache:
    """All rows of a cache in memory, or some of their columns; `CacheReader` is for distributions. Raises as `read_shard` does."""
    manifest = cache_manifest(folder)
    shards = [read_shard(folder, manifest, name, columns) for name in manifest["shards"]]
    return ScoreCache(pa.concat_tables([_schema(columns).empty_table(), *shards]), manifest)


def _schema(columns: Sequence[str] | None) -> pa.Schema:
    return SCORES if columns is None else pa.schema([SCORES.field(name) for name in columns])


def _read(folder: Path | str, name: str) -> bytes:
    """A file of a cache. Raises CorruptError if it is missing, ShotlessError if its store cannot be reached."""
    try:
        if isinstance(folder, Path):
            return (folder / name).read_bytes()
        url = f"{folder.rstrip('/')}/{name}"
        try:
            system, path = FileSystem.from_uri(url)
        except pa.ArrowInvalid:  # not one of those that pyarrow reads itself
            system, path = FileSystem.from_uri(f"fsspec+{url}")
        with system.open_input_file(path) as file:
            return file.read()
    except FileNotFoundError:
        raise CorruptError(f"{folder}/{name}: missing. {AGAIN}") from None
    except (OSError, ImportError, ValueError) as error:
        raise ShotlessError(f"{folder}/{name}: cannot be read: {error}") from error


class CacheReader:
    """Rows of a cache by number, as fast as training asks for them. Raises as `read_cache` does.

    The shards are decoded once, all columns or some, into an uncompressed Arrow file without a name under `work`, which is memory-mapped.
    """

    def __init__(self, folder: Path | str, work: Path, columns: Sequence[str] | None = None) -> None:
        self.folder, self.manifest, self._schema = folder, cache_manifest(folder), _schema(columns)
        work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=work) as file:
            with pa.ipc.new_file(file, self._schema) as writer:
                for name in self.manifest["shards"]:
                    writer.write_table(read_shard(folder, self.manifest, name, columns).combine_chunks())
            file.flush()
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(pages))
        self._batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *map(len, self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, rows: Sequence[int] | np.ndarray) -> pa.Table:
        """Rows [N] by number, in the order asked for, repeats included. Raises UsageError if there is no such row."""
        wanted = np.asarray(rows, dtype=np.int64)
        if len(outside := wanted[(wanted < 0) | (wanted >= len(self))]):
            raise UsageError(f"{self.folder}: there is no row {outside[0]}; it has {len(self):,} rows, counted from 0.")
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        found = [self._batches[shard].slice(row - self._starts[shard], 1) for shard, row in zip(shards, wanted, strict=True)]
        return pa.Table.from_batches(found, self._schema).combine_chunks()


def cache_faults(folder: Path | str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """File → what is wrong with it, of a cache in a local folder or at a URL. Nothing is changed."""
    found = {}
    for name in manifest["shards"]:
        try:
            read_shard(folder, manifest, name, KEY)
        except CorruptError as error:
            found[name] = str(error)
    for name in sorted({file.name for file in folder.iterdir()} - {MANIFEST, *manifest["shards"]}) if isinstance(folder, Path) else ():
        found[name] = f"{folder}/{name}: its manifest does not list it. Such a file is not read; remove it."
    return found


def repair_cache(
    folder: Path, manifest: dict[str, Any], damaged: Sequence[str], keys: Sequence[tuple[str, str, str]], store: Store
) -> None:
    """Write the damaged shards of a cache again, with the bytes that its manifest says.

    `keys` are context_id, example_id and prompt_sha of all its rows in their order. Raises MismatchError if these are not its rows,
    ShotlessError if the store lacks some of them or has other numbers for them.
    """
    shards = manifest["shards"]
    again = f"Run `dvc checkout`, or `dvc repro --force --single-item teacher@{folder.name}`, which scores only what the store lacks."
    if len(keys) != (count := sum(shards.values())):
        raise MismatchError(f"{folder}: {count:,} rows, and this run's data ask for {len(keys):,}. {again}")
    ends = dict(zip(shards, accumulate(shards.values()), strict=True))
    for name in damaged:
        context_ids, example_ids, prompts = zip(*keys[ends[name] - shards[name] : ends[name]], strict=True)
        try:
            rows = store.read(prompts)
        except ShotlessError as error:
            raise ShotlessError(f"{folder}/{name}: {error} {again}") from None
        copy = folder / f".{name}.repaired"
        write_rows(pa.table([pa.array(context_ids), pa.array(example_ids), *rows.columns], schema=SCORES), copy, SHARD_LEVEL)
        if sha256_file(copy) != manifest["files"][name]["sha256"]:
            copy.unlink()
            raise ShotlessError(f"{folder}/{name}: the store's rows are not those that its manifest has the hash of. {again}")
        copy.replace(folder / name)
