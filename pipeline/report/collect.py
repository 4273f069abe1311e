"""Everything the report is made from, read from disk once, and the numbers of `report/metrics.json`.

Predictions, their metrics and the comparison of methods are required. The rest (costs, curves, counts) is optional, so that a report can be
had early: the page names each file that is missing and the stage that writes it. A file that exists and cannot be read is an error.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import polars as pl
from polars.exceptions import PolarsError

from pipeline.errors import CorruptError, UsageError, choices
from pipeline.evaluation.metrics import mean_accuracy
from pipeline.files import Folders, read_json, sha256_file
from pipeline.params import Params
from pipeline.schema import ANSWERS, PREDICTIONS, read_examples, read_table

Json = dict[str, Any]
DOMAINS = {"in": "In domain", "out": "Out of domain"}
MOST_QUARANTINED = 5


@dataclass(frozen=True)
class Collected:
    """What was found on disk."""

    params: Params
    document: Json
    """The numbers of `report/metrics.json`; see `_labels_document` and `_answers_document`."""
    files: dict[str, Json]
    """Every JSON file that exists, by its path from the project."""
    stale_cost: frozenset[str]
    """Methods whose cost was measured with another model or other prompts than their predictions; `files` lacks it."""
    missing: dict[str, str]
    """Optional file that does not exist → the stage that writes it."""
    predictions: dict[str, pl.DataFrame]
    """Method → its rows, as `schema.PREDICTIONS` or `schema.ANSWERS`."""
    curves: dict[str, pl.DataFrame]
    """Student → training curve of its first seed, with the columns step and loss."""
    texts: dict[str, dict[str, str]]
    """Evaluation set → example_id → its input fields, joined by " / "."""
    quarantined: list[Json]
    """The first rows that were set aside."""

    def of(self, kind: str, name: str) -> Json:
        """`of("cost", "cd")` is metrics/cost/cd.json; empty if there is no such file."""
        return self.files.get(f"metrics/{kind}/{name}.json", {})


def collect(params: Params, folders: Folders) -> Collected:
    """Read all results of the methods in `params`.

    Raises UsageError naming every required file that is missing, CorruptError if a file cannot be read or belongs to another run.
    """
    stages = {name: stage_of(params, name) for name in [*params.baselines, *params.students]}
    tables = {f"artifacts/predictions/{name}.parquet": stage for name, stage in stages.items()}
    metrics = {f"metrics/eval/{name}.json": stage for name, stage in stages.items()}
    required = tables | metrics | {"metrics/compare.json": "compare"}
    expected = required | _optional(params, stages)
    paths = {name: (folders.artifacts if name.startswith("artifacts") else folders.metrics) / name.partition("/")[2] for name in expected}
    there = {name: path for name, path in paths.items() if path.is_file()}
    if absent := {name: stage for name, stage in required.items() if name not in there}:
        commands = " ".join(dict.fromkeys(absent.values()))
        raise UsageError(f"{choices(absent)}: no such file, and the report needs it. Run `dvc repro {commands}`.")
    files = {name: _object(path, expected[name]) for name, path in there.items() if path.suffix == ".json"}
    for method, stage in stages.items():
        _check_evaluation(files[f"metrics/eval/{method}.json"], paths[f"artifacts/predictions/{method}.parquet"], params, stage)
    compare = files["metrics/compare.json"]
    if compare["reference"] != params.evaluation.reference or {*compare["to_reference"], compare["reference"]} != set(stages):
        raise CorruptError(f"{paths['metrics/compare.json']}: compares other methods than params.yaml has. Run `dvc repro compare`.")
    measured = {name: files[cost]["measured"].get("subject") for name in stages if (cost := f"metrics/cost/{name}.json") in files}
    stale = {name for name, subject in measured.items() if subject != files[f"metrics/eval/{name}.json"].get("subject")}
    rows, fields = PREDICTIONS if params.task.completion is None else ANSWERS, params.task.fields
    found = Collected(
        params=params,
        document={},
        files={name: value for name, value in files.items() if name not in {f"metrics/cost/{method}.json" for method in stale}},
        stale_cost=frozenset(stale),
        missing={name: stage for name, stage in expected.items() if name not in there},
        predictions={Path(name).stem: cast("pl.DataFrame", pl.from_arrow(read_table(paths[name], rows))) for name in tables},
        curves={path.stem: _curve(path) for path in there.values() if path.suffix == ".csv"},
        texts={path.stem: _texts(path, fields) for name, path in there.items() if name.startswith("artifacts/data/evaluation/")},
        quarantined=[row for path in there.values() if path.suffix == ".jsonl" for row in _first_lines(path)],
    )
    make = _labels_document if params.task.completion is None else _answers_document
    return replace(found, document=make(found, {name: files[f"metrics/eval/{name}.json"]["sets"] for name in stages}))


def stage_of(params: Params, method: str) -> str:
    """The DVC stage that evaluates a method."""
    return f"{'evaluate' if method in params.students else 'baseline'}@{method}"


def licence_of(params: Params, path: str, otherwise: str = "the user's own") -> str:
    """The licence of a file: that of the download which it is part of, else `otherwise`."""
    first, _, rest = path.partition("/")
    return params.downloads[rest.partition("/")[0]].licence if first == "downloads" else otherwise


def sets_of(document: Json, domain: str) -> list[str]:
    """The evaluation sets of a domain ("in" or "out"), in order."""
    return [name for name, entry in document["sets"].items() if entry["domain"] == domain]


def domains_of(document: Json) -> list[str]:
    """The domains that have an evaluation set."""
    return [domain for domain in DOMAINS if sets_of(document, domain)]


def main_domain(document: Json) -> str:
    """The domain that methods are ranked by: out of domain, if there is such a set."""
    return domains_of(document)[-1]


def best(document: Json, domain: str, kind: str | None = None) -> list[str]:
    """The methods of one kind (None: of all) with the highest mean accuracy over a domain; several if they tie."""
    means = {name: m["means"][domain].get("accuracy", 0) for name, m in document["methods"].items() if kind in {None, m["kind"]}}
    return [name for name, value in means.items() if value == max(means.values())]


def ranked_students(document: Json) -> list[str]:
    """Students by mean accuracy over the main domain, the best first."""
    means = {
        name: m["means"][main_domain(document)].get("accuracy", 0) for name, m in document["methods"].items() if m["kind"] == "student"
    }
    return sorted(means, key=lambda name: -means[name])


def comparison(document: Json, method: str, other: str, domain: str, what: str | None = None) -> Json | None:
    """The paired comparison of two methods over a domain, `method` minus `other`; None if it was not made. Free text has one for each
    share (`what`).
    """
    for row in document["comparisons"]:
        if (row["domain"], row.get("what"), row["method"], row["other"]) == (domain, what, method, other):
            return row
        if (row["domain"], row.get("what"), row["other"], row["method"]) == (domain, what, method, other):
            turned = {"method": method, "other": other, "difference": -row["difference"], "ci95": [-end for end in reversed(row["ci95"])]}
            return {**row, **turned, "only_method_right": row["only_other_right"], "only_other_right": row["only_method_right"]}
    return None


def _optional(params: Params, stages: Mapping[str, str]) -> dict[str, str]:
    """Every optional file of a run → the stage that writes it."""
    files = {"metrics/prepare.json": "prepare", "artifacts/data/quarantine.jsonl": "prepare", "metrics/runtime/break-even.json": "compare"}
    files |= {f"metrics/{kind}/{name}.json": stage for kind in ("cost", "detail") for name, stage in stages.items()}
    files |= {f"artifacts/data/evaluation/{name}.parquet": "prepare" for name in params.data.evaluation}
    files |= {f"metrics/targets/{name}.json": f"targets@{name}" for name in params.targets}
    for name in params.teachers:
        files |= dict.fromkeys((f"metrics/fidelity/{name}.json", f"metrics/runtime/teacher-{name}.json"), f"teacher@{name}")
    for name in params.students:
        written = (f"metrics/train/{name}.json", f"metrics/curves/{name}.csv", f"artifacts/students/{name}/manifest.json")
        files |= dict.fromkeys(written, f"student@{name}") | {f"metrics/risk/{name}.json": f"risk@{name}"}
    return files


def _object(path: Path, stage: str) -> Json:
    if not isinstance(value := read_json(path), dict):
        raise CorruptError(f"{path}: expected a JSON object, found {type(value).__name__}. Run `dvc repro -f {stage}`.")
    return value


def _texts(path: Path, fields: tuple[str, ...]) -> dict[str, str]:
    return {example.example_id: " / ".join(example.fields.values()) for example in read_examples(path, fields)}


def _curve(path: Path) -> pl.DataFrame:
    try:
        curve = pl.read_csv(path)
        curve = curve.filter(pl.col("seed") == pl.col("seed").first()) if "seed" in curve.columns else curve
        return curve.select(pl.col("step").cast(pl.Int64), pl.col("loss").cast(pl.Float64))
    except PolarsError as error:
        raise CorruptError(
            f"{path}: expected numbers in the columns step and loss ({error}). Run `dvc repro -f student@{path.stem}`."
        ) from None


def _first_lines(path: Path) -> list[Json]:
    with path.open(encoding="utf-8") as file:
        try:
            return [json.loads(line) for line in islice(file, MOST_QUARANTINED)]
        except ValueError as error:
            raise CorruptError(f"{path}: not JSON lines ({error}). Run `dvc repro -f prepare`.") from None


def _check_evaluation(entry: Json, predictions: Path, params: Params, stage: str) -> None:
    """Metrics belong to the predictions on disk and to the evaluation sets of the params."""
    name, wanted = f"metrics/eval/{predictions.stem}.json", set(params.data.evaluation)
    if set(entry["sets"]) != wanted:
        raise CorruptError(f"{name}: has the sets {choices(entry['sets'])}, params.yaml has {choices(wanted)}. Run `dvc repro {stage}`.")
    if entry["predictions_sha256"] != sha256_file(predictions):
        raise CorruptError(f"{predictions}: not the predictions that {name} is about. Run `dvc repro {stage}`.")


def _labels_document(found: Collected, evaluated: Mapping[str, Json]) -> Json:
    """`reference`; `sets` {name: domain, n}; `methods` {name: kind, sets {name: metrics with `agreement`}, means {"in" | "out": accuracy,
    ci95, agreement, ece}, cost or None}; `comparisons`: the rows of metrics/compare.json that are about a whole domain.
    """
    document = _frame(found, evaluated)
    settings = {"resamples": found.params.evaluation.bootstrap, "seed": found.params.evaluation.seed}
    for name, method in document["methods"].items():
        shares = found.files["metrics/compare.json"]["to_reference"].get(name)
        for where, entry in method["sets"].items():
            entry["agreement"] = shares[where]["agreement"] if shares else 1.0
        for domain in domains_of(document):
            members = sets_of(document, domain)
            accuracy = mean_accuracy(found.predictions[name].to_arrow(), members, **settings)
            others = {key: round(fmean(method["sets"][where][key] for where in members), 6) for key in ("agreement", "ece")}
            method["means"][domain] = accuracy | others
        method["cost"] = {key: value for key, value in found.of("cost", name).items() if key != "by_demonstrations"} or None
    return document


def _answers_document(found: Collected, evaluated: Mapping[str, Json]) -> Json:
    """The same for free text, with `answers` True and the `keys` of the answers' form. `sets` of a method have n, tokens, well_formed and
    accuracy with `_ci95`, agreement {"text" or key: share}, if the task defines them; `means` have the shares.
    """
    document, compare = _frame(found, evaluated), found.files["metrics/compare.json"]
    form = found.params.task.completion.form if found.params.task.completion is not None else None
    for name, method in document["methods"].items():
        for where, entry in method["sets"].items():
            entry |= {"agreement": compare["to_reference"][name][where]} if name != document["reference"] else {}
        for domain in domains_of(document):
            entries = [method["sets"][where] for where in sets_of(document, domain)]
            shares = [key for key in ("well_formed", "accuracy") if key in entries[0]]
            method["means"][domain] = {key: round(fmean(entry[key] for entry in entries), 6) for key in shares}
    return {"answers": True, "keys": [] if form is None else list(form.keys), **document}


def _frame(found: Collected, evaluated: Mapping[str, Json]) -> Json:
    """What both kinds of document have."""
    params, sets = found.params, found.params.data.evaluation
    return {
        "reference": params.evaluation.reference,
        "sets": {where: {"domain": sets[where].domain, "n": evaluated[params.evaluation.reference][where]["n"]} for where in sets},
        "methods": {
            name: {
                "kind": "student" if name in params.students else "baseline",
                "sets": {where: dict(own[where]) for where in sets},
                "means": {},
            }
            for name, own in evaluated.items()
        },
        "comparisons": [row for row in found.files["metrics/compare.json"]["comparisons"] if row["set"] is None],
    }
