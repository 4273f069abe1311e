"""The store: scored rows under the work folder, found by `prompt_sha`. What is in it is never scored again.

DVC empties a stage's output folder before the stage runs, so the store lies outside. It has one folder for each identity: all that decides
a row's numbers except its prompt (weights, number format, what is kept of a distribution, versions).

    work/scores/IDENTITY/identity.json
                         plan-00000.parquet         which prompts are scored together
                         part-00000-000003.parquet  the rows of one part of plan 0

A plan is written before its first part is scored. A run that was killed finds the plan and scores the parts that are not there in the same
batches, so the rows have the same bytes as those of an unbroken run. A damaged part is set aside and scored again, in the same batches too.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptError, ShotlessError
from pipeline.files import one_writer, read_json, replacing, sha256_json, write_json
from pipeline.schema import STORED, read_table, write_table

PLAN = pa.schema([pa.field("prompt_shas", pa.list_(pa.string()), nullable=False)])
"""A row for each part."""
ABOUT = b"shotless"
"""Key of a part's Parquet metadata: JSON with the `seconds` that scoring it took and the `engine` that did it."""
DAMAGED = ".damaged"
PART_LEVEL = 3
"""zstd level of parts, which are written while the teacher waits."""
SPLIT = (pa.int32(), pa.float32())
"""Numbers stored as split byte streams. DuckDB cannot read half floats stored that way."""

Divide = Callable[[list[str]], list[list[str]]]


@dataclass(frozen=True)
class Part:
    """Prompts that are scored and written together."""

    name: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class _Held:
    """A part that is on disk."""

    rows: int
    seconds: float
    engine: dict[str, Any]


class Store:
    """The scored rows of one identity."""

    def __init__(self, work: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self._identity = work / "scores" / sha256_json(identity)[:32], identity
        self._held: dict[str, _Held] = {}
        self._plans: list[Part] = []
        self._rows: dict[str, tuple[str, int]] = {}  # prompt_sha → part, row in it

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one writer. A second run waits here, and then finds the first one's rows. Damaged files are set aside."""
        with one_writer(self.folder / "lock"):
            for leftover in self.folder.glob(".*.tmp"):
                leftover.unlink()
            if _identity_of(self.folder) != self._identity:  # new, or damaged: the folder is named after what belongs there
                write_json(self._identity, self.folder / "identity.json")
            for path, error in self._look():
                print(f"{error}\nIt is set aside. Its rows are scored again when they are needed.", file=sys.stderr)
                path.replace(f"{path}{DAMAGED}")
            yield

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The prompts that have to be scored: each once, in their order. The lock is held."""
        return [key for key in dict.fromkeys(keys) if key not in self._rows]

    def parts(self, missing: Sequence[str], divide: Divide) -> Iterator[Part]:
        """What to score and write, in this order. The lock is held.

        Parts of earlier plans come first, the damaged ones before others, if all of their prompts are missing. `divide` turns the rest
        into lists of prompts that are scored together.
        """
        wanted = set(missing)
        unfinished = [part for part in self._plans if part.name not in self._held]
        for part in sorted(unfinished, key=lambda part: (not self._file(part.name, DAMAGED).exists(), part.name)):
            if wanted.issuperset(part.keys):
                wanted.difference_update(part.keys)
                yield part
        if rest := [key for key in missing if key in wanted]:
            numbers = [int(path.name.split("-")[1][:5]) for path in self.folder.glob("p*-*")]
            path = self._file(f"plan-{max(numbers, default=-1) + 1:05d}")
            write_table(pa.table({"prompt_shas": divide(rest)}, schema=PLAN), path)
            self._plans += (parts := _read_plan(path))
            yield from parts

    def write(self, part: Part, rows: pa.Table, seconds: float, engine: Mapping[str, Any]) -> None:
        """Write a part's rows (`schema.STORED`, in the order of its keys), the seconds that scoring them took, and which engine did it."""
        if (found := rows["prompt_sha"].to_pylist()) != list(part.keys):
            raise ValueError(f"{part.name}: {len(found)} rows that are not those of its {len(part.keys)} prompts")
        about = {"seconds": round(seconds, 4), "engine": dict(engine)}
        write_rows(rows.cast(STORED).replace_schema_metadata({ABOUT: json.dumps(about)}), self._file(part.name), PART_LEVEL)
        self._add(part.name, found, about)
        self._file(part.name, DAMAGED).unlink(missing_ok=True)

    def read(self, keys: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of some prompts in their order: the columns of `schema.STORED`, or some of them.

        Raises ShotlessError if a row is not there, CorruptError if a part was damaged since it was last read.
        """
        self._look_once()
        if missing := self.missing(keys):
            raise ShotlessError(f"{self.folder}: {len(missing):,} of {len(keys):,} rows are not here. Run the stage again: it scores them.")
        schema = STORED if columns is None else pa.schema([STORED.field(name) for name in columns])
        places = [self._rows[key] for key in keys]
        order = sorted(range(len(places)), key=places.__getitem__)  # part by part
        tables = [
            read_table(self._file(name), schema).take([row for _, row in own])
            for name, own in groupby((places[at] for at in order), key=lambda place: place[0])
        ]
        return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks().take(np.argsort(order))

    def seconds(self, keys: Sequence[str]) -> tuple[float, int]:
        """The seconds that scoring these prompts took, whenever that was, and how many of them are here."""
        counts = self._counts(keys)
        return sum(self._held[name].seconds * count / self._held[name].rows for name, count in counts.items()), counts.total()

    def engines(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The engines that scored these prompts, each once, in an order that depends on them alone."""
        found = {json.dumps(self._held[name].engine, sort_keys=True): self._held[name].engine for name in self._counts(keys)}
        return [found[text] for text in sorted(found)]

    def faults(self) -> list[str]:
        """What is damaged here, a line each. Nothing is changed."""
        return [str(error) for _, error in self._look()]

    def _counts(self, keys: Sequence[str]) -> Counter[str]:
        """Part → how many of its rows are asked for."""
        self._look_once()
        return Counter(self._rows[key][0] for key in dict.fromkeys(keys) if key in self._rows)

    def _file(self, name: str, ending: str = "") -> Path:
        return self.folder / f"{name}.parquet{ending}"

    def _look_once(self) -> None:
        if not self._held:
            with self.lock():
                pass

    def _look(self) -> list[tuple[Path, CorruptError]]:
        """Read all plans, and the parts that are new since the last look, every page of them; returns what is damaged."""
        damaged: list[tuple[Path, CorruptError]] = []
        self._plans = []
        for path in sorted(self.folder.glob("p*.parquet")):
            try:
                if path.stem.startswith("plan-"):
                    self._plans += _read_plan(path)
                elif path.stem not in self._held:
                    keys = read_table(path, STORED)["prompt_sha"].to_pylist()
                    self._add(path.stem, keys, _about(path))
            except CorruptError as error:
                damaged.append((path, error))
        return damaged

    def _add(self, name: str, keys: list[str], about: Mapping[str, Any]) -> None:
        self._held[name] = _Held(len(keys), about["seconds"], about["engine"])
        for row, key in enumerate(keys):
            self._rows.setdefault(key, (name, row))


def stores(work: Path) -> dict[Path, dict[str, Any] | None]:
    """Every store's folder under a work folder, and its identity; None if identity.json is damaged: not what the folder is named after."""
    return {folder: _identity_of(folder) for folder in sorted(work.glob("scores/*")) if folder.is_dir()}


def write_rows(rows: pa.Table, path: Path, level: int) -> None:
    """Write scored rows as one Parquet file of one row group, whole or not at all: equal rows give equal bytes.

    Numbers are split into byte streams: sign and exponent of log-probabilities and the high bytes of ids compress well, the rest hardly.
    Each page has a checksum.
    """
    split = []
    for field in rows.schema:
        leaf, kind = field.name, field.type
        while pa.types.is_list(kind):
            leaf, kind = f"{leaf}.list.element", kind.value_type  # Parquet's name of a column's numbers
        split += [leaf] if kind in SPLIT else []
    settings: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": level,
        "row_group_size": max(1, len(rows)),
        "use_dictionary": [name for name in rows.schema.names if name == "context_id"],
        "use_byte_stream_split": split,
        "write_statistics": [field.name for field in rows.schema if not pa.types.is_nested(field.type)],
        "write_page_checksum": True,
    }
    with replacing(path) as temporary:
        pq.write_table(rows.combine_chunks(), temporary, **settings)


def _read_plan(path: Path) -> list[Part]:
    plan = read_table(path, PLAN)["prompt_shas"].to_pylist()
    return [Part(f"{path.stem.replace('plan', 'part')}-{number:06d}", tuple(keys)) for number, keys in enumerate(plan)]


def _about(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(pq.read_schema(path).metadata[ABOUT])
        return {"seconds": float(about["seconds"]), "engine": dict(about["engine"])}
    except (OSError, pa.ArrowException, TypeError, KeyError, ValueError) as error:
        raise CorruptError(f"{path}: does not say who scored it ({error!r}).") from None


def _identity_of(folder: Path) -> dict[str, Any] | None:
    try:
        identity = read_json(folder / "identity.json")
    except (FileNotFoundError, CorruptError):
        return None
    return identity if sha256_json(identity)[:32] == folder.name else None
