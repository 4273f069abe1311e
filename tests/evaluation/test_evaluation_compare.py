"""Agreement, KL, paired differences and McNemar's test against their definitions."""

import math

import numpy as np
import pyarrow as pa
import pytest

from pipeline.errors import CorruptError
from pipeline.evaluation import compare as compare_module
from pipeline.evaluation.compare import compare_methods, comparisons, to_reference
from pipeline.evaluation.metrics import mean_accuracy, scores_by_set
from pipeline.files import Folders, read_json
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


def mcnemar_exact(one, other):
    """The chance that fair tosses divide the discordant pairs at least as unevenly."""
    chance = [math.comb(one + other, k) / 2 ** (one + other) for k in range(one + other + 1)]
    return sum(p for p in chance if p <= chance[one] * (1 + 1e-7))


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


def test_answers_are_compared_with_the_reference_s_by_example():
    table = table_of(rows_of(1))
    assert {found["agreement"] for found in to_reference(table, table, LABELS, **BOOTSTRAP).values()} == {1.0}
    one, other = (to_reference(table, table_of(rows), LABELS, **BOOTSTRAP) for rows in (rows_of(2), rows_of(2)[::-1]))
    assert one == other


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
