"""What an answer costs: prompt tokens, latency, peak memory, each measured in a process that does only this.

The parent writes a job (model folders and prompts as token ids); the child, `python -m pipeline.evaluation.cost JOB`, loads the models with
plain transformers, answers examples one by one with their full prompts, as a caller without a prefix cache would, and prints the figures.
They are wall-clock facts: they stay out of DVC's outputs, and carry the hash of what was measured, so that the report can tell figures
of another model. Two methods that send the same prompts to the same models share one measurement.
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

from pipeline.errors import ShotlessError
from pipeline.files import read_json, write_json
from pipeline.hashing import sha256_json
from pipeline.memory import peak_rss_bytes
from pipeline.models.loading import load_model, parameter_counts
from pipeline.models.machine import use_machine


class Prompts(BaseModel):
    """The prompts that one model answers for each example."""

    model_config = ConfigDict(frozen=True)

    folder: str
    weights: str
    """sha256 of the model, so that a job's hash says what is measured."""
    examples: list[list[list[int]]]
    """For each example, its prompts: one for each context."""


class Job(BaseModel):
    """All prompts of a method; an example's answer takes every model's prompts for it."""

    model_config = ConfigDict(frozen=True)

    models: list[Prompts]
    threads: int | None

    @property
    def kept(self) -> str:
        """Name of the kept figures: the subject, and what else times depend on."""
        return f"{sha256_json([self.subject, self.threads])[:32]}.json"

    @property
    def subject(self) -> str:
        """What is measured: weights and prompts, wherever the folders lie."""
        return sha256_json([[prompts.weights, prompts.examples] for prompts in self.models])


def measure(job: Job, work: Path, output: Path) -> None:
    """Measure a job in a process of its own, unless `work` holds its figures, and write them to `output`."""
    kept = work / "cost" / job.kept
    if not kept.exists():
        path = kept.with_suffix(".job")
        write_json(job.model_dump(), path)
        child = subprocess.run(  # noqa: S603
            [sys.executable, "-m", "pipeline.evaluation.cost", str(path)], capture_output=True, text=True, check=False
        )
        if child.returncode != 0:
            raise ShotlessError(f"the process that measures cost ended with {child.returncode}; its last words: {child.stderr[-2000:]}")
        write_json(json.loads(child.stdout), kept)
        path.unlink()
    write_json(read_json(kept), output)


def run_job(job: Job) -> dict[str, Any]:
    """Answer every example once, after one to warm up, and return the figures."""
    use_machine(job.threads)
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
    return {
        "measured": {"subject": job.subject, "examples": count},
        "prompt_tokens": float(np.mean(tokens)),
        "latency_ms": round(float(np.quantile(milliseconds, 0.5)), 2),
        "latency_p95_ms": round(float(np.quantile(milliseconds, 0.95)), 2),
        "peak_rss_bytes": peak_rss_bytes(),
        "parameters": sum(parameter_counts(model)[0] for model in loaded.values()),
        "weights_bytes": sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*.safetensors")),
        "forward_passes": sum(len(prompts.examples[0]) for prompts in job.models),
    }


@torch.inference_mode()
def _answer(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    for prompt in prompts:
        model(input_ids=torch.tensor([list(prompt)]), use_cache=False, logits_to_keep=1)


if __name__ == "__main__":
    print(json.dumps(run_job(Job.model_validate(read_json(Path(sys.argv[1]))))))
