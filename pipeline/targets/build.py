"""Stage two begins: cached scores of one or several teachers become the distribution that students learn.

Calibration is learnt here, on the transfer set, without labels; it is written beside the targets as `calibration.json`, which says all that
is needed to put the same prompts with the same calibration to new inputs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.folder import CACHES, ScoreCache, manifest_sha256, read_cache
from pipeline.targets.calibration import Calibration, Combination, learn_offsets, normalised
from pipeline.errors import MismatchError
from pipeline.files import write_json, write_sealed_json
from pipeline.files import sha256_file
from pipeline.params import TargetParams, TeacherParams
from pipeline.schema import TARGETS, write_table
from pipeline.targets.fidelity import cache_fidelity
from pipeline.task import Task

COLUMNS = ("context_id", "example_id", "label_logprobs", "tail_mass")
"""All that targets need of a cache; distributions stay on disk."""


@dataclass(frozen=True)
class ContextScores:
    """One teacher's scores in one context, in the order of the transfer set."""

    teacher: str
    context_id: str
    name: str
    weight: float
    transfer: np.ndarray  # [N, L] log-probabilities over the vocabulary
    content_free: np.ndarray  # [F, L]


def build_targets(
    name: str,
    params: TargetParams,
    teachers: dict[str, TeacherParams],
    task: Task,
    transfer: pa.Table,
    scores: Path,
    output: Path,
    metrics: Path,
) -> None:
    """Write `targets.parquet`, `calibration.json` and `caches.json` to `output`, and the metrics of the target set to `metrics`.

    `caches.json` names the caches that students of this set may learn whole, by the hash of what they hold: a student that depends on the
    target set depends on them, though their shards stay where they are.

    `transfer` has the columns `example_id` and `source`. Raises MismatchError where a cache was captured for another task or lacks a
    transfer example.
    """
    if params.sources is not None:
        transfer = transfer.filter(pa.array([source in params.sources for source in transfer["source"].to_pylist()]))
    transfer_ids, sources = transfer["example_id"].to_pylist(), transfer["source"].to_numpy()
    caches = {teacher: read_cache(scores / teacher, COLUMNS) for teacher in params.teachers}
    contexts = [
        context
        for teacher, cache in caches.items()
        for context in _contexts(teacher, teachers[teacher], cache, params, task, transfer_ids, scores)
    ]
    everywhere = np.arange(len(transfer_ids))
    combination = _combination(params, contexts, everywhere)
    parts = {source: np.flatnonzero(sources == source) for source in dict.fromkeys(sources)}
    by_source = {key: _combination(params, contexts, rows) for key, rows in parts.items()} if params.calibrate_by == "source" else {}
    raw = np.stack([context.transfer for context in contexts])
    each, target = np.empty_like(raw), np.empty(raw.shape[1:])
    for one, rows in [(by_source[key], parts[key]) for key in by_source] or [(combination, everywhere)]:
        each[:, rows], target[rows] = one.each(raw[:, rows]), one.ensemble(raw[:, rows])
    agreement = combination.weights @ (each.argmax(-1) == target.argmax(-1))
    table = pa.table(
        {
            "example_id": transfer_ids,
            "probabilities": pa.array(list(target.astype(np.float32)), type=TARGETS.field("probabilities").type),
            "agreement": agreement.astype(np.float32),
        },
        schema=TARGETS,
    )
    write_table(table, output / "targets.parquet")
    described = _calibration(name, params, teachers, task, caches, contexts, combination)
    described["by_source"] = {key: _listed(one.offsets) for key, one in by_source.items()}
    write_sealed_json(described | {"targets_sha256": sha256_file(output / "targets.parquet")}, output / "calibration.json")
    pointers = {teacher: {"manifest_sha256": manifest_sha256(scores / teacher)} for teacher in params.caches}
    write_sealed_json(pointers, output / CACHES)
    write_json(_metrics(task, caches, contexts, combination, raw, each, target, agreement), metrics)


def _combination(params: TargetParams, contexts: list[ContextScores], rows: np.ndarray) -> Combination:
    """How the contexts' scores are combined, calibrated on some rows of the transfer set."""
    kinds: list[Calibration] = [params.calibrations.get(context.teacher, params.calibration) for context in contexts]
    scores = [(normalised(context.transfer[rows]), normalised(context.content_free)) for context in contexts]
    offsets = [learn_offsets(kind, *of_context) for kind, of_context in zip(kinds, scores, strict=True)]
    weights = np.array([context.weight for context in contexts])
    return Combination(np.stack(offsets), weights / weights.sum(), params.average, params.temperature)


def _listed(offsets: np.ndarray) -> list[list[float]]:
    """[C, L] as JSON has it."""
    return [[round(float(value), 9) for value in row] for row in offsets]


def _contexts(
    teacher: str, settings: TeacherParams, cache: ScoreCache, params: TargetParams, task: Task, transfer_ids: list[str], scores: Path
) -> list[ContextScores]:
    """A teacher's cached rows, by context."""
    where = scores / teacher / "manifest.json"
    found = {key: cache.manifest["fingerprint"][key] for key in ("template", "verbalisers")}
    wanted = {"template": task.params.template, "verbalisers": dict(task.params.verbalisers)}
    for key, value in wanted.items():
        if found[key] != value or cache.manifest["labels"] != list(task.labels):
            raise MismatchError(f"{where}: captured with {key} {found[key]!r}, this run has {value!r}; run `dvc repro teacher@{teacher}`.")
    if (captured := cache.manifest["fingerprint"]["cache"]) != (wished := settings.cache.model_dump(mode="json")):
        different = ", ".join(f"{key} {captured.get(key)!r}, not {wished[key]!r}" for key in wished if captured.get(key) != wished[key])
        raise MismatchError(f"{where}: captured with {different} of teachers.{teacher}.cache; run `dvc repro teacher@{teacher}`.")
    if cache.manifest["model"] != settings.model:
        found_model = cache.manifest["model"]
        raise MismatchError(f"{where}: captured from {found_model}, not {settings.model}; run `dvc repro teacher@{teacher}`.")
    rows = cache.rows.to_pydict()
    by_key = {key: row for row, key in enumerate(zip(rows["context_id"], rows["example_id"], strict=True))}
    label_logprobs = np.array(rows["label_logprobs"], dtype=np.float64)

    def take(context: str, ids: list[str]) -> np.ndarray:
        try:
            return label_logprobs[[by_key[context, example] for example in ids]]
        except KeyError as error:
            missing = error.args[0][1]
            raise MismatchError(
                f"{where}: example {missing} of the transfer set is not in it; run `dvc repro teacher@{teacher}`."
            ) from None

    listed = cache.manifest["contexts"]
    return [
        ContextScores(
            teacher=teacher,
            context_id=context["context_id"],
            name=context["name"],
            weight=params.teachers[teacher] / len(listed),
            transfer=take(context["context_id"], transfer_ids),
            content_free=take(context["context_id"], cache.manifest["content_free"]),
        )
        for context in listed
    ]


def _calibration(
    name: str,
    params: TargetParams,
    teachers: dict[str, TeacherParams],
    task: Task,
    caches: dict[str, ScoreCache],
    contexts: list[ContextScores],
    combination: Combination,
) -> dict[str, Any]:
    return {
        "targets": name,
        "labels": list(task.labels),
        "template": task.params.template,
        "verbalisers": dict(task.params.verbalisers),
        "calibration": params.calibration,
        "calibrations": dict(params.calibrations),
        "average": params.average,
        "temperature": params.temperature,
        "teachers": {
            teacher: {
                "model": teachers[teacher].model,
                "contexts": teachers[teacher].contexts,
                "fingerprint": cache.manifest["fingerprint"],
                "fingerprint_sha256": cache.manifest["fingerprint_sha256"],
            }
            for teacher, cache in caches.items()
        },
        "contexts": [
            {
                "teacher": context.teacher,
                "name": context.name,
                "context_id": context.context_id,
                "weight": float(weight),
                "offsets_nats": offset,
            }
            for context, weight, offset in zip(contexts, combination.weights, _listed(combination.offsets), strict=True)
        ],
    }


def _metrics(
    task: Task,
    caches: dict[str, ScoreCache],
    contexts: list[ContextScores],
    combination: Combination,
    raw: np.ndarray,
    each: np.ndarray,
    target: np.ndarray,
    agreement: np.ndarray,
) -> dict[str, Any]:
    """Label shares before and after calibration, agreement between contexts, and what the caches lost."""

    def shares(probabilities: np.ndarray) -> dict[str, float]:
        counts = np.bincount(probabilities.argmax(-1), minlength=len(task.labels)) / len(probabilities)
        return {label: round(float(share), 6) for label, share in zip(task.labels, counts, strict=True)}

    listed: dict[str, dict[str, Any]] = {teacher: {"weight": 0.0, "contexts": {}} for teacher in caches}
    for number, context in enumerate(contexts):
        entry = listed[context.teacher]
        entry["weight"] = round(entry["weight"] + float(combination.weights[number]), 6)
        entry["contexts"][context.name] = {
            "shares_raw": shares(raw[number]),
            "shares_calibrated": shares(each[number]),
            "offset_nats": {label: round(float(x), 6) for label, x in zip(task.labels, combination.offsets[number], strict=True)},
        }
    return {
        "rows": len(target),
        "labels": list(task.labels),
        "teachers": listed,
        "agreement": round(float(agreement.mean()), 6),
        "label_shares": shares(target),
        "mean_confidence": round(float(target.max(-1).mean()), 6),
        "cache": {teacher: cache_fidelity(cache) for teacher, cache in caches.items()},
    }
