"""Cached scores of one or several teachers become the distributions that students learn.

Calibration is learnt here, on the transfer set, without labels. calibration.json beside the targets says all that is needed to put the same
prompts with the same calibration to new inputs. What a teacher is comes from its cache's manifest, not from params.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.fidelity import kept_mass
from pipeline.cache.folder import CACHES, ScoreCache, cache_manifest, check_belongs, described_task, read_cache
from pipeline.errors import MismatchError
from pipeline.files import Folders, sha256_json, write_json
from pipeline.params import Calibration, TargetParams
from pipeline.schema import TARGETS, read_examples, write_table
from pipeline.targets.calibration import Combination, learn_offsets, normalised
from pipeline.task import Task

COLUMNS = ("context_id", "example_id", "label_logprobs", "tail_mass")
"""All that targets need of a cache; distributions stay on disk."""


@dataclass(frozen=True)
class ContextScores:
    """One teacher's scores in one context: label log-probabilities over the vocabulary, labels sorted."""

    teacher: str
    context_id: str
    name: str
    calibration: Calibration
    weight: float  # of the teacher, divided among its contexts
    transfer: np.ndarray  # [N, L], in the order of the transfer set
    content_free: np.ndarray  # [F, L]


def build_targets(name: str, params: TargetParams, task: Task, folders: Folders) -> None:
    """Write artifacts/targets/NAME: targets.parquet, calibration.json, caches.json; and metrics/targets/NAME.json.

    caches.json names the caches that students of this set may learn whole, by the hash of their manifest: a student that depends on the
    target set then depends on them too. Raises MismatchError if a cache is of another task or lacks a transfer example.
    """
    transfer = read_examples(folders.artifacts / "data" / "transfer.parquet", task.fields)
    ids, sources = [example.example_id for example in transfer], np.array([example.source for example in transfer])
    caches = {teacher: read_cache(folders.artifacts / "teachers" / teacher, COLUMNS) for teacher in params.teachers}
    for teacher, cache in caches.items():
        check_belongs(cache.manifest, {"task": described_task(task)}, folders.artifacts / "teachers" / teacher)
    contexts = [context for teacher, cache in caches.items() for context in _contexts(teacher, cache, params, ids)]
    everywhere = np.arange(len(ids))
    combination = _combination(params, contexts, everywhere)
    rows_of = {source: np.flatnonzero(sources == source) for source in dict.fromkeys(sources.tolist())}
    by_source = (
        {source: _combination(params, contexts, rows) for source, rows in rows_of.items()} if params.calibrate_by == "source" else {}
    )
    raw = np.stack([context.transfer for context in contexts])  # [C, N, L]
    each, target = np.empty_like(raw), np.empty(raw.shape[1:])
    for own, rows in [(by_source[source], rows_of[source]) for source in by_source] or [(combination, everywhere)]:
        each[:, rows], target[rows] = own.each(raw[:, rows]), own.ensemble(raw[:, rows])
    agreement = combination.weights @ (each.argmax(-1) == target.argmax(-1))  # [N]
    probabilities = pa.array(list(target.astype(np.float32)), TARGETS.field("probabilities").type)
    columns = {"example_id": ids, "probabilities": probabilities, "agreement": agreement.astype(np.float32)}
    output = folders.artifacts / "targets" / name
    write_table(pa.table(columns, schema=TARGETS), output / "targets.parquet")
    described = _described(name, params, task, caches, contexts, combination)
    described["by_source"] = {source: _listed(own.offsets) for source, own in by_source.items()}
    write_json(described, output / "calibration.json")
    auxiliary = {teacher: cache_manifest(folders.artifacts / "teachers" / teacher) for teacher in params.auxiliary_caches}
    write_json({teacher: {"manifest_sha256": sha256_json(manifest)} for teacher, manifest in auxiliary.items()}, output / CACHES)
    metrics = _metrics(task, caches, contexts, combination, raw, each, target, agreement)
    write_json(metrics, folders.metrics / "targets" / f"{name}.json")


def _contexts(teacher: str, cache: ScoreCache, params: TargetParams, transfer_ids: list[str]) -> list[ContextScores]:
    """A teacher's cached rows, by context."""
    keys = zip(cache.rows["context_id"].to_pylist(), cache.rows["example_id"].to_pylist(), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    label_logprobs = np.array(cache.rows["label_logprobs"].to_pylist(), dtype=np.float64)

    def take(context: str, ids: list[str]) -> np.ndarray:
        if lacking := [example for example in ids if (context, example) not in row_of]:
            raise MismatchError(
                f"artifacts/teachers/{teacher}: {len(lacking):,} examples of the transfer set are not in it, first {lacking[0][:12]}. "
                f"Run `dvc repro teacher@{teacher}`."
            )
        return label_logprobs[[row_of[context, example] for example in ids]]

    listed = cache.manifest["contexts"]
    return [
        ContextScores(
            teacher=teacher,
            context_id=context["context_id"],
            name=context["name"],
            calibration=params.calibrations.get(teacher, params.calibration),
            weight=params.teachers[teacher] / len(listed),
            transfer=take(context["context_id"], transfer_ids),
            content_free=take(context["context_id"], cache.manifest["content_free"]),
        )
        for context in listed
    ]


def _combination(params: TargetParams, contexts: list[ContextScores], rows: np.ndarray) -> Combination:
    """How the contexts' scores are combined, calibrated on some rows of the transfer set."""
    kinds: list[Calibration] = [context.calibration for context in contexts]
    scores = [(normalised(context.transfer[rows]), normalised(context.content_free)) for context in contexts]
    offsets = [learn_offsets(kind, *of_context) for kind, of_context in zip(kinds, scores, strict=True)]
    weights = np.array([context.weight for context in contexts])
    return Combination(kinds, np.stack(offsets), weights / weights.sum(), params.average, params.temperature)


def _listed(offsets: np.ndarray) -> list[list[float]]:
    return [[round(float(value), 9) for value in row] for row in offsets]


def _described(
    name: str,
    params: TargetParams,
    task: Task,
    caches: dict[str, ScoreCache],
    contexts: list[ContextScores],
    combination: Combination,
) -> dict[str, Any]:
    """calibration.json but for `by_source`. Offsets are in nats, in probability if the context's calibration is `batch`."""
    return {
        "targets": name,
        "labels": list(task.labels),
        "template": task.params.template,
        "verbalisers": dict(sorted(task.params.verbalisers.items())),
        "calibration": params.calibration,
        "calibrations": dict(params.calibrations),
        "average": params.average,
        "temperature": params.temperature,
        "teachers": {
            teacher: {
                "model": cache.manifest["model"],
                "contexts": cache.manifest["contexts"][0]["name"].rpartition("/")[0],
                "dtype": cache.manifest["identity"]["dtype"],
                "cache": cache.manifest["cache"],
                "identity": cache.manifest["identity"],
            }
            for teacher, cache in caches.items()
        },
        "contexts": [
            {
                "teacher": context.teacher,
                "name": context.name,
                "context_id": context.context_id,
                "weight": float(weight),
                "calibration": context.calibration,
                "offsets": offsets,
            }
            for context, weight, offsets in zip(contexts, combination.weights, _listed(combination.offsets), strict=True)
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
        unit = "offset_probability" if context.calibration == "batch" else "offset_nats"
        entry["contexts"][context.name] = {
            "shares_raw": shares(raw[number]),
            "shares_calibrated": shares(each[number]),
            unit: {label: round(float(x), 6) for label, x in zip(task.labels, combination.offsets[number], strict=True)},
        }
    return {
        "rows": len(target),
        "labels": list(task.labels),
        "teachers": listed,
        "agreement": round(float(agreement.mean()), 6),
        "label_shares": shares(target),
        "mean_confidence": round(float(target.max(-1).mean()), 6),
        "cache": {teacher: kept_mass(cache) for teacher, cache in caches.items()},
    }
