"""Calibration and averaging, against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.targets.calibration import Combination, learn_offsets, normalised

SCORES = arrays(np.float64, (3, 6, 2), elements=st.floats(-20, -0.01))


def combination(offsets=None, weights=(0.5, 0.25, 0.25), average="probability", temperature=1.0):
    return Combination(np.zeros((3, 2)) if offsets is None else offsets, np.array(weights), average, temperature)


@given(SCORES)
def test_probabilities_sum_to_one(scores):
    for average in ("probability", "log_probability"):
        assert np.allclose(combination(average=average).ensemble(scores).sum(-1), 1)


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


@given(SCORES)
def test_batch_calibration_takes_out_a_context_s_lean(scores):
    """A constant added to one label in one context is gone after calibration."""
    lean = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, -2.0]])[:, None]
    plain = np.stack([learn_offsets("batch", normalised(c), normalised(c)) for c in scores])
    leaning = np.stack([learn_offsets("batch", normalised(c), normalised(c)) for c in scores + lean])
    assert np.allclose(combination(plain).ensemble(scores), combination(leaning).ensemble(scores + lean))


def test_calibrated_scores_have_no_mean_lean():
    scores = normalised(np.random.default_rng(0).normal(size=(50, 3)) - np.array([0.0, 2.0, 1.0]))
    calibrated = scores - learn_offsets("batch", scores, scores[:1])
    assert np.allclose(calibrated.mean(0) - calibrated.mean(), 0)


def test_contextual_calibration_makes_a_content_free_input_undecided():
    free = normalised(np.array([[-1.0, -4.0]]))
    offsets = learn_offsets("contextual", free, free)
    assert np.allclose(np.exp(normalised(free - offsets)), 0.5)


def test_no_calibration_has_no_offset():
    assert not learn_offsets("none", np.ones((4, 3)), np.ones((1, 3))).any()


@pytest.mark.parametrize(("temperature", "sharper"), [(0.5, True), (2.0, False)])
def test_temperature_sharpens_below_one(temperature, sharper):
    scores = np.log(np.array([[[0.8, 0.2]]] * 3))
    confidence = combination(temperature=temperature).ensemble(scores).max()
    assert bool(confidence > 0.8) is sharper
