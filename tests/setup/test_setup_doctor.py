"""`shotless doctor`: facts about the machine, missing packages and disk, the engine of each model."""

import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest
from conftest import PROJECT
from serving_world import shotless

from pipeline.setup import machine


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("params.yaml", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(100e9, 50e9, 50e9))
    monkeypatch.setattr(machine, "MEMORY_NEEDED_GB", 0.0)
    return tmp_path


def test_a_machine_with_everything_ends_with_0(folder):
    done = shotless(folder, "doctor")
    assert "Nothing is missing." in done.stdout
    assert "students float32, on" in done.stdout
    assert "not fetched yet → `dvc repro fetch` fetches it" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("architecture", "changes", "engine"), [("llama", {}, "shared_prefix"), ("mistral", {"sliding_window": 8}, "generic")]
)
def test_the_engine_of_a_fetched_model_is_named_with_the_reason(folder, model_folder, architecture, changes, engine):
    shutil.copytree(model_folder(architecture, **changes), folder / "artifacts" / "models" / "smollm2")
    text = " ".join(shotless(folder, "doctor").stdout.split())
    assert f"engine {engine}: " in text


def test_missing_packages_and_disk_are_named_and_end_with_1(folder, monkeypatch):
    real = machine.version

    def version(name):
        if name == "polars":
            raise PackageNotFoundError
        return "0.0.1" if name == "peft" else real(name)

    monkeypatch.setattr(machine, "version", version)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage(100e9, 99e9, 1e9))
    done = shotless(folder, "doctor", check=False)
    assert done.returncode == 1
    assert "missing: disk, packages" in done.stdout
    assert "not installed: polars" in done.stdout
    assert "peft 0.0.1 (pinned:" in " ".join(done.stdout.split())


def test_broken_params_are_shown_and_do_not_hide_the_rest(folder):
    (folder / "params.yaml").write_text("tsk: {}\n", "utf-8")
    done = shotless(folder, "doctor", check=False)
    assert done.returncode == 1
    assert "unknown key" in done.stdout
    assert "torch" in done.stdout


def test_a_model_folder_that_cannot_be_loaded_is_missing(folder):
    (folder / "artifacts" / "models" / "smollm2").mkdir(parents=True)
    done = shotless(folder, "doctor", check=False)
    assert done.returncode == 1
    assert "missing: model smollm2" in done.stdout
