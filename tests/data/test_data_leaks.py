"""The leak check finds exactly what a naive comparison of every pair finds."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import leaks
from pipeline.data.leaks import Copy, find_copies, normalise

WORDS = st.sampled_from(["a", "great", "Great!", "film", "films,", "the", "plot", "sticks", "?!", "naïve", "ß", "…"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=8).map(" ".join), max_size=12)


def naive_jaccard(one: str, other: str) -> Fraction:
    """Straight from the definition, on the normalised texts."""

    def five(text: str) -> set[str]:
        plain = normalise(text)
        return {plain} if len(plain) < 5 else {plain[i : i + 5] for i in range(len(plain) - 4)}

    a, b = five(one), five(other)
    return Fraction(len(a & b), len(a | b))


@given(candidates=TEXTS, originals=TEXTS, threshold=st.sampled_from([0.3, 0.5, 0.7, 1.0]))
def test_copies_are_those_of_a_naive_comparison(candidates: list[str], originals: list[str], threshold: float) -> None:
    expected = []
    for i, candidate in enumerate(candidates):
        scores = [naive_jaccard(candidate, original) for original in originals]
        if scores and float(max(scores)) >= threshold:
            expected.append(Copy(i, scores.index(max(scores)), float(max(scores))))
    assert list(find_copies(candidates, originals, threshold)) == expected


@given(candidates=TEXTS, originals=TEXTS)
def test_the_size_of_blocks_does_not_count(candidates: list[str], originals: list[str]) -> None:
    whole = list(find_copies(candidates, originals, 0.4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaks, "PAIRS_IN_A_BLOCK", 1)
        assert list(find_copies(candidates, originals, 0.4)) == whole


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Don't waste your money.", "don’t waste  your MONEY!!"),
        ("so-so", "so so"),
        ("Straße", "STRASSE"),
        (":-)", ":-)"),
        ("ok", "OK."),
    ],
)
def test_case_punctuation_and_white_space_hide_no_copy(one: str, other: str) -> None:
    assert [copy.similarity for copy in find_copies([one], [other], 1.0)] == [1.0]


def test_texts_that_share_nothing_and_empty_lists_have_no_copies() -> None:
    assert list(find_copies(["abcdefgh"], ["zyxwvuts"], 0.01)) == []
    assert list(find_copies([], ["a"], 0.5)) == list(find_copies(["a"], [], 0.5)) == []
    assert list(find_copies([":-)"], [":-("], 0.5)) == [], "punctuation alone is compared as it stands"
