"""Files and streams of inputs in, predictions out: every format that `pipeline.data.readers` reads, or a predictions log; CSV,
JSON lines, Parquet or that log out.

Rows are read, answered and written in windows, so memory is bounded by a window's rows and characters, and predictions come in the order of
the input. A window's first row waits for its last; a window of one row answers line by line, more slowly.
"""

import csv
import io
import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.readers import MISSING, BadRow, MissingColumnError, Row, read_rows
from pipeline.errors import UsageError, choices
from pipeline.files import replacing
from pipeline.params.data import FORMATS, form_of
from pipeline.serving.predictor import Prediction, Predictor

if TYPE_CHECKING:
    from pipeline.models.held_back import Threshold

WRITTEN = {suffix: form for suffix, form in FORMATS.items() if form in {"csv", "jsonl", "parquet"}}  # the output's formats
HANDED_BACK = ("by", "student_label", "student_confidence")  # columns of CSV and Parquet if there is a fallback
OWN_COLUMNS = ("line", "label", "confidence", "probabilities", "cut", "answered", "student_answer", *HANDED_BACK, "error")
WINDOW_CHARS = 4_000_000
STUDENT_DIGITS = 16  # of its weights' sha256, in a predictions log
UNENCODABLE = "backslashreplace"
"""Half of a surrogate pair, which JSON may hold and UTF-8 may not, is written as JSON's escape."""


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the input; `line` is 1-based."""

    line: int
    fields: Mapping[str, Any]
    kept: Mapping[str, Any] = field(default_factory=dict)  # columns that pass through to the output
    error: str | None = None  # why the row could not be read


Answered = tuple[Item, Prediction]


def format_of(path: str, formats: Mapping[str, str] = FORMATS) -> str:
    """The format that a file's name ends with; standard input and output are JSON lines. Raises UsageError if it is none of `formats`."""
    form = "jsonl" if path == "-" else form_of(path) if formats is FORMATS else formats.get(Path(path).suffix.lower())
    if form is None:
        step = "Rename it, or say the format with --input-format or --output-format of predict."
        raise UsageError(f"{path}: the name does not end with one of {choices(formats)}. {step}")
    return form


def columns_of(fields: Sequence[str], mapped: Sequence[str]) -> dict[str, str]:
    """Each field's column, from options such as `text=body`. Raises UsageError if one names no field."""
    columns = dict(zip(fields, fields, strict=True))
    for entry in mapped:
        name, _, column = entry.partition("=")
        if name not in columns or not column:
            raise UsageError(f"--field {entry}: write FIELD=COLUMN; the student's fields are: {choices(fields)}")
        columns[name] = column
    return columns


def kept_columns(options: Sequence[str]) -> dict[str, str]:
    """Name in the output → column, from options such as `id` or `gold=label`. Raises UsageError if a name is taken."""
    kept: dict[str, str] = {}
    for entry in options:
        name, separator, column = entry.partition("=")
        if not name or (separator and not column):
            raise UsageError(f"--keep {entry}: write COLUMN, or NAME=COLUMN to give it another name.")
        if name in OWN_COLUMNS or name.startswith("p_") or name in kept:
            taken = "is asked for twice" if name in kept else "is a column of the output itself"
            raise UsageError(f"--keep {entry}: {name!r} {taken}; write --keep NAME={column or name} to give it another name.")
        kept[name] = column or name
    return kept


def read_items(path: str, columns: Mapping[str, str], kept: Mapping[str, str], form: str | None = None) -> Iterator[Item]:
    """Rows of a file, or of standard input for "-". `columns` has each field's column, `kept` the column of each name that passes through.

    Blank lines are skipped; a row that cannot be read comes with an error. A line of a predictions log gives the input that it holds.
    `form` is by default what the name says. Raises UsageError if the file is absent, lacks a column or is not of this format.
    """
    form = form or format_of(path)
    file = Path("/dev/stdin" if path == "-" else path)
    if not file.exists() or file.is_dir():
        raise UsageError(f"{path}: no such file.")
    try:
        for read in read_rows(file, form, [*columns.values(), *kept.values()]):
            if isinstance(read, BadRow):
                yield Item(read.line, {}, error=f"{read.field}: {read.reason}" if read.field else read.reason)
                continue
            values: list[Any] = [
                None if value is MISSING or (isinstance(value, float) and not math.isfinite(value)) else value  # which JSON lacks
                for value in read.values
            ]
            yield Item(read.line, dict(zip(columns, values, strict=False)), dict(zip(kept, values[len(columns) :], strict=False)))
    except MissingColumnError as missing:
        options = {column: f"--keep NAME={column}" for column in kept.values()}
        options |= {column: f"--field {name}=COLUMN" for name, column in columns.items()}
        raise UsageError(f"{missing.fault} Name the right one with {options[missing.column]}.") from None


def logged_threshold(path: str, weights_sha256: str) -> float | None:
    """The threshold in the last line that this student wrote into a predictions log; None if it had none, or the file is not a log."""
    if format_of(path) != "jsonl" or not Path(path).is_file():
        return None
    lines = (read.values for read in read_rows(Path(path), "jsonl", ["student", "threshold"]) if isinstance(read, Row))
    found = [least for by, least in lines if by == weights_sha256[:STUDENT_DIGITS]]
    return found[-1] if found and found[-1] is not MISSING else None


def predict_items(predictor: Predictor, items: Iterable[Item], window_rows: int) -> Iterator[list[Answered]]:
    """Windows of items with their predictions, in the order of the input."""
    window: list[Item] = []
    chars = 0

    def answered() -> list[Answered]:
        answers = iter(predictor.predict([item.fields for item in window if item.error is None]))
        return [(item, next(answers) if item.error is None else Prediction(error=item.error)) for item in window]

    for item in items:
        window.append(item)
        chars += sum(len(value) for value in item.fields.values() if isinstance(value, str))
        if len(window) >= window_rows or chars >= WINDOW_CHARS:
            yield answered()
            window, chars = [], 0
    if window:
        yield answered()


@contextmanager
def writing(
    path: str, form: str, labels: Sequence[str], kept: Iterable[str], more: Sequence[str] = ()
) -> Iterator[Callable[[Sequence[Answered]], None]]:
    """A function that writes one window after another to a file, or to standard output for "-"; `form` is jsonl, csv or parquet.

    A row has the input's line, the kept columns, then `label`, `confidence`, the probability of each label (`p_LABEL` in CSV and Parquet),
    `cut` if its text was, the columns `more` (`answered` with a threshold, `HANDED_BACK` with a fallback), and `error`. A file is whole or
    not there.
    """
    names = ["line", *kept, "label", "confidence", *(f"p_{label}" for label in labels), "cut", *more, "error"]
    if path == "-":
        if form == "parquet":
            raise UsageError("--output: Parquet cannot be written to standard output; name a file.")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors=UNENCODABLE)
        yield _text_writer(sys.stdout, form, names)
        return
    with replacing(Path(path)) as temporary:
        if form != "parquet":
            with temporary.open("w", encoding="utf-8", errors=UNENCODABLE, newline="") as file:
                yield _text_writer(file, form, names)
            return
        types = {name: pa.float64() for name in names if name in {"confidence", "student_confidence"} or name.startswith("p_")}
        types |= {"line": pa.int64(), "cut": pa.bool_(), "answered": pa.bool_()}
        # Kept columns are text: what a column of a stream holds is known after its last row only.
        schema = pa.schema([pa.field(name, types.get(name, pa.string()), nullable=name != "line") for name in names])
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            yield lambda window: writer.write_table(pa.Table.from_pylist([_flat(*row) for row in window], schema=schema))


def _text_writer(file: TextIO, form: str, names: Sequence[str]) -> Callable[[Sequence[Answered]], None]:
    sheet = csv.DictWriter(file, names, lineterminator="\n")
    if form == "csv":
        sheet.writeheader()

    def write(window: Sequence[Answered]) -> None:
        if form == "csv":
            for row in (_flat(*row) for row in window):
                sheet.writerow(row | {name: str(row[name]).lower() for name in ("cut", "answered") if name in row})
        else:
            file.writelines(json_line({"line": item.line, **item.kept, **found.as_json()}) for item, found in window)
        file.flush()

    return write


def _flat(item: Item, found: Prediction) -> dict[str, Any]:
    """A row of CSV or Parquet; what is absent is left out, and kept values are text: lists, objects and booleans as JSON."""
    texts = {name: json_line(value)[:-1] if isinstance(value, (list, dict, bool)) else str(value) for name, value in item.kept.items()}
    kept = {name: text.encode("utf-8", UNENCODABLE).decode() for name, text in texts.items() if item.kept[name] is not None}
    answer = found.as_json()
    shares, own = answer.pop("probabilities", {}), answer.pop("student_answer", {})
    answer |= {f"p_{label}": share for label, share in shares.items()}
    return {"line": item.line, **kept, **answer, **{f"student_{key}": own[key] for key in ("label", "confidence") if key in own}}


def json_line(row: Any) -> str:
    """A row, or a value, as a line of JSON. NaN and infinities, which JSON lacks, become null; dates and the like become text."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)
    return text + "\n"


class PredictionLog:
    """What a student was asked in use, and what it answered, as JSON lines; `shotless monitor` reads them back. Its folder is made.

    A line has `time` (UTC, ISO 8601), `student` (the first digits of its weights' sha256), `threshold` (the least confidence that is
    answered) if there is one, `fields` (the input), then the answer (`Prediction.as_json`). Each append, from any thread, is one write to
    the file's end, so several processes can share a log, and any tool can cut, join or rotate it. It holds the inputs: keep it where
    inputs may be kept.

    A log that cannot be opened at the start raises OSError. A write that fails later costs log lines, never answers: they are counted in
    `lost`, with one warning on standard error.
    """

    def __init__(self, path: Path, weights_sha256: str, threshold: "Threshold | None" = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        self.lost = 0
        self._path = path
        self._head: dict[str, Any] = {"student": weights_sha256[:STUDENT_DIGITS]}
        self._head |= {} if threshold is None else {"threshold": threshold.confidence}
        self._lock = threading.Lock()
        self._torn = False

    def append(self, rows: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Append inputs with their answers (`Prediction.as_json`)."""
        head = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **self._head}
        lines = [json_line({**head, "fields": dict(fields), **answer}) for fields, answer in rows]
        with self._lock:
            data = "".join(["\n"] * self._torn + lines).encode("utf-8", UNENCODABLE)
            try:
                with self._path.open("ab", buffering=0) as file:
                    self._torn = file.write(data) < len(data)  # the disk became full within a line; the next write begins a new one
                fault = "only a part was written" if self._torn else None
            except OSError as error:
                fault = error.strerror or str(error)
            if fault is not None:
                if not self.lost:
                    print(f"warning: {self._path}: {fault}. Answers go on; what cannot be logged is counted.", file=sys.stderr, flush=True)
                self.lost += len(lines)
