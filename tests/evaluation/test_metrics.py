"""Metrics against naive oracles written from their definitions, and the properties that must hold for any predictions."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CorruptError
from pipeline.evaluation.metrics import (
    before_temperature,
    calibration_error_by_chance,
    evaluate_predictions,
    expected_calibration_error,
    mean_accuracy,
    summary,
)
from pipeline.schema import PREDICTIONS

LABELS = ("negative", "neutral", "positive")


def predictions(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


def random_rows(seed: int, n: int = 40, contexts: int = 1, sets: tuple[str, ...] = ("in", "out")) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for name in sets:
        gold = rng.integers(len(LABELS), size=n)
        for context in range(contexts):
            logits = rng.normal(size=(n, len(LABELS)))
            logits[np.arange(n), gold] += 1.0
            p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            for i in range(n):
                rows.append(
                    {
                        "set": name,
                        "run": f"c{context}" if contexts > 1 else "",
                        "example_id": f"{name}-{i:04d}",
                        "label": LABELS[gold[i]],
                        "predicted": LABELS[int(p[i].argmax())],
                        "probabilities": p[i].tolist(),
                    }
                )
    return rows


def evaluate(rows: list[dict[str, Any]], resamples: int = 200) -> dict[str, dict[str, Any]]:
    return evaluate_predictions(predictions(rows), LABELS, resamples=resamples, seed=0)


def naive_metrics(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Straight from the definitions, one loop each."""
    n = len(rows)
    log_loss = brier = 0.0
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        p = [float(np.float32(value)) for value in row["probabilities"]]
        p = [value / sum(p) for value in p]
        log_loss -= math.log(p[LABELS.index(row["label"])]) / n
        brier += sum((value - (label == row["label"])) ** 2 for value, label in zip(p, LABELS, strict=True)) / 2 / n
        bins.setdefault(min(14, math.ceil(max(p) * 15) - 1), []).append((max(p), row["label"] == row["predicted"]))
    ece = sum(len(b) / n * abs(sum(ok for _, ok in b) / len(b) - sum(c for c, _ in b) / len(b)) for b in bins.values())
    f1 = []
    for label in LABELS:
        hit = sum(r["label"] == label == r["predicted"] for r in rows)
        named = sum(r["predicted"] == label for r in rows) + sum(r["label"] == label for r in rows)
        if named:
            f1.append(2 * hit / named)
    accuracy = sum(r["label"] == r["predicted"] for r in rows) / n
    return {"accuracy": accuracy, "log_loss": log_loss, "brier": brier, "ece": ece, "macro_f1": sum(f1) / len(f1)}


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_their_definitions(seed: int) -> None:
    rows = random_rows(seed)
    for name, found in evaluate(rows).items():
        for key, expected in naive_metrics([row for row in rows if row["set"] == name]).items():
            assert found[key] == pytest.approx(expected, abs=2e-6), key


def test_several_contexts_give_means_over_contexts() -> None:
    rows = random_rows(1, contexts=3, sets=("in",))
    found = evaluate(rows)["in"]
    each = [naive_metrics([row for row in rows if row["run"] == f"c{i}"]) for i in range(3)]
    for key in each[0]:
        assert found[key] == pytest.approx(np.mean([metrics[key] for metrics in each]), abs=2e-6)
    accuracies = [metrics["accuracy"] for metrics in each]
    assert found["contexts"]["each"] == pytest.approx(accuracies)
    assert (found["contexts"]["worst"], found["contexts"]["best"]) == (min(accuracies), max(accuracies))
    assert found["n"] == 40


def test_one_context_has_no_contexts_entry() -> None:
    assert "contexts" not in evaluate(random_rows(0))["in"]


def test_repeating_a_context_narrows_no_interval() -> None:
    """Contexts share their examples, so the same answers four times over are no more evidence than once."""
    once = random_rows(2, sets=("in",))
    copies = [row | {"run": f"c{i}"} for i in range(4) for row in once]
    assert evaluate(copies)["in"]["ci95"] == evaluate(once)["in"]["ci95"]


@given(st.integers(0, 2**16), st.integers(1, 30))
@settings(max_examples=25, deadline=None)
@pytest.mark.slow
def test_the_interval_holds_the_accuracy_and_stays_in_range(seed: int, n: int) -> None:
    for metrics in evaluate(random_rows(seed, n=n), resamples=100).values():
        low, high = metrics["ci95"]
        assert 0 <= low <= metrics["accuracy"] <= high <= 1
        assert sum(metrics["predicted_shares"].values()) == pytest.approx(1, abs=1e-5)


def test_all_right_gives_the_exact_binomial_interval_without_a_warning() -> None:
    rows = [row | {"label": row["predicted"]} for row in random_rows(0, n=100, sets=("in",))]
    found = evaluate(rows)["in"]
    assert found["accuracy"] == 1.0
    assert found["ci95"] == pytest.approx([0.025 ** (1 / 100), 1.0], abs=1e-6)


def test_the_interval_is_close_to_the_normal_one_where_that_is_good() -> None:
    rows = random_rows(3, n=2000, sets=("in",))
    found = evaluate(rows, resamples=2000)["in"]
    half = 1.96 * math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / 2000)
    assert found["ci95"] == pytest.approx([found["accuracy"] - half, found["accuracy"] + half], abs=0.003)


def test_the_same_rows_give_the_same_json() -> None:
    rows = random_rows(5, contexts=2)
    assert json.dumps(evaluate(rows)) == json.dumps(evaluate(rows))


@pytest.mark.parametrize(
    "bad", [[math.nan, 0.5, 0.5], [0.2, 0.2, 0.2], [1.2, -0.1, -0.1], [0.5, 0.5]], ids=["nan", "sum", "negative", "length"]
)
def test_what_is_not_a_distribution_is_an_error_naming_the_row(bad: list[float]) -> None:
    rows = random_rows(0)
    rows[7] = rows[7] | {"probabilities": bad}
    with pytest.raises(CorruptError, match=r"set 'in': example in-0007"):
        evaluate(rows)


def test_an_unknown_label_an_uneven_context_and_a_repeat_are_errors() -> None:
    rows = random_rows(0)
    with pytest.raises(CorruptError, match=r"in-0000: label 'odd', .* not a distribution over the task's labels negative, neutral"):
        evaluate([rows[0] | {"label": "odd"}, *rows[1:]])
    with pytest.raises(CorruptError, match="in-0000 has 2 rows in 3 runs"):
        evaluate(random_rows(0, contexts=3)[1:])
    with pytest.raises(CorruptError, match="in-0000 has 2 rows in 1 runs"):
        evaluate([*rows, rows[0]])


def test_mean_accuracy_weighs_sets_alike_whatever_their_size() -> None:
    rows = random_rows(0, n=10, sets=("in",)) + random_rows(1, n=100, sets=("out",))
    each = evaluate(rows)
    expected = (each["in"]["accuracy"] + each["out"]["accuracy"]) / 2
    assert mean_accuracy(predictions(rows), ["in", "out"], resamples=50, seed=0)["accuracy"] == pytest.approx(expected, abs=1e-6)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=50))
def test_ece_lies_between_zero_and_one(pairs: list[tuple[float, bool]]) -> None:
    confidence, correct = np.array([c for c, _ in pairs]), np.array([ok for _, ok in pairs])
    assert 0 <= expected_calibration_error(confidence, correct) <= 1
    one_bin = expected_calibration_error(confidence, correct, bins=1)
    assert one_bin == pytest.approx(abs(confidence.mean() - correct.mean()), abs=1e-9)
    assert expected_calibration_error(confidence, correct) >= one_bin - 1e-9, "finer bins hide less"


@pytest.mark.parametrize("confidence", [[0.9], [0.9, 0.94], [0.55, 0.9, 0.91, 0.6, 1.0]])
def test_ece_by_chance_is_the_mean_over_what_may_be_right(confidence: list[float]) -> None:
    expected = 0.0
    for right in itertools.product([False, True], repeat=len(confidence)):
        chance = math.prod(c if ok else 1 - c for c, ok in zip(confidence, right, strict=True))
        expected += chance * expected_calibration_error(np.array(confidence), np.array(right))
    assert calibration_error_by_chance(np.array(confidence)) == pytest.approx(expected, abs=0.06)
    assert calibration_error_by_chance(np.repeat(confidence, 2000)) < 0.02


SUMMED = {
    "movie": {"accuracy": 0.9, "ece": 0.1, "log_loss": 0.3},
    "amazon": {"accuracy": 0.8, "ece": 0.2, "log_loss": 0.5},
    "tweets": {"accuracy": 0.6, "ece": 0.3, "log_loss": 0.7},
}


def test_the_summary_s_means_are_unweighted_over_the_sets_of_a_domain() -> None:
    row = summary(SUMMED, {"movie": "in", "amazon": "out", "tweets": "out"})
    assert row == {"accuracy_in": 0.9, "accuracy_out": 0.7, "accuracy_lowest": 0.6, "ece": 0.2, "log_loss": 0.5}
    assert all(isinstance(value, float) for value in row.values()), "dvc metrics shows numbers at the top level alone"
    assert "accuracy_in" not in summary(SUMMED, dict.fromkeys(SUMMED, "out"))
    assert summary({"movie": {"well_formed": 0.5, "n": 4}}, {"movie": "in"}) == {"well_formed_in": 0.5}


def test_metrics_of_each_label_follow_their_definitions():
    rows = random_rows(3, n=60, contexts=2, sets=("in",))
    rows = [row for row in rows if row["label"] != "positive" or row["example_id"][-1] in "02"]  # a rare label
    found = evaluate(rows)
    for label, own in found["in"]["per_label"].items():
        naive: list[list[float]] = []
        for run in ("c0", "c1"):
            part = [row for row in rows if row["run"] == run]
            is_it = [row["label"] == label for row in part]
            hits = sum(row["predicted"] == label for row, its in zip(part, is_it, strict=True) if its)
            precision, recall = hits / sum(row["predicted"] == label for row in part), hits / sum(is_it)
            order = sorted(range(len(part)), key=lambda i: -part[i]["probabilities"][LABELS.index(label)])
            ranks = [rank for rank, i in enumerate(order, 1) if is_it[i]]
            average = sum(found / rank for found, rank in enumerate(ranks, 1)) / len(ranks)
            naive.append([precision, recall, 2 * precision * recall / (precision + recall), average])
        assert own["n"] == sum(is_it)
        assert [own[key] for key in ("precision", "recall", "f1", "average_precision")] == pytest.approx(np.mean(naive, axis=0), abs=1e-6)
    rare, row = found["in"]["per_label"]["positive"], summary(found, {"in": "in"})
    assert rare["n"] < 0.2 * found["in"]["n"]
    assert (row["rarest_recall"], row["rarest_average_precision"]) == (rare["recall"], rare["average_precision"])
    assert row["macro_f1"] == found["in"]["macro_f1"]
    assert "rarest_recall" not in summary(evaluate(random_rows(3)), {"in": "in", "out": "out"})


def test_uncorrected_metrics_are_those_of_the_probabilities_before_each_run_s_temperature():
    cold, raw = {"c0": 0.4, "c1": 0.6}, random_rows(5, contexts=2)
    rows = []
    for row in raw:
        powers = np.array(row["probabilities"]) ** (1 / cold[row["run"]])
        rows.append(row | {"probabilities": (powers / powers.sum()).tolist()})
    table, labels = predictions(rows), {"labels": LABELS, "resamples": 20, "seed": 0}
    before, found = evaluate(raw), evaluate_predictions(table, **labels, before=before_temperature(table, cold))
    for name, own in found.items():
        assert own["uncorrected"] == pytest.approx({key: before[name][key] for key in ("log_loss", "ece")}, abs=2e-6)
        assert own["log_loss"] != pytest.approx(own["uncorrected"]["log_loss"], abs=1e-3)
        assert own["accuracy"] == before[name]["accuracy"]
    assert "uncorrected" not in evaluate(rows)["in"]
