"""Presets: laid over the params, checked, in a workspace of their own that DVC resolves."""

import shutil
import subprocess

import pytest
from conftest import DVC, PROJECT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.files import read_json, write_json
from pipeline.params import load_params, parse_params, read_yaml
from pipeline.params.presets import make_workspace, merge

NAMES = sorted(file.stem for file in (PROJECT / "presets").glob("*.yaml"))
VALUES = st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), VALUES)
WITH_NULLS = st.recursive(st.none() | st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from("abc"), WITH_NULLS), st.dictionaries(st.sampled_from("de"), VALUES))
def test_what_a_preset_does_not_name_stays_nulls_too(base, changes):
    assert merge(base, {}) == base
    assert merge(base, changes) == base | changes


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(MAPPINGS, MAPPINGS)
def test_a_preset_laid_over_twice_is_laid_over_once(base, changes):
    assert merge(merge(base, changes), changes) == merge(base, changes)


def test_mappings_are_merged_values_replaced_nulls_removed_and_order_is_kept():
    base = {"students": {"cd": {"steps": 1, "layers": "0-1"}, "pbft": {"steps": 2}, "third": {}}, "task": 1}
    changes = {"students": {"cd": {"layers": None, "seed": 3}, "pbft": None, "new": {"steps": 4}}}
    merged = merge(base, changes)
    assert merged == {"students": {"cd": {"steps": 1, "seed": 3}, "third": {}, "new": {"steps": 4}}, "task": 1}
    assert list(merged) == ["students", "task"]
    assert list(merged["students"]) == ["cd", "third", "new"]


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_can_be_used_differs_from_the_default_and_says_what_it_shows(name):
    file = PROJECT / "presets" / f"{name}.yaml"
    merged = parse_params(merge(read_yaml(PROJECT / "params.yaml"), read_yaml(file)), file)
    assert merged != load_params(PROJECT / "params.yaml")
    assert file.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("name", ["nope", "../params", "/etc/passwd", "", "..", "json.yaml", "a\0b"])
def test_an_unknown_preset_is_named_with_the_choices(project, name):
    with pytest.raises(UsageError, match=f"choose one of: {', '.join(NAMES)}"):
        make_workspace(name, project)
    assert not (project / "runs").exists()


def test_a_preset_that_params_refuse_is_named_and_makes_no_workspace(project):
    (project / "presets" / "bad.yaml").write_text("students: {cd: {stepz: 3}}\n", "utf-8")
    with pytest.raises(UsageError, match=r"bad\.yaml: students\.cd\.stepz: unknown key"):
        make_workspace("bad", project)
    assert not (project / "runs").exists()


@pytest.mark.slow
def test_a_workspace_is_a_dag_that_dvc_resolves_and_shares_the_cache(project):
    (project / "presets" / "more.yaml").write_text(
        "students: {cd: {seed: 7}, other: {base: models/smollm2, steps: 1, learning_rate: 1e-5, learn_from: targets/mix}}\n"
        "data: {sources: {mine: {path: my/file.jsonl}}}\n"
        "models: {here: {path: ../model}}\n",
        "utf-8",
    )
    workspace = make_workspace("more", project)
    assert workspace == project / "runs" / "more"
    listed = subprocess.run([*DVC, "stage", "list", "--name-only"], cwd=workspace, check=True, capture_output=True, text=True).stdout
    assert {"student@cd", "student@other", "evaluate@other", "source@mine", "model@here", "download@smollm2"} <= set(listed.split())
    config = subprocess.run([*DVC, "config", "--list"], cwd=workspace, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {"core.analytics=false", "core.no_scm=true", f"cache.dir={project}/.dvc/cache"} <= set(config)
    params = load_params(workspace / "params.yaml")
    assert params.students["cd"].seed == 7
    assert params.data.sources["mine"].path == str(project / "my" / "file.jsonl")
    assert params.models["here"].path == str(project.parent / "model")
    assert params.models["smollm2"].path.startswith("downloads/"), "a download is made in the workspace, from the shared cache"
    assert not any(path.is_symlink() for path in workspace.rglob("*"))


def test_a_cache_that_the_project_keeps_elsewhere_is_shared_too(project):
    with (project / ".dvc" / "config.local").open("w") as file:
        file.write("[cache]\n    dir = ../elsewhere\n")
    config = (make_workspace("whole", project) / ".dvc" / "config").read_text("utf-8")
    assert f"dir = {project}/elsewhere" in config


def test_a_workspace_is_brought_up_to_date_and_keeps_what_a_run_made(project):
    workspace = make_workspace("whole", project)
    (workspace / "artifacts").mkdir()
    (workspace / "artifacts" / "made").write_text("kept", "utf-8")
    (project / "pipeline" / "new.py").write_text("", "utf-8")
    shutil.rmtree(project / "pipeline" / "report")
    make_workspace("whole", project)
    assert (workspace / "artifacts" / "made").read_text("utf-8") == "kept"
    assert (workspace / "pipeline" / "new.py").exists()
    assert not (workspace / "pipeline" / "report").exists()


def test_costs_that_the_project_measured_are_there_until_the_workspace_measures_its_own(project):
    write_json({"latency_ms": 1}, project / "metrics" / "cost" / "cd.json")
    own = make_workspace("whole", project) / "metrics" / "cost" / "cd.json"
    assert read_json(own) == {"latency_ms": 1}
    write_json({"latency_ms": 2}, own)
    make_workspace("whole", project)
    assert read_json(own) == {"latency_ms": 2}
