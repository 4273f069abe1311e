"""The store: scored rows under the work folder, found by `prompt_sha`. What is in it is never scored again.

DVC empties a stage's output folder before the stage runs, so the store lies outside. It has one folder for each identity: all that decides
a row's numbers except its prompt (weights, number format, what is kept of a distribution, versions).

    work/scores/IDENTITY/identity.json
                         part-0f3a….parquet  rows that were scored together, named after their prompts

Which prompts are scored together follows from what is asked for, not from what is here already (`teachers.scorer`). So a run that was
killed goes on in the same batches, and its rows have the bytes of an unbroken run's. A damaged part is set aside and scored again.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptError, ShotlessError
from pipeline.files import one_writer, read_json, replacing, sha256_json, write_json
from pipeline.schema import STORED, read_table

ABOUT = b"shotless"  # key of a part's Parquet metadata: JSON with the `seconds` that scoring it took and the `engine` that did it
PART_LEVEL = 3  # zstd level of parts, which are written while the teacher waits
SPLIT = (pa.int32(), pa.float32())  # numbers stored as split byte streams. DuckDB cannot read half floats stored that way.


class Store:
    """The scored rows of one identity."""

    def __init__(self, work: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self._identity = work / "scores" / sha256_json(identity)[:32], identity
        self._parts: dict[Path, dict[str, Any]] = {}  # part → seconds a row, engine
        self._rows: dict[str, tuple[Path, int]] = {}  # prompt_sha → part, row in it

    @contextmanager
    def request(self, keys: Sequence[str]) -> Iterator[None]:
        """Be the one that has these prompts scored: a second run waits here, and then finds the first one's rows. Other requests go on."""
        with one_writer(self.folder / f"lock-{sha256_json(list(keys))[:16]}"):
            with self.lock():  # looks at the files
                pass
            yield

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one that tidies up: damaged files are set aside, and what a killed run has left is removed."""
        with one_writer(self.folder / "lock"):
            for leftover in self.folder.glob(".*.tmp"):
                if not psutil.pid_exists(int(leftover.suffixes[-2].removeprefix("."))):  # it may be written now
                    leftover.unlink()
            if _identity_of(self.folder) != self._identity:  # new, or damaged: the folder is named after what belongs there
                write_json(self._identity, self.folder / "identity.json")
            for path, fault in self.faults().items():
                print(f"{fault}\nIt is set aside. Its rows are scored again when they are needed.", file=sys.stderr)
                path.replace(f"{path}.damaged")
            yield

    def missing(self, keys: Sequence[str]) -> list[str]:
        """The prompts that have to be scored: each once, in their order. Their request is held."""
        return [key for key in dict.fromkeys(keys) if key not in self._rows]

    def write(self, rows: pa.Table, seconds: float, engine: Mapping[str, Any]) -> None:
        """Write rows that were scored together (`schema.STORED`), the seconds that it took, and which engine did it."""
        keys, about = rows["prompt_sha"].to_pylist(), {"seconds": round(seconds, 4), "engine": dict(engine)}
        path = self.folder / f"part-{sha256_json(keys)[:32]}.parquet"
        write_rows(rows.cast(STORED).replace_schema_metadata({ABOUT: json.dumps(about)}), path, PART_LEVEL)
        self._add(path, keys, about)

    def read(self, keys: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of some prompts in their order, all columns or some. Raises ShotlessError if one is not there or was damaged since."""
        if self.missing(keys):
            with self.lock():  # looks at the files
                pass
        if missing := self.missing(keys):
            raise ShotlessError(f"{self.folder}: {len(missing):,} of {len(keys):,} rows are not here. Run the stage again: it scores them.")
        schema = STORED if columns is None else pa.schema([STORED.field(name) for name in columns])
        places = [self._rows[key] for key in keys]
        order = sorted(range(len(places)), key=places.__getitem__)  # part by part
        tables = [
            read_table(path, schema).take([row for _, row in own])
            for path, own in groupby((places[at] for at in order), key=lambda place: place[0])
        ]
        return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks().take(np.argsort(order))

    def seconds(self, keys: Sequence[str]) -> float:
        """The seconds that scoring these prompts took, whenever that was. They were read before."""
        return sum(self._parts[self._rows[key][0]]["seconds"] for key in dict.fromkeys(keys))

    def engines(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The engines that scored these prompts, each once, in an order that depends on them alone. They were read before."""
        engines = [self._parts[path]["engine"] for path in {self._rows[key][0] for key in keys}]
        found = {json.dumps(engine, sort_keys=True): engine for engine in engines}
        return [found[text] for text in sorted(found)]

    def faults(self) -> dict[Path, str]:
        """Read every page of the parts that are new since the last look: part → what is wrong with it. Nothing is changed."""
        found = {}
        for path in sorted({*self.folder.glob("part-*.parquet")} - self._parts.keys()):
            try:
                self._add(path, read_table(path, STORED)["prompt_sha"].to_pylist(), _about(path))
            except CorruptError as error:
                found[path] = str(error)
        return found

    def _add(self, path: Path, keys: list[str], about: Mapping[str, Any]) -> None:
        self._parts[path] = {"seconds": about["seconds"] / len(keys), "engine": about["engine"]}
        for row, key in enumerate(keys):
            self._rows.setdefault(key, (path, row))


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
