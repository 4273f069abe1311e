"""Methods against each other, from their predictions on disk, and after how many predictions a student has paid for itself.

Every pair is compared on the same examples, twice: by a paired bootstrap of the difference, which is far sharper than asking whether two
intervals overlap, and by McNemar's exact test, which asks whether the examples that only one of the two gets right could have fallen either
way by the toss of a coin. Pairs grow with the square of the number of methods; with more than `ALL_PAIRS_UP_TO`, each method is compared
with the reference alone. The p-values are of single pairs: of twenty pairs without a difference, one falls below 0.05.

Break-even: a student costs scoring the transfer set with its teachers, tuning the models that are tuned, and training. It saves, with each
prediction, the reference's time less its own, one by one (latency) and in batches (throughput). Not counted: people's time, downloads,
evaluation, and memory. Times come from `metrics/cost` and `metrics/runtime`, which DVC does not track. If one is missing, or is of another
model, the result says which instead of guessing.
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

from pipeline.errors import CorruptError
from pipeline.evaluation import free_text
from pipeline.evaluation.metrics import RIGHT, Json, check_probabilities, frames, mean_interval, rounded, scores_by_set
from pipeline.files import Folders, read_json, write_json
from pipeline.params import Params
from pipeline.schema import ANSWERS, PREDICTIONS, read_table

ALL_PAIRS_UP_TO = 12
SMALLEST_PROBABILITY = 1e-12
"""Replaces a probability of 0, for which KL would be infinite."""


def compare_methods(params: Params, folders: Folders) -> None:
    """Write metrics/compare.json: `reference`, `pairs` ("all" or "reference"), `to_reference` and `comparisons` of all methods.

    If answers are free text, `to_reference` is `free_text.agreement`, and a comparison is of one share: `what` ("well_formed", "accuracy").
    """
    names, reference, completion = [*params.students, *params.baselines], params.evaluation.reference, params.task.completion
    schema = PREDICTIONS if completion is None else ANSWERS
    tables = {name: read_table(folders.artifacts / "predictions" / f"{name}.parquet", schema) for name in names}
    domains = {name: entry.domain for name, entry in params.data.evaluation.items()}
    bootstrap = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    every = len(names) <= ALL_PAIRS_UP_TO
    pairs = [(one, other) for one, other in combinations(names, 2) if every or reference in (one, other)]
    others = {name: table for name, table in tables.items() if name != reference}
    if completion is None:
        close = {name: to_reference(table, tables[reference], params.task.labels, **bootstrap) for name, table in others.items()}
        answers, shares = tables, {None: RIGHT}
    else:
        close = {name: free_text.agreement(table, tables[reference], completion.form) for name, table in others.items()}
        answers = {name: free_text.parsed(table, completion.form) for name, table in tables.items()}
        shares = free_text.shares_of(completion.form)
    rows: list[Json] = []
    for share, right in shares.items():
        scores = {name: scores_by_set(table, list(domains), right) for name, table in answers.items()}
        what = {} if share is None else {"what": share}
        rows += [what | row for pair in pairs for row in comparisons(*pair, scores, domains, **bootstrap)]
    document = {"reference": reference, "pairs": "all" if every else "reference", "to_reference": close, "comparisons": rows}
    write_json(document, folders.metrics / "compare.json")


def to_reference(table: pa.Table, reference: pa.Table, labels: Sequence[str], *, resamples: int, seed: int) -> dict[str, Json]:
    """How close a method's answers are to the reference's, for each evaluation set.

    `n` examples, `agreement` (share of equal answers), `agreement_ci95`, `kl_nats`, `kl_ci95`. KL is KL(reference ‖ method), what
    distillation minimises: a mean over examples and runs. Raises CorruptError if the reference did not answer an example.
    """
    theirs, found = frames(reference, labels), {}
    for name, frame in frames(table, labels).items():
        answered = set(theirs[name]["example_id"]) if name in theirs else set()
        if lacking := set(frame["example_id"]) - answered:
            raise CorruptError(
                f"predictions for set {name!r}: the reference did not answer {len(lacking)} examples, first {min(lacking)[:12]}. "
                "Run the `evaluate` stages again."
            )
        other = frame.select("example_id").join(theirs[name], on="example_id", how="left", validate="m:1", maintain_order="left")
        target, ours = (check_probabilities(rows, labels, name) for rows in (other, frame))
        kl = rel_entr(target, ours.clip(SMALLEST_PROBABILITY)).sum(axis=1)
        same = (frame["predicted"] == other["predicted"]).cast(pl.Float64)
        means = frame.select("example_id", agreement=same, kl_nats=pl.Series(kl)).group_by("example_id", maintain_order=True).mean()
        agreement, kl = means["agreement"].to_numpy(), means["kl_nats"].to_numpy()
        found[name] = {
            "n": means.height,
            "agreement": float(agreement.mean()),
            "agreement_ci95": mean_interval([agreement], resamples=resamples, seed=seed),
            "kl_nats": float(kl.mean()),
            "kl_ci95": mean_interval([kl], resamples=resamples, seed=seed),
        }
    return rounded(found)


def comparisons(
    method: str, other: str, scores: Mapping[str, Mapping[str, pl.DataFrame]], domains: Mapping[str, str], *, resamples: int, seed: int
) -> list[Json]:
    """The differences of two methods, `method` minus `other`, for each domain (`set` None) and each evaluation set.

    `scores[method][set]` is from `metrics.example_scores`. A row has `n` examples; `difference` in accuracy (over a domain, the mean over
    its sets), `ci95`, and `clear` if the interval excludes zero; `only_method_right`, `only_other_right` (examples of all its sets) and
    `mcnemar_p`, which are None if a method answers an example several times. Raises CorruptError if the examples differ.
    """
    pairs = {}
    for name, mine in scores[method].items():
        theirs = scores[other][name]
        pairs[name] = mine.join(theirs, on="example_id", suffix="_other", maintain_order="left")
        if not pairs[name].height == mine.height == theirs.height:
            raise CorruptError(f"predictions for set {name!r}: {method} and {other} answered different examples. Run `dvc repro`.")
    members = {domain: [name for name, own in domains.items() if own == domain] for domain in ("in", "out")}
    wheres = [(domain, name, [name] if name else own) for domain, own in members.items() if own for name in (None, *own)]
    rows = []
    for domain, where, sets in wheres:
        samples = [(pairs[name]["score"] - pairs[name]["score_other"]).to_numpy() for name in sets]
        low, high = mean_interval(samples, resamples=resamples, seed=seed, lowest=-1.0)
        row = {"method": method, "other": other, "domain": domain, "set": where, "n": sum(map(len, samples))}
        row |= {"difference": float(np.mean([sample.mean() for sample in samples])), "ci95": [low, high], "clear": low > 0 or high < 0}
        both = pl.concat([pairs[name] for name in sets]).select("score", "score_other").to_numpy()
        counts = int((both[:, 0] > both[:, 1]).sum()), int((both[:, 0] < both[:, 1]).sum())
        tested = (*counts, float(f"{mcnemar_exact(*counts):.3g}")) if np.isin(both, (0, 1)).all() else (None,) * 3
        rows.append(rounded(row) | dict(zip(("only_method_right", "only_other_right", "mcnemar_p"), tested, strict=True)))
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

    `capture_seconds` {teacher: s}, `tuning_seconds` {tuned: s}, `base_training_seconds` {other student that it is made with: s},
    `training_seconds`, `spent_seconds`; `one_by_one` and `batched`, see `payback`; `missing`, in words. What needs a missing time is None.
    """
    missing: list[str] = []
    seconds: dict[str, dict[str, float | None]] = {"teachers": {}, "tuned": {}, "students": {}}
    for kind, name in makers(student, params):
        seconds[kind][name] = _seconds(kind, name, metrics, missing)
    parts = [part for own in seconds.values() for part in own.values()]
    spent = None if None in parts else round(math.fsum(part for part in parts if part is not None), 3)
    costs = [_cost(name, metrics, missing) for name in (student, params.evaluation.reference)]
    latency, batched = ([cost and cost[n] for cost in costs] for n in (0, 1))
    return {
        "capture_seconds": seconds["teachers"],
        "tuning_seconds": seconds["tuned"],
        "training_seconds": seconds["students"].pop(student),
        "base_training_seconds": seconds["students"],
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
        elif kind in {"students", "teachers", "tuned"} and (kind, name) not in found:
            found[kind, name] = None
            if kind == "students":
                own = params.students[name]
                waiting += [own.learn_from, *(f"teachers/{teacher}" for teacher in own.auxiliary), own.base]
            else:
                waiting.append(params.teachers[name].model if kind == "teachers" else params.tuned[name].base)
    return list(found)


def payback(spent: float | None, student: float | None, reference: float | None) -> Json:
    """`student_seconds`, `reference_seconds`, `saved_seconds` of a prediction; `predictions` that save what was spent, None if none do."""
    saved = None if student is None or reference is None else reference - student
    predictions = None if spent is None or saved is None or saved <= 0 else math.ceil(spent / saved)
    return rounded({"student_seconds": student, "reference_seconds": reference, "saved_seconds": saved}) | {"predictions": predictions}


def _seconds(kind: str, name: str, metrics: Path, missing: list[str]) -> float | None:
    """What the stage of a teacher, tuned model or student took."""
    stage, prefix = {"teachers": ("teacher", "teacher"), "tuned": ("tune", "tuned"), "students": ("student", "student")}[kind]
    file = metrics / "runtime" / f"{prefix}-{name}.json"
    found = _read(file, f"`dvc repro -f -s {stage}@{name}` writes it", missing)
    if found is None:
        return None
    if untimed := found.get("rows", 0) - found.get("rows_timed", 0):
        missing.append(f"{file}: the times of {untimed} of {found['rows']} rows are not known")
    elif found.get("resumed_at_step"):
        missing.append(f"{file}: only the rest of a resumed training was timed")
    else:
        return found["seconds"]
    return None


def _cost(method: str, metrics: Path, missing: list[str]) -> tuple[float, float] | None:
    """Seconds of a prediction, one by one and in batches, if they were measured on what made the method's predictions."""
    file, remedy = metrics / "cost" / f"{method}.json", "the method's evaluation writes it"
    cost, evaluated = (_read(one, remedy, missing) for one in (file, metrics / "eval" / f"{method}.json"))
    if cost is None or evaluated is None:
        return None
    if cost["measured"]["subject"] != evaluated.get("subject"):
        missing.append(f"{file}: measured on another model or other prompts than those of the predictions")
        return None
    return cost["latency_ms"] / 1000, 1 / cost["throughput"]["examples_per_second"]


def _read(file: Path, remedy: str, missing: list[str]) -> Any:
    if file.is_file():
        return read_json(file)
    missing.append(f"{file}: no such file; {remedy}")
    return None
