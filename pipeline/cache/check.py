"""What is wrong with a cache, shard by shard, and which rows have to be scored again for it.

Everything is read: sizes, sha256, page checksums, columns, keys, and whether the lists of a row belong together. Nothing is changed. The
rows of a damaged shard are known without reading it, since shards hold a request's rows in its order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.folder import MANIFEST, read_manifest, read_shard, shard_fault
from pipeline.cache.keys import Key, digests, keys_of
from pipeline.cache.rows import read_rows
from pipeline.errors import CorruptError, MismatchError, ShotlessError
from pipeline.places import Place, Remote
from pipeline.schema import SCORES

ALIKE = (("topk_ids", "topk_logprobs"), ("sampled_ids", "sampled_logprobs", "sampled_counts"))
"""Columns whose lists have one length at every position."""


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong."""

    what: str
    keys: tuple[Key, ...] = ()
    """Rows that have to be scored again, or taken from the store."""
    error: type[ShotlessError] = CorruptError


@dataclass
class Findings:
    """A cache's faults, and what is in order of it."""

    faults: list[Fault] = field(default_factory=list)
    intact: list[Place] = field(default_factory=list)
    """Shards that are what the manifest says, of the fingerprint asked about."""
    manifest: dict[str, Any] | None = None
    """None where it is damaged or belongs to another teacher."""

    @property
    def keys(self) -> list[Key]:
        """All rows to be had again, each once."""
        return list(dict.fromkeys(key for fault in self.faults for key in fault.keys))


def check_cache(folder: Place, request: Sequence[Key] | None, fingerprint: Fingerprint | None) -> Findings:
    """Check a cache against its manifest, against the rows that this run's data ask for, and against this run's fingerprint.

    None leaves a comparison out: where data or model are not there, bytes are checked all the same.
    """
    found = Findings()
    every = tuple(request or ())
    try:
        manifest = read_manifest(folder)
    except ShotlessError as error:
        found.faults.append(Fault(str(error), every))
        return found
    if fingerprint is not None:
        try:
            fingerprint.check(manifest["fingerprint"], folder / MANIFEST)
        except MismatchError as error:
            found.faults.append(Fault(str(error), every, MismatchError))
            return found
    found.manifest = manifest
    _check_shards(folder, manifest, request, found)
    named = {shard["file"] for shard in manifest["shards"]} | {MANIFEST}
    if strangers := sorted(path.name for path in folder.iterdir() if path.name not in named):
        found.faults.append(Fault(f"{folder}: the manifest does not name {', '.join(strangers)}; such files are not read"))
    return found


def _check_shards(folder: Place, manifest: dict[str, Any], request: Sequence[Key] | None, found: Findings) -> None:
    rows = sum(shard["rows"] for shard in manifest["shards"])
    in_order = request is not None and rows == len(request)  # else data have changed since, and shards are matched by their keys
    held, start = [np.empty((0, 2), dtype=np.uint64)], 0
    damaged = False
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        expected = list(request[start : start + shard["rows"]]) if request is not None and in_order else None
        start += shard["rows"]
        faults = _shard_faults(folder, path, shard, expected, manifest, held)
        found.faults += [Fault(what, tuple(expected or ())) for what in faults]
        damaged = damaged or bool(faults)
        if not faults:
            found.intact.append(path)
    keys = np.concatenate(held)
    if twice := len(keys) - len(np.unique(keys, axis=0)):
        found.faults.append(Fault(f"{folder}: {twice} rows stand in it more than once"))
    if request is not None and not in_order:
        wanted = digests(request)
        present = {key.tobytes() for key in keys}
        lacking = tuple(request[row] for row, key in enumerate(wanted) if key.tobytes() not in present)
        what = f"{folder}: {rows:,} rows, and this run's data ask for {len(request):,}"
        found.faults.append(Fault(f"{what}; what damaged shards held counts as lacking" if damaged else what, lacking, MismatchError))


def _shard_faults(
    folder: Place, path: Place, shard: dict[str, Any], expected: list[Key] | None, manifest: dict[str, Any], held: list[np.ndarray]
) -> list[str]:
    """What is wrong with one shard; the digests of its keys go to `held` where it can be read."""
    try:
        if isinstance(path, Remote):
            rows = read_shard(folder, shard)
        elif fault := shard_fault(folder, shard):
            return [fault]
        else:
            rows = read_rows(path, SCORES)
    except CorruptError as error:
        return [str(error)]
    keys = keys_of(rows)
    faults = row_faults(rows, manifest)
    if len(rows) != shard["rows"]:
        faults.append(f"{len(rows):,} rows, the manifest says {shard['rows']:,}")
    if expected is not None and keys != expected:
        first = next(
            (row for row, (one, other) in enumerate(zip(keys, expected, strict=False)) if one != other), min(len(keys), len(expected))
        )
        faults.append(f"row {first} is not the one that this run's data ask for there")
    if not faults:
        held.append(digests(keys))
    return [f"{path}: {fault}" for fault in faults]


def row_faults(rows: pa.Table, manifest: dict[str, Any]) -> list[str]:
    """Rows whose lists do not belong together, or whose numbers cannot be: one line for each kind, with the number of rows."""
    kept = manifest["fingerprint"]["cache"]
    labels = len(manifest["fingerprint"]["completions"]) if manifest["fingerprint"]["completion"] is None else 0
    positions = _lengths(rows, "log_z")
    expected = {
        "label_logprobs": np.full(len(rows), labels),
        "completion_ids": positions if not labels else np.zeros(len(rows)),
        "completion_logprobs": positions if not labels else np.zeros(len(rows)),
    }
    per_position = [name for name in SCORES.names[SCORES.names.index("topk_ids") :] if name != "log_z"]
    faults = []
    for name, length in (expected | dict.fromkeys(per_position, positions)).items():
        if wrong := int((_lengths(rows, name) != length).sum()):
            faults.append(f"{wrong:,} rows have lists of another length in {name} than their answer positions")
    if faults:
        return sorted(faults)
    for names in ALIKE:
        one = _lengths(rows, names[0], 1)
        faults += [
            f"lists of another length in {other} than in {names[0]}" for other in names[1:] if (_lengths(rows, other, 1) != one).any()
        ]
    if (_lengths(rows, "entropies", 1) != 1 + len({t for t in kept["temperatures"] if t != 1.0})).any():
        faults.append("entropies for other temperatures than the manifest's")
    for name in ("label_logprobs", "completion_logprobs", "topk_logprobs", "sampled_logprobs", "full_logprobs"):
        values = _numbers(rows, name)
        if wrong := int((np.isnan(values) | (values > 1e-3)).sum()):
            faults.append(f"{wrong:,} values in {name} are no log-probabilities")
    if wrong := int((~((_numbers(rows, "tail_mass") >= 0) & (_numbers(rows, "tail_mass") <= 1.001))).sum()):
        faults.append(f"{wrong:,} values in tail_mass are no probabilities")
    return faults


def _lengths(rows: pa.Table, name: str, depth: int = 0) -> np.ndarray:
    """Lengths of a column's lists, or of the lists in them."""
    column = rows[name].combine_chunks()
    for _ in range(depth):
        column = column.flatten()
    return np.diff(column.offsets.to_numpy())


def _numbers(rows: pa.Table, name: str) -> np.ndarray:
    column = rows[name].combine_chunks()
    while pa.types.is_list(column.type):
        column = column.flatten()
    return column.to_numpy(zero_copy_only=False)
