"""A group's figures, all that its page shows, as JSON in docs/results/GROUP.json: parts may be run on different machines and days."""

from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline import metrics
from pipeline.files import read_json, write_json
from pipeline.evaluation.metrics import rounded
from pipeline.study.gather import Group, gather
from pipeline.study.plan import GroupParams, Part, StudyPlan, check_group, digest, part_params

Json = dict[str, Any]
DOMAINS = ("in", "out")


def update_figures(plan: StudyPlan, project: Path, machine: str, folder: Path) -> dict[str, Json]:
    """Figures of every group that has been run here, or anywhere before: read from `folder`, and written there where they are new.

    What was run here takes the place of what is kept, unless that has more draws of the same params. A figure whose params are no longer
    the plan's stays, with `is_of_plan` false. Raises UsageError where the plan names a method that a group run here does not have.
    """
    here, found = gather(plan, project), {}
    for name, entry in plan.groups.items():
        file = folder / f"{name}.json"
        kept = read_json(file) if file.is_file() else None
        if name in here:
            methods = here[name].methods
            check_group(name, entry, methods, {row["dimension"] for method in methods.values() for row in method.slices})
            new = rounded(_figures(here[name], entry, machine))
            if kept is None or kept["params_sha256"] != new["params_sha256"] or len(kept["draws"]) <= len(new["draws"]):
                write_json(new, file)
                kept = new
        if kept is not None:
            now = digest(part_params(plan, Part(name, entry.draws[0]), project))
            found[name] = kept | {"is_of_plan": kept["params_sha256"] == now}
    return found


def _figures(group: Group, entry: GroupParams, machine: str) -> Json:
    data = group.params.data
    return {
        "params_sha256": group.digest,
        "machine": machine,
        "core_hours": group.core_seconds / 3600,
        "draws": list(group.draws),
        "labels": data.demonstrations.per_label * len(group.params.task.labels),
        "texts": data.transfer.limits,
        "sets": {key: entry.domain for domain in DOMAINS for key, entry in data.evaluation.items() if entry.domain == domain},
        "reference": group.params.evaluation.reference,
        "capture": _capture(group),
        "methods": {method: _method(method, group) for method in group.methods},
        "pairs": [_pair(one, other, group) for one, other in entry.pairs],
        "slices": {dimension: _slices(dimension, group) for dimension in entry.slices},
    }


def _method(name: str, group: Group) -> Json:
    """Accuracy, deviation over draws and contexts, interval over examples for each set; the same of the means in and out of domain."""
    evaluation, method = group.params.evaluation, group.methods[name]
    settings = {"resamples": evaluation.bootstrap, "seed": evaluation.seed}
    scores = metrics.evaluate_predictions(method.predictions, list(group.params.task.verbalisers), **settings)
    sets = {
        key: {"accuracy": own["accuracy"], "ci95": own["ci95"], "sd": own["contexts"]["sd"] if "contexts" in own else None}
        for key, own in scores.items()
    }
    domains: dict[str, Json] = {}
    for domain in DOMAINS:
        members = [key for key, entry in group.params.data.evaluation.items() if entry.domain == domain]
        if members:
            mean = metrics.mean_accuracy(method.predictions, members, **settings)
            domains[domain] = {"accuracy": mean["accuracy"], "ci95": mean["ci95"]}
    means = {"agreement": fmean(method.agreement.values()), "ece": fmean(own["ece"] for own in scores.values())}
    return {"kind": method.kind, "sets": sets, "domains": domains, **means, "cost": method.cost}


def _pair(one: str, other: str, group: Group) -> Json:
    """The paired difference on each set and on their mean."""
    evaluation, sets = group.params.evaluation, list(group.params.data.evaluation)
    tables = group.methods[one].predictions, group.methods[other].predictions
    found: Json = {}
    for key, members in [*((key, [key]) for key in sets), ("mean", sets)]:
        compared = metrics.compare(*tables, members, resamples=evaluation.bootstrap, seed=evaluation.seed)
        found[key] = {what: compared[what] for what in ("difference", "ci95", "clear")}
    return {"one": one, "other": other, "sets": found}


def _slices(dimension: str, group: Group) -> Json:
    """Evaluation set → value → `n`, its examples, and `accuracy`, each method's: mean over draws."""
    found: Json = {}
    for name, method in group.methods.items():
        rows = [row for row in method.slices if row["dimension"] == dimension and row["set"] is not None]
        for row in rows:
            own = found.setdefault(row["set"], {}).setdefault(row["slice"], {"n": row["n"], "accuracy": {}})
            own["accuracy"][name] = fmean(r["accuracy"] for r in rows if (r["set"], r["slice"]) == (row["set"], row["slice"]))
    return found


def _capture(group: Group) -> Json | None:
    """Seconds that the caches took, and that a student would take, on average, which asked its teachers anew at each step.

    None where they are not known, or no student learns from target sets.
    """
    params, asked = group.params, list[float]()
    seconds = {name: value for name, value in group.capture_seconds.items() if value is not None}
    if len(seconds) < len(params.teachers):
        return None
    for student in params.students.values():
        area, _, name = student.learn_from.partition("/")
        if area == "targets":
            a_text = sum(seconds[teacher] for teacher in params.targets[name].teachers) / group.texts
            asked.append(a_text * student.steps * student.batch_size)
    return {"seconds": sum(seconds.values()), "students": len(asked), "asked_anew_seconds": fmean(asked)} if asked else None
