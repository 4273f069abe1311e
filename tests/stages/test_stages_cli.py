"""What a user sees at the command line when something is wrong: a message, an exit code, no traceback."""

import shutil
import subprocess
import sys

import pytest
from conftest import PROJECT
from ruamel.yaml import YAML


def run(folder, *command):
    environment = {"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def folder(tmp_path):
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    return tmp_path


def test_a_misspelt_key_is_named_with_the_choices_and_ends_with_2(folder):
    yaml = YAML()
    params = yaml.load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["students"]["cd"]["learning_rte"] = 1e-4
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(params, file)
    result = run(folder, "-c", "from pipeline.cli import app; app()", "check")
    assert result.returncode == 2
    assert "students.cd.learning_rte: unknown key; there are: adapters, also, base, batch_size" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_stage_without_its_inputs_says_what_makes_them(folder):
    result = run(folder, "-m", "stages.teacher", "few_shot")
    assert result.returncode in {1, 2}
    assert "dvc repro" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_stage_for_an_unknown_entry_names_the_choices(folder):
    for stage, block in {"teacher": "few_shot", "targets": "mix", "evaluate": "cd"}.items():
        result = run(folder, "-m", f"stages.{stage}", "nope")
        assert result.returncode == 2, result.stderr
        assert block in result.stderr
        assert "Traceback" not in result.stderr
