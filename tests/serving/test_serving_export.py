"""`shotless export`: a copy that plain transformers loads, and clear words where it cannot be made."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_world import TEXTS, make_student, shotless
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.models.provenance import identity_entries
from pipeline.serving.predictor import Predictor


@pytest.fixture
def student(tmp_path, model_folder):
    return make_student(tmp_path / "cd", model_folder("llama"))


def test_a_copy_gives_the_students_answers_in_plain_transformers(tmp_path, student):
    done = shotless(tmp_path, "export", "--student", str(student), "-o", "out/cd")
    assert "all weights are finite" in done.stdout
    folder = tmp_path / "out" / "cd"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    labels = [tokenizer(text).input_ids[0] for text in (" bad", " good")]
    for text, expected in zip(TEXTS, Predictor(student, 1).predict(TEXTS), strict=True):
        with torch.no_grad():
            logits = model(**tokenizer(f"Review: {text}\nSentiment:", return_tensors="pt", return_token_type_ids=False)).logits[
                0, -1, labels
            ]
        assert torch.softmax(logits, -1).tolist() == pytest.approx(list(expected.probabilities.values()), abs=1e-5)


def test_what_is_there_is_replaced_only_when_told(tmp_path, student):
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


@pytest.mark.parametrize(("form", "said"), [("gguf", "convert_hf_to_gguf.py"), ("onnx", "optimum-cli"), ("zip", "choose one of")])
def test_other_formats_say_what_writes_them(tmp_path, student, form, said):
    done = shotless(tmp_path, "export", "--student", str(student), "-o", "out", "--format", form, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_not_finite_is_named(tmp_path, student):
    file = student / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    provenance = json.loads((student / "provenance.json").read_text("utf-8"))
    (student / "provenance.json").write_text(json.dumps(provenance | identity_entries(student, provenance)), "utf-8")
    done = shotless(tmp_path, "export", "--student", str(student), "-o", "out", check=False)
    assert done.returncode == 1
    assert "model.norm.weight holds numbers that are not finite" in done.stderr
