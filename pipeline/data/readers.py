"""Files of examples, read row by row: jsonl, csv, tsv, Parquet.

A reader yields the asked columns of each row with its line number, or a `BadRow` that says why the row cannot be read; it never stops at a
bad row and never drops one. Text files are streamed. A tsv file has no quoting (quotes belong to the text, one record a line); a csv
file follows RFC 4180, with quotes and fields of several lines. The trade-off: rows pass through Python one by one, a few microseconds
each, for line numbers and reasons that a bulk reader would not give.
"""

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError, choices
from pipeline.data.fields import MISSING


@dataclass(frozen=True, slots=True)
class Row:
    """The asked columns of one row, in the order they were asked in; `line` is 1-based (the row's number, for Parquet)."""

    line: int
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used; `field` is empty where the row as a whole is bad."""

    line: int
    field: str
    reason: str
    value: str


@dataclass(frozen=True, slots=True)
class BlankLine:
    """A line with nothing in it: no row, but counted."""

    line: int


Read = Row | BadRow | BlankLine
Format = Literal["jsonl", "csv", "tsv", "parquet"]


def read_rows(path: Path, form: Format, asked: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[Read]:
    """Yield the rows of `path` with the values of the columns `asked`.

    `columns` names the columns of a csv or tsv file that has no header line. Raises UsageError where the file lacks a column, has it
    twice, or is not of this format at all.
    """
    if form == "jsonl":
        return _jsonl(path, asked)
    if form == "parquet":
        return _parquet(path, asked)
    records = _tsv_records(path) if form == "tsv" else _csv_records(path)
    return _delimited(path, records, asked, columns)


def decode(raw: bytes) -> str | None:
    """Text of UTF-8 bytes; None where they are not UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


class MissingColumnError(UsageError):
    """A file lacks a column altogether; `fault` says so without the next step, which is another for a command than for a stage."""

    def __init__(self, path: Path, column: str, there: Iterable[str]) -> None:
        self.column = column
        self.fault = f"{path}: no column {column!r}; the columns are: {choices(there)}."
        hint = " For a file without labels write `label: null`." if column == "label" else ""
        super().__init__(f"{self.fault} Name the right one under `fields` or `label.column` of this source in params.yaml.{hint}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers, without their ends (LF or CRLF) and without a byte order mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = raw[:-1] if raw.endswith(b"\n") else raw
            line = line[:-1] if line.endswith(b"\r") else line
            yield number, line[3:] if number == 1 and line.startswith(b"\xef\xbb\xbf") else line


def _not_utf8(number: int, raw: bytes) -> BadRow:
    return BadRow(number, "", "not UTF-8", raw.decode(errors="backslashreplace"))


def _jsonl(path: Path, asked: Sequence[str]) -> Iterator[Read]:
    for number, raw in _lines(path):
        if not raw.strip():
            yield BlankLine(number)
            continue
        text = decode(raw)
        if text is None:
            yield _not_utf8(number, raw)
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


def json_keys(path: Path) -> set[str]:
    """Every key of the objects of a jsonl file, for a message that lists them."""
    keys: set[str] = set()
    for _, raw in _lines(path):
        try:
            record = json.loads(raw)
        except (ValueError, RecursionError):  # named row by row by the reader itself
            continue
        keys.update(record if isinstance(record, dict) else ())
    return keys


def _tsv_records(path: Path) -> Iterator[tuple[int, list[str]] | BadRow | BlankLine]:
    for number, raw in _lines(path):
        if not raw:
            yield BlankLine(number)
        elif (text := decode(raw)) is None:
            yield _not_utf8(number, raw)
        else:
            yield number, text.split("\t")


def _csv_records(path: Path) -> Iterator[tuple[int, list[str]] | BadRow | BlankLine]:
    """Records with the line they begin on. A broken record is as many bad rows as it has lines: each may have been a row."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        while True:
            first = reader.line_num + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                for number in range(first, max(reader.line_num, first) + 1):
                    yield BadRow(number, "", "not CSV", f"{error}, in the record that begins on line {first}")
                continue
            if not values:
                yield BlankLine(first)
            elif any(not value.isascii() and _escaped(value) for value in values):
                yield BadRow(first, "", "not UTF-8", ",".join(values).encode(errors="surrogateescape").decode(errors="backslashreplace"))
            else:
                yield first, values


def _escaped(text: str) -> bool:
    """Whether `text` holds bytes that were not UTF-8, as `surrogateescape` keeps them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _delimited(
    path: Path, records: Iterator[tuple[int, list[str]] | BadRow | BlankLine], asked: Sequence[str], columns: Sequence[str] | None
) -> Iterator[Read]:
    header = list(columns) if columns is not None else None
    places: list[int] = _places(path, header, asked) if header is not None else []
    for record in records:
        if isinstance(record, (BadRow, BlankLine)):
            if header is None and isinstance(record, BadRow):
                raise UsageError(f"{path}: the header on line {record.line} cannot be read: {record.reason}: {record.value[:80]!r}.")
            yield record
            continue
        line, values = record
        if header is None:
            header = [name.strip() for name in values]
            places = _places(path, header, asked)
        elif len(values) != len(header):
            yield BadRow(line, "", "wrong number of columns", f"{len(values)} instead of {len(header)}: {' | '.join(values)}")
        else:
            yield Row(line, tuple(values[i] for i in places))


def _places(path: Path, header: Sequence[str], asked: Sequence[str]) -> list[int]:
    for name in asked:
        if name not in header:
            raise MissingColumnError(path, name, header)
        if header.count(name) > 1:
            raise UsageError(f"{path}: the column {name!r} is there {header.count(name)} times; rename all but one.")
    return [header.index(name) for name in asked]


def _parquet(path: Path, asked: Sequence[str]) -> Iterator[Read]:
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            _places(path, names, asked)
            for batch in file.iter_batches(batch_size=8192, columns=list(dict.fromkeys(asked))):
                held = [_values(batch.column(name)) for name in asked]
                for values in zip(*held, strict=True):
                    number += 1
                    yield _parquet_row(number, asked, values)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        said = f"{path}: not a Parquet file" if number == 0 else f"{path}: not readable as Parquet after row {number:,}"
        raise UsageError(f"{said} ({error}); check `format` of this source in params.yaml, or write the file again.") from None


def _parquet_row(number: int, asked: Sequence[str], values: tuple[Any, ...]) -> Row | BadRow:
    bad = next((place for place, value in enumerate(values) if isinstance(value, bytes)), None)
    if bad is None:
        return Row(number, values)
    return BadRow(number, asked[bad], "not UTF-8", values[bad].decode(errors="backslashreplace"))


def _values(column: pa.Array) -> list[Any]:
    """Python values of a column; a text that is not UTF-8 stays bytes (Parquet does not check what it calls a string)."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    if not any(is_kind(column.type) for is_kind in kinds):
        return column.to_pylist()
    raw: list[bytes | None] = column.cast(pa.large_binary()).to_pylist()
    return [value if value is None or (text := decode(value)) is None else text for value in raw]
