"""The transfer set as queries that are read from its file when they are asked for, so that memory does not hold a million texts."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

from pipeline.teachers.asked import Query
from pipeline.schema import ROWS_PER_GROUP, TableFile, examples


class TransferSet(Sequence[Query]):
    """The examples of a transfer set's file. Raises what `schema.read_table` raises."""

    def __init__(self, file: Path, fields: Sequence[str]) -> None:
        self._fields = fields
        self._file = TableFile(file, examples(fields))

    def __len__(self) -> int:
        return len(self._file)

    @overload
    def __getitem__(self, place: int) -> Query: ...
    @overload
    def __getitem__(self, place: slice) -> list[Query]: ...
    def __getitem__(self, place: int | slice) -> Query | list[Query]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                return [self[row] for row in range(start, stop, step)]
            rows = self._file.rows(start, stop).to_pylist()
            return [Query(row["example_id"], {field: row[field] for field in self._fields}, row["completion"]) for row in rows]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self[place % len(self) : place % len(self) + 1][0]

    def __iter__(self) -> Iterator[Query]:
        for start in range(0, len(self), ROWS_PER_GROUP):
            yield from self[start : start + ROWS_PER_GROUP]


class Joined(Sequence[Query]):
    """A few queries, and a sequence of queries behind them."""

    def __init__(self, first: Sequence[Query], rest: Sequence[Query]) -> None:
        self._first, self._rest = first, rest

    def __len__(self) -> int:
        return len(self._first) + len(self._rest)

    @overload
    def __getitem__(self, place: int) -> Query: ...
    @overload
    def __getitem__(self, place: slice) -> list[Query]: ...
    def __getitem__(self, place: int | slice) -> Query | list[Query]:
        if isinstance(place, int):
            return self[place : place + 1 or None][0]
        start, stop, step = place.indices(len(self))
        if step != 1:
            return [self[row] for row in range(start, stop, step)]
        front = len(self._first)
        return [*self._first[start:stop], *self._rest[max(start - front, 0) : max(stop - front, 0)]]

    def __iter__(self) -> Iterator[Query]:
        yield from self._first
        yield from self._rest
