"""Risk checks: what the swaps swap, flips counted by hand, words left out one by one, gaps with the test of their counts."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.attribution import MOST_WORDS, attribute, disagreements, leave_one_out, log_odds
from pipeline.evaluation.flips import SHOWN, Answered, flips, flips_of
from pipeline.evaluation.gaps import SMALLEST_SLICE, by_confidence, gaps, homogeneity
from pipeline.evaluation.swaps import CONTRACTIONS, FRAMES, GENDER, NAMES, SWAPS, other_gender, other_names, swap_fields, written_out

LABELS = ("negative", "positive")
BY_NAME = {swap.name: swap for swap in SWAPS}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He saw her brother.", "She saw his sister."),
        ("he saw her.", "she saw him."),
        ("I met her in the park with him", "I met him in the park with her"),
        ("HIS film is his; the rest is hers!", "HER film is hers; the rest is his!"),
        ("The actress's best: she's a hero", "The actor's best: he's a heroine"),
        ("himself", "herself"),
        ("a man, two women", "a woman, two men"),
        ("the human mankind theatre", "the human mankind theatre"),
    ],
)
def test_words_of_gender_become_their_counterparts(text, expected):
    assert other_gender(text) == expected


def test_pairs_of_gender_are_swapped_both_ways():
    for one, other in GENDER:
        assert (other_gender(one), other_gender(other)) == (other, one)


def test_a_name_becomes_another_of_its_row_and_never_a_word():
    for row in NAMES.values():
        assert {other_names(name) for name in row} == set(row)
        assert all(other_names(name) != name for name in row)
    every = [name for row in NAMES.values() for name in row]
    assert len(set(every)) == len(every)
    assert other_names("John's film beats JOHN and john, Johnny and Mary.") == "Tyrone's film beats JOHN and john, Johnny and Lakisha."


def test_contractions_with_one_reading_are_written_out_and_negations_stay():
    assert written_out("They're good, i'm sure; it's not what I’ve seen.") == "They are good, i am sure; it's not what I have seen."
    assert written_out("can't won't he's") == "can't won't he's"


def test_no_swap_touches_a_negation():
    negation = ("not", "n't", "never", "no")
    swapped = [*CONTRACTIONS, *CONTRACTIONS.values(), *(word for pair in GENDER for word in pair), *FRAMES]
    assert not [text for text in swapped for word in text.lower().split() if word in negation or word.endswith("n't")]


@given(st.text(max_size=40))
def test_a_swap_gives_another_text_or_nothing(text):
    for swap in SWAPS:
        changed = swap_fields(swap, {"text": text})
        assert changed is None or changed["text"] != text
        assert swap_fields(swap, {"text": text}) == changed


def test_all_fields_are_swapped_together_and_only_the_first_is_framed():
    fields = {"premise": "John slept.", "hypothesis": "John did."}
    assert swap_fields(BY_NAME["first_names"], fields) == {"premise": "Tyrone slept.", "hypothesis": "Tyrone did."}
    assert swap_fields(BY_NAME["frame_1"], fields) == {"premise": "Here is the text: John slept.", "hypothesis": "John did."}
    assert swap_fields(BY_NAME["gender_words"], fields) is None


def test_a_brace_in_a_text_is_no_place_to_fill():
    assert BY_NAME["frame_1"].apply("{0} {x}") == "Here is the text: {0} {x}"


def answered(name, number, text, p=0.9, label="negative"):
    return Answered(name, f"{name}-{number}", {"text": text}, label, np.array([p, 1 - p]))


def test_flips_are_counted_over_the_texts_that_held_something_to_swap():
    examples = [answered("movie", i, text) for i, text in enumerate(["John slept", "nothing here", "Mary slept", "he slept"])]
    asked = []

    def ask(inputs):
        asked.extend(inputs)
        return np.array([[0.2, 0.8] if "Tyrone" in fields["text"] else [0.7, 0.3] for fields in inputs])

    found = {entry["name"]: entry for entry in flips(examples, ask, LABELS, per_set=10)}
    names = found["first_names"]
    assert (names["texts"], names["with_swap"], names["asked"], names["flips"], names["flip_rate"]) == (4, 2, 2, 1, 0.5)
    assert names["mean_shift"] == pytest.approx((0.7 + 0.2) / 2)
    assert names["largest_shift"] == pytest.approx(0.7)
    assert names["by_set"] == {"movie": {"asked": 2, "flips": 1}}
    first, second = names["examples"]
    assert (first["before"], first["after"]) == ({"text": "John slept"}, {"text": "Tyrone slept"})
    assert (first["answer_before"], first["answer_after"], first["p_before"], first["p_after"]) == ("negative", "positive", 0.9, 0.2)
    assert second["after"] == {"text": "Lakisha slept"}
    assert (found["gender_words"]["with_swap"], found["gender_words"]["flips"]) == (1, 0)
    assert found["contractions"] | {"name": "", "what": ""} == {
        "name": "",
        "what": "",
        "texts": 4,
        "with_swap": 0,
        "asked": 0,
        "flips": 0,
        "flip_rate": None,
        "ci95": None,
        "mean_shift": None,
        "largest_shift": None,
        "by_set": {},
        "examples": [],
    }
    assert len(asked) == 2 + 1 + 3 * 4


def test_no_more_texts_of_a_set_are_asked_than_wished_and_all_are_counted():
    examples = [answered(name, i, f"text {i}") for name in ("movie", "tweets") for i in range(5)]
    found = flips(examples, lambda inputs: np.tile([0.9, 0.1], (len(inputs), 1)), LABELS, per_set=3)
    frame = next(entry for entry in found if entry["name"] == "frame_3")
    assert (frame["with_swap"], frame["asked"]) == (10, 6)
    assert frame["by_set"] == {"movie": {"asked": 3, "flips": 0}, "tweets": {"asked": 3, "flips": 0}}


def test_no_flips_give_the_exact_binomial_bound_and_few_examples_are_shown():
    rows = [(answered("movie", i, "x"), {"text": "y"}, np.array([0.8, 0.2])) for i in range(20)]
    found = flips_of(rows, LABELS)
    assert found["ci95"] == [0.0, pytest.approx(1 - 0.025 ** (1 / 20))]
    assert len(found["examples"]) == SHOWN


def test_each_word_is_left_out_once_and_lies_where_it_says():
    fields = {"premise": " A  warm, funny film", "hypothesis": "film"}
    parts = leave_one_out(fields)
    assert [word["word"] for word, _ in parts] == ["A", "warm,", "funny", "film", "film"]
    assert all(fields[word["field"]][word["start"] : word["end"]] == word["word"] for word, _ in parts)
    assert [without["premise"] for _, without in parts[:4]] == ["warm, funny film", "A funny film", "A  warm, film", "A  warm, funny"]
    assert parts[4][1] == {"premise": " A  warm, funny film", "hypothesis": ""}


def test_weights_are_the_log_odds_that_a_word_carries():
    """A student whose log-odds are a sum over words gives each word its own part back."""
    part = {"good": 1.5, "film": 0.0, "but": -0.25, "dull": -2.0}

    def ask(inputs):
        odds = np.array([sum(part[word] for word in fields["text"].split()) for fields in inputs])
        p = 1 / (1 + np.exp(-odds))
        return np.stack([1 - p, p], axis=1)

    [positive, negative] = attribute([{"text": "good film but dull"}] * 2, [1, 0], ask)
    assert {word["word"]: word["weight"] for word in positive} == pytest.approx(part)
    assert {word["word"]: -word["weight"] for word in negative} == pytest.approx(part)
    assert attribute([], [], ask) == []


def test_log_odds_are_against_all_other_answers_and_finite():
    assert log_odds(np.array([0.5, 0.3, 0.2]), 1) == pytest.approx(math.log(0.3 / 0.7))
    assert math.isfinite(log_odds(np.array([1.0, 0.0]), 0))


def test_sets_take_turns_among_the_sampled_disagreements_and_long_texts_are_counted():
    mine = [answered(name, i, "a text", 0.9) for name in ("movie", "tweets") for i in range(4)]
    mine[0] = answered("movie", 0, "word " * (MOST_WORDS + 1), 0.9)
    theirs = [answered(m.set, m.example_id[-1], "a text", 0.2 if m.example_id != "movie-3" else 0.8) for m in mine][::-1]
    chosen, long = disagreements(mine, theirs, count=5)
    assert [mine[place].example_id for place, _ in chosen] == ["movie-1", "tweets-0", "movie-2", "tweets-1", "tweets-2"]
    assert all(mine[place].example_id == theirs[at].example_id for place, at in chosen)
    assert long == 1
    assert disagreements(mine, mine)[0] == []


def test_homogeneity_is_the_chi_square_test_of_right_and_wrong():
    samples = [np.repeat([1.0, 0.0], counts) for counts in ((30, 10), (20, 30), (25, 5))]
    right, total = np.array([30, 20, 25]), np.array([40, 50, 30])
    expected = total * right.sum() / total.sum()
    statistic = ((right - expected) ** 2 / expected + (right - expected) ** 2 / (total - expected)).sum()
    assert homogeneity(samples) == pytest.approx(math.exp(-statistic / 2), rel=1e-2), "two degrees of freedom"
    assert homogeneity([np.ones(30), np.ones(20)]) is None


def test_gaps_lie_between_the_best_and_the_worst_slice_that_is_large_enough():
    sizes = {"good": 30, "bad": SMALLEST_SLICE, "tiny": SMALLEST_SLICE - 1}
    kinds = [kind for kind, size in sizes.items() for _ in range(size)]
    ids = [str(i) for i in range(len(kinds))]
    members = {"movie": pl.DataFrame({"example_id": ids, "words": [1] * len(ids), "kind": kinds})}
    share = {"good": 0.9, "bad": 0.5, "tiny": 0.0}
    score = [float(kinds[: i + 1].count(k) <= share[k] * sizes[k]) for i, k in enumerate(kinds)]
    ours = {"movie": pl.DataFrame({"example_id": ids, "score": score})}
    theirs = {"movie": pl.DataFrame({"example_id": ids, "score": [1.0] * len(ids)})}
    [row] = gaps(ours, theirs, LABELS, members, {"movie": "out"})
    assert (row["dimension"], row["domain"], row["set"]) == ("kind", "out", None)
    assert row["student"]["lowest"] == {"slice": "bad", "n": 20, "accuracy": 0.5}
    assert row["student"]["highest"] == {"slice": "good", "n": 30, "accuracy": 0.9}
    assert (row["student"]["gap"], row["reference"]["gap"]) == (pytest.approx(0.4), 0.0)
    assert row["p_value"] < 0.01


def test_disagreement_by_confidence_is_counted_bin_by_bin():
    confidence = np.array([0.55, 0.6, 0.61, 0.95])
    differ, right, other = (np.array(values, dtype=bool) for values in ([1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]))
    found = by_confidence(confidence, differ, right, other)
    assert found == [
        {"low": 0.5, "high": 0.6, "n": 2, "disagreement": 0.5, "student_accuracy": 0.5, "reference_accuracy": 1.0},
        {"low": 0.6, "high": 0.7, "n": 1, "disagreement": 1.0, "student_accuracy": 1.0, "reference_accuracy": 0.0},
        {"low": 0.9, "high": 1.0, "n": 1, "disagreement": 0.0, "student_accuracy": 1.0, "reference_accuracy": 1.0},
    ]
