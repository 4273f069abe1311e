"""What an answer costs: prompt tokens, latency, memory, throughput, each measured in a process that does only this.

The parent writes a job: model folders, and prompts as token ids. The child, `python -m pipeline.evaluation.cost JOB`, loads the models as
the predictions' scorer does, on a GPU if there is one and in the same number format. It answers examples one by one with their full
prompts, as a caller without a prefix cache would, and notes times and the peak of its memory. Then it answers more examples in batches, by
the engine that predictions are made with: the throughput. A student answers with no context. An ensemble's answer takes all its contexts;
of contexts on their own, the first is measured.

Figures are facts of one machine and say which. They are not outputs of DVC, and they carry the hash of what was measured, so that the
report can tell figures of another model. Methods that send the same prompts to the same models share one measurement, but a method's stage
that runs again measures again.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel

from pipeline.errors import CorruptError, ShotlessError
from pipeline.evaluation.metrics import Json
from pipeline.files import Folders, read_json, sha256_json, write_json
from pipeline.models.folders import context_limit, load_model, load_tokenizer, weights_sha256
from pipeline.models.machine import DTYPES, cores, cpu_info, default_device, peak_rss_bytes, use_machine
from pipeline.params import Params, TaskParams
from pipeline.schema import NO_CONTEXT, Context, Example, Prompt, read_examples
from pipeline.task import Task, TaskTokens
from pipeline.teachers.engines import LABELS_ONLY, open_engine

if TYPE_CHECKING:
    from pipeline.evaluation.predictions import Answering

COST_VERSION = 3
"""Raised when what is measured changes: figures that another version kept are not used."""
THROUGHPUT_EXAMPLES = 64
PROBES = 3
FIGURES = ("prompt_tokens", "latency_ms", "peak_rss_bytes", "throughput")


class Prompts(BaseModel, frozen=True):
    """What one model is asked."""

    folder: str
    weights: str
    """sha256 of the model, so that a job's hash says what is measured."""
    dtype: str
    ids: list[list[list[int]]]
    """For each context, the prompt of each example."""


class Job(BaseModel, frozen=True):
    """All prompts of a method. An example's answer takes every model's prompts for it; the first `timed` are answered one by one."""

    task: Json
    """`TaskParams` as JSON."""
    models: list[Prompts]
    timed: int
    threads: int

    @property
    def subject(self) -> str:
        """Hash of what is measured: weights and prompts, wherever the folders are."""
        return sha256_json([[prompts.weights, prompts.ids] for prompts in self.models])

    def machine(self) -> Json:
        """What else times depend on: device, number formats, threads, torch."""
        device = default_device()
        names = [line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name")]
        processor = (names or [platform.processor() or platform.machine()])[0]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
        dtypes = sorted({prompts.dtype for prompts in self.models})
        return {"device": device.type, "processor": name, "dtypes": dtypes, "threads": self.threads, "torch": torch.__version__}


def measure_method(name: str, models: Sequence["Answering"], params: Params, folders: Folders, examples: Sequence[Example]) -> Json:
    """Measure a method on the first of `examples` and write its figures to metrics/cost/NAME.json; see `run_job`.

    `models` are from `predictions.models_of`. A baseline also has `by_demonstrations`, a row for each of its models and each number in
    `evaluation.cost_demonstrations`: `model`, `demonstrations`, `context_tokens` and the `FIGURES`; `repeated` if there are fewer
    demonstrations, so that they come round again; `too_long_for` (tokens that the model takes) instead of figures if a prompt does not fit.
    """
    output, baseline = folders.metrics / "cost" / f"{name}.json", params.baselines.get(name)
    since = output.stat().st_mtime if output.is_file() else 0.0
    together = baseline is not None and baseline.contexts == "ensemble"
    asked = models if together else [replace(models[0], contexts=models[0].contexts[:1])]
    figures = measure(_job(asked, params, examples), folders.work, since)
    if baseline is not None:
        each = {model.folder: model for model in models}.values()
        figures["by_demonstrations"] = [row for model in each for row in _by_demonstrations(model, params, folders, examples, since)]
    write_json(figures, output)
    return figures


def _by_demonstrations(model: "Answering", params: Params, folders: Folders, examples: Sequence[Example], since: float) -> Iterator[Json]:
    there = read_examples(folders.artifacts / "data" / "demonstrations.parquet", params.task.fields)
    tokens, limit = TaskTokens(Task(params.task), load_tokenizer(model.folder)), context_limit(model.folder)
    bare = len(tokens.prompts(NO_CONTEXT, examples[:1])[0].ids)
    for count in params.evaluation.cost_demonstrations:
        context = Context("", demonstrations=tuple((example.fields, example.label or "") for example in islice(cycle(there), count)))
        job = _job([replace(model, contexts=(context,))], params, examples)
        [ids] = job.models[0].ids
        row: Json = {"model": model.folder.relative_to(folders.artifacts).as_posix(), "demonstrations": count}
        row |= {"context_tokens": len(ids[0]) - bare} | ({"repeated": True} if count > len(there) else {})
        if limit is not None and max(map(len, ids)) + tokens.longest_answer - 1 > limit:
            yield row | {"too_long_for": limit}
        else:
            figures = measure(job, folders.work, since)
            yield row | {key: figures[key] for key in FIGURES}


def _job(models: Sequence["Answering"], params: Params, examples: Sequence[Example]) -> Job:
    timed = min(params.evaluation.cost_examples, len(examples))
    asked, found = examples[: max(timed, THROUGHPUT_EXAMPLES)], []
    for model in models:
        tokens = TaskTokens(Task(params.task), load_tokenizer(model.folder))
        ids = [[list(prompt.ids) for prompt in tokens.prompts(context, asked)] for context in model.contexts]
        found.append(Prompts(folder=str(model.folder), weights=weights_sha256(model.folder), dtype=model.dtype, ids=ids))
    return Job(task=params.task.model_dump(mode="json"), models=found, timed=timed, threads=params.runtime.threads or cores())


def measure(job: Job, work: Path, since: float = 0.0) -> Json:
    """The figures of a job, measured in a process of its own unless they were on this kind of machine after `since` (a file's time)."""
    about = job.model_dump(mode="json", exclude={"models": {"__all__": {"folder"}}})
    kept = work / "cost" / f"{sha256_json([COST_VERSION, about, job.machine()])[:32]}.json"
    try:
        if kept.stat().st_mtime > since:
            return read_json(kept)
    except FileNotFoundError:
        pass
    except CorruptError as error:
        print(f"{error} Cost is measured again.", file=sys.stderr)
    path = kept.with_suffix(".job")
    write_json(job.model_dump(mode="json"), path)
    command = [sys.executable, "-m", "pipeline.evaluation.cost", str(path)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    path.unlink(missing_ok=True)  # two runs may measure the same
    if child.returncode != 0:
        raise ShotlessError(f"The process that measures cost ended with {child.returncode}; its last words: {child.stderr[-2000:]}")
    write_json(json.loads(child.stdout), kept)
    return read_json(kept)


def run_job(job: Job) -> Json:
    """Answer the first examples one by one, after one to warm up, then all in batches, and return the figures.

    `measured` (`subject`, number of `examples` one by one and `batched`, and the machine); `prompt_tokens` of an example; `latency_ms`, the
    median; `peak_rss_bytes` up to the batches, with Python and its libraries; `peak_device_bytes` on a GPU; `parameters`, `disk_bytes`;
    `forward_passes` of an example; `throughput` {`examples`, `examples_per_second`, `engine`}.
    """
    use_machine(job.threads)
    device = default_device()
    folders = {(prompts.weights, prompts.dtype): Path(prompts.folder) for prompts in job.models}
    loaded = {key: load_model(folder, DTYPES[key[1]], device) for key, folder in folders.items()}
    by_example = [
        [(loaded[prompts.weights, prompts.dtype], of_context[number]) for prompts in job.models for of_context in prompts.ids]
        for number in range(job.timed)
    ]
    seconds = [_seconds(asked) for asked in [by_example[0], *by_example]][1:]
    on_device = {"peak_device_bytes": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else {}
    figures = {
        "measured": {"subject": job.subject, "examples": job.timed, "batched": len(job.models[0].ids[0]), **job.machine()},
        "prompt_tokens": float(np.mean([sum(len(ids) for _, ids in asked) for asked in by_example])),
        "latency_ms": round(1000 * float(np.median(seconds)), 2),
        "peak_rss_bytes": peak_rss_bytes(),
        **on_device,
        "parameters": sum(model.num_parameters() for model in loaded.values()),
        "disk_bytes": sum(file.stat().st_size for folder in folders.values() for file in folder.iterdir() if file.is_file()),
        "forward_passes": len(by_example[0]),
    }
    return figures | {"throughput": _throughput(job, loaded, folders)}


@torch.inference_mode()
def _seconds(asked: Sequence[tuple[Any, list[int]]]) -> float:
    """Of the plain forward passes that one example's answer takes."""
    start = time.perf_counter()
    for model, ids in asked:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1).logits
        logits.cpu()  # a GPU has answered only now
    return time.perf_counter() - start


def _throughput(job: Job, loaded: Mapping[tuple[str, str], Any], folders: Mapping[tuple[str, str], Path]) -> Json:
    """Examples a second in batches, a context's prompts together; an example's answer is that of all its prompts."""
    seconds, names = 0.0, []
    for key, model in loaded.items():
        asked = [
            [Prompt(tuple(ids)) for ids in own] for prompts in job.models if (prompts.weights, prompts.dtype) == key for own in prompts.ids
        ]
        tokens = TaskTokens(Task(TaskParams.model_validate(job.task)), load_tokenizer(folders[key]))
        engine = open_engine(model, tokens, LABELS_ONLY, max(asked, key=lambda prompts: len(prompts[0].ids))[:PROBES])
        names.append(engine.name)
        start = time.perf_counter()
        for prompts in asked:
            engine.score(prompts).label_logprobs.cpu()
        seconds += time.perf_counter() - start
    count = len(job.models[0].ids[0])
    return {"examples": count, "examples_per_second": round(count / seconds, 3), "engine": ", ".join(dict.fromkeys(names))}


if __name__ == "__main__":
    print(json.dumps(run_job(Job.model_validate(read_json(Path(sys.argv[1]))))))
