"""What finished parts left on disk, by group and method: predictions of all draws in one table, and what training and answering cost."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline import metrics
from pipeline.params import Params, load_params
from pipeline.schema import PREDICTIONS, read_table
from pipeline.study.plan import WORKSPACES, Part, StudyPlan, parts

Json = dict[str, Any]
SECONDS = "seconds.txt"
"""In a part's workspace: how long each of its runs took, a line each."""


@dataclass
class Method:
    """One method of a group over its finished draws."""

    kind: str
    """"student" or "baseline"."""
    predictions: pa.Table
    """`schema.PREDICTIONS` of all draws; each draw's rows have `context_id`s of their own: a mean over contexts is one over draws."""
    agreement: dict[str, float]
    """Evaluation set → share of answers that are the reference's of the same draw, mean over draws."""
    cost: dict[str, float]
    """`prompt_tokens`, `parameters`, `training_seconds`, `training_peak_bytes`, those that are known, means over draws."""


@dataclass
class Group:
    """The finished draws of one group."""

    params: Params
    draws: tuple[int, ...]
    lacking: tuple[int, ...]
    """Draws that have not finished."""
    methods: dict[str, Method] = field(default_factory=dict)
    """Baselines, then students."""
    seconds: float = 0.0
    """Wall-clock time of its parts' runs."""

    def scores(self, method: str) -> dict[str, Json]:
        """`metrics.evaluate_predictions` of a method: means over draws, intervals over examples."""
        evaluation = self.params.evaluation
        labels = list(self.params.task.verbalisers)
        return metrics.evaluate_predictions(self.methods[method].predictions, labels, resamples=evaluation.bootstrap, seed=evaluation.seed)


def gather(plan: StudyPlan, project: Path) -> dict[str, Group]:
    """Every group of which a draw has finished. A part has finished when its methods have been compared, which is its last stage."""
    found: dict[str, Group] = {}
    for name in plan.groups:
        own = [part for part in parts(plan) if part.group == name]
        finished = [part for part in own if (_folder(part, project) / "metrics" / "compare.json").is_file()]
        if finished:
            found[name] = _group(own, finished, project)
    return found


def _folder(part: Part, project: Path) -> Path:
    return project / WORKSPACES / part.name


def _group(own: list[Part], finished: list[Part], project: Path) -> Group:
    folders = {part.draw: _folder(part, project) for part in finished}
    params = load_params(next(iter(folders.values())) / "params.yaml")
    lacking = tuple(part.draw for part in own if part.draw not in folders)
    group = Group(params, tuple(folders), lacking, seconds=sum(_seconds(folder) for folder in folders.values()))
    for name in [*params.baselines, *params.students]:
        group.methods[name] = _method(params, name, folders)
    return group


def _method(params: Params, name: str, folders: dict[int, Path]) -> Method:
    tables, agreements, costs = [], [], []
    for draw, folder in folders.items():
        table = read_table(folder / "artifacts" / "predictions" / f"{name}.parquet", PREDICTIONS)
        reference = read_table(folder / "artifacts" / "predictions" / f"{params.evaluation.reference}.parquet", PREDICTIONS)
        agreements.append(metrics.agreement(table, reference))
        tables.append(_of_draw(table, draw))
        costs.append(_cost(folder, name))
    agreement = {key: fmean(one[key] for one in agreements) for key in agreements[0]}
    cost = {key: fmean(one[key] for one in costs if key in one) for key in dict.fromkeys(key for one in costs for key in one)}
    return Method("student" if name in params.students else "baseline", pa.concat_tables(tables), agreement, cost)


def _of_draw(table: pa.Table, draw: int) -> pa.Table:
    """The same rows under `context_id`s that no other draw has."""
    frame = pl.DataFrame(pl.from_arrow(table))
    named = frame.with_columns(pl.format(f"draw {draw} {{}}", pl.col("context_id")).alias("context_id"))
    return named.to_arrow().cast(PREDICTIONS)


def _cost(folder: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    answering, training = folder / "metrics" / "cost" / f"{name}.json", folder / "metrics" / "runtime" / f"student-{name}.json"
    if answering.is_file():
        known = json.loads(answering.read_text("utf-8"))
        found |= {key: float(known[key]) for key in ("prompt_tokens", "parameters") if known.get(key) is not None}
    if training.is_file():
        known = json.loads(training.read_text("utf-8"))
        found |= {"training_seconds": float(known["seconds"]), "training_peak_bytes": float(known["peak_rss_bytes"])}
    return found


def _seconds(folder: Path) -> float:
    file = folder / SECONDS
    return sum(map(float, file.read_text("utf-8").split())) if file.is_file() else 0.0
