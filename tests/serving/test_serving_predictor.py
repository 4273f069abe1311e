"""A student from Python: the probabilities of plain transformers, its checks, and inputs that cannot be used."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_world import LONG_VERBALISERS, PROJECT, TEMPLATE, TEXTS, VERBALISERS, make_student, seal
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import CorruptError, UsageError
from pipeline.params import CompletionParams, TaskParams
from pipeline.serving import Predictor
from pipeline.task import Task


@pytest.fixture(scope="module")
def student(tmp_path_factory, model_folder):
    return make_student(tmp_path_factory.mktemp("students") / "cd", model_folder("llama"))


@pytest.fixture(scope="module")
def predictor(student):
    return Predictor(student, 1)


@torch.no_grad()
def plainly(folder, verbalisers):
    """Label probabilities and outputs of the last layer with transformers alone, prompt by prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    caught = []
    model.model.layers[-1].register_forward_hook(lambda _module, _args, out: caught.append(out[0] if isinstance(out, tuple) else out))
    shares, states = [], []
    for text in TEXTS:
        prompt = tokenizer(TEMPLATE.format(text=text)).input_ids
        totals = []
        for label in sorted(verbalisers):
            ids = tokenizer(verbalisers[label]).input_ids
            logs = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            totals.append(sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)))
        shares.append(np.exp(totals) / np.exp(totals).sum())
        model(torch.tensor([prompt]))
        states.append(caught[-1][0, -1].numpy())
    return np.array(shares), np.array(states)


def shares_of(predictions):
    return np.array([list(prediction.probabilities.values()) for prediction in predictions])


@pytest.mark.parametrize("verbalisers", [VERBALISERS, LONG_VERBALISERS], ids=["one token", "several tokens"])
@pytest.mark.parametrize(("architecture", "changes"), [("llama", {}), ("mistral", {"sliding_window": 8})], ids=["llama", "sliding window"])
def test_answers_and_states_are_those_of_plain_transformers(tmp_path, model_folder, architecture, changes, verbalisers):
    folder = make_student(tmp_path / "s", model_folder(architecture, **changes), verbalisers=verbalisers)
    predictor = Predictor(folder, 1, keep_states=True)
    expected, states = plainly(folder, verbalisers)
    found = predictor.predict(TEXTS)
    assert shares_of(found) == pytest.approx(expected, abs=1e-5)
    assert np.array([p.state for p in found]) == pytest.approx(states, rel=2e-3, abs=1e-3)  # kept in float16
    labels = sorted(verbalisers)
    assert [p.label for p in found] == [labels[row.argmax()] for row in expected]
    assert [p.confidence for p in found] == pytest.approx(expected.max(1), abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [list(p.ids) for p in found] == [tokenizer(TEMPLATE.format(text=text)).input_ids for text in TEXTS]


def test_the_three_lines_of_the_documentation_run(student):
    lines = [line.strip() for line in (PROJECT / "pipeline/serving/predictor.py").read_text("utf-8").splitlines()]
    start = lines.index("from pipeline.serving import Predictor")
    code = "\n".join(lines[start : start + 3]).replace('"artifacts/students/cd"', repr(str(student)))
    exec(compile(code, "docs", "exec"), {})


def test_an_input_that_cannot_be_used_leaves_the_others_their_answers(predictor):
    bad = ["", "   ", 7, None, {"txt": "a"}, {"text": 3}, "a \x00 b", "\ud800"]
    mixed = [value for pair in zip(TEXTS[: len(bad)], bad, strict=True) for value in pair]
    found = predictor.predict(mixed)
    alone = predictor.predict(TEXTS[: len(bad)])
    assert [p.label for p in found[::2]] == [p.label for p in alone]
    assert shares_of(found[::2]) == pytest.approx(shares_of(alone), abs=1e-6)
    assert [p.error for p in found[1::2]] == [
        "text: empty", "text: empty", "text: neither a text nor an object", "text: neither a text nor an object", "text: missing",
        "text: not a text", "text: control character", "text: lone surrogate",
    ]  # fmt: skip
    assert all(p.label is p.confidence is p.probabilities is None for p in found[1::2])


def test_a_text_that_spells_a_control_token_of_the_template_is_an_error_of_its_row(tmp_path, model_folder):
    folder = make_student(tmp_path / "s", model_folder("llama"), template="{text}<|end|>answer:")
    fine, spelt = Predictor(folder, 1).predict(["a film", "a film<|end|>"])
    assert fine.error is None
    assert "<|end|>, a control token" in spelt.error


def test_nothing_asked_is_nothing_answered(predictor):
    assert predictor.predict([]) == []


def test_a_text_is_seen_as_it_was_in_training_without_outer_white_space(predictor):
    one, other = predictor.predict(["a warm film", {"text": "  a warm film\n"}])
    assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_a_single_text_is_refused_with_what_to_write(predictor):
    with pytest.raises(UsageError, match=r"predict\(\[input\]\)"):
        predictor.predict("a warm film")


def test_several_fields_need_an_object(tmp_path, model_folder):
    folder = make_student(tmp_path / "two", model_folder("llama"), template="{title}\n{text} =")
    text, fields = Predictor(folder, 1).predict(["a warm film", {"title": "x", "text": "a warm film"}])
    assert text.error == "title: not an object with the fields title, text"
    assert fields.error is None


def test_a_folder_that_is_not_a_whole_student_is_refused(tmp_path, student):
    shutil.copytree(student, tmp_path / "s")
    (tmp_path / "s" / "config.json").write_text("{}", "utf-8")
    with pytest.raises(CorruptError, match=r"config\.json"):
        Predictor(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"manifest\.json"):
        Predictor(tmp_path / "s")


def test_a_student_that_answers_in_free_text_is_refused(tmp_path, model_folder):
    shutil.copytree(model_folder("llama"), tmp_path / "s")
    seal(tmp_path / "s", Task(TaskParams(template=TEMPLATE, completion=CompletionParams())))
    with pytest.raises(UsageError, match="answers in free text"):
        Predictor(tmp_path / "s")


def test_a_student_whose_weights_are_not_numbers_has_an_error_for_an_answer(tmp_path, model_folder):
    """Its engine cannot be told from the plain forward either: NaN equals nothing."""
    shutil.copytree(model_folder("llama"), tmp_path / "s")
    weights = load_file(tmp_path / "s" / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, tmp_path / "s" / "model.safetensors", {"format": "pt"})
    seal(tmp_path / "s", Task(TaskParams(template=TEMPLATE, verbalisers=VERBALISERS)))
    [found] = Predictor(tmp_path / "s", 1).predict(["a film"])
    assert found.probabilities is None
    assert "not numbers" in found.error
