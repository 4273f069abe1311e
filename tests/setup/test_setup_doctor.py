"""`shotless doctor`: facts about the machine, libraries of another version, disk, files, the engine of each model."""

import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError

import pytest
from conftest import PROJECT
from serving_world import shotless

from pipeline.params import load_params, read_yaml, reading, write_yaml
from pipeline.setup import doctor

USAGE = namedtuple("USAGE", "total used free")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("params.yaml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: USAGE(100e9, 50e9, 50e9))
    monkeypatch.setattr(doctor, "MEMORY_NEEDED_GB", 0.0)
    return tmp_path


def said(folder, *, check=True):
    done = shotless(folder, "doctor", check=check)
    return " ".join(done.stdout.split()), done.returncode


def test_a_machine_with_everything_ends_with_0(folder):
    text, _ = said(folder)
    assert "Nothing is missing." in text
    assert "students float32, on" in text
    assert f"params.yaml {load_params(folder / 'params.yaml').summary}" in text
    assert "model smollm2 not made yet → `shotless run model@smollm2` makes it" in text


@pytest.mark.parametrize(
    ("architecture", "changes", "engine"), [("llama", {}, "shared_prefix"), ("mistral", {"sliding_window": 8}, "generic")]
)
def test_the_engine_of_a_model_is_named_with_the_reason(folder, model_folder, architecture, changes, engine):
    shutil.copytree(model_folder(architecture, **changes), folder / "artifacts" / "models" / "smollm2")
    assert f"engine {engine}: " in said(folder)[0]


def test_another_version_a_full_disk_and_an_absent_file_end_with_1(folder, monkeypatch):
    real = reading.version
    monkeypatch.setattr(reading, "version", lambda name: "0.0.1" if name == "peft" else real(name))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: USAGE(100e9, 99e9, 1e9))
    raw = read_yaml(folder / "params.yaml")
    raw["models"]["mine"] = {"path": "my/model"}
    write_yaml(raw, folder / "params.yaml")
    text, code = said(folder, check=False)
    assert code == 1
    assert "missing: disk, versions, files" in text
    assert "peft 0.0.1 is installed, constraints.txt pins" in text
    assert "1.0 GB free, 6 GB needed" in text
    assert "models.mine.path: 'my/model' does not exist" in text


def test_a_library_that_is_not_installed_is_named_without_importing_it(folder, monkeypatch):
    real = reading.version

    def version(name):
        if name == "torch":
            raise PackageNotFoundError
        return real(name)

    monkeypatch.setattr(reading, "version", version)
    monkeypatch.setattr(doctor, "_torch", None)
    text, code = said(folder, check=False)
    assert code == 1
    assert "torch is not installed, constraints.txt pins" in text


def test_broken_params_are_shown_and_do_not_hide_the_rest(folder):
    (folder / "params.yaml").write_text("tsk: {}\n", "utf-8")
    text, code = said(folder, check=False)
    assert code == 1
    assert "unknown key" in text
    assert "torch" in text


def test_a_model_folder_that_cannot_be_loaded_is_missing(folder):
    (folder / "artifacts" / "models" / "smollm2").mkdir(parents=True)
    text, code = said(folder, check=False)
    assert code == 1
    assert "missing: model smollm2" in text


def test_windows_is_named_with_what_is_missing_there(folder, monkeypatch):
    monkeypatch.setattr(doctor.platform, "system", lambda: "Windows")
    monkeypatch.setattr(doctor, "_torch", None)
    text, code = said(folder, check=False)
    assert code == 1
    assert "missing system Windows has neither sh, which runs stages, nor make → use WSL" in text


@pytest.mark.parametrize(
    ("rows", "task", "found"),
    [
        ("text,label\na,positive\nb,negative\n", {}, "ok source mine 2 texts, 2 with a label; 0 bad rows"),
        ("body,label\na,positive\n", {}, "missing source mine mine.csv: no column 'text'; the columns are: body, label."),
        ("text,label\na,good\n", {}, "missing source mine data.sources.mine: 1 of 1 rows of mine.csv cannot be used"),
        ("text,label\n", {}, "missing source mine mine.csv: no row in this file"),
        ("text,label\na,positive\n", {"template": "{text}: "}, "note prompt task: the prompt's end and the answers"),
    ],
)
def test_local_files_and_the_prompt_are_looked_at(folder, rows, task, found):
    (folder / "mine.csv").write_text(rows, "utf-8")
    raw = read_yaml(folder / "params.yaml")
    raw["data"]["sources"]["mine"] = {"path": "mine.csv"}
    raw["task"] |= task
    write_yaml(raw, folder / "params.yaml")
    text, code = said(folder, check=False)
    assert found in text
    assert code == found.startswith("missing")
