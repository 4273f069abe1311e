"""What an answer costs: prompt tokens, latency, peak memory, throughput, each measured in a process that does only this.

The parent writes a job (model folders and prompts as token ids); the child, `python -m pipeline.evaluation.cost JOB`, loads the models with
plain transformers, answers examples one by one with their full prompts, as a caller without a prefix cache would, and notes times and the
peak of its memory. Only then it answers more examples in packed batches behind contexts that are read once, by the engine that predictions
are made with: that is the throughput, and it does not touch the figures before. They are
wall-clock facts: they stay out of DVC's outputs, and carry the hash of what was measured, so that the report can tell figures of another
model. Two methods that send the same prompts to the same models share one measurement.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pipeline.teachers.batches import token_budget
from pipeline.teachers.choice import choose_engine
from pipeline.teachers.scores import Reading
from pipeline.errors import CorruptError, ShotlessError
from pipeline.files import read_json, read_sealed_json, write_json, write_sealed_json
from pipeline.files import sha256_json
from pipeline.models.memory import peak_rss_bytes
from pipeline.models.loading import load_model, parameter_counts
from pipeline.models.machine import memory_bytes, use_machine

PROBES = 3
COST_VERSION = 2
"""Raised when what is measured changes: figures that another version kept are not used."""


class Packed(BaseModel):
    """What a model answers in batches: each query behind each prefix."""

    model_config = ConfigDict(frozen=True)

    prefixes: list[list[int]]
    queries: list[list[int]]
    completions: list[list[int]]


class Prompts(BaseModel):
    """The prompts that one model answers for each example."""

    model_config = ConfigDict(frozen=True)

    folder: str
    weights: str
    """sha256 of the model, so that a job's hash says what is measured."""
    examples: list[list[list[int]]]
    """For each example, its prompts: one for each context."""
    packed: Packed | None = None
    """For the throughput; None leaves it out."""


class Job(BaseModel):
    """All prompts of a method; an example's answer takes every model's prompts for it."""

    model_config = ConfigDict(frozen=True)

    models: list[Prompts]
    threads: int | None

    @property
    def kept(self) -> str:
        """Name of the kept figures: the subject, and what else times depend on."""
        packed = [None if prompts.packed is None else prompts.packed.model_dump() for prompts in self.models]
        return f"{sha256_json([COST_VERSION, self.subject, packed, self.threads])[:32]}.json"

    @property
    def subject(self) -> str:
        """What is measured: weights and prompts, wherever the folders lie."""
        return sha256_json([[prompts.weights, prompts.examples] for prompts in self.models])


def measure(job: Job, work: Path) -> dict[str, Any]:
    """The figures of a job: those that `work` holds, or new ones, measured in a process of its own."""
    kept = work / "cost" / job.kept
    try:
        return read_sealed_json(kept)
    except FileNotFoundError:
        pass
    except CorruptError as error:
        print(f"{error}; cost is measured again", file=sys.stderr)
    path = kept.with_suffix(".job")
    write_json(job.model_dump(), path)
    child = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "pipeline.evaluation.cost", str(path)], capture_output=True, text=True, check=False
    )
    if child.returncode != 0:
        raise ShotlessError(f"the process that measures cost ended with {child.returncode}; its last words: {child.stderr[-2000:]}")
    write_sealed_json(json.loads(child.stdout), kept)
    path.unlink(missing_ok=True)  # two runs may measure the same
    return read_sealed_json(kept)


def run_job(job: Job) -> dict[str, Any]:
    """Answer every example once, after one to warm up, then all in batches, and return the figures.

    Memory is of the process up to the batches: Python and its libraries (`before_loading_rss_bytes`), weights, what answering takes.
    """
    use_machine(job.threads)
    before = peak_rss_bytes()
    loaded = {prompts.weights: load_model(Path(prompts.folder)) for prompts in {p.weights: p for p in job.models}.values()}
    models = [loaded[prompts.weights] for prompts in job.models]
    count = len(job.models[0].examples)
    seconds: list[float] = []
    for number in [0, *range(count)]:
        start = time.perf_counter()
        for model, prompts in zip(models, job.models, strict=True):
            _answer(model, prompts.examples[number])
        seconds.append(time.perf_counter() - start)
    milliseconds = np.array(seconds[1:]) * 1000
    tokens = [sum(len(prompt) for prompts in job.models for prompt in prompts.examples[number]) for number in range(count)]
    folders = {prompts.weights: Path(prompts.folder) for prompts in job.models}
    peak = peak_rss_bytes()
    return {
        "measured": {"subject": job.subject, "examples": count},
        "prompt_tokens": float(np.mean(tokens)),
        "latency_ms": round(float(np.quantile(milliseconds, 0.5)), 2),
        "latency_p95_ms": round(float(np.quantile(milliseconds, 0.95)), 2),
        "peak_rss_bytes": peak,
        "before_loading_rss_bytes": before,
        "parameters": sum(parameter_counts(model)[0] for model in loaded.values()),
        "weights_bytes": sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*.safetensors")),
        "disk_bytes": sum(file.stat().st_size for folder in folders.values() for file in folder.rglob("*") if file.is_file()),
        "forward_passes": sum(len(prompts.examples[0]) for prompts in job.models),
        "throughput": _throughput(job, loaded),
    }


def _throughput(job: Job, loaded: dict[str, Any]) -> dict[str, Any] | None:
    """Examples a second in packed batches, contexts read once, an example's answer being that of all its prompts; None where not asked."""
    packed = [prompts.packed for prompts in job.models if prompts.packed is not None]
    if len(packed) < len(job.models):
        return None
    seconds, names = 0.0, []
    for weights, model in loaded.items():
        own = [part for prompts, part in zip(job.models, packed, strict=True) if prompts.weights == weights]
        prefixes = [prefix for part in own for prefix in part.prefixes]
        budget = token_budget(model, memory_bytes(model.device))
        queries = own[0].queries
        engine = choose_engine(model, Reading(own[0].completions), budget, max(prefixes, key=len), queries[:PROBES]).engine
        names.append(engine.name)
        start = time.perf_counter()
        for prefix in prefixes:
            engine.score(prefix, queries)
        seconds += time.perf_counter() - start
    count = len(packed[0].queries)
    return {"examples": count, "examples_per_second": round(count / seconds, 3), "engine": ", ".join(dict.fromkeys(names))}


@torch.inference_mode()
def _answer(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    for prompt in prompts:
        model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False, logits_to_keep=1)


if __name__ == "__main__":
    print(json.dumps(run_job(Job.model_validate(read_json(Path(sys.argv[1]))))))
