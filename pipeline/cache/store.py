"""The content-addressed store of rows, under `.work/`: what has been scored once is never scored again.

DVC empties a stage's output folder before the stage runs, so the store lies outside it. Rows are kept by (context, example) in one folder
for each fingerprint, in sealed files (`rows.py`). A request is taken in blocks of as many rows as a shard of the cache has; a block is
planned once and its plan is kept: parts of whole batches, each one file. A killed run finds the plan, skips the parts that are there, and
scores the others in the very batches an unbroken run would have used, so that the bytes are the same. Memory holds one block and the keys.

A part whose bytes are not those that its name promises is never read: it is set aside, and its part of the plan is scored again, in the
same batches, to the same bytes.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout

from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.keys import KEY, Key, KeyIndex, blocks, digest, keys_of
from pipeline.cache.rows import read_rows, read_sealed, rows_per_shard, sealed_stem, write_sealed
from pipeline.errors import CorruptError, ShotlessError
from pipeline.files import read_json, write_json
from pipeline.schema import SCORES

LOCK_SECONDS = 3600
SET_ASIDE = ".damaged"
KEYS = pa.schema([SCORES.field(name) for name in KEY])
PLAN = pa.schema([pa.field("part", pa.int64(), nullable=False), *KEYS])

Divide = Callable[[list[Key]], list[list[Key]]]


@dataclass(frozen=True)
class Part:
    """Rows that are scored and written together."""

    stem: str
    keys: tuple[Key, ...]


class Store:
    """Scored rows of one fingerprint."""

    def __init__(self, root: Path, fingerprint: Fingerprint) -> None:
        self.folder = root / "scores" / fingerprint.sha256[:32]
        self.plans = self.folder / "plans"
        self.plans.mkdir(parents=True, exist_ok=True)
        self.rows_per_block = rows_per_shard(fingerprint)
        about = self.folder / "fingerprint.json"
        try:
            found = read_json(about)
        except (FileNotFoundError, ValueError):  # new, or damaged: the folder's own name says what belongs in it
            found = fingerprint.model_dump()
            write_json(found, about)
        fingerprint.check(found, about)
        self._files: list[Path] = []
        self._index = KeyIndex()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time: a second run waits for the first, and then finds its rows."""
        path = self.folder / "lock"
        try:
            with FileLock(path, timeout=LOCK_SECONDS):
                for left_behind in [*self.folder.glob(".*.tmp"), *self.plans.glob(".*.tmp")]:
                    left_behind.unlink()
                self._refresh()
                yield
        except Timeout:
            raise ShotlessError(
                f"{path}: another run has been scoring for {LOCK_SECONDS} s; wait for it, or end it and run again."
            ) from None

    def missing(self, request: Sequence[Key]) -> np.ndarray:
        """Which rows of a request have to be scored, [N] bool. The lock is held."""
        found = [self._index.find(block)[:, 0] < 0 for block in blocks(request, self.rows_per_block)]
        return np.concatenate(found) if found else np.zeros(0, dtype=bool)

    def parts(self, request: Sequence[Key], divide: Divide) -> Iterator[Part]:
        """The parts that a request still needs, to be scored and written in turn. `divide` turns missing keys of a block into parts, and
        is asked once for a block. The lock is held.
        """
        missing = self.missing(request)
        for number, block in enumerate(blocks(request, self.rows_per_block)):
            mask = missing[number * self.rows_per_block :][: len(block)]
            if mask.any():
                yield from self._plan(block, {key for key, absent in zip(block, mask, strict=True) if absent}, divide)

    def write(self, part: Part, rows: pa.Table) -> None:
        """Write the rows of one part, whole or not at all."""
        self._add(write_sealed(rows, self.folder, part.stem), part.keys)
        for damaged in self.folder.glob(f"{part.stem}-*{SET_ASIDE}"):
            damaged.unlink()

    def put(self, rows: pa.Table, stem: str) -> None:
        """Rows that were scored elsewhere under the same fingerprint. The lock is held."""
        self._add(write_sealed(rows, self.folder, f"part-{stem}"), keys_of(rows))

    def read(self, request: Sequence[Key], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The rows of a request in its order, block by block, with the columns of `schema.SCORES` or some of them.

        Raises ShotlessError where a row is not there, CorruptError where a file has changed since the lock was taken.
        """
        if not self._files:
            with self.lock():
                pass
        places = [self._index.find(block) for block in blocks(request, self.rows_per_block)]
        if missing := sum(int((found[:, 0] < 0).sum()) for found in places):
            raise ShotlessError(f"{self.folder}: {missing} of {len(request)} rows were not scored; run the stage again.")
        return (self._take(found, columns) for found in places)

    def _take(self, places: np.ndarray, columns: Sequence[str] | None) -> pa.Table:
        """Rows by (file number, row in it), in order; each file is read once."""
        schema = SCORES if columns is None else pa.schema([SCORES.field(name) for name in columns])
        tables, order = [], []
        for number in np.unique(places[:, 0]):
            wanted = np.flatnonzero(places[:, 0] == number)
            tables.append(read_rows(read_sealed(self._files[number]), schema).take(places[wanted, 1]))
            order.append(wanted)
        rows = pa.concat_tables(tables).combine_chunks()
        return rows.take(np.argsort(np.concatenate(order)))

    def _plan(self, block: list[Key], missing: set[Key], divide: Divide) -> Iterator[Part]:
        """Parts of a block's missing rows: damaged ones as they were planned, then the block's own plan, then what has none yet."""
        for damaged in sorted(self.folder.glob(f"*{SET_ASIDE}")):
            stem = sealed_stem(damaged.with_suffix(""))
            keys = self._planned(stem)
            if keys and not missing.isdisjoint(keys):
                yield Part(stem, keys)
                missing -= set(keys)
        name = digest(block)
        kept = sorted(self.plans.glob(f"{name}-*.parquet"))
        for plan in kept:
            for number, keys in enumerate(self._read_plan(plan)):
                stem = f"part-{sealed_stem(plan)}-{number:06d}"
                if not missing.isdisjoint(keys) and not any(self.folder.glob(f"{stem}-*.parquet")):
                    yield Part(stem, keys)
                    missing -= set(keys)
        if missing:
            divided = divide([key for key in block if key in missing])
            last = max((int(sealed_stem(plan).rpartition("-")[2]) for plan in kept), default=-1)
            stem = f"{name}-{last + 1:03d}"
            rows = [(number, *key) for number, keys in enumerate(divided) for key in keys]
            write_sealed(pa.table(list(map(pa.array, zip(*rows, strict=True))), schema=PLAN), self.plans, stem)
            for number, keys in enumerate(divided):
                yield Part(f"part-{stem}-{number:06d}", tuple(keys))

    def _planned(self, stem: str) -> tuple[Key, ...]:
        """The keys of a part that was planned; none where its plan is gone."""
        _, block, number, part = stem.split("-")[:4] if stem.count("-") == 3 else ("", "", "", "")
        for plan in self.plans.glob(f"{block}-{number}-*.parquet") if block else ():
            parts = self._read_plan(plan)
            if int(part) < len(parts):
                return parts[int(part)]
        return ()

    def _read_plan(self, plan: Path) -> list[tuple[Key, ...]]:
        try:
            table = read_rows(read_sealed(plan), PLAN).to_pydict()
        except CorruptError as error:
            print(f"{error}; it is left out, and what it planned is planned again", file=sys.stderr)
            plan.unlink(missing_ok=True)
            return []
        parts: dict[int, list[Key]] = {}
        for number, *key in zip(table["part"], *(table[name] for name in KEY), strict=True):
            parts.setdefault(number, []).append((key[0], key[1]))
        return [tuple(parts[number]) for number in sorted(parts)]

    def _refresh(self) -> None:
        """Read the keys of files that are new since the last look; set damaged ones aside."""
        known = set(self._files)
        for file in sorted(self.folder.glob("part-*.parquet")):
            if file in known:
                continue
            try:
                self._add(file, keys_of(read_rows(read_sealed(file), KEYS)))
            except CorruptError as error:
                print(f"{error}; its rows are scored again", file=sys.stderr)
                file.replace(file.with_name(file.name + SET_ASIDE))

    def _add(self, file: Path, keys: Sequence[Key]) -> None:
        self._index.add(len(self._files), keys)
        self._files.append(file)

