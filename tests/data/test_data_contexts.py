"""Contexts: balanced, distinct, stable when more are asked for, and refused where they do not fit."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.contexts import Measure, build_contexts, measure
from pipeline.data.examples import Example
from pipeline.errors import UsageError
from pipeline.files import context_id, example_id
from pipeline.params import ContextParams, TaskParams
from pipeline.schema import CONTEXTS
from pipeline.task import Task, TaskTokens

TASK = Task(TaskParams(template="Review: {text}\nSentiment:", verbalisers={"negative": " negative", "positive": " positive"}))
DEMONSTRATIONS = [Example(example_id({"text": f"t{i}"}), TASK.labels[i % 2], "a", i, (f"t{i}",)) for i in range(8)]


@pytest.fixture(scope="module")
def measured(tokenizer: Any) -> Measure:
    return Measure(Path("models/tiny"), TaskTokens(TASK, tokenizer), 512)


def build(measured: Measure, queries: list[str] | None = None, seed: int = 0, **params: Any) -> list[dict[str, Any]]:
    own = ContextParams.model_validate({"tokenizer": "models/tiny"} | params)
    table = build_contexts("mine", own, TASK, DEMONSTRATIONS, measured, queries or ["Review: x\nSentiment:"], seed)
    assert table.schema == CONTEXTS
    return table.to_pylist()


def labels_of(row: dict[str, Any]) -> Counter[str | None]:
    by_id = {e.example_id: e.label for e in DEMONSTRATIONS}
    return Counter(by_id[i] for i in row["example_ids"])


def test_orders_are_distinct_orders_of_the_same_demonstrations(measured: Measure) -> None:
    rows = build(measured, demonstrations=4, count=24, vary="order")
    assert len({tuple(row["example_ids"]) for row in rows}) == 24
    assert len({frozenset(row["example_ids"]) for row in rows}) == 1
    assert set(rows[0]["example_ids"]) == {e.example_id for e in DEMONSTRATIONS[:4]}, "the first by rank"
    assert [row["name"] for row in rows] == [f"mine/{i}" for i in range(24)]


def test_draws_are_distinct_balanced_subsets(measured: Measure) -> None:
    rows = build(measured, demonstrations=4, count=36, vary="draw")
    assert len({frozenset(row["example_ids"]) for row in rows}) == 36
    assert all(labels_of(row) == {"negative": 2, "positive": 2} for row in rows)


@settings(max_examples=25, deadline=None)
@given(demonstrations=st.integers(1, 8), vary=st.sampled_from(["order", "draw"]), seed=st.integers(0, 5))
def test_a_larger_count_keeps_the_earlier_contexts(measured: Measure, demonstrations: int, vary: str, seed: int) -> None:
    one = build(measured, demonstrations=demonstrations, vary=vary, seed=seed)
    assert max(abs(a - b) for a in labels_of(one[0]).values() for b in labels_of(one[0]).values()) <= 1
    if demonstrations in {3, 4, 5}:
        assert build(measured, demonstrations=demonstrations, vary=vary, count=6, seed=seed)[:1] == one


def test_a_context_is_its_rendered_text(measured: Measure) -> None:
    (row,) = build(measured, demonstrations=2, instruction="Judge.")
    first, second = (next(e for e in DEMONSTRATIONS if e.example_id == i) for i in row["example_ids"])
    assert row["text"] == (
        f"Judge.\n\nReview: {first.values[0]}\nSentiment: {first.label}\n\nReview: {second.values[0]}\nSentiment: {second.label}\n\n"
    )
    assert row["context_id"] == context_id(row["text"])
    assert row["tokens"] == len(measured.tokens.prefix_ids(row["text"])) > 0


def test_no_demonstrations_and_no_instruction_make_one_empty_context(measured: Measure) -> None:
    assert build(measured, demonstrations=0) == [
        {"context_id": context_id(""), "name": "mine/0", "text": "", "example_ids": [], "tokens": 0}
    ]


@pytest.mark.parametrize(
    ("params", "possible"),
    [
        ({"demonstrations": 0, "count": 2}, 1),
        ({"demonstrations": 2, "count": 3}, 2),
        ({"demonstrations": 8, "count": 2, "vary": "draw"}, 1),
        ({"demonstrations": 2, "count": 17, "vary": "draw"}, 16),
    ],
)
def test_more_contexts_than_there_can_be_are_refused(measured: Measure, params: dict[str, Any], possible: int) -> None:
    with pytest.raises(UsageError, match=rf"contexts\.mine: count is .* only {possible} different contexts; lower `count`"):
        build(measured, **params)


def test_a_context_over_its_budget_names_context_tokens_and_budget(measured: Measure) -> None:
    (row,) = build(measured, demonstrations=8)
    build(measured, demonstrations=8, max_tokens=row["tokens"])
    with pytest.raises(UsageError, match=rf"context mine/0 of 8 demonstrations has {row['tokens']} tokens, max_tokens is 9"):
        build(measured, demonstrations=8, max_tokens=9)


@pytest.mark.parametrize("over", [0, 1])
def test_context_longest_query_and_verbaliser_must_fit_the_model_to_the_token(measured: Measure, over: int) -> None:
    (row,) = build(measured, demonstrations=2)
    answer = max(len(ids) for ids in measured.tokens.completions)
    query = "Review: " + "zq" * 40 + "\nSentiment:"
    needed = row["tokens"] + answer + len(measured.tokens.query_ids([query])[0])
    tight = Measure(measured.folder, measured.tokens, needed - over)
    if over:
        with pytest.raises(UsageError, match=rf"do not fit the {needed - 1} that models/tiny takes"):
            build(tight, ["short", query], demonstrations=2)
    else:
        build(tight, ["short", query], demonstrations=2)


def test_a_model_folder_gives_tokenizer_and_limit(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    assert measure(TASK, model_folder("llama")).max_positions == 512
    assert measure(TASK, model_folder("gpt2")).max_positions == 512
    with pytest.raises(UsageError, match="no such model folder"):
        measure(TASK, tmp_path / "none")


def test_verbalisers_that_begin_with_the_same_token_are_refused(model_folder: Callable[..., Path]) -> None:
    same = Task(TaskParams(template="{text}", verbalisers={"a": " positive", "b": " positive"}))
    with pytest.raises(UsageError, match="both begin with token"):
        measure(same, model_folder("llama"))
