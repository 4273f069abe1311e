"""Answers in free text: judged by hand-made answers, compared by pairs, and written by every seed and in every context."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluation.compare import compare_methods
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.free_text import agreement, judge, values_of
from pipeline.files import read_json
from pipeline.params import FormParams
from pipeline.schema import ANSWERS, read_table, write_table

GOOD, BAD = '{"sentiment": "positive", "because": "a joy"}', '{"sentiment": "negative", "because": "<b>flat</b>"}'
FORM = FormParams.model_validate({"keys": {"sentiment": ["negative", "positive"], "because": []}, "label": "sentiment"})
SAID = {"teacher": [GOOD, BAD, GOOD, BAD], "untouched": ["what?", GOOD, GOOD, ""], "cd": [GOOD, BAD, GOOD, GOOD]}
GOLD = ["positive", "negative", "positive", "negative"]
BOOTSTRAP = {"resamples": 100, "seed": 0}


def answers(*runs, sets=("movie",)):
    """Rows of ANSWERS: `runs` are each run's answers to the same examples."""
    rows = [
        {
            "set": name,
            "run": f"r{at}" if len(runs) > 1 else "",
            "example_id": f"{name}{n}",
            "label": GOLD[n % 4],
            "answer": said,
            "tokens": 10 + n,
        }
        for name in sets
        for at, run in enumerate(runs)
        for n, said in enumerate(run)
    ]
    return pa.Table.from_pylist(rows, ANSWERS)


@pytest.mark.parametrize(
    "answer",
    [
        "what?",
        "[1]",
        '{"sentiment": "positive"}',
        '{"sentiment": "positive", "because": " "}',
        '{"sentiment": "mixed", "because": "so"}',
        '{"sentiment": "positive", "because": "a", "more": "b"}',
        '{"sentiment": "positive", "because": 3}',
        "[" * 100_000,
    ],
)
def test_an_ill_formed_answer_says_nothing(answer):
    assert values_of(answer, FORM) is None
    assert values_of(f" {GOOD}\n", FORM) == {"sentiment": "positive", "because": "a joy"}


def test_shares_are_counted_by_hand():
    found = {name: judge(answers(said), FORM, **BOOTSTRAP)["movie"] for name, said in SAID.items()}
    assert {name: (entry["n"], entry["tokens"]) for name, entry in found.items()} == dict.fromkeys(SAID, (4, 11.5))
    assert {name: entry["well_formed"] for name, entry in found.items()} == {"teacher": 1.0, "untouched": 0.5, "cd": 1.0}
    assert {name: entry["accuracy"] for name, entry in found.items()} == {"teacher": 1.0, "untouched": 0.25, "cd": 0.75}
    for entry in found.values():
        assert entry["accuracy_ci95"][0] <= entry["accuracy"] <= entry["accuracy_ci95"][1]
    assert found["teacher"]["accuracy_ci95"] == [pytest.approx(0.025 ** (1 / 4), abs=1e-6), 1.0], "the exact bound if all are right"
    assert judge(answers(SAID["cd"]), None, **BOOTSTRAP) == {"movie": {"n": 4, "tokens": 11.5}}


def test_repeating_a_context_narrows_no_interval():
    """Contexts share their examples: four times the same answers are no more evidence than once."""
    once, four = (judge(answers(*[SAID["untouched"] * 5] * times), FORM, **BOOTSTRAP)["movie"] for times in (1, 4))
    contexts = four.pop("contexts")
    assert four == once
    assert contexts["accuracy"] == {"mean": 0.25, "sd": 0.0, "worst": 0.25, "best": 0.25, "each": [0.25] * 4}


def test_several_runs_give_means_over_them():
    found = judge(answers(SAID["untouched"], SAID["teacher"]), FORM, **BOOTSTRAP)["movie"]
    assert (found["n"], found["well_formed"], found["accuracy"]) == (4, 0.75, 0.625)
    assert found["contexts"]["accuracy"]["each"] == [0.25, 1.0]
    assert found["contexts"]["well_formed"]["sd"] == pytest.approx(np.std([0.5, 1.0], ddof=1), abs=1e-6)


def test_agreement_is_word_for_word_and_key_by_key():
    tables = {name: answers(said) for name, said in SAID.items()}
    assert agreement(tables["cd"], tables["teacher"], FORM) == {"movie": {"text": 0.75, "sentiment": 0.75, "because": 0.75}}
    assert agreement(tables["untouched"], tables["teacher"], FORM) == {"movie": {"text": 0.25, "sentiment": 0.25, "because": 0.25}}
    spaced = answers([f"  {said}\n" for said in SAID["teacher"]])
    assert agreement(spaced, tables["teacher"], None) == {"movie": {"text": 1.0}}


@pytest.fixture
def free(world):
    world.answer_freely()
    return world


@pytest.mark.slow
def test_every_seed_and_every_context_has_its_answers(free):
    free.capture("few")
    runs = {"several": ["seed 4", "seed 7"], "teacher": ["shots/0", "shots/1"], "untouched": [""]}
    for name, own in runs.items():
        evaluate(name, free.params, free.folders)
        rows = read_table(free.artifacts / "predictions" / f"{name}.parquet", ANSWERS).to_pylist()
        assert [(row["set"], row["run"]) for row in rows] == [(key, run) for key, pairs in free.sets.items() for run in own for _ in pairs]
        assert [entry["n"] for entry in free.metric("eval", name)["sets"].values()] == [4, 3]
    rows = read_table(free.artifacts / "predictions" / "several.parquet", ANSWERS).to_pylist()
    said = {run: [row["answer"] for row in rows if row["run"] == run] for run in runs["several"]}
    assert said["seed 4"] != said["seed 7"], "two models answered"
    free.raw["students"]["several"]["seeds"] = [7]
    free.train("several", 7)
    evaluate("several", free.params, free.folders)
    alone = read_table(free.artifacts / "predictions" / "several.parquet", ANSWERS)
    assert alone["answer"].to_pylist() == said["seed 7"]


def test_methods_are_compared_by_pairs(free):
    tables = {
        "several": answers(SAID["cd"] * 3, SAID["cd"] * 3, sets=free.sets),
        "untouched": answers(SAID["untouched"] * 3, sets=free.sets),
    }
    tables["teacher"] = answers(SAID["teacher"] * 3, sets=free.sets)
    for name, table in tables.items():
        write_table(table, free.artifacts / "predictions" / f"{name}.parquet")
    compare_methods(free.params, free.folders)
    found = read_json(free.metrics / "compare.json")
    assert found["to_reference"]["several"]["near"]["text"] == 0.75
    rows = {(row["what"], row["method"], row["other"], row["set"]): row for row in found["comparisons"]}
    assert len(rows) == 2 * 3 * 3, "well formed and right, three pairs, two sets and both together"
    right = rows["accuracy", "several", "teacher", None]
    assert (right["n"], right["difference"], right["only_other_right"], right["clear"]) == (24, -0.25, 6, True)
    assert right["mcnemar_p"] == 0.0312
    formed = rows["well_formed", "teacher", "untouched", "near"]
    assert (formed["difference"], formed["only_method_right"], formed["mcnemar_p"]) == (0.5, 6, 0.0312)
