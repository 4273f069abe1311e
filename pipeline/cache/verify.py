"""What is damaged in a score cache, and how its shards are made again from the store. No model is needed.

Everything is read: hashes, keys, and whether the lists of a row belong together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.encodings import temperatures
from pipeline.cache.folder import SHARD_LEVEL, cache_manifest, read_shard
from pipeline.cache.store import Store, write_rows
from pipeline.errors import CorruptError, MismatchError, ShotlessError
from pipeline.files import MANIFEST, sha256_file
from pipeline.params import CacheParams
from pipeline.schema import KEY, SCORES

EQUAL_LENGTHS = (("topk_ids", "topk_logprobs"), ("sampled_ids", "sampled_logprobs"), ("sampled_ids", "sampled_counts"))
"""Columns whose lists have one length at every position."""
ROUNDING = 1e-3
"""What rounding may add to a probability of 1, or to its logarithm."""
LOG_PROBABILITIES = ("label_logprobs", "completion_logprobs", "topk_logprobs", "sampled_logprobs", "full_logprobs")
RANGES = {**dict.fromkeys(LOG_PROBABILITIES, (-np.inf, ROUNDING)), "tail_mass": (0.0, 1 + ROUNDING)}


@dataclass
class Findings:
    """What `check_cache` found."""

    manifest: dict[str, Any] | None = None
    """None if it is damaged or missing."""
    faults: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    """Names of the shards that have faults."""


def check_cache(folder: Path | str) -> Findings:
    """Every fault of a cache, in a local folder or at a URL. Nothing is changed."""
    try:
        manifest = cache_manifest(folder)
    except ShotlessError as error:
        return Findings(faults=[str(error)])
    found, rows, keys = Findings(manifest), 0, set()
    for name in manifest["shards"]:
        try:
            shard = read_shard(folder, manifest, name)
        except CorruptError as error:
            faults = [str(error)]
        else:
            rows += len(shard)
            keys.update(zip(*(shard[column].to_pylist() for column in KEY), strict=True))
            faults = [f"{folder}/{name}: {fault}" for fault in row_faults(shard, manifest)]
        found.faults += faults
        found.damaged += [name] if faults else []
    if rows > len(keys):
        found.faults.append(f"{folder}: {rows - len(keys):,} rows are in it more than once.")
    if isinstance(folder, Path) and (others := sorted({file.name for file in folder.iterdir()} - {MANIFEST, *manifest["shards"]})):
        found.faults.append(f"{folder}: its manifest does not list {', '.join(others)}. Such files are not read; remove them.")
    return found


def row_faults(rows: pa.Table, manifest: dict[str, Any]) -> list[str]:
    """What is wrong with rows of `schema.SCORES`: lists that do not belong together, numbers that cannot be."""
    positions, nothing = _lengths(rows, "log_z"), np.zeros(len(rows), dtype=int)
    expected = dict.fromkeys(SCORES.names[SCORES.names.index("topk_ids") :], positions)
    if manifest["task"]["completion"] is None:
        expected |= {"label_logprobs": nothing + len(manifest["labels"]), "completion_ids": nothing, "completion_logprobs": nothing}
    else:
        expected |= {"label_logprobs": nothing, "completion_ids": positions, "completion_logprobs": positions}
    faults = [
        f"{wrong:,} rows have lists in {name} that are not as long as their answer."
        for name, length in expected.items()
        if (wrong := int((_lengths(rows, name) != length).sum()))
    ]
    if faults:  # the lists in them are not of the same positions
        return faults
    for one, other in EQUAL_LENGTHS:
        if (_lengths(rows, one, 1) != _lengths(rows, other, 1)).any():
            faults.append(f"lists in {other} are not as long as those in {one}.")
    if (_lengths(rows, "entropies", 1) != len(temperatures(CacheParams.model_validate(manifest["cache"])))).any():
        faults.append("entropies are not those of the manifest's temperatures.")
    for name, (least, most) in RANGES.items():
        values: Any = rows[name].combine_chunks()
        while pa.types.is_list(values.type):
            values = values.flatten()
        numbers = values.to_numpy(zero_copy_only=False)
        if wrong := int((~((numbers >= least) & (numbers <= most))).sum()):  # NaN is in no range
            faults.append(f"{wrong:,} values in {name} are not {'log-' if name in LOG_PROBABILITIES else ''}probabilities.")
    return faults


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
        own = keys[ends[name] - shards[name] : ends[name]]
        try:
            rows = store.read([prompt for _, _, prompt in own])
        except ShotlessError as error:
            raise ShotlessError(f"{folder}/{name}: {error} {again}") from None
        columns = {column: pa.array([key[at] for key in own]) for at, column in enumerate(KEY)}
        table = pa.table(columns | {column: rows[column] for column in rows.column_names}, schema=SCORES)
        copy = folder / f".{name}.repaired"
        write_rows(table, copy, SHARD_LEVEL)
        if sha256_file(copy) != manifest["files"][name]["sha256"]:
            copy.unlink()
            raise ShotlessError(f"{folder}/{name}: the store's rows are not those that its manifest has the hash of. {again}")
        copy.replace(folder / name)


def _lengths(rows: pa.Table, name: str, depth: int = 0) -> np.ndarray:
    """Lengths of a column's lists, or of the lists in them."""
    column: Any = rows[name].combine_chunks()
    for _ in range(depth):
        column = column.flatten()
    return np.diff(column.offsets.to_numpy())
