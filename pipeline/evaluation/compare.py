"""Methods against each other, from their predictions on disk, and after how many predictions a student has paid for itself.

Every pair is compared on the same examples, twice: by a paired bootstrap of the difference, and by McNemar's exact test, which asks whether
the examples that only one of the two gets right could have fallen either way by the toss of a coin. Pairs grow with the square of the
number of methods; with more than `ALL_PAIRS_UP_TO`, each method is compared with the reference alone. The p-values are of single pairs:
of twenty pairs without a difference, one falls below 0.05.

Break-even: spent is what the student needed, that is scoring the transfer set with its teachers, tuning the models that are tuned, and
training. Saved with each prediction is the reference's time less the student's, one by one (latency) and in batches (throughput). Not
counted: people's time, downloads, evaluation, and memory. Times come from `metrics/cost` and `metrics/runtime`, which DVC does not track.
If one is missing, or is of another model, the result says which instead of guessing.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from scipy.special import rel_entr
from scipy.stats import binomtest

from pipeline.evaluation import free_text
from pipeline.evaluation.metrics import (
    RIGHT,
    Json,
    beside_reference,
    check_probabilities,
    compare,
    frames,
    mean_interval,
    rounded,
    scores_by_set,
    significant,
)
from pipeline.files import Folders, read_json, write_json
from pipeline.params import Params
from pipeline.schema import ANSWERS, PREDICTIONS, read_table

ALL_PAIRS_UP_TO = 12
SMALLEST_PROBABILITY = 1e-12
"""Replaces a probability of 0, for which KL would be infinite."""


def compare_methods(params: Params, folders: Folders) -> None:
    """Write metrics/compare.json: `reference`, `pairs` ("all" or "reference"), `to_reference` and `comparisons` of all methods.

    If answers are free text, `to_reference` is `free_text.agreement`, and a comparison says `what` is compared: `well_formed` or `accuracy`.
    """
    names, reference = [*params.students, *params.baselines], params.evaluation.reference
    completion = params.task.completion
    paths = {name: folders.artifacts / "predictions" / f"{name}.parquet" for name in names}
    tables = {name: read_table(path, PREDICTIONS if completion is None else ANSWERS) for name, path in paths.items()}
    domains = {name: entry.domain for name, entry in params.data.evaluation.items()}
    bootstrap = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    every = len(names) <= ALL_PAIRS_UP_TO
    pairs = [(one, other) for one, other in combinations(names, 2) if every or reference in (one, other)]
    others = {name: table for name, table in tables.items() if name != reference}
    if completion is None:
        close = {name: to_reference(table, tables[reference], params.task.labels, **bootstrap) for name, table in others.items()}
        rows = [row for pair in pairs for row in comparisons(*pair, tables, domains, **bootstrap)]
    else:
        form = completion.form
        close = {name: free_text.agreement(table, tables[reference], form) for name, table in others.items()}
        answers = {name: free_text.parsed(table, form) for name, table in tables.items()}
        shares = free_text.shares_of(form).items()
        rows = [
            {"what": share, **row}
            for pair in pairs
            for share, right in shares
            for row in comparisons(*pair, answers, domains, right, **bootstrap)
        ]
    document = {"reference": reference, "pairs": "all" if every else "reference", "to_reference": close, "comparisons": rows}
    write_json(document, folders.metrics / "compare.json")


def to_reference(table: pa.Table, reference: pa.Table, labels: Sequence[str], *, resamples: int, seed: int) -> dict[str, Json]:
    """How close a method's answers are to the reference's, for each evaluation set.

    `n` examples, `agreement` (share of equal answers), `agreement_ci95`, `kl_nats`, `kl_ci95`. KL is KL(reference ‖ method), what
    distillation minimises: a mean over examples and runs. Raises what `metrics.beside_reference` raises.
    """
    frames(reference, labels), frames(table, labels)  # labels are known
    found: dict[str, Json] = {}
    for (name,), part in beside_reference(table, reference).group_by("set", maintain_order=True):
        theirs = part.select("example_id", predicted="predicted_reference", probabilities="probabilities_reference")
        target, ours = (check_probabilities(frame, labels, str(name)) for frame in (theirs, part))
        kl = rel_entr(target, ours.clip(SMALLEST_PROBABILITY)).sum(axis=1)
        same = (part["predicted"] == theirs["predicted"]).cast(pl.Float64)
        means = pl.DataFrame({"example_id": part["example_id"], "kl_nats": kl, "agreement": same})
        means = means.group_by("example_id", maintain_order=True).mean()
        found[str(name)] = {"n": means.height}
        for key, interval in (("agreement", "agreement_ci95"), ("kl_nats", "kl_ci95")):
            sample = means[key].to_numpy()
            found[str(name)] |= {key: float(sample.mean()), interval: mean_interval([sample], resamples=resamples, seed=seed)}
    return rounded(found)


def comparisons(
    method: str,
    other: str,
    tables: Mapping[str, pa.Table] | Mapping[str, pl.DataFrame],
    domains: Mapping[str, str],
    right: pl.Expr = RIGHT,
    *,
    resamples: int,
    seed: int,
) -> list[Json]:
    """The differences of two methods, `method` minus `other`, for each domain (`set` None) and each evaluation set.

    A row has `n` examples, `difference` in accuracy (over a domain, the mean over its sets), `ci95` and `clear` as `metrics.compare` has
    them; `only_method_right`, `only_other_right` (examples; over a domain, of all its sets together) and `mcnemar_p`, which are None if a
    method answers an example several times, once in each run. `right` says which rows score 1.
    """
    rows = []
    for domain in ("in", "out"):
        members = [name for name, own in domains.items() if own == domain]
        for name, sets in [(None, members), *((member, [member]) for member in members)] if members else []:
            found = compare(tables[method], tables[other], sets, resamples=resamples, seed=seed, right=right)
            mine, theirs = (scores_by_set(tables[key], sets, right) for key in (method, other))
            pairs = pl.concat([mine[key].join(theirs[key], on="example_id", suffix="_other", maintain_order="left") for key in sets])
            one, two = pairs["score"].to_numpy(), pairs["score_other"].to_numpy()
            tested: Json = {"only_method_right": None, "only_other_right": None, "mcnemar_p": None}
            if np.isin([one, two], (0, 1)).all():
                counts = int((one > two).sum()), int((one < two).sum())
                tested = dict(zip(tested, (*counts, significant(mcnemar_exact(*counts))), strict=True))
            rows.append({"method": method, "other": other, "domain": domain, "set": name, "n": len(one), **found, **tested})
    return rows


def mcnemar_exact(only_one: int, only_other: int) -> float:
    """Two-sided p-value of McNemar's exact test: the chance that fair tosses divide the discordant pairs at least as unevenly."""
    return float(binomtest(only_one, only_one + only_other, 0.5).pvalue) if only_one + only_other else 1.0


def write_break_even(params: Params, folders: Folders) -> None:
    """Write metrics/runtime/break-even.json: `reference` and, for each student, `break_even`."""
    students = {name: break_even(name, params, folders.metrics) for name in params.students}
    write_json({"reference": params.evaluation.reference, "students": students}, folders.metrics / "runtime" / "break-even.json")


def break_even(student: str, params: Params, metrics: Path) -> Json:
    """What a student cost and saves.

    `capture_seconds` {teacher: s}, `tuning_seconds` {tuned: s}, `base_training_seconds` {another student that it began from or learnt from: s},
    `training_seconds`, `spent_seconds`; `one_by_one` and `batched`, see `payback`; `missing`, in words. What needs a missing time is None.
    """
    missing: list[str] = []
    made = makers(student, params)
    capture = {name: _capture_seconds(name, metrics, missing) for kind, name in made if kind == "teachers"}
    tuning = {name: _training_seconds("tuned", name, metrics, missing) for kind, name in made if kind == "tuned"}
    students = {name: _training_seconds("student", name, metrics, missing) for kind, name in made if kind == "students"}
    parts = [*capture.values(), *tuning.values(), *students.values()]
    spent = None if None in parts else round(math.fsum(part for part in parts if part is not None), 3)
    costs = [_cost(name, metrics, missing) for name in (student, params.evaluation.reference)]
    latency = [None if cost is None else cost["latency_ms"] / 1000 for cost in costs]
    batched = [None if cost is None else 1 / cost["throughput"]["examples_per_second"] for cost in costs]
    return {
        "capture_seconds": capture,
        "tuning_seconds": tuning,
        "base_training_seconds": {name: seconds for name, seconds in students.items() if name != student},
        "training_seconds": students[student],
        "spent_seconds": spent,
        "one_by_one": payback(spent, *latency),
        "batched": payback(spent, *batched),
        "missing": missing,
    }


def makers(student: str, params: Params) -> list[tuple[str, str]]:
    """The teachers, tuned models and students (this one first) that a student is made with, as (map in params.yaml, name), each once."""
    found: dict[tuple[str, str], None] = {}
    waiting = [f"students/{student}"]
    while waiting:
        kind, _, name = waiting.pop(0).partition("/")
        if kind == "targets":
            waiting += [f"teachers/{teacher}" for teacher in params.targets[name].teachers]
        if kind not in {"students", "teachers", "tuned"} or (kind, name) in found:
            continue
        found[kind, name] = None
        if kind == "teachers":
            waiting.append(params.teachers[name].model)
        elif kind == "tuned":
            waiting.append(params.tuned[name].base)
        else:
            own = params.students[name]
            waiting += [own.learn_from, *(f"teachers/{teacher}" for teacher in own.auxiliary), own.base]
    return list(found)


def payback(spent: float | None, student: float | None, reference: float | None) -> Json:
    """`student_seconds` and `reference_seconds` for one prediction, `saved_seconds`, and `predictions`: the smallest number that saves as much
    as was spent, None if nothing is saved.
    """
    saved = None if student is None or reference is None else reference - student
    predictions = None if spent is None or saved is None or saved <= 0 else math.ceil(spent / saved)
    return rounded({"student_seconds": student, "reference_seconds": reference, "saved_seconds": saved}) | {"predictions": predictions}


def _capture_seconds(teacher: str, metrics: Path, missing: list[str]) -> float | None:
    file = metrics / "runtime" / f"teacher-{teacher}.json"
    found = _read(file, f"`dvc repro -f -s teacher@{teacher}` writes it", missing)
    if found is not None and found["rows_timed"] < found["rows"]:
        missing.append(f"{file}: the times of {found['rows'] - found['rows_timed']} of {found['rows']} rows are not known")
        return None
    return found and found["seconds"]


def _training_seconds(kind: str, name: str, metrics: Path, missing: list[str]) -> float | None:
    """Of a student or a tuned teacher, as `kind` says."""
    file = metrics / "runtime" / f"{kind}-{name}.json"
    found = _read(file, f"`dvc repro -f -s {'tune' if kind == 'tuned' else kind}@{name}` writes it", missing)
    if found is not None and found["resumed_at_step"]:
        missing.append(f"{file}: an interrupted training went on at step {found['resumed_at_step']}, and only the rest was timed")
        return None
    return found and found["seconds"]


def _cost(method: str, metrics: Path, missing: list[str]) -> Json | None:
    """A method's cost, if it was measured on what made its predictions."""
    file = metrics / "cost" / f"{method}.json"
    cost = _read(file, "the method's evaluation writes it", missing)
    evaluated = _read(metrics / "eval" / f"{method}.json", "the method's evaluation writes it", missing)
    if cost is None or evaluated is None:
        return None
    if cost["measured"]["subject"] != evaluated.get("subject"):
        missing.append(f"{file}: measured on another model or other prompts than those of the predictions")
        return None
    return cost


def _read(file: Path, remedy: str, missing: list[str]) -> Any:
    if file.is_file():
        return read_json(file)
    missing.append(f"{file}: no such file; {remedy}")
    return None
