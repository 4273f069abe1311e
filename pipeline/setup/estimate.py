"""What a full run will cost here: tokens of work from the params, and the rate at which this machine did them on a few rows.

Work is counted in tokens through the whole model. A teacher reads each of C contexts once and then N queries behind each, C·(L + N·Q); a
step of training counts three passes; a student of fewer layers counts its share. It is an estimate of forward passes: loading, downloads
and DVC's own time (about 6 seconds a stage) come on top, and are added as such.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.teachers.batches import token_budget
from pipeline.teachers.choice import choose_engine
from pipeline.teachers.scores import Reading
from pipeline.models.loading import load_model, load_tokenizer, parameter_counts
from pipeline.models.machine import default_device, memory_bytes, use_machine
from pipeline.models.packed import decoder_layers
from pipeline.models.truncation import parse_layers
from pipeline.params import Params
from pipeline.task import Task, TaskTokens

SECONDS_A_STAGE = 6.0
PROCESS_BYTES = 700e6
"""Python, torch and the libraries, before a model is loaded."""
ADAM_COPIES = 7
"""Training holds weights, gradients and two moments, and while a checkpoint is written, copies of weights and moments."""


@dataclass(frozen=True)
class Trial:
    """A model's rate on a few queries."""

    tokens_per_second: float
    query_tokens: float
    """Mean tokens of a query."""
    demonstration_tokens: float
    """The same with its answer."""
    parameters: int
    layer_parameters: int
    """Of one layer, the largest."""
    layers: int
    engine: str


def try_rows(folder: Path, task: Task, rows: Sequence[Mapping[str, str]], threads: int | None) -> Trial:
    """Answer a few rows with the model in `folder`, and time it."""
    use_machine(threads)
    device = default_device()
    tokens = TaskTokens(task, load_tokenizer(folder))
    queries = tokens.query_ids([task.query(row) for row in rows])
    model = load_model(folder, device=device)
    choice = choose_engine(
        model, Reading(tokens.completions), token_budget(model, memory_bytes(device)), tokens.prefix_ids(""), queries[:3]
    )
    start = time.perf_counter()
    choice.engine.score(tokens.prefix_ids(""), queries)
    seconds = time.perf_counter() - start
    total = sum(len(ids) for ids in queries)
    mean = total / len(queries)
    answer = max(len(ids) for ids in tokens.completions) + len(tokens.query_ids([task.params.separator])[0])
    layers = int(model.config.get_text_config().num_hidden_layers)
    a_layer = max(parameter_counts(layer)[0] for layer in decoder_layers(model))
    return Trial(total / seconds, mean, mean + answer, parameter_counts(model)[0], a_layer, layers, choice.engine.name)


def token_work(params: Params, trial: Trial, transfer: int, evaluated: int) -> dict[str, float]:
    """Tokens through the whole model for teachers, training, and evaluation of students and baselines.

    `transfer` and `evaluated` are numbers of examples.
    """
    query = trial.query_tokens

    def asked(teacher: str, examples: int) -> float:
        entry = params.contexts[params.teachers[teacher].contexts]
        return entry.count * (entry.demonstrations * trial.demonstration_tokens + examples * query)

    work = {"teachers": sum(asked(name, transfer) for name in params.teachers), "training": 0.0, "students": 0.0}
    for tuning in params.tunings.values():
        work["training"] += 3 * tuning.steps * tuning.batch_size * query
    for student in params.students.values():
        kept = len(parse_layers(student.layers, trial.layers)) if student.layers else trial.layers
        work["training"] += 3 * student.steps * student.batch_size * query * kept / trial.layers
        work["students"] += evaluated * query * kept / trial.layers
    used = {teacher for baseline in params.baselines.values() for teacher in params.targets[baseline.target_set].teachers}
    work["baselines"] = sum(asked(name, evaluated) for name in used)  # baselines that ask the same share the store's rows
    return work


def stage_count(params: Params) -> int:
    """Stages of the DAG: fetch, prepare, report, and one for each entry; a student has two."""
    return 3 + len(params.tunings) + len(params.teachers) + len(params.targets) + 2 * len(params.students) + len(params.baselines)


def total_seconds(work: Mapping[str, float], trial: Trial, stages: int) -> float:
    """Seconds of a full run."""
    return sum(work.values()) / trial.tokens_per_second + stages * SECONDS_A_STAGE


def peak_bytes(params: Params, trial: Trial) -> float:
    """Memory that training the largest student or tuned teacher may take, all its weights in float32, and the process around them.

    The model is that of the trial. What it holds of a batch is left out: some 100 MB for short texts.
    """
    kept = [len(parse_layers(student.layers, trial.layers)) if student.layers else trial.layers for student in params.students.values()]
    layers = max([*kept, *(trial.layers for _ in params.tunings)], default=0)
    return PROCESS_BYTES + 4.0 * ADAM_COPIES * (trial.parameters - (trial.layers - layers) * trial.layer_parameters)
