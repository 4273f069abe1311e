"""What finished parts left on disk, by group and method: predictions of all draws in one table, and what was spent."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import polars as pl
import pyarrow as pa

from pipeline import metrics
from pipeline.params import Params, load_params
from pipeline.schema import PREDICTIONS, read_table
from pipeline.study.plan import WORKSPACES, Part, StudyPlan, digest, parts
from pipeline.params.yaml_file import read_yaml

Json = dict[str, Any]
SECONDS = "seconds.txt"
"""In a part's workspace: a line for each of its runs, its seconds and the cores that it had."""


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
    slices: list[Json]
    """Each draw's slices, one after the other, as `evaluation.detail.slice_rows` has them."""


@dataclass
class Group:
    """The finished draws of one group."""

    params: Params
    digest: str
    """`plan.digest` of the params that it was run with."""
    draws: tuple[int, ...]
    methods: dict[str, Method] = field(default_factory=dict)
    """Baselines, then students."""
    core_seconds: float = 0.0
    """Time of its parts' runs, times the cores that each had."""
    texts: float = 0.0
    """Size of the transfer set."""
    capture_seconds: dict[str, float | None] = field(default_factory=dict)
    """Teacher → its pass over the transfer set in all its contexts, mean over the draws that were timed whole; None where none was."""


def gather(plan: StudyPlan, project: Path) -> dict[str, Group]:
    """Every group of which a draw has finished. A part has finished when its methods have been compared, which is its last stage."""
    found: dict[str, Group] = {}
    for name in plan.groups:
        own = [part for part in parts(plan) if part.group == name]
        finished = [part for part in own if (_folder(part, project) / "metrics" / "compare.json").is_file()]
        if finished:
            found[name] = _group(finished, project)
    return found


def _folder(part: Part, project: Path) -> Path:
    return project / WORKSPACES / part.name


def _group(finished: list[Part], project: Path) -> Group:
    folders = {part.draw: _folder(part, project) for part in finished}
    first = next(iter(folders.values())) / "params.yaml"
    group = Group(load_params(first), digest(read_yaml(first)), tuple(folders), core_seconds=sum(map(_core_seconds, folders.values())))
    group.texts = fmean(_known(folder / "metrics" / "prepare.json")["roles"]["transfer"]["drawn"] for folder in folders.values())
    for name in [*group.params.baselines, *group.params.students]:
        group.methods[name] = _method(group.params, name, folders)
    for name in group.params.teachers:
        group.capture_seconds[name] = _capture_seconds(name, list(folders.values()))
    return group


def _method(params: Params, name: str, folders: dict[int, Path]) -> Method:
    tables, agreements, costs, slices = [], [], [], []
    for draw, folder in folders.items():
        table = read_table(folder / "artifacts" / "predictions" / f"{name}.parquet", PREDICTIONS)
        reference = read_table(folder / "artifacts" / "predictions" / f"{params.evaluation.reference}.parquet", PREDICTIONS)
        agreements.append(metrics.agreement(table, reference))
        tables.append(_of_draw(table, draw))
        costs.append(_cost(folder, name))
        slices += _known(folder / "metrics" / "detail" / f"{name}.json").get("slices", [])
    agreement = {key: fmean(one[key] for one in agreements) for key in agreements[0]}
    cost = {key: fmean(one[key] for one in costs if key in one) for key in dict.fromkeys(key for one in costs for key in one)}
    return Method("student" if name in params.students else "baseline", pa.concat_tables(tables), agreement, cost, slices)


def _of_draw(table: pa.Table, draw: int) -> pa.Table:
    """The same rows under `context_id`s that no other draw has."""
    frame = pl.DataFrame(pl.from_arrow(table))
    named = frame.with_columns(pl.format(f"draw {draw} {{}}", pl.col("context_id")).alias("context_id"))
    return named.to_arrow().cast(PREDICTIONS)


def _cost(folder: Path, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    metrics = folder / "metrics"
    files = (("cost", name, {"prompt_tokens": "prompt_tokens", "parameters": "parameters"}),)
    files += (("runtime", f"student-{name}", {"seconds": "training_seconds", "peak_rss_bytes": "training_peak_bytes"}),)
    for kind, stem, keys in files:
        known = _known(metrics / kind / f"{stem}.json")
        if known.get("resumed_at_step"):  # only the rest of a training was timed
            known.pop("seconds")
        found |= {ours: float(known[theirs]) for theirs, ours in keys.items() if known.get(theirs) is not None}
    return found


def _capture_seconds(teacher: str, folders: Sequence[Path]) -> float | None:
    each = [_known(folder / "metrics" / "runtime" / f"teacher-{teacher}.json") for folder in folders]
    timed = [known["seconds"] for known in each if known and known["rows"] == known["rows_timed"]]  # not where DVC restored the cache
    return fmean(timed) if timed else None


def _known(file: Path) -> Json:
    """What a file of metrics holds; nothing where it is not there."""
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def _core_seconds(folder: Path) -> float:
    file = folder / SECONDS
    runs = [line.split() for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    return sum(float(seconds) * int(cores) for seconds, cores in runs)
