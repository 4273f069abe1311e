"""What was set aside, and why: one JSON line for each row that is bad, contradicts another, or copies an evaluation example.

Nothing is dropped silently: a row is in use, here, or in the counts of `metrics/prepare.json` (blank lines, rows without a label, exact
repeats, which need no look). The trade-off: values are shortened, so this file is for finding rows, not for restoring them.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import replacing

SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row set aside; `field` is empty where the row as a whole is meant."""

    source: str
    file: str
    line: int
    field: str
    reason: str
    value: str
    copy_of: dict[str, Any] | None = None
    """For a copy: where the example stands that it copies, and how similar the two are."""

    def describe(self) -> str:
        """One line for a message."""
        return f"{self.file}:{self.line}: {self.field + ': ' if self.field else ''}{self.reason}: {shorten(self.value)!r}"


def shorten(text: str) -> str:
    """The beginning of a value, as it stands in messages."""
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def write_quarantine(entries: Iterable[Quarantined], path: Path) -> None:
    """Write quarantine.jsonl: source, file, line, field, reason, value (shortened), and for copies what they copy."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        for entry in entries:
            record: dict[str, Any] = {
                "source": entry.source,
                "file": entry.file,
                "line": entry.line,
                "field": entry.field,
                "reason": entry.reason,
                "value": shorten(entry.value),
            }
            if entry.copy_of is not None:
                record["copy_of"] = entry.copy_of
            # A lone surrogate out of a JSON escape has no UTF-8; shown escaped.
            text = json.dumps(record, ensure_ascii=False)
            file.write(text.encode(errors="backslashreplace").decode() + "\n")
