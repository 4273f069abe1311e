"""The content-addressed store of rows, under `.work/`: what has been scored once is never scored again.

DVC empties a stage's output folder before the stage runs, so the store lies outside it. Rows are kept by (context, example) in one folder
for each fingerprint, in sealed files (`rows.py`). A request is taken in blocks of as many rows as a shard of the cache has; a block is
planned once and its plan is kept: parts of whole batches, each one file. A killed run finds the plan, skips the parts that are there, and
scores the others in the very batches an unbroken run would have used, so that the bytes are the same. Memory holds one block and the keys.

A part whose bytes are not those that its name promises is never read: it is set aside, and its part of the plan is scored again, in the
same batches, to the same bytes.
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from pydantic import ValidationError

from pipeline.cache.fingerprint import Fingerprint
from pipeline.cache.keys import KEY, Key, KeyIndex, Request, blocks, digest, keys_of
from pipeline.cache.rows import read_rows, read_sealed, rows_per_shard, sealed_stem, write_sealed
from pipeline.errors import CorruptError, NotJsonError, ShotlessError
from pipeline.files import make_folder, read_json, read_sealed_json, replacing, write_json, write_sealed_json
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
        make_folder(self.plans)
        self.rows_per_block = rows_per_shard(fingerprint)
        about = self.folder / "fingerprint.json"
        try:
            found = read_json(about)
        except (FileNotFoundError, NotJsonError):
            found = None
        if found != fingerprint.model_dump():  # new, or damaged: the folder's own name says what belongs in it
            write_json(fingerprint.model_dump(), about)
        self._files: list[Path] = []  # by number in the index
        self._stems: set[str] = set()
        self._damaged: dict[str, list[Path]] = {}
        self._index = KeyIndex()

    @classmethod
    def at(cls, folder: Path) -> "Store":
        """The store in a folder. Raises CorruptError where its fingerprint.json is not what the folder is named after."""
        about = folder / "fingerprint.json"
        try:
            fingerprint = Fingerprint.model_validate(read_json(about))
        except (FileNotFoundError, ValidationError) as error:
            raise CorruptError(f"{about}: cannot be read as a fingerprint ({error}); the teacher's next run writes it again.") from None
        if fingerprint.sha256[:32] != folder.name:
            raise CorruptError(f"{about}: is not what its folder is named after; the teacher's next run writes it again.")
        return cls(folder.parents[1], fingerprint)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time: a second run waits for the first, and then finds its rows."""
        path = self.folder / "lock"
        try:
            with FileLock(path, timeout=LOCK_SECONDS):
                for left_behind in [*self.folder.glob(".part-*.tmp"), *self.plans.glob(".*.tmp")]:
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

    def parts(self, request: Request, divide: Divide) -> Iterator[Part]:
        """The parts that a request still needs, to be scored and written in turn. The lock is held.

        Damaged parts come first, as they were planned. `divide` turns missing keys of a block into parts, and is asked once for a block.
        """
        for stem in sorted(self._damaged):
            keys = self._planned(stem)
            if request.holds(keys).all() and (self._index.find(keys)[:, 0] < 0).any():
                yield Part(stem, keys)
        missing = self.missing(request)
        for number, block in enumerate(blocks(request, self.rows_per_block)):
            mask = missing[number * self.rows_per_block :][: len(block)]
            if mask.any():
                yield from self._plan(block, {key for key, absent in zip(block, mask, strict=True) if absent}, divide)

    def write(self, part: Part, rows: pa.Table, seconds: float | None = None) -> None:
        """Write the rows of one part, whole or not at all, and beside them the `seconds` that scoring took, where they are known."""
        if seconds is not None:
            write_sealed_json({"seconds": round(seconds, 4)}, self._time_of(part.stem))
        self._add(write_sealed(rows, self.folder, part.stem), part.keys)
        for damaged in self._damaged.pop(part.stem, []):
            _discard(damaged)

    def adopt(self, shard: Path, sha256: str) -> bool:
        """Take in a shard of a cache of this fingerprint, as it is, where a row of it is lacking. The lock is held. True: it was."""
        keys = keys_of(read_rows(shard, KEYS))
        if (self._index.find(keys)[:, 0] >= 0).all():
            return False
        path = self.folder / f"part-{sha256[:32]}-{sha256}.parquet"
        with replacing(path) as temporary:
            shutil.copyfile(shard, temporary)
        self._add(path, keys)
        return True

    def seconds(self, request: Request) -> tuple[float, int]:
        """The seconds that scoring the rows of a request took, whenever that was, and how many of the rows these seconds cover."""
        if not self._files:
            with self.lock():
                pass
        total, covered = 0.0, 0
        for file in self._files:
            time = self._time_of(sealed_stem(file))
            with suppress(FileNotFoundError, CorruptError):  # no time, or a damaged one: its rows count as not covered
                taken = read_sealed_json(time)["seconds"]
                held = keys_of(read_rows(file, KEYS))
                found = int(request.holds(held).sum())
                covered += found
                total += taken * found / len(held)
        return total, covered

    def _time_of(self, stem: str) -> Path:
        return self.folder / "times" / f"{stem}.json"

    def scan(self) -> Iterator[tuple[Path, Sequence[Key], CorruptError | None]]:
        """Every part not looked at yet with its keys, and what is wrong with it: a damaged one's keys are those that were planned."""
        for file in sorted(set(self.folder.glob("part-*.parquet")) - set(self._files)):
            try:
                yield file, keys_of(read_rows(read_sealed(file), KEYS)), None
            except CorruptError as error:
                yield file, self._planned(sealed_stem(file)), error

    def damaged_plans(self) -> list[str]:
        """What is wrong with plans. No row is lost with one, but a part of it that is lost too will be scored in other batches."""
        faults = []
        for plan in sorted(self.plans.glob("*.parquet")):
            try:
                _read_plan(plan)
            except CorruptError as error:
                faults.append(str(error))
        return faults

    def damaged_notes(self) -> list[tuple[Path, CorruptError]]:
        """What stands beside the rows and is not what was written: times, and the engine's report. No row hangs on them."""
        found = []
        for note in [*sorted((self.folder / "times").glob("*.json")), *self.folder.glob("engine.json")]:
            try:
                read_sealed_json(note)
            except CorruptError as error:
                found.append((note, error))
        return found

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
        """Parts of a block's missing rows: those of its plan that are not there, then what has no plan yet, or no longer one."""
        name = digest(block)
        last = -1
        for plan in sorted(self.plans.glob(f"{name}-*.parquet")):
            last = int(sealed_stem(plan).rpartition("-")[2])
            try:
                planned = _read_plan(plan)
            except CorruptError as error:
                print(f"{error}; what it planned is planned again", file=sys.stderr)
                plan.unlink()
                continue
            for number, keys in enumerate(planned):
                stem = f"part-{sealed_stem(plan)}-{number:06d}"
                if stem not in self._stems and not missing.isdisjoint(keys):
                    yield Part(stem, keys)
                    missing -= set(keys)
        if missing:
            stem = f"{name}-{last + 1:03d}"
            divided = divide([key for key in block if key in missing])
            rows = [(number, *key) for number, keys in enumerate(divided) for key in keys]
            write_sealed(pa.table(list(map(pa.array, zip(*rows, strict=True))), schema=PLAN), self.plans, stem)
            for number, keys in enumerate(divided):
                yield Part(f"part-{stem}-{number:06d}", tuple(keys))

    def _planned(self, stem: str) -> tuple[Key, ...]:
        """The keys of a part that was planned; none where its plan is gone or damaged."""
        plan, _, number = stem.removeprefix("part-").rpartition("-")
        for file in self.plans.glob(f"{plan}-*.parquet") if plan.count("-") == 1 else ():
            with suppress(CorruptError, IndexError):
                return _read_plan(file)[int(number)]
        return ()

    def _refresh(self) -> None:
        """Read the keys of files that are new since the last look; set damaged ones aside."""
        for file, keys, error in self.scan():
            if error is None:
                self._add(file, keys)
            else:
                print(f"{error}; its rows are scored again", file=sys.stderr)
                file.replace(file.with_name(file.name + SET_ASIDE))
        self._damaged = {}
        for file in sorted(self.folder.glob(f"*{SET_ASIDE}")):
            stem = sealed_stem(file.with_suffix(""))
            if (self._index.find(self._planned(stem))[:, 0] < 0).any():
                self._damaged.setdefault(stem, []).append(file)
            else:
                _discard(file)  # its rows are here again, or nothing says which they were

    def _add(self, file: Path, keys: Sequence[Key]) -> None:
        self._index.add(len(self._files), keys)
        self._files.append(file)
        self._stems.add(sealed_stem(file))


def _read_plan(plan: Path) -> list[tuple[Key, ...]]:
    """The keys of each part of a plan. Raises CorruptError."""
    table = read_rows(read_sealed(plan), PLAN).to_pydict()
    parts: dict[int, list[Key]] = {}
    for number, context, example in zip(table["part"], *(table[name] for name in KEY), strict=True):
        parts.setdefault(number, []).append((context, example))
    return [tuple(parts[number]) for number in sorted(parts)]


def _discard(damaged: Path) -> None:
    if damaged.is_dir():  # what a damaged file system may have made of a file
        shutil.rmtree(damaged)
    else:
        damaged.unlink(missing_ok=True)
