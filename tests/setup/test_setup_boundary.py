"""Where the prompt ends and the answer begins: the form that models learnt is named, and chosen by `init`."""

import shutil

import pytest
from conftest import PROJECT
from serving_world import shotless

from pipeline.params import CompletionParams, TaskParams, read_yaml, write_yaml
from pipeline.setup.boundary import better_form, boundary_advice, fitting_form

WORDS = {"n": " negative", "p": " positive"}
BARE = {"n": "negative", "p": "positive"}
TEMPLATE = "Review: {text}\nSentiment:"
BETTER = {
    "as it is": (TEMPLATE, WORDS, TEMPLATE, WORDS),
    "space at the end": (f"{TEMPLATE} ", BARE, TEMPLATE, WORDS),
    "two spaces": (f"{TEMPLATE} ", WORDS, TEMPLATE, WORDS),
    "no space": (TEMPLATE, BARE, TEMPLATE, WORDS),
    "after the input": ("{text}", BARE, "{text}", WORDS),
    "after an arrow": ("{text} ->", BARE, "{text} ->", WORDS),
    "on a new line": ("{text}\n", WORDS, "{text}\n", BARE),
    "in quotes": ('{text}\nlabel: "', WORDS, '{text}\nlabel: "', BARE),
    "in a list": ("{text}\nlabels: [ ", BARE, "{text}\nlabels: [", BARE),
    "in an object": ("{text}\n{{", BARE, "{text}\n{{", BARE),
    "after a control token": ("{text}<|assistant|>", BARE, "{text}<|assistant|>", BARE),
    "without spaces": ("{text}\n答案：", {"n": "不", "p": "是"}, "{text}\n答案：", {"n": "不", "p": "是"}),
    "emoji": ("{text}\nMood: ", {"n": "bad", "p": "nice"}, "{text}\nMood:", {"n": " bad", "p": " nice"}),
}


def task(template, verbalisers):
    return TaskParams(template=template, verbalisers=verbalisers)


@pytest.mark.parametrize("name", BETTER)
def test_the_space_belongs_to_the_answer_where_text_has_one(name):
    template, words, better, better_words = BETTER[name]
    found = better_form(task(template, words))
    assert (found.template, found.verbalisers) == (better, better_words)
    advice = boundary_advice(task(template, words), {})
    assert bool(advice) == ((template, words) != (better, better_words))
    assert not advice or (f"template: {better!r}" in advice and f"n: {better_words['n']!r}" in advice)


@pytest.mark.parametrize(
    ("template", "words", "advised"),
    [
        (TEMPLATE, WORDS, False),
        (f"{TEMPLATE} ", BARE, True),
        (f"{TEMPLATE} ", WORDS, True),
        (TEMPLATE, BARE, True),
        (f"{TEMPLATE} ", {"n": "1", "p": "2"}, False),
    ],
)
def test_the_models_tokenizer_decides_if_it_is_there(tokenizer, template, words, advised):
    # in this tokenizer a space before a digit is a token of its own, so that the two forms are the same tokens
    found = boundary_advice(task(template, words), {"tiny": tokenizer})
    assert (f"as models learnt them, which costs accuracy. Better: template: {TEMPLATE!r}" in found) == advised == bool(found)


def test_answers_in_free_text_do_not_follow_a_space_either(tokenizer):
    free = TaskParams(template="{text}\nJSON: ", completion=CompletionParams())
    for tokenizers in ({}, {"tiny": tokenizer}):
        assert "Better: template: '{text}\\nJSON:'" in boundary_advice(free, tokenizers)
        assert boundary_advice(free.model_copy(update={"template": "{text}\nJSON:"}), tokenizers) == ""


def test_labels_that_share_a_token_with_a_space_are_told_apart_without(tokenizer):
    digits = fitting_form(task("Stars:{text}\nRating:", {str(n): f" {n}" for n in range(1, 6)}), [tokenizer])
    assert (digits.template, digits.verbalisers["5"]) == ("Stars:{text}\nRating: ", "5")
    assert fitting_form(task(f"{TEMPLATE} ", BARE), [tokenizer]) == task(TEMPLATE, WORDS)


@pytest.fixture
def folder(tmp_path):
    for name in ("params.yaml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("model", [False, True])
def test_check_names_the_better_form_of_what_was_written_by_hand(folder, model_folder, model):
    if model:
        shutil.copytree(model_folder("llama"), folder / "artifacts" / "models" / "smollm2")
    assert "note:" not in shotless(folder, "check").stdout
    raw = read_yaml(folder / "params.yaml")
    raw["task"] = {"template": f"{TEMPLATE} ", "verbalisers": {"negative": "negative", "positive": "positive"}}
    write_yaml(raw, folder / "params.yaml")
    said = shotless(folder, "check").stdout
    assert f"Better: template: {TEMPLATE!r}, verbalisers:\n  negative: ' negative'\n  positive: ' positive'" in said


@pytest.mark.parametrize("student", ["chat", "plain"])
def test_what_is_asked_in_chat_turns_alone_needs_no_form(folder, student):
    raw = read_yaml(folder / "params.yaml")
    raw["task"] = {"template": f"{TEMPLATE} ", "verbalisers": {"negative": "negative", "positive": "positive"}}
    raw |= {"tuned": {}, "evaluation": {"reference": "teacher"}}
    raw["contexts"] = {"turns": {"demonstrations": 4, "format": "chat"}}
    raw["teachers"] = {"few": {"model": "models/smollm2", "contexts": "turns"}}
    raw["targets"] = {"mix": {"teachers": {"few": 1}}}
    raw["baselines"] = {"teacher": {"prompts": "targets/mix", "contexts": "ensemble"}}
    raw["students"] = {"cd": {"base": "models/smollm2", "learn_from": "targets/mix", "format": student, "steps": 5, "learning_rate": 1e-4}}
    write_yaml(raw, folder / "params.yaml")
    assert ("Better: template" in shotless(folder, "check").stdout) == (student == "plain")


def test_digits_that_share_a_token_are_taken_as_they_are(folder, model_folder):
    shutil.copytree(model_folder("llama"), folder / "artifacts" / "models" / "smollm2")
    raw = read_yaml(folder / "params.yaml")
    raw["task"] = {"template": TEMPLATE, "verbalisers": {"negative": " 1", "positive": " 2"}}
    write_yaml(raw, folder / "params.yaml")
    assert "note:" not in shotless(folder, "check").stdout
