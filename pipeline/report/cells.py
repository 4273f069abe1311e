"""Tables as plain data, so that the template only sets them and tests can read them.

Every cell is text that is already formatted; a missing number is a dash or says which command measures it, never a guess.
"""

from dataclasses import dataclass, field
from typing import Literal

Mark = Literal["", "best", "best-student"]
DOMAIN_TITLE = {"in": "In domain", "out": "Out of domain"}


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller line under it, whether it is the best of its column, and how much it is shaded (0 to 1)."""

    text: str
    note: str = ""
    mark: Mark = ""
    code: bool = False
    heat: float | None = None


@dataclass(frozen=True)
class Rows:
    """Rows under a common heading; each row's first cell is its header."""

    title: str
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Table:
    """A table with a caption; `groups` are headings over several columns (text, columns), `text_columns` the ones set flush left."""

    name: str
    caption: str
    columns: list[str]
    bodies: list[Rows]
    groups: list[tuple[str, int]] = field(default_factory=list)
    text_columns: tuple[int, ...] = (0,)


def as_float(value: object) -> float | None:
    """A number read from JSON as a float; None for anything else."""
    return float(value) if isinstance(value, int | float) else None
