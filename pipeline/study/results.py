"""docs/results.md and its plots, from the figures of groups that have been run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import UsageError
from pipeline.files import write_text
from pipeline.study.figures import update_figures
from pipeline.study.plan import CurveParams, GroupParams, StudyPlan, check_curves
from pipeline.study.plots import curve
from pipeline.report.formatting import DASH, percent, plural, points, quantity, scaled

Json = dict[str, Any]
Figures = Mapping[str, Json]
"""Group → its figures."""
PANELS = {"in": "in domain", "out": "out of domain"}
HEAD = """# Results

Written by `make study` from runs of the pipeline (`presets/study/plan.yaml`); do not edit. The figures behind it are in
[results/](results), a file for each group of runs that differ in their draw of demonstrations; its parts may be run on different days.

A row is a mean over draws of demonstrations; a draw's number is its students' seed too. Accuracies are percent of the evaluation sets'
examples, the same in every draw, with their deviation over draws (and over contexts where a method answers in each), and in brackets the
95 % interval over examples. Differences are paired, in points; a star: the interval leaves out zero. What to make of it is in
[choosing.md](choosing.md).
"""
FOOT = """
`agreement` with `{reference}` and `ECE` are means over sets, percent; `training` and `memory` (the process' peak) are of training
the student, a dash where nothing was trained, or DVC restored it from another part's run; `tokens` are those of a prompt.
"""


def write_results(plan: StudyPlan, project: Path, machine: str, output: Path) -> list[str]:
    """Write `output` (Markdown), and the figures and plots, in a folder beside it that is named after it; returns what has not been run.

    Raises UsageError where no part has finished, or the plan names a method that a group does not have.
    """
    figures = update_figures(plan, project, machine, output.with_suffix(""))
    if not figures:
        raise UsageError("study: no part has finished; `make study` runs them, and goes on where it was stopped.")
    curves = {name: kept for name, entry in plan.curves.items() if (kept := _within(entry, figures)).lines}
    check_curves(curves, {name: own["methods"] for name, own in figures.items()})
    lacking = [f"{name}: all draws" for name in plan.groups if name not in figures]
    lacking += [f"{name}: draw {draw}" for name, own in figures.items() for draw in plan.groups[name].draws if draw not in own["draws"]]
    sections = [HEAD]
    sections += [f"**Not run yet**: {'; '.join(lacking)}. `make study` goes on with them.\n"] if lacking else []
    sections += [_group_section(name, entry, figures[name]) for name, entry in plan.groups.items() if name in figures and entry.table]
    for name, entry in curves.items():
        if max(map(len, entry.lines.values())) > 1:  # one point is no line
            sections.append(_curve_section(name, entry, figures, output))
    write_text("\n".join(sections), output)
    return lacking


def _within(entry: CurveParams, figures: Figures) -> CurveParams:
    """A curve without the points whose group has not been run."""
    lines = {line: {x: at for x, at in places.items() if at.split("/")[0] in figures} for line, places in entry.lines.items()}
    return entry.model_copy(update={"lines": {line: places for line, places in lines.items() if places}})


def _group_section(name: str, entry: GroupParams, own: Json) -> str:
    texts = ", ".join(f"{source} {'all' if limit is None else limit}" for source, limit in own["texts"].items())
    layers = ", ".join(f"`{layer}`" for layer in entry.layers)
    columns = ["method", *(f"{key} ({domain})" for key, domain in own["sets"].items())]
    columns += ["agreement", "ECE", "training", "memory", "parameters", "tokens"]
    lines = [
        f"## {entry.title}",
        "",
        f"{own['labels']} labels; unlabelled texts: {texts}; draws {', '.join(map(str, own['draws']))}; {layers}. {_ran(name, own)}",
        "",
    ]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_method_row(method, figures, list(own["sets"])) for method, figures in own["methods"].items()]
    lines += [FOOT.format(reference=own["reference"])]
    lines += [_paid(own["capture"])] if own["capture"] else []
    return "\n".join([*lines, *_pairs(own), *_slices(own)])


def _ran(name: str, own: Json) -> str:
    """Where and how long a group ran, and the command."""
    command = " ".join(f"{name}-{draw}" for draw in own["draws"])
    earlier = "" if own["is_of_plan"] else " Its params were others than the plan's present ones."
    return f'{own["core_hours"]:.1f} core hours on {own["machine"]}: `make study PARTS="{command}"`.{earlier}'


def _paid(capture: Json) -> str:
    total, anew = capture["seconds"], capture["asked_anew_seconds"]
    return (
        f"The cache took {total:,.0f} s of a draw and served {plural(capture['students'], 'student')}. One that asks its teachers anew at "
        f"each step would take {anew:,.0f} s for that, on average: the cache has paid for itself after {total / anew:.1f} students.\n"
    )


def _method_row(method: str, figures: Json, sets: list[str]) -> str:
    cells, cost = [f"`{method}`"], figures["cost"]
    for own in (figures["sets"][key] for key in sets):
        spread = "" if own["sd"] is None else f" ± {percent(own['sd'])}"
        low, high = (percent(end, 0) for end in own["ci95"])
        cells.append(f"{percent(own['accuracy'])}{spread} [{low}, {high}]")
    cells += [percent(figures["agreement"]), percent(figures["ece"])]
    cells.append(f"{cost['training_seconds']:,.0f} s" if "training_seconds" in cost else DASH)
    cells += [scaled(cost.get("training_peak_bytes"), "B"), scaled(cost.get("parameters")), quantity(cost.get("prompt_tokens"))]
    return _row(cells)


def _pairs(own: Json) -> list[str]:
    """The table of differences, over each evaluation set and their mean."""
    columns = ["difference", *own["sets"], "mean"]
    lines = [_row(columns), _row(["---"] * len(columns))] if own["pairs"] else []
    for pair in own["pairs"]:
        cells = []
        for compared in (pair["sets"][key] for key in columns[1:]):
            low, high = map(points, compared["ci95"])
            cells.append(f"{points(compared['difference'])} [{low}, {high}]{' *' if compared['clear'] else ''}")
        lines.append(_row([f"`{pair['one']}` − `{pair['other']}`", *cells]))
    return [*lines, ""] if own["pairs"] else []


def _slices(own: Json) -> list[str]:
    """A table of accuracies for each dimension and evaluation set that has it."""
    lines: list[str] = []
    for dimension, sets in own["slices"].items():
        for key, values in sets.items():
            columns = [f"{key}, {dimension}", *(f"{value} ({one['n']})" for value, one in values.items())]
            lines += [_row(columns), _row(["---"] * len(columns))]
            for method in own["methods"]:
                lines.append(_row([f"`{method}`", *(percent(one["accuracy"][method]) for one in values.values())]))
            lines.append("")
    return lines


def _curve_section(name: str, entry: CurveParams, figures: Figures, output: Path) -> str:
    rows, table = [], []
    sets: dict[str, None] = {}
    for line, places in entry.lines.items():
        for x, place in places.items():
            group, method = place.split("/")
            own = figures[group]["methods"][method]
            for domain, mean in own["domains"].items():
                values = {"accuracy": mean["accuracy"], "low": mean["ci95"][0], "high": mean["ci95"][1]}
                rows.append(
                    {"line": line, "x": x, "panel": PANELS[domain], **{key: round(100 * value, 3) for key, value in values.items()}}
                )
            sets |= dict.fromkeys(own["sets"])
            table.append(([line, f"{x:g}"], own["sets"], str(len(figures[group]["draws"]))))
    plot = output.with_suffix("") / f"{name}.svg"
    write_text(curve(rows, entry.x, log=entry.log, order=list(entry.lines)), plot)
    groups = dict.fromkeys(place.split("/")[0] for places in entry.lines.values() for place in places.values())
    columns = ["", entry.x, *sets, "draws"]
    lines = [f"## {entry.title}", "", f"![{entry.title}: accuracy in and out of domain]({plot.parent.name}/{plot.name})", ""]
    lines += [_row(columns), _row(["---"] * len(columns))]
    lines += [_row([*head, *(percent(own[key]["accuracy"]) if key in own else DASH for key in sets), draws]) for head, own, draws in table]
    lines += ["", *(f"`{group}`: {_ran(group, figures[group])}" for group in groups)]
    return "\n".join([*lines, ""])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
