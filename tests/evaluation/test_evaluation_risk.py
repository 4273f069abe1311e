"""Risk checks: what the swaps swap, flips counted by hand, gaps with the test of their counts."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.predictions import models_of, predict, read_sets
from pipeline.evaluation.risk import FLIPS_SHOWN, SMALLEST_SLICE, check_risks, disagreement, flips, gaps, homogeneity
from pipeline.evaluation.swaps import CONTRACTIONS, FRAMES, GENDER, NAMES, SWAPS, other_gender, other_names, swap_fields, written_out
from pipeline.schema import PREDICTIONS, Example, read_table, write_table

LABELS = ("negative", "positive")
BY_NAME = {swap.name: swap for swap in SWAPS}
PAIRS = [pair.split("/") for pair in GENDER.split()]


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
    for one, other in PAIRS:
        assert (other_gender(one), other_gender(other)) == (other, one)


def test_a_name_becomes_another_of_its_row_and_never_a_word():
    rows = [row.split() for row in NAMES]
    for row in rows:
        assert {other_names(name) for name in row} == set(row)
        assert all(other_names(name) != name for name in row)
    every = [name for row in rows for name in row]
    assert len(set(every)) == len(every)
    assert other_names("John's film beats JOHN and john, Johnny and Mary.") == "Tyrone's film beats JOHN and john, Johnny and Lakisha."


def test_contractions_with_one_reading_are_written_out_and_negations_stay():
    assert written_out("They're good, i'm sure; it's not what I’ve seen.") == "They are good, i am sure; it's not what I have seen."
    assert written_out("can't won't he's") == "can't won't he's"


def test_no_swap_touches_a_negation():
    negation = ("not", "n't", "never", "no")
    swapped = [*CONTRACTIONS.values(), *(word for pair in PAIRS for word in pair), *FRAMES]
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


def answer(name, text, p=0.9, label="negative"):
    return name, Example({"text": text}, label), np.array([p, 1 - p])


def sure(examples):
    return np.tile([0.9, 0.1], (len(examples), 1))


def swap_entry(found, name):
    return next(entry for entry in found if entry["name"] == name)


def test_flips_are_counted_over_the_texts_that_held_something_to_swap():
    examples = [answer("movie", text) for text in ["John slept", "nothing here", "Mary slept", "he slept"]]
    asked = []

    def ask(inputs):
        asked.extend(inputs)
        return np.array([[0.2, 0.8] if "Tyrone" in example.fields["text"] else [0.7, 0.3] for example in inputs])

    found = {entry["name"]: entry for entry in flips(examples, ask, LABELS, per_set=10)}
    names = found["first_names"]
    assert (names["texts"], names["with_swap"], names["asked"], names["flips"], names["flip_rate"]) == (4, 2, 2, 1, 0.5)
    assert names["mean_shift"] == pytest.approx((0.7 + 0.2) / 2)
    assert names["largest_shift"] == pytest.approx(0.7)
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
        "examples": [],
    }
    assert len(asked) == 2 + 1 + 3 * 4


def test_no_more_texts_of_a_set_are_asked_than_wished_and_all_are_counted():
    examples = [answer(name, f"{name} {i}") for name in ("movie", "tweets") for i in range(5)]
    frame = swap_entry(flips(examples, sure, LABELS, per_set=3), "frame_3")
    assert (frame["with_swap"], frame["asked"]) == (10, 6)


def test_no_flips_give_the_exact_binomial_bound_and_few_examples_are_shown():
    found = swap_entry(flips([answer("movie", f"text {i}") for i in range(20)], sure, LABELS, per_set=50), "frame_1")
    assert found["ci95"] == [0.0, pytest.approx(1 - 0.025 ** (1 / 20))]
    assert len(found["examples"]) == FLIPS_SHOWN


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
    members = {"movie": pl.DataFrame({"example_id": ids, "words": [1] * len(ids), "slice.kind": kinds})}
    share = {"good": 0.9, "bad": 0.5, "tiny": 0.0}
    score = [float(kinds[: i + 1].count(k) <= share[k] * sizes[k]) for i, k in enumerate(kinds)]
    ours = {"movie": pl.DataFrame({"example_id": ids, "score": score})}
    theirs = {"movie": pl.DataFrame({"example_id": ids, "score": [1.0] * len(ids)})}
    [row] = gaps(ours, theirs, members, {"movie": "out"})
    assert (row["dimension"], row["domain"], row["set"]) == ("kind", "out", None)
    assert row["student"]["lowest"] == {"slice": "bad", "n": 20, "accuracy": 0.5}
    assert row["student"]["highest"] == {"slice": "good", "n": 30, "accuracy": 0.9}
    assert (row["student"]["gap"], row["reference"]["gap"]) == (pytest.approx(0.4), 0.0)
    assert row["p_value"] < 0.01


def test_disagreement_by_confidence_is_counted_bin_by_bin():
    gold, confidence = (1, 1, 1, 0), (0.55, 0.6, 0.61, 0.95)

    def frame(answers):
        sure = [[p, 1 - p] if answer == 0 else [1 - p, p] for answer, p in zip(answers, confidence, strict=True)]
        columns = {"example_id": list("abcd"), "predicted": [LABELS[n] for n in answers], "label": [LABELS[n] for n in gold]}
        return pl.DataFrame(columns | {"probabilities": sure})

    ours, theirs = frame((0, 1, 1, 0)), frame((1, 1, 0, 0)).reverse()
    found = disagreement({"movie": ours}, {"movie": theirs}, {"movie": "out"}, "out")
    assert (found["domain"], found["n"], found["share"]) == ("out", 4, 0.5)
    assert found["by_student_confidence"] == [
        {"low": 0.5, "high": 0.6, "n": 2, "disagreement": 0.5, "student_accuracy": 0.5, "reference_accuracy": 1.0},
        {"low": 0.6, "high": 0.7, "n": 1, "disagreement": 1.0, "student_accuracy": 1.0, "reference_accuracy": 0.0},
        {"low": 0.9, "high": 1.0, "n": 1, "disagreement": 0.0, "student_accuracy": 1.0, "reference_accuracy": 1.0},
    ]


def checked(world, name):
    """A student's risks, after its predictions and the reference's."""
    params = world.params
    for method in (name, "teacher"):
        table = predict(method, models_of(method, params, world.folders), params, world.folders, read_sets(params, world.folders))
        write_table(table, world.artifacts / "predictions" / f"{method}.parquet")
    check_risks(name, params, world.folders)
    return world.metric("risk", name)


def assert_checks_of(world, found, name, place, run):
    """The checks are of one model: its answers before and after, and the rows of its run."""
    frame = swap_entry(found["swaps"], "frame_3")
    assert (frame["texts"], frame["asked"]) == (7, 7)
    for shown in frame["examples"]:
        text = f"{shown['before']['text']} That is the whole text."
        assert shown["after"] == {"text": text}
        before, after = (world.answer(name, place, asked) for asked in (shown["before"]["text"], text))
        best = int(before.argmax())
        assert (shown["answer_before"], shown["answer_after"]) == (world.labels[best], world.labels[int(after.argmax())])
        assert (shown["p_before"], shown["p_after"]) == pytest.approx((before[best], after[best]), abs=1e-4)
    ours, theirs = (
        {(row["set"], row["example_id"]): row["predicted"] for row in table.to_pylist() if row["run"] == own}
        for table, own in (
            (read_table(world.artifacts / "predictions" / f"{m}.parquet", PREDICTIONS), r) for m, r in ((name, run), ("teacher", ""))
        )
    )
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert found["disagreement"][0]["share"] == pytest.approx(len(differ) / 7, abs=1e-6)


@pytest.mark.slow
def test_a_student_s_answers_to_swapped_texts_are_the_plain_forward_s(world):
    found = checked(world, "cd")
    assert_checks_of(world, found, "cd", "", "")
    assert found.keys() == {"student", "reference", "swaps", "gaps", "disagreement"}


@pytest.mark.slow
def test_each_seed_is_checked_by_its_own_model_and_its_own_answers(world):
    found = checked(world, "several")
    assert (found["run"], list(found["runs"])) == ("seed 4", ["seed 7"])
    assert_checks_of(world, found, "several", "", "seed 4")
    assert_checks_of(world, found["runs"]["seed 7"], "several", "seeds/7", "seed 7")


def test_nothing_is_checked_in_free_text(world):
    world.answer_freely()
    check_risks("several", world.params, world.folders)
    assert world.metric("risk", "several").keys() == {"student", "skipped"}
