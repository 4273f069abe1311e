"""After how many predictions a distillation has paid for itself, in time on this machine.

Spent: scoring the transfer set with every teacher of the student's targets, tuning such teachers as are tuned, and training the student.
Saved with each prediction: the reference's time less the student's, for examples answered one by one (latency) and in batches
(throughput). Not counted: people's time, fetching, evaluation, and memory, which is saved from the first prediction on. Figures come from
`metrics/cost` and `metrics/runtime`, which are wall-clock and no outputs of DVC; where one is missing, or is of another model, the result
says which instead of guessing.
"""

import math
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json
from pipeline.params import Params

Json = dict[str, Any]
DIGITS = 6


def write_break_even(params: Params, metrics: Path, output: Path) -> None:
    """Write `reference` and, for each student, `break_even` to the file `output`."""
    students = {name: break_even(name, params, metrics) for name in params.students}
    write_json({"reference": params.evaluation.reference, "students": students}, output)


def break_even(student: str, params: Params, metrics: Path) -> Json:
    """What a student's distillation cost and saves.

    `capture_seconds` {teacher: s}, `tuning_seconds` {tuning: s}, `training_seconds`, `spent_seconds`; `one_by_one` and `batched`, each
    with `student_seconds` and `reference_seconds` for one prediction, `saved_seconds`, and `predictions`, the smallest number at which as
    much is saved as was spent (None where nothing is saved); `missing`, in words. What hangs on a missing figure is None.
    """
    missing: list[str] = []
    learn_from = params.students[student].learn_from
    targets = params.targets.get(learn_from.removeprefix("targets/"))
    teachers = dict.fromkeys([*(targets.teachers if targets else ()), *params.students[student].also])
    capture = {name: _capture_seconds(name, metrics, missing) for name in teachers}
    tuned = dict.fromkeys(params.teachers[name].model.removeprefix("tuned/") for name in capture)
    tuning = {name: _training_seconds("tuned", name, metrics, missing) for name in tuned if name in params.tunings}
    training = _training_seconds("student", student, metrics, missing)
    parts = [*capture.values(), *tuning.values(), training]
    spent = None if any(part is None for part in parts) else round(math.fsum(part for part in parts if part is not None), 3)
    costs = [_cost(name, metrics, missing) for name in (student, params.evaluation.reference)]
    return {
        "capture_seconds": capture,
        "tuning_seconds": tuning,
        "training_seconds": training,
        "spent_seconds": spent,
        "one_by_one": payback(spent, *(_latency_seconds(cost) for cost in costs)),
        "batched": payback(spent, *(_batched_seconds(cost) for cost in costs)),
        "missing": missing,
    }


def payback(spent: float | None, student: float | None, reference: float | None) -> Json:
    """The smallest number of predictions that save `spent` seconds, where one takes the student and the reference so many seconds."""
    saved = None if student is None or reference is None else reference - student
    predictions = None if spent is None or saved is None or saved <= 0 else math.ceil(spent / saved)
    figures = {"student_seconds": student, "reference_seconds": reference, "saved_seconds": saved}
    return {key: None if value is None else round(value, DIGITS) for key, value in figures.items()} | {"predictions": predictions}


def _capture_seconds(teacher: str, metrics: Path, missing: list[str]) -> float | None:
    file = metrics / "runtime" / f"teacher-{teacher}.json"
    found = _read(file, f"the teacher's stage writes it, `dvc repro -f -s teacher@{teacher}`", missing)
    if found is None:
        return None
    if found["rows_timed"] < found["rows"]:
        missing.append(f"{file}: the times of {found['rows'] - found['rows_timed']} of {found['rows']} rows are not known")
        return None
    return found["seconds"]


def _training_seconds(kind: str, name: str, metrics: Path, missing: list[str]) -> float | None:
    """Of a student or a tuned teacher, as `kind` says."""
    file, stage = metrics / "runtime" / f"{kind}-{name}.json", {"tuned": "tune"}.get(kind, kind)
    found = _read(file, f"`dvc repro -f -s {stage}@{name}` writes it", missing)
    if found is None:
        return None
    if found["resumed_at_step"]:
        missing.append(f"{file}: an interrupted training was taken up at step {found['resumed_at_step']}, and only the rest was timed")
        return None
    return found["seconds"]


def _cost(method: str, metrics: Path, missing: list[str]) -> Json | None:
    """A method's cost, where it was measured on what made its predictions."""
    file = metrics / "cost" / f"{method}.json"
    cost = _read(file, "the method's evaluation writes it", missing)
    evaluated = _read(metrics / "eval" / f"{method}.json", "the method's evaluation writes it", missing)
    if cost is None or evaluated is None:
        return None
    if cost["measured"]["subject"] != evaluated.get("subject"):
        missing.append(f"{file}: measured on another model or other prompts than those of the predictions")
        return None
    if cost.get("throughput") is None:
        missing.append(f"{file}: no throughput in it, so nothing can be said of batches; the method's evaluation measures it")
    return cost


def _latency_seconds(cost: Json | None) -> float | None:
    return None if cost is None else cost["latency_ms"] / 1000


def _batched_seconds(cost: Json | None) -> float | None:
    throughput = (cost or {}).get("throughput")
    return None if throughput is None else 1 / throughput["examples_per_second"]


def _read(file: Path, remedy: str, missing: list[str]) -> Json | None:
    if file.is_file():
        return read_json(file)
    missing.append(f"{file}: no such file; {remedy}")
    return None
