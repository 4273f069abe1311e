"""docs/results.md and its plots, from what finished parts left on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline import metrics
from pipeline.errors import UsageError
from pipeline.files import write_text
from pipeline.study.gather import Group, gather
from pipeline.study.plan import CurveParams, GroupParams, StudyPlan, check_methods
from pipeline.study.plots import curve
from pipeline.wording import DASH, percent, points, quantity, scaled

Json = dict[str, Any]
Scores = Mapping[tuple[str, str], Json]
"""(group, method) → `metrics.evaluate_predictions`."""
DOMAINS = {"in": "in domain", "out": "out of domain"}
HEAD = """# Results

Written by `make study` from runs of the pipeline (`presets/study/plan.yaml`); do not edit.

{runs} runs, {hours:.1f} hours on {machine}. A row is a mean over draws of demonstrations; a draw's number is its students' seed
too. Accuracies are percent of the evaluation sets' examples, the same in every draw, with their deviation over draws (and over
contexts where a method answers in each), and in brackets the 95 % interval over examples. Differences are paired, in points.
"""
FOOT = """
`agreement` with `{reference}` and `ECE` are means over sets, percent; `training` and `memory` (the process' peak) are of training
the student; `tokens` are those of a prompt.
"""


def write_results(plan: StudyPlan, project: Path, machine: str, output: Path) -> list[str]:
    """Write `output` (Markdown) and its plots, in a folder beside it that is named after it; returns what has not been run.

    Raises UsageError where no part has finished, or the plan names a method that a group does not have.
    """
    groups = gather(plan, project)
    if not groups:
        raise UsageError("study: no part has finished; `make study` runs them, and goes on where it was stopped.")
    curves = {name: kept for name, entry in plan.curves.items() if (kept := _within(entry, groups)).lines}
    run = {name: entry for name, entry in plan.groups.items() if name in groups}
    check_methods(StudyPlan(groups=run, curves=curves), {name: group.methods for name, group in groups.items()})
    scores = {(name, method): group.scores(method) for name, group in groups.items() for method in group.methods}
    lacking = [f"{name}: all draws" for name in plan.groups if name not in groups]
    lacking += [f"{name}: draw {draw}" for name, group in groups.items() for draw in group.lacking]
    hours = sum(group.seconds for group in groups.values()) / 3600
    sections = [HEAD.format(runs=sum(len(group.draws) for group in groups.values()), hours=hours, machine=machine)]
    sections += [f"**Not run yet**: {'; '.join(lacking)}. `make study` goes on with them.\n"] if lacking else []
    sections += [_group_section(name, entry, groups[name], scores) for name, entry in run.items() if entry.table]
    for name, entry in curves.items():
        if sum(map(len, entry.lines.values())) > 1:
            sections.append(_curve_section(name, entry, groups, scores, output))
    write_text("\n".join(sections), output)
    return lacking


def _within(entry: CurveParams, groups: Mapping[str, Group]) -> CurveParams:
    """A curve without the points whose group has not been run."""
    lines = {line: {x: at for x, at in places.items() if at.split("/")[0] in groups} for line, places in entry.lines.items()}
    return entry.model_copy(update={"lines": {line: places for line, places in lines.items() if places}})


def _group_section(name: str, entry: GroupParams, group: Group, scores: Scores) -> str:
    data = group.params.data
    labels = data.demonstrations.per_label * len(group.params.task.labels)
    texts = ", ".join(f"{source} {'all' if limit is None else limit}" for source, limit in data.transfer.limits.items())
    layers = ", ".join(f"`{layer}`" for layer in entry.layers)
    columns = ["method", *(f"{key} ({of.domain})" for key, of in data.evaluation.items())]
    columns += ["agreement", "ECE", "training", "memory", "parameters", "tokens"]
    lines = [
        f"## {entry.title}",
        "",
        f"{labels} labels; unlabelled texts: {texts}; draws {', '.join(map(str, group.draws))}; {layers}.",
        "",
    ]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_method_row(method, group, scores[name, method]) for method in group.methods]
    lines += [FOOT.format(reference=group.params.evaluation.reference)]
    return "\n".join([*lines, *_pairs(group, entry.pairs)])


def _method_row(method: str, group: Group, scores: Json) -> str:
    found, cost = group.methods[method], group.methods[method].cost
    cells = [f"`{method}`"]
    for own in (scores[key] for key in group.params.data.evaluation):
        spread = f" ± {percent(own['contexts']['sd'])}" if "contexts" in own else ""
        low, high = (percent(end, 0) for end in own["ci95"])
        cells.append(f"{percent(own['accuracy'])}{spread} [{low}, {high}]")
    cells += [percent(fmean(found.agreement.values())), percent(fmean(own["ece"] for own in scores.values()))]
    cells.append(f"{cost['training_seconds']:,.0f} s" if "training_seconds" in cost else DASH)
    cells += [scaled(cost.get("training_peak_bytes"), "B"), scaled(cost.get("parameters")), quantity(cost.get("prompt_tokens"))]
    return _row(cells)


def _pairs(group: Group, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The table of differences, over each evaluation set and their mean."""
    sets = list(group.params.data.evaluation)
    settings = {"resamples": group.params.evaluation.bootstrap, "seed": group.params.evaluation.seed}
    lines = [_row(["difference", *sets, "mean"]), _row(["---"] * (len(sets) + 2))] if pairs else []
    for one, other in pairs:
        tables = group.methods[one].predictions, group.methods[other].predictions
        cells = []
        for members in [*([key] for key in sets), sets]:
            found = metrics.compare(*tables, members, **settings)
            low, high = map(points, found["ci95"])
            cells.append(f"{points(found['difference'])} [{low}, {high}]{' *' if found['clear'] else ''}")
        lines.append(_row([f"`{one}` − `{other}`", *cells]))
    return [*lines, "", "A star: the interval leaves out zero.", ""] if pairs else []


def _curve_section(name: str, entry: CurveParams, groups: Mapping[str, Group], scores: Scores, output: Path) -> str:
    rows, table = [], []
    sets: dict[str, None] = {}
    for line, places in entry.lines.items():
        for x, place in places.items():
            group_name, method = place.split("/")
            group, own = groups[group_name], scores[group_name, method]
            rows += [{"line": line, "x": x, **point} for point in _domain_means(group, method)]
            sets |= dict.fromkeys(own)
            table.append(([line, f"{x:g}"], own, str(len(group.draws))))
    plot = output.with_suffix("") / f"{name}.svg"
    write_text(curve(rows, entry.x, log=entry.log, order=list(entry.lines)), plot)
    columns = ["", entry.x, *sets, "draws"]
    lines = [f"## {entry.title}", "", f"![{entry.title}: accuracy in and out of domain]({plot.parent.name}/{plot.name})", ""]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_row([*head, *(percent(own[key]["accuracy"]) if key in own else DASH for key in sets), draws]) for head, own, draws in table]
    return "\n".join([*lines, ""])


def _domain_means(group: Group, method: str) -> list[Json]:
    """`panel`, `accuracy`, `low`, `high` (percent) of a method in and out of domain, means over sets, where there are such sets."""
    evaluation, found = group.params.evaluation, []
    for domain, title in DOMAINS.items():
        members = [key for key, entry in group.params.data.evaluation.items() if entry.domain == domain]
        if members:
            table = group.methods[method].predictions
            mean = metrics.mean_accuracy(table, members, resamples=evaluation.bootstrap, seed=evaluation.seed)
            values = {"accuracy": mean["accuracy"], "low": mean["ci95"][0], "high": mean["ci95"][1]}
            found.append({"panel": title, **{key: round(100 * value, 3) for key, value in values.items()}})
    return found


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
