"""Presets: laid over the params, checked, in a workspace of their own."""

import subprocess

import pytest
from conftest import DVC, PROJECT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from pipeline.errors import UsageError
from pipeline.params import load_params, parse_params
from pipeline.params.presets import make_workspace, merge

NAMES = sorted(file.stem for file in (PROJECT / "presets").glob("*.yaml"))
VALUES = st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=8)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), VALUES)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
@given(MAPPINGS)
def test_nothing_laid_over_params_changes_nothing(base):
    assert merge(base, {}) == base


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
@given(MAPPINGS, MAPPINGS)
def test_a_preset_laid_over_twice_is_laid_over_once(base, changes):
    assert merge(merge(base, changes), changes) == merge(base, changes)


def test_mappings_are_merged_values_replaced_and_nulls_removed():
    base = {"students": {"cd": {"steps": 1, "layers": "0-1"}, "pbft": {"steps": 2}}}
    changes = {"students": {"cd": {"layers": None, "seed": 3}, "pbft": None}}
    assert merge(base, changes) == {"students": {"cd": {"steps": 1, "seed": 3}}}


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_holds_and_all_but_sentiment_differ_from_the_default(name):
    yaml = YAML(typ="safe", pure=True)
    raw = yaml.load((PROJECT / "params.yaml").read_text(encoding="utf-8"))
    merged = parse_params(merge(raw, yaml.load((PROJECT / "presets" / f"{name}.yaml").read_text(encoding="utf-8"))))
    assert (merged == load_params(PROJECT / "params.yaml")) == (name == "sentiment")


def test_an_unknown_preset_is_named_with_the_choices(tmp_path):
    with pytest.raises(UsageError, match="no 'nope'; choose one of: "):
        make_workspace("nope", PROJECT)


def test_a_workspace_is_a_dag_that_dvc_resolves(tmp_path):
    for item in ("dvc.yaml", "params.yaml", ".dvcignore"):
        (tmp_path / item).write_text((PROJECT / item).read_text(encoding="utf-8"), encoding="utf-8")
    for folder in ("pipeline", "stages", "presets", ".dvc"):
        (tmp_path / folder).mkdir()
    (tmp_path / ".dvc" / "config").write_text((PROJECT / ".dvc" / "config").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "presets" / "more.yaml").write_text(
        "students: {cd: {seed: 7}, other: {base: models/smollm2, steps: 1, learning_rate: 1e-5, learn_from: targets/mix}}\n"
    )
    workspace = make_workspace("more", tmp_path)
    listed = subprocess.run([*DVC, "stage", "list", "--name-only"], cwd=workspace, check=True, capture_output=True, text=True).stdout
    assert {"student@cd", "student@other", "evaluate@other"} <= set(listed.split())
    settings = subprocess.run([*DVC, "config", "--list"], cwd=workspace, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {"core.analytics=false", "core.no_scm=true", "cache.type=reflink,hardlink,copy", f"cache.dir={tmp_path}/.dvc/cache"} <= set(
        settings
    )
    assert load_params(workspace / "params.yaml").students["cd"].seed == 7
