"""Cached scores of one or several teachers become the distributions that students learn.

Calibration is learnt here, on the transfer set, without labels. calibration.json beside the targets says all that is needed to put the same
prompts with the same calibration to new inputs. What a teacher is comes from its cache's manifest, not from params.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.folder import CACHES, ScoreCache, cache_manifest, check_belongs, described_task, read_cache
from pipeline.errors import MismatchError
from pipeline.files import Folders, sha256_json, write_json
from pipeline.params import TargetParams
from pipeline.schema import TARGETS, read_examples, write_table
from pipeline.targets.calibration import Combination, learn_offsets, normalised
from pipeline.task import Task


def build_targets(name: str, params: TargetParams, task: Task, folders: Folders) -> None:
    """Write artifacts/targets/NAME: targets.parquet, calibration.json, caches.json; and metrics/targets/NAME.json.

    caches.json names the caches that students of this set may learn whole, by the hash of their manifest: a student that depends on the
    target set then depends on them too. Raises MismatchError if a cache is of another task or lacks a transfer example.
    """
    transfer = read_examples(folders.artifacts / "data" / "transfer.parquet", task.fields)
    ids, sources = [example.example_id for example in transfer], np.array([example.source for example in transfer])
    teachers, asked = folders.artifacts / "teachers", described_task(task)
    caches = {teacher: read_cache(teachers / teacher, ["context_id", "example_id", "label_logprobs"]) for teacher in params.teachers}
    contexts, scores, free = [], [], []  # C: of a teacher after the other
    for teacher, cache in caches.items():
        check_belongs(cache.manifest, {"task": asked}, teachers / teacher)
        kind, weight = params.calibrations.get(teacher, params.calibration), params.teachers[teacher] / len(cache.manifest["contexts"])
        for context in cache.manifest["contexts"]:
            about = {"teacher": teacher, "name": context["name"], "context_id": context["context_id"]}
            contexts.append({**about, "weight": weight, "calibration": kind})
        scores.append(_scores(teacher, cache, ids))
        free.extend(_scores(teacher, cache, cache.manifest["content_free"]))
    raw = np.concatenate(scores)  # [C, N, L]

    def combination_on(rows: np.ndarray) -> Combination:
        """How contexts are combined, calibrated on some rows of the transfer set: a mask [N]."""
        kinds, weights = [context["calibration"] for context in contexts], np.array([context["weight"] for context in contexts])
        scored = zip(kinds, normalised(raw[:, rows]), map(normalised, free), strict=True)
        offsets = [learn_offsets(kind, transfer, content_free) for kind, transfer, content_free in scored]
        return Combination(kinds, np.stack(offsets), weights / weights.sum(), params.average, params.temperature)

    everywhere = np.ones(len(ids), dtype=bool)
    combination = combination_on(everywhere)
    named = dict.fromkeys(sources.tolist()) if params.calibrate_by == "source" else ()
    by_source = {source: combination_on(sources == source) for source in named}
    each, target = np.empty_like(raw), np.empty(raw.shape[1:])
    for own, rows in [(one, sources == source) for source, one in by_source.items()] or [(combination, everywhere)]:
        each[:, rows], target[rows] = own.each(raw[:, rows]), own.ensemble(raw[:, rows])
    agreement = combination.weights @ (each.argmax(-1) == target.argmax(-1))  # [N]
    output = folders.artifacts / "targets" / name
    probabilities = pa.array(list(target.astype(np.float32)), TARGETS.field("probabilities").type)
    columns = {"example_id": ids, "probabilities": probabilities, "agreement": agreement.astype(np.float32)}
    write_table(pa.table(columns, schema=TARGETS), output / "targets.parquet")
    calibration = {
        "targets": name,
        "labels": list(task.labels),
        "template": asked["template"],
        "verbalisers": asked["verbalisers"],
        **params.model_dump(mode="json", include={"calibration", "calibrations", "average", "temperature"}),
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
            {**context, "weight": float(weight), "offsets": offsets}  # in nats; in probability if the calibration is `batch`
            for context, weight, offsets in zip(contexts, combination.weights, _listed(combination), strict=True)
        ],
        "by_source": {source: _listed(own) for source, own in by_source.items()},
    }
    write_json(calibration, output / "calibration.json")
    auxiliary = {teacher: {"manifest_sha256": sha256_json(cache_manifest(teachers / teacher))} for teacher in params.auxiliary_caches}
    write_json(auxiliary, output / CACHES)
    described: dict[str, Any] = {teacher: {"weight": 0.0, "contexts": {}} for teacher in caches}
    for number, context in enumerate(contexts):
        entry, unit = described[context["teacher"]], "offset_probability" if context["calibration"] == "batch" else "offset_nats"
        entry["weight"] = round(entry["weight"] + float(combination.weights[number]), 6)
        entry["contexts"][context["name"]] = {
            "shares_raw": _shares(task.labels, raw[number]),
            "shares_calibrated": _shares(task.labels, each[number]),
            unit: {label: round(float(offset), 6) for label, offset in zip(task.labels, combination.offsets[number], strict=True)},
        }
    metrics = {
        "rows": len(ids),
        "labels": list(task.labels),
        "teachers": described,
        "agreement": round(float(agreement.mean()), 6),
        "label_shares": _shares(task.labels, target),
        "mean_confidence": round(float(target.max(-1).mean()), 6),
    }
    write_json(metrics, folders.metrics / "targets" / f"{name}.json")


def _scores(teacher: str, cache: ScoreCache, examples: Sequence[str]) -> np.ndarray:
    """Label log-probabilities of some examples in each of a teacher's contexts, [contexts, examples, L] float64."""
    keys = zip(cache.rows["context_id"].to_pylist(), cache.rows["example_id"].to_pylist(), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    contexts = [context["context_id"] for context in cache.manifest["contexts"]]
    if lacking := [example for example in examples if any((context, example) not in row_of for context in contexts)]:
        raise MismatchError(
            f"artifacts/teachers/{teacher}: {len(lacking):,} examples of the transfer set are not in it, first {lacking[0][:12]}. "
            f"Run `dvc repro teacher@{teacher}`."
        )
    label_logprobs = np.array(cache.rows["label_logprobs"].to_pylist(), dtype=np.float64)
    return label_logprobs[np.array([[row_of[context, example] for example in examples] for context in contexts])]


def _listed(combination: Combination) -> list[list[float]]:
    return [[round(float(value), 9) for value in row] for row in combination.offsets]


def _shares(labels: Sequence[str], probabilities: np.ndarray) -> dict[str, float]:
    """Label → share of the rows in which it is the most probable."""
    counts = np.bincount(probabilities.argmax(-1), minlength=len(labels)) / len(probabilities)
    return {label: round(float(share), 6) for label, share in zip(labels, counts, strict=True)}
