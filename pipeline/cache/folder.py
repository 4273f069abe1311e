"""The score cache as an artifact: Parquet shards and a manifest that says what they are and what their bytes must be.

The manifest is written last, so its presence means done. Reading checks every shard's hash and row count, and the fingerprint against the
run's own: a cache is used only where it belongs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.cache.fingerprint import Fingerprint
from pipeline.errors import CorruptError, ShotlessError
from pipeline.files import read_json, write_json
from pipeline.hashing import sha256_file
from pipeline.schema import SCHEMA_VERSION, SCORES, read_table, write_table

ROWS_PER_SHARD = 16_384
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ScoreCache:
    """A cache read back: rows as in `schema.SCORES`, and the manifest."""

    rows: pa.Table
    manifest: dict[str, Any]


def write_cache(folder: Path, rows: pa.Table, fingerprint: Fingerprint, about: dict[str, Any]) -> None:
    """Write shards of `rows` in their order, then the manifest with `about` in it."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, start in enumerate(range(0, len(rows), ROWS_PER_SHARD)):
        path = folder / f"part-{number:05d}.parquet"
        shard = rows.slice(start, ROWS_PER_SHARD)
        write_table(shard, path)
        shards.append({"file": path.name, "rows": len(shard), "sha256": sha256_file(path), "bytes": path.stat().st_size})
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint.model_dump(),
        "fingerprint_sha256": fingerprint.sha256,
        **about,
        "shards": shards,
        "totals": {"rows": len(rows), "bytes": sum(shard["bytes"] for shard in shards)},
    }
    write_json(manifest, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises ShotlessError where it is missing: the capture did not end.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ShotlessError(f"{path}: missing, so this capture did not end; `dvc repro` goes on with it.")
    manifest = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version")
        raise CorruptError(f"{path}: schema version {found}, this version reads {SCHEMA_VERSION}; run `dvc repro`.")
    return manifest


def read_cache(folder: Path) -> ScoreCache:
    """All rows of a cache, after checking that every shard is the one its manifest names.

    Raises CorruptError naming the shard and what is wrong with it.
    """
    manifest = read_manifest(folder)
    tables = []
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise CorruptError(f"{path}: the manifest names this shard, and it is missing; run `dvc checkout` or `dvc repro`.")
        if (found := sha256_file(path)) != shard["sha256"]:
            raise CorruptError(f"{path}: sha256 {found} is not the manifest's {shard['sha256']}; run `dvc checkout` or `dvc repro`.")
        table = read_table(path, SCORES)
        if len(table) != shard["rows"]:
            raise CorruptError(f"{path}: {len(table)} rows, the manifest says {shard['rows']}; run `dvc repro`.")
        tables.append(table)
    return ScoreCache(pa.concat_tables(tables or [SCORES.empty_table()]), manifest)
