"""Calibration and averaging, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.targets.calibration import FLOOR, Combination, combination_of, learn_offsets, normalised
from pipeline.targets.learning import Pool, equal_pool

SCORES = arrays(np.float64, (3, 6, 2), elements=st.floats(-20, -0.01))


def combination(offsets=None, weights=(0.5, 0.25, 0.25), average="probability", temperature=1.0, kind="batch_log"):
    pool = Pool(np.array([1 / temperature]), np.zeros(2 if offsets is None else offsets.shape[-1]))
    return Combination([kind] * 3, np.zeros((3, 2)) if offsets is None else offsets, np.array(weights), average, [0, 0, 0], pool)


@given(SCORES)
@pytest.mark.slow
def test_probabilities_sum_to_one(scores):
    for average in ("probability", "log_probability"):
        for kind in ("none", "batch", "batch_log"):
            offsets = np.stack([learn_offsets(kind, normalised(c), normalised(c)) for c in scores])
            one = combination(offsets, average=average, kind=kind)
            assert np.allclose(one.ensemble(scores).sum(-1), 1)
            assert np.allclose(one.each(scores).sum(-1), 1)


@given(SCORES)
def test_the_mean_of_probabilities_is_the_naive_one(scores):
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    naive = 0.5 * p[0] + 0.25 * p[1] + 0.25 * p[2]
    assert np.allclose(combination().ensemble(scores), naive)


@given(SCORES)
def test_the_mean_of_log_probabilities_is_the_normalised_geometric_mean(scores):
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    naive = p[0] ** 0.5 * p[1] ** 0.25 * p[2] ** 0.25
    assert np.allclose(combination(average="log_probability").ensemble(scores), naive / naive.sum(-1, keepdims=True))


@given(SCORES, st.floats(-5, 5))
def test_a_shift_common_to_all_labels_changes_nothing(scores, shift):
    assert np.allclose(combination().ensemble(scores), combination().ensemble(scores + shift))


# --- batch calibration as in 2309.17249: arg max over labels of p(y | x) - mean of p(y | ·)


def paper(scores):
    """One context [N, L]: the paper's calibrated scores, as a distribution."""
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    calibrated = p - p.mean(0)
    raised = np.maximum(calibrated + 1 / p.shape[-1], FLOOR)
    return calibrated, raised / raised.sum(-1, keepdims=True)


@given(arrays(np.float64, (3, 7, 4), elements=st.floats(-9, -0.01)))
def test_batch_subtracts_the_mean_probability(scores):
    offsets = np.stack([learn_offsets("batch", normalised(c), normalised(c)) for c in scores])
    found = combination(offsets, kind="batch").each(scores)
    for own, context in zip(found, scores, strict=True):
        calibrated, distribution = paper(context)
        assert np.allclose(own, distribution)
        ordered = np.sort(calibrated, -1)
        clear = ordered[:, -1] - ordered[:, -2] > 1e-6
        assert (own.argmax(-1) == calibrated.argmax(-1))[clear].all(), "raising to the floor changes no answer"


def test_batch_makes_each_label_s_mean_equal_unless_a_value_is_raised():
    p = np.array([[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.55, 0.25, 0.2]])
    offsets = learn_offsets("batch", np.log(p), np.log(p))
    assert np.allclose(offsets, p.mean(0) - 1 / 3)
    each = combination(np.stack([offsets] * 3), kind="batch").each(np.log(np.stack([p] * 3)))
    assert np.allclose(each[0].mean(0), 1 / 3)
    assert np.allclose(each[0], p - p.mean(0) + 1 / 3)


def test_the_two_forms_of_batch_calibration_differ():
    """p is (0.9, 0.1), (0.5, 0.5): a boundary at a mean probability of 0.7, or at a mean log-odds of 1.1, which is 0.75."""
    scores = np.log(np.array([[0.9, 0.1], [0.5, 0.5]]))
    asked = np.log(np.array([[[0.72, 0.28]]] * 3))
    for kind, expected in (("batch", 0), ("batch_log", 1)):
        offsets = np.stack([learn_offsets(kind, scores, scores)] * 3)
        assert combination(offsets, kind=kind).ensemble(asked).argmax() == expected


# --- in log space


@given(SCORES)
def test_batch_log_takes_out_a_context_s_lean(scores):
    """A constant added to one label's logarithm in one context is gone after calibration."""
    lean = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, -2.0]])[:, None]
    plain = np.stack([learn_offsets("batch_log", normalised(c), normalised(c)) for c in scores])
    leaning = np.stack([learn_offsets("batch_log", normalised(c), normalised(c)) for c in scores + lean])
    assert np.allclose(combination(plain).ensemble(scores), combination(leaning).ensemble(scores + lean))


def test_batch_log_subtracts_the_mean_log_probability():
    scores = normalised(np.random.default_rng(0).normal(size=(50, 3)) - np.array([0.0, 2.0, 1.0]))
    offsets = learn_offsets("batch_log", scores, scores[:1])
    naive = np.exp(scores - scores.mean(0))
    found = Combination(["batch_log"], offsets[None], np.ones(1), "probability", [0], equal_pool(1, 3)).each(scores[None])[0]
    assert np.allclose(found, naive / naive.sum(-1, keepdims=True))
    assert offsets.mean() == pytest.approx(0)


def test_contextual_calibration_makes_a_content_free_input_undecided():
    free = normalised(np.array([[-1.0, -4.0]]))
    offsets = learn_offsets("contextual", free, free)
    assert np.allclose(np.exp(normalised(free - offsets)), 0.5)


def test_no_calibration_has_no_offset():
    assert not learn_offsets("none", np.ones((4, 3)), np.ones((1, 3))).any()


def test_contexts_of_several_calibrations_are_each_calibrated_their_own_way():
    scores = np.log(np.random.default_rng(1).dirichlet([1, 1], size=(3, 5)))
    kinds = ["none", "batch", "batch_log"]
    offsets = np.stack([learn_offsets(kind, c, c) for kind, c in zip(kinds, scores, strict=True)])
    each = Combination(kinds, offsets, np.ones(3) / 3, "probability", [0, 0, 0], equal_pool(1, 2)).each(scores)
    for number, kind in enumerate(kinds):
        alone = Combination([kind], offsets[[number]], np.ones(1), "probability", [0], equal_pool(1, 2)).each(scores[[number]])
        assert np.array_equal(each[number], alone[0])


@pytest.mark.parametrize(("temperature", "sharper"), [(0.5, True), (2.0, False)])
def test_temperature_sharpens_below_one(temperature, sharper):
    scores = np.log(np.array([[[0.8, 0.2]]] * 3))
    confidence = combination(temperature=temperature).ensemble(scores).max()
    assert bool(confidence > 0.8) is sharper


def test_a_combination_is_read_from_calibration_json_for_a_source():
    described = {
        "contexts": [
            {"offsets": [0.25, -0.25], "weight": 0.75, "voter": 0, "calibration": "batch_log"},
            {"offsets": [0.1, -0.1], "weight": 0.25, "voter": 1, "calibration": "batch"},
        ],
        "by_source": {"tweets": [[0.5, -0.5], [0.2, -0.2]]},
        "average": "log_probability",
        "scales": [0.5, 1.5],
        "bias": [0.1, -0.1],
    }
    known, other = combination_of(described, "tweets"), combination_of(described, "amazon")
    assert known.offsets.tolist() == [[0.5, -0.5], [0.2, -0.2]]
    assert other.offsets.tolist() == [[0.25, -0.25], [0.1, -0.1]]
    assert (known.kinds, known.weights.tolist(), known.average) == (["batch_log", "batch"], [0.75, 0.25], "log_probability")
    assert (known.voters, known.pool.scales.tolist(), known.pool.bias.tolist()) == ([0, 1], [0.5, 1.5], [0.1, -0.1])
    assert known.shares.tolist() == [0.25, 0.75]


@given(SCORES)
@pytest.mark.slow
def test_voters_are_averaged_each_by_itself_and_pooled_by_their_scales(scores):
    p = np.exp(normalised(scores))
    first, second = (0.5 * p[0] + 0.25 * p[1]) / 0.75, p[2]
    pool = Pool(np.array([1.5, 0.5]), np.array([0.3, -0.3]))
    naive = first**1.5 * second**0.5 * np.exp([0.3, -0.3])
    found = Combination(["none"] * 3, np.zeros((3, 2)), np.array([0.5, 0.25, 0.25]), "probability", [0, 0, 1], pool)
    assert np.allclose(found.ensemble(scores), naive / naive.sum(-1, keepdims=True))
    assert np.allclose(found.shares, [0.5, 0.25, 0.25])
