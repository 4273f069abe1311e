"""What is measured of each method: its models and prompts, as jobs for `cost.measure`.

A student answers the bare query. An ensemble's answer takes all its contexts; a context on its own takes one, and the first stands for the
others. A baseline's models are measured besides with a rising number of demonstrations, so that memory and time can be drawn against
context length; what costs is the length of a prompt, so where there are fewer demonstrations than asked for, they come round again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipeline.evaluation.cost import Job, Packed, Prompts, measure
from pipeline.evaluation.predict import Rows, teacher_contexts
from pipeline.models.identity import weights_sha256
from pipeline.models.loading import context_limit, load_tokenizer
from pipeline.schema import examples, read_table
from pipeline.task import Task, TaskTokens

THROUGHPUT_EXAMPLES = 64
FIGURES = ("prompt_tokens", "latency_ms", "latency_p95_ms", "peak_rss_bytes", "throughput")


@dataclass(frozen=True)
class Inputs:
    """The examples that every method is measured on."""

    task: Task
    timed: Rows
    """Answered one by one."""
    batched: Rows
    """Answered in batches, for the throughput."""
    threads: int | None

    @classmethod
    def of(cls, task: Task, rows: Rows, timed: int, threads: int | None) -> "Inputs":
        """The first examples of an evaluation set, `timed` of them one by one."""
        return cls(task, rows[:timed], rows[:THROUGHPUT_EXAMPLES], threads)


def student_job(folder: Path, inputs: Inputs) -> Job:
    """A student's answers, with no context."""
    return Job(models=[_prompts(folder, [""], inputs)], threads=inputs.threads)


def baseline_job(calibration: Mapping[str, Any], ensemble: bool, inputs: Inputs, artifacts: Path) -> Job:
    """The answers of a target set's prompts: of the ensemble, or of one context."""
    models = []
    for teacher, entry in calibration["teachers"].items():
        contexts = [context["text"] for context in teacher_contexts(calibration, teacher, artifacts)]
        models.append(_prompts(artifacts / entry["model"], contexts if ensemble else contexts[:1], inputs))
    return Job(models=models if ensemble else models[:1], threads=inputs.threads)


def by_demonstrations(calibration: Mapping[str, Any], counts: Sequence[int], inputs: Inputs, artifacts: Path, work: Path) -> Rows:
    """Figures of each model of a target set behind `counts` demonstrations, each measured in a process of its own.

    A row has `model`, `demonstrations`, `context_tokens` and the `FIGURES` of `cost.run_job`; `repeated` where the demonstrations came
    round again; `too_long_for` (tokens that the model takes) instead of figures where a prompt does not fit.
    """
    task, rows = inputs.task, []
    file = artifacts / "data" / "demonstrations.parquet"
    there = read_table(file, examples(task.fields)).to_pylist() if counts else []
    for model in dict.fromkeys(entry["model"] for entry in calibration["teachers"].values()):
        folder = artifacts / model
        for count, context in _contexts(there, counts, task):
            prompts, limit = _prompts(folder, [context], inputs), context_limit(folder)
            tokens = TaskTokens(task, load_tokenizer(folder))
            row = {"model": model, "demonstrations": count, "context_tokens": len(tokens.prefix_ids(context))}
            row |= {"repeated": True} if count > len(there) else {}
            if limit is not None and _longest(prompts) > limit:
                rows.append({**row, "too_long_for": limit})
                continue
            figures = measure(Job(models=[prompts], threads=inputs.threads), work)
            rows.append({**row, **{key: figures[key] for key in FIGURES}})
    return rows


def _contexts(there: Rows, counts: Sequence[int], task: Task) -> Iterator[tuple[int, str]]:
    """Contexts of so many demonstrations, in the file's order, from its beginning again where it ends."""
    for count in counts:
        chosen = islice(cycle(there), count)
        yield count, task.context([({field: row[field] for field in task.fields}, row["label"]) for row in chosen])


def _prompts(folder: Path, contexts: Sequence[str], inputs: Inputs) -> Prompts:
    tokens = TaskTokens(inputs.task, load_tokenizer(folder))
    timed, batched = (tokens.query_ids([inputs.task.query(row) for row in rows]) for rows in (inputs.timed, inputs.batched))
    prefixes = [tokens.prefix_ids(context) for context in contexts]
    return Prompts(
        folder=str(folder),
        weights=weights_sha256(folder),
        examples=[[[*prefix, *query] for prefix in prefixes] for query in timed],
        packed=Packed(prefixes=prefixes, queries=batched, completions=tokens.completions),
    )


def _longest(prompts: Prompts) -> int:
    """Tokens of the longest sequence that a job asks of a model, one by one or in batches."""
    assert prompts.packed is not None
    packed = prompts.packed
    branch = max(map(len, packed.completions)) - 1
    batched = max(map(len, packed.prefixes)) + max(map(len, packed.queries)) + branch
    return max(batched, *(len(prompt) for example in prompts.examples for prompt in example))
