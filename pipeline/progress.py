"""Progress for work of more than a few seconds: a live bar on a terminal, plain lines elsewhere, with the rate and the time left."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS_BETWEEN_LINES = 5.0
LINE = re.compile(r".+: ([\d,]+)/([\d,]+) \w+, [\d,.]+/s, ")


def rate(count: float, seconds: float) -> float:
    """`count` a second; 0 if no time has passed."""
    return count / seconds if seconds > 0 else 0.0


@dataclass(frozen=True)
class Reading:
    """A plain line of a meter."""

    done: int
    total: int  # at least 1
    text: str


def read_meter(line: str) -> Reading | None:
    """What a plain line of a meter says; None if it is another line."""
    found = LINE.match(line)
    return Reading(int(found[1].replace(",", "")), max(1, int(found[2].replace(",", ""))), line) if found else None


class Meter:
    """Counts units of work; `advance(n, note)` after each piece. `note` is free text behind the numbers."""

    def __init__(self, title: str, total: int, unit: str, bar: Progress) -> None:
        self._title, self._total, self._unit, self._bar = title, total, unit, bar
        self._task = bar.add_task(title, total=total, note="")
        self._done = 0
        self._started = self._printed = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        """`count` more units are done."""
        self._done += count
        now = time.monotonic()
        speed = rate(self._done, now - self._started)
        if not self._bar.disable:
            self._bar.update(self._task, completed=self._done, note=f"{speed:,.1f} {self._unit}/s  {note}")
        elif self._title and (now - self._printed >= PLAIN_SECONDS_BETWEEN_LINES or self._done == self._total):
            self._printed = now
            left = rate(self._total - self._done, speed)
            line = f"{self._title}: {self._done:,}/{self._total:,} {self._unit}, {speed:,.1f}/s, {left:,.0f} s left  {note}"
            print(line.rstrip(), file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Meter]:
    """A meter for `total` units, shown until the block ends; without a title it is not shown."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")
    with Progress(*columns, console=console, disable=not (title and console.is_terminal)) as bar:
        yield Meter(title, total, unit, bar)
