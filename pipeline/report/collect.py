"""Everything the report is made from, read from disk once, and the numbers of `report/metrics.json`.

Predictions, their metrics and the comparison of methods are required. The rest (costs, curves, counts) is optional, so that a report can be
had early: the page names each file that is missing and the stage that writes it. A file that exists and cannot be read is an error.
"""

import json
from collections.abc import Iterable, Mapping
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
COST_KEYS = (
    "prompt_tokens", "latency_ms", "latency_p95_ms", "throughput", "peak_rss_bytes", "parameters", "weights_bytes", "disk_bytes",
    "forward_passes", "measured",
)  # fmt: skip
MOST_QUARANTINED = 5


@dataclass(frozen=True)
class Collected:
    """What was found. Dicts follow the order of the params and have an entry for each file that exists."""

    params: Params
    document: Json
    """The numbers of `report/metrics.json`; see `_labels_document` and `_answers_document`."""
    predictions: dict[str, pl.DataFrame]
    """Method → its rows, as `schema.PREDICTIONS` or `schema.ANSWERS`. Baselines come first, then students."""
    cost: dict[str, Json]
    """Method → its cost, measured with the model and prompts of the predictions."""
    stale_cost: frozenset[str]
    """Methods whose cost was measured with another model or other prompts."""
    detail: dict[str, Json]
    """Method → reliability bins, confusion counts, slices."""
    compare: Json
    risks: dict[str, Json]
    """Student → risk checks."""
    targets: dict[str, Json]
    training: dict[str, Json]
    curves: dict[str, pl.DataFrame]
    """Student → training curve with the columns step and loss, of its first seed."""
    manifests: dict[str, Json]
    """Student → manifest of its folder."""
    fidelity: dict[str, Json]
    """Teacher → what its score cache keeps, measured on rows that were scored again."""
    capture: dict[str, Json]
    """Teacher → seconds and rows of its capture."""
    prepare: Json
    """Counts of sources, roles and contexts; empty if there are none."""
    break_even: Json
    texts: dict[str, dict[str, str]]
    """Evaluation set → example_id → its input fields, joined by " / "."""
    quarantined: tuple[Json, ...]
    """The first rows that were set aside."""
    missing: dict[str, str]
    """Optional file that does not exist → the stage that writes it."""


def stage_of(params: Params, method: str) -> str:
    """The DVC stage that evaluates a method."""
    return f"{'evaluate' if method in params.students else 'baseline'}@{method}"


def licence_of(params: Params, path: str, otherwise: str = "the user's own") -> str:
    """The licence of a file: that of the download which it is part of, else `otherwise`."""
    first, _, rest = path.partition("/")
    return params.downloads[rest.partition("/")[0]].licence if first == "downloads" else otherwise


def collect(params: Params, folders: Folders) -> Collected:
    """Read all results of the methods in `params`.

    Raises UsageError naming every required file that is missing, CorruptError if a file cannot be read or belongs to another run.
    """
    methods, students = [*params.baselines, *params.students], list(params.students)
    stages = {name: stage_of(params, name) for name in methods}
    reader = _Reader(folders)
    evaluated = reader.each("metrics/eval/{}.json", stages)
    compare = reader.one("metrics/compare.json", "compare")
    tables = {name: folders.artifacts / "predictions" / f"{name}.parquet" for name in methods}
    absent = reader.missing | {f"artifacts/predictions/{name}.parquet": stages[name] for name, path in tables.items() if not path.is_file()}
    if absent or compare is None:
        commands = " ".join(dict.fromkeys(absent.values()))
        raise UsageError(f"{choices(absent)}: no such file, and the report needs it. Run `dvc repro {commands}`.")
    rows = PREDICTIONS if params.task.completion is None else ANSWERS
    for name, entry in evaluated.items():
        _check_evaluation(name, entry, tables[name], params)
    if compare.get("reference") != params.evaluation.reference or set(compare["to_reference"]) != set(methods) - {compare["reference"]}:
        raise CorruptError(f"{folders.metrics / 'compare.json'}: compares other methods than params.yaml has. Run `dvc repro compare`.")
    measured = reader.each("metrics/cost/{}.json", stages if params.task.completion is None else {})
    stale = frozenset(name for name, cost in measured.items() if evaluated[name].get("subject") != cost.get("measured", {}).get("subject"))
    found = Collected(
        params=params,
        document={},
        predictions={name: cast("pl.DataFrame", pl.from_arrow(read_table(path, rows))) for name, path in tables.items()},
        cost={name: cost for name, cost in measured.items() if name not in stale},
        stale_cost=stale,
        detail=reader.each("metrics/detail/{}.json", stages),
        compare=compare,
        risks=reader.each("metrics/risk/{}.json", _stages("risk", students)),
        targets=reader.each("metrics/targets/{}.json", _stages("targets", params.targets)),
        training=reader.each("metrics/train/{}.json", _stages("student", students)),
        curves=reader.curves(students),
        manifests=reader.each("artifacts/students/{}/manifest.json", _stages("student", students)),
        fidelity=reader.each("metrics/fidelity/{}.json", _stages("teacher", params.teachers)),
        capture=reader.each("metrics/runtime/teacher-{}.json", _stages("teacher", params.teachers)),
        prepare=reader.one("metrics/prepare.json", "prepare") or {},
        break_even=(reader.one("metrics/runtime/break-even.json", "compare") or {}) if params.task.completion is None else {},
        texts=reader.texts(params),
        quarantined=reader.quarantined("artifacts/data/quarantine.jsonl"),
        missing=reader.missing,
    )
    make = _labels_document if params.task.completion is None else _answers_document
    return replace(found, document=make(found, evaluated))


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
    means = {
        name: method["means"][domain]["accuracy"]
        for name, method in document["methods"].items()
        if domain in method["means"] and kind in {None, method["kind"]}
    }
    return [name for name, value in means.items() if value == max(means.values())]


def ranked_students(document: Json) -> list[str]:
    """Students by mean accuracy over the main domain, the best first."""
    domain = main_domain(document)
    students = [name for name, method in document["methods"].items() if method["kind"] == "student"]
    return sorted(students, key=lambda name: -document["methods"][name]["means"][domain]["accuracy"])


def comparison(document: Json, method: str, other: str, domain: str) -> Json | None:
    """The paired comparison of two methods over a domain, `method` minus `other`; None if it was not made."""
    for row in document["comparisons"]:
        if row["domain"] == domain and (row["method"], row["other"]) == (method, other):
            return row
        if row["domain"] == domain and (row["method"], row["other"]) == (other, method):
            low, high = row["ci95"]
            sides = {"only_method_right": row.get("only_other_right"), "only_other_right": row.get("only_method_right")}
            return {**row, **sides, "method": method, "other": other, "difference": -row["difference"], "ci95": [-high, -low]}
    return None


class _Reader:
    """Reads files below artifacts/ and metrics/, named by their path from the project, and notes those that are missing."""

    def __init__(self, folders: Folders) -> None:
        self._folders = {"artifacts": folders.artifacts, "metrics": folders.metrics}
        self.missing: dict[str, str] = {}

    def path(self, name: str) -> Path:
        first, _, rest = name.partition("/")
        return self._folders[first] / rest

    def one(self, name: str, stage: str) -> Json | None:
        try:
            value = read_json(self.path(name))
        except FileNotFoundError:
            self.missing[name] = stage
            return None
        if not isinstance(value, dict):
            raise CorruptError(f"{self.path(name)}: expected a JSON object, found {type(value).__name__}. Run `dvc repro -f {stage}`.")
        return value

    def each(self, pattern: str, stages: Mapping[str, str]) -> dict[str, Json]:
        found = {name: self.one(pattern.format(name), stage) for name, stage in stages.items()}
        return {name: value for name, value in found.items() if value is not None}

    def curves(self, students: Iterable[str]) -> dict[str, pl.DataFrame]:
        found = {}
        for student in students:
            name = f"metrics/curves/{student}.csv"
            if not self.path(name).is_file():
                self.missing[name] = f"student@{student}"
                continue
            try:
                curve = pl.read_csv(self.path(name))
                curve = curve.filter(pl.col("seed") == pl.col("seed").first()) if "seed" in curve.columns else curve
                found[student] = curve.select(pl.col("step").cast(pl.Int64), pl.col("loss").cast(pl.Float64))
            except PolarsError as error:
                raise CorruptError(
                    f"{self.path(name)}: expected the columns step and loss, of numbers ({error}). Run `dvc repro -f student@{student}`."
                ) from None
        return found

    def texts(self, params: Params) -> dict[str, dict[str, str]]:
        found = {}
        for key in params.data.evaluation:
            name = f"artifacts/data/evaluation/{key}.parquet"
            if self.path(name).is_file():
                examples = read_examples(self.path(name), params.task.fields)
                found[key] = {e.example_id: " / ".join(e.fields[field] for field in params.task.fields) for e in examples}
            else:
                self.missing[name] = "prepare"
        return found

    def quarantined(self, name: str) -> tuple[Json, ...]:
        if not self.path(name).is_file():
            self.missing[name] = "prepare"
            return ()
        with self.path(name).open(encoding="utf-8") as file:
            try:
                return tuple(json.loads(line) for line in islice(file, MOST_QUARANTINED))
            except ValueError as error:
                raise CorruptError(f"{self.path(name)}: not JSON lines ({error}). Run `dvc repro -f prepare`.") from None


def _stages(stage: str, names: Iterable[str]) -> dict[str, str]:
    return {name: f"{stage}@{name}" for name in names}


def _check_evaluation(name: str, entry: Json, predictions: Path, params: Params) -> None:
    """Metrics belong to the predictions on disk and to the evaluation sets of the params."""
    found, wanted, remedy = set(entry["sets"]), set(params.data.evaluation), f"Run `dvc repro {stage_of(params, name)}`."
    if found != wanted:
        raise CorruptError(f"metrics/eval/{name}.json: has the sets {choices(found)}, params.yaml has {choices(wanted)}. {remedy}")
    if (written := entry.get("predictions_sha256")) is not None and sha256_file(predictions) != written:
        raise CorruptError(f"{predictions}: not the predictions that metrics/eval/{name}.json is about. {remedy}")


def _labels_document(found: Collected, evaluated: Mapping[str, Json]) -> Json:
    """`reference`; `sets` {name: domain, n}; `methods` {name: kind, sets {name: metrics with `agreement`}, means {"in" | "out": accuracy,
    ci95, agreement, ece}, cost or None}; `comparisons`: the rows of metrics/compare.json that are about a whole domain.
    """
    params, reference = found.params, found.params.evaluation.reference
    methods: Json = {}
    for name, entry in evaluated.items():
        shares = found.compare["to_reference"].get(name, {})
        sets = {key: entry["sets"][key] | {"agreement": shares[key]["agreement"] if shares else 1.0} for key in params.data.evaluation}
        means = {}
        for domain in DOMAINS:
            if members := [key for key, own in params.data.evaluation.items() if own.domain == domain]:
                table = found.predictions[name].to_arrow()
                accuracy = mean_accuracy(table, members, resamples=params.evaluation.bootstrap, seed=params.evaluation.seed)
                means[domain] = accuracy | {key: round(fmean(sets[member][key] for member in members), 6) for key in ("agreement", "ece")}
        cost = found.cost.get(name)
        kept = None if cost is None else {key: cost[key] for key in COST_KEYS if key in cost}
        methods[name] = {"kind": _kind(params, name), "sets": sets, "means": means, "cost": kept}
    return {
        "reference": reference,
        "sets": {key: {"domain": entry.domain, "n": evaluated[reference]["sets"][key]["n"]} for key, entry in params.data.evaluation.items()},
        "methods": methods,
        "comparisons": [row for row in found.compare["comparisons"] if row["set"] is None],
    }


def _answers_document(found: Collected, evaluated: Mapping[str, Json]) -> Json:
    """`answers` True; `reference`; `keys` of the answers' form; `sets` {name: domain, n}; `methods` {name: kind, sets {name: n, tokens,
    well_formed and accuracy with `_ci95`, agreement {"text" or key: share}}}. What the task does not define is left out.
    """
    params, reference = found.params, found.params.evaluation.reference
    form = params.task.completion.form if params.task.completion is not None else None
    methods: Json = {}
    for name, entry in evaluated.items():
        shares = found.compare["to_reference"].get(name)
        sets = {key: entry["sets"][key] | ({"agreement": shares[key]} if shares else {}) for key in params.data.evaluation}
        methods[name] = {"kind": _kind(params, name), "sets": sets}
    examples = found.predictions[reference].group_by("set").agg(pl.col("example_id").n_unique())
    sizes = dict(examples.iter_rows())
    return {
        "answers": True,
        "reference": reference,
        "keys": [] if form is None else list(form.keys),
        "sets": {key: {"domain": entry.domain, "n": sizes[key]} for key, entry in params.data.evaluation.items()},
        "methods": methods,
    }


def _kind(params: Params, method: str) -> str:
    return "student" if method in params.students else "baseline"
