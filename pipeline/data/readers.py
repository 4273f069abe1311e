"""Files of examples, read row by row: jsonl, csv, tsv, Parquet.

A reader yields the asked columns of each row with its line number, or a `BadRow` that says why the row cannot be read. It never stops at
a bad row and never drops one. Text files are UTF-8 and are streamed. A tsv file has no quoting: quotes belong to the text, a record is a
line. A csv file follows RFC 4180: a field in quotes may have several lines, and a quote inside it is doubled.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError, choices

MISSING = object()
"""The value of a key that a JSON object does not have."""
LONGEST_FIELD = 2**31 - 1
"""Characters; csv's own limit of 131,072 would make one bad row of a long field and several of its lines."""


@dataclass(frozen=True, slots=True)
class Row:
    """The asked columns of one row, in the order they were asked in; `line` is 1-based (the row's number, for Parquet)."""

    line: int
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read; `field` is empty if the row as a whole is bad."""

    line: int
    field: str
    reason: str
    value: str


@dataclass(frozen=True, slots=True)
class BlankLine:
    """A line with nothing in it: not a row, but counted."""

    line: int


Read = Row | BadRow | BlankLine


class MissingColumnError(UsageError):
    """A file lacks a column altogether; `fault` says so without the next step, which differs between commands and stages."""

    def __init__(self, path: Path, column: str, found: Iterable[str]) -> None:
        self.column = column
        self.fault = f"{path}: no column {column!r}; the columns are: {choices(found)}."
        hint = " For a file without labels write `label: null`." if column == "label" else ""
        super().__init__(f"{self.fault} Name the right one under `fields` or `label.column` of this source in params.yaml.{hint}")


def read_rows(path: Path, form: str, asked: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[Read]:
    """Yield the rows of `path` with the values of the columns `asked`; `form` is jsonl, csv, tsv or parquet.

    `columns` names the columns of a csv or tsv file that has no header line. Raises UsageError if the file lacks a column, has it twice, or
    is not of this format at all.
    """
    if form == "jsonl":
        return _jsonl(path, asked)
    if form == "parquet":
        return _parquet(path, asked)
    return _delimited(path, _tsv_records(path) if form == "tsv" else _csv_records(path), asked, columns)


def json_keys(path: Path) -> set[str]:
    """Every key of the objects of a jsonl file, for a message that lists them."""
    keys: set[str] = set()
    for _, raw in _lines(path):
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):  # the reader names it
            continue
        keys.update(record if isinstance(record, dict) else ())
    return keys


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without their ends (LF or CRLF) and without a byte order mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _text(raw: bytes, line: int, field: str = "") -> str | BadRow:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return BadRow(line, field, "not UTF-8", raw.decode(errors="backslashreplace"))


def _jsonl(path: Path, asked: Sequence[str]) -> Iterator[Read]:
    for number, raw in _lines(path):
        if not raw.strip():
            yield BlankLine(number)
            continue
        if isinstance(text := _text(raw, number), BadRow):
            yield text
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield BadRow(number, "", "not JSON", f"{error}: {text}")
            continue
        if isinstance(record, dict):
            yield Row(number, tuple(record.get(name, MISSING) for name in asked))
        else:
            yield BadRow(number, "", "not a JSON object", text)


def _tsv_records(path: Path) -> Iterator[tuple[int, list[str]] | BadRow | BlankLine]:
    for number, raw in _lines(path):
        if not raw:
            yield BlankLine(number)
        else:
            yield text if isinstance(text := _text(raw, number), BadRow) else (number, text.split("\t"))


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]] | BadRow | BlankLine]:
    """Records with the line they begin on.

    Each line of a broken record is a bad row, since each may have been a row. The record ends with the line that makes the number of its
    quotes even: what follows the fault may be the rest of a field, and must not be read as a row.
    """
    csv.field_size_limit(LONGEST_FIELD)
    record: list[str] = []

    def remembered(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line

    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = remembered(file)
        reader, first = csv.reader(lines, strict=True), 1
        while True:
            first += len(record)
            record.clear()
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                quotes = sum(line.count('"') for line in record)
                while quotes % 2 and (line := next(lines, None)) is not None:
                    quotes += line.count('"')
                for number in range(first, first + len(record)):
                    yield BadRow(number, "", "not CSV", f"{error}, in the record that begins on line {first}")
                continue
            raw = ",".join(values).encode(errors="surrogateescape")
            if not values:
                yield BlankLine(first)
            else:
                yield text if isinstance(text := _text(raw, first), BadRow) else (first, values)


def _delimited(
    path: Path, records: Iterator[tuple[int, list[str]] | BadRow | BlankLine], asked: Sequence[str], columns: Sequence[str] | None
) -> Iterator[Read]:
    header = list(columns) if columns is not None else None
    places = _places(path, header, asked) if header is not None else []
    for record in records:
        if header is None and isinstance(record, BadRow):
            raise UsageError(f"{path}: the header on line {record.line} cannot be read: {record.reason}: {record.value[:80]!r}.")
        if isinstance(record, (BadRow, BlankLine)):
            yield record
            continue
        line, values = record
        if header is None:
            header = [name.strip() for name in values]
            places = _places(path, header, asked)
        elif len(values) != len(header):
            yield BadRow(line, "", "wrong number of columns", f"{len(values)} instead of {len(header)}: {' | '.join(values)}")
        else:
            yield Row(line, tuple(values[place] for place in places))


def _places(path: Path, header: Sequence[str], asked: Sequence[str]) -> list[int]:
    for name in asked:
        if name not in header:
            raise MissingColumnError(path, name, header)
        if header.count(name) > 1:
            raise UsageError(f"{path}: it has {header.count(name)} columns {name!r}. Rename all but one.")
    return [header.index(name) for name in asked]


def _parquet(path: Path, asked: Sequence[str]) -> Iterator[Read]:
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _places(path, file.schema_arrow.names, asked)
            for batch in file.iter_batches(batch_size=8192, columns=list(dict.fromkeys(asked))):
                for values in zip(*(_values(batch.column(name)) for name in asked), strict=True):
                    number += 1
                    texts = [_text(v, number, name) if isinstance(v, bytes) else v for name, v in zip(asked, values, strict=True)]
                    yield next((value for value in texts if isinstance(value, BadRow)), Row(number, tuple(texts)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = f"{path}: not a Parquet file" if number == 0 else f"{path}: not readable as Parquet after row {number:,}"
        raise UsageError(f"{said} ({error}). Check `format` of this source in params.yaml, or write the file again.") from None


def _values(column: pa.Array) -> list[Any]:
    """Python values of a column; texts as bytes, since Parquet does not check that a string is UTF-8."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    is_text = any(is_kind(column.type) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary))
    return (column.cast(pa.large_binary()) if is_text else column).to_pylist()
