"""The study: `python -m benchmarks.study [PART …]` runs parts of plan.yaml, then writes the table of all finished parts.

A part is a run of the pipeline in runs/study/PART. A finished part costs seconds; a stopped one goes on. Accuracies are means over a
group's draws; ± is the standard deviation over draws, of the mean over evaluation sets.
"""

import json
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer

from pipeline.commands.reproduce import reproduce
from pipeline.errors import UsageError, choices, ending_with_a_message
from pipeline.files import write_json
from pipeline.params import parse_params, read_yaml, resolve
from pipeline.params.presets import merge, write_workspace

PLAN = Path(__file__).parent / "plan.yaml"
WORKSPACES = Path("runs/study")
RESULTS = Path("benchmarks/results/study.json")


def part_params(plan: dict[str, Any], group: str, draw: int) -> dict[str, Any]:
    """The params of one part, checked."""
    entry = plan["groups"][group]
    raw = merge(read_yaml(Path("params.yaml")), plan["sizes"])
    if "preset" in entry:
        raw = merge(raw, read_yaml(Path("presets") / f"{entry['preset']}.yaml"))
    raw = merge(raw, entry.get("set", {}))
    raw = merge(raw, {"data": {"demonstrations": {"seed": draw}}, "students": {name: {"seed": draw} for name in raw["students"]}})
    parse_params(raw, PLAN)
    return raw


def run(part: str, raw: dict[str, Any]) -> None:
    """Run one part up to its comparison."""
    workspace = write_workspace(raw, WORKSPACES / part, Path())
    resolve(workspace)
    reproduce(workspace, Path(), ["compare"])


def gather(parts: dict[str, tuple[str, int]]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Group → method → for each finished draw, evaluation set → accuracy."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for part, (group, _) in parts.items():
        metrics = WORKSPACES / part / "metrics"
        if (metrics / "compare.json").is_file():
            for file in sorted((metrics / "eval").glob("*.json")):
                sets = json.loads(file.read_text("utf-8"))["sets"]
                accuracies = {name: one["accuracy"] for name, one in sets.items()}
                found.setdefault(group, {}).setdefault(file.stem, []).append(accuracies)
    return found


def table(group: str, methods: dict[str, list[dict[str, float]]]) -> str:
    """A group as a Markdown table, best method first."""
    sets = list(next(iter(methods.values()))[0])
    lines = [
        f"\n## {group}, {len(next(iter(methods.values())))} draws\n",
        f"| method | {' | '.join(sets)} | mean |",
        "|---" * (len(sets) + 2) + "|",
    ]
    means = {name: [fmean(draw.values()) for draw in draws] for name, draws in methods.items()}
    for name in sorted(means, key=lambda name: -fmean(means[name])):
        each = " | ".join(f"{100 * fmean(draw[key] for draw in methods[name]):.1f}" for key in sets)
        spread = f" ± {100 * stdev(means[name]):.1f}" if len(means[name]) > 1 else ""
        lines.append(f"| `{name}` | {each} | {100 * fmean(means[name]):.1f}{spread} |")
    return "\n".join(lines)


def main(parts: Annotated[list[str] | None, typer.Argument(help="GROUP-DRAW; none: all")] = None) -> None:
    """Run parts and print the tables of what has finished."""
    plan = read_yaml(PLAN)
    known = {f"{group}-{draw}": (group, draw) for group, entry in plan["groups"].items() for draw in entry["draws"]}
    if unknown := set(parts or ()) - set(known):
        raise UsageError(f"study: no part {choices(unknown)}; choose from: {choices(known)}")
    for part in parts or known:
        run(part, part_params(plan, *known[part]))
    found = gather(known)
    write_json(found, RESULTS)
    print("\n".join(table(group, methods) for group, methods in found.items()))


if __name__ == "__main__":
    with ending_with_a_message():
        typer.run(main)
