"""`python -m benchmarks.teacher_memory`: a capture's peak memory against its number of examples, behind one context of 1,024 tokens.

With the model (examples by hundreds: they cost seconds), and by an engine of made-up numbers that stands in for it (by hundred thousands:
texts, keys, plans, store and shards are as in earnest). Each figure is taken in a process of its own.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.machine import about
from benchmarks.prompts import build
from benchmarks.teacher import MODEL, QUERY_TOKENS
from pipeline.cache.folder import write_cache
from pipeline.teachers.asked import Given, Query
from pipeline.teachers.choice import EngineChoice
from pipeline.teachers.scorer import Scorer
from pipeline.teachers.scores import Reading, Scores, read_scores
from pipeline.files import write_json
from pipeline.files import example_id
from pipeline.models.memory import peak_rss_bytes
from pipeline.models.loading import load_tokenizer
from pipeline.models.rows import Completions
from pipeline.params import CacheParams, TaskParams
from pipeline.schema import ROWS_PER_GROUP, examples
from pipeline.task import Task
from pipeline.teachers.transfer import TransferSet

RESULTS = Path("benchmarks/results/teacher_memory.json")
WITH_MODEL = (128, 400, 1_600)
WITHOUT = (10_000, 100_000, 1_000_000)
CONTEXT_TOKENS = 1024
VOCABULARY = 512
TASK = Task(TaskParams(template="{text}", verbalisers={"negative": " negative", "positive": " positive"}))


class MadeUpEngine:
    """Answers at once, with random logits."""

    name, token_budget = "made up", 1024

    def __init__(self, reading: Reading) -> None:
        self.reading = replace(reading, labels=((1,), (2,)))
        self._generator = torch.Generator().manual_seed(0)

    def score(self, context: Sequence[int], queries: Sequence[Sequence[int]], answers: Completions | None = None) -> Scores:
        """Scores of random logits."""
        logits = torch.randn(len(queries), VOCABULARY, generator=self._generator) * 3
        return read_scores(logits, self.reading, answers, self.reading.uniforms(context, queries, answers))


class MadeUpScorer(Scorer):
    """A scorer whose model costs nothing."""

    def _load(self, asked: Given) -> EngineChoice:  # noqa: ARG002
        return EngineChoice(MadeUpEngine(self.reading), "for a benchmark of what is around it")


def with_model(folder: Path, count: int) -> dict[str, Any]:
    """A capture of real texts by the real model."""
    prompts = build(load_tokenizer(MODEL), CONTEXT_TOKENS, QUERY_TOKENS, count)
    queries = [Query(example_id({"text": text}), {"text": text}) for text in prompts.queries]
    model_bytes = sum(file.stat().st_size for file in MODEL.glob("*.safetensors"))
    return {"model_bytes": model_bytes} | _capture(Scorer(MODEL, TASK, CacheParams(), folder / "work"), prompts.context, queries, folder)


def without(folder: Path, count: int) -> dict[str, Any]:
    """The same of made-up texts by the made-up engine, from a transfer set's file."""
    schema, file = examples(("text",)), folder / "transfer.parquet"
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, count, ROWS_PER_GROUP):
            texts = [
                f"text number {number} " + "good and bad " * (number % 13) for number in range(start, min(count, start + ROWS_PER_GROUP))
            ]
            rows = [
                {"example_id": example_id({"text": text}), "label": None, "completion": None, "source": "s", "line": 1, "text": text}
                for text in texts
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))
    scorer = MadeUpScorer(MODEL, TASK, CacheParams(), folder / "work")
    return {"model_bytes": 0} | _capture(scorer, "context " * CONTEXT_TOKENS, TransferSet(file, TASK.fields), folder)


def _capture(scorer: Scorer, context: str, queries: Sequence[Query], folder: Path) -> dict[str, Any]:
    before, started = peak_rss_bytes(), time.perf_counter()
    rows = scorer.tables([context], queries, "capture")
    scored = peak_rss_bytes()
    write_cache(folder / "cache", rows, scorer.fingerprint, {})
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_bytes_before": before,
        "peak_rss_bytes_scored": scored,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def main(arguments: list[str]) -> None:
    """The parent starts one child a figure, `with_model COUNT` or `without COUNT`; one of these words alone asks for its figures alone."""
    if len(arguments) == 2:
        what, count = arguments
        with tempfile.TemporaryDirectory(prefix="teacher-memory-", dir=".") as folder:
            print(json.dumps((with_model if what == "with_model" else without)(Path(folder), int(count))))
        return
    wanted = [
        (what, count)
        for what, counts in (("with_model", WITH_MODEL), ("without", WITHOUT))
        for count in counts
        if what in (arguments or [what])
    ]
    results = []
    for what, count in wanted:
        command = [sys.executable, "-m", "benchmarks.teacher_memory", what, str(count)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        above = {name: found[f"peak_rss_bytes{name}"] - found["model_bytes"] for name in ("_before", "_scored", "")}
        print(
            f"{what}: {count:,} examples, {found['seconds']:,} s; peak above the model {above[''] / 1e6:,.0f} MB, "
            f"{above['_scored'] / 1e6:,.0f} MB when all were scored, {found['peak_rss_bytes_before'] / 1e6:,.0f} MB before",
            flush=True,
        )
        results.append({"engine": what, "examples": count, "context_tokens": CONTEXT_TOKENS, **found})
    write_json({"machine": about(), "rows": results}, RESULTS)
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main(sys.argv[1:])
