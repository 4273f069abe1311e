"""A process that only answers, one text of a lesson at a time, with one thread: `python -m benchmarks.answering STUDENT LESSON COUNT`."""

import json
import statistics
import sys
import time
from pathlib import Path

from pipeline.models.process import peak_rss_bytes
from pipeline.serving import Predictor

WARM_UP = 10


def main(student: Path, inputs: list[dict[str, str]]) -> None:
    """Print as JSON the median time of an answer, the process's peak memory, and what the folder takes."""
    predictor, times = Predictor(student, threads=1), list[float]()
    for fields in [*inputs[:WARM_UP], *inputs]:
        started = time.perf_counter()
        [prediction] = predictor.predict([fields])
        times.append(time.perf_counter() - started)
        if prediction.error is not None:
            raise SystemExit(f"{student} has no answer to {fields}: {prediction.error}")
    figures = {
        "latency_ms": 1000 * statistics.median(times[WARM_UP:]),
        "peak_rss_mb": peak_rss_bytes() / 1e6,
        "disk_mb": sum(file.stat().st_size for file in student.rglob("*") if file.is_file()) / 1e6,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    rows = json.loads(Path(sys.argv[2]).read_text("utf-8"))["rows"]
    main(Path(sys.argv[1]), [row["fields"] for row in rows[: int(sys.argv[3])]])
