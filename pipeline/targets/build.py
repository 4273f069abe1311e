"""Cached scores of one or several teachers become the distributions that students learn.

Calibration is learnt on the transfer set, without labels; how far to trust whom, on the labelled examples, if params say so.
calibration.json beside the targets says all that is needed to put the same prompts with the same calibration to new inputs. What a teacher
is comes from its cache's manifest, not from params.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.cache.folder import CACHES, cache_manifest, check_belongs, described_task, read_cache
from pipeline.errors import MismatchError
from pipeline.files import Folders, read_json, sha256_json, write_json
from pipeline.params import TargetParams
from pipeline.schema import LABELLED, TARGETS, read_examples, read_table, write_table
from pipeline.targets.calibration import Combination, learn_offsets, normalised
from pipeline.targets.learning import (
    Judged,
    Pool,
    cross_validated,
    equal_pool,
    estimated_shares,
    learn_pool,
    log_loss,
    shift_to,
)
from pipeline.task import Task

DIGITS = 6


def build_targets(name: str, params: TargetParams, task: Task, folders: Folders) -> None:
    """Write artifacts/targets/NAME: targets.parquet, calibration.json, caches.json; and metrics/targets/NAME.json.

    caches.json names the caches that students of this set may learn whole, by the hash of their manifest: a student that depends on the
    target set then depends on them too. Raises MismatchError if a cache is of another task or lacks a transfer example.
    """
    transfer = read_examples(folders.artifacts / "data" / "transfer.parquet", task.fields)
    ids, sources = [example.example_id for example in transfer], [example.source for example in transfer]
    teachers, asked, total = folders.artifacts / "teachers", described_task(task), sum(params.teachers.values())
    caches = {teacher: read_cache(teachers / teacher, ["context_id", "example_id", "label_logprobs"]) for teacher in params.teachers}
    contexts, scores, free = [], [], []  # C: of a teacher after the other
    for number, (teacher, cache) in enumerate(caches.items()):
        check_belongs(cache.manifest, {"task": asked}, teachers / teacher)
        about = {
            "teacher": teacher,
            "weight": params.teachers[teacher] / total / len(cache.manifest["contexts"]),
            "calibration": params.calibrations.get(teacher, params.calibration),
            "voter": number if params.weights == "learned" else 0,
        }
        contexts += [about | {"name": context["name"], "context_id": context["context_id"]} for context in cache.manifest["contexts"]]
        scores.append(scores_in_contexts(teacher, cache.rows, cache.manifest["contexts"], ids))
        free.extend(scores_in_contexts(teacher, cache.rows, cache.manifest["contexts"], cache.manifest["content_free"]))
    raw = np.concatenate(scores)  # [C, N, L]
    combinations = _combinations(params, contexts, raw, free, sources)
    voters = _by_source(Combination.averaged, combinations, raw, sources)  # [V, N, L]
    judged = _judged(task, contexts, combinations, folders) if params.is_learned else None
    pool, measured = _pool(params, task, voters, judged, folders)
    combination, each = replace(combinations[""], pool=pool), _by_source(Combination.each, combinations, raw, sources)
    target = np.exp(pool.log_probabilities(voters))
    agreement = combination.shares @ (each.argmax(-1) == target.argmax(-1))  # [N]
    output = folders.artifacts / "targets" / name
    probabilities = pa.array(list(target.astype(np.float32)), TARGETS.field("probabilities").type)
    columns = {"example_id": ids, "probabilities": probabilities, "agreement": agreement.astype(np.float32)}
    write_table(pa.table(columns, schema=TARGETS), output / "targets.parquet")
    calibration = {
        "targets": name,
        "labels": list(task.labels),
        "template": asked["template"],
        "verbalisers": asked["verbalisers"],
        "average": params.average,
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
        "contexts": [  # offsets are in nats; in probability if the calibration is `batch`
            context | {"offsets": offsets} for context, offsets in zip(contexts, _listed(combination.offsets), strict=True)
        ],
        "by_source": {source: _listed(own.offsets) for source, own in combinations.items() if source},
        "scales": _listed(pool.scales),
        "bias": _listed(pool.bias),
    }
    write_json(calibration, output / "calibration.json")
    auxiliary = {teacher: {"manifest_sha256": sha256_json(cache_manifest(teachers / teacher))} for teacher in params.auxiliary_caches}
    write_json(auxiliary, output / CACHES)
    described: dict[str, Any] = {teacher: {"weight": 0.0, "contexts": {}} for teacher in caches}
    for number, context in enumerate(contexts):
        entry, unit = described[context["teacher"]], "offset_probability" if context["calibration"] == "batch" else "offset_nats"
        entry["weight"] = round(entry["weight"] + float(combination.shares[number]), DIGITS)
        entry["contexts"][context["name"]] = {
            "shares_raw": _shares(task.labels, raw[number]),
            "shares_calibrated": _shares(task.labels, each[number]),
            unit: _by_label(task.labels, combination.offsets[number]),
        }
    metrics = {
        "rows": len(ids),
        "labels": list(task.labels),
        "teachers": described,
        "scale": round(float(pool.scales.sum()), DIGITS),
        "bias_nats": _by_label(task.labels, pool.bias),
        "agreement": round(float(agreement.mean()), DIGITS),
        "label_shares": _shares(task.labels, target),
        "mean_confidence": round(float(target.max(-1).mean()), DIGITS),
        **measured,
    }
    write_json(metrics, folders.metrics / "targets" / f"{name}.json")


def _combinations(
    params: TargetParams, contexts: Sequence[Mapping[str, Any]], raw: np.ndarray, free: Sequence[np.ndarray], sources: Sequence[str]
) -> dict[str, Combination]:
    """Source → how contexts are combined, calibrated on its rows of the transfer set; under "" on all rows. Nothing is learnt yet.

    `raw` [C, N, L] are scores of the transfer set, `free` [C, F, L] those of inputs without content.
    """
    named = dict.fromkeys(sources) if params.calibrate_by == "source" else ()
    places = {"": [*range(len(sources))], **{name: [at for at, source in enumerate(sources) if source == name] for name in named}}
    kinds, weights, voters = ([context[key] for context in contexts] for key in ("calibration", "weight", "voter"))
    found, pool = {}, equal_pool(max(voters) + 1, raw.shape[-1])
    for source, rows in places.items():
        scored = zip(kinds, normalised(raw[:, rows]), map(normalised, free), strict=True)
        offsets = np.stack([learn_offsets(kind, transfer, content_free) for kind, transfer, content_free in scored])
        found[source] = Combination(kinds, offsets, np.array(weights), params.average, voters, pool)
    return found


def _by_source(
    method: Callable[[Combination, np.ndarray], np.ndarray],
    combinations: Mapping[str, Combination],
    raw: np.ndarray,
    sources: Sequence[str],
) -> np.ndarray:
    """What a method makes of scores [C, N, L], each row with the combination of its source: [C or V, N, L]."""
    places = {name: [at for at, source in enumerate(sources) if source == name] for name in dict.fromkeys(sources)}
    parts = [method(combinations.get(name, combinations[""]), raw[:, rows]) for name, rows in places.items()]
    return np.concatenate(parts, axis=1)[:, np.argsort(np.concatenate([*places.values()]))]


def _judged(task: Task, contexts: Sequence[Mapping[str, Any]], combinations: Mapping[str, Combination], folders: Folders) -> Judged | None:
    """The labelled examples, and what the voters say of them without having seen them; None if each label has one example."""
    examples = read_examples(folders.artifacts / "data" / "demonstrations.parquet", task.fields)
    teachers = dict.fromkeys(context["teacher"] for context in contexts)
    tables = {one: read_table(folders.artifacts / "labelled" / f"{one}.parquet", LABELLED) for one in teachers}
    judged = set[str]().union(*(table["example_id"].to_pylist() for table in tables.values()))  # the same of every teacher
    if not (examples := [example for example in examples if example.example_id in judged]):
        return None
    ids, gold = [example.example_id for example in examples], np.array([task.labels.index(str(example.label)) for example in examples])
    own = {teacher: [context for context in contexts if context["teacher"] == teacher] for teacher in tables}
    scores = np.concatenate([scores_in_contexts(teacher, table, own[teacher], ids) for teacher, table in tables.items()])
    return Judged(_by_source(Combination.averaged, combinations, scores, [example.source for example in examples]), gold)


def _pool(params: TargetParams, task: Task, voters: np.ndarray, judged: Judged | None, folders: Folders) -> tuple[Pool, dict[str, Any]]:
    """The pool of `voters` [V, N, L] on the transfer set, and what the metrics say of it: `labelled` and `prior`, if these have a say."""
    pool, measured = equal_pool(len(voters), voters.shape[-1]), dict[str, Any]()
    if params.temperature != "learned":
        pool = replace(pool, scales=pool.scales / params.temperature)
    if judged is not None:
        before, pool = pool.log_probabilities(judged.voters), learn_pool(judged)
        alone = zip(params.teachers, judged.voters, strict=True) if params.weights == "learned" else ()
        measured["labelled"] = {
            "rows": len(judged.gold),
            "before": _figures(before, judged.gold),
            "after": _figures(cross_validated(judged), judged.gold),
            "teachers": {teacher: _figures(own, judged.gold) for teacher, own in alone},
        }
    elif params.is_learned:
        print("Nothing is learnt from labels: with one example of each, no teacher can be judged on others than it has seen.")
    if params.prior is None or (params.prior == "estimate" and judged is None):
        return pool, measured
    log_p = pool.log_probabilities(voters)
    interval: dict[str, Any] = {}
    if params.prior == "estimate":
        assert judged is not None
        estimate = estimated_shares(voters, judged)
        shares = estimate.shares
        interval = {"low": _by_label(task.labels, estimate.low), "high": _by_label(task.labels, estimate.high)}
    else:
        counts = read_json(folders.artifacts / "data" / "label_counts.json") if params.prior == "labelled" else params.prior
        stated = np.array([1.0 if counts == "equal" else counts[label] for label in task.labels])
        shares = stated / stated.sum()
    pool = replace(pool, bias=pool.bias + shift_to(shares, log_p))
    said = {"shares": _by_label(task.labels, shares), "before": _by_label(task.labels, np.exp(log_p).mean(0)), **interval}
    measured["prior"] = {"kind": params.prior if isinstance(params.prior, str) else "stated", **said}
    return pool, measured


def _figures(log_p: np.ndarray, gold: np.ndarray) -> dict[str, float]:
    """How good log-probabilities [M, L] of labelled examples are."""
    return {"log_loss": round(log_loss(log_p, gold), DIGITS), "accuracy": round(float((log_p.argmax(-1) == gold).mean()), DIGITS)}


def scores_in_contexts(teacher: str, rows: pa.Table, contexts: Sequence[Mapping[str, Any]], examples: Sequence[str]) -> np.ndarray:
    """Label log-probabilities of some examples in each of a teacher's contexts, [contexts, examples, L] float64."""
    keys = zip(rows["context_id"].to_pylist(), rows["example_id"].to_pylist(), strict=True)
    row_of = {key: row for row, key in enumerate(keys)}
    ids = [context["context_id"] for context in contexts]
    if lacking := [example for example in examples if any((context, example) not in row_of for context in ids)]:
        raise MismatchError(
            f"artifacts/teachers/{teacher}: {len(lacking):,} examples of the transfer set are not in it, first {lacking[0][:12]}. "
            f"Run `dvc repro teacher@{teacher}`."
        )
    label_logprobs = np.array(rows["label_logprobs"].to_pylist(), dtype=np.float64)
    return label_logprobs[np.array([[row_of[context, example] for example in examples] for context in ids])]


def _listed(values: np.ndarray) -> Any:
    """Numbers for a JSON file, nested as the array is."""
    return np.round(values, 9).tolist()


def _by_label(labels: Sequence[str], values: np.ndarray) -> dict[str, float]:
    """Label → its value in an array [L]."""
    return {label: round(float(value), DIGITS) for label, value in zip(labels, values, strict=True)}


def _shares(labels: Sequence[str], probabilities: np.ndarray) -> dict[str, float]:
    """Label → share of the rows in which it is the most probable."""
    return _by_label(labels, np.bincount(probabilities.argmax(-1), minlength=len(labels)) / len(probabilities))
