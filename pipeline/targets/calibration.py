"""From scores under several contexts to one distribution: calibration, a weighted average, then a pool.

A context shifts every answer towards one label. Each calibration measures the shift without labels and takes it out:

- `contextual` (2102.09690): the mean log-probability of inputs without content is subtracted from log-probabilities.
- `batch` (2309.17249): the mean probability over unlabelled inputs is subtracted from probabilities. What is left is made a distribution:
  1/L is added, so that each label's mean is 1/L; values under `FLOOR` are raised to it; then all are normalised.
- `batch_log`: the same with log-probabilities.

Offsets are learnt once and saved in calibration.json, so targets, baselines and later inputs share them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.special import log_softmax, logsumexp

from pipeline.params import Calibration
from pipeline.targets.learning import Pool

FLOOR = 1e-3  # least value of a label under `batch` calibration, before normalising


def normalised(label_logprobs: np.ndarray) -> np.ndarray:
    """Label log-probabilities over the vocabulary [..., L] → over the labels alone, float64, nats."""
    return log_softmax(np.asarray(label_logprobs, dtype=np.float64), axis=-1)


def learn_offsets(kind: Calibration, transfer: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """One context's offsets [L], with mean 0, from normalised scores: in nats, under `batch` in probability.

    `transfer` [N, L] are the scores of unlabelled inputs, `content_free` [F, L] those of inputs without content.
    """
    if kind == "none":
        return np.zeros(transfer.shape[-1])
    mean = {"contextual": content_free, "batch": np.exp(transfer), "batch_log": transfer}[kind].mean(0)
    return mean - mean.mean()


@dataclass(frozen=True)
class Combination:
    """How the scores of C contexts become a distribution over L labels: averaged by voter, then pooled."""

    kinds: Sequence[Calibration]  # [C]
    offsets: np.ndarray  # [C, L], of `learn_offsets`
    weights: np.ndarray  # [C], positive; those of a voter count relative to each other
    average: Literal["probability", "log_probability"]
    voters: Sequence[int]  # [C]: number of each context's, from 0; all have one voter, or each teacher is one
    pool: Pool  # of one voter the scale is 1 / temperature

    def each(self, label_logprobs: np.ndarray) -> np.ndarray:
        """Calibrated label probabilities of every context: [C, N, L] → [C, N, L]."""
        return np.exp(self._calibrated(label_logprobs))

    def averaged(self, label_logprobs: np.ndarray) -> np.ndarray:
        """Each voter's log-probabilities: [C, N, L] → [V, N, L] nats. In log-probability the average is the normalised geometric mean."""
        log_p, found = self._calibrated(label_logprobs), []
        for voter in range(len(self.pool.scales)):
            own = np.array(self.voters) == voter
            weights = (self.weights[own] / self.weights[own].sum())[:, None, None]
            found.append(logsumexp(log_p[own], axis=0, b=weights) if self.average == "probability" else (weights * log_p[own]).sum(0))
        return log_softmax(np.stack(found), axis=-1)

    def ensemble(self, label_logprobs: np.ndarray) -> np.ndarray:
        """The pool's probabilities: [C, N, L] → [N, L]."""
        return np.exp(self.pool.log_probabilities(self.averaged(label_logprobs)))

    @property
    def shares(self) -> np.ndarray:
        """Each context's share of the pool's weight, [C]; they sum to 1."""
        of_voter, scales = np.bincount(self.voters, self.weights), self.pool.scales
        return (self.weights / of_voter[self.voters]) * (scales / scales.sum())[self.voters]

    def _calibrated(self, label_logprobs: np.ndarray) -> np.ndarray:
        log_p, offsets = normalised(label_logprobs), self.offsets[:, None]
        in_probability = np.array([kind == "batch" for kind in self.kinds])[:, None, None]
        shifted = np.where(in_probability, np.log(np.maximum(np.exp(log_p) - offsets, FLOOR)), log_p - offsets)
        return log_softmax(shifted, axis=-1)


def combination_of(calibration: Mapping[str, Any], source: str) -> Combination:
    """The combination that a calibration.json describes, for inputs of `source`: with the offsets of that source, if the file has them."""
    contexts = calibration["contexts"]
    return Combination(
        kinds=[context["calibration"] for context in contexts],
        offsets=np.array(calibration["by_source"].get(source, [context["offsets"] for context in contexts])),
        weights=np.array([context["weight"] for context in contexts]),
        average=calibration["average"],
        voters=[context["voter"] for context in contexts],
        pool=Pool(np.array(calibration["scales"]), np.array(calibration["bias"])),
    )
