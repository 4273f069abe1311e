"""Near copies are exactly what a naive comparison of every pair finds, without what rows have in common."""

import random
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import near_copies
from pipeline.data.near_copies import Copy, Originals, normalise

WORDS = st.sampled_from(["a", "great", "Great!", "film", "films,", "the", "plot", "sticks", "?!", "naïve", "ß", "…"])
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=8).map(" ".join), max_size=9)
FOOTER = (
    "Kind regards, the service team of Muster and Sons, 12 Long Street, Anytown, open on weekdays from nine to five. This message and all "
    "that is attached to it are confidential and meant for the person they are addressed to alone; if that is not you, please delete them, "
    "tell the sender, and do not pass on, copy or use anything you have read here. Think of the trees before you print."
)


def naive_jaccard(one: str, other: str) -> Fraction:
    """From the definition, on the normalised texts."""

    def five(text: str) -> set[str]:
        plain = normalise(text)
        return {plain} if len(plain) < 5 else {plain[i : i + 5] for i in range(len(plain) - 4)}

    a, b = five(one), five(other)
    return Fraction(len(a & b), len(a | b))


@given(candidates=TEXTS, some=TEXTS, others=TEXTS, threshold=st.sampled_from([0.3, 0.5, 0.7, 1.0]), block=st.sampled_from([1, 3, 1024]))
@pytest.mark.slow
def test_copies_are_those_of_a_naive_comparison(
    candidates: list[str], some: list[str], others: list[str], threshold: float, block: int
) -> None:
    originals = [("some", i, text) for i, text in enumerate(some)] + [("others", i, text) for i, text in enumerate(others)]
    expected: list[Copy | None] = []
    for candidate in candidates:
        scores = [naive_jaccard(candidate, text) for _, _, text in originals]
        best = max(scores, default=Fraction(0))
        found = originals[scores.index(best)] if scores else None
        expected.append(Copy(found[0], found[1], float(best)) if found and float(best) >= threshold else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_copies, "BLOCK", block)
        assert Originals({"some": some, "others": others}, candidates, threshold).copies(candidates) == expected


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
    assert Originals({"a": [other]}, [one], 1.0).copies([one]) == [Copy("a", 0, 1.0)]


def test_texts_that_share_nothing_and_empty_lists_have_no_copies() -> None:
    assert Originals({"a": ["zyxwvuts"]}, [], 0.01).copies(["abcdefgh"]) == [None]
    assert Originals({"a": []}, ["a"], 0.5).copies(["a"]) == [None]
    assert Originals({}, [], 0.5).copies(["a"]) == [None]
    assert Originals({"a": ["a"]}, ["a"], 0.5).copies([]) == []
    assert Originals({"a": [":-("]}, [], 0.5).copies([":-)"]) == [None], "punctuation alone is compared as it is"


def test_a_footer_that_rows_share_makes_no_copies_and_hides_none(unlike: Callable[..., list[str]]) -> None:
    """Case: mails of one sender, 40 characters of request and 300 of footer."""
    pile, test = [f"{text} {FOOTER}" for text in unlike(200)], [f"{text} {FOOTER}" for text in unlike(100, seed=1)]
    assert float(naive_jaccard(pile[0], test[0])) > 0.7, "with the footer any two of them are alike"
    copied = [test[3].upper(), test[5].replace("kitchen", "kitchens")]
    found = Originals({"test": test}, [*pile, *copied], 0.7).copies([*pile, *copied, FOOTER])
    assert found[:200] == [None] * 200
    assert [copy.original for copy in found[200:202] if copy] == [3, 5]
    assert found[202] is None
    assert Originals({"test": [*test, FOOTER]}, pile, 0.7).copies([FOOTER]) == [Copy("test", 100, 1.0)], "a footer alone is its own copy"


FORM = "Name: {} Order number: {} Ordered on: {} What is wrong: {} What shall we do: please send me another one as soon as you can."


@pytest.mark.parametrize("originals", [60, 8])
def test_signatures_of_many_senders_make_no_copies(unlike: Callable[..., list[str]], originals: int) -> None:
    """Each is in a tenth of the rows; a few demonstrations are enough to know them, and copies are found behind them all the same."""
    footers = [f"{FOOTER.replace('Muster', name)} {' '.join(unlike(4, seed=n))}" for n, name in enumerate(["Ada", "Bob"])]
    pile, test = ([f"{text} {footers[n % 2]}" for n, text in enumerate(unlike(count, seed=count))] for count in (200, originals))
    pile += unlike(300, seed=7)
    assert float(naive_jaccard(pile[0], test[0])) > 0.7
    copied = [test[3].upper(), f"{test[4]} Bye"]
    found = Originals({"test": test}, [*pile, *copied], 0.7).copies([*pile, *copied])
    assert found[:500] == [None] * 500
    assert [copy.original for copy in found[500:] if copy] == [3, 4]


def test_the_headings_of_a_form_make_no_copies(unlike: Callable[..., list[str]]) -> None:
    pile, test = ([FORM.format(*text.split()[1:4], text) for text in unlike(200, seed=seed)] for seed in (0, 1))
    found = Originals({"test": test}, [*pile, test[5] + "!"], 0.7).copies([*pile, test[5] + "!"])
    assert [copy.original for copy in found if copy] == [5]


def test_a_text_that_many_rows_repeat_on_one_side_is_still_a_copy(unlike: Callable[..., list[str]]) -> None:
    """What one side alone has in common is not left out: half the pile are variants of one test text."""
    test = unlike(50)
    variants = [f"{test[7]}{'!' * n}" for n in range(40)]
    found = Originals({"test": test}, [*variants, *unlike(40, seed=1)], 0.7).copies(variants)
    assert [copy.original for copy in found if copy] == [7] * 40


def test_small_sets_have_nothing_in_common() -> None:
    draw = random.Random(0)
    texts = [f"a film of {draw.getrandbits(40):x}" for _ in range(4)]
    assert [copy.original for copy in Originals({"test": texts}, texts, 0.7).copies([text + "." for text in texts]) if copy] == [0, 1, 2, 3]
