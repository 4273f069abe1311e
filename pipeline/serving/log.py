"""The predictions log: what a student was asked in use, and what it answered. `shotless monitor` reads it back.

JSON lines, one for each input: `time` (UTC, ISO 8601), `student` (the first 16 digits of its weights' sha256), `fields` (the input), then
`label`, `confidence` and `probabilities`, or `error`. Each append is one write to the file's end, so several processes can share a log, and
any tool can cut, join or rotate it. It holds the inputs: keep it where inputs may be kept.
"""

import json
import sys
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

UNENCODABLE = "backslashreplace"
"""Half of a surrogate pair, which JSON may hold and UTF-8 may not, is written as JSON's escape."""


class PredictionLog:
    """Appends to one log, from any thread. Its folder is made.

    A log that cannot be opened at the start raises OSError. A write that fails later costs log lines, never answers: they are counted in
    `lost`, with one warning on standard error.
    """

    def __init__(self, path: Path, weights_sha256: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        self.lost = 0
        """Lines that could not be written."""
        self._path = path
        self._student = weights_sha256[:16]
        self._lock = threading.Lock()
        self._torn = False

    def append(self, rows: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
        """Append inputs with their answers (`Prediction.as_json`)."""
        head = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "student": self._student}
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


def json_line(row: Any) -> str:
    """A row, or a value, as a line of JSON. NaN and infinities, which JSON lacks, become null; dates and the like become text."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    if "NaN" in text or "Infinity" in text:
        text = json.dumps(json.loads(text, parse_constant=lambda _: None), ensure_ascii=False)
    return text + "\n"
