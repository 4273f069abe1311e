"""Files of examples, read row by row: csv, tsv, jsonl, json, xlsx, Parquet, and folders of them. docs/data.md shows the forms.

A reader yields the asked columns of each row with its line number, or a `BadRow` that says why the row cannot be read. It never stops at
a bad row and never drops one; blank lines are not rows. Text files are streamed, and unpacked if they are gzip files. Python's csv module
reads tables; what it has to be told (delimiter, encoding, how quotes are written) is found by reading the file before.
"""

import codecs
import csv
import gzip
import io
import json
import re
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast
from xml.etree.ElementTree import ParseError

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError, choices
from pipeline.params.data import FORMATS, SourceParams, form_of

LOG_KEYS = ("time", "student", "fields")
"""What a line of a predictions log has, whatever its answer (`pipeline.serving.files.PredictionLog`)."""
MISSING = object()
"""The value of a key that a JSON object does not have."""
LONGEST_FIELD = 2**31 - 1
"""Characters; csv's own limit of 131,072 would make one bad row of a long field and several of its lines."""
LONGEST_TAIL = 200
"""Lines behind a fault in which the end of a broken record is looked for."""
NOT_DECODED = re.compile("[\udc80-\udcff]")
"""What a byte that is not of the encoding is decoded to (`surrogateescape`)."""


@dataclass(frozen=True, slots=True)
class Row:
    """The asked columns of one row, in the order they were asked in.

    `line` is 1-based (the row's number, for Parquet and json). `file` is the file's path below the folder, if a folder is read.
    """

    line: int
    values: tuple[Any, ...]
    file: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read; `field` is empty if the row as a whole is bad."""

    line: int
    field: str
    reason: str
    value: str
    file: str = ""


class MissingColumnError(UsageError):
    """A file lacks a column altogether; `found` are those it has; `fault` says so without the next step, which differs between commands."""

    def __init__(self, path: Path, column: str, found: Iterable[str]) -> None:
        self.column, self.found = column, list(found)
        self.fault = f"{path}: no column {column!r}; the columns are: {choices(self.found)}."
        hint = " For a file without labels write `label: null`." if column == "label" else ""
        super().__init__(f"{self.fault} Name the right one under `fields` or `label.column` of this source in params.yaml.{hint}")


def read_rows(
    path: Path,
    form: str | None,
    asked: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    files: str | None = None,
    delimiter: str | None = None,
    encoding: str | None = None,
) -> Iterator[Row | BadRow]:
    """Yield the rows of a file, or of the `files` of a folder, with the values of the columns `asked`; `form` is one of FORMATS' values.

    `columns` names the columns of a csv or tsv file that has no header line. What is None is found: the format by the file's name, the
    rest by its content. Raises UsageError if a file lacks a column, has it twice, or is not of its format at all.
    """
    for name, file, kind in _files(path, files, form):
        if kind != "jsonl" and not file.is_file():  # a pipe is read once, and only JSON lines need no more
            with tempfile.NamedTemporaryFile() as copy:
                with file.open("rb") as pipe:
                    shutil.copyfileobj(pipe, copy)
                copy.flush()
                yield from read_rows(Path(copy.name), kind, asked, columns, delimiter=delimiter, encoding=encoding)
            continue
        if kind == "parquet":
            rows = _parquet(file, asked)
        elif kind in {"jsonl", "json"}:
            rows = (
                Row(read.line, tuple(read.values[0].get(column, MISSING) for column in asked)) if isinstance(read, Row) else read
                for read in _objects(file, kind, encoding)
            )
        else:
            table = _sheet(file) if kind == "xlsx" else _table(file, kind, asked, columns, delimiter, encoding)
            rows = _rows(file, table, asked)
        yield from (replace(row, file=name) for row in rows) if name else rows


def source_rows(path: Path, source: SourceParams, asked: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of a source, read as its params say."""
    said = {"files": source.files, "delimiter": source.delimiter, "encoding": source.encoding}
    return read_rows(path, source.form, asked, source.columns, **said)


def json_keys(path: Path, form: str | None = None, files: str | None = None, encoding: str | None = None) -> set[str]:
    """Every key of the objects of jsonl or json files, for a message that lists them; none for other formats."""
    own = [(file, kind) for _, file, kind in _files(path, files, form) if kind in {"jsonl", "json"}]
    return {key for file, kind in own for read in _objects(file, kind, encoding) if isinstance(read, Row) for key in read.values[0]}


def _files(path: Path, files: str | None, form: str | None) -> list[tuple[str, Path, str]]:
    """The file itself, with an empty name; or a folder's files in the order of their names, without hidden ones. Each with its format."""
    if not path.is_dir():
        if (own := form or form_of(path.name)) is None:
            raise UsageError(f"{path}: the name does not end with one of {choices(FORMATS)}. Rename it, or say its format.")
        return [("", path, own)]
    below = sorted((file.relative_to(path), file) for file in path.glob(files or "**/*") if file.is_file())
    shown = [(name, file) for name, file in below if not any(part[0] in "._" for part in name.parts)]
    found = [(name.as_posix(), file, own) for name, file in shown if (own := form or form_of(name))]
    forms = {own for _, _, own in found}
    if len(forms) != 1:
        fault = f"files of several formats ({choices(forms)})" if forms else f"no file that ends with one of {choices(FORMATS)}"
        raise UsageError(f"{path}{f', files {files!r}' if files else ''}: {fault}. Say which are meant with `files`, or their `format`.")
    return found


# text


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes; those in it if it is a gzip file, whatever its name."""
    try:
        with path.open("rb") as file, gzip.open(file) if file.peek(2).startswith(b"\x1f\x8b") else file as content:
            yield cast("io.BufferedReader", content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: a gzip file that is cut or damaged ({error}). Write it again.") from None


@contextmanager
def _opened(path: Path, newline: str, encoding: str | None) -> Iterator[TextIO]:
    """The file as text; bytes that are not of the encoding are there as `NOT_DECODED`."""
    own = encoding or _encoding(path)
    own = "utf-8-sig" if codecs.lookup(own).name == "utf-8" else own  # a mark may be there
    try:
        with _unpacked(path) as file, io.TextIOWrapper(file, own, "surrogateescape", newline) as text:
            yield text
    except UnicodeError as error:
        raise UsageError(f"{path}: not {own} throughout ({error}). Save it as UTF-8, or correct `encoding`.") from None


def _encoding(path: Path) -> str:
    """UTF-16 by its mark or its first character; Windows-1252 if some lines are not ASCII and none of them is UTF-8; else UTF-8."""
    if not path.is_file():  # a pipe
        return "utf-8-sig"
    with _unpacked(path) as file:
        if (first := file.peek(2)[:2]) in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE}:
            return "utf-16"
        if len(first) == 2 and first.count(0) == 1:
            return "utf-16-le" if first[1] == 0 else "utf-16-be"
        if {line.decode(errors="ignore").encode() == line for line in file if not line.isascii()} != {False}:
            return "utf-8-sig"
    print(f"{path}: not UTF-8; read as Windows-1252, since no `encoding` is said", file=sys.stderr)
    return "cp1252"


def _not_decoded(value: Any) -> tuple[str, str] | None:
    """Reason and value for a bad row, if this is a text with bytes that are not of its encoding."""
    if not isinstance(value, str) or value.isascii() or not NOT_DECODED.search(value):
        return None
    return "not UTF-8", value.encode(errors="surrogateescape").decode(errors="backslashreplace")


# json


def _objects(path: Path, form: str, encoding: str | None) -> Iterator[Row | BadRow]:
    """Rows whose only value is the object, that of a predictions log with the fields of its input as keys of their own."""
    for row in _parsed(path, form, encoding):
        if isinstance(row, Row) and isinstance(fields := row.values[0].get("fields"), dict) and not set(LOG_KEYS) - row.values[0].keys():
            yield replace(row, values=(row.values[0] | fields,))
        else:
            yield row


def _parsed(path: Path, form: str, encoding: str | None) -> Iterator[Row | BadRow]:
    """Rows whose only value is the object as it is written."""
    if form == "json" and (items := _list(path, encoding)) is not None:
        for number, value in enumerate(items, start=1):
            yield Row(number, (value,)) if isinstance(value, dict) else BadRow(number, "", "not a JSON object", str(value))
        return
    with _opened(path, "\n", encoding) as file:
        for number, line in enumerate(file, start=1):
            if fault := _not_decoded(text := line.rstrip("\r\n")):
                yield BadRow(number, "", *fault)
            elif text.strip():
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError) as error:
                    yield BadRow(number, "", "not JSON", f"{error}: {text}")
                else:
                    yield Row(number, (value,)) if isinstance(value, dict) else BadRow(number, "", "not a JSON object", text)


def _list(path: Path, encoding: str | None) -> list[Any] | None:
    """The list that a .json file is, or the one list in its object; None if it has JSON lines."""
    with _opened(path, "", encoding) as file:
        text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return None
        raise UsageError(f"{path}: not JSON ({error}). Write it again.") from None
    lists = [own for own in (value.values() if isinstance(value, dict) else [value]) if isinstance(own, list)]
    if len(lists) != 1:
        raise UsageError(f"{path}: neither a list of objects nor an object with one list, as `data`. Write one object for each row.")
    return lists[0]


# tables


class Record(NamedTuple):
    """A record of a table: its first line's number, its lines as they are in the file, its values, a `BadRow`'s reason and value."""

    line: int
    text: list[str]
    values: list[Any]
    fault: tuple[str, str] | None = None


def _rows(path: Path, records: Iterator[Record], asked: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows behind the header, which is the first record. Each line of a broken record is a bad row, since each may have been a row."""
    places: list[int] | None = None
    for line, text, values, broken in records:
        fault = broken or _not_decoded("".join(text).rstrip("\r\n"))
        if places is not None and fault is not None:
            yield from (BadRow(line + at, "", *fault) for at in range(len(text)))
        elif places is not None:
            yield Row(line, tuple(values[place] for place in places))
        elif fault is not None:
            raise UsageError(f"{path}: the header on line {line} cannot be read: {fault[0]}: {fault[1][:80]!r}.")
        else:
            places = _places(path, ["" if name is None else str(name).strip() for name in values], asked)


def _places(path: Path, header: Sequence[str], asked: Sequence[str]) -> list[int]:
    for name in asked:
        if name not in header:
            raise MissingColumnError(path, name, header)
        if header.count(name) > 1:
            raise UsageError(f"{path}: it has {header.count(name)} columns {name!r}. Rename all but one.")
    return [header.index(name) for name in asked]


def _table(
    path: Path, form: str, asked: Sequence[str], columns: Sequence[str] | None, delimiter: str | None, encoding: str | None
) -> Iterator[Record]:
    """The header and the records of a csv or tsv file, read with the settings of the csv module that suit it.

    Backslashes are escapes if fewer lines are broken so. Quotes are more than text in every csv file, and in a tsv file that has quoting.
    """
    encoding = encoding or _encoding(path)
    csv.field_size_limit(LONGEST_FIELD)

    def fit(delimiter: str) -> tuple[bool, int]:
        names = [name.strip() for name in next(csv.reader([start], delimiter=delimiter), [])]
        return set(asked) <= set(names) if columns is None else len(names) == len(columns), len(names)

    with _opened(path, "", encoding) as file:
        start, first = next(file, ""), 1
        if hint := re.fullmatch(r'"?sep=(.)"?\s*', start):  # Excel's
            start, first, delimiter = next(file, ""), 2, delimiter or hint[1]
        delimiter = delimiter or ("\t" if form == "tsv" else max(",;\t|", key=fit))
        has_escapes = any(map(re.compile(rf'\\["{re.escape(delimiter)}]').search, chain([start], file)))
    is_spaced = 0 < start.count(delimiter) == start.count(f"{delimiter} ")
    settings: dict[str, Any] = {"delimiter": delimiter, "strict": True, "skipinitialspace": is_spaced}

    def records(settings: dict[str, Any]) -> Iterator[Record]:
        with _opened(path, "\n" if "quoting" in settings else "", encoding) as file:
            yield from _records(islice(file, first - 1, None), first, len(columns or ()), settings)

    if has_escapes or form == "tsv":
        tried = [settings, settings | {"escapechar": "\\"}] if has_escapes else [settings]
        _, has_quoting, settings = min(((*_look(records(own), delimiter), own) for own in tried), key=lambda look: look[0])
        if form == "tsv" and not has_quoting:
            settings = {"delimiter": delimiter, "quoting": csv.QUOTE_NONE}
    if columns is not None:
        yield Record(0, [], list(columns))
    yield from records(settings)


def _look(records: Iterator[Record], delimiter: str) -> tuple[int, bool]:
    """How many lines are broken, and whether there is quoting: more fields are quoted that have to be than hold a quote and are not.

    If there are neither: a quoted field goes on behind a line, or more fields are quoted than lines are broken.
    """
    needed = bare = cut = quoted = broken = width = 0
    for _, text, values, fault in records:
        width, whole = width or len(values), "".join(text)
        if fault is not None:
            broken += len(text)
            cut += any(f'{delimiter}"' in delimiter + line and line.count(delimiter) < width - 1 for line in text)
        pieces = _pieces(whole, delimiter) if '"' in whole else []
        for value in values if pieces else []:
            if value.lstrip(" ") in pieces:
                bare += '"' in value
            elif any(mark in value for mark in ('"', "\n", delimiter)):
                needed += 1
            else:
                quoted += 1
    return broken, needed > bare if needed or bare else cut > 0 or quoted > broken


def _csv_reader(lines: Iterable[str], settings: dict[str, Any]) -> Any:
    """Python's reader, but a backslash is an escape only before what has to be escaped."""
    if "escapechar" in settings:
        escaped = re.compile(rf'(\\[\\"\r\n{re.escape(settings["delimiter"])}])|\\')
        lines = (escaped.sub(lambda found: found[1] or r"\\", line) for line in lines)
    return csv.reader(lines, **settings)


def _pieces(text: str, delimiter: str) -> list[str]:
    """The line cut at every delimiter, without leading spaces. A value that is not among these pieces was quoted or escaped."""
    return [piece.lstrip(" ") for piece in text.rstrip("\r\n").split(delimiter)]


def _records(lines: Iterator[str], line: int, width: int, settings: dict[str, Any]) -> Iterator[Record]:
    """Every record that is not blank. `line` is the first line's number, `width` the number of columns (0: the first record's)."""
    delimiter, is_quoted, waiting, text = settings["delimiter"], "quoting" not in settings, deque[str](), list[str]()

    def taken() -> Iterator[str]:
        while own := waiting.popleft() if waiting else next(lines, ""):
            text.append(own)
            yield own

    if is_quoted:
        reader = _csv_reader(taken(), settings)
    else:  # csv would take a CR for the end of a line
        reader = (own.split(delimiter) if own else [] for own in (own.rstrip("\r\n") for own in taken()))
    while True:
        text, values, fault = list[str](), list[str](), None
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fault = "not CSV", f"{error}, in the record that begins on line {line}"
        width = width or len(values)
        if len(values) not in {0, width}:
            fault = "wrong number of columns", f"{len(values)} instead of {width}: {' '.join(' | '.join(values).splitlines())}"
        if fault and is_quoted:
            waiting.extend(islice(lines, LONGEST_TAIL - len(waiting)))
            text += [waiting.popleft() for _ in range(_tail(list(waiting), settings))]
        if values or fault:
            yield Record(line, text, values, fault)
        line += len(text)


def _tail(ahead: Sequence[str], settings: dict[str, Any]) -> int:
    """How many of the lines behind a fault belong to its record: up to the last that ends a quoted field which no line there began.

    Without this the rest of a broken text would be a row. Another fault begins a record of its own.
    """
    tail, at, delimiter = 0, 0, settings["delimiter"]
    while at < len(ahead):
        line = ahead[at]
        if line.rstrip("\r\n").split(delimiter, 1)[0] == '"':
            at = tail = at + 1
            continue
        reader = _csv_reader(ahead[at:], settings)
        try:
            values = next(reader)
        except csv.Error:
            break
        at += reader.line_num
        if any(value.endswith('"') and value.lstrip(" ") in _pieces(line, delimiter) for value in values):
            tail = at
    return tail


def _sheet(path: Path) -> Iterator[Record]:
    """The rows of a workbook's first sheet that are not empty, each as wide as the header."""
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.escape import unescape
    except ImportError:
        step = "`.venv/bin/pip install -c constraints.txt openpyxl` (the extra `xlsx`), or save the sheet as CSV"
        raise UsageError(f"{path}: an .xlsx file is read with openpyxl, which is not installed. {step}.") from None
    width = 0
    try:
        with path.open("rb") as file:
            sheet = load_workbook(file, read_only=True, data_only=True).worksheets[0]
            sheet.reset_dimensions()  # which some programs write wrong
            for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
                if used := [at for at, cell in enumerate(cells) if cell not in {None, ""}]:
                    width = width or used[-1] + 1
                    values = (*cells, *[None] * width)[:width]
                    yield Record(number, [], [unescape(value) if isinstance(value, str) else value for value in values])
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, IndexError, ValueError, ParseError) as error:
        raise UsageError(f"{path}: not a readable .xlsx file ({error}). Save it again, or as CSV.") from None


# Parquet


def _parquet(path: Path, asked: Sequence[str]) -> Iterator[Row | BadRow]:
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _places(path, file.schema_arrow.names, asked)
            for batch in file.iter_batches(batch_size=8192, columns=list(dict.fromkeys(asked))):
                for values in zip(*(_values(batch.column(name)) for name in asked), strict=True):
                    number += 1
                    faults = ((name, _not_decoded(value)) for name, value in zip(asked, values, strict=True))
                    yield next((BadRow(number, name, *fault) for name, fault in faults if fault), Row(number, values))
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
