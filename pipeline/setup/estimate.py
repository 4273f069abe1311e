"""What a full run will cost here: tokens of work from the params, and the rate at which this machine did them on a few rows.

Work is counted in tokens through the whole model. A teacher reads each of C contexts once and then N queries behind it, C·(L + N·Q); a
step of training counts as three passes; a student of fewer layers counts its share. Loading, downloads and DVC take some seconds a stage.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.params import Params, read_yaml
from pipeline.schema import NO_CONTEXT, Example
from pipeline.task import Task

ROWS_TRIED = 20
SECONDS_A_STAGE = 6.0
PROCESS_BYTES = 700e6
"""Python, torch and the libraries, before a model is loaded."""
ADAM_COPIES = 7
"""Training holds weights, gradients and two moments, and while it writes a checkpoint, copies of weights and moments."""


@dataclass(frozen=True)
class Trial:
    """A model's rate on a few queries."""

    tokens_per_second: float
    query_tokens: float
    """Mean tokens of a query."""
    answer_tokens: int
    """Tokens of the longest answer with its separator."""
    parameters: int
    layers: int
    engine: str
    reason: str = ""
    """Why this engine."""


def try_rows(folder: Path, task: Task, examples: Sequence[Example], threads: int | None) -> Trial:
    """Answer a few examples with the model in `folder`, and time it."""
    from pipeline.models.folders import decoder_layers, load_model, load_tokens
    from pipeline.models.machine import default_device, use_machine
    from pipeline.teachers.engines import open_engine
    from pipeline.teachers.scorer import LABELS_ONLY

    use_machine(threads)
    tokens = load_tokens(task, folder)
    prompts = tokens.prompts(NO_CONTEXT, examples)
    model = load_model(folder, device=default_device())
    engine = open_engine(model, tokens, LABELS_ONLY, prompts[:3])
    start = time.perf_counter()
    engine.score(prompts)
    seconds = time.perf_counter() - start
    total = sum(len(prompt.ids) for prompt in prompts)
    answer = tokens.longest_answer + len(tokens.tokenizer(task.params.separator).input_ids)
    layers = len(decoder_layers(model))
    return Trial(total / seconds, total / len(prompts), answer, model.num_parameters(), layers, engine.name, engine.reason)


def token_work(params: Params, trial: Trial, transfer: int, evaluated: int) -> dict[str, float]:
    """Tokens through the whole model for teachers, training, and the evaluation of students and baselines.

    `transfer` and `evaluated` are numbers of examples.
    """
    from pipeline.models.folders import parse_layers  # brings torch

    query = trial.query_tokens

    def asked(teacher: str, examples: int) -> float:
        context = params.contexts[params.teachers[teacher].contexts]
        return context.count * (context.demonstrations * (query + trial.answer_tokens) + examples * query)

    work = {"teachers": sum(asked(name, transfer) for name in params.teachers), "training": 0.0, "students": 0.0}
    for tuned in params.tuned.values():
        work["training"] += 3 * tuned.steps * tuned.batch_size * query
    for student in params.students.values():
        kept = len(parse_layers(student.layers, trial.layers)) if student.layers else trial.layers
        share = kept / trial.layers * len(student.runs)
        rows = student.batch_size + sum(term.batch_size or student.batch_size for term in student.auxiliary.values())
        work["training"] += 3 * student.steps * rows * query * share
        work["students"] += evaluated * query * share
    used = {teacher for baseline in params.baselines.values() for teacher in _teachers(params, baseline.prompts)}
    work["baselines"] = sum(asked(name, evaluated) for name in used)  # baselines of the same teachers share the store's rows
    return work


def peak_bytes(trial: Trial) -> float:
    """Memory that training the whole model may take, in float32, with the process around it; a cut student takes less.

    What the model holds of a batch is left out: some 100 MB for short texts.
    """
    return PROCESS_BYTES + 4.0 * ADAM_COPIES * trial.parameters


def stage_count(params: Params, dag: Path) -> int:
    """Stages that dvc.yaml makes of these params."""
    values: dict[str, Any] = params.model_dump()
    count = 0
    for stage in read_yaml(dag)["stages"].values():
        entries: Any = values
        for key in stage.get("foreach", "").strip("${}").split("."):
            entries = entries[key] if key else [None]
        count += len(entries)
    return count


def cost(params: Params, examples: Mapping[str, Sequence[Example]]) -> str:
    """Lines that say what a run will cost. `examples` has those of the sources `unlabelled` and `test`."""
    name = next(iter(params.models))
    folder = Path("artifacts") / "models" / name
    if not folder.is_dir():
        return (
            f"Time and memory: {folder} does not exist yet. After `shotless run model@{name}`, the same `shotless init --force` says them."
        )
    rows = examples["unlabelled"][:ROWS_TRIED]
    trial = try_rows(folder, Task(params.task), rows, params.runtime.threads)
    work = token_work(params, trial, len(examples["unlabelled"]), len(examples["test"]))
    rate, length = trial.tokens_per_second, trial.query_tokens
    stages = stage_count(params, Path("dvc.yaml"))
    minutes = (sum(work.values()) / rate + stages * SECONDS_A_STAGE) / 60
    return "\n".join(
        [
            f"{name} on {len(rows)} rows: {rate:,.0f} tokens/s, {length:.0f} tokens a text, engine {trial.engine}",
            *(f"  {part}: {tokens:,.0f} tokens, about {tokens / rate / 60:,.1f} min" for part, tokens in work.items()),
            f"A full run takes about {minutes:,.0f} minutes ({stages} stages) and up to {peak_bytes(trial) / 1e9:.1f} GB of "
            "memory; after it, one more student costs only itself.",
        ]
    )


def _teachers(params: Params, prompts: str) -> list[str]:
    """The teachers behind a baseline's prompts; none for a bare model."""
    kind, _, name = prompts.partition("/")
    return list(params.targets[name].teachers) if kind == "targets" else [name] if kind == "teachers" else []
