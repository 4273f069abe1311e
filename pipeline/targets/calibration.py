"""From scores under several contexts to one distribution: calibration, then a weighted average.

A context shifts every answer towards one label. Contextual calibration (2102.09690) measures the shift on inputs without content, batch
calibration (2309.17249) as the mean score over unlabelled inputs; both are a constant for each label, subtracted from the scores. The
constants are learnt once, on the transfer set, and saved, so that targets, baselines and single queries later all use the same ones.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax

from pipeline.params import Calibration

Average = Literal["probability", "log_probability"]


def normalised(label_logprobs: np.ndarray) -> np.ndarray:
    """Label log-probabilities over the vocabulary [..., L] → over the labels alone, float64, nats."""
    return log_softmax(np.asarray(label_logprobs, dtype=np.float64), axis=-1)


def learn_offsets(kind: Calibration, transfer: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """One context's offsets [L] in nats, with mean 0, from its normalised scores.

    `transfer` [N, L] are the scores of unlabelled inputs, `content_free` [F, L] those of inputs without content.
    """
    if kind == "none":
        return np.zeros(transfer.shape[-1])
    mean = (transfer if kind == "batch" else content_free).mean(0)
    return mean - mean.mean()


@dataclass(frozen=True)
class Combination:
    """How the contexts' scores become a distribution. C contexts, L labels."""

    offsets: np.ndarray  # [C, L] nats
    weights: np.ndarray  # [C], they sum to 1
    average: Average
    temperature: float

    def each(self, label_logprobs: np.ndarray) -> np.ndarray:
        """Calibrated label probabilities of every context: [C, N, L] → [C, N, L]."""
        return softmax((normalised(label_logprobs) - self.offsets[:, None]) / self.temperature, axis=-1)

    def ensemble(self, label_logprobs: np.ndarray) -> np.ndarray:
        """The averaged distribution: [C, N, L] → [N, L]. In log-probability it is the normalised geometric mean."""
        log_p = log_softmax((normalised(label_logprobs) - self.offsets[:, None]) / self.temperature, axis=-1)
        weights = self.weights[:, None, None]
        if self.average == "probability":
            return np.exp(logsumexp(log_p, axis=0, b=weights))
        return softmax((weights * log_p).sum(0), axis=-1)
