"""Contexts: balanced, distinct, stable if more are asked for, and refused if they do not fit."""

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.contexts import build_contexts, check_fit, different_contexts, not_shown
from pipeline.errors import UsageError
from pipeline.params import ContextParams, TaskParams
from pipeline.schema import Context, Example
from pipeline.task import Task, TaskTokens

TASK = Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers={"negative": " negative", "positive": " positive"}))
DEMONSTRATIONS = [Example({"text": f"t{i}"}, TASK.labels[i % 2], None, "a", i) for i in range(8)]


def build(seed: int = 0, **params: Any) -> list[Context]:
    return build_contexts("mine", ContextParams.model_validate(params), TASK, DEMONSTRATIONS, seed)


@pytest.fixture(scope="module")
def tokens(tokenizer: Any) -> TaskTokens:
    return TaskTokens(TASK, tokenizer)


def texts(context: Context) -> list[str]:
    return [fields["text"] for fields, _ in context.demonstrations]


def answers(context: Context) -> Counter[str]:
    return Counter(answer for _, answer in context.demonstrations)


def test_orders_are_distinct_orders_of_the_same_demonstrations() -> None:
    contexts = build(demonstrations=4, count=24, vary="order")
    assert len({tuple(texts(context)) for context in contexts}) == 24
    assert {frozenset(texts(context)) for context in contexts} == {frozenset({"t0", "t1", "t2", "t3"})}, "the first by rank"
    assert [context.name for context in contexts] == [f"mine/{i}" for i in range(24)]
    assert len({context.context_id for context in contexts}) == 24


def test_draws_are_distinct_balanced_subsets() -> None:
    contexts = build(demonstrations=4, count=36, vary="draw")
    assert len({frozenset(texts(context)) for context in contexts}) == 36
    assert all(answers(context) == {"negative": 2, "positive": 2} for context in contexts)


@settings(max_examples=50)
@given(data=st.data(), labels=st.integers(2, 9), per_label=st.integers(1, 4), seed=st.integers(0, 5))
def test_draws_cover_labels_and_examples_and_extend(data: st.DataObject, labels: int, per_label: int, seed: int) -> None:
    task = Task(TaskParams(template="{text}:", verbalisers={f"l{i}": f" word{i}" for i in range(labels)}))
    held = [Example({"text": f"t{i}"}, task.labels[i % labels], None, "a", i) for i in range(labels * per_label)]
    params = ContextParams(demonstrations=data.draw(st.integers(1, labels * per_label)), vary="draw")
    parts = [{example.fields["text"] for example in held if example.label == label} for label in task.labels]
    low, high = params.demonstrations // labels, -(-params.demonstrations // labels)
    subsets = itertools.product(*([set(c) for n in {low, high} for c in itertools.combinations(part, n)] for part in parts))
    possible = different_contexts(params, labels, per_label)
    assert labels * per_label > 9 or possible == sum(sum(map(len, subset)) == params.demonstrations for subset in subsets)
    most = min(possible, data.draw(st.integers(1, 12)))
    contexts = build_contexts("mine", params.model_copy(update={"count": most}), task, held, seed)
    for count in range(1, most + 1):
        assert build_contexts("mine", params.model_copy(update={"count": count}), task, held, seed) == contexts[:count]
    assert len({frozenset(texts(context)) for context in contexts}) == most
    each = [Counter(answers(context)) for context in contexts]
    assert all({counts[label] for label in task.labels} <= {low, high} and counts.total() == params.demonstrations for counts in each)
    full = contexts[: labels // params.demonstrations]  # each of these shows labels that no other shows
    assert len({answer for context in full for answer in answers(context)}) == len(full) * params.demonstrations
    assert not_shown(contexts, task.labels) == sorted(set(task.labels) - {label for counts in each for label in counts})
    assert len(contexts) * params.demonstrations < labels or not not_shown(contexts, task.labels)


def test_every_example_is_shown_before_one_is_shown_again() -> None:
    contexts = build(demonstrations=2, count=4)  # by default a draw, since 8 are held
    assert sorted(text for context in contexts for text in texts(context)) == sorted(e.fields["text"] for e in DEMONSTRATIONS)
    assert build(demonstrations=2, count=4, vary="draw") == contexts
    assert build(demonstrations=8, count=3) == build(demonstrations=8, count=3, vary="order")


@settings(max_examples=25)
@given(demonstrations=st.integers(1, 8), vary=st.sampled_from(["order", "draw"]), seed=st.integers(0, 5))
def test_a_larger_count_keeps_the_earlier_contexts(demonstrations: int, vary: str, seed: int) -> None:
    one = build(seed, demonstrations=demonstrations, vary=vary)
    assert abs(answers(one[0])["negative"] - answers(one[0])["positive"]) <= 1
    if demonstrations in {3, 4, 5}:
        assert build(seed, demonstrations=demonstrations, vary=vary, count=6)[:1] == one


def test_a_context_has_its_instruction_and_answered_demonstrations() -> None:
    (context,) = build(demonstrations=2, instruction="Judge.", vary="order")
    first, second = texts(context)
    assert {first, second} == {"t0", "t1"}
    labels = {"t0": "negative", "t1": "positive"}
    assert TASK.context_text(context) == (
        f"Judge.\n\nReview: {first}\nSentiment: {labels[first]}\n\nReview: {second}\nSentiment: {labels[second]}\n\n"
    )


def test_demonstrations_of_free_text_show_their_answers() -> None:
    task = Task(TaskParams.model_validate({"template": "Q: {text}\nA:", "completion": {"source": "generated"}}))
    demonstrations = [Example({"text": f"q{i}"}, None, f"a{i}", "a", i) for i in range(3)]
    (context,) = build_contexts("mine", ContextParams(demonstrations=3), task, demonstrations, 0)
    assert sorted((fields["text"], answer) for fields, answer in context.demonstrations) == [("q0", "a0"), ("q1", "a1"), ("q2", "a2")]


def test_no_demonstrations_and_no_instruction_make_one_empty_context(tokens: TaskTokens) -> None:
    assert build(demonstrations=0) == [Context("mine/0")]
    assert check_fit("mine", ContextParams(demonstrations=0), [Context("mine/0")], tokens, DEMONSTRATIONS) == ([0], set())


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        ({"demonstrations": 0, "count": 2}, 1),
        ({"demonstrations": 2, "count": 3, "vary": "order"}, 2),
        ({"demonstrations": 8, "count": 2, "vary": "draw"}, 1),
        ({"demonstrations": 2, "count": 17, "vary": "draw"}, 16),
    ],
)
def test_more_contexts_than_there_can_be_are_refused(params: dict[str, Any], possible: int) -> None:
    with pytest.raises(UsageError, match=rf"contexts\.mine\.count: .* make only {possible} different contexts. Lower `count`"):
        build(**params)


def test_a_context_over_its_budget_names_context_tokens_and_budget(tokens: TaskTokens, tokenizer: Any) -> None:
    contexts = build(demonstrations=8)
    length = len(tokenizer(TASK.context_text(contexts[0])).input_ids)
    params = ContextParams(demonstrations=8, max_tokens=length)
    assert check_fit("mine", params, contexts, tokens, DEMONSTRATIONS) == ([length], set())
    with pytest.raises(UsageError, match=rf"context mine/0 of 8 demonstrations has {length} tokens, max_tokens is 9"):
        check_fit("mine", params.model_copy(update={"max_tokens": 9}), contexts, tokens, DEMONSTRATIONS)


@pytest.mark.parametrize("vary", ["order", "draw"])
def test_the_longest_prompt_and_answer_must_fit_the_model_to_the_token(tokenizer: Any, vary: Any) -> None:
    params = ContextParams(demonstrations=4, count=3, vary=vary)
    contexts = build(**params.model_dump())
    long = Example({"text": "zq" * 40})
    inputs = [Example({"text": "short"}), *DEMONSTRATIONS, long, Example({"text": "film " * 16})]
    whole = [len(tokenizer(TASK.context_text(context) + TASK.query(long.fields)).input_ids) for context in contexts]
    needed = max(whole) + max(len(tokenizer(text).input_ids) for text in TASK.verbalisers) - 1
    for limit, cut in ((needed, set[str]()), (needed - 1, {long.example_id}), (None, set[str]())):
        assert check_fit("mine", params, contexts, TaskTokens(TASK, tokenizer, limit), inputs)[1] == cut
    refusing = Task(TASK.params.model_copy(update={"long_texts": "refuse"}))
    check_fit("mine", params, contexts, TaskTokens(refusing, tokenizer, needed), inputs)
    with pytest.raises(UsageError, match="is too long: its text has 80 tokens, and 79 fit"):
        check_fit("mine", params, contexts, TaskTokens(refusing, tokenizer, needed - 1), inputs)
    with pytest.raises(UsageError, match=r"mine: context mine/0 does not fit .*, which takes 40 tokens, with an answer and 16 tokens of"):
        check_fit("mine", params, contexts, TaskTokens(TASK, tokenizer, 40), inputs)
