"""Cached scores of one or several teachers become the distributions that students learn.

Calibration is learnt here, on the transfer set, without labels. calibration.json beside the targets says all that is needed to put the same
prompts with the same calibration to new inputs. What a teacher is comes from its cache's manifest, not from params.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.folder import CACHES, ScoreCache, cache_manifest, check_belongs, described_task, read_cache
from pipeline.errors import MismatchError
from pipeline.files import Folders, sha256_json, write_json
from pipeline.params import Calibration, TargetParams
from pipeline.schema import TARGETS, read_examples, write_table
from pipeline.targets.calibration import Combination, learn_offsets, normalised
from pipeline.task import Task


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
    teachers, asked = folders.artifacts / "teachers", described_task(task)
    caches = {teacher: read_cache(teachers / teacher, ["context_id", "example_id", "label_logprobs"]) for teacher in params.teachers}
    for teacher, cache in caches.items():
        check_belongs(cache.manifest, {"task": asked}, teachers / teacher)
    contexts = [context for teacher, cache in caches.items() for context in _contexts(teacher, cache, params, ids)]
    everywhere = np.ones(len(ids), dtype=bool)
    combination = _combination(params, contexts, everywhere)
    rows_of = {source: sources == source for source in (dict.fromkeys(sources.tolist()) if params.calibrate_by == "source" else ())}
    by_source = {source: _combination(params, contexts, rows) for source, rows in rows_of.items()}
    raw = np.stack([context.transfer for context in contexts])  # [C, N, L]
    each, target = np.empty_like(raw), np.empty(raw.shape[1:])
    for own, rows in [(by_source[source], rows_of[source]) for source in by_source] or [(combination, everywhere)]:
        each[:, rows], target[rows] = own.each(raw[:, rows]), own.ensemble(raw[:, rows])
    agreement = combination.weights @ (each.argmax(-1) == target.argmax(-1))  # [N]
    output = folders.artifacts / "targets" / name
    probabilities = pa.array(list(target.astype(np.float32)), TARGETS.field("probabilities").type)
    columns = {"example_id": ids, "probabilities": probabilities, "agreement": agreement.astype(np.float32)}
    write_table(pa.table(columns, schema=TARGETS), output / "targets.parquet")
    manifests = {teacher: cache.manifest for teacher, cache in caches.items()}
    calibration = {
        "targets": name,
        "labels": list(task.labels),
        "template": asked["template"],
        "verbalisers": asked["verbalisers"],
        **params.model_dump(mode="json", include={"calibration", "calibrations", "average", "temperature"}),
        "teachers": {
            teacher: {
                "model": manifest["model"],
                "contexts": manifest["contexts"][0]["name"].rpartition("/")[0],
                "dtype": manifest["identity"]["dtype"],
                "cache": manifest["cache"],
                "identity": manifest["identity"],
            }
            for teacher, manifest in manifests.items()
        },
        "contexts": [
            {
                "teacher": context.teacher,
                "name": context.name,
                "context_id": context.context_id,
                "weight": float(weight),
                "calibration": context.calibration,
                "offsets": offsets,  # in nats; in probability if the calibration is `batch`
            }
            for context, weight, offsets in zip(contexts, combination.weights, _listed(combination), strict=True)
        ],
        "by_source": {source: _listed(own) for source, own in by_source.items()},
    }
    write_json(calibration, output / "calibration.json")
    auxiliary = {teacher: {"manifest_sha256": sha256_json(cache_manifest(teachers / teacher))} for teacher in params.auxiliary_caches}
    write_json(auxiliary, output / CACHES)
    metrics = {
        "rows": len(ids),
        "labels": list(task.labels),
        "teachers": _teachers(task.labels, contexts, combination, raw, each),
        "agreement": round(float(agreement.mean()), 6),
        "label_shares": _shares(task.labels, target),
        "mean_confidence": round(float(target.max(-1).mean()), 6),
    }
    write_json(metrics, folders.metrics / "targets" / f"{name}.json")


def _contexts(teacher: str, cache: ScoreCache, params: TargetParams, transfer_ids: list[str]) -> Iterator[ContextScores]:
    """A teacher's cached rows, by context."""
    keys = zip(cache.rows["context_id"].to_pylist(), cache.rows["example_id"].to_pylist(), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    label_logprobs = np.array(cache.rows["label_logprobs"].to_pylist(), dtype=np.float64)
    for context in cache.manifest["contexts"]:
        context_id, content_free = context["context_id"], cache.manifest["content_free"]
        if lacking := [example for example in (*transfer_ids, *content_free) if (context_id, example) not in row_of]:
            raise MismatchError(
                f"artifacts/teachers/{teacher}: {len(lacking):,} examples of the transfer set are not in it, first {lacking[0][:12]}. "
                f"Run `dvc repro teacher@{teacher}`."
            )
        yield ContextScores(
            teacher=teacher,
            context_id=context_id,
            name=context["name"],
            calibration=params.calibrations.get(teacher, params.calibration),
            weight=params.teachers[teacher] / len(cache.manifest["contexts"]),
            transfer=label_logprobs[[row_of[context_id, example] for example in transfer_ids]],
            content_free=label_logprobs[[row_of[context_id, example] for example in content_free]],
        )


def _combination(params: TargetParams, contexts: list[ContextScores], rows: np.ndarray) -> Combination:
    """How the contexts' scores are combined, calibrated on some rows of the transfer set: a mask [N]."""
    offsets = [
        learn_offsets(context.calibration, normalised(context.transfer[rows]), normalised(context.content_free)) for context in contexts
    ]
    weights = np.array([context.weight for context in contexts])
    kinds: list[Calibration] = [context.calibration for context in contexts]
    return Combination(kinds, np.stack(offsets), weights / weights.sum(), params.average, params.temperature)


def _listed(combination: Combination) -> list[list[float]]:
    return [[round(float(value), 9) for value in row] for row in combination.offsets]


def _teachers(
    labels: Sequence[str], contexts: list[ContextScores], combination: Combination, raw: np.ndarray, each: np.ndarray
) -> dict[str, Any]:
    """Each teacher's weight, and label shares in each of its contexts before and after calibration."""
    found: dict[str, Any] = {context.teacher: {"weight": 0.0, "contexts": {}} for context in contexts}
    for number, context in enumerate(contexts):
        entry, unit = found[context.teacher], "offset_probability" if context.calibration == "batch" else "offset_nats"
        entry["weight"] = round(entry["weight"] + float(combination.weights[number]), 6)
        entry["contexts"][context.name] = {
            "shares_raw": _shares(labels, raw[number]),
            "shares_calibrated": _shares(labels, each[number]),
            unit: {label: round(float(offset), 6) for label, offset in zip(labels, combination.offsets[number], strict=True)},
        }
    return found


def _shares(labels: Sequence[str], probabilities: np.ndarray) -> dict[str, float]:
    """Label → share of the rows in which it is the most probable."""
    counts = np.bincount(probabilities.argmax(-1), minlength=len(labels)) / len(probabilities)
    return {label: round(float(share), 6) for label, share in zip(labels, counts, strict=True)}
