"""What labelled examples and shares make of a pool, against the definitions."""

import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from pipeline.cache.labelled import MOST_FOLDS, MOST_JUDGED, folds_of
from pipeline.targets.learning import (
    BIAS_PENALTY,
    SCALE_PENALTY,
    Judged,
    Pool,
    cross_validated,
    equal_pool,
    estimated_shares,
    learn_pool,
    likely_shares,
    log_loss,
    shift_to,
)

RNG = np.random.default_rng(5)


@pytest.fixture(autouse=True)
def _the_same_numbers_whatever_ran_before():
    RNG.bit_generator.state = np.random.default_rng(5).bit_generator.state


def voter(gold, labels, strength, lean=0.0):
    """A voter that knows labels so well: log-probabilities [M, L] that are right at scale 1 if `lean` is 0."""
    scores = RNG.normal(size=(len(gold), labels)) * np.sqrt(strength)
    scores[np.arange(len(gold)), gold] += strength
    scores[:, 0] += lean
    return log_softmax(scores, axis=-1)


def test_folds_have_as_many_of_each_label_and_every_example_once():
    folds = [sorted(fold) for fold in folds_of(["a", "b", "a", "b", "b", "a", "a", "b", "a", "b"])]
    assert folds == [[0, 1, 8, 9], [2, 3], [4, 5], [6, 7]]
    assert len(folds_of(["a", "b", "a", "b"])) == 2
    assert folds_of(["a", "b", "a"]) == [[0], [2]], "no one could know b without its only example"
    assert folds_of(["a", "b", "a", "a", "b", "a", "a"]) == [[0, 1, 6], [2, 4], [3], [5]]
    assert folds_of(["a", "b"]) == folds_of([]) == []
    many = folds_of([n % 50 for n in range(50 * 20)])
    assert len(many) == MOST_FOLDS
    assert sum(map(len, many)) == 50 * (MOST_JUDGED // 50)


def test_the_pool_is_the_weighted_geometric_mean():
    p = RNG.dirichlet([1, 1, 1], size=(2, 4))
    naive = p[0] ** 0.7 * p[1] ** 1.6 * np.exp([0.2, 0.0, -0.2])
    found = np.exp(Pool(np.array([0.7, 1.6]), np.array([0.2, 0.0, -0.2])).log_probabilities(np.log(p)))
    assert np.allclose(found, naive / naive.sum(-1, keepdims=True))


@pytest.mark.parametrize("labels", [2, 3, 5])
def test_a_voter_stays_trusted_if_no_example_has_one_of_its_labels(labels):
    gold, texts = RNG.integers(0, labels - 1, 40), RNG.integers(0, labels, 1000)
    alone = voter(texts, labels, 6.0)
    said = learn_pool(Judged(voter(gold, labels, 6.0)[None], gold)).log_probabilities(alone[None])
    assert log_loss(said, texts) < log_loss(alone, texts) + 0.1


def test_the_fit_is_the_minimum_of_its_loss_in_which_labels_count_alike():
    gold = np.repeat([0, 1, 2], [120, 60, 20])
    voters = np.stack([voter(gold, 3, 2.0, lean=1.0), voter(gold, 3, 0.2)])
    leans = np.mean([voters[:, gold == label].mean(1) for label in range(3)], axis=0)

    def loss(scales, bias):
        log_p = Pool(scales, bias).log_probabilities(voters - leans[:, None])
        of_labels = [log_loss(log_p[gold == label], gold[gold == label]) for label in range(3)]
        return len(gold) * np.mean(of_labels) + SCALE_PENALTY * ((scales - 0.5**0.5) ** 2).sum() + BIAS_PENALTY * (bias**2).sum()

    found = learn_pool(Judged(voters, gold))
    own_bias = found.bias + found.scales @ leans
    own_bias -= own_bias.mean()
    best = loss(found.scales, own_bias)
    for _ in range(50):
        bias = own_bias + RNG.normal(size=3) * 0.05
        assert loss((found.scales + RNG.normal(size=2) * 0.05).clip(0), bias - bias.mean()) > best
    assert found.bias.argmin() == 0


def test_few_labels_change_less_than_many():
    far = []
    for count, draws in ((8, 40), (800, 1)):
        gold = np.arange(count) % 2
        sharp = [3 * voter(gold, 2, 1.0) for _ in range(draws)]  # overconfident threefold
        far.append(np.mean([abs(learn_pool(Judged(own[None], gold)).scales[0] - 1) for own in sharp]))
    assert far[0] < far[1]
    assert far[1] == pytest.approx(2 / 3, abs=0.1)


def test_a_voter_that_knows_nothing_gets_little_and_the_cross_validated_loss_is_no_worse():
    gold = np.arange(48) % 3
    judged = Judged(np.stack([voter(gold, 3, 3.0), log_softmax(3 * RNG.normal(size=(48, 3)), axis=-1)]), gold)
    pool = learn_pool(judged)
    assert pool.scales[1] < 0.3 * pool.scales[0]
    assert log_loss(cross_validated(judged), gold) < log_loss(equal_pool(2, 3).log_probabilities(judged.voters), gold)


def test_an_example_s_cross_validated_answer_does_not_depend_on_the_labels_of_its_fold():
    gold = np.arange(16) % 2
    other, fold = gold.copy(), folds_of(gold.tolist())[0][:2]
    other[fold] = other[fold[::-1]]  # one of each label
    judged = [Judged(voter(gold, 2, 1.0)[None], gold)]
    judged.append(Judged(judged[0].voters, other))
    first, second = map(cross_validated, judged)
    assert np.array_equal(first[fold], second[fold])
    assert not np.array_equal(first, second)


def test_a_shift_gives_the_texts_the_stated_shares():
    log_p = np.log(RNG.dirichlet([1, 2, 3], size=200))
    shares = np.array([0.7, 0.25, 0.05])
    bias = shift_to(shares, log_p)
    assert np.allclose(softmax(log_p + bias, axis=-1).mean(0), shares, atol=1e-5)
    assert bias.mean() == pytest.approx(0)
    assert np.allclose(shift_to(softmax(log_p, axis=-1).mean(0), log_p), 0, atol=1e-5)


def test_likely_shares_are_found_where_probabilities_are_right():
    truth = np.array([0.1, 0.9])
    texts = voter(RNG.choice(2, 2000, p=truth), 2, 4.0)
    shares = likely_shares(texts)
    assert np.allclose(shares, truth, atol=0.03)
    grid = np.linspace(0.001, 0.999, 999)
    likelihood = [np.log(np.exp(texts) @ [share, 1 - share]).sum() + np.log(share * (1 - share)) for share in grid]
    assert shares[0] == pytest.approx(grid[int(np.argmax(likelihood))], abs=2e-3)


def test_many_labels_with_few_texts_each_keep_theirs():
    texts = voter(np.arange(70).repeat(5), 70, 3.0)
    assert likely_shares(texts).min() > 1 / 70 / 4


@pytest.mark.parametrize(("strength", "trusted"), [(8.0, True), (0.3, False)])
@pytest.mark.slow
def test_shares_are_estimated_as_far_as_the_labels_bear_it(strength, trusted):
    gold, seen = RNG.choice(2, 1000, p=[0.1, 0.9]), np.arange(16) % 2
    texts, judged = voter(gold, 2, strength)[None], Judged(voter(seen, 2, strength)[None], seen)
    found = estimated_shares(texts, judged)
    log_p = learn_pool(judged).log_probabilities(texts)
    mean, likely = np.exp(log_p).mean(0)[0], likely_shares(log_p)[0]
    assert min(mean, likely) - 1e-9 <= found.shares[0] <= max(mean, likely) + 1e-9
    assert found.shares.sum() == pytest.approx(1)
    assert (found.low < found.high).all()
    if trusted:
        assert found.shares[0] == pytest.approx((mean + likely) / 2, abs=0.02)
    else:
        assert found.shares[0] == pytest.approx(mean, abs=0.05), "a voter that knows nothing says nothing about shares"
