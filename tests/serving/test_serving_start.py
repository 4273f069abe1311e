"""A student starts quickly: libraries that answering does not use stay out, and what was found out about its folder is remembered."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from serving_world import PROJECT, TEXTS, choose, make_student

from pipeline.serving import Predictor, torch_engine

AFTER = """
import sys
from pipeline.cli import app
sys.argv = ["shotless", "predict", "-i", "rows.jsonl", "--threads", "1"]
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
print([name for name in ("torch._dynamo", "scipy", "sklearn", "accelerate", "peft", "polars", "dvc", "fastapi") if name in sys.modules])
import torch
from transformers import utils
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item(), torch._dynamo.disable.__module__, utils.is_scipy_available())
"""


@pytest.fixture
def project(tmp_path, model_folder, monkeypatch):
    """A project with a student, and the memory of a run."""
    make_student(tmp_path / "artifacts" / "students" / "cd", model_folder("llama"))
    choose(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    (tmp_path / ".work").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def chosen(monkeypatch):
    """The folders that engines were chosen for."""
    calls, real = [], torch_engine.open_engine
    monkeypatch.setattr(torch_engine, "open_engine", lambda *given: calls.append(given) or real(*given))
    return calls


def shares(opened):
    return [found.probabilities for found in opened.predict(TEXTS)]


@pytest.mark.slow
def test_predict_imports_what_it_uses_and_leaves_no_trace(project):
    expected = shares(Predictor("artifacts/students/cd", 1))
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", AFTER], cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *rows, imported, after = done.stdout.splitlines()
    assert imported == "[]"
    assert after == "2.0 torch._dynamo.decorators True", "the compiler is the real one again"
    for row, own in zip(map(json.loads, rows), expected, strict=True):
        assert row["probabilities"] == pytest.approx(own, abs=1e-6)


@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("mistral", {"sliding_window": 8})], ids=["packed", "generic"])
def test_an_engine_is_chosen_once_for_a_folder(project, model_folder, chosen, architecture, changes):
    folder = make_student(project / "artifacts" / "students" / "own", model_folder(architecture, **changes))
    first, second = Predictor(folder, 1), Predictor(folder, 1)
    assert len(chosen) == 1
    assert shares(first) == shares(second)
    assert (second.engine.name, second.engine.reason) == (first.engine.name, f"{first.engine.reason}; found before")
    Predictor(folder, 1, keep_states=True)
    assert len(chosen) == 2, "what is kept beside the answers is another comparison"
    Predictor(make_student(project / "artifacts" / "students" / "other", model_folder("qwen2")), 1)
    assert len(chosen) == 3


@pytest.mark.parametrize("damage", ["not json", "[1]", "{}", "null"])
def test_a_damaged_memory_is_made_again(project, chosen, damage):
    Predictor("artifacts/students/cd", 1)
    (note,) = (project / ".work" / "engines").iterdir()
    kept = note.read_text("utf-8")
    note.write_text(damage, "utf-8")
    Predictor("artifacts/students/cd", 1)
    assert len(chosen) == 2
    assert note.read_text("utf-8") == kept


def test_other_code_is_another_choice(project, chosen, monkeypatch):
    Predictor("artifacts/students/cd", 1)
    monkeypatch.setattr(torch_engine.engines, "__file__", __file__)
    Predictor("artifacts/students/cd", 1)
    assert len(chosen) == 2


@pytest.mark.parametrize("memory", ["none", "cannot be written"])
def test_without_a_memory_it_is_chosen_each_time_and_nothing_is_written(project, chosen, memory):
    shutil.rmtree(project / ".work")
    if memory != "none":
        (project / ".work").mkdir()
        (project / ".work" / "engines").symlink_to("/proc")
    for _ in range(2):
        assert len(shares(Predictor("artifacts/students/cd", 1))) == len(TEXTS)
    assert len(chosen) == 2
    assert (project / ".work").exists() == (memory != "none")
