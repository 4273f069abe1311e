"""The study: `python -m benchmarks.study [PART …]` runs parts of plan.yaml, then prints the tables of all finished parts.

A finished part costs seconds; a stopped one goes on. Figures are means over draws, with the standard deviation over them.
"""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

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
CHOSEN = "the chosen student"
Part = tuple[str, int]


def part_params(plan: dict[str, Any], task: str, draw: int, workspace: Path) -> dict[str, Any]:
    """The params of one part, checked; its files are written."""
    raw, entry = read_yaml(Path("params.yaml")), plan["tasks"][task]
    if entry:
        write_files(plan, task, draw, workspace)
        labelled, unlabelled, test = (workspace / f"{name}.jsonl" for name in ("labelled", "unlabelled", "test"))
        raw, _ = new_task(raw, Answers(labelled, unlabelled, test, entry["template"], {}, {}, "label"))
    raw = merge(raw, plan["also"] | {"data": {"demonstrations": {"seed": draw}}})
    parse_params(raw, PLAN)
    return raw


def write_files(plan: dict[str, Any], task: str, draw: int, workspace: Path) -> None:
    """Draw a part's labelled, unlabelled and test texts from the task's files; the test is the same in every draw."""
    entry, sizes, rng = plan["tasks"][task], plan["sizes"], random.Random(f"{task} {draw}")  # noqa: S311
    pool, test = ([json.loads(line) for line in (Path(plan["data"]) / entry[name]).open(encoding="utf-8")] for name in ("pool", "test"))
    rng.shuffle(pool)
    random.Random(task).shuffle(test)  # noqa: S311
    seen, drawn = Counter[str](), defaultdict[str, list[dict[str, Any]]](list)
    for row in pool:
        seen[row["label"]] += 1
        drawn["labelled" if seen[row["label"]] <= sizes["per_label"] else "unlabelled"].append(row)
    drawn["unlabelled"] = [{"text": row["text"]} for row in drawn["unlabelled"][: sizes["unlabelled"]]]
    drawn["test"] = test[: sizes["test"]]
    for name, rows in drawn.items():
        write_text("".join(json.dumps(row) + "\n" for row in rows), workspace / f"{name}.jsonl")


def gather(parts: dict[str, Part]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Task → method → for each finished draw the mean of each figure over the evaluation sets, in percent."""
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for part, (task, _) in parts.items():
        best, metrics = WORKSPACES / part / "artifacts" / "best.json", WORKSPACES / part / "metrics" / "eval"
        if best.is_file():
            files = {file.stem: file for file in sorted(metrics.glob("*.json"))}
            for name, file in {**files, CHOSEN: files[read_json(best)["student"]]}.items():
                sets = read_json(file)["sets"].values()
                found[task][name].append({figure: 100 * fmean(one[figure] for one in sets) for figure in FIGURES})
    return found


def table(task: str, methods: dict[str, list[dict[str, float]]]) -> str:
    """A task as a Markdown table, best method first; `below` is how far a method's accuracy is below the chosen student's, by draw."""
    chosen = [draw["accuracy"] for draw in methods[CHOSEN]]
    lines = [f"\n## {task}, {len(chosen)} draws\n", f"| method | {' | '.join(FIGURES)} | below |", "|---" * (len(FIGURES) + 2) + "|"]
    for name in sorted(methods, key=lambda name: -fmean(draw["accuracy"] for draw in methods[name])):
        each = " | ".join(spread([draw[figure] for draw in methods[name]]) for figure in FIGURES)
        below = spread([best - draw["accuracy"] for best, draw in zip(chosen, methods[name], strict=True)])
        lines.append(f"| `{name}` | {each} | {below} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """The mean, and the standard deviation over draws."""
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main(parts: Annotated[list[str] | None, typer.Argument(help="TASK-DRAW; none: all")] = None) -> None:
    """Run parts and print the tables of what has finished."""
    plan = read_yaml(PLAN)
    known = {f"{task}-{draw}": (task, draw) for draw in plan["draws"] for task in plan["tasks"]}
    if unknown := set(parts or ()) - set(known):
        raise UsageError(f"study: no part {choices(unknown)}; choose from: {choices(known)}")
    for part in parts or known:
        workspace = WORKSPACES / part
        workspace.mkdir(parents=True, exist_ok=True)
        write_workspace(part_params(plan, *known[part], workspace), workspace, Path())
        resolve(workspace)
        reproduce(workspace, Path(), ["compare", "select"], jobs=1)
    for task, methods in gather(known).items():
        print(table(task, methods))


if __name__ == "__main__":
    with ending_with_a_message():
        typer.run(main)
