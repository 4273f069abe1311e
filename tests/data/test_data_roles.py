"""Draws: balanced, reproducible, extended by a larger number, disjoint, free of copies, and blind to the labels of unlabelled texts."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.examples import SourceExamples
from pipeline.data.near_copies import Originals
from pipeline.data.roles import Roles, assign, text_of
from pipeline.errors import UsageError
from pipeline.params import DataParams
from pipeline.schema import Example

ALL_OF_B = {"b": {"source": "b", "domain": "out"}}
LABELS = ("negative", "positive")
Texts = Callable[..., list[str]]
Source = Callable[..., SourceExamples]


def data(**changes: Any) -> DataParams:
    raw: dict[str, Any] = {
        "sources": {"a": {"path": "a.csv"}, "b": {"path": "b.csv"}},
        "demonstrations": {"source": "a", "per_label": 3},
        "transfer": {"source": "a", "limit": 10},
        "evaluation": {"a": {"source": "a", "domain": "in", "per_label": 5}, "b": {"source": "b", "domain": "out"}},
    }
    return DataParams.model_validate(raw | changes)


@pytest.fixture(scope="module")
def sources(unlike: Texts, source: Source) -> dict[str, SourceExamples]:
    return {"a": source("a", unlike(80)), "b": source("b", unlike(20, seed=1))}


def ids(examples: list[Example]) -> list[str]:
    return [example.example_id for example in examples]


def every_role(roles: Roles) -> list[list[Example]]:
    return list(roles.drawn.values())


def copies_among(examples: list[Example], originals: list[str]) -> int:
    """Near copies of the originals, with all their 5-grams."""
    return sum(copy is not None for copy in Originals({"": originals}, [], 0.7).copies([text_of(e) for e in examples]))


def test_draws_are_balanced_and_of_the_size_asked_for(sources: dict[str, SourceExamples]) -> None:
    roles = assign(data(), LABELS, sources)
    assert Counter(e.label for e in roles.drawn["evaluation.a"]) == {"negative": 5, "positive": 5}
    assert len(roles.drawn["evaluation.b"]) == 20, "null takes all there are"
    assert Counter(e.label for e in roles.drawn["demonstrations"]) == {"negative": 3, "positive": 3}
    assert len(roles.drawn["transfer"]) == 10


def test_a_label_with_more_examples_gives_up_to_as_many_as_asked(unlike: Texts, source: Source) -> None:
    few = {
        "a": source("a", unlike(40), ["negative" if n % 10 == 0 else "positive" for n in range(40)]),
        "b": source("b", unlike(20, seed=1)),
    }

    def drawn(**wanted: int) -> Counter[str | None]:
        params = data(demonstrations={"source": "a", **wanted}, evaluation=ALL_OF_B)
        return Counter(example.label for example in assign(params, LABELS, few).drawn["demonstrations"])

    assert drawn(per_label=3) == {"negative": 3, "positive": 3}
    assert drawn(per_label=3, most_per_label=7) == {"negative": 4, "positive": 7}
    assert drawn(per_label=4, most_per_label=30) == {"negative": 4, "positive": 30}
    with pytest.raises(UsageError, match="5 examples of label 'negative' wanted, 4 found"):
        drawn(per_label=5, most_per_label=50)


def test_an_example_has_one_role_across_sources_too(unlike: Texts, source: Source) -> None:
    shared = unlike(60)
    evaluation = {name: {"source": name, "domain": "in", "per_label": 8} for name in "ab"}
    roles = assign(data(evaluation=evaluation), LABELS, {"a": source("a", shared), "b": source("b", shared)})
    assert set(Counter(i for examples in every_role(roles) for i in ids(examples)).values()) == {1}


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
@pytest.mark.slow
def test_the_order_of_the_file_does_not_count(sources: dict[str, SourceExamples], seed: int) -> None:
    draw = random.Random(seed)
    shuffled = {n: SourceExamples(n, s.file, draw.sample(s.examples, len(s.examples)), [], s.counts) for n, s in sources.items()}
    one, other = assign(data(), LABELS, sources), assign(data(), LABELS, shuffled)
    assert [ids(examples) for examples in every_role(one)] == [ids(examples) for examples in every_role(other)]


def test_a_larger_transfer_set_extends_the_earlier_one_and_moves_nothing_else(sources: dict[str, SourceExamples]) -> None:
    small, large = assign(data(), LABELS, sources), assign(data(transfer={"source": "a", "limit": 40}), LABELS, sources)
    whole = assign(data(transfer={"source": "a"}), LABELS, sources)
    assert ids(large.drawn["transfer"])[:10] == ids(small.drawn["transfer"])
    assert ids(whole.drawn["transfer"])[:40] == ids(large.drawn["transfer"])
    assert ids(small.drawn["demonstrations"]) == ids(whole.drawn["demonstrations"])
    assert [ids(small.drawn[f"evaluation.{name}"]) == ids(whole.drawn[f"evaluation.{name}"]) for name in "ab"] == [True, True]


def test_more_demonstrations_or_evaluation_examples_extend_the_earlier_draw(sources: dict[str, SourceExamples]) -> None:
    small = assign(data(), LABELS, sources)
    more = assign(data(demonstrations={"source": "a", "per_label": 6}), LABELS, sources)
    assert set(ids(small.drawn["demonstrations"])) < set(ids(more.drawn["demonstrations"]))
    larger = assign(data(evaluation={"a": {"source": "a", "domain": "in", "per_label": 9}}), LABELS, sources)
    assert set(ids(small.drawn["evaluation.a"])) < set(ids(larger.drawn["evaluation.a"]))


def test_another_seed_draws_others(sources: dict[str, SourceExamples]) -> None:
    assert ids(assign(data(), LABELS, sources).drawn["transfer"]) != ids(assign(data(seed=1), LABELS, sources).drawn["transfer"])
    same, own = assign(data(), LABELS, sources), assign(data(demonstrations={"source": "a", "per_label": 3, "seed": 1}), LABELS, sources)
    assert ids(own.drawn["demonstrations"]) != ids(assign(data(), LABELS, sources).drawn["demonstrations"])
    assert [ids(own.drawn[f"evaluation.{name}"]) == ids(same.drawn[f"evaluation.{name}"]) for name in "ab"] == [True, True]


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
@pytest.mark.slow
def test_gold_labels_never_choose_unlabelled_texts(sources: dict[str, SourceExamples], unlike: Texts, source: Source, seed: int) -> None:
    """Transfer set and pool are the same whatever the labels of their source are: shuffled, or of no label at all for some or all rows."""
    draw = random.Random(seed)
    texts = unlike(60, seed=2)
    one, other = ([draw.choice([*LABELS, None]) for _ in texts] for _ in range(2))
    unlabelled = {"transfer": {"source": "c", "limit": 25}, "pool": {"source": "c", "limit": 25}}
    params = data(sources={name: {"path": f"{name}.csv"} for name in "abc"}, evaluation=ALL_OF_B, **unlabelled)
    found = [assign(params, LABELS, sources | {"c": source("c", texts, labels)}).drawn for labels in (one, other, [None] * 60)]
    for role in unlabelled:
        assert ids(found[0][role]) == ids(found[1][role]) == ids(found[2][role])
        assert {e.label for e in found[0][role]} == {*LABELS, None}, "all kinds of rows are drawn"


def test_rows_without_a_label_are_drawn_as_unlabelled_texts_alone(unlike: Texts, source: Source) -> None:
    labels = [[*LABELS, None, None][i % 4] for i in range(80)]
    whole = data(transfer={"source": "a"}, evaluation={"a": {"source": "a", "domain": "in", "per_label": 5}})
    roles = assign(whole, LABELS, {"a": source("a", unlike(80), labels)})
    assert None not in {e.label for e in [*roles.drawn["demonstrations"], *roles.drawn["evaluation.a"]]}
    assert sum(e.label is None for e in roles.drawn["transfer"]) == 40


def test_near_copies_of_evaluation_texts_are_removed_and_recorded(unlike: Texts, source: Source) -> None:
    held_out = unlike(20, seed=1)
    copies = [text.upper() + "!" for text in held_out[:6]] + [text + " x" for text in held_out[6:10]]
    sources = {"a": source("a", [*copies, *unlike(40)]), "b": source("b", held_out)}
    roles = assign(data(evaluation=ALL_OF_B, transfer={"source": "a"}, demonstrations={"source": "a", "per_label": 15}), LABELS, sources)
    assert (len(roles.drawn["demonstrations"]), len(roles.drawn["transfer"])) == (30, 10)
    assert not copies_among([*roles.drawn["demonstrations"], *roles.drawn["transfer"]], held_out)
    assert roles.copies["transfer"] == {"evaluation.b": 10, "demonstrations": 0}
    assert sorted(entry.line for entry in roles.quarantined.values()) == list(range(1, 11)), "each row once"
    assert all(entry.copy_of and entry.copy_of["line"] == entry.line for entry in roles.quarantined.values())


def test_copies_of_demonstrations_stay_out_of_the_transfer_set(sources: dict[str, SourceExamples], unlike: Texts, source: Source) -> None:
    base = unlike(30)
    doubled = source("a", [*base, *(text + "." for text in base)])
    roles = assign(data(evaluation=ALL_OF_B, transfer={"source": "a"}), LABELS, {"a": doubled, "b": sources["b"]})
    assert not copies_among(roles.drawn["transfer"], [text_of(e) for e in roles.drawn["demonstrations"]])
    either_form = 2 * len({text_of(e).rstrip(".") for e in roles.drawn["demonstrations"]})
    assert roles.copies["transfer"]["demonstrations"] == either_form - 6 > 0
    assert len(roles.drawn["transfer"]) == 60 - either_form


def test_an_evaluation_set_may_be_called_demonstrations(unlike: Texts, source: Source) -> None:
    evaluation = {"demonstrations": {"source": "b", "domain": "out"}}
    held = {"a": source("a", [*unlike(30), unlike(1, seed=1)[0] + "."]), "b": source("b", unlike(20, seed=1))}
    roles = assign(data(evaluation=evaluation, transfer={"source": "a"}), LABELS, held)
    assert roles.copies["transfer"] == {"evaluation.demonstrations": 1, "demonstrations": 0}


def test_extra_sources_are_drawn_from_under_the_same_rules(sources: dict[str, SourceExamples], unlike: Texts, source: Source) -> None:
    """Up to their limits, after what was drawn before, without what another role has or a copy of an evaluation text."""
    evaluation = {"a": {"source": "a", "domain": "in", "per_label": 5}}
    alone = assign(data(evaluation=evaluation), LABELS, sources)
    near = text_of(alone.drawn["evaluation.a"][0]) + "!"
    held = {"a": sources["a"], "b": source("b", [*unlike(20, seed=1), near])}
    roles = assign(data(evaluation=evaluation, transfer={"source": "a", "limit": 10, "extra_sources": {"b": None}}), LABELS, held)
    assert ids(roles.drawn["transfer"][:10]) == ids(alone.drawn["transfer"])
    assert {example.source for example in roles.drawn["transfer"][10:]} == {"b"}
    assert len(roles.drawn["transfer"]) == 10 + 20
    assert roles.copies["transfer"]["evaluation.a"] == 1
    some = assign(data(evaluation=evaluation, transfer={"source": "a", "limit": 10, "extra_sources": {"b": 6}}), LABELS, held)
    assert ids(some.drawn["transfer"]) == ids(roles.drawn["transfer"][:16])
    assert set(Counter(i for members in every_role(roles) for i in ids(members)).values()) == {1}


def test_the_pool_is_what_other_roles_leave_without_copies_of_what_is_judged_or_shown(unlike: Texts, source: Source) -> None:
    doubled = [form for text in unlike(80) for form in (text, text.upper() + "!")]
    held = {"a": source("a", doubled), "b": source("b", unlike(20, seed=1))}
    some = {"a": {"source": "a", "domain": "in", "per_label": 5}}
    before = assign(data(evaluation=some), LABELS, held)
    roles = assign(data(evaluation=some, pool={"source": "a", "extra_sources": {"b": 6}}), LABELS, held)
    assert set(Counter(i for examples in every_role(roles) for i in ids(examples)).values()) == {1}
    assert {role: ids(own) for role, own in roles.drawn.items() if role != "pool"} == {role: ids(own) for role, own in before.drawn.items()}
    assert not copies_among(roles.drawn["pool"], [text_of(e) for role in ("evaluation.a", "demonstrations") for e in roles.drawn[role]])
    assert min(roles.copies["pool"].values()) > 0
    assert copies_among(roles.drawn["pool"], [text_of(e) for e in roles.drawn["transfer"]]), "both are learnt from"
    assert Counter(e.source for e in roles.drawn["pool"]) == {"a": len(roles.drawn["pool"]) - 6, "b": 6}
    fewer = assign(data(evaluation=some, pool={"source": "a", "limit": 7}), LABELS, held)
    assert ids(fewer.drawn["pool"]) == ids(roles.drawn["pool"][:7])
    with pytest.raises(UsageError, match=r"data\.pool: no example is left in source 'b'.*20 in evaluation\.b"):
        assign(data(evaluation=ALL_OF_B, pool={"source": "b"}), LABELS, held)


def test_long_examples_are_not_demonstrations_but_are_learnt_from(
    sources: dict[str, SourceExamples], unlike: Texts, source: Source
) -> None:
    texts = [text + (" and so on and on" if i >= 20 else "") for i, text in enumerate(unlike(60))]
    params = data(demonstrations={"source": "a", "per_label": 4, "max_words": 5}, evaluation=ALL_OF_B, transfer={"source": "a"})
    roles = assign(params, LABELS, {"a": source("a", texts), "b": sources["b"]})
    assert max(len(text_of(e).split()) for e in roles.drawn["demonstrations"]) <= 5
    assert max(len(text_of(e).split()) for e in roles.drawn["transfer"]) > 5


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
def test_too_few_examples_name_role_label_numbers_and_what_made_them_fewer(
    sources: dict[str, SourceExamples], unlike: Texts, source: Source, changes: dict[str, Any], expected: list[str]
) -> None:
    long = [text + (" and on" if i >= 50 else "") for i, text in enumerate(unlike(80))]
    with pytest.raises(UsageError) as error:
        assign(data(**changes), LABELS, {"a": source("a", long), "b": sources["b"]})
    for part in expected:
        assert part in str(error.value)


def test_an_evaluation_set_that_takes_all_may_lack_labels_but_has_two(sources: dict[str, SourceExamples]) -> None:
    roles = assign(data(demonstrations={"source": "a", "per_label": 3}), LABELS, sources)
    asked = data(evaluation=ALL_OF_B)
    three = [*LABELS, "neutral"]
    with pytest.raises(UsageError, match=r"data\.demonstrations: 3 examples of label 'neutral' wanted, 0 found"):
        assign(asked, three, sources)  # demonstrations lack it; the evaluation set may
    with pytest.raises(UsageError, match=r"data\.evaluation\.b: 1 examples of label 'neutral' wanted, 0 found"):
        assign(asked, ["neutral", "positive"], sources)
    assert assign(asked, LABELS, sources).drawn["evaluation.b"] == roles.drawn["evaluation.b"]


def test_what_the_source_left_out_is_told_too(sources: dict[str, SourceExamples], unlike: Texts, source: Source) -> None:
    poor = source("a", unlike(1), rows=100, left_out_by_label_rule=98, exact_repeats_removed=1)
    with pytest.raises(UsageError, match=r"of its 100 rows: 1 exact repeats, 98 left out by the label rule"):
        assign(data(), LABELS, {"a": poor, "b": sources["b"]})


def test_a_source_of_near_copies_names_the_limit_and_shows_a_pair(unlike: Texts, source: Source) -> None:
    held_out = unlike(5)
    pile = source("a", [f"{text} {n}" for text in held_out for n in range(3)])
    with pytest.raises(UsageError) as error:
        assign(data(evaluation=ALL_OF_B), LABELS, {"a": pile, "b": source("b", held_out)})
    for part in ("8 near copies of evaluation.b", "of a.csv", "like line", "of source 'b'", "raise data.near_copy (0.7)"):
        assert part in str(error.value)


def test_extra_sources_add_their_labels_to_the_demonstrations_and_win(
    sources: dict[str, SourceExamples], source: Source, unlike: Texts
) -> None:
    before = assign(data(), LABELS, sources).drawn["demonstrations"]
    corrected, added = before[0], unlike(4, seed=2)
    other = LABELS[corrected.label == LABELS[0]]
    texts = [corrected.fields["text"], *added]
    reviewed = source("reviewed", texts, [other, "positive", "positive", "positive", None])
    wanted = {"source": "a", "per_label": 3, "extra_sources": {"reviewed": None}}
    roles = assign(data(demonstrations=wanted), LABELS, sources | {"reviewed": reviewed})
    labels = {example.example_id: example.label for example in roles.drawn["demonstrations"]}
    expected = {example.example_id: example.label for example in before} | {e.example_id: e.label for e in reviewed.examples[:4]}
    assert labels == expected
    assert labels[corrected.example_id] == other
    assert not labels.keys() & set(ids(roles.drawn["transfer"]))
