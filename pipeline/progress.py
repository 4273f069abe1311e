"""Progress for work of more than a few seconds: a live bar on a terminal, plain lines elsewhere (CI, files).

Both show what is done, the rate, and an estimate of the time left.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS_BETWEEN_LINES = 10.0


def rate(count: float, seconds: float) -> float:
    """`count` a second; 0 where the clock stood still or went back."""
    return count / seconds if seconds > 0 else 0.0


@dataclass
class Meter:
    """Counts units of work; `advance(n, note)` after each piece. `note` is free text behind the numbers."""

    title: str
    total: int
    unit: str
    done: int = 0
    _started: float = field(default_factory=time.monotonic)
    _printed: float = field(default_factory=time.monotonic)
    _bar: Progress | None = None

    def advance(self, count: int, note: str = "") -> None:
        """`count` more units are done."""
        self.done += count
        elapsed = time.monotonic() - self._started
        speed = rate(self.done, elapsed)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, note=f"{speed:,.1f} {self.unit}/s  {note}")
        elif time.monotonic() - self._printed >= PLAIN_SECONDS_BETWEEN_LINES or self.done == self.total:
            self._printed = time.monotonic()
            left = (self.total - self.done) / speed if speed else 0.0
            line = f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {speed:,.1f}/s, {left:,.0f} s left  {note}".rstrip()
            print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Meter]:
    """A meter for `total` units, shown until the block ends."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(title, total, unit)
        return
    title_column, note_column = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (title_column, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note_column)
    with Progress(*columns, console=console) as bar:
        bar.add_task(title, total=total, note="")
        yield Meter(title, total, unit, _bar=bar)
