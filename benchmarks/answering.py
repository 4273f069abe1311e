"""A process that only answers, one text of a lesson at a time, with one thread: `python -m benchmarks.answering STUDENT LESSON COUNT`."""

import json
import sys
from pathlib import Path

from pipeline.serving.measure import answered


def main(student: Path, texts: list[dict[str, str]]) -> None:
    """Print as JSON the median time of an answer, the process's peak memory, and what the folder takes."""
    found = answered(student, texts)
    if None in (probabilities for probabilities, _ in found["answers"]):
        raise SystemExit(f"{student} cannot answer one of these texts")
    print(json.dumps({"latency_ms": found["milliseconds"], "peak_rss_mb": found["peak_mb"], "disk_mb": found["disk_mb"]}))


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[2]).read_text("utf-8"))["rows"]
    main(Path(sys.argv[1]), [row["fields"] for row in rows[: int(sys.argv[3])]])
