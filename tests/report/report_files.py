"""A made-up run for the report's tests: predictions drawn at random with an accuracy we choose, and the metrics other stages would write.

Nothing here was measured. `python tests/report/report_files.py FOLDER` writes it and builds the page, to look at it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from ruamel.yaml import YAML

from pipeline.files import sha256_text
from pipeline.params import Params, load_params, parse_params
from pipeline.report.build import build_report
from pipeline.schema import PREDICTIONS, write_table
from pipeline.schema import examples as example_schema

PROJECT = Path(__file__).resolve().parents[2]
ACCURACY = {  # invented, for movie, amazon, tweets, editorials
    "zero_shot": (0.81, 0.86, 0.91, 0.89),
    "icl": (0.56, 0.53, 0.55, 0.52),
    "icl_calibrated": (0.83, 0.73, 0.74, 0.65),
    "icl_ensemble": (0.87, 0.75, 0.78, 0.69),
    "teacher": (0.87, 0.81, 0.85, 0.90),
    "cd": (0.87, 0.86, 0.85, 0.93),
    "pbft": (0.66, 0.59, 0.56, 0.63),
}
ONE_SIDED = {"icl"}
EXAMPLES = 200


def shipped_params(resamples: int = 100) -> Params:
    """params.yaml as it is shipped, with a bootstrap that takes no time."""
    raw = YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    raw["evaluation"]["bootstrap"] = resamples
    return parse_params(raw)


def _json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _blocks(params: Params, method: str) -> list[str]:
    """The `context_id`s of a method's rows: contexts that are answered in each, or the seeds of a student."""
    if method in params.baselines:
        return [sha256_text(f"orders/{context}") for context in range(4)] if params.baselines[method].contexts == "each" else [""]
    seeds = params.students[method].seeds or ()
    return [f"seed {seed}" for seed in seeds] if len(seeds) > 1 else [""]


def prediction_rows(params: Params, method: str, examples: int = EXAMPLES) -> list[dict[str, Any]]:
    """Rows of one method: right with the chosen chance, wrong on the same hard examples as the other methods where it can be."""
    labels = list(params.task.verbalisers)
    blocks = _blocks(params, method)
    rows = []
    for s, name in enumerate(params.data.evaluation):
        accuracy = ACCURACY.get(method, (0.75,) * 4)[s % 4]
        rng = np.random.default_rng(s)
        gold, hardness = rng.integers(len(labels), size=examples), rng.random(examples)
        own = np.random.default_rng([s, len(method), *method.encode()])
        for b, block in enumerate(blocks):
            level = np.clip(accuracy + 0.04 * (b - (len(blocks) - 1) / 2), 0, 1)
            right = 0.6 * hardness + 0.4 * own.random(examples)
            right = right <= np.quantile(right, level)
            for i in range(examples):
                answer = gold[i] if right[i] else (gold[i] + 1) % len(labels)
                if method in ONE_SIDED and own.random() < 0.85:
                    answer = 1
                top = 1 / len(labels) + (1 - 1 / len(labels)) * own.beta(3, 2)
                probabilities = np.full(len(labels), (1 - top) / (len(labels) - 1))
                probabilities[answer] = top
                rows.append(
                    {
                        "set": name,
                        "context_id": block,
                        "example_id": sha256_text(f"{name}/{i}"),
                        "label": labels[gold[i]],
                        "predicted": labels[answer],
                        "probabilities": probabilities.tolist(),
                    }
                )
    return rows


def write_predictions(params: Params, root: Path, examples: int = EXAMPLES) -> None:
    """All that the report cannot do without."""
    for method in [*params.baselines, *params.students]:
        table = pa.Table.from_pylist(prediction_rows(params, method, examples), schema=PREDICTIONS)
        write_table(table, root / "artifacts" / "predictions" / f"{method}.parquet")


def by_demonstrations(model: str) -> list[dict[str, Any]]:
    """Made-up cost of 0 to 32 demonstrations; 32 do not fit."""
    rows: list[dict[str, Any]] = [
        {"model": f"models/{model}", "demonstrations": n, "context_tokens": 25 * n, "prompt_tokens": 33.1 + 25 * n}
        | {
            "latency_ms": 55.5 + 23 * n,
            "latency_p95_ms": 59.1 + 24 * n,
            "peak_rss_bytes": 1_061_318_656 + 5_000_000 * n,
            "throughput": None,
        }
        | ({"repeated": True} if n == 16 else {})
        for n in (0, 4, 8, 16)
    ]
    return [*rows, {"model": f"models/{model}", "demonstrations": 32, "context_tokens": 4000, "too_long_for": 2048}]


def write_metrics(params: Params, root: Path) -> None:
    """What other stages would leave; costs are of every method but `icl_ensemble`, and of another model for `icl`."""
    metrics, labels = root / "metrics", list(params.task.verbalisers)
    for i, method in enumerate([*params.baselines, *params.students]):
        student = method in params.students
        subject = sha256_text(method)
        _json(metrics / "eval" / f"{method}.json", {"method": method, "subject": subject})
        if method == "icl_ensemble":
            continue
        _json(
            metrics / "cost" / f"{method}.json",
            {
                "measured": {"subject": "0" * 64 if method == "icl" else subject},
                "prompt_tokens": 26.4 if student or method == "zero_shot" else 506.8 * (1 + 3 * (method == "teacher")),
                "latency_ms": 31.0 if student else 140.0 + 60 * i,
                "latency_p95_ms": 40.5 if student else 190.0 + 60 * i,
                "peak_rss_bytes": 911_000_000 if student else 1_220_000_000,
                "parameters": 113_142_528 if student else 134_515_008,
                "weights_bytes": 452_570_112 if student else 538_060_032,
                "forward_passes": 1 if student else 5,
                "disk_bytes": 457_000_000,
                "throughput": {"examples": 64, "examples_per_second": 81.2, "engine": "shared_prefix"},
                "by_demonstrations": [] if student else by_demonstrations(next(iter(params.models))),
            },
        )
    for name, target in params.targets.items():
        teachers = {}
        for t in target.teachers:
            count = params.contexts[params.teachers[t].contexts].count
            contexts = {
                f"{params.teachers[t].contexts}/{c}": {
                    "shares_raw": dict(zip(labels, (0.08 + 0.02 * c, 0.92 - 0.02 * c), strict=False)),
                    "shares_calibrated": dict(zip(labels, (0.49, 0.51), strict=False)),
                    "offset_nats": dict(zip(labels, (0.81, -0.81), strict=False)),
                }
                for c in range(count)
            }
            teachers[t] = {"weight": 1.0, "contexts": contexts}
        _json(
            metrics / "targets" / f"{name}.json",
            {
                "rows": 1200,
                "labels": labels,
                "teachers": teachers,
                "agreement": 0.82,
                "label_shares": dict.fromkeys(labels, 0.5),
                "cache": {
                    t: {
                        "rows": 1205 * len(entry["contexts"]),
                        "top_k": 32,
                        "bytes_per_row": 241.5,
                        "retained_mass_mean": 0.9912,
                        "retained_mass_p01": 0.91,
                        "retained_mass_min": 0.871,
                        "verbaliser_mass_mean": 0.62,
                    }
                    for t, entry in teachers.items()
                },
            },
        )
    for s, name in enumerate(params.students):
        entry = params.students[name]
        _json(
            metrics / "train" / f"{name}.json",
            {"steps": entry.steps, "final_loss": 0.071 + s, "parameters": 113_142_528, "trained_parameters": 113_142_528, "layers": 24},
        )
        steps = np.arange(1, entry.steps + 1)
        loss = 0.06 + 0.6 * np.exp(-steps / (entry.steps / 5)) + np.random.default_rng(s).normal(0, 0.03, len(steps)) ** 2
        path = metrics / "curves" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{step},{value:.6f},{entry.learning_rate}" for step, value in zip(steps, loss, strict=True)]
        path.write_text("\n".join(["step,loss,learning_rate", *lines]) + "\n", encoding="utf-8")
        _json(
            root / "artifacts" / "students" / name / "provenance.json",
            {"base": entry.base, "weights_sha256": sha256_text(name), "learn_from": entry.learn_from},
        )
    for name in params.teachers:
        _json(
            root / "artifacts" / "scores" / name / "manifest.json",
            {
                "schema_version": 1,
                "fingerprint": {"weights": sha256_text("w"), "tokenizer": sha256_text("t"), "dtype": "float32", "top_k": 32},
                "totals": {"rows": 4800, "shards": 2},
            },
        )
    for name in params.models:
        _json(root / "artifacts" / "models" / name / "source.json", {"licence": "Apache-2.0", "content_sha256": "ab" * 32})
    source = {
        "rows": 10605,
        "blank_lines": 0,
        "quarantined": {"empty": 2, "not UTF-8": 1},
        "left_out_by_label_rule": 5310,
        "exact_repeats_removed": 12,
        "conflicting_labels_removed": 2,
        "examples": 5278,
    }
    drawn = {"drawn": 16, "labels": {"negative": 8, "positive": 8}, "copies_of_evaluation_removed": {"movie": 0}}
    _json(
        metrics / "prepare.json",
        {
            "sources": dict.fromkeys(params.data.sources, source),
            "roles": {"demonstrations": drawn, "transfer": {"drawn": 1200, "copies_of_evaluation_removed": {"movie": 7, "amazon": 0}}},
            "leaks_left": 0,
            "contexts": {"none": {"tokens": {"none/0": 0}}, "orders": {"tokens": {f"orders/{i}": 478 + i for i in range(4)}}},
        },
    )


def write_texts(params: Params, root: Path, examples: int = EXAMPLES) -> None:
    """The evaluation sets' texts, and two rows that were set aside."""
    labels, fields = list(params.task.verbalisers), params.task.fields
    for s, name in enumerate(params.data.evaluation):
        gold = np.random.default_rng(s).integers(len(labels), size=examples)
        rows = [
            {
                "example_id": sha256_text(f"{name}/{i}"),
                "label": labels[gold[i]],
                "source": params.data.evaluation[name].source,
                "line": i + 1,
                **{
                    field: f"Made-up {field} {i} of {name}: the plot is thin, the acting is not <b>bold</b> & it drags." for field in fields
                },
            }
            for i in range(examples)
        ]
        write_table(pa.Table.from_pylist(rows, schema=example_schema(fields)), root / "artifacts/data/evaluation" / f"{name}.parquet")
    bad = [
        {"source": "movie", "file": "movie.tsv", "line": 17, "field": "text", "reason": "empty", "value": ""},
        {"source": "movie", "file": "movie.tsv", "line": 40, "field": "", "reason": "not UTF-8", "value": "caf\ufffd"},
    ]
    (root / "artifacts/data/quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad), encoding="utf-8")


def write_evaluation(params: Params, root: Path, examples: int = EXAMPLES) -> None:
    """Details, comparisons, break-even and risk checks, in the shapes of the stages `evaluate`, `compare` and `check`."""
    metrics, labels, reference = root / "metrics", list(params.task.verbalisers), params.evaluation.reference
    for method in [*params.baselines, *params.students]:
        rows = prediction_rows(params, method, examples)
        sets, slices = {}, []
        for name, entry in params.data.evaluation.items():
            own = [row for row in rows if row["set"] == name]
            bins = []
            for b in range(15):
                part = [row for row in own if b / 15 < max(row["probabilities"]) <= (b + 1) / 15]
                if part:
                    right = float(np.mean([row["label"] == row["predicted"] for row in part]))
                    sure = float(np.mean([max(row["probabilities"]) for row in part]))
                    bins.append(
                        {"low": round(b / 15, 6), "high": round((b + 1) / 15, 6), "n": len(part), "confidence": sure, "accuracy": right}
                    )
            counts = {g: {p: sum(row["label"] == g and row["predicted"] == p for row in own) for p in labels} for g in labels}
            sets[name] = {"reliability": bins, "confusion": counts}
            for label in labels:
                total = sum(counts[label].values())
                accuracy = counts[label][label] / max(1, total)
                one = {"dimension": "label", "slice": label, "domain": entry.domain, "n": total, "accuracy": accuracy}
                slices.append({**one, "set": name, "ci95": [max(0, accuracy - 0.1), min(1, accuracy + 0.1)]})
        for domain in ("in", "out"):
            for dimension, slice_names in {"label": labels, "length": ["short", "middle", "long"], "heuristic": ["overlap"]}.items():
                for i, slice_name in enumerate(slice_names):
                    one = {"dimension": dimension, "slice": slice_name, "domain": domain, "set": None, "n": 100 + i}
                    slices.append({**one, "accuracy": 0.8 - 0.04 * i, "ci95": [0.7, 0.9], "words": None})
        _json(metrics / "detail" / f"{method}.json", {"method": method, "sets": sets, "slices": slices})
    others = [name for name in [*params.students, *params.baselines] if name != reference]
    agreed = {"n": examples, "agreement": 0.9, "agreement_ci95": [0.87, 0.93], "kl_nats": 0.123, "kl_ci95": [0.1, 0.15]}
    pairs = [
        {"method": a, "other": b, "domain": domain, "set": None, "n": examples, "difference": 0.01, "ci95": [-0.01, 0.03], "clear": False}
        | {"only_method_right": 40, "only_other_right": 33, "mcnemar_p": 0.4828}
        for domain in ("in", "out")
        for a, b in [(name, reference) for name in others]
    ]
    to_reference = {name: dict.fromkeys(params.data.evaluation, agreed) for name in others}
    _json(metrics / "compare.json", {"reference": reference, "pairs": "all", "to_reference": to_reference, "comparisons": pairs})
    repaid = {"student_seconds": 0.046, "reference_seconds": 1.78, "saved_seconds": 1.734, "predictions": 199}
    never = {"student_seconds": 0.046, "reference_seconds": 0.03, "saved_seconds": -0.016, "predictions": None}
    spent = {"capture_seconds": {"few_shot": 70.1}, "training_seconds": 265.7, "spent_seconds": 335.8, "missing": []}
    kept = {"one_by_one": repaid, "batched": never}
    _json(metrics / "runtime" / "break-even.json", {"reference": reference, "students": dict.fromkeys(params.students, spent | kept)})
    for student in params.students:
        _json(metrics / "risk" / f"{student}.json", risk(params, student, reference))


def risk(params: Params, student: str, reference: str) -> dict[str, Any]:
    """A made-up risk file of one student."""
    labels, name, field = list(params.task.verbalisers), next(iter(params.data.evaluation)), params.task.fields[0]
    before, after = labels[0], labels[-1]
    text = f"Made-up {field} 3 of {name}: the plot is thin, the acting is not <b>bold</b> & it drags."
    flip = {"set": name, "example_id": sha256_text(f"{name}/3"), "before": {field: "Ann <liked> it"}, "after": {field: "Eve <liked> it"}}
    flip |= {"label": before, "answer_before": before, "answer_after": after, "p_before": 0.56, "p_after": 0.44}
    side = {"lowest": {"slice": "long", "n": 90, "accuracy": 0.8}, "highest": {"slice": "short", "n": 90, "accuracy": 0.89}, "gap": 0.09}
    bins = [
        {"low": 0.5, "high": 0.75, "n": 20, "disagreement": 0.4, "student_accuracy": 0.6, "reference_accuracy": 0.5},
        {"low": 0.75, "high": 1.0, "n": 180, "disagreement": 0.05, "student_accuracy": 0.9, "reference_accuracy": 0.88},
    ]
    thin, drags = text.index("thin"), text.index("drags")
    words = [
        {"field": field, "word": "thin", "start": thin, "end": thin + 4, "weight": 1.25},
        {"field": field, "word": "plot", "start": text.index("plot"), "end": text.index("plot") + 4, "weight": 0.1},
        {"field": field, "word": "drags", "start": drags, "end": drags + 5, "weight": -0.75},
    ]
    swap = {
        "name": "first_names",
        "what": "first names by others of the same gender",
        "texts": 400,
        "with_swap": 30,
        "asked": 23,
        "flips": 1,
    }
    swap |= {"flip_rate": 0.0435, "ci95": [0.001, 0.22], "mean_shift": 0.012, "largest_shift": 0.21, "by_set": {}, "examples": [flip]}
    none = {
        "name": "contractions",
        "what": "contractions written out",
        "texts": 400,
        "with_swap": 0,
        "asked": 0,
        "flips": 0,
        "flip_rate": None,
    }
    none |= {"ci95": None, "mean_shift": None, "largest_shift": None, "by_set": {}, "examples": []}
    part = {"n": 200, "share": 0.085, "by_student_confidence": bins, "by_reference_confidence": bins}
    return {
        "student": student,
        "reference": reference,
        "swaps": [swap, none],
        "gaps": [
            {"dimension": "domain", "domain": None, "set": None, "p_value": None, "student": side, "reference": side},
            {"dimension": "length", "domain": "out", "set": None, "p_value": 0.03, "student": side, "reference": side},
        ],
        "disagreement": [{"domain": "in", **part}, {"domain": "out", **part}],
        "attributions": [
            {"set": name, "example_id": sha256_text(f"{name}/3"), "fields": {field: text}, "label": before, "student": before}
            | {"student_p": 0.71, "reference": after, "reference_p": 0.55, "words": words}
        ],
        "attributions_skipped_long": 0,
    }


def write_run(params: Params, root: Path, examples: int = EXAMPLES) -> None:
    """A whole made-up run."""
    write_predictions(params, root, examples)
    write_metrics(params, root)
    write_texts(params, root, examples)
    write_evaluation(params, root, examples)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shipped = load_params(PROJECT / "params.yaml")
    write_run(shipped, target)
    build_report(shipped, target)
