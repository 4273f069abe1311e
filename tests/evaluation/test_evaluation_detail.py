"""Reliability, confusion and slices against plain loops over the same rows."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluation.metrics import detail, expected_calibration_error, membership
from pipeline.schema import PREDICTIONS, Example

LABELS = ("no", "yes")
SETS = {"near": "in", "far": "out", "farther": "out"}
RESAMPLES = 50


def example_rows(name, n=30, kinds=("k2", None, "k1"), slices=("kind",)):
    rng = np.random.default_rng(len(name))
    return [
        Example(
            {"premise": f"{name} {i} " + " ".join("w" * int(rng.integers(1, 9))), "hypothesis": "two  words"},
            LABELS[i % 2],
            slices=dict.fromkeys(slices, kinds[i % len(kinds)]),
        )
        for i in range(n)
    ]


def prediction_rows(contexts=1):
    rng = np.random.default_rng(contexts)
    rows = []
    for name in SETS:
        for context in range(contexts):
            for example in example_rows(name):
                p = float(rng.uniform(0.01, 0.99))
                rows.append(
                    {
                        "set": name,
                        "run": f"c{context}",
                        "example_id": example.example_id,
                        "label": example.label,
                        "predicted": LABELS[p < 0.5],
                        "probabilities": [p, 1 - p],
                    }
                )
    return rows


def found_of(rows, sets=SETS, sliced=tuple(SETS)):
    members = {name: membership(example_rows(name, slices=("kind",) if name in sliced else ())) for name in sets}
    return detail(pa.Table.from_pylist(rows, PREDICTIONS), LABELS, members, sets, resamples=RESAMPLES, seed=0)


def thirds(name):
    """Example id → third by words, from the definition: the values a third and two thirds up the sorted lengths are the edges."""
    words = {row.example_id: len(row.fields["premise"].split()) + 2 for row in example_rows(name)}
    ranked = sorted(words.values())
    low, high = ranked[int((len(ranked) - 1) / 3)], ranked[int((len(ranked) - 1) * 2 / 3)]
    return {key: "short" if count <= low else "middle" if count <= high else "long" for key, count in words.items()}, words


@pytest.mark.parametrize("contexts", [1, 3])
def test_every_slice_s_accuracy_is_that_of_its_rows(contexts):
    rows = prediction_rows(contexts)
    where = {name: {"label": {r.example_id: r.label for r in example_rows(name)}} for name in SETS}
    for name in SETS:
        where[name]["kind"] = {r.example_id: r.slices["kind"] for r in example_rows(name)}
        where[name]["length"], _ = thirds(name)
    slices = found_of(rows)["slices"]
    for entry in slices:
        names = [name for name, domain in SETS.items() if domain == entry["domain"] and entry["set"] in (None, name)]
        own = [
            row
            for row in rows
            if row["set"] in names
            and (entry["dimension"] == "domain" or where[row["set"]][entry["dimension"]][row["example_id"]] == entry["slice"])
        ]
        assert entry["n"] * contexts == len(own)
        assert entry["accuracy"] == pytest.approx(np.mean([row["label"] == row["predicted"] for row in own]), abs=1e-6)
        assert entry["ci95"][0] <= entry["accuracy"] <= entry["ci95"][1]
    keys = [(entry["dimension"], entry["slice"], entry["domain"], entry["set"]) for entry in slices]
    assert len(set(keys)) == len(keys)
    expected = {("label", label, "out", name) for label in LABELS for name in (None, "far", "farther")}
    expected |= {("kind", kind, "in", name) for kind in ("k1", "k2") for name in (None, "near")}
    assert expected | {("domain", "in", "in", None), ("domain", "out", "out", None)} <= set(keys)


def test_slices_stand_in_the_task_s_order_of_labels_and_from_short_to_long():
    slices = found_of(prediction_rows())["slices"]
    for dimension, order in {"label": list(LABELS), "length": ["short", "middle", "long"], "kind": ["k1", "k2"]}.items():
        assert [s["slice"] for s in slices if s["dimension"] == dimension and s["set"] == "far"] == order


def test_lengths_say_which_words_they_span():
    for entry in found_of(prediction_rows())["slices"]:
        if entry["dimension"] == "length" and entry["set"] is not None:
            third, words = thirds(entry["set"])
            own = [count for key, count in words.items() if third[key] == entry["slice"]]
            assert entry["words"] == [min(own), max(own)]


def test_a_set_without_the_column_has_no_such_slice():
    slices = found_of(prediction_rows(), sliced=("far",))["slices"]
    assert {entry["set"] for entry in slices if entry["dimension"] == "kind"} == {None, "far"}
    assert {entry["n"] for entry in slices if entry["dimension"] == "kind"} == {10}


def test_equal_lengths_stay_in_one_third():
    rows = [Example({"text": f"one {i}"}, LABELS[0]) for i in range(9)]
    assert membership(rows)["slice.length"].unique().to_list() == ["short"]


def test_a_slice_may_have_any_name_that_the_params_allow():
    """Names of the tables' own columns once gave a duplicate, or a dimension called "score_right"."""
    names = ("words", "score", "example_id", "score_right", "set", "rows")
    members = {"near": membership(example_rows("near", slices=names))}
    rows = [row for row in prediction_rows() if row["set"] == "near"]
    found = detail(pa.Table.from_pylist(rows, PREDICTIONS), LABELS, members, SETS, resamples=RESAMPLES, seed=0)["slices"]
    for name in names:
        own = {entry["slice"]: entry["n"] for entry in found if entry["dimension"] == name and entry["set"] is None}
        assert own == {"k1": 10, "k2": 10}
    assert {entry["dimension"] for entry in found} == {"domain", "label", "length", *names}


def test_bins_hold_all_rows_and_give_the_calibration_error():
    rows = [row for row in prediction_rows() if row["set"] == "near"]
    bins = found_of(rows, {"near": "in"})["sets"]["near"]["reliability"]
    confidence = np.array([max(map(np.float32, row["probabilities"])) for row in rows], dtype=np.float64)
    right = np.array([row["predicted"] == row["label"] for row in rows])
    assert sum(b["n"] for b in bins) == len(rows)
    for b in bins:
        inside = (confidence > b["low"]) & (confidence <= b["high"])
        assert (inside.sum(), right[inside].mean()) == (b["n"], pytest.approx(b["accuracy"], abs=1e-6))
    error = sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(rows)
    assert error == pytest.approx(expected_calibration_error(confidence, right), abs=1e-6)


def test_the_confusion_matrix_counts_every_pair():
    rows = prediction_rows(2)
    for name, found in found_of(rows)["sets"].items():
        for gold, row in found["confusion"].items():
            for predicted, count in row.items():
                assert count == sum((r["set"], r["label"], r["predicted"]) == (name, gold, predicted) for r in rows)
