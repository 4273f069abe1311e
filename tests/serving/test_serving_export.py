"""`shotless export`: a copy that plain transformers loads, and clear words if it cannot be made."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_world import TEMPLATE, TEXTS, VERBALISERS, make_student, seal, shotless
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.params import TaskParams
from pipeline.serving import Predictor
from pipeline.task import Task


@pytest.fixture
def student(tmp_path, model_folder):
    return make_student(tmp_path / "cd", model_folder("llama"))


def test_a_copy_gives_the_students_answers_in_plain_transformers_and_here(tmp_path, student):
    (student / "README.md").write_text("the card", "utf-8")
    (student / "notes.txt").write_text("not a file of the student", "utf-8")
    done = shotless(tmp_path, "export", "--student", str(student), "-o", "out/cd")
    assert "all weights are finite" in done.stdout
    folder = tmp_path / "out" / "cd"
    assert {file.name for file in folder.iterdir()} == {file.name for file in student.iterdir()} - {"notes.txt"}
    expected = Predictor(student, 1).predict(TEXTS)
    assert Predictor(folder, 1).predict(TEXTS) == expected
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    labels = [tokenizer(text).input_ids[0] for text in (" bad", " good")]
    for text, prediction in zip(TEXTS, expected, strict=True):
        prompt = tokenizer(TEMPLATE.format(text=text), return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            logits = model(**prompt).logits[0, -1, labels]
        assert torch.softmax(logits, -1).tolist() == pytest.approx(list(prediction.probabilities.values()), abs=1e-5)


def test_what_exists_is_replaced_only_with_force(tmp_path, student):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    refused = shotless(tmp_path, "export", "--student", str(student), "-o", "out", check=False)
    assert refused.returncode == 2
    assert (tmp_path / "out" / "mine").exists()
    shotless(tmp_path, "export", "--student", str(student), "-o", "out", "--force")
    assert not (tmp_path / "out" / "mine").exists()
    itself = shotless(tmp_path, "export", "--student", str(student), "-o", str(student), "--force", check=False)
    assert itself.returncode == 2
    assert (student / "model.safetensors").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path, student):
    weights = load_file(student / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    seal(student, Task(TaskParams(template=TEMPLATE, verbalisers=VERBALISERS)))
    done = shotless(tmp_path, "export", "--student", str(student), "-o", "out", check=False)
    assert done.returncode == 1
    assert "model.norm.weight has numbers that are not finite" in done.stderr
    assert not (tmp_path / "out").exists()
