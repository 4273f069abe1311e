"""What a few labelled examples say of teachers: how far to trust each, and which labels they name too often; and shares of labels.

The pool of V voters (teachers, or their average) is log-linear: p(label | text) ∝ exp(Σ_v scale_v · log p_v(label | text) + bias(label)).
The scale of a single voter is an inverse temperature (1706.04599). All is learnt on labelled examples that no voter has seen. First the
lean of each voter is subtracted: its mean log-probability of each label. Then scales and bias minimise the log loss, plus a penalty on the
distance from no bias and equal scales that add up to √V: few labels change little. √V lies between 1, which is right for voters that always
say the same, and V, which is right for voters whose mistakes are independent.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from pipeline.cache.labelled import folds_of

SCALE_PENALTY, BIAS_PENALTY = 2.0, 4.0
"""Times a squared distance, added to the log loss of all examples in nats: normal priors with standard deviations of 0.5 and 0.35."""
STEPS, SMALLEST_STEP, SMALLEST_CHANGE = 10_000, 1e-7, 1e-5
RESAMPLES = 50


@dataclass(frozen=True)
class Pool:
    """How V voters become one distribution over L labels."""

    scales: np.ndarray  # [V]
    bias: np.ndarray  # [L], mean 0, nats

    def log_probabilities(self, voters: np.ndarray) -> np.ndarray:
        """[V, N, L] → [N, L] nats."""
        return log_softmax(np.tensordot(self.scales, voters, axes=1) + self.bias, axis=-1)


@dataclass(frozen=True)
class Judged:
    """M labelled examples, and what voters that had not seen them say of each."""

    voters: np.ndarray  # [V, M, L] nats
    gold: np.ndarray  # [M], numbers of labels

    def rows(self, chosen: np.ndarray) -> "Judged":
        """Some of the examples."""
        return Judged(self.voters[:, chosen], self.gold[chosen])


def equal_pool(voters: int, labels: int) -> Pool:
    """Equal scales that add up to 1, and no bias."""
    return Pool(np.full(voters, 1 / voters), np.zeros(labels))


def learn_pool(judged: Judged) -> Pool:
    """The pool that labelled examples choose. Each label counts alike, however many examples it has."""
    count, labels, rows = len(judged.voters), judged.voters.shape[-1], np.arange(len(judged.gold))
    _, label, examples = np.unique(judged.gold, return_inverse=True, return_counts=True)
    weights = (1 / examples)[label] / len(examples)  # [M], with the sum 1
    lean = _lean(judged)
    voters = judged.voters - lean[:, None]
    start, penalty = np.repeat([count**-0.5, 0.0], [count, labels]), np.repeat([SCALE_PENALTY, BIAS_PENALTY], [count, labels])

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = Pool(at[:count], at[count:]).log_probabilities(voters)
        error = np.exp(log_p)  # [M, L]; less the gold label, the derivative of the log loss by the pool's scores
        error[rows, judged.gold] -= 1
        error *= len(rows) * weights[:, None]
        slope = np.concatenate([np.einsum("vml,ml->v", voters, error), error.sum(0)]) + 2 * penalty * (at - start)
        return float((penalty * (at - start) ** 2).sum() - len(rows) * weights @ log_p[rows, judged.gold]), slope

    bounds = [(0, None)] * count + [(None, None)] * labels
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": STEPS}).x
    scales, bias = found[:count], found[count:] - found[:count] @ lean
    return Pool(scales, bias - bias.mean())


def _lean(judged: Judged) -> np.ndarray:
    """Each voter's mean log-probability of each label, nats [V, L], in which texts of each label count alike.

    Texts of a label that no example has are assumed to be answered as well as others: else its lean would be that of other labels' texts.
    """
    voters, present = judged.voters, np.unique(judged.gold)
    count, _, labels = voters.shape
    means = np.stack([voters[:, judged.gold == label].mean(1) for label in present], axis=1)  # [V, labels of texts, L]
    own = means[:, np.arange(len(present)), present]
    others = (means.sum((1, 2)) - own.sum(1)) / (len(present) * (labels - 1))
    assumed = others.repeat(labels * labels).reshape(count, labels, labels)
    assumed[:, np.arange(labels), np.arange(labels)] = own.mean(1, keepdims=True)
    assumed[:, present] = means
    return assumed.mean(1)


def cross_validated(judged: Judged) -> np.ndarray:
    """Log-probabilities [M, L] that each labelled example gets from a pool that was learnt without its fold."""
    found = np.empty(judged.voters.shape[1:])
    for fold in folds_of(judged.gold.tolist()):
        others = np.setdiff1d(np.arange(len(judged.gold)), fold)
        found[fold] = learn_pool(judged.rows(others)).log_probabilities(judged.voters[:, fold])
    return found


def log_loss(log_p: np.ndarray, gold: np.ndarray) -> float:
    """Mean -log p [M, L] of the gold labels [M], nats."""
    return float(-log_p[np.arange(len(gold)), gold].mean())


def shift_to(shares: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """The bias [L] with mean 0 under which the mean probabilities of N texts are `shares` [L]; `log_p` [N, L] nats."""
    bias = np.zeros(len(shares))
    for _ in range(STEPS):
        step = np.log(shares) - np.log(softmax(log_p + bias, axis=-1).mean(0))
        bias += step
        if np.abs(step).max() < SMALLEST_STEP:
            break
    return bias - bias.mean()


def likely_shares(log_p: np.ndarray) -> np.ndarray:
    """The most likely shares [L] of labels among N texts and one more of each label, by expectation maximisation (Saerens et al. 2002).

    The further texts matter if there are many labels: of those with few texts, maximisation alone would give some away to the others.
    `log_p` [N, L] nats are right if labels have equal shares.
    """
    texts, labels = log_p.shape
    shares = np.full(labels, 1 / labels)
    for _ in range(STEPS):
        before, shares = shares, (softmax(log_p + np.log(shares), axis=-1).sum(0) + 1) / (texts + labels)
        if np.abs(shares - before).max() < SMALLEST_CHANGE:
            break
    return shares


@dataclass(frozen=True)
class EstimatedShares:
    """Of L labels among texts."""

    shares: np.ndarray  # [L]
    low: np.ndarray  # [L], with `high` a 95 % interval of the most likely shares
    high: np.ndarray  # [L]


def estimated_shares(voters: np.ndarray, judged: Judged) -> EstimatedShares:
    """The shares of labels among N texts, from `voters` [V, N, L] nats and from labelled examples that say how far to trust them.

    They lie on the way from the pool's mean probabilities, which lean to equal shares, to the most likely shares: half way at most, since
    with few labels the likely shares go too far (they found no negative film review where 5 % were), and less the more the likely shares
    change if labelled examples and texts are drawn again. If the variance is as large as the squared way, they stay where they are.
    """
    rng, found = np.random.default_rng(0), []
    by_label = [np.flatnonzero(judged.gold == label) for label in np.unique(judged.gold)]
    for _ in range(RESAMPLES):
        pool = learn_pool(judged.rows(np.concatenate([rng.choice(own, len(own)) for own in by_label])))
        texts = rng.integers(0, voters.shape[1], voters.shape[1])
        found.append(likely_shares(pool.log_probabilities(voters[:, texts])))
    log_p = learn_pool(judged).log_probabilities(voters)
    mean, likely = np.exp(log_p).mean(0), likely_shares(log_p)
    kept = 1 - np.log(found).var(0).sum() / max((np.log(likely / mean) ** 2).sum(), SMALLEST_CHANGE)
    low, high = np.quantile(found, [0.025, 0.975], axis=0)
    return EstimatedShares(mean + max(0.0, kept) / 2 * (likely - mean), low, high)
