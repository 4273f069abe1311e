"""Draws: balanced, reproducible, extended and not redrawn by a larger number, disjoint, and free of copies."""

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.examples import Example, SourceExamples
from pipeline.data.leaks import find_copies
from pipeline.data.roles import Roles, assign, text_of
from pipeline.errors import UsageError
from pipeline.files import example_id
from pipeline.params import DataParams

ALL_OF_B = {"b": {"source": "b", "domain": "out"}}
LABELS = ("negative", "positive")
NOUNS = ["harbour", "violin", "planet", "kitchen", "marble", "lantern", "meadow", "engine", "pepper", "window", "castle", "ribbon"]


def source(name: str, texts: list[str], labels: list[str | None] | None = None) -> SourceExamples:
    held = labels or [LABELS[i % 2] for i in range(len(texts))]
    examples = [
        Example(example_id({"text": text}), label, name, line, (text,))
        for line, (text, label) in enumerate(zip(texts, held, strict=True), 1)
    ]
    return SourceExamples(name, f"{name}.csv", rows=len(examples), examples=examples)


def unlike(count: int, seed: int = 0) -> list[str]:
    """Texts of which no two are near copies."""
    draw = random.Random(seed)
    return [" ".join([*draw.sample(NOUNS, 3), f"{draw.getrandbits(64):x}", str(i)]) for i in range(count)]


def data(**changes: Any) -> DataParams:
    entry = {"origin": {"source": "local", "path": "x"}, "format": "csv"}
    raw: dict[str, Any] = {
        "sources": {"a": entry, "b": entry},
        "demonstrations": {"source": "a", "per_label": 3},
        "transfer": {"source": "a", "limit": 10},
        "evaluation": {"a": {"source": "a", "domain": "in", "per_label": 5}, "b": {"source": "b", "domain": "out"}},
    }
    return DataParams.model_validate(raw | changes)


def ids(examples: list[Example]) -> list[str]:
    return [example.example_id for example in examples]


SOURCES = {"a": source("a", unlike(80)), "b": source("b", unlike(20, seed=1))}


def every_role(roles: Roles) -> list[list[Example]]:
    return [*roles.evaluation.values(), roles.demonstrations, roles.transfer]


def test_draws_are_balanced_and_of_the_size_asked_for() -> None:
    roles = assign(data(), LABELS, SOURCES)
    assert Counter(e.label for e in roles.evaluation["a"]) == {"negative": 5, "positive": 5}
    assert len(roles.evaluation["b"]) == 20, "null takes all there are"
    assert Counter(e.label for e in roles.demonstrations) == {"negative": 3, "positive": 3}
    assert len(roles.transfer) == 10


def test_an_example_has_one_role_across_sources_too() -> None:
    shared = unlike(60)
    roles = assign(
        data(evaluation={n: {"source": n, "domain": "in", "per_label": 8} for n in "ab"}),
        LABELS,
        {"a": source("a", shared), "b": source("b", shared)},
    )
    held = Counter(i for examples in every_role(roles) for i in ids(examples))
    assert set(held.values()) == {1}


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_the_order_of_the_file_does_not_count(seed: int) -> None:
    draw = random.Random(seed)
    shuffled = {n: SourceExamples(n, s.file, s.rows, examples=draw.sample(s.examples, len(s.examples))) for n, s in SOURCES.items()}
    one, other = assign(data(), LABELS, SOURCES), assign(data(), LABELS, shuffled)
    assert [ids(examples) for examples in every_role(one)] == [ids(examples) for examples in every_role(other)]


def test_a_larger_transfer_set_extends_the_earlier_one_and_moves_nothing_else() -> None:
    small, large = assign(data(), LABELS, SOURCES), assign(data(transfer={"source": "a", "limit": 40}), LABELS, SOURCES)
    whole = assign(data(transfer={"source": "a"}), LABELS, SOURCES)
    assert ids(large.transfer)[:10] == ids(small.transfer)
    assert ids(whole.transfer)[:40] == ids(large.transfer)
    assert ids(small.demonstrations) == ids(whole.demonstrations)
    assert {n: ids(e) for n, e in small.evaluation.items()} == {n: ids(e) for n, e in whole.evaluation.items()}


def test_more_demonstrations_or_evaluation_examples_extend_the_earlier_draw() -> None:
    small = assign(data(), LABELS, SOURCES)
    more = assign(data(demonstrations={"source": "a", "per_label": 6}), LABELS, SOURCES)
    assert set(ids(small.demonstrations)) < set(ids(more.demonstrations))
    larger = assign(data(evaluation={"a": {"source": "a", "domain": "in", "per_label": 9}}), LABELS, SOURCES)
    assert set(ids(small.evaluation["a"])) < set(ids(larger.evaluation["a"]))


def test_another_seed_draws_others() -> None:
    assert ids(assign(data(), LABELS, SOURCES).transfer) != ids(assign(data(seed=1), LABELS, SOURCES).transfer)


def test_near_copies_of_evaluation_texts_are_removed_and_recorded() -> None:
    held_out = unlike(20, seed=1)
    copies = [text.upper() + "!" for text in held_out[:6]] + [text + " x" for text in held_out[6:10]]
    sources = {"a": source("a", [*copies, *unlike(40)]), "b": source("b", held_out)}
    params = data(evaluation=ALL_OF_B, transfer={"source": "a"})
    roles = assign(params, LABELS, sources)
    learnt = [text_of(e) for e in [*roles.demonstrations, *roles.transfer]]
    assert len(learnt) == 40
    assert not list(find_copies(learnt, held_out, params.near_copy))
    assert roles.copies == {"demonstrations": {"b": 10}, "transfer": {"b": 10}}
    assert sorted(entry.line for entry in roles.quarantined) == list(range(1, 11)), "each row once, though two roles lost it"
    assert all(entry.copy_of and entry.copy_of["line"] == entry.line for entry in roles.quarantined)


def test_copies_of_demonstrations_stay_out_of_the_transfer_set() -> None:
    base = unlike(30)
    labels = [LABELS[i % 2] for i in range(30)]
    doubled = source("a", [*base, *(text + "." for text in base)], [*labels, *labels])
    roles = assign(data(evaluation=ALL_OF_B, transfer={"source": "a"}), LABELS, {"a": doubled, "b": SOURCES["b"]})
    shown = [text_of(e) for e in roles.demonstrations]
    assert not list(find_copies([text_of(e) for e in roles.transfer], shown, 0.7))
    assert roles.copies_of_demonstrations > 0


def test_sources_beside_the_transfer_set_s_own_are_drawn_from_under_the_same_rules() -> None:
    """Up to their limits, behind what was drawn before, without what another role has or a copy of an evaluation text."""
    evaluation = {"a": {"source": "a", "domain": "in", "per_label": 5}}
    alone = assign(data(evaluation=evaluation), LABELS, SOURCES)
    near = text_of(alone.evaluation["a"][0]) + "!"
    held = {"a": SOURCES["a"], "b": source("b", [*unlike(20, seed=1), near])}
    roles = assign(data(evaluation=evaluation, transfer={"source": "a", "limit": 10, "beside": {"b": None}}), LABELS, held)
    assert ids(roles.transfer[:10]) == ids(alone.transfer)
    assert {example.source for example in roles.transfer[10:]} == {"b"}
    assert len(roles.transfer) == 10 + 20
    assert roles.copies["transfer"] == {"a": 1}
    some = assign(data(evaluation=evaluation, transfer={"source": "a", "limit": 10, "beside": {"b": 6}}), LABELS, held)
    assert ids(some.transfer) == ids(roles.transfer[:16])
    everyone = [example for members in every_role(roles) for example in members]
    assert len(set(ids(everyone))) == len(everyone)


def test_long_examples_are_not_demonstrations_but_are_learnt_from() -> None:
    texts = [text + (" and so on and on" if i >= 20 else "") for i, text in enumerate(unlike(60))]
    params = data(
        demonstrations={"source": "a", "per_label": 4, "max_words": 5},
        evaluation=ALL_OF_B,
        transfer={"source": "a"},
    )
    roles = assign(params, LABELS, {"a": source("a", texts), "b": SOURCES["b"]})
    assert max(len(text_of(e).split()) for e in roles.demonstrations) <= 5
    assert max(len(text_of(e).split()) for e in roles.transfer) > 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"demonstrations": {"source": "a", "per_label": 30, "max_words": 5}},
            ["data.demonstrations: 30 examples of label 'negative' wanted", "10 in evaluation.a", "longer than max_words (5)"],
        ),
        (
            {"evaluation": {"b": {"source": "b", "domain": "out", "per_label": 11}}},
            ["data.evaluation.b: 11 examples of label 'negative' wanted, 10 found", "all of its 20 rows are usable"],
        ),
        (
            {"evaluation": {"a": {"source": "a", "domain": "in", "per_label": 38}}, "transfer": {"source": "b"}},
            ["data.demonstrations: 3 examples", "2 found", "76 in evaluation.a"],
        ),
        (
            {"evaluation": ALL_OF_B, "transfer": {"source": "b"}},
            ["data.transfer: no example is left in source 'b'", "20 in evaluation.b"],
        ),
    ],
)
def test_too_few_examples_name_role_label_numbers_and_what_reduced_the_pool(changes: dict[str, Any], expected: list[str]) -> None:
    long = [text + (" and on" if i >= 50 else "") for i, text in enumerate(unlike(80))]
    with pytest.raises(UsageError) as error:
        assign(data(**changes), LABELS, {"a": source("a", long), "b": SOURCES["b"]})
    for part in expected:
        assert part in str(error.value)


def test_what_was_left_out_before_is_told_too() -> None:
    poor = SourceExamples("a", "a.csv", rows=100, left_out=98, repeats=1, examples=SOURCES["a"].examples[:1])
    with pytest.raises(UsageError, match=r"of its 100 rows: 98 left out by the label rule, 1 exact repeats"):
        assign(data(), LABELS, {"a": poor, "b": SOURCES["b"]})
