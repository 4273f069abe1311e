"""Files of examples, read row by row: jsonl, csv, tsv, Parquet.

A reader yields the asked columns of each row with its line number, or a `BadRow` that says why the row cannot be read. It never stops at
a bad row and never drops one; blank lines are not rows. Text files are streamed; they are UTF-8, UTF-16 with a byte order mark, or
Windows-1252. A tsv file has no quoting: quotes belong to the text, a record is a line. A csv file follows RFC 4180: a field in quotes may
have several lines, and a quote inside it is doubled; its header shows whether commas, semicolons, tabs or bars separate the columns.
"""

import codecs
import csv
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError, choices

MISSING = object()
"""The value of a key that a JSON object does not have."""
LONGEST_FIELD = 2**31 - 1
"""Characters; csv's own limit of 131,072 would make one bad row of a long field and several of its lines."""
NOT_DECODED = re.compile("[\udc80-\udcff]")
"""What a byte that is not UTF-8 is decoded to (`surrogateescape`)."""


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


class MissingColumnError(UsageError):
    """A file lacks a column altogether; `found` are those it has; `fault` says so without the next step, which differs between commands."""

    def __init__(self, path: Path, column: str, found: Iterable[str]) -> None:
        self.column, self.found = column, list(found)
        self.fault = f"{path}: no column {column!r}; the columns are: {choices(self.found)}."
        hint = " For a file without labels write `label: null`." if column == "label" else ""
        super().__init__(f"{self.fault} Name the right one under `fields` or `label.column` of this source in params.yaml.{hint}")


Record = tuple[int, list[str]] | BadRow
"""A record of a csv or tsv file with the line it begins on."""


def read_rows(path: Path, form: str, asked: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[Row | BadRow]:
    """Yield the rows of `path` with the values of the columns `asked`; `form` is jsonl, csv, tsv or parquet.

    `columns` names the columns of a csv or tsv file that has no header line. Raises UsageError if the file lacks a column, has it twice, or
    is not of this format at all.
    """
    if form == "parquet":
        return _parquet(path, asked)
    if form == "jsonl":
        return (
            Row(read[0], tuple(read[1].get(name, MISSING) for name in asked)) if isinstance(read, tuple) else read
            for read in _objects(path)
        )
    return _delimited(path, _tsv_records(path) if form == "tsv" else _csv_records(path, asked, columns), asked, columns)


def json_keys(path: Path) -> set[str]:
    """Every key of the objects of a jsonl file, for a message that lists them."""
    return {key for read in _objects(path) if isinstance(read, tuple) for key in read[1]}


@contextmanager
def _opened(path: Path, newline: str) -> Iterator[TextIO]:
    """The file as text; bytes that are not UTF-8 are there as `NOT_DECODED`."""
    try:
        with path.open(encoding=_encoding(path), errors="surrogateescape", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise UsageError(f"{path}: begins as UTF-16 and is not UTF-16 throughout. Save it as UTF-8.") from None


def _encoding(path: Path) -> str:
    """UTF-16 by its byte order mark; Windows-1252 if some lines are not ASCII and none of them is UTF-8; else UTF-8."""
    if not path.is_file():  # a pipe is read once
        return "utf-8-sig"
    with path.open("rb") as file:
        if file.peek(2).startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        beyond_ascii = (line for line in file if not line.isascii())
        first = next(beyond_ascii, None)
        if first is None or any(line.decode(errors="ignore").encode() == line for line in chain([first], beyond_ascii)):
            return "utf-8-sig"
    print(f"{path}: not UTF-8; read as Windows-1252", file=sys.stderr)
    return "cp1252"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank with their numbers, without their ends (LF or CRLF)."""
    with _opened(path, "\n") as file:
        for number, line in enumerate(file, start=1):
            if text := line.removesuffix("\n").removesuffix("\r"):
                yield number, text


def _fault(text: str, line: int, field: str = "") -> BadRow | None:
    if text.isascii() or not NOT_DECODED.search(text):
        return None
    return BadRow(line, field, "not UTF-8", text.encode(errors="surrogateescape").decode(errors="backslashreplace"))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]] | BadRow]:
    for number, text in _lines(path):
        if fault := _fault(text, number):
            yield fault
        elif text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield BadRow(number, "", "not JSON", f"{error}: {text}")
            else:
                yield (number, value) if isinstance(value, dict) else BadRow(number, "", "not a JSON object", text)


def _tsv_records(path: Path) -> Iterator[Record]:
    for number, text in _lines(path):
        yield _fault(text, number) or (number, text.split("\t"))


def _csv_records(path: Path, asked: Sequence[str], columns: Sequence[str] | None) -> Iterator[Record]:
    """Each line of a broken record is a bad row, since each may have been a row.

    The record ends with the line that makes the number of its quotes even: what follows the fault may be the rest of a field, and must not
    be read as a row.
    """
    csv.field_size_limit(LONGEST_FIELD)
    record: list[str] = []

    def remembered(lines: Iterable[str]) -> Iterator[str]:
        for line in lines:
            record.append(line)
            yield line

    def fit(delimiter: str) -> tuple[bool, int]:
        names = [name.strip() for name in next(csv.reader([start], delimiter=delimiter), [])]
        return set(asked) <= set(names) if columns is None else len(names) == len(columns), len(names)

    with _opened(path, "") as file:
        start = next(file, "")
        delimiter = max(",;\t|", key=fit)
        lines = remembered(filter(None, chain([start], file)))
        reader, first = csv.reader(lines, strict=True, delimiter=delimiter), 1
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
            else:
                if values:
                    yield _fault(delimiter.join(values), first) or (first, values)


def _delimited(path: Path, records: Iterator[Record], asked: Sequence[str], columns: Sequence[str] | None) -> Iterator[Row | BadRow]:
    header = columns
    places = [] if header is None else _places(path, header, asked)
    for record in records:
        if header is None and isinstance(record, BadRow):
            raise UsageError(f"{path}: the header on line {record.line} cannot be read: {record.reason}: {record.value[:80]!r}.")
        if not isinstance(record, tuple):
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


def _parquet(path: Path, asked: Sequence[str]) -> Iterator[Row | BadRow]:
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _places(path, file.schema_arrow.names, asked)
            for batch in file.iter_batches(batch_size=8192, columns=list(dict.fromkeys(asked))):
                for values in zip(*(_values(batch.column(name)) for name in asked), strict=True):
                    number += 1
                    faults = (_fault(value, number, name) for name, value in zip(asked, values, strict=True) if isinstance(value, str))
                    yield next(filter(None, faults), Row(number, values))
            if number != file.metadata.num_rows:
                raise pa.ArrowInvalid(f"{file.metadata.num_rows:,} rows announced")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = f"{path}: not a Parquet file" if number == 0 else f"{path}: not readable as Parquet after row {number:,}"
        raise UsageError(f"{said} ({error}). Check `format` of this source in params.yaml, or write the file again.") from None


def _values(column: pa.Array) -> list[Any]:
    """Python values of a column. Parquet does not check that a string is UTF-8."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if not any(is_kind(column.type) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)):
        return column.to_pylist()
    return [None if value is None else value.decode(errors="surrogateescape") for value in column.cast(pa.large_binary()).to_pylist()]
