"""A made-up run for the report's tests: random predictions of a chosen accuracy, judged by the real evaluation, and the files that other
stages would write. Nothing here was measured.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from ruamel.yaml import YAML

from pipeline.evaluation.compare import compare_methods
from pipeline.evaluation.free_text import judge
from pipeline.evaluation.metrics import before_temperature, detail, evaluate_predictions, membership
from pipeline.files import Folders, sha256_text, write_json
from pipeline.models.held_back import HELD_BACK, HELD_BACK_FILE
from pipeline.params import Params, parse_params
from pipeline.report.collect import Collected, collect
from pipeline.report.page import build_report
from pipeline.schema import ANSWERS, PREDICTIONS, Example, write_examples, write_table

PROJECT = Path(__file__).resolve().parents[2]
ACCURACY = {"icl": (0.56, 0.53), "zero_shot": (0.81, 0.88), "teacher": (0.87, 0.86), "cd": (0.87, 0.88), "pbft": (0.66, 0.59)}
METHODS: dict[str, dict[str, Any]] = {
    "contexts": {"none": {"demonstrations": 0}, "orders": {"demonstrations": 16, "count": 4}},
    "tuned": {"tuned": {"base": "models/smollm2", "steps": 24}},
    "teachers": {
        "few_shot": {"model": "models/smollm2", "contexts": "orders"},
        "zero_shot": {"model": "models/smollm2", "contexts": "none"},
        "tuned": {"model": "tuned/tuned", "contexts": "none"},
    },
    "targets": {
        "mix": {"teachers": {"few_shot": 1.0, "zero_shot": 1.0, "tuned": 1.0}, "calibration": "none", "weights": "learned"},
        "few_shot": {"teachers": {"few_shot": 1.0}},
        "zero_shot": {"teachers": {"zero_shot": 1.0}, "calibration": "none"},
    },
    "students": {
        "cd": {"base": "models/smollm2", "layers": "0-19, 26-29", "learn_from": "targets/mix", "ce_weight": 0.5, "steps": 150},
        "pbft": {"base": "models/smollm2", "layers": "0-19, 26-29", "learn_from": "data/demonstrations.parquet", "steps": 40},
    },
    "baselines": {
        "zero_shot": {"prompts": "targets/zero_shot", "contexts": "ensemble"},
        "icl": {"prompts": "targets/few_shot", "contexts": "each"},
        "teacher": {"prompts": "targets/mix", "contexts": "ensemble"},
    },
}


@pytest.fixture
def raw() -> dict[str, Any]:
    """The shipped task and data with two evaluation sets, methods of its own, and a bootstrap that takes no time."""
    return _raw()


def _raw() -> dict[str, Any]:
    raw = YAML(typ="safe", pure=True).load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    raw["data"]["evaluation"] = {name: raw["data"]["evaluation"][name] for name in ("movie", "tweets")}
    raw["evaluation"]["bootstrap"] = 50
    return raw | copy.deepcopy(METHODS)


@pytest.fixture
def free_text(raw: dict[str, Any]) -> dict[str, Any]:
    """The same data with answers in free text: JSON with a sentiment and a reason."""
    form = {"keys": {"sentiment": ["negative", "positive"], "because": []}, "label": "sentiment"}
    raw["task"] = {"template": "Review: {text}\nJSON:", "completion": {"stop": ["}"], "form": form}}
    raw["contexts"] = {"few": {"demonstrations": 0, "instruction": "Answer so."}}
    raw["teachers"] = {"few": {"model": "models/smollm2", "contexts": "few"}}
    raw["targets"], raw["tuned"] = {}, {}
    raw["students"] = {"cd": {"base": "models/smollm2", "learn_from": "teachers/few", "steps": 5, "learning_rate": 1e-4}}
    raw["baselines"] = {
        "teacher": {"prompts": "teachers/few", "contexts": "each"},
        "bare": {"prompts": "models/smollm2", "contexts": "each"},
    }
    raw["evaluation"]["reference"] = "teacher"
    return raw


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Params]:
    """A function that writes a whole run of some params below a folder."""
    return _write_run


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run, with its report; not to be changed."""
    root = tmp_path_factory.mktemp("run")
    build_report(_write_run(_raw(), root), Folders.here(root), root)
    return root


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Collected]:
    """The same with 77 labels of long names, which are often taken for the next one: its folder and what is in it."""
    raw, root = _raw(), tmp_path_factory.mktemp("many")
    words = ["balance", "card_not_updated", "top_up_reverted_after_cheque_or_cash_deposit", "Refund"]
    raw["task"]["verbalisers"] = {f"{words[n % 4]}_{n:02}": f" {words[n % 4]} {n:02}" for n in range(77)}
    for source in raw["data"]["sources"].values():
        source["label"] = {"column": "rating"}
    params = _write_run(raw, root, examples=400)
    build_report(params, Folders.here(root), root)
    return root, collect(params, Folders.here(root))


@pytest.fixture(scope="session")
def page(root: Path) -> str:
    return (root / "report" / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def found(root: Path) -> Collected:
    return collect(parse_params(_raw()), Folders.here(root))


def _write_run(raw: dict[str, Any], root: Path, examples: int = 40) -> Params:
    params = parse_params(raw)
    folders, settings = Folders.here(root), {"resamples": params.evaluation.bootstrap, "seed": 0}
    sets = {name: _examples(name, params, examples) for name in params.data.evaluation}
    domains = {name: entry.domain for name, entry in params.data.evaluation.items()}
    for name, rows in sets.items():
        write_examples(rows, params.task.fields, folders.artifacts / "data" / "evaluation" / f"{name}.parquet")
    for method in [*params.baselines, *params.students]:
        table, path = predictions(params, method, sets), folders.artifacts / "predictions" / f"{method}.parquet"
        write_table(table, path)
        if params.task.completion is None:
            before = before_temperature(table, dict.fromkeys(table["run"].to_pylist(), 0.5)) if method == "cd" else None
            judged = evaluate_predictions(table, params.task.labels, **settings, before=before)
            members = {name: membership(rows) for name, rows in sets.items()}
            broken_down = detail(table, params.task.labels, members, domains, **settings, before=before)
            write_json(cost(params, method), folders.metrics / "cost" / f"{method}.json")
        else:
            judged, broken_down = judge(table, params.task.completion.form, **settings), {}
        write_json({"method": method, **broken_down}, folders.metrics / "detail" / f"{method}.json")
        write_json({"method": method, "sets": judged}, folders.metrics / "eval" / f"{method}.json")
    write_json({method: sha256_text(method) for method in [*params.baselines, *params.students]}, folders.artifacts / "costs.json")
    compare_methods(params, folders)
    _write_rest(params, folders)
    return params


def _examples(name: str, params: Params, count: int) -> list[Example]:
    gold = np.random.default_rng(len(name)).integers(len(params.task.labels), size=count)
    text = "is thin <b>& bold</b>, and it drags"
    return [Example(dict.fromkeys(params.task.fields, f"Plot {i} of {name} {text}"), params.task.labels[gold[i]]) for i in range(count)]


def predictions(params: Params, method: str, sets: dict[str, list[Example]]) -> pa.Table:
    """Rows of one method, right with its chance; free text says the gold label, or something ill-formed."""
    rng, rows = np.random.default_rng(list(method.encode())), list[dict[str, Any]]()
    seeds = params.students[method].seeds or () if method in params.students else ()
    each = method in params.baselines and params.baselines[method].contexts == "each" and params.task.completion is None
    runs = [f"orders/{number}" for number in range(4)] if each else [f"seed {seed}" for seed in seeds] or [""]
    for number, (name, examples) in enumerate(sets.items()):
        for run in runs:
            for example in examples:
                right = rng.random() < ACCURACY.get(method, (0.75, 0.75))[number % 2]
                row = {"set": name, "run": run, "example_id": example.example_id, "label": example.label}
                if params.task.completion is None:
                    labels, sure = params.task.labels, rng.uniform(0.5, 1)
                    answer = (labels.index(str(example.label)) + (0 if right else rng.choice((1, 1, 2)) if len(labels) > 2 else 1)) % len(
                        labels
                    )
                    probabilities = [sure if n == answer else (1 - sure) / (len(labels) - 1) for n in range(len(labels))]
                    row |= {"predicted": labels[answer], "probabilities": probabilities}
                else:
                    said = json.dumps({"sentiment": example.label, "because": "<b>flat</b>"})
                    row |= {"answer": said if right else "what?", "tokens": 10}
                rows.append(row)
    return pa.Table.from_pylist(rows, schema=PREDICTIONS if params.task.completion is None else ANSWERS)


def cost(params: Params, method: str) -> dict[str, Any]:
    """A made-up cost file; that of `icl` is of another model."""
    student = method in params.students
    figures = {
        "latency_ms": 31.0 if student else 140.0,
        "peak_rss_bytes": 911_000_000 if student else 1_800_000_000,
        "throughput": {"examples": 64, "examples_per_second": 81.2},
    }
    if student:
        figures |= {"one_thread": {"latency_ms": 52.4, "throughput": {"examples": 16, "examples_per_second": 40.6}}}
    measured = {"subject": sha256_text("other" if method == "icl" else method), "examples": 8, "batched": 64}
    return {
        "measured": measured | {"device": "cpu", "processor": "A made-up processor", "dtypes": ["float32"], "threads": 2},
        "prompt_tokens": 26.4 if student else 506.8,
        "parameters": 113_142_528,
        "disk_bytes": 457_000_000,
        "forward_passes": 1,
        **figures,
    }


def _write_rest(params: Params, folders: Folders) -> None:
    """What training, teachers, target sets, prepare and the risk checks would leave."""
    metrics, artifacts, labels = folders.metrics, folders.artifacts, params.task.labels
    change = {
        key: dict.fromkeys(labels, value) for key, value in {"shares_raw": 0.08, "shares_calibrated": 0.5, "offset_nats": 0.81}.items()
    }
    for name, target in params.targets.items():
        teachers = {teacher: {"weight": 1.0, "contexts": {"orders/0": change}} for teacher in target.teachers}
        found: dict[str, Any] = {
            "rows": 1200,
            "teachers": teachers,
            "agreement": 0.82,
            "scale": 1.43,
            "label_shares": dict.fromkeys(labels, 0.5),
        }
        if target.weights == "learned":
            before, after = {"log_loss": 0.61, "accuracy": 0.75}, {"log_loss": 0.42, "accuracy": 0.875}
            found["labelled"] = {"rows": 16, "before": before, "after": after, "teachers": dict.fromkeys(target.teachers, before)}
            shares = dict(zip(labels, (0.9, 0.1), strict=False))
            found["prior"] = {"kind": "estimate", "shares": shares, "low": shares, "high": shares}
        write_json(found, metrics / "targets" / f"{name}.json")
    for teacher in params.teachers:
        kept = {"rows": 4800, "bytes_per_row": 241.5, "retained_mass": 0.991, "kl_to_live_nats": 0.0012, "scored_again": 32}
        write_json(kept, metrics / "fidelity" / f"{teacher}.json")
        write_json({"seconds": 70.1, "prompt_tokens": 7010, "rows": 8, "rows_timed": 8}, metrics / "runtime" / f"teacher-{teacher}.json")
    for name in params.tuned:
        write_json({"seconds": 10.0, "resumed_at_step": 0}, metrics / "runtime" / f"tuned-{name}.json")
    for name, student in params.students.items():
        write_json({"final_loss": 0.071, "parameters": 113_142_528, "layers": 24}, metrics / "train" / f"{name}.json")
        write_json({"seconds": 265.7, "resumed_at_step": 0}, metrics / "runtime" / f"student-{name}.json")
        (metrics / "curves").mkdir(exist_ok=True)
        lines = [f"{step},{1 / step:.6f}" for step in range(1, student.steps + 1)]
        (metrics / "curves" / f"{name}.csv").write_text("\n".join(["step,loss", *lines]) + "\n", encoding="utf-8")
        kept = {"model.safetensors": {"sha256": "ab" * 32, "bytes": 9}}
        if name == "cd" and params.task.completion is None:  # its held-back texts: it agrees in all but the least sure
            sure = np.linspace(0.98, 0.5, 1000)
            rest = (1 - sure) / (len(labels) - 1)
            scores = [np.log([p, *[r] * (len(labels) - 1)]) for p, r in zip(sure, rest, strict=True)]
            target = np.eye(len(labels))[[0] * 900 + [1] * 100]
            ids, columns = [f"{n}" for n in range(1000)], [scores, list(target), np.linspace(0, 1, 1000)]
            held = pa.table([ids, *(pa.array(own, kind) for own, kind in zip(columns, HELD_BACK.types[1:], strict=True))], schema=HELD_BACK)
            write_table(held, artifacts / "students" / name / HELD_BACK_FILE)
            kept[HELD_BACK_FILE] = {"sha256": "cd" * 32, "bytes": 9}
        write_json({"files": kept, "temperature": 1.0}, artifacts / "students" / name / "manifest.json")
        write_json(_risk(params, name) if params.task.completion is None else {"student": name}, metrics / "risk" / f"{name}.json")
    own = {"score": 0.831, "standard_error": 0.0123, "parameters": 113_142_528}
    best = {
        "student": "cd",
        "targets": "mix",
        "texts": 225,
        "candidates": {"cd": own},
        "no_candidates": {"pbft": "it learns from labels alone"},
    }
    if params.task.completion is not None or "cd" not in params.students:
        best |= {"student": None, "texts": 0, "candidates": {}, "no_candidates": {}}
    write_json(best, artifacts / "best.json")
    source = {"rows": 10605, "quarantined": {"empty": 2}, "left_out_by_label_rule": 5310, "exact_repeats_removed": 12}
    source |= {"conflicting_labels_removed": 2, "examples": 5278}
    roles = {"demonstrations": {"drawn": 16}, "transfer": {"drawn": 1200, "copies_of_evaluation_removed": {"movie": 7, "tweets": 4}}}
    if params.data.pool is not None:
        roles["pool"] = {"drawn": 5000, "copies_of_evaluation_removed": {"movie": 2, "tweets": 1}}
    for name in params.rounds:
        write_json({"seconds": 7.0, "rows": 6200, "rows_timed": 6200}, metrics / "runtime" / f"round-{name}.json")
    contexts = {"orders": {"tokens": {"orders/0": 478, "orders/1": 481}, "labels_not_shown": list(labels[2:])}}
    counts = {"sources": dict.fromkeys(params.data.sources, source), "roles": roles, "contexts": contexts}
    counts["cut"] = {"smollm2 behind orders": {"transfer": 1200, "evaluation.movie": 3}}
    write_json(counts, metrics / "prepare.json")
    bad = {"source": "movie", "file": "movie.tsv", "line": 17, "field": "", "reason": "not UTF-8", "value": "<i>caf\ufffd"}
    (artifacts / "data" / "quarantine.jsonl").write_text(json.dumps(bad) + "\n", encoding="utf-8")


def _risk(params: Params, student: str) -> dict[str, Any]:
    field, labels = params.task.fields[0], params.task.labels
    flip = {"before": {field: "Ann <liked> it"}, "after": {field: "Eve <liked> it"}, "label": labels[0]}
    flip |= {"answer_before": labels[0], "answer_after": labels[1], "p_before": 0.56, "p_after": 0.44}
    swap = {
        "name": "first_names",
        "what": "first names by others of the same gender",
        "texts": 400,
        "with_swap": 30,
        "asked": 23,
        "flips": 1,
    }
    swap |= {"flip_rate": 0.0435, "ci95": [0.001, 0.22], "mean_shift": 0.012, "largest_shift": 0.21, "examples": [flip]}
    unused = {
        "name": "contractions",
        "what": "contractions written out",
        "texts": 400,
        "with_swap": 0,
        "asked": 0,
        "flips": 0,
        "examples": [],
    }
    side = {"lowest": {"slice": "long", "accuracy": 0.8}, "highest": {"slice": "short", "accuracy": 0.89}, "gap": 0.09}
    gap = {"dimension": "length", "domain": "out", "set": None, "p_value": 0.03, "student": side, "reference": side}
    part = {"low": 0.5, "high": 0.75, "n": 20, "disagreement": 0.4, "student_accuracy": 0.6, "reference_accuracy": 0.5}
    return {
        "student": student,
        "reference": params.evaluation.reference,
        "swaps": [swap, unused],
        "gaps": [gap, gap | {"dimension": "domain", "domain": None, "p_value": None}],
        "disagreement": [{"domain": domain, "n": 200, "share": 0.085, "by_student_confidence": [part]} for domain in ("in", "out")],
    }
