"""Files of examples, read row by row: csv, tsv, jsonl, json, xlsx, Parquet, and folders of them. docs/data.md shows the forms.

A reader yields the asked columns of each row with its line number, or a `BadRow` that says why the row cannot be read. It never stops at
a bad row and never drops one; blank lines are not rows. Text files are streamed, and unpacked if they are gzip files. Python's csv module
reads tables; what it has to be told (delimiter, encoding, how quotes are written) is found by reading the file once more.
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
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO, cast
from xml.etree.ElementTree import ParseError

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError, choices
from pipeline.params.data import FORMATS, SourceParams, form_of

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


Record = tuple[Sequence[int], list[Any]] | BadRow
"""The lines of a record, and its values as strings (or as a sheet has them)."""


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
    for name, file, kind in data_files(path, files, form):
        if kind != "jsonl" and not file.is_file():  # a pipe is read once, and only JSON lines need no more
            with tempfile.NamedTemporaryFile() as copy:
                with file.open("rb") as pipe:
                    shutil.copyfileobj(pipe, copy)
                copy.flush()
                yield from read_rows(Path(copy.name), kind, asked, columns, delimiter=delimiter, encoding=encoding)
            continue
        if kind == "parquet":
            rows = _parquet(file, asked)
        elif kind == "xlsx":
            rows = _delimited(file, _sheet(file), asked, None)
        elif kind in {"csv", "tsv"}:
            rows = _table(file, kind, asked, columns, delimiter, encoding)
        else:
            rows = (
                Row(read[0], tuple(read[1].get(column, MISSING) for column in asked)) if isinstance(read, tuple) else read
                for read in _objects(file, kind, encoding)
            )
        yield from (replace(row, file=name) for row in rows) if name else rows


def source_rows(path: Path, source: SourceParams, asked: Sequence[str]) -> Iterator[Row | BadRow]:
    """The rows of a source, read as its params say."""
    said = {"files": source.files, "delimiter": source.delimiter, "encoding": source.encoding}
    return read_rows(path, source.form, asked, source.columns, **said)


def data_files(path: Path, files: str | None = None, form: str | None = None) -> list[tuple[str, Path, str]]:
    """What is read for a path: the file itself, with an empty name; or a folder's files in the order of their names, without hidden ones.

    Each with its format. Raises UsageError if there is none, the format is not known, or a folder has several.
    """
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


def json_keys(path: Path, form: str | None = None, files: str | None = None, encoding: str | None = None) -> set[str]:
    """Every key of the objects of jsonl or json files, for a message that lists them; none for other formats."""
    own = [(file, kind) for _, file, kind in data_files(path, files, form) if kind in {"jsonl", "json"}]
    return {key for file, kind in own for read in _objects(file, kind, encoding) if isinstance(read, tuple) for key in read[1]}


# text


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedReader]:
    """The file's bytes; those in it if it is a gzip file, whatever its name."""
    with path.open("rb") as file:
        if not file.peek(2).startswith(b"\x1f\x8b"):
            yield file
            return
        try:
            with gzip.open(file) as inner:
                yield cast("io.BufferedReader", inner)
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
        beyond_ascii = (line for line in file if not line.isascii())
        one = next(beyond_ascii, None)
        if one is None or any(line.decode(errors="ignore").encode() == line for line in chain([one], beyond_ascii)):
            return "utf-8-sig"
    print(f"{path}: not UTF-8; read as Windows-1252, since no `encoding` is said", file=sys.stderr)
    return "cp1252"


def _lines(path: Path, encoding: str | None) -> Iterator[tuple[int, str]]:
    """Lines that are not blank with their numbers, without their ends (LF or CRLF)."""
    with _opened(path, "\n", encoding) as file:
        for number, line in enumerate(file, start=1):
            if text := line.removesuffix("\n").removesuffix("\r"):
                yield number, text


def _fault(text: str, line: int, field: str = "") -> BadRow | None:
    if text.isascii() or not NOT_DECODED.search(text):
        return None
    return BadRow(line, field, "not UTF-8", text.encode(errors="surrogateescape").decode(errors="backslashreplace"))


# json


def _objects(path: Path, form: str, encoding: str | None) -> Iterator[tuple[int, dict[str, Any]] | BadRow]:
    if form == "json" and (items := _list(path, encoding)) is not None:
        for number, value in enumerate(items, start=1):
            yield (number, value) if isinstance(value, dict) else BadRow(number, "", "not a JSON object", str(value))
        return
    for number, text in _lines(path, encoding):
        if fault := _fault(text, number):
            yield fault
        elif text.strip():
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield BadRow(number, "", "not JSON", f"{error}: {text}")
            else:
                yield (number, value) if isinstance(value, dict) else BadRow(number, "", "not a JSON object", text)


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
    inner = value.values() if isinstance(value, dict) else [value]
    if len(lists := [own for own in inner if isinstance(own, list)]) != 1:
        raise UsageError(f"{path}: neither a list of objects nor an object with one list, as `data`. Write one object for each row.")
    return lists[0]


# tables


def _table(
    path: Path, form: str, asked: Sequence[str], columns: Sequence[str] | None, delimiter: str | None, encoding: str | None
) -> Iterator[Row | BadRow]:
    encoding = encoding or _encoding(path)
    first, settings = _layout(path, form, asked, columns, delimiter, encoding)
    settings, is_quoted = _quoting(path, form, first, settings, encoding)
    if is_quoted:
        records = _csv_records(path, first, settings, encoding)
    else:
        lines = ((line, text) for line, text in _lines(path, encoding) if line >= first)
        records = (_fault(text, line) or ((line,), text.split(settings["delimiter"])) for line, text in lines)
    yield from _delimited(path, records, asked, columns)


def _layout(
    path: Path, form: str, asked: Sequence[str], columns: Sequence[str] | None, delimiter: str | None, encoding: str
) -> tuple[int, dict[str, Any]]:
    """The line on which the table begins (behind Excel's `sep=;`), and csv's settings as that line shows them."""
    with _opened(path, "", encoding) as file:
        start = next(file, "")
        if hint := re.fullmatch(r'"?sep=(.)"?\s*', start):
            start, delimiter = next(file, ""), delimiter or hint[1]

    def fit(delimiter: str) -> tuple[bool, int]:
        names = [name.strip() for name in next(csv.reader([start], delimiter=delimiter), [])]
        return set(asked) <= set(names) if columns is None else len(names) == len(columns), len(names)

    csv.field_size_limit(LONGEST_FIELD)
    delimiter = delimiter or ("\t" if form == "tsv" else max(",;\t|", key=fit))
    spaced = 0 < start.count(delimiter) == start.count(f"{delimiter} ")
    return 2 if hint else 1, {"delimiter": delimiter, "strict": True, "skipinitialspace": spaced}


def _quoting(path: Path, form: str, first: int, settings: dict[str, Any], encoding: str) -> tuple[dict[str, Any], bool]:
    """The csv module's settings, with backslashes as escapes if fewer records are broken so; and whether quotes are more than text.

    In a tsv file they are if more fields are quoted that have to be than hold a quote and are not. If there are neither, a line must end
    within a quoted field, or more fields must be quoted than lines are broken.
    """
    with _opened(path, "", encoding) as file:
        is_plain = form == "csv" and not any("\\" in line for line in file)
    counts = Counter[str]() if is_plain else _count(path, first, settings, encoding)
    if counts["escapes"]:
        escaping = settings | {"escapechar": "\\"}
        if (others := _count(path, first, escaping, encoding))["broken"] < counts["broken"]:
            settings, counts = escaping, others
    if form == "tsv" and not (counts["needed"] or counts["bare"]):
        return settings, counts["cut"] > 0 or counts["quoted"] > counts["broken"]
    return settings, form == "csv" or counts["needed"] > counts["bare"]


def _count(path: Path, first: int, settings: dict[str, Any], encoding: str) -> Counter[str]:
    """How many lines of broken records, lines that end in a quoted field, records with an escape, and fields of each kind there are.

    Fields are `bare` (they hold a quote and are not quoted), `needed` (they are, and have to be) or `quoted` for nothing.
    """
    counts, delimiter, width = Counter[str](), settings["delimiter"], 0
    with _opened(path, "", encoding) as file:
        for lines, values in _records(islice(file, first - 1, None), settings):
            text, fields = "".join(lines), [] if isinstance(values, csv.Error) else values
            width = width or len(fields)
            counts["escapes"] += '\\"' in text or f"\\{delimiter}" in text
            counts["broken"] += len(lines) * (isinstance(values, csv.Error) or len(fields) not in {0, width})
            if '"' in text:
                counts["cut"] += any(f'{delimiter}"' in delimiter + line and line.count(delimiter) < width - 1 for line in lines)
            for value in fields if '"' in text else ():
                is_bare = _is_bare(value, text, settings)
                if '"' in value or not is_bare:
                    is_needed = any(mark in value for mark in ('"', "\n", delimiter))
                    counts["bare" if is_bare else "needed" if is_needed else "quoted"] += 1
    return counts


def _csv_records(path: Path, first: int, settings: dict[str, Any], encoding: str) -> Iterator[Record]:
    """Each line of a broken record is a bad row, since each may have been a row."""
    with _opened(path, "", encoding) as file:
        for lines, values in _records(islice(file, first - 1, None), settings):
            own, first = range(first, first + len(lines)), first + len(lines)
            if isinstance(values, csv.Error):
                for line in own:
                    yield BadRow(line, "", "not CSV", f"{values}, in the record that begins on line {own[0]}")
            elif fault := _fault(settings["delimiter"].join(values), own[0]):
                yield from (replace(fault, line=line) for line in own)
            elif values:
                yield own, values


def _records(lines: Iterator[str], settings: dict[str, Any]) -> Iterator[tuple[list[str], list[str] | csv.Error]]:
    """Each record's lines with its values, or with what is wrong with it."""
    waiting, record = deque[str](), list[str]()
    if "escapechar" in settings:  # csv takes every backslash for an escape; one before anything else is text
        escaped = re.compile(rf'(\\[\\"\r\n{re.escape(settings["delimiter"])}])|\\')
        lines = (escaped.sub(lambda found: found[1] or r"\\", line) for line in lines)

    def taken() -> Iterator[str]:
        while line := waiting.popleft() if waiting else next(lines, ""):
            record.append(line)
            yield line

    reader, width = csv.reader(taken(), **settings), 0
    while True:
        record.clear()
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            values = error
        else:
            width = width or len(values)
        if isinstance(values, csv.Error) or len(values) not in {0, width}:
            waiting.extend(islice(lines, LONGEST_TAIL - len(waiting)))
            record += [waiting.popleft() for _ in range(_tail(list(waiting), settings))]
        yield record, values


def _tail(ahead: Sequence[str], settings: dict[str, Any]) -> int:
    """How many of the lines behind a fault belong to its record: up to the last that ends a quoted field which no line there began.

    Without this the rest of a broken text would be a row. Another fault begins a record of its own.
    """
    tail = at = 0
    while at < len(ahead):
        line = ahead[at].rstrip("\r\n")
        if line == '"' or line.startswith(f'"{settings["delimiter"]}'):
            at = tail = at + 1
            continue
        reader = csv.reader(ahead[at:], **settings)
        try:
            values = next(reader)
        except csv.Error:
            break
        at += reader.line_num
        if any(value.endswith('"') and _is_bare(value, line, settings) for value in values):
            tail = at
    return tail


def _is_bare(value: str, text: str, settings: dict[str, Any]) -> bool:
    """Whether a value is in the text of its record as it is, between two delimiters."""
    delimiter = settings["delimiter"]
    line = text.rstrip("\r\n").replace(f"{delimiter} ", delimiter) if settings["skipinitialspace"] else text.rstrip("\r\n")
    return f"{delimiter}{value}{delimiter}" in f"{delimiter}{line}{delimiter}"


def _delimited(path: Path, records: Iterator[Record], asked: Sequence[str], columns: Sequence[str] | None) -> Iterator[Row | BadRow]:
    header = columns
    places = [] if header is None else _places(path, header, asked)
    for record in records:
        if header is None and isinstance(record, BadRow):
            raise UsageError(f"{path}: the header on line {record.line} cannot be read: {record.reason}: {record.value[:80]!r}.")
        if isinstance(record, BadRow):
            yield record
            continue
        lines, values = record
        if header is None:
            header = ["" if name is None else str(name).strip() for name in values]
            places = _places(path, header, asked)
        elif len(values) != len(header):
            fault = f"{len(values)} instead of {len(header)}: {' '.join(' | '.join(values).splitlines())}"
            yield from (BadRow(line, "", "wrong number of columns", fault) for line in lines)
        else:
            yield Row(lines[0], tuple(values[place] for place in places))


def _places(path: Path, header: Sequence[str], asked: Sequence[str]) -> list[int]:
    for name in asked:
        if name not in header:
            raise MissingColumnError(path, name, header)
        if header.count(name) > 1:
            raise UsageError(f"{path}: it has {header.count(name)} columns {name!r}. Rename all but one.")
    return [header.index(name) for name in asked]


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
                    yield (number,), [unescape(cell) if isinstance(cell, str) else cell for cell in (*cells, *[None] * width)[:width]]
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
