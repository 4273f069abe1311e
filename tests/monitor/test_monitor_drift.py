"""Drift tests: each statistic against its definition, the rate of false alarms, and that what did change is found."""

import itertools
import math
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from pipeline.models.held_back import HELD_BACK, HELD_BACK_FILE, Threshold
from pipeline.monitor.drift import DriftTest, bag_kernel, corrected, discrepancy, drift_tests, gaussian_kernel, label_shift
from pipeline.monitor.sample import Sample, draw, with_shares_of
from pipeline.monitor.verdict import answered_test
from pipeline.params import MonitorParams
from pipeline.schema import write_table
from pipeline.serving.files import Item

LABELS = ["negative", "positive"]
WIDTH = 6


def sample(rng, count, *, length=12.0, words=(0, 40), shift=0.0, positive=0.5, confidence=2.0):
    """Inputs and answers of a made-up student; a text's words, state and answer go together, as real ones do."""
    ids, states, labels, sure = [], [], [], []
    for _ in range(count):
        topic = rng.normal()
        size = 1 + rng.poisson(length * math.exp(0.2 * topic))
        ids.append(list(words[0] + rng.integers(0, words[1], size)))
        states.append(topic + shift + rng.normal(size=WIDTH))
        labels.append(LABELS[int(rng.random() < positive)])
        sure.append(0.5 + 0.5 * rng.beta(confidence, 2))
    return Sample([" ".join(map(str, row)) for row in ids], ids, labels, np.array(sure), np.array(states), [None] * count)


def test_mmd_is_its_definition_and_its_p_value_counts_shuffles():
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.normal(size=(4, 2)), rng.normal(size=(3, 2)) + 1.0])
    kernel = gaussian_kernel(rows)
    scaled = rows / rows.std(axis=0)
    pairs = [sum((a - b) ** 2) for a, b in itertools.combinations(scaled, 2)]
    width = np.median(pairs)
    assert kernel == pytest.approx(np.array([[math.exp(-sum((a - b) ** 2) / width) for b in scaled] for a in scaled]))

    def squared(first):
        one, other = list(first), [i for i in range(7) if i not in first]
        return (
            np.mean([kernel[i, j] for i in one for j in one])
            + np.mean([kernel[i, j] for i in other for j in other])
            - 2 * np.mean([kernel[i, j] for i in one for j in other])
        )

    every = [squared(first) for first in itertools.combinations(range(7), 4)]
    exact = np.mean([value >= squared(range(4)) - 1e-12 for value in every])
    assert discrepancy(kernel, 4, 4000, np.random.default_rng(1))[1] == pytest.approx(exact, abs=0.03)


def test_the_share_is_0_without_a_difference_and_1_with_nothing_else():
    two_points = np.array([[0.0]] * 10 + [[100.0]] * 10)
    assert discrepancy(gaussian_kernel(two_points), 10, 9, np.random.default_rng(0))[0] == pytest.approx(1, abs=0.4)
    apart = np.kron(np.eye(2), np.ones((10, 10)))
    assert discrepancy(apart, 10, 9, np.random.default_rng(0))[0] == pytest.approx(1)
    assert discrepancy(np.ones((20, 20)), 10, 9, np.random.default_rng(0))[0] == 0


def test_the_bag_kernel_is_the_cosine_of_sets_weighted_by_rarity():
    documents = [[1, 2, 2, 9], [2, 3, 9], [9, 9], [1, 3, 9]]
    kernel = bag_kernel(documents)
    held = {token: sum(token in document for document in documents) for token in (1, 2, 3, 9)}
    vectors = [[math.log(4 / held[token]) * (token in document) for token in held] for document in documents]
    for i, j in itertools.combinations(range(4), 2):
        norms = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
        assert kernel[i, j] == pytest.approx(np.dot(vectors[i], vectors[j]) / norms if norms else 0.0)
    assert np.diag(kernel) == pytest.approx(np.ones(4))


def test_a_kernel_of_identical_vectors_holds_no_nan():
    assert np.isfinite(gaussian_kernel(np.zeros((5, 3)))).all()
    assert np.isfinite(bag_kernel([[1], [1], [1]])).all()


@given(st.integers(0, 12), st.integers(0, 12))
def test_the_label_test_is_the_permutation_test_of_two_shares(one, other):
    first, second = ["a"] * one + ["b"] * (12 - one), ["a"] * other + ["b"] * (12 - other)
    moved, p_value = label_shift(first, second, ["a", "b"], 4000, np.random.default_rng(0))
    assert moved == pytest.approx(abs(one - other) / 12)
    expected = stats.fisher_exact([[one, 12 - one], [other, 12 - other]]).pvalue  # equal sizes: both order tables alike
    assert p_value == pytest.approx(expected, abs=0.035)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holms_correction_is_its_definition(p_values):
    found = corrected([DriftTest("t", "inputs", "e", 0.0, 1.0, p, "", "") for p in p_values], 0.05)
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = set()
    for rank, place in enumerate(order):  # step down: stop at the first that fails
        if p_values[place] * (len(p_values) - rank) > 0.05:
            break
        rejected.add(place)
    assert {i for i, test in enumerate(found) if test.alarm} == rejected


def test_an_alarm_needs_a_shift_that_matters():
    found = corrected([DriftTest("t", "inputs", "e", 0.05, 0.04, 1e-9, "", "")], 0.01)
    assert found[0].adjusted_p < 0.01
    assert not found[0].alarm


@pytest.mark.parametrize(("reference", "new"), [(150, 20), (60, 60)])
@pytest.mark.slow
def test_inputs_like_the_reference_raise_no_more_alarms_than_the_stated_rate(reference, new):
    """Significance alone is counted, without the smallest shifts, which only make alarms rarer."""
    params = MonitorParams(false_alarm_rate=0.1, permutations=199)
    trials, alarms = 80, 0
    for trial in range(trials):
        rng = np.random.default_rng([trial, reference])
        tests = drift_tests(sample(rng, reference), sample(rng, new), LABELS, params)
        alarms += any(test.adjusted_p <= params.false_alarm_rate for test in corrected(tests, params.false_alarm_rate))
    # a rate of at most 0.1 gives more than this once in a thousand runs; the seeds are fixed, so it never flickers
    assert alarms <= stats.binom.ppf(0.999, trials, params.false_alarm_rate)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("length", {"length": 20.0}),
        ("vocabulary", {"words": (25, 40)}),
        ("embedding", {"shift": 1.0}),
        ("labels", {"positive": 0.8}),
        ("confidence", {"confidence": 6.0}),
    ],
)
def test_each_test_finds_what_it_is_for_at_200_inputs(name, change):
    rng = np.random.default_rng(3)
    params = MonitorParams()
    tests = drift_tests(sample(rng, 400), sample(rng, 200, **change), LABELS, params)
    alarms = {test.name for test in corrected(tests, params.false_alarm_rate) if test.alarm}
    longer = {"vocabulary"} if name == "length" else set()  # longer texts hold more words
    assert {name} <= alarms <= {name} | longer


def test_the_same_samples_give_the_same_verdict():
    one, other = sample(np.random.default_rng(0), 50), sample(np.random.default_rng(1), 40)
    assert drift_tests(one, other, LABELS, MonitorParams()) == drift_tests(one, other, LABELS, MonitorParams())


def drawn(texts, count, seed):
    return [text for text, _ in draw(((text, Item(line, {})) for line, text in enumerate(texts)), count, seed)]


def test_a_draw_goes_by_content_and_not_by_place():
    texts = [f"text {n}" for n in range(100)]
    found = drawn(texts, 20, 0)
    assert drawn(texts[::-1], 20, 0) == found[::-1]  # in the order of the lines
    assert len(set(found)) == 20
    assert [text for text in texts if text in found] == found != drawn(texts, 20, 1)
    assert drawn(texts, 100, 0) == drawn(texts, 500, 0) == texts


def test_a_draw_of_a_growing_log_keeps_what_it_had_until_better_ones_come():
    """The rows drawn are the ones of smallest hash, so those of a longer file are a subset of the old draw and the new rows."""
    texts = [f"text {n}" for n in range(300)]
    before, after = set(drawn(texts[:200], 50, 0)), set(drawn(texts, 50, 0))
    assert after & set(texts[:200]) <= before


def test_a_draw_reads_a_long_file_in_the_memory_of_the_rows_it_keeps():
    def rows():
        for line in range(20_000):
            yield f"{line} {'x' * 5000}", Item(line, {})

    tracemalloc.start()
    assert len(draw(rows(), 50, 0)) == 50
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * 5000 * 4  # all rows are 100 MB


@pytest.mark.parametrize(("answered", "least"), [(3, 0), (5, 1), (2, 2), (5, 4)])
def test_the_chance_of_an_answered_share_counts_the_orders_of_held_back_and_new_texts(tmp_path, answered, least):
    """With the threshold at the `answered`-th surest held-back text, any order of held-back and new texts is as likely as any other."""
    held, new = np.linspace(0.95, 0.55, 6), 4
    columns = [list("abcdef"), [np.log([p, 1 - p]) for p in held], [[1.0, 0.0]] * 6, [0.0] * 6]
    write_table(pa.Table.from_pydict(dict(zip(HELD_BACK.names, columns, strict=True)), HELD_BACK), tmp_path / HELD_BACK_FILE)
    student = SimpleNamespace(folder=tmp_path, temperature=1.0, manifest={"files": {HELD_BACK_FILE: {}}})
    sure = np.where(np.arange(new) < least, 0.99, 0.5)
    threshold = Threshold(held[answered - 1] - 1e-6, math.nan)
    found = answered_test(student, threshold, replace(sample(np.random.default_rng(0), new), confidence=sure), 0.1)
    orders = list(itertools.combinations(range(6 + new), new))  # places of the new texts, the surest first
    before = [sum(place - at < answered for at, place in enumerate(order)) for order in orders]  # held-back texts that are surer
    assert found.p_value == pytest.approx(np.mean([count <= least for count in before]))
    assert found.effect == pytest.approx(max(0.0, answered / 6 - least / new))
    assert answered_test(SimpleNamespace(manifest={"files": {}}), threshold, sample(np.random.default_rng(0), 4), 0.1) is None


def test_confidence_is_held_against_texts_that_were_not_learnt_from():
    rng = np.random.default_rng(5)
    learnt, unseen, new = (sample(rng, 200, confidence=value) for value in (6.0, 2.0, 2.0))

    def confidence(*of):
        [test] = [test for test in drift_tests(learnt, new, LABELS, MonitorParams(permutations=699), *of) if test.name == "confidence"]
        return test

    assert confidence().p_value < 1e-6
    assert confidence(unseen).p_value == pytest.approx(stats.ks_2samp(unseen.confidence, new.confidence, method="asymp").pvalue)
    assert "200 texts not learnt from" in confidence(unseen).then


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault
@given(st.floats(0.1, 0.9), st.floats(0.2, 0.8), st.integers(0, 9))
def test_rows_are_taken_with_the_shares_of_the_reference_and_none_twice(share, other, seed):
    rng = np.random.default_rng(seed)
    reference, unseen = sample(rng, 60, positive=share), sample(rng, 55, positive=other)
    found = with_shares_of(reference, unseen)
    for label in LABELS:
        assert abs(found.labels.count(label) - len(found) * reference.labels.count(label) / 60) <= 1
    assert [text for text in unseen.texts if text in set(found.texts)] == found.texts
    rows = [unseen.texts.index(text) for text in found.texts]
    assert found.states.tolist() == unseen.states[rows].tolist()
    assert any(found.labels.count(label) == unseen.labels.count(label) for label in set(reference.labels))  # as many as there can be
