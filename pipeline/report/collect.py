"""Everything the report is made from, read from disk once, and the numbers of `report/metrics.json`.

Predictions, their metrics and the comparison of methods are required. The rest (costs, curves, counts) is optional, so that a report can be
had early: the page names each file that is missing and the stage that writes it. A file that exists and cannot be read is an error.
"""

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from pipeline.errors import CorruptError, UsageError, choices
from pipeline.evaluation.metrics import as_frame, mean_accuracy
from pipeline.files import Folders, read_json
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
    """The numbers of `report/metrics.json`; see `_document`."""
    files: dict[str, Any]
    """Path from the project → what `_read` returns, for every file that exists and is not a table."""
    missing: dict[str, str]
    """Optional file that does not exist → the stage that writes it."""
    stale_cost: dict[str, str]
    """Method whose cost was measured with another model or other prompts than its predictions → its stage; `files` lacks that cost."""
    predictions: dict[str, pl.DataFrame]
    """Method → its rows, as `schema.PREDICTIONS` or `schema.ANSWERS`."""
    texts: dict[str, dict[str, str]]
    """Evaluation set → example_id → its input fields, joined by " / "."""

    def of(self, kind: str, name: str) -> Json:
        """`of("cost", "cd")` is metrics/cost/cd.json; empty if there is no such file."""
        return self.files.get(f"metrics/{kind}/{name}.json", {})


def collect(params: Params, folders: Folders) -> Collected:
    """Read all results of the methods in `params`.

    Raises UsageError naming every required file that is missing, CorruptError if a file cannot be read.
    """
    stages = {name: f"{'evaluate' if name in params.students else 'baseline'}@{name}" for name in [*params.baselines, *params.students]}
    required = {"metrics/compare.json": "compare"}
    for name, stage in stages.items():
        required |= dict.fromkeys((f"artifacts/predictions/{name}.parquet", f"metrics/eval/{name}.json"), stage)
    expected = required | _optional(params, stages)
    paths = {name: (folders.artifacts if name.startswith("artifacts") else folders.metrics) / name.partition("/")[2] for name in expected}
    missing = {name: stage for name, stage in expected.items() if not paths[name].is_file()}
    if lacking := {name: stage for name, stage in missing.items() if name in required}:
        commands = " ".join(dict.fromkeys(lacking.values()))
        raise UsageError(f"{choices(lacking)}: no such file, and the report needs it. Run `dvc repro {commands}`.")
    files = {name: _read(path, expected[name]) for name, path in paths.items() if name not in missing and path.suffix != ".parquet"}
    stale = {}
    for name, stage in stages.items():
        cost, evaluated = files.get(f"metrics/cost/{name}.json"), files[f"metrics/eval/{name}.json"]
        if cost and cost["measured"].get("subject") != evaluated.get("subject"):
            stale[name] = stage
            del files[f"metrics/cost/{name}.json"]
    rows, fields = PREDICTIONS if params.task.completion is None else ANSWERS, params.task.fields
    predictions = {name: as_frame(read_table(paths[f"artifacts/predictions/{name}.parquet"], rows)) for name in stages}
    texts = {
        where: {example.example_id: " / ".join(example.fields.values()) for example in read_examples(paths[name], fields)}
        for where in params.data.evaluation
        if (name := f"artifacts/data/evaluation/{where}.parquet") not in missing
    }
    return Collected(params, _document(params, files, predictions), files, missing, stale, predictions, texts)


def _optional(params: Params, stages: dict[str, str]) -> dict[str, str]:
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


def _read(path: Path, stage: str) -> Any:
    """A JSON value; the curve of a student's first seed (columns step and loss); or the first rows that were set aside."""
    try:
        if path.suffix == ".json":
            return read_json(path)
        if path.suffix == ".csv":
            curve = pl.read_csv(path)
            curve = curve.filter(pl.col("seed") == pl.col("seed").first()) if "seed" in curve.columns else curve
            return curve.select(pl.col("step").cast(pl.Int64), pl.col("loss").cast(pl.Float64))
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, MOST_QUARANTINED)]
    except (PolarsError, ValueError) as error:
        raise CorruptError(f"{path}: not the {path.suffix} file that it should be ({error}). Run `dvc repro -f {stage}`.") from None


def _document(params: Params, files: dict[str, Any], predictions: dict[str, pl.DataFrame]) -> Json:
    """`reference`; `sets` {set: domain, n}; `methods` {name: kind, sets {set: its metrics with `agreement`}, means {domain: means over its
    sets}, cost or None}; `comparisons`: the rows of metrics/compare.json that are about a whole domain.

    Means have accuracy with its ci95, agreement and ece. Free text has also `answers`, True, and the `keys` of the answers' form; there,
    agreement is {"text" or key: share}, and means have well_formed and accuracy, if the task defines them.
    """
    compare, sets, completion = files["metrics/compare.json"], params.data.evaluation, params.task.completion
    settings = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    shares = ("agreement", "ece") if completion is None else ("well_formed", "accuracy")
    methods: dict[str, Json] = {}
    for name, frame in predictions.items():
        own = {where: dict(files[f"metrics/eval/{name}.json"]["sets"][where]) for where in sets}
        for where, entry in own.items():
            if close := compare["to_reference"].get(name, {}).get(where):
                entry["agreement"] = close["agreement"] if completion is None else close
            elif completion is None:
                entry["agreement"] = 1.0
        means: dict[str, Json] = {}
        for domain in DOMAINS:
            if members := [where for where in sets if sets[where].domain == domain]:
                found = {key: [own[where][key] for where in members] for key in shares if key in own[members[0]]}
                means[domain] = mean_accuracy(frame.to_arrow(), members, **settings) if completion is None else {}
                means[domain] |= {key: round(fmean(values), 6) for key, values in found.items()}
        cost = {key: value for key, value in files.get(f"metrics/cost/{name}.json", {}).items() if key != "by_demonstrations"}
        methods[name] = {"kind": "student" if name in params.students else "baseline", "sets": own, "means": means, "cost": cost or None}
    reference = params.evaluation.reference
    answers = {} if completion is None else {"answers": True, "keys": list(completion.form.keys) if completion.form else []}
    return answers | {
        "reference": reference,
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
        if (row["domain"], row.get("what"), {row["method"], row["other"]}) == (domain, what, {method, other}):
            if row["method"] == method:
                return row
            turned = {"method": method, "other": other, "difference": -row["difference"], "ci95": [-end for end in reversed(row["ci95"])]}
            return {**row, **turned, "only_method_right": row["only_other_right"], "only_other_right": row["only_method_right"]}
    return None
