"""Agreement, KL, paired differences and McNemar's test against their definitions; what a student cost and saves, by hand."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import CorruptError
from pipeline.evaluation import compare as compare_module
from pipeline.evaluation.compare import break_even, compare_methods, comparisons, mcnemar_exact, payback, to_reference, write_break_even
from pipeline.evaluation.metrics import mean_accuracy, scores_by_set
from pipeline.files import Folders, read_json, write_json
from pipeline.params import parse_params
from pipeline.schema import PREDICTIONS, write_table

LABELS = ("negative", "positive")
DOMAINS = {"movie": "in", "amazon": "out", "tweets": "out"}
BOOTSTRAP = {"resamples": 100, "seed": 0}


def rows_of(seed, contexts=1, n=25, sets=DOMAINS):
    rng, gold = np.random.default_rng(seed), np.random.default_rng(0)
    rows = []
    for name in sets:
        labels = gold.integers(2, size=n)
        for context in range(contexts):
            for i in range(n):
                p = float(np.float32(rng.beta(2, 1)))
                probabilities = [p, 1 - p] if labels[i] == 0 else [1 - p, p]
                rows.append(
                    {
                        "set": name,
                        "run": f"c{context}",
                        "example_id": f"{name}-{i}",
                        "label": LABELS[labels[i]],
                        "predicted": LABELS[int(probabilities[1] > probabilities[0])],
                        "probabilities": probabilities,
                    }
                )
    return rows


def table_of(rows):
    return pa.Table.from_pylist(rows, PREDICTIONS)


def compared(a, b, domains=DOMAINS):
    """Comparisons of two methods with these rows."""
    scores = {name: scores_by_set(table_of(rows), list(domains)) for name, rows in (("a", a), ("b", b))}
    return comparisons("a", "b", scores, domains, **BOOTSTRAP)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_two_sided_binomial_test_of_the_discordant_pairs(b, c):
    n = b + c
    chance = [math.comb(n, k) / 2**n for k in range(n + 1)]
    expected = sum(p for p in chance if p <= chance[b] * (1 + 1e-7)) if n else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected)


def test_a_comparison_counts_what_only_one_gets_right():
    found = compared(rows_of(1), rows_of(2))
    assert [(row["domain"], row["set"]) for row in found] == [
        ("in", None),
        ("in", "movie"),
        ("out", None),
        ("out", "amazon"),
        ("out", "tweets"),
    ]
    for row in found:
        names = [name for name, domain in DOMAINS.items() if row["set"] in (None, name) and domain == row["domain"]]
        pairs = [
            (x["predicted"] == x["label"], y["predicted"] == y["label"])
            for x, y in zip(rows_of(1), rows_of(2), strict=True)
            if x["set"] in names
        ]
        only_a, only_b = (sum(p[i] and not p[1 - i] for p in pairs) for i in (0, 1))
        assert (row["n"], row["only_method_right"], row["only_other_right"]) == (len(pairs), only_a, only_b)
        assert row["difference"] == pytest.approx((only_a - only_b) / len(pairs), abs=1e-6)
        assert row["mcnemar_p"] == pytest.approx(mcnemar_exact(only_a, only_b), rel=1e-2)
        assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]


def test_several_contexts_have_a_difference_and_no_mcnemar():
    found = compared(rows_of(1, contexts=3), rows_of(2))
    assert all(row["mcnemar_p"] is row["only_method_right"] is None for row in found)
    right = [np.mean([r["predicted"] == r["label"] for r in rows if r["set"] == "movie"]) for rows in (rows_of(1, 3), rows_of(2))]
    assert found[0]["difference"] == pytest.approx(right[0] - right[1], abs=1e-6)


def test_a_method_against_itself_differs_by_nothing_and_a_better_one_clearly():
    rows = rows_of(4, n=200)
    [same, *_] = compared(rows, rows)
    assert (same["difference"], same["clear"], same["mcnemar_p"]) == (0, False, 1.0)
    assert same["ci95"][1] < 0.02, "agreement on every example leaves little room"
    best = [row | {"predicted": row["label"]} for row in rows]
    [gain, *_], [loss, *_] = compared(best, rows), compared(rows, best)
    assert gain["clear"]
    assert loss["difference"] == pytest.approx(-gain["difference"])


def test_a_domain_s_difference_is_of_means_over_its_sets_paired_by_example():
    a, b = rows_of(1, n=60) + rows_of(3, n=9, sets=("small",)), rows_of(2, n=60) + rows_of(5, n=9, sets=("small",))
    domains = DOMAINS | {"small": "in"}
    [row, *_] = compared(a, b[::-1], domains)
    one, two = (mean_accuracy(table_of(rows), ["movie", "small"], **BOOTSTRAP)["accuracy"] for rows in (a, b))
    assert (row["n"], row["set"]) == (69, None)
    assert row["difference"] == pytest.approx(one - two, abs=2e-6)
    with pytest.raises(CorruptError, match="set 'movie': a and b answered different examples"):
        compared(a, b[1:], domains)


def test_the_reference_answers_every_example_once():
    rows, table = rows_of(1), table_of(rows_of(1))
    assert {found["agreement"] for found in to_reference(table, table, LABELS, **BOOTSTRAP).values()} == {1.0}
    other = table_of(rows_of(2)), table_of(rows_of(2)[::-1])
    assert to_reference(table, other[0], LABELS, **BOOTSTRAP) == to_reference(table, other[1], LABELS, **BOOTSTRAP), "joined by example"
    for lacking, count in ((rows[1:], 1), (rows[25:], 25)):
        with pytest.raises(CorruptError, match=f"set 'movie': the reference did not answer {count} examples, first movie-0"):
            to_reference(table, table_of(lacking), LABELS, **BOOTSTRAP)


@pytest.mark.parametrize("contexts", [1, 2])
def test_kl_and_agreement_equal_their_definitions(contexts):
    ours, theirs = rows_of(1, contexts), rows_of(2)
    reference = {row["example_id"]: row for row in theirs}
    for name, found in to_reference(table_of(ours), table_of(theirs), LABELS, **BOOTSTRAP).items():
        own = [row for row in ours if row["set"] == name]
        kl = []
        for row in own:
            q = np.array(reference[row["example_id"]]["probabilities"], dtype=np.float32).astype(float)
            p = np.array(row["probabilities"], dtype=np.float32).astype(float)
            q, p = q / q.sum(), p / p.sum()
            kl.append((q * np.log(q / p)).sum())
        same = [row["predicted"] == reference[row["example_id"]]["predicted"] for row in own]
        assert found["n"] == len(own) / contexts
        assert found["kl_nats"] == pytest.approx(np.mean(kl), abs=1e-5)
        assert found["agreement"] == pytest.approx(np.mean(same), abs=1e-6)
        assert found["kl_ci95"][0] <= found["kl_nats"] <= found["kl_ci95"][1]


def test_a_probability_of_zero_gives_a_large_kl_and_no_infinity():
    sure = [row | {"probabilities": [1.0, 0.0], "predicted": "negative"} for row in rows_of(1)]
    even = [row | {"probabilities": [0.5, 0.5], "predicted": "negative"} for row in rows_of(1)]
    found = to_reference(table_of(sure), table_of(even), LABELS, **BOOTSTRAP)["movie"]["kl_nats"]
    assert found == pytest.approx(0.5 * math.log(0.5 / 1e-12) + 0.5 * math.log(0.5))
    assert to_reference(table_of(even), table_of(sure), LABELS, **BOOTSTRAP)["movie"]["kl_nats"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.fixture
def params(raw_params):
    raw_params["evaluation"]["bootstrap"] = 20
    del raw_params["data"]["evaluation"]["editorials"]
    return parse_params(raw_params)


def write_predictions(params, root):
    for seed, name in enumerate([*params.students, *params.baselines]):
        contexts = 2 if name in params.baselines and params.baselines[name].contexts == "each" else 1
        write_table(table_of(rows_of(seed, contexts)), root / "artifacts" / "predictions" / f"{name}.parquet")


def test_every_pair_of_methods_is_compared_once(params, tmp_path):
    write_predictions(params, tmp_path)
    compare_methods(params, Folders.here(tmp_path))
    document = read_json(tmp_path / "metrics" / "compare.json")
    names = [*params.students, *params.baselines]
    pairs = [(row["method"], row["other"]) for row in document["comparisons"] if row["set"] is None and row["domain"] == "out"]
    assert {frozenset(pair) for pair in pairs} == {frozenset((a, b)) for a in names for b in names if a != b}
    assert len(pairs) == len(names) * (len(names) - 1) / 2
    assert (document["reference"], document["pairs"]) == ("teacher", "all")
    assert list(document["to_reference"]) == [name for name in names if name != "teacher"]


def test_with_many_methods_each_is_compared_with_the_reference_alone(params, tmp_path, monkeypatch):
    monkeypatch.setattr(compare_module, "ALL_PAIRS_UP_TO", 3)
    write_predictions(params, tmp_path)
    compare_methods(params, Folders.here(tmp_path))
    document = read_json(tmp_path / "metrics" / "compare.json")
    assert document["pairs"] == "reference"
    assert all("teacher" in (row["method"], row["other"]) for row in document["comparisons"])
    assert {row["method"] for row in document["comparisons"]} | {row["other"] for row in document["comparisons"]} == {
        *params.students,
        *params.baselines,
    }


def write_times(metrics, **changes):
    files = {
        "runtime/teacher-few_shot": {"seconds": 50.0, "rows": 10, "rows_timed": 10, "prompt_tokens": 1},
        "runtime/teacher-zero_shot": {"seconds": 10.0, "rows": 10, "rows_timed": 10, "prompt_tokens": 1},
        "runtime/teacher-tuned": {"seconds": 6.0, "rows": 10, "rows_timed": 10, "prompt_tokens": 1},
        "runtime/tuned-tuned": {"seconds": 4.0, "resumed_at_step": 0},
        "runtime/student-cd": {"seconds": 30.0, "resumed_at_step": 0},
        "runtime/student-pbft": {"seconds": 5.0, "resumed_at_step": 0},
    }
    for name, milliseconds, rate in (("cd", 50.0, 20.0), ("pbft", 2000.0, 20.0), ("teacher", 1050.0, 4.0)):
        files[f"cost/{name}"] = {
            "measured": {"subject": name},
            "latency_ms": milliseconds,
            "throughput": {"examples_per_second": rate},
        }
        files[f"eval/{name}"] = {"subject": name}
    for name, value in (files | changes).items():
        if value is not None:
            write_json(value, metrics / f"{name}.json")


def test_break_even_is_what_was_spent_over_what_a_prediction_saves(params, tmp_path):
    write_times(tmp_path)
    found = break_even("cd", params, tmp_path)
    assert found["capture_seconds"] == {"few_shot": 50.0, "zero_shot": 10.0, "tuned": 6.0}
    assert (found["tuning_seconds"], found["training_seconds"]) == ({"tuned": 4.0}, 30.0)
    assert (found["spent_seconds"], found["missing"]) == (100.0, [])
    # One by one: 100 s / (1.05 s - 0.05 s); in batches: 100 s / (1/4 s - 1/20 s).
    one = {"student_seconds": 0.05, "reference_seconds": 1.05, "saved_seconds": 1.0, "predictions": 100}
    assert found["one_by_one"] == one
    assert found["batched"] == {"student_seconds": 0.05, "reference_seconds": 0.25, "saved_seconds": 0.2, "predictions": 500}


def test_a_student_of_labels_pays_for_no_teacher_and_a_slower_one_never_pays(params, tmp_path):
    write_times(tmp_path)
    found = break_even("pbft", params, tmp_path)
    assert (found["capture_seconds"], found["spent_seconds"]) == ({}, 5.0)
    assert found["one_by_one"]["predictions"] is None
    assert found["one_by_one"]["saved_seconds"] == pytest.approx(-0.95)
    assert found["batched"]["predictions"] == 25


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"runtime/teacher-few_shot": None}, "teacher-few_shot.json: no such file"),
        (
            {"runtime/teacher-zero_shot": {"seconds": 1.0, "rows": 10, "rows_timed": 7}},
            "teacher-zero_shot.json: the times of 3 of 10 rows are not known",
        ),
        ({"runtime/student-cd": {"seconds": 1.0, "resumed_at_step": 12}}, "only the rest of a resumed training was timed"),
        ({"cost/teacher": None}, "teacher.json: no such file"),
        ({"eval/cd": {"subject": "another"}}, "cd.json: measured on another model"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_guessed(params, tmp_path, changes, reason):
    write_times(tmp_path, **changes)
    found = break_even("cd", params, tmp_path)
    assert any(reason in text for text in found["missing"]), found["missing"]
    assert found["one_by_one"]["predictions"] is found["batched"]["predictions"] is None


def test_the_time_of_a_tuned_teacher_counts(raw_params, tmp_path):
    raw_params["tuned"] |= {"better": {"base": "models/smollm2", "steps": 1, "learning_rate": 1e-4}}
    raw_params["teachers"]["few_shot"]["model"] = "tuned/better"
    write_times(tmp_path, **{"runtime/tuned-better": {"seconds": 900.0, "resumed_at_step": 0}})
    found = break_even("cd", parse_params(raw_params), tmp_path)
    assert found["tuning_seconds"] == {"better": 900.0, "tuned": 4.0}
    assert (found["spent_seconds"], found["one_by_one"]["predictions"]) == (1000.0, 1000)


@pytest.mark.parametrize(
    ("changes", "capture", "tuning", "students"),
    [
        ({"learn_from": "teachers/few_shot", "ce_weight": 0.0}, {"few_shot": 50.0}, {}, {}),
        ({"learn_from": "teachers/tuned", "ce_weight": 0.0}, {"tuned": 6.0}, {"tuned": 4.0}, {}),
        ({"learn_from": "targets/few_shot", "base": "tuned/tuned"}, {"few_shot": 50.0}, {"tuned": 4.0}, {}),
        ({"learn_from": "targets/few_shot", "base": "students/pbft"}, {"few_shot": 50.0}, {}, {"pbft": 5.0}),
        ({"learn_from": "targets/few_shot", "base": "students/second"}, {"few_shot": 50.0, "zero_shot": 10.0}, {}, {"second": 7.0}),
    ],
)
def test_every_teacher_tuned_model_and_base_that_a_student_is_made_with_counts_once(
    raw_params, tmp_path, changes, capture, tuning, students
):
    del raw_params["data"]["evaluation"]["editorials"]
    raw_params["students"]["cd"] |= changes
    raw_params["students"]["second"] = raw_params["students"]["pbft"] | {"learn_from": "targets/zero_shot_raw"}
    write_times(tmp_path, **{"runtime/student-second": {"seconds": 7.0, "resumed_at_step": 0}})
    found = break_even("cd", parse_params(raw_params), tmp_path)
    assert (found["capture_seconds"], found["tuning_seconds"], found["base_training_seconds"]) == (capture, tuning, students)
    assert found["spent_seconds"] == 30.0 + sum([*capture.values(), *tuning.values(), *students.values()])


def test_what_was_spent_is_paid_back_by_whole_predictions():
    assert payback(1.0, 0.1, 0.4)["predictions"] == 4
    assert payback(1.0, 0.4, 0.4)["predictions"] is None


def test_break_even_of_all_students_without_any_times(params, tmp_path):
    write_break_even(params, Folders.here(tmp_path))
    document = read_json(tmp_path / "metrics" / "runtime" / "break-even.json")
    assert document["reference"] == "teacher"
    assert {name: entry["spent_seconds"] for name, entry in document["students"].items()} == dict.fromkeys(params.students)
    assert all(entry["missing"] for entry in document["students"].values())
