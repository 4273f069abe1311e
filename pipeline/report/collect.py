"""Everything the report is made from, read from disk once, and the numbers of `report/metrics.json`.

What stages hand to DVC is required. Times are not kept by DVC, so a file of them may be missing, or a cost may be of another model than the
predictions: the page names it and the stage that writes it.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import UsageError, choices
from pipeline.evaluation.metrics import RIGHT, Json, mean_accuracy
from pipeline.files import MANIFEST, Folders, read_json
from pipeline.models.held_back import HELD_BACK_FILE, STRANGEST, held_back_answers, threshold
from pipeline.params import Params
from pipeline.schema import ANSWERS, PREDICTIONS, read_examples, read_table

DOMAINS = {"in": "In domain", "out": "Out of domain"}
TIMES = ("metrics/cost", "metrics/runtime")
MOST_QUARANTINED = 5
PROMISES = (0.95, 0.98, 0.99)  # of `predict --agree`, that the page shows


@dataclass(frozen=True)
class Collected:
    """What was found on disk."""

    params: Params
    document: Json  # the numbers of `report/metrics.json`; see `_document`
    files: dict[str, Any]  # path from the project → what `_read` returns, for every file that is not a table
    missing: dict[str, str]  # file of times that does not exist, or is of another model → the stage that writes it
    predictions: dict[str, pl.DataFrame]  # method → its rows, as `schema.PREDICTIONS` or `schema.ANSWERS`
    thresholds: dict[str, dict[float, float]]  # student → `PROMISES` that it can keep → the least confidence that is answered
    texts: dict[str, dict[str, str]]  # evaluation set → example_id → its input fields, joined by " / "

    def of(self, kind: str, name: str) -> Json:
        """`of("cost", "cd")` is metrics/cost/cd.json; empty if there is no such file."""
        return self.files.get(f"metrics/{kind}/{name}.json", {})


def collect(params: Params, folders: Folders) -> Collected:
    """Read all results of the methods in `params`.

    Raises UsageError naming every required file that is missing, CorruptError if a file cannot be read.
    """
    stages = _stages(params)
    paths = {name: (folders.artifacts if name.startswith("artifacts") else folders.metrics) / name.partition("/")[2] for name in stages}
    missing = {name: stage for name, stage in stages.items() if not paths[name].is_file()}
    if lacking := {name: stage for name, stage in missing.items() if not name.startswith(TIMES)}:
        commands = " ".join(dict.fromkeys(lacking.values()))
        raise UsageError(f"{choices(lacking)}: no such file, and the report needs it. Run `dvc repro {commands}`.")
    files = {name: _read(path) for name, path in paths.items() if name not in missing and path.suffix != ".parquet"}
    methods = [*params.baselines, *params.students]
    for name in methods:
        cost = f"metrics/cost/{name}.json"
        if cost in files and files[cost]["measured"]["subject"] != files["artifacts/costs.json"].get(name):
            missing[cost] = stages[cost]
            del files[cost]
    rows = PREDICTIONS if params.task.completion is None else ANSWERS
    predictions = {name: pl.DataFrame(read_table(paths[f"artifacts/predictions/{name}.parquet"], rows)) for name in methods}
    texts: dict[str, dict[str, str]] = {}
    for where in params.data.evaluation:
        examples = read_examples(paths[f"artifacts/data/evaluation/{where}.parquet"], params.task.fields)
        texts[where] = {example.example_id: " / ".join(example.fields.values()) for example in examples}
    thresholds = {name: _thresholds(folders.artifacts / "students" / name) for name in params.students}
    return Collected(params, _document(params, files, predictions), files, missing, predictions, thresholds, texts)


def _thresholds(folder: Path) -> dict[float, float]:
    """Of each of `PROMISES` that a student can keep, by its held-back texts, the least confidence that is answered."""
    manifest, found = read_json(folder / MANIFEST), dict[float, float]()
    if HELD_BACK_FILE not in manifest["files"]:
        return found
    confidence, agrees, distances = held_back_answers(folder, manifest["temperature"])
    known = distances <= np.quantile(distances, STRANGEST)
    for promise in PROMISES:
        with suppress(UsageError):  # it cannot keep this one, and the page says so
            found[promise] = threshold(confidence[known], agrees[known], promise).confidence
    return found


def surest_first(found: Collected, student: str, domain: str) -> pl.DataFrame:
    """A student's answers to a domain's sets, the surest first: `confidence`, `agrees` (with the reference) and `right`. First runs."""
    ours, theirs = (found.predictions[name].unique(["set", "example_id"], keep="first") for name in (student, found.document["reference"]))
    rows = ours.join(theirs, on=["set", "example_id"], suffix="_reference").filter(pl.col("set").is_in(sets_of(found.document, domain)))
    agrees = pl.col("predicted") == pl.col("predicted_reference")
    rows = rows.select("set", "example_id", confidence=pl.col("probabilities").list.max(), agrees=agrees, right=RIGHT)
    return rows.sort("confidence", "set", "example_id", descending=[True, False, False])


def _stages(params: Params) -> dict[str, str]:
    """Every file of a run that the report reads → the stage that writes it."""
    evaluated = ("artifacts/predictions/{}.parquet", "metrics/eval/{}.json", "metrics/detail/{}.json")
    trained = ("metrics/train/{}.json", "metrics/curves/{}.csv", "artifacts/students/{}/manifest.json", "metrics/runtime/student-{}.json")
    stages = {"artifacts/best.json": "select", "artifacts/costs.json": "cost", "metrics/compare.json": "compare"}
    stages |= {f"metrics/cost/{name}.json": "cost" for name in [*params.baselines, *params.students]}
    stages |= dict.fromkeys(("metrics/prepare.json", "artifacts/data/quarantine.jsonl"), "prepare")
    stages |= {f"artifacts/data/evaluation/{name}.parquet": "prepare" for name in params.data.evaluation}
    for stage, names, files in (
        ("tune", params.tuned, ("metrics/runtime/tuned-{}.json",)),
        ("teacher", params.teachers, ("metrics/fidelity/{}.json", "metrics/runtime/teacher-{}.json")),
        ("targets", params.targets, ("metrics/targets/{}.json",)),
        ("round", params.rounds, ("metrics/runtime/round-{}.json",)),
        ("student", params.students, trained),
        ("evaluate", params.students, evaluated),
        ("baseline", params.baselines, evaluated),
        ("risk", params.students, ("metrics/risk/{}.json",)),
    ):
        stages |= {file.format(name): f"{stage}@{name}" for name in names for file in files}
    return stages


def _read(path: Path) -> Any:
    """A JSON value; the curve of a student's first seed (columns step and loss); or the first rows that were set aside."""
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".csv":
        curve = pl.read_csv(path)
        return curve.filter(pl.col("seed") == pl.col("seed").first()) if "seed" in curve.columns else curve
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, MOST_QUARANTINED)]


def _document(params: Params, files: dict[str, Any], predictions: dict[str, pl.DataFrame]) -> Json:
    """`reference`; `chosen`, the student of artifacts/best.json or None; `sets` {set: domain, n}; `methods` {name: kind, sets {set: its
    metrics with `agreement`}, means {domain: means over its sets}, cost or None}; `comparisons`: the rows of metrics/compare.json that are
    about a whole domain.

    Means have accuracy with its ci95, agreement, ece and ece_by_chance. Free text has also `answers`, True, and the `keys` of the answers'
    form; there, agreement is {"text" or key: share}, and means have well_formed and accuracy, if the task defines them.
    """
    compare, sets, completion = files["metrics/compare.json"], params.data.evaluation, params.task.completion
    settings = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    averaged = ("agreement", "ece", "ece_by_chance") if completion is None else ("well_formed", "accuracy")
    methods: dict[str, Json] = {}
    for name, frame in predictions.items():
        own: dict[str, Json] = {where: dict(files[f"metrics/eval/{name}.json"]["sets"][where]) for where in sets}
        for where, close in compare["to_reference"].get(name, {}).items():
            own[where]["agreement"] = close["agreement"] if completion is None else close
        if completion is None and name == compare["reference"]:
            own = {where: entry | {"agreement": 1.0} for where, entry in own.items()}
        means: dict[str, Json] = {}
        for domain in DOMAINS:
            if members := [where for where in sets if sets[where].domain == domain]:
                means[domain] = mean_accuracy(frame, members, **settings) if completion is None else {}
                for key in (key for key in averaged if key in own[members[0]]):
                    means[domain][key] = round(fmean(own[where][key] for where in members), 6)
        kind, cost = "student" if name in params.students else "baseline", files.get(f"metrics/cost/{name}.json")
        methods[name] = {"kind": kind, "sets": own, "means": means, "cost": cost}
    reference = params.evaluation.reference
    answers = {} if completion is None else {"answers": True, "keys": list(completion.form.keys) if completion.form else []}
    return answers | {
        "reference": reference,
        "chosen": files["artifacts/best.json"]["student"],
        "sets": {where: {"domain": sets[where].domain, "n": methods[reference]["sets"][where]["n"]} for where in sets},
        "methods": methods,
        "comparisons": [row for row in compare["comparisons"] if row["set"] is None],
    }


def sets_of(document: Json, domain: str) -> list[str]:
    """The evaluation sets of a domain ("in" or "out"), in order."""
    return [name for name, entry in document["sets"].items() if entry["domain"] == domain]


def domains_of(document: Json) -> list[str]:
    """The domains that have an evaluation set; methods are ranked by the last: out of domain, if there is such a set."""
    return [domain for domain in DOMAINS if sets_of(document, domain)]


def ranked(document: Json, kind: str | None = None, domain: str | None = None) -> list[str]:
    """The methods of one kind (None: of all) by mean accuracy over a domain (None: the one to rank by), the best first."""
    methods, domain = document["methods"], domain or domains_of(document)[-1]
    names = [name for name in methods if kind in {None, methods[name]["kind"]}]
    return sorted(names, key=lambda name: -methods[name]["means"][domain].get("accuracy", 0))


def comparison(document: Json, method: str, other: str, domain: str, what: str | None = None) -> Json | None:
    """The paired comparison over a domain, `method` minus `other` (free text: in the share `what`); None if it was not made."""
    for row in document["comparisons"]:
        if (row["domain"], row.get("what"), row["method"], row["other"]) == (domain, what, method, other):
            return row
        if (row["domain"], row.get("what"), row["other"], row["method"]) == (domain, what, method, other):
            turned = {"method": method, "other": other, "difference": -row["difference"], "ci95": [-end for end in reversed(row["ci95"])]}
            return {**row, **turned, "only_method_right": row["only_other_right"], "only_other_right": row["only_method_right"]}
    return None
