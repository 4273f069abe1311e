"""Predictions over any number of rows in bounded memory.

A window of rows is read, answered in batches of like length, and passed on in the order of the input. It is bounded in rows and in
characters, so that neither many short nor a few long texts fill the memory. Trade-off: a window's first row waits for its last;
`window_rows=1` answers row by row, more slowly.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.serving.predictor import Prediction, Predictor

WINDOW_ROWS = 1024
WINDOW_CHARS = 4_000_000


@dataclass(frozen=True, slots=True)
class Item:
    """One row of the input; `line` is 1-based."""

    line: int
    fields: Mapping[str, Any]
    kept: Mapping[str, Any] = field(default_factory=dict)
    """Columns that are passed through to the output."""
    error: str | None = None
    """Why the row could not even be read."""


def predict_stream(predictor: Predictor, items: Iterable[Item], window_rows: int = WINDOW_ROWS) -> Iterator[list[tuple[Item, Prediction]]]:
    """Windows of items with their predictions, in the order of the input; each item comes back once."""
    for window in _windows(items, window_rows):
        usable = [item for item in window if item.error is None]
        answers = iter(predictor.predict([item.fields for item in usable]))
        yield [(item, next(answers) if item.error is None else Prediction(None, None, None, item.error)) for item in window]


def _windows(items: Iterable[Item], window_rows: int) -> Iterator[list[Item]]:
    window: list[Item] = []
    chars = 0
    for item in items:
        window.append(item)
        chars += sum(len(value) for value in item.fields.values() if isinstance(value, str))
        if len(window) >= window_rows or chars >= WINDOW_CHARS:
            yield window
            window, chars = [], 0
    if window:
        yield window
