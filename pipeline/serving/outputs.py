"""Predictions as rows of JSON lines, CSV or Parquet, written window by window; a file is whole or not there.

A row has the input's line, the columns kept from it, label, confidence, the probability of each label, and the error where there is one.
JSON lines go to standard output too, and are flushed after each window.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import UsageError
from pipeline.files import replacing
from pipeline.serving.predictor import Prediction
from pipeline.serving.stream import Item

OutputFormat = Literal["jsonl", "csv", "parquet"]
Window = Sequence[tuple[Item, Prediction]]
Write = Callable[[Window], None]
UNENCODABLE = "backslashreplace"
"""Half of a surrogate pair, which JSON may hold and UTF-8 may not, is written as JSON's escape."""
OWN_COLUMNS = ("line", "label", "confidence", "probabilities", "error")


def check_kept(kept: Sequence[str]) -> None:
    """Raise UsageError where a kept column has the name of one that is written anyway."""
    for name in kept:
        if name in OWN_COLUMNS or name.startswith("p_"):
            raise UsageError(f"--keep {name}: the output has a column of that name itself; rename it in the input.")


@contextmanager
def writing(path: Path | None, form: OutputFormat, labels: Sequence[str], kept: Sequence[str]) -> Iterator[Write]:
    """A function that writes one window after another to `path`, or to standard output (JSON lines and CSV) where that is None."""
    if path is None:
        if form == "parquet":
            raise UsageError("Parquet cannot be written to standard output; name a file with --output.")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8", errors=UNENCODABLE)
        yield _text_writer(sys.stdout, form, labels, kept)
        return
    with replacing(path) as temporary:
        if form == "parquet":
            schema = _schema(labels, kept)
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                yield lambda window: writer.write_table(_table(window, schema, labels, kept))
        else:
            with temporary.open("w", encoding="utf-8", errors=UNENCODABLE, newline="") as file:
                yield _text_writer(file, form, labels, kept)


def _text_writer(file: TextIO, form: OutputFormat, labels: Sequence[str], kept: Sequence[str]) -> Write:
    if form == "jsonl":

        def write_json_lines(window: Window) -> None:
            file.writelines(json.dumps(as_json(item, prediction), ensure_ascii=False, default=str) + "\n" for item, prediction in window)
            file.flush()

        return write_json_lines
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["line", *kept, "label", "confidence", *(f"p_{label}" for label in labels), "error"])

    def write_csv(window: Window) -> None:
        for item, found in window:
            shares = [found.probabilities[label] if found.probabilities else None for label in labels]
            writer.writerow([item.line, *(item.kept.get(name) for name in kept), found.label, found.confidence, *shares, found.error])
        file.flush()

    return write_csv


def as_json(item: Item, prediction: Prediction) -> dict[str, Any]:
    """A row of the output as a JSON object; without an answer it has `error` instead of one."""
    row: dict[str, Any] = {"line": item.line, **item.kept}
    if prediction.error is not None:
        return row | {"error": prediction.error}
    return row | answer_json(prediction)


def answer_json(prediction: Prediction) -> dict[str, Any]:
    """An answer as a JSON object; an error where there is none."""
    if prediction.error is not None:
        return {"error": prediction.error}
    return {"label": prediction.label, "confidence": prediction.confidence, "probabilities": prediction.probabilities}


def _schema(labels: Sequence[str], kept: Sequence[str]) -> pa.Schema:
    """Kept columns are text: the type of a column of many files is not known before its last row."""
    return pa.schema(
        [
            pa.field("line", pa.int64(), nullable=False),
            *(pa.field(name, pa.string()) for name in kept),
            pa.field("label", pa.string()),
            pa.field("confidence", pa.float64()),
            *(pa.field(f"p_{label}", pa.float64()) for label in labels),
            pa.field("error", pa.string()),
        ]
    )


def _table(window: Window, schema: pa.Schema, labels: Sequence[str], kept: Sequence[str]) -> pa.Table:
    columns: dict[str, list[Any]] = {"line": [item.line for item, _ in window]}
    for name in kept:
        columns[name] = [None if (value := item.kept.get(name)) is None else _storable(str(value)) for item, _ in window]
    columns |= {key: [getattr(found, key) for _, found in window] for key in ("label", "confidence", "error")}
    columns |= {f"p_{label}": [found.probabilities[label] if found.probabilities else None for _, found in window] for label in labels}
    return pa.table({name: pa.array(columns[name], type=schema.field(name).type) for name in schema.names}, schema=schema)


def _storable(text: str) -> str:
    return text.encode("utf-8", UNENCODABLE).decode("utf-8")
