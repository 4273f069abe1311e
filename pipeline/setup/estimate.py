"""What a full run will cost here: tokens of work from the params, and the rate at which this machine did them on a few rows.

Work is counted in tokens through the whole model. A teacher reads each of C contexts once and then N queries behind it, C·(L + N·Q); a
step of training counts as three passes; a student of fewer layers counts its share, and so does a smaller model. Teachers are judged on the
labelled examples too (`pipeline/cache/labelled.py`). Loading, downloads and DVC take some seconds a stage.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from pipeline.cache.labelled import COMPARED, MOST_FOLDS
from pipeline.params import Params, load_params, read_yaml
from pipeline.schema import NO_CONTEXT, Example
from pipeline.task import Task

ROWS_TRIED = 20
SECONDS_A_STAGE = 4.0
PROCESS_BYTES = 700e6
"""Python, torch and the libraries, before a model is loaded."""
TRAINING_BYTES = 4 * 7
"""Of a parameter in float32: weights, gradients, two moments, and while a checkpoint is written, copies of weights and moments. What a
batch takes is left out: some 100 MB for short texts."""


@dataclass(frozen=True)
class Trial:
    """A model's rate on a few queries."""

    tokens_per_second: float
    query_tokens: float  # mean of the queries
    answer_tokens: int  # of the longest answer with its separator
    parameters: int
    layers: int
    engine: str
    reason: str = ""  # why this engine


def try_rows(folder: Path, task: Task, examples: Sequence[Example], threads: int | None) -> Trial:
    """Answer a few examples with the model in `folder`, and time it; in plain text, though chat turns have a few tokens more."""
    from pipeline.models.folders import decoder_layers, load_model
    from pipeline.models.machine import default_device, use_machine
    from pipeline.models.trained import load_tokens
    from pipeline.teachers.engines import open_engine
    from pipeline.teachers.scorer import LABELS_ONLY

    use_machine(threads)
    model = load_model(folder, device=default_device(), labels=task.labels)  # also says all that is wrong with the folder
    tokens = load_tokens(task, folder)
    prompts = tokens.prompts(NO_CONTEXT, examples)
    engine = open_engine(model, tokens, LABELS_ONLY, prompts[:3])
    start = time.perf_counter()
    engine.score(prompts)
    seconds = time.perf_counter() - start
    total = sum(len(prompt.ids) for prompt in prompts)
    answer = tokens.longest_answer + len(tokens.tokenizer(task.params.separator).input_ids)
    layers = len(decoder_layers(model))
    return Trial(total / seconds, total / len(prompts), answer, model.num_parameters(), layers, engine.name, engine.reason)


def token_work(
    params: Params, query: float, answer: float, layers: int | None, labelled: int, transfer: int, evaluated: int, artifacts: Path
) -> dict[str, float]:
    """Stage of dvc.yaml → tokens through the largest model, for stages that pass texts through one.

    `query` and `answer` are tokens of a text and of the longest answer, `layers` those of the model (None: students are counted as whole
    models), `labelled`, `transfer` and `evaluated` numbers of examples. A model that is not in `artifacts` yet counts as one of the
    largest.
    """
    files = {name: [*(artifacts / "models" / name).glob("*.safetensors")] for name in params.models}
    sizes = {name: sum(file.stat().st_size for file in own) for name, own in files.items() if own}
    largest = max(sizes.values(), default=1)

    def size_of(folder: str) -> float:
        return sizes.get(params.base_model(folder), largest) / largest

    def share_of(kept: str | None) -> float:
        if not kept or layers is None:
            return 1.0
        from pipeline.models.folders import parse_layers  # brings torch

        return len(parse_layers(kept, layers)) / layers

    def asked(teacher: str, examples: float) -> float:
        context, model = params.contexts[params.teachers[teacher].contexts], params.teachers[teacher].model
        return context.count * (context.demonstrations * (query + answer) + examples * query) * size_of(model)

    def judged(teacher: str) -> float:
        compared = COMPARED if params.contexts[params.teachers[teacher].contexts].demonstrations else 0
        return MOST_FOLDS * asked(teacher, labelled / MOST_FOLDS + compared)

    work = {  # once on all labels, and once without each fold
        f"tune@{name}": (3.0 * tuned.steps * tuned.batch_size + COMPARED) * query * MOST_FOLDS * size_of(tuned.base)
        for name, tuned in params.tuned.items()
    }
    work |= {f"teacher@{name}": asked(name, transfer) + judged(name) for name in params.teachers}
    for name, student in params.students.items():
        share = len(student.runs) * share_of(student.layers) * size_of(student.base)
        rows = student.batch_size + sum(term.batch_size or student.batch_size for term in student.auxiliary.values())
        work |= {f"student@{name}": 3 * student.steps * rows * share * query, f"evaluate@{name}": evaluated * share * query}
    scored = set[str]()  # baselines of the same teachers share the store's rows
    for name, baseline in params.baselines.items():
        kind, _, prompts = baseline.prompts.partition("/")
        used = set(params.targets[prompts].teachers if kind == "targets" else [prompts] if kind == "teachers" else [])
        work[f"baseline@{name}"] = sum(asked(teacher, evaluated) for teacher in used - scored)
        scored |= used
    return work


PARTS = {"teachers": ("teacher",), "training": ("tune", "student"), "students": ("evaluate",), "baselines": ("baseline",)}
"""What the stages' work is summed to."""


def prepared_work(project: Path) -> dict[str, float]:
    """Stage → how many texts it passes through a model; empty before the stage `prepare` has written the texts."""
    data = project / "artifacts" / "data"
    if not (data / "transfer.parquet").is_file():
        return {}
    import pyarrow.parquet as pq

    labelled, transfer = (pq.read_metadata(data / f"{role}.parquet").num_rows for role in ("demonstrations", "transfer"))
    evaluated = sum(pq.read_metadata(file).num_rows for file in (data / "evaluation").glob("*.parquet"))
    return token_work(load_params(project / "params.yaml"), 1.0, 0.0, None, labelled, transfer, evaluated, project / "artifacts")


def stage_count(params: Params, dag: Path) -> int:
    """Stages that dvc.yaml makes of these params."""
    values: dict[str, Any] = params.model_dump()
    loops = [stage.get("foreach", "").strip("${}") for stage in read_yaml(dag)["stages"].values()]
    return sum(len(reduce(getitem, loop.split("."), values)) if loop else 1 for loop in loops)


def cost(params: Params, labelled: int, transfer: Sequence[Example], evaluated: int) -> str:
    """Lines that say what a run on the texts `transfer` will cost; `labelled` and `evaluated` are numbers of other texts."""
    name = next(iter(params.models))
    folder = Path("artifacts") / "models" / name
    if not folder.is_dir():
        return (
            f"Time and memory: {folder} does not exist yet. After `shotless run model@{name}`, the same `shotless init --force` says them."
        )
    rows = transfer[:ROWS_TRIED]
    trial = try_rows(folder, Task(params.task), rows, params.runtime.threads)
    numbers = (labelled, len(transfer), evaluated)
    each = token_work(params, trial.query_tokens, trial.answer_tokens, trial.layers, *numbers, Path("artifacts"))
    work = {part: sum(tokens for stage, tokens in each.items() if stage.partition("@")[0] in kinds) for part, kinds in PARTS.items()}
    rate, length = trial.tokens_per_second, trial.query_tokens
    stages, peak = stage_count(params, Path("dvc.yaml")), PROCESS_BYTES + TRAINING_BYTES * trial.parameters
    minutes = (sum(work.values()) / rate + stages * SECONDS_A_STAGE) / 60
    return "\n".join(
        [
            f"{name} on {len(rows)} rows: {rate:,.0f} tokens/s, {length:.0f} tokens a text, engine {trial.engine}",
            *(f"  {part}: {tokens:,.0f} tokens, about {tokens / rate / 60:,.1f} min" for part, tokens in work.items()),
            f"A full run takes about {minutes:,.0f} minutes ({stages} stages) and up to {peak / 1e9:.1f} GB of "
            "memory; after it, one more student costs only itself.",
        ]
    )
