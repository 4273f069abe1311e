"""Texts that do not fit are cut at ends of their tokens, or read in windows; prompts that fit stay as they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from serving_world import TEMPLATE, VERBALISERS, make_student
from transformers import ByT5Tokenizer

from pipeline.files import MANIFEST, read_json, write_json
from pipeline.models.folders import load_tokenizer
from pipeline.models.trained import load_tokens, open_trained
from pipeline.params import LEAST_TOKENS, TaskParams
from pipeline.schema import NO_CONTEXT, Context, Example
from pipeline.serving import Predictor, export
from pipeline.serving.onnx_engine import PlainTokenizer
from pipeline.task import GAP, EncoderTokens, Task, TaskTokens, TooLongError
from pipeline.teachers.scorer import Scorer

ONE = Context("shots/0", "", (({"text": "a warm film"}, "positive"),))
PAIR = "{premise}\n{claim}?"
LIMIT = 64
LONG = " ".join(f"the plot of film {number} goes nowhere" for number in range(60))
SHORT = "a warm film"


def task(long_texts="head_tail", template=TEMPLATE, **more):
    return Task(TaskParams(template=template, verbalisers=VERBALISERS, long_texts=long_texts, **more))


def texts_of(tokens, prompts, context=NO_CONTEXT):
    """What stands in the place of {text}."""
    before, (head, tail) = tokens.task.context_text(context), tokens.task.params.template.split("{text}")
    whole = [tokens.tokenizer.decode(prompt.ids) for prompt in prompts]
    assert all(text.startswith(before + head) and text.endswith(tail) for text in whole)
    return [text[len(before + head) : -len(tail)] for text in whole]


@pytest.mark.parametrize("long_texts", ["refuse", "head", "head_tail", "windows"])
@pytest.mark.parametrize("context", [NO_CONTEXT, ONE], ids=["alone", "context"])
def test_a_prompt_that_fits_is_tokenised_as_ever_and_only_once(tokenizer, monkeypatch, long_texts, context):
    examples = [Example({"text": text}) for text in (SHORT, "x", "late service " * 3)]
    expected = TaskTokens(task(), tokenizer).prompts(context, examples)
    needed = max(map(TaskTokens(task(), tokenizer).tokens_of, expected)) - 1
    tokens = TaskTokens(task(long_texts), tokenizer, needed)
    calls = []
    monkeypatch.setattr(TaskTokens, "_encode", lambda self, *asked, own=TaskTokens._encode: calls.append(asked) or own(self, *asked))
    assert [(prompt.ids, prompt.cut) for prompt in tokens.prompts(context, examples)] == [(prompt.ids, False) for prompt in expected]
    assert len(calls) == 1
    assert tokens.windows(context, examples) == [[example] for example in examples]


@settings(max_examples=40)
@given(text=st.text(min_size=40, max_size=120), context=st.sampled_from([NO_CONTEXT, ONE]), how=st.sampled_from(["head", "head_tail"]))
def test_whatever_the_text_a_cut_prompt_fits_and_has_its_beginning_and_end(tokenizer, text, context, how):
    tokens = TaskTokens(task(how), tokenizer, LIMIT)
    (prompt,) = tokens.prompts(context, [Example({"text": text})])
    whole = TaskTokens(task(), tokenizer).prompts(context, [Example({"text": text})])[0]
    needed = tokens.tokens_of(prompt) - 1
    assert needed <= LIMIT
    assert prompt.cut == (tokens.tokens_of(whole) - 1 > LIMIT)
    (found,) = texts_of(tokens, [prompt], context)
    if not prompt.cut:
        assert prompt.ids == whole.ids
    elif how == "head":
        assert text.startswith(found)
        assert needed > LIMIT - 12, "no more is left out than need be: a character has up to 4 tokens, and white space at the cut goes"
    else:
        ends = [(found[:at], found[at + len(GAP) :]) for at in range(len(found)) if found[at:].startswith(GAP)]
        assert any(text.startswith(start) and text.endswith(end) and end for start, end in ends)


def test_a_long_text_keeps_as_many_tokens_as_fit(tokenizer):
    for how in ("head", "head_tail"):
        tokens = TaskTokens(task(how), tokenizer, LIMIT)
        (prompt,) = tokens.prompts(ONE, [Example({"text": LONG})])
        assert LIMIT - 3 <= tokens.tokens_of(prompt) - 1 <= LIMIT
        (found,) = texts_of(tokens, [prompt], ONE)
        start, _, end = found.partition(GAP)
        assert LONG.startswith(start)
        assert LONG.endswith(end)
        assert bool(end) == (how == "head_tail")
        assert how == "head" or abs(len(start) - len(end)) < 12


def test_max_tokens_bounds_a_text_whatever_stands_before_it(tokenizer):
    tokens = TaskTokens(task(max_tokens=20), tokenizer, 512)
    alone, behind = (texts_of(tokens, tokens.prompts(context, [Example({"text": LONG})]), context)[0] for context in (NO_CONTEXT, ONE))
    assert alone == behind
    assert 17 <= len(tokenizer(alone).input_ids) <= 20
    assert not tokens.prompts(ONE, [Example({"text": SHORT})])[0].cut


@settings(max_examples=60)
@given(text=st.text(min_size=20, max_size=80), how=st.sampled_from(["head", "head_tail", "windows"]))
def test_the_fewest_tokens_that_may_be_asked_for_fit_any_text(tokenizer, text, how):
    tokens = TaskTokens(task(how, max_tokens=LEAST_TOKENS), tokenizer, 512)
    pieces = tokens.windows(NO_CONTEXT, [Example({"text": text})])[0]
    for own in [*pieces, *([Example({"text": text})] if how != "windows" else [])]:
        tokens.prompts(NO_CONTEXT, [own])
    assert how != "windows" or not any(prompt.cut for prompt in tokens.prompts(NO_CONTEXT, pieces))


def test_the_longest_field_is_cut_first(tokenizer):
    tokens = TaskTokens(task(template="{title}\n{text} =>"), tokenizer, LIMIT)
    (prompt,) = tokens.prompts(NO_CONTEXT, [Example({"title": SHORT, "text": LONG})])
    assert tokenizer.decode(prompt.ids).startswith(f"{SHORT}\nthe plot of")
    (prompt,) = tokens.prompts(NO_CONTEXT, [Example({"title": LONG, "text": LONG})])
    title, text = tokenizer.decode(prompt.ids).removesuffix(" =>").split("\n")
    assert abs(len(tokenizer(title).input_ids) - len(tokenizer(text).input_ids)) <= 3
    assert tokens.tokens_of(prompt) - 1 <= LIMIT


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_an_encoders_pair_fits_and_keeps_the_shorter_text(encoder_folder, family):
    tokens = load_tokens(task(template=PAIR), encoder_folder(family))
    assert isinstance(tokens, EncoderTokens)
    assert tokens.limit is not None
    long, short = tokens.prompts(NO_CONTEXT, [Example({"premise": LONG, "claim": SHORT}), Example({"premise": SHORT, "claim": SHORT})])
    assert tokens.limit - 3 <= len(long.ids) <= tokens.limit
    ends = len(tokens.tokenizer(SHORT, add_special_tokens=False).input_ids) + 1
    assert long.ids[-ends:] == short.ids[-ends:], "the second text and what the tokenizer puts behind it"
    assert (long.cut, short.cut) == (True, False)


def test_what_cannot_be_cut_is_refused_with_tokens_found_and_allowed(tokenizer):
    example = Example({"text": LONG}, source="mine", line=7)
    count = len(tokenizer(LONG).input_ids)
    whole = TaskTokens(task(), tokenizer)
    room = count - (whole.tokens_of(whole.prompts(NO_CONTEXT, [example])[0]) - 1 - LIMIT)
    said = rf"the input on line 7 of mine is too long: its text has {count:,} tokens, and {room} fit .*let task\.long_texts cut it"
    with pytest.raises(TooLongError, match=said):
        TaskTokens(task("refuse"), tokenizer, LIMIT).prompts(NO_CONTEXT, [Example({"text": SHORT}), example])
    with pytest.raises(TooLongError, match=r"and 20 fit .* \(task\.max_tokens: 20\)"):
        TaskTokens(task("refuse", max_tokens=20), tokenizer, 512).prompts(NO_CONTEXT, [example])
    wide = Context("wide/0", "so " * 60)
    with pytest.raises(
        TooLongError, match=r"and 0 fit .* behind context 'wide/0'. At least 16 must fit: take fewer or shorter demonstrations"
    ):
        TaskTokens(task(), tokenizer, LIMIT).prompts(wide, [example])


@settings(max_examples=40)
@given(numbers=st.lists(st.integers(0, 999), min_size=30, max_size=80, unique=True), context=st.sampled_from([NO_CONTEXT, ONE]))
def test_windows_fit_and_cover_every_token_of_the_text(tokenizer, numbers, context):
    text = " ".join(f"film{number}" for number in numbers)
    tokens = TaskTokens(task("windows"), tokenizer, LIMIT)
    (windows,) = tokens.windows(context, [Example({"text": text}, source="s", line=3)])
    assert len(windows) > 1
    assert {(window.source, window.line) for window in windows} == {("s", 3)}
    assert not any(prompt.cut for prompt in tokens.prompts(context, windows))
    end = 0
    for window in windows:
        start = text.index(window.fields["text"])
        assert start < end or not end, "each shares some tokens with the one before it"
        end = start + len(window.fields["text"])
    assert end == len(text)


def test_windows_of_several_fields_keep_the_shorter_ones(tokenizer):
    tokens = TaskTokens(task("windows", template="{title}\n{text} =>"), tokenizer, LIMIT)
    (windows,) = tokens.windows(NO_CONTEXT, [Example({"title": SHORT, "text": LONG})])
    assert {window.fields["title"] for window in windows} == {SHORT}
    assert windows[-1].fields["text"] in LONG
    (windows,) = tokens.windows(NO_CONTEXT, [Example({"title": LONG[:400], "text": LONG})])
    assert len({window.fields["title"] for window in windows}) == 1
    assert not any(prompt.cut for prompt in tokens.prompts(NO_CONTEXT, windows))


@pytest.fixture(scope="module")
def student(tmp_path_factory, model_folder):
    """`student("windows")` → folders of a student and of its graph, trained with that."""
    folder, graph = tmp_path_factory.mktemp("students") / "cd", tmp_path_factory.mktemp("exported")
    make_student(folder, model_folder("llama", max_position_embeddings=LIMIT))
    export.write_onnx(open_trained(folder), graph, False)

    def make(long_texts):
        for own in (folder, graph):
            manifest = read_json(own / MANIFEST)
            write_json(manifest | {"task": manifest["task"] | {"long_texts": long_texts}}, own / MANIFEST)
        return folder, graph

    return make


@pytest.mark.slow
def test_probabilities_of_windows_are_averaged_by_teacher_student_and_graph_alike(student):
    folder, graph = student("windows")
    scorer = Scorer(folder, task("windows"), work=None, threads=1)
    examples = [Example({"text": text}) for text in (SHORT, LONG, "late")]
    found = softmax(scorer.label_scores([NO_CONTEXT, ONE], examples, "t"), axis=-1)
    for place, context in enumerate((NO_CONTEXT, ONE)):
        for example, own in zip(examples, found[place], strict=True):
            (windows,) = scorer.tokens.windows(context, [example])
            alone = [softmax(scorer.label_scores([context], [window], "t")[0, 0]) for window in windows]
            assert own == pytest.approx(np.mean(alone, axis=0), abs=1e-5)
            assert len(windows) == 1 or example.fields["text"] == LONG
    by_torch, by_onnx = (Predictor(own, 1).predict([example.fields["text"] for example in examples]) for own in (folder, graph))
    for answers in (by_torch, by_onnx):
        assert np.array([list(answer.probabilities.values()) for answer in answers]) == pytest.approx(found[0], abs=1e-4)
        assert [answer.cut for answer in answers] == [False, True, False]
    assert [answer.ids for answer in by_torch] == [answer.ids for answer in by_onnx]


@pytest.mark.slow
def test_teacher_student_and_graph_cut_to_the_same_tokens(student):
    folder, graph = student("head_tail")
    (prompt,) = load_tokens(task(), folder).prompts(NO_CONTEXT, [Example({"text": LONG})])
    for own in (folder, graph):
        short, long = Predictor(own, 1).predict([SHORT, LONG])
        assert long.ids == prompt.ids
        assert (long.as_json()["cut"], "cut" in short.as_json()) == (True, False)


def test_a_refused_text_is_an_error_of_its_row(student):
    for own in student("refuse"):
        short, long, other = Predictor(own, 1).predict([SHORT, LONG, "late"])
        assert short.error is other.error is None
        assert long.error.startswith("too long: its text has ")


def test_the_plain_tokenizer_finds_the_same_places(tmp_path, encoder_folder, model_folder):
    for folder in (encoder_folder("bert"), model_folder("llama")):
        plain, own = PlainTokenizer(folder / "tokenizer.json", None), load_tokenizer(folder)
        texts, settings = [LONG, "naïve 👩‍👩‍👧 <|end|> [SEP]"], {"add_special_tokens": False, "return_offsets_mapping": True}
        found = (one(texts, split_special_tokens=True, **settings).offset_mapping for one in (plain, own))
        assert list(map(list, next(found))) == list(map(list, next(found)))


def test_a_tokenizer_without_offsets_is_cut_between_characters():
    tokens = TaskTokens(Task(TaskParams(template=TEMPLATE, verbalisers={"a": "a", "b": "b"})), ByT5Tokenizer(), LIMIT)
    (prompt,) = tokens.prompts(NO_CONTEXT, [Example({"text": "ü" * 90})])
    assert prompt.cut
    assert tokens.tokens_of(prompt) - 1 <= LIMIT


def test_free_text_has_no_windows():
    with pytest.raises(ValueError, match="`windows` averages the probabilities of labels, and answers are free text"):
        TaskParams(template="{text}", completion={}, long_texts="windows")
