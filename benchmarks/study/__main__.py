"""The study: `python -m benchmarks.study [PART …]` runs parts of plan.yaml, then prints the tables of all finished parts.

A finished part costs seconds; a stopped one goes on. Figures are means over draws.
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import polars as pl
import typer

from pipeline.commands.reproduce import reproduce
from pipeline.errors import UsageError, choices, ending_with_a_message
from pipeline.files import read_json, write_text
from pipeline.params import parse_params, read_yaml, resolve
from pipeline.params.presets import merge, write_workspace
from pipeline.setup.new_task import Answers, new_task

PLAN = Path(__file__).parent / "plan.yaml"
WORKSPACES = Path("runs/study")
FIGURES = ("accuracy", "macro_f1", "ece")
COSTS = ("latency_ms", "memory_mb", "training_s")
CHOSEN = "the chosen student"
TEACHERS = ("zero_shot", "few_shot", "fine_tuned", "setfit")
RIVALS = {
    "the best baseline": (*TEACHERS, "few_shot_calibrated", "linear"),
    "the best single teacher": TEACHERS,
    "SetFit": ("setfit",),
    "all teachers": ("teacher",),
}
Part = tuple[str, int, int | Literal["random"]]
"""A task, a draw, and how many labels of each class, or `random`."""


def parts_of(plan: dict[str, Any]) -> dict[str, Part]:
    """All parts by name: TASK-DRAW with the first of the plan's sizes, and TASK-DRAW-LABELS; of the default run there is one size."""
    usual, *others = plan["per_label"]
    found = {f"{task}-{draw}": (task, draw, usual) for draw in plan["draws"] for task in plan["tasks"]}
    files = [(name, part) for name, part in found.items() if plan["tasks"][part[0]]]
    return found | {f"{name}-{labels}": (task, draw, labels) for labels in others for name, (task, draw, _) in files}


def part_params(plan: dict[str, Any], part: Part, workspace: Path) -> dict[str, Any]:
    """The params of one part, checked; its files are written."""
    task, draw, _ = part
    raw, entry = read_yaml(Path("params.yaml")), plan["tasks"][task]
    if entry:
        write_files(plan, part, workspace)
        labelled, unlabelled, test = (workspace / f"{name}.jsonl" for name in ("labelled", "unlabelled", "test"))
        raw, _ = new_task(raw, Answers(labelled, unlabelled, test, entry["template"], {}, {}, "label"))
    raw = merge(raw, plan["also"] | {"data": {"demonstrations": {"seed": draw}}})
    parse_params(raw, PLAN)
    return raw


def write_files(plan: dict[str, Any], part: Part, workspace: Path) -> None:
    """Draw a part's labelled, unlabelled and test texts from the task's files; the test is the same in every draw."""
    task, draw, per_label = part
    entry, sizes, rng = plan["tasks"][task], plan["sizes"], random.Random(f"{task} {draw}")  # noqa: S311
    pool, test = (pl.read_ndjson(Path(plan["data"]) / entry[name]).to_dicts() for name in ("pool", "test"))
    rng.shuffle(pool)
    random.Random(task).shuffle(test)  # noqa: S311
    seen, drawn = Counter[str](), defaultdict[str, list[dict[str, Any]]](list)
    usual = plan["per_label"][0] * len({row["label"] for row in pool})
    first, of_each = (usual, 1) if per_label == "random" else (0, per_label)
    for number, row in enumerate(pool):
        seen[row["label"]] += 1
        drawn["labelled" if number < first or seen[row["label"]] <= of_each else "unlabelled"].append(row)
    drawn["unlabelled"] = [{"text": row["text"]} for row in drawn["unlabelled"][: sizes["unlabelled"]]]
    drawn["test"] = test[: sizes["test"]]
    for name, rows in drawn.items():
        write_text("".join(json.dumps(row) + "\n" for row in rows), workspace / f"{name}.jsonl")


def gather(parts: dict[str, Part]) -> pl.DataFrame:
    """What finished parts measured, a row for each method: its figures in percent, means over the part's evaluation sets."""
    rows = list[dict[str, Any]]()
    for part, (_, draw, _) in parts.items():
        best, metrics = WORKSPACES / part / "artifacts" / "best.json", WORKSPACES / part / "metrics" / "eval"
        if best.is_file():
            files = {file.stem: file for file in sorted(metrics.glob("*.json"))}
            for method, file in {**files, CHOSEN: files[read_json(best)["student"]]}.items():
                sets = read_json(file)["sets"].values()
                figures = {figure: 100 * fmean(one[figure] for one in sets) for figure in FIGURES}
                costs = costs_of(file.stem, WORKSPACES / part / "metrics")
                rows.append({"task": part.replace(f"-{draw}", "", 1), "draw": draw, "method": method, **figures, **costs})
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(COSTS, pl.Float64))


def costs_of(method: str, metrics: Path) -> dict[str, float | None]:
    """An answer's milliseconds and memory, and a student's seconds of training; None of what was not measured."""
    files = (metrics / "cost" / f"{method}.json", metrics / "runtime" / f"student-{method}.json")
    answer, training = (read_json(file) if file.is_file() else {} for file in files)
    memory = answer["peak_rss_bytes"] / 1e6 if answer else None
    return dict(zip(COSTS, (answer.get("latency_ms"), memory, training.get("seconds")), strict=True))


def means(found: pl.DataFrame, figures: Sequence[str]) -> str:
    """Methods × tasks, as Markdown: each figure's mean over draws."""
    shown = [pl.col(figure).mean().round(1).cast(pl.String).fill_null("–") for figure in figures]
    cell = pl.format(" / ".join("{}" for _ in figures), *shown)
    return markdown(found.group_by("task", "method", maintain_order=True).agg(cell.alias("cell")))


def differences(found: pl.DataFrame) -> str:
    """The chosen student's accuracy and macro-F1 less those of others, by draw: the mean, the least and the most.

    The best baseline and the best teacher are those with the best mean over a task's draws, known only afterwards.
    """
    rows = list[dict[str, str]]()
    for (task,), own in found.group_by("task", maintain_order=True):
        for name, methods in RIVALS.items():
            rivals = own.filter(pl.col("method").is_in(methods))
            best = rivals.group_by("method", maintain_order=True).agg(pl.col("accuracy").mean()).sort("accuracy")["method"]
            if len(best):
                pair = own.filter(pl.col("method") == CHOSEN).join(rivals.filter(pl.col("method") == best[-1]), on="draw")
                each = [spread((pair[figure] - pair[f"{figure}_right"]).to_list()) for figure in FIGURES[:2]]
                rows.append({"task": str(task), "method": name, "cell": " / ".join(each) + (f", {best[-1]}" if len(methods) > 1 else "")})
    return markdown(pl.DataFrame(rows))


def markdown(cells: pl.DataFrame) -> str:
    """Columns `task`, `method` and `cell` as a table of methods × tasks."""
    wide = cells.pivot("task", index="method", values="cell").fill_null("–")
    lines = [wide.columns, ["---"] * len(wide.columns), *wide.rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float]) -> str:
    """The mean, and the least and most: a 95 % interval of two or three draws says nothing."""
    return f"{fmean(values):+.1f}" + (f" ({min(values):+.1f} to {max(values):+.1f})" if len(values) > 1 else "")


def main(parts: Annotated[list[str] | None, typer.Argument(help="TASK-DRAW or TASK-DRAW-LABELS; none: all")] = None) -> None:
    """Run parts and print the tables of what has finished."""
    plan = read_yaml(PLAN)
    known = parts_of(plan)
    if unknown := set(parts or ()) - set(known):
        raise UsageError(f"study: no part {choices(unknown)}; choose from: {choices(known)}")
    for part in parts or known:
        workspace = WORKSPACES / part
        workspace.mkdir(parents=True, exist_ok=True)
        write_workspace(part_params(plan, known[part], workspace), workspace, Path())
        resolve(workspace)
        reproduce(workspace, Path(), ["compare", "select", "cost"], jobs=1)
    found = gather(known)
    print(f"{' / '.join(FIGURES)}, percent\n\n{means(found, FIGURES)}\n\nthe chosen student less …\n\n{differences(found)}\n")
    print(f"{' / '.join(COSTS)}\n\n{means(found, COSTS)}")


if __name__ == "__main__":
    with ending_with_a_message():
        typer.run(main)
