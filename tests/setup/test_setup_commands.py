"""`shotless check`, `run` and `clean` at the command line: a message, an exit code, no traceback."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import PROJECT
from serving_world import shotless
from small_project import make_project

from pipeline.files import read_json, sha256_json
from pipeline.params import load_params, read_yaml, write_yaml
from pipeline.params.reading import resolve


@pytest.fixture
def folder(tmp_path):
    for name in ("params.yaml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


def change(folder, block, entry, **changes):
    raw = read_yaml(folder / "params.yaml")
    raw[block].setdefault(entry, {}).update(changes)
    write_yaml(raw, folder / "params.yaml")


def test_check_says_what_a_run_will_make(folder):
    assert shotless(folder, "check").stdout == f"params.yaml is in order: {load_params(folder / 'params.yaml').summary}.\n"


def test_a_misspelt_key_is_named_with_the_choices_and_ends_with_2(folder):
    change(folder, "students", "cd", learning_rte=1e-4)
    for command in (["check"], ["run"], ["run", "--preset", "nope"]):
        done = shotless(folder, *command, check=False)
        assert done.returncode == 2
        assert "presets: no 'nope'" in done.stderr or "students.cd.learning_rte: unknown key; there are: adapters, auxiliary" in done.stderr
    assert not (folder / "runs").exists()


def test_absent_files_and_other_versions_are_named_together_before_anything_runs(folder):
    change(folder, "models", "mine", path="my/model")
    change(folder, "models", "other", path="my/other")
    (folder / "constraints.txt").write_text("torch==0.1\n", "utf-8")
    for command in ("check", "run"):
        done = shotless(folder, command, check=False)
        assert done.returncode == 2
        assert "models.mine.path: 'my/model' does not exist" in done.stderr
        assert "models.other.path: 'my/other' does not exist" in done.stderr
        assert "constraints.txt pins 0.1. Run `make setup`, or correct the pin." in done.stderr


@pytest.mark.slow
def test_a_stage_for_an_unknown_entry_or_without_inputs_says_what_to_do(folder):
    write_yaml(read_yaml(folder / "params.yaml") | {"runtime": {"threads": 1}}, folder / "params.yaml")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    for stage, name, said in [("params", "", ""), ("source", "nope", "choose one of: amazon"), ("targets", "mix", "dvc repro")]:
        command = [sys.executable, "-m", f"stages.{stage}", *([name] if name else [])]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if stage == "params" else 2), done.stderr
        assert said in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stage_refuses_a_library_that_was_installed_after_the_params_were_resolved(folder):
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    resolve(folder)
    (folder / "constraints.txt").write_text("torch==0.1\n", "utf-8")  # what is installed differs from the pin, and `params` does not run
    command = [sys.executable, "-m", "stages.source", "amazon"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "constraints.txt pins 0.1. Run `make setup`, or correct the pin." in done.stderr


def dag(folder, model):
    """A small project that DVC can run."""
    make_project(folder, model)
    for item in ("dvc.yaml", ".dvcignore", "constraints.txt"):
        shutil.copyfile(PROJECT / item, folder / item)
    for item in ("pipeline", "stages"):
        shutil.copytree(PROJECT / item, folder / item, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    shutil.copyfile(PROJECT / ".dvc" / "config", folder / ".dvc" / "config")


@pytest.mark.slow
def test_run_runs_stages_in_the_project_and_in_a_preset_that_shares_the_store(tmp_path, model_folder, capfd):
    dag(tmp_path, model_folder("llama"))
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "more.yaml").write_text("data: {transfer: {limit: 5}}\n", "utf-8")
    shotless(tmp_path, "run", "source@pile")
    assert (tmp_path / "artifacts" / "sources" / "pile" / "examples.parquet").exists()
    shotless(tmp_path, "run", "--preset", "more", "source@pile")
    workspace = tmp_path / "runs" / "more"
    assert (workspace / "artifacts" / "sources" / "pile" / "examples.parquet").exists()
    assert read_json(workspace / "artifacts" / "params.json")["data"]["transfer"]["limit"] == 5
    assert not (workspace / ".dvc" / "cache").exists()
    assert shotless(tmp_path, "run", "teacher@nope", check=False).returncode == 1


@pytest.mark.slow
def test_dvc_alone_runs_stages_in_a_new_shell_without_git_and_with_a_home_that_is_read_only(tmp_path, model_folder):
    folder = tmp_path / "übung, it's $HOME & more"
    folder.mkdir()
    dag(folder, model_folder("llama"))
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/proc", "PYTHONPATH": ":".join(filter(None, sys.path)), "LC_ALL": "C.UTF-8"}
    command = [".venv/bin/python", "-m", "dvc", "repro", "source@gold"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "artifacts" / "sources" / "gold" / "examples.parquet").exists()


@pytest.mark.parametrize(("given", "found"), [(None, "4000"), ("7", "7")])
def test_waiting_threads_of_a_stage_sleep(tmp_path, given, found):
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)} | ({"GOMP_SPINCOUNT": given} if given else {})
    command = [sys.executable, "-c", "import os, stages; print(os.environ['GOMP_SPINCOUNT'])"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == found


IDENTITIES = [
    {"weights": "a" * 64, "dtype": "float32"},
    {"weights": "d" * 64, "dtype": "float32"},
    {"weights": "b" * 64, "dtype": "float32"},
    {"weights": "c" * 64, "dtype": "bfloat16"},
]


@pytest.fixture
def work(tmp_path):
    """A project whose store has scores of its own cache and round, of a workspace's cache, and of none; and a file of timings."""
    for identity in IDENTITIES:
        folder = tmp_path / ".work" / "scores" / sha256_json(identity)[:32]
        folder.mkdir(parents=True)
        (folder / "identity.json").write_text(json.dumps(identity), "utf-8")
        (folder / "part-00000-000000.parquet").write_bytes(b"x" * 2_000_000)
    (tmp_path / ".work" / "cost").mkdir()
    (tmp_path / ".work" / "cost" / "a.json").write_bytes(b"y" * 500_000)
    kept = ("artifacts/teachers/t/manifest.json", "artifacts/rounds/r/calibration.json", "runs/more/artifacts/teachers/t/manifest.json")
    for name, identity in zip(kept, IDENTITIES, strict=False):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(json.dumps({"identity": identity, "files": {}}), "utf-8")
    return tmp_path


def left(folder):
    return {path.name for path in (folder / ".work").iterdir()} | {path.name for path in (folder / ".work" / "scores").iterdir()}


def test_clean_says_what_would_go_and_deletes_nothing(work):
    before = left(work)
    said = shotless(work, "clean").stdout
    assert "2.0 MB" in said
    assert "scores of weights cccccccccccc, bfloat16" in said
    assert "aaaaaaaaaaaa" not in said
    assert "2.5 MB in all; scores of 3 caches and rounds stay (--all takes them too)" in said
    assert "Nothing was deleted; --yes deletes it." in said
    assert left(work) == before


def test_clean_keeps_the_scores_of_caches_unless_told(work):
    shotless(work, "clean", "--yes")
    assert left(work) == {"scores", *(sha256_json(identity)[:32] for identity in IDENTITIES[:3])}
    said = shotless(work, "clean", "--all", "--yes").stdout
    assert "6.0 MB in all" in said
    assert left(work) == {"scores"}
    assert "0.0 MB in all" in shotless(work, "clean").stdout


def test_clean_without_a_work_folder_has_nothing_to_do(tmp_path):
    assert "0.0 MB in all" in shotless(tmp_path, "clean").stdout
