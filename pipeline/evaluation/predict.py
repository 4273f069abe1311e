"""Predictions of students and baselines on the evaluation sets, as rows on disk from which every number is made.

A student answers the bare query. A baseline answers in the contexts of a target set, with the calibration that was learnt on the transfer
set: each context on its own, or all averaged as the target set averages them. Scores go through the store, so baselines that ask the
same prompts of the same model share them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.teachers.scorer import Query, Scorer
from pipeline.teachers.scores import LABELS_ALONE
from pipeline.targets.calibration import Combination, normalised
from pipeline.errors import MismatchError, UsageError
from pipeline.files import context_id
from pipeline.models.provenance import check_provenance
from pipeline.params import CacheParams
from pipeline.schema import CONTEXTS, PREDICTIONS, examples, read_table
from pipeline.task import Task

Rows = list[dict[str, Any]]


def read_sets(folder: Path, names: Sequence[str], task: Task) -> dict[str, Rows]:
    """Evaluation sets as rows of `schema.examples`, in the params' order."""
    return {name: read_table(folder / f"{name}.parquet", examples(task.fields)).to_pylist() for name in names}


def predict_student(
    name: str, folders: Mapping[str, Path], task: Task, sets: Mapping[str, Rows], work: Path, threads: int | None
) -> pa.Table:
    """Predictions of a student with no context; `folders` hold its trainings, by what their rows have as `context_id`.

    Raises MismatchError where the student was trained for another template or other verbalisers, or its folder's weights, tokenizer or
    task are not those of its training.
    """
    probabilities = {}
    for run, folder in folders.items():
        provenance = check_provenance(folder)
        provenance.check_task(task.params)
        scorer = Scorer(folder, task, LABELS_ALONE, work, threads)
        provenance.check_tokens(scorer.tokens)
        scores = _score(scorer, [""], task, sets, f"evaluate {name}" + (f", {run}" if run else ""))
        probabilities[run] = {key: np.exp(normalised(values[0])) for key, values in scores.items()}
    return _table(task, sets, probabilities)


def predict_baseline(
    name: str,
    calibration: Mapping[str, Any],
    ensemble: bool,
    task: Task,
    sets: Mapping[str, Rows],
    artifacts: Path,
    work: Path,
    threads: int | None,
) -> pa.Table:
    """Predictions of a target set's prompts: of every context on its own, or of their ensemble.

    Raises MismatchError where a context or a teacher is no longer the one that the calibration was learnt with.
    """
    by_set: dict[str, list[np.ndarray]] = {key: [] for key in sets}
    for teacher, entry in calibration["teachers"].items():
        contexts = teacher_contexts(calibration, teacher, artifacts)
        scorer = Scorer(
            artifacts / entry["model"],
            task,
            CacheParams.model_validate(entry["fingerprint"]["cache"]),
            work,
            threads,
            entry["fingerprint"]["dtype"],
        )
        scorer.fingerprint.check(entry["fingerprint"], artifacts / "targets" / calibration["targets"] / "calibration.json")
        scores = _score(scorer, [context["text"] for context in contexts], task, sets, f"evaluate {name}: {teacher}")
        for key, values in scores.items():
            by_set[key] += list(values)
    combinations = {key: combination_of(calibration, rows[0]["source"]) for key, rows in sets.items()}
    if ensemble:
        return _table(task, sets, {"": {key: combinations[key].ensemble(np.stack(values)) for key, values in by_set.items()}})
    each = {key: combinations[key].each(np.stack(values)) for key, values in by_set.items()}
    ids = [context["context_id"] for context in calibration["contexts"]]
    if len(set(ids)) < len(ids):
        raise UsageError(
            f"baseline {name}: two teachers of target set {calibration['targets']!r} answer in the same context, so `contexts: each` "
            "cannot tell their predictions apart; give each teacher a target set and a baseline of its own."
        )
    return _table(task, sets, {context: {key: values[row] for key, values in each.items()} for row, context in enumerate(ids)})


def teacher_contexts(calibration: Mapping[str, Any], teacher: str, artifacts: Path) -> Rows:
    """A teacher's contexts (`schema.CONTEXTS`) in the calibration's order."""
    path = artifacts / "data" / "contexts" / f"{calibration['teachers'][teacher]['contexts']}.parquet"
    by_id = {row["context_id"]: row for row in read_table(path, CONTEXTS).to_pylist()}
    wanted = [context["context_id"] for context in calibration["contexts"] if context["teacher"] == teacher]
    if missing := [context for context in wanted if context not in by_id]:
        raise MismatchError(f"{path}: context {missing[0][:12]} of target set {calibration['targets']!r} is not in it; run `dvc repro`.")
    return [by_id[context] for context in wanted]


def combination_of(calibration: Mapping[str, Any], source: str) -> Combination:
    """The combination that a `calibration.json` describes for inputs of a source; its contexts are listed teacher by teacher.

    The offsets are those of that source where there are any (`calibrate_by: source`), else those of the whole transfer set.
    """
    contexts = calibration["contexts"]
    return Combination(
        offsets=np.array(calibration["by_source"].get(source, [context["offsets_nats"] for context in contexts])),
        weights=np.array([context["weight"] for context in contexts]),
        average=calibration["average"],
        temperature=calibration["temperature"],
    )


def _score(scorer: Scorer, contexts: Sequence[str], task: Task, sets: Mapping[str, Rows], title: str) -> dict[str, np.ndarray]:
    """Label log-probabilities of every set, [C, N, L] each. All sets are one request: their batches are filled together."""
    queries: dict[str, Query] = {}
    for rows in sets.values():
        for row in rows:
            queries.setdefault(row["example_id"], Query(row["example_id"], {field: row[field] for field in task.fields}))
    table = scorer.score(contexts, list(queries.values()), title, ["context_id", "example_id", "label_logprobs"])
    values = np.array(table["label_logprobs"].to_pylist(), dtype=np.float64)
    keys = zip(table["context_id"].to_pylist(), table["example_id"].to_pylist(), strict=True)
    place = {key: row for row, key in enumerate(keys)}
    ids = [context_id(text) for text in contexts]
    return {key: values[[[place[context, row["example_id"]] for row in rows] for context in ids]] for key, rows in sets.items()}


def _table(task: Task, sets: Mapping[str, Rows], probabilities: Mapping[str, Mapping[str, np.ndarray]]) -> pa.Table:
    """PREDICTIONS rows: sets outermost, then contexts, then examples. `probabilities[context][set]` is [N, L]."""
    out: dict[str, list[Any]] = {name: [] for name in PREDICTIONS.names}
    for key, rows in sets.items():
        for context, by_set in probabilities.items():
            values = by_set[key].astype(np.float32)
            out["set"] += [key] * len(rows)
            out["context_id"] += [context] * len(rows)
            out["example_id"] += [row["example_id"] for row in rows]
            out["label"] += [row["label"] for row in rows]
            out["predicted"] += [task.labels[best] for best in values.argmax(-1)]
            out["probabilities"] += list(values)
    return pa.table({name: pa.array(out[name], type=PREDICTIONS.field(name).type) for name in PREDICTIONS.names}, schema=PREDICTIONS)
