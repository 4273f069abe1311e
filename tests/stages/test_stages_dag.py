"""The DAG as DVC reads it: what a change costs, and that each stage depends on the code it imports."""

import ast
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import DVC, PROJECT
from dvc.repo import Repo
from ruamel.yaml import YAML

# What these decide reaches a stage as tracked params, or does not touch its outputs.
EXEMPT = {"pipeline/ending.py", "pipeline/errors.py", "pipeline/progress.py", "stages/_command.py"}


@pytest.fixture(scope="module")
def stages():
    """Stage name → stage, resolved by DVC itself."""
    repo = Repo(str(PROJECT))
    try:
        return {stage.addressing: stage for stage in repo.index.stages}
    finally:
        repo.close()


def imports_of(path: Path) -> set[Path]:
    """Files of this project that a module imports, with the packages' __init__ left out: they are docstrings."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            file = PROJECT / (name.replace(".", "/") + ".py")
            if name.split(".")[0] in {"pipeline", "stages"} and file.is_file():
                found.add(file)
    return found


def closure_of(path: Path) -> set[str]:
    seen, left = set(), [path]
    while left:
        for file in imports_of(left.pop()):
            if file not in seen:
                seen.add(file)
                left.append(file)
    return {file.relative_to(PROJECT).as_posix() for file in seen}


def dependencies(stage) -> set[str]:
    return {Path(dep.fs_path).relative_to(PROJECT).as_posix() for dep in stage.deps if dep.protocol == "local" and dep.def_path}


def affected(stages, params_path: str) -> set[str]:
    """Stages that DVC runs when a key of params.yaml changes: those that track it, and all that depend on their outputs."""
    changed = set()
    for name, stage in stages.items():
        tracked = [key for dep in stage.deps if hasattr(dep, "params") for key in dep.params]
        if any(params_path == key or params_path.startswith(f"{key}.") for key in tracked):
            changed.add(name)
    while True:
        outs = {Path(out.fs_path) for name in changed for out in stages[name].outs}
        more = {
            name
            for name, stage in stages.items()
            for dep in stage.deps
            if not hasattr(dep, "params") and any(_overlap(Path(dep.fs_path), out) for out in outs)
        }
        if more <= changed:
            return changed
        changed |= more


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def test_every_entry_of_the_maps_is_a_stage(stages, raw_params):
    for prefix, block in {
        "teacher": "teachers",
        "targets": "targets",
        "student": "students",
        "check": "students",
        "baseline": "baselines",
    }.items():
        assert {f"{prefix}@{name}" for name in raw_params[block]} <= set(stages)


@pytest.mark.parametrize(
    "name", ["fetch", "prepare", "tune", "teacher", "targets", "student", "evaluate", "baseline", "check", "compare", "report"]
)
def test_a_stage_depends_on_all_the_code_it_imports(name):
    text = YAML(typ="safe", pure=True).load((PROJECT / "dvc.yaml").read_text(encoding="utf-8"))["stages"][name]
    body = text.get("do", text)
    entry = body["cmd"].split()[2].replace(".", "/") + ".py"
    declared = [dep for dep in body["deps"] if dep.startswith(("pipeline", "stages"))]
    used = closure_of(PROJECT / entry) | {entry}
    lacking = {file for file in used - EXEMPT if not any(file == dep or file.startswith(f"{dep}/") for dep in declared)}
    assert not lacking, f"{name} imports {sorted(lacking)} and does not depend on them"
    unused = {dep for dep in declared if not any(file == dep or file.startswith(f"{dep}/") for file in used)}
    assert not unused, f"{name} depends on {sorted(unused)} and does not import them"


def test_a_student_s_learning_rate_costs_only_that_student(stages):
    assert affected(stages, "students.cd.learning_rate") == {"student@cd", "evaluate@cd", "check@cd", "compare", "report"}


@pytest.mark.parametrize(
    "key",
    ["students.cd.ce_weight", "targets.mix.calibration", "evaluation.bootstrap", "evaluation.risk_examples", "baselines.icl.contexts"],
)
def test_nothing_after_the_cache_starts_the_teacher(stages, key):
    assert not {name for name in affected(stages, key) if name.startswith(("teacher@", "prepare", "fetch", "tune@"))}


def test_student_code_is_no_dependency_of_the_teacher(stages):
    for area in ("student", "targets", "evaluation", "report"):
        assert f"pipeline/{area}" not in dependencies(stages["teacher@few_shot"])


def test_runtime_knobs_are_tracked_by_no_stage(stages):
    assert not any(affected(stages, f"runtime.{knob}") for knob in ("threads", "engine", "workers"))


def test_a_new_student_is_one_more_entry(tmp_path):
    """DVC resolves a params.yaml with one more student to the same stages and two more."""
    for name in ("dvc.yaml", "params.yaml", "pipeline", "stages"):
        source = PROJECT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    subprocess.run([*DVC, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    before = subprocess.run([*DVC, "stage", "list", "--name-only"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    yaml = YAML()
    params = yaml.load((tmp_path / "params.yaml").read_text(encoding="utf-8"))
    params["students"]["another"] = {**params["students"]["cd"], "seed": 1}
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    after = subprocess.run([*DVC, "stage", "list", "--name-only"], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert set(after.split()) - set(before.split()) == {"student@another", "evaluate@another", "check@another"}
