"""The study's plan: every part holds, parts differ in their draws alone, and faults are named."""

from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT
from ruamel.yaml import YAML

from pipeline.errors import UsageError
from pipeline.params import load_params, parse_params
from pipeline.study.plan import (
    PLAN,
    Part,
    StudyPlan,
    check_curves,
    check_group,
    digest,
    load_plan,
    make_part,
    part_named,
    part_params,
    parts,
)

SHIPPED = load_plan(PROJECT / PLAN)


@pytest.mark.parametrize("part", parts(SHIPPED), ids=lambda part: part.name)
def test_every_part_s_params_hold(part: Part) -> None:
    params = parse_params(part_params(SHIPPED, part, PROJECT))
    assert params.data.demonstrations.seed == part.draw
    assert {student.seed for student in params.students.values()} == {part.draw}


def test_pairs_and_curves_name_methods_that_there_are() -> None:
    params = {name: parse_params(part_params(SHIPPED, Part(name, group.draws[0]), PROJECT)) for name, group in SHIPPED.groups.items()}
    methods = {name: [*entry.students, *entry.baselines] for name, entry in params.items()}
    for name, group in SHIPPED.groups.items():
        check_group(name, group, methods[name], {key for source in params[name].data.sources.values() for key in source.slices})
    check_curves(SHIPPED.curves, methods)


def test_draws_and_machines_of_a_group_have_one_digest(tmp_path: Path) -> None:
    raw = [part_params(SHIPPED, Part("sst2", draw), PROJECT) for draw in (0, 1)]
    path = raw[1]["data"]["sources"]["sst2"]["origin"]["path"]
    raw[1]["data"]["sources"]["sst2"]["origin"]["path"] = str(tmp_path / Path(path).name)
    assert digest(raw[0]) == digest(raw[1])
    raw[1]["students"]["cd"]["steps"] += 1
    assert digest(raw[0]) != digest(raw[1])


def test_draws_of_a_group_share_all_but_the_draw() -> None:
    for name, group in SHIPPED.groups.items():
        first, *others = (part_params(SHIPPED, Part(name, draw), PROJECT) for draw in group.draws)
        for other in others:
            other["data"]["demonstrations"]["seed"] = first["data"]["demonstrations"]["seed"]
            for student in other["students"].values():
                student["seed"] = group.draws[0]
            assert other == first


def test_the_first_draw_of_every_group_comes_before_the_second_of_any() -> None:
    plan = StudyPlan.model_validate({"groups": {"a": {"title": "A", "draws": [3, 4]}, "b": {"title": "B", "draws": [7]}}})
    assert [part.name for part in parts(plan)] == ["a-3", "b-7", "a-4"]


def test_a_part_s_workspace_is_a_project_of_its_own(tmp_path: Path) -> None:
    for item in ("dvc.yaml", "params.yaml", ".dvcignore"):
        (tmp_path / item).write_text((PROJECT / item).read_text(encoding="utf-8"), encoding="utf-8")
    for folder in ("pipeline", "stages", "presets/study", ".dvc"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n", encoding="utf-8")
    (tmp_path / "presets" / "less.yaml").write_text("students: {pbft: null}\n", encoding="utf-8")
    raw = {"groups": {"few": {"title": "Few", "layers": ["less"], "set": {"data": {"transfer": {"limit": 9}}}, "draws": [5]}}}
    plan = StudyPlan.model_validate(raw)
    workspace = make_part(plan, part_named(plan, "few-5"), tmp_path)
    assert workspace == tmp_path / "runs" / "study" / "few-5"
    params = load_params(workspace / "params.yaml")
    assert (list(params.students), params.data.transfer.limit, params.data.demonstrations.seed) == (["cd"], 9, 5)
    assert (workspace / "dvc.yaml").read_text(encoding="utf-8") == (PROJECT / "dvc.yaml").read_text(encoding="utf-8")


def faulty(**changes: Any) -> dict[str, Any]:
    return {"groups": {"a": {"title": "A", "draws": [0]} | changes}}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (faulty(drawz=[1]), r"groups\.a\.drawz: Extra inputs"),
        (faulty(draws=[]), r"groups\.a\.draws: .*at least 1"),
        (faulty() | {"curves": {"c": {"title": "C", "x": "n", "lines": {"l": {1: "b/cd"}}}}}, r"'b/cd' is not GROUP/METHOD; groups are a"),
    ],
)
def test_faults_of_the_plan_are_named(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    YAML(typ="safe", pure=True).dump(raw, file)
    with pytest.raises(UsageError, match=message):
        load_plan(file)


def test_unknown_parts_layers_and_methods_are_named() -> None:
    plan = StudyPlan.model_validate(faulty(layers=["nowhere"], pairs=[["cd", "nothing"]]))
    with pytest.raises(UsageError, match=r"no part 'a-1'; choose one of: a-0"):
        part_named(plan, "a-1")
    with pytest.raises(UsageError, match=r"groups\.a\.layers: no presets/nowhere\.yaml"):
        part_params(plan, Part("a", 0), PROJECT)
    with pytest.raises(UsageError, match=r"groups\.a\.pairs: no method 'nothing'; choose one of: cd"):
        check_group("a", plan.groups["a"], ["cd"], [])


def test_a_group_trains_the_students_that_it_names_in_the_layers_order() -> None:
    plan = StudyPlan.model_validate(faulty(students=["pbft", "cd"]))
    assert list(part_params(plan, Part("a", 0), PROJECT)["students"]) == ["cd", "pbft"]
    one = StudyPlan.model_validate(faulty(students=["pbft"]))
    assert list(part_params(one, Part("a", 0), PROJECT)["students"]) == ["pbft"]
    unknown = StudyPlan.model_validate(faulty(students=["nothing"]))
    with pytest.raises(UsageError, match=r"groups\.a\.students: no student 'nothing'; choose one of: cd, pbft"):
        part_params(unknown, Part("a", 0), PROJECT)
