"""A student from Python: the probabilities of evaluation and of plain transformers, its checks, and inputs that cannot be used."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import PROJECT
from serving_world import LONG_VERBALISERS, TEMPLATE, TEXTS, VERBALISERS, make_student
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import MismatchError, UsageError
from pipeline.evaluation.predict import predict_student
from pipeline.files import example_id
from pipeline.models.provenance import identity_entries
from pipeline.params import TaskParams
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
    """Label probabilities and last hidden states with transformers alone, prompt by prompt."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    shares, states = [], []
    for text in TEXTS:
        prompt = tokenizer(TEMPLATE.format(text=text)).input_ids
        totals = []
        for verbaliser in verbalisers.values():
            ids = tokenizer(verbaliser).input_ids
            logs = model(torch.tensor([prompt + ids])).logits[0].double().log_softmax(-1)
            totals.append(sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(ids)))
        shares.append(np.exp(totals) / np.exp(totals).sum())
        out = model(torch.tensor([prompt]), output_hidden_states=True)
        states.append(out.hidden_states[-1][0, -1].numpy())
    return np.array(shares), np.array(states)


def shares_of(predictions):
    return np.array([list(prediction.probabilities.values()) for prediction in predictions])


@pytest.mark.parametrize("verbalisers", [VERBALISERS, LONG_VERBALISERS], ids=["one token", "several tokens"])
@pytest.mark.parametrize(
    ("architecture", "changes", "engine"), [("llama", {}, "shared_prefix"), ("mistral", {"sliding_window": 8}, "generic")]
)
def test_answers_and_states_are_those_of_plain_transformers(tmp_path, model_folder, architecture, changes, engine, verbalisers):
    folder = make_student(tmp_path / "s", model_folder(architecture, **changes), verbalisers=verbalisers)
    predictor = Predictor(folder, 1)
    assert predictor.engine.engine.name == engine
    expected, states = plainly(folder, verbalisers)
    answers = predictor.answer(TEXTS, with_states=True)
    assert shares_of(answers.predictions) == pytest.approx(expected, abs=1e-5)
    assert answers.states == pytest.approx(states, abs=1e-4)
    labels = list(verbalisers)
    assert [p.label for p in answers.predictions] == [labels[row.argmax()] for row in expected]
    assert [p.confidence for p in answers.predictions] == pytest.approx(expected.max(1), abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert answers.ids == [tokenizer(TEMPLATE.format(text=text)).input_ids for text in TEXTS]


def test_answers_are_those_of_the_evaluation_stage(tmp_path, student, predictor):
    task = Task(TaskParams(template=TEMPLATE, verbalisers=VERBALISERS))
    rows = [{"example_id": example_id({"text": text}), "text": text, "label": "positive"} for text in TEXTS]
    table = predict_student("cd", {"": student}, task, {"test": rows}, tmp_path / "work", 1)
    found = predictor.predict(TEXTS)
    assert [p.label for p in found] == table["predicted"].to_pylist()
    assert shares_of(found) == pytest.approx(np.array(table["probabilities"].to_pylist()), abs=1e-6)


def test_the_three_lines_of_the_documentation_run(student):
    lines = [line.strip() for line in (PROJECT / "pipeline/serving/predictor.py").read_text("utf-8").splitlines()]
    start = lines.index("from pipeline.serving import Predictor")
    code = "\n".join(lines[start : start + 3]).replace('"artifacts/students/cd"', repr(str(student)))
    exec(compile(code, "docs", "exec"), {})


def test_an_input_that_cannot_be_used_leaves_the_others_their_answers(predictor):
    bad = ["", "   ", 7, None, {"txt": "a"}, {"text": 3}, "a \x00 b", "\ud800", "long " * 600]
    mixed = [value for pair in zip(TEXTS[: len(bad)], bad, strict=True) for value in pair]
    found = predictor.predict(mixed)
    alone = predictor.predict(TEXTS[: len(bad)])
    assert [p.label for p in found[::2]] == [p.label for p in alone]
    assert shares_of(found[::2]) == pytest.approx(shares_of(alone), abs=1e-6)
    assert [p.error for p in found[1::2]] == [
        "text: empty", "text: empty", "text: neither a text nor an object", "text: neither a text nor an object", "text: missing",
        "text: not a text", "text: control character", "text: lone surrogate",
        found[-1].error,
    ]  # fmt: skip
    assert "and the student takes 512" in found[-1].error
    assert all(p.label is p.confidence is p.probabilities is None for p in found[1::2])


def test_nothing_asked_is_nothing_answered(predictor):
    assert predictor.predict([]) == []
    assert np.isnan(predictor.answer([""], with_states=True).states).all()


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


def test_a_folder_without_provenance_is_no_student(tmp_path, student):
    shutil.copytree(student, tmp_path / "s")
    (tmp_path / "s" / "provenance.json").unlink()
    with pytest.raises(UsageError, match="is it a student's folder"):
        Predictor(tmp_path / "s")


def test_a_broken_provenance_is_named(tmp_path, student):
    shutil.copytree(student, tmp_path / "s")
    for text in ("{", '{"labels": ["a"]}', '{"labels": ["a"], "verbalisers": {"a": {"text": " a", "ids": [1]}}, "template": "{text}"}'):
        (tmp_path / "s" / "provenance.json").write_text(text, "utf-8")
        with pytest.raises(UsageError, match=r"provenance\.json"):
            Predictor(tmp_path / "s")


def test_a_library_that_reads_the_tokenizer_otherwise_is_refused(tmp_path, student):
    folder = tmp_path / "s"
    shutil.copytree(student, folder)
    provenance = json.loads((folder / "provenance.json").read_text("utf-8"))
    provenance["verbalisers"]["positive"]["ids"] = [5]
    (folder / "provenance.json").write_text(json.dumps(provenance | identity_entries(folder, provenance)), "utf-8")
    with pytest.raises(MismatchError, match=r"'positive' into \[\d+\], and the student was trained with \[5\]"):
        Predictor(folder)
