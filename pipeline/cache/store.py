"""The content-addressed store of rows, under `.work/`: what has been scored once is never scored again.

DVC empties a stage's output folder before the stage runs, so the store lies outside it. Rows are kept by (context, example) in one folder
for each fingerprint. A request is planned once and the plan is kept: parts of whole batches, each one file. A killed run finds the plan,
skips the parts that are there, and scores the others in the very batches an unbroken run would have used, so that the bytes are the same.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from pipeline.cache.fingerprint import Fingerprint
from pipeline.errors import ShotlessError
from pipeline.files import read_json, write_json
from pipeline.hashing import sha256_json
from pipeline.schema import SCORES, write_table

Key = tuple[str, str]
"""context_id, example_id."""
KEY = ["context_id", "example_id"]
LOCK_SECONDS = 3600


@dataclass(frozen=True)
class Part:
    """Rows that are scored and written together."""

    file: Path
    keys: tuple[Key, ...]


class Store:
    """Scored rows of one fingerprint."""

    def __init__(self, root: Path, fingerprint: Fingerprint) -> None:
        self.folder = root / "scores" / fingerprint.sha256[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "fingerprint.json"
        if not about.exists():
            write_json(fingerprint.model_dump(), about)
        fingerprint.check(read_json(about), about)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time: a second run waits for the first, and then finds its rows."""
        path = self.folder / "lock"
        try:
            with FileLock(path, timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise ShotlessError(
                f"{path}: another run has been scoring for {LOCK_SECONDS} s; wait for it, or end it and run again."
            ) from None

    def keys(self) -> pl.DataFrame:
        """The keys of all rows there are."""
        files = sorted(self.folder.glob("part-*.parquet"))
        if not files:
            return pl.DataFrame(schema=dict.fromkeys(KEY, pl.String))
        return pl.concat([pl.read_parquet(file, columns=KEY) for file in files]).unique(maintain_order=True)

    def plan(self, request: Sequence[Key], divide: Callable[[list[Key]], list[list[Key]]]) -> list[Part]:
        """The parts that a request still needs. `divide` turns missing keys into parts, and is asked once for a request."""
        name = sha256_json(list(map(list, request)))[:32]
        file = self.folder / "plans" / f"{name}.json"
        held = set(self.keys().iter_rows())
        missing = [key for key in request if key not in held]
        if not missing:
            return []
        if not file.exists():
            write_json([list(map(list, part)) for part in divide(missing)], file)
        parts = [
            Part(self.folder / f"part-{name}-{number:06d}.parquet", tuple((context, example) for context, example in keys))
            for number, keys in enumerate(read_json(file))
        ]
        return [part for part in parts if not part.file.exists() and not held.issuperset(part.keys)]

    def write(self, part: Part, rows: pa.Table, seconds: float | None = None) -> None:
        """Write the rows of one part, whole or not at all, and beside them the `seconds` that scoring took, where they are known."""
        if seconds is not None:
            write_json({"seconds": round(seconds, 4)}, self._time_of(part.file))
        write_table(rows, part.file)

    def seconds(self, request: Sequence[Key]) -> tuple[float, int]:
        """The seconds that scoring the rows of a request took, whenever that was, and how many of the rows these seconds cover."""
        wanted, total, covered = set(request), 0.0, 0
        for file in sorted(self.folder.glob("part-*.parquet")):
            if self._time_of(file).is_file():
                held = list(pl.read_parquet(file, columns=KEY).iter_rows())
                found = wanted.intersection(held)
                wanted -= found
                covered += len(found)
                total += read_json(self._time_of(file))["seconds"] * len(found) / len(held)
        return total, covered

    def _time_of(self, part: Path) -> Path:
        return self.folder / "times" / f"{part.stem}.json"

    def read(self, request: Sequence[Key]) -> pa.Table:
        """The rows of a request in its order, with the columns of `schema.SCORES`.

        Raises ShotlessError where a row is not there.
        """
        wanted = pl.DataFrame(list(request), schema=dict.fromkeys(KEY, pl.String), orient="row")
        files = sorted(self.folder.glob("part-*.parquet"))
        tables = [pq.read_table(file, schema=SCORES) for file in files]
        held = pl.DataFrame(pl.from_arrow(pa.concat_tables(tables or [SCORES.empty_table()]))).unique(
            KEY, keep="first", maintain_order=True
        )
        rows = wanted.join(held, on=KEY, how="left", maintain_order="left")
        if missing := rows["prompt_sha"].null_count():
            raise ShotlessError(f"{self.folder}: {missing} of {len(request)} rows were not scored; run the stage again.")
        return rows.select(SCORES.names).to_arrow().cast(SCORES)
