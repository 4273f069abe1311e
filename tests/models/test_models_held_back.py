"""What may be promised from held-back texts: by enumeration, by scipy's own intervals, and kept in 200 random draws."""

import re
from itertools import product

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binomtest

from pipeline.errors import UsageError
from pipeline.models.held_back import Novelty, Threshold, allowed_misses, fit_temperature, threshold


@pytest.mark.parametrize(("sizes", "promise"), [((2, 5, 9, 12), 0.6), (tuple(range(1, 13)), 0.5), ((4, 8, 12), 0.75), ((12,), 0.7)])
def test_misses_at_the_refused_rate_pass_any_test_with_a_chance_of_at_most_5_percent(sizes, promise):
    allowed = allowed_misses(sizes, promise)
    chance = 0.0
    for missed in product((0, 1), repeat=12):
        if any(sum(missed[:size]) <= most for size, most in zip(sizes, allowed, strict=True)):
            chance += promise ** (12 - sum(missed)) * (1 - promise) ** sum(missed)
    assert 0 < chance <= 0.05


@pytest.mark.parametrize("promise", [0.8, 0.95])
@pytest.mark.parametrize("sizes", [(200,), (20, 60, 150, 400)])
def test_each_part_has_the_clopper_pearson_bound_at_one_level(sizes, promise):
    def p_value(size, misses):  # at a level of at least this, the Clopper-Pearson bound is at least the promise
        return binomtest(size - misses, size, promise, alternative="greater").pvalue if misses >= 0 else 0.0

    allowed = allowed_misses(sizes, promise).tolist()
    least = max(p_value(size, misses) for size, misses in zip(sizes, allowed, strict=True))
    beyond = min(p_value(size, misses + 1) for size, misses in zip(sizes, allowed, strict=True))
    assert least <= 0.05 < beyond * len(sizes)
    assert least < beyond


def test_98_percent_takes_149_texts_without_a_miss():
    assert allowed_misses((148,), 0.98).tolist() == [-1]
    assert allowed_misses((149,), 0.98).tolist() == [0]


@pytest.mark.parametrize("slope", [4.0, 8.0, 20.0])
def test_the_promise_is_kept_in_200_draws(slope):
    rng = np.random.default_rng(7)
    everybody = rng.random(50_000)
    agrees = expit(slope * everybody + 1.0)
    broken, answered = 0, []
    for _ in range(200):
        confidence = rng.choice(everybody, 300)
        right = rng.random(300) < expit(slope * confidence + 1.0)
        try:
            found = threshold(confidence, right, 0.9)
        except UsageError:
            continue
        assert found.share == (confidence >= found.confidence).mean()
        broken += agrees[everybody >= found.confidence].mean() < 0.9
        answered.append(found.share)
    assert broken <= 10
    assert len(answered) > 150
    possible = [share for share in np.linspace(1, 0, 101)[:-1] if np.sort(agrees)[int((1 - share) * len(agrees)) :].mean() >= 0.9]
    assert np.mean(answered) > 0.6 * possible[0]


def test_texts_that_tie_are_answered_together_or_not_at_all():
    confidence = np.repeat([0.9, 0.6], [100, 100])
    right = np.ones(200, dtype=bool)
    right[150:] = False
    found = threshold(confidence, right, 0.95)
    assert (found.confidence, found.share) == (0.9, 0.5)


def test_strange_texts_are_neither_counted_nor_answered():
    novelty = Novelty(np.array([[0.0, 0.0], [2.0, 2.0]]), most=1.0)
    states = np.array([[0.0, 1.0]] * 150 + [[9.0, 9.0]] * 50)
    assert np.allclose(novelty.distances(states[:1]), np.sqrt(1 / 2))  # standard deviations 1 and 1, over two dimensions
    right = np.arange(200) < 150
    found = threshold(np.full(200, 0.9), right, 0.98, novelty, novelty.distances(states))
    assert found.share == 0.75
    assert found.answers(np.array([0.9, 0.9, 0.8]), states[[0, 199, 0]]).tolist() == [True, False, False]
    assert Threshold(0.9, 1.0).answers(np.array([0.9, 0.8]), np.zeros((2, 0))).tolist() == [True, False]


def test_what_cannot_be_promised_is_refused_with_what_can_and_what_it_takes():
    confidence = np.linspace(1, 0.5, 100)
    message = r"98\.0% cannot be promised from 100 texts, 97\.0% can; it takes about (\d+) texts .* never fewer than 149"
    with pytest.raises(UsageError, match=message) as refused:
        threshold(confidence, np.ones(100, dtype=bool), 0.98)
    count = int(re.search(message, str(refused.value))[1])
    assert threshold(np.linspace(1, 0.5, count), np.ones(count, dtype=bool), 0.98).share == 1.0
    with pytest.raises(UsageError, match="more texts would not help, of the surest 5 it misses 5"):
        threshold(confidence, np.zeros(100, dtype=bool), 0.9)


def test_the_temperature_is_that_of_the_least_cross_entropy():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(500, 4))
    targets = np.exp(scores / 0.4) / np.exp(scores / 0.4).sum(-1, keepdims=True)
    assert fit_temperature(scores, targets) == pytest.approx(0.4, rel=1e-3)
