"""From scores under several contexts to one distribution: calibration, then a weighted average.

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
from scipy.special import log_softmax, logsumexp, softmax

from pipeline.params import Calibration

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
    """How the scores of C contexts become a distribution over L labels."""

    kinds: Sequence[Calibration]  # [C]
    offsets: np.ndarray  # [C, L], of `learn_offsets`
    weights: np.ndarray  # [C], they sum to 1
    average: Literal["probability", "log_probability"]
    temperature: float

    def each(self, label_logprobs: np.ndarray) -> np.ndarray:
        """Calibrated label probabilities of every context: [C, N, L] → [C, N, L]."""
        return np.exp(self._calibrated(label_logprobs))

    def ensemble(self, label_logprobs: np.ndarray) -> np.ndarray:
        """The averaged distribution: [C, N, L] → [N, L]. In log-probability it is the normalised geometric mean."""
        log_p = self._calibrated(label_logprobs)
        weights = self.weights[:, None, None]
        if self.average == "probability":
            return np.exp(logsumexp(log_p, axis=0, b=weights))
        return softmax((weights * log_p).sum(0), axis=-1)

    def _calibrated(self, label_logprobs: np.ndarray) -> np.ndarray:
        log_p, offsets = normalised(label_logprobs), self.offsets[:, None]
        in_probability = np.array([kind == "batch" for kind in self.kinds])[:, None, None]
        shifted = np.where(in_probability, np.log(np.maximum(np.exp(log_p) - offsets, FLOOR)), log_p - offsets)
        return log_softmax(shifted / self.temperature, axis=-1)


def combination_of(calibration: Mapping[str, Any], source: str) -> Combination:
    """The combination that a calibration.json describes, for inputs of `source`: with the offsets of that source, if the file has them."""
    contexts = calibration["contexts"]
    return Combination(
        kinds=[context["calibration"] for context in contexts],
        offsets=np.array(calibration["by_source"].get(source, [context["offsets"] for context in contexts])),
        weights=np.array([context["weight"] for context in contexts]),
        average=calibration["average"],
        temperature=calibration["temperature"],
    )
