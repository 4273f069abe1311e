"""The predictions log: what a student was asked in use and what it answered, as `monitor` reads it back.

JSON lines, one for each input: `time` (UTC, ISO 8601), `student` (the first 16 digits of its weights' sha256), `fields` (the input), and
`label`, `confidence`, `probabilities` or `error`. Lines are only ever appended, one write for several, so that `predict` and `serve` can
share a file, and a log can be cut, joined or rotated by any tool. It holds the inputs: keep it where inputs may lie.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ID_DIGITS = 16


class PredictionLog:
    """Appends to one log; parents are made."""

    def __init__(self, path: Path, weights_sha256: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._student = weights_sha256[:ID_DIGITS]

    def append(self, rows: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Append inputs with their answers (`label`, `confidence`, `probabilities`, or `error`)."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [
            json.dumps({"time": time, "student": self._student, "fields": dict(fields), **answer}, ensure_ascii=False, default=str)
            for fields, answer in rows
        ]
        if lines:
            # Half of a surrogate pair, which JSON may hold and UTF-8 may not, stays JSON's escape.
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n".join(lines) + "\n")


def is_log_record(record: object) -> bool:
    """Whether a JSON value is a line of a predictions log."""
    return isinstance(record, dict) and isinstance(record.get("fields"), dict) and {"time", "student"} <= set(record)
