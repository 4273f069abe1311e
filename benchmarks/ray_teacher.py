"""`python -m benchmarks.ray_teacher [MODEL]`: what a second worker of Ray brings, at one thread each.

A capture of real texts (640 context tokens, queries of about 40) by the local engine and by one and two workers, from an empty store each
time. Seconds are those from when each worker has written a part to the last part, so that the start of the workers is left out: it takes a
constant time, which a long capture does not notice. The rows have to be the same to the byte.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.machine import about
from benchmarks.prompts import Prompts, build
from pipeline.cache.store import Part, Store
from pipeline.teachers import scorer as scorer_module
from pipeline.teachers.asked import Query
from pipeline.teachers.ray_scorer import RayScorer
from pipeline.teachers.scorer import Scorer
from pipeline.files import example_id, sha256_file
from pipeline.models.loading import load_tokenizer
from pipeline.params import CacheParams, TaskParams
from pipeline.task import Task

MODEL = Path("artifacts/models/smollm2")
TASK = Task(TaskParams(template="{text}", verbalisers={"negative": " negative", "positive": " positive"}))
CONTEXT_TOKENS, QUERY_TOKENS, ROWS, ROWS_PER_PART = 640, 40, 192, 16
THREADS = 1


def measure(model: Path, prompts: Prompts, workers: int | None) -> dict[str, Any]:
    """Seconds and rows from when as many parts as workers are written to the last; `workers` None: the local engine."""
    written: list[tuple[float, int]] = []

    def write(self: Store, part: Part, rows: pa.Table, seconds: float | None = None) -> None:
        original(self, part, rows, seconds)
        written.append((time.perf_counter(), len(rows)))

    queries = [Query(example_id({"text": text}), {"text": text}) for text in prompts.queries]
    original = Store.write
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        arguments = (model, TASK, CacheParams(), Path(folder), THREADS, "float32")
        scorer = Scorer(*arguments) if workers is None else RayScorer(*arguments, workers)
        Store.write = write  # type: ignore[method-assign]
        try:
            for _ in scorer.tables([prompts.context], queries, f"{workers or 'no'} workers"):
                pass
        finally:
            Store.write = original  # type: ignore[method-assign]
            if isinstance(scorer, RayScorer):
                scorer.close()
        files = {file.name: sha256_file(file) for file in sorted(Path(folder).rglob("part-*.parquet"))}
    counted = written[(workers or 1) :]
    first, last = written[(workers or 1) - 1], written[-1]
    return {
        "workers": workers or "local",
        "seconds": round(last[0] - first[0], 1),
        "rows": sum(rows for _, rows in counted),
        "seconds_before": round(first[0] - started, 1),
        "files": files,
    }


def main(model: Path) -> None:
    """Measure and print."""
    scorer_module.ROWS_PER_PART = ROWS_PER_PART
    prompts = build(load_tokenizer(model), CONTEXT_TOKENS, QUERY_TOKENS, ROWS)
    found = [measure(model, prompts, workers) for workers in (None, 1, 2)]
    files = [figures.pop("files") for figures in found]
    for figures in found:
        print({**figures, "rows_per_second": round(figures["rows"] / figures["seconds"], 1)})
    one, two = (figures["rows"] / figures["seconds"] for figures in found[1:])
    print(f"two workers are {two / one:.2f} times as fast as one; bytes alike: {files[0] == files[1] == files[2]}")
    print(json.dumps({"found": found, "machine": about()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
