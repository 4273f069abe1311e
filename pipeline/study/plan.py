"""What the study runs: groups of runs that differ in their draw of demonstrations, and the curves that are drawn through groups.

`presets/study/plan.yaml` names, for each group, the params files that are laid over params.yaml one after the other, and its draws. A part
is one draw of one group: a run of the pipeline in a workspace of its own, whose demonstrations are drawn with the draw's number, and whose
students are trained with it as their seed. The evaluation sets of a group are the same in every draw, so that methods and draws are
compared on the same examples.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from pipeline.errors import UsageError, choices
from pipeline.files import sha256_json
from pipeline.params import parse_params
from pipeline.params.base import Frozen, Name
from pipeline.params.presets import merge, write_workspace
from pipeline.params.yaml_file import read_yaml

PLAN = Path("presets/study/plan.yaml")
WORKSPACES = Path("runs/study")


class GroupParams(Frozen):
    """Runs that differ in nothing but their draw."""

    title: str
    layers: tuple[str, ...] = Field(default=(), strict=False)
    """Files under presets/, without `.yaml`, each laid over what came before."""
    set: dict[str, Any] = Field(default={})
    """Laid over all of them."""
    students: tuple[Name, ...] | None = Field(default=None, strict=False)
    """Of the students that these give, those that the group trains; null: all."""
    draws: tuple[int, ...] = Field(min_length=1, strict=False)
    pairs: tuple[Annotated[tuple[str, str], Field(strict=False)], ...] = Field(default=(), strict=False)
    """Methods whose difference in accuracy is given, the first minus the second, on the same examples."""
    slices: tuple[Name, ...] = Field(default=(), strict=False)
    """What the sources name in their `slices`: accuracy within each value has a table."""
    table: bool = True
    """Whether the group has a table of its own, or is there for a curve."""


class CurveParams(Frozen):
    """Accuracy against something that was varied."""

    title: str
    x: str
    """What was varied, with its unit: the axis' title."""
    log: bool = False
    lines: dict[str, dict[int | float, str]]
    """Line → where on the axis → group/method."""


class StudyPlan(Frozen):
    """All of plan.yaml."""

    groups: dict[Name, GroupParams]
    curves: dict[Name, CurveParams] = Field(default={})

    @model_validator(mode="after")
    def _points_are_known(self) -> Self:
        for name, curve in self.curves.items():
            for line, points in curve.lines.items():
                for point in points.values():
                    if point.count("/") != 1 or point.split("/")[0] not in self.groups:
                        raise ValueError(f"curves.{name}.lines.{line}: {point!r} is not GROUP/METHOD; groups are {choices(self.groups)}")
        return self


@dataclass(frozen=True)
class Part:
    """One draw of one group."""

    group: str
    draw: int

    @property
    def name(self) -> str:
        """How it is called, and its workspace's folder."""
        return f"{self.group}-{self.draw}"


def load_plan(path: Path = PLAN) -> StudyPlan:
    """Read and check the plan. Raises UsageError with every fault."""
    try:
        return StudyPlan.model_validate(read_yaml(path))
    except ValidationError as error:
        faults = [f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UsageError("\n".join(faults)) from None


def parts(plan: StudyPlan) -> list[Part]:
    """Every part, the first draw of every group before the second of any: a study that is cut off has seen all its groups."""
    last = max(len(group.draws) for group in plan.groups.values())
    return [Part(name, group.draws[n]) for n in range(last) for name, group in plan.groups.items() if n < len(group.draws)]


def part_named(plan: StudyPlan, name: str) -> Part:
    """Raises UsageError naming the choices."""
    known = {part.name: part for part in parts(plan)}
    if name not in known:
        raise UsageError(f"study: no part {name!r}; choose one of: {choices(known)}")
    return known[name]


def part_params(plan: StudyPlan, part: Part, project: Path) -> dict[str, Any]:
    """The params of one part, not yet parsed.

    Raises UsageError where a layer's file is not there, or the group names a student that they do not give.
    """
    group = plan.groups[part.group]
    raw = read_yaml(project / "params.yaml")
    for layer in group.layers:
        file = project / "presets" / f"{layer}.yaml"
        if not file.is_file():
            raise UsageError(f"{PLAN}: groups.{part.group}.layers: no presets/{layer}.yaml.")
        raw = merge(raw, read_yaml(file))
    raw = merge(raw, group.set)
    raw = merge(raw, {"data": {"demonstrations": {"seed": part.draw}}})
    students = raw["students"]
    for name in group.students or ():
        _known(f"groups.{part.group}.students: no student", name, students)
    kept = {name: entry for name, entry in students.items() if group.students is None or name in group.students}
    return raw | {"students": {name: entry | {"seed": part.draw} for name, entry in kept.items()}}


def make_part(plan: StudyPlan, part: Part, project: Path) -> Path:
    """Write a part's workspace, or bring it up to date, and return its folder; what it has made before stays.

    Raises UsageError where its params do not hold.
    """
    raw = part_params(plan, part, project)
    parse_params(raw, project / PLAN)
    return write_workspace(raw, project / WORKSPACES / part.name, project)


def digest(raw: Mapping[str, Any]) -> str:
    """Of a part's params, not yet parsed, without what differs between draws and machines: seeds, and the folders of local files."""
    copied = json.loads(json.dumps(raw))
    copied["data"]["demonstrations"].pop("seed", None)
    for student in copied["students"].values():
        student.pop("seed", None)
    for source in copied["data"]["sources"].values():
        if "path" in source["origin"]:
            source["origin"]["path"] = Path(source["origin"]["path"]).name
    return sha256_json(copied)


def check_group(name: str, group: GroupParams, methods: Collection[str], dimensions: Collection[str]) -> None:
    """Refuse pairs and slices that name a method or a dimension which the group does not have."""
    for method in (method for pair in group.pairs for method in pair):
        _known(f"groups.{name}.pairs: no method", method, methods)
    for dimension in group.slices:
        _known(f"groups.{name}.slices: nothing is sliced by", dimension, dimensions)


def check_curves(curves: Mapping[str, CurveParams], methods: Mapping[str, Collection[str]]) -> None:
    """Refuse points that name a method which their group does not have; `methods` maps a group to its methods."""
    for name, curve in curves.items():
        for point in (point for points in curve.lines.values() for point in points.values()):
            group, method = point.split("/")
            _known(f"curves.{name}: {group}: no method", method, methods[group])


def _known(where: str, name: str, names: Collection[str]) -> None:
    if name not in names:
        raise UsageError(f"{PLAN}: {where} {name!r}; choose one of: {choices(names)}")
