"""Files and standard input as rows for a student: JSON lines, CSV, TSV, Parquet, or a predictions log."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

from pipeline.data.readers import BadRow, BlankLine, Format, MissingColumnError, Row, read_rows
from pipeline.errors import UsageError, choices
from pipeline.data.fields import MISSING
from pipeline.serving.log import is_log_record
from pipeline.serving.stream import Item

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
STDIN = Path("/dev/stdin")


def format_of(path: str, given: str | None, what: str, standard: str = "jsonl") -> str:
    """The format by option or by the file's suffix; standard input and output are JSON lines unless said otherwise."""
    if given is not None:
        if given not in FORMATS.values():
            raise UsageError(f"{what}: no format {given!r}; choose one of: {choices(set(FORMATS.values()))}")
        return given
    if path == "-":
        return standard
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise UsageError(f"{path}: the suffix {suffix or '(none)'} names no format; one of {choices(FORMATS)}, or say it with {what}.")
    return FORMATS[suffix]


def read_items(path: str, form: str, fields: Sequence[str], columns: Sequence[str], kept: Sequence[str] = ()) -> Iterator[Item]:
    """Rows of a file, or of standard input for "-", with the template's `fields` taken from `columns`, and further columns `kept`.

    Blank lines are skipped; rows that cannot be read come with an error. Raises UsageError where the file is not there, lacks a column or
    is not of this format.
    """
    file = STDIN if path == "-" else Path(path)
    if not file.exists() or file.is_dir():
        raise UsageError(f"{path}: no such file.")
    if form == "parquet" and not file.is_file():
        raise UsageError(
            f"{'standard input' if path == '-' else path} cannot be Parquet, which is read from its end; write it to a file first."
        )
    for read in _rows(file, form, columns, kept):
        if isinstance(read, BlankLine):
            continue
        if isinstance(read, BadRow):
            yield Item(read.line, {}, {}, f"{read.field}: {read.reason}" if read.field else read.reason)
            continue
        values = [None if value is MISSING else value for value in read.values]
        yield Item(read.line, dict(zip(fields, values, strict=False)), dict(zip(kept, values[len(columns) :], strict=True)))


def _rows(file: Path, form: str, columns: Sequence[str], kept: Sequence[str]) -> Iterator[Row | BadRow | BlankLine]:
    """Rows with the hint that fits a command where a column is not there."""
    try:
        yield from read_rows(file, cast("Format", form), [*columns, *kept])
    except MissingColumnError as missing:
        option = "--keep COLUMN" if missing.column in kept else f"--field {missing.column}=COLUMN"
        raise UsageError(f"{missing.fault} Name the right one with {option}.") from None


def columns_of(fields: Sequence[str], mapped: Sequence[str]) -> list[str]:
    """The column of each field, from options such as `text=body`. Raises UsageError where one names no field."""
    columns = dict(zip(fields, fields, strict=True))
    for entry in mapped:
        name, _, column = entry.partition("=")
        if name not in columns or not column:
            raise UsageError(f"--field {entry}: write FIELD=COLUMN; the student's fields are: {choices(fields)}")
        columns[name] = column
    return list(columns.values())


def is_log(path: str) -> bool:
    """Whether a file of JSON lines is a predictions log, by its first line."""
    if path == "-" or not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        first = file.readline()
    try:
        return is_log_record(json.loads(first))
    except ValueError:
        return False


def read_log(path: str, kept: Sequence[str] = ()) -> Iterator[Item]:
    """The inputs of a predictions log; `kept` are further entries of its lines, such as labels that were added later."""
    for item in read_items(path, "jsonl", ["fields"], ["fields"], kept):
        fields = item.fields.get("fields")
        if item.error is None and not isinstance(fields, dict):
            yield Item(item.line, {}, item.kept, "fields: missing")
        else:
            yield Item(item.line, fields or {}, item.kept, item.error)
