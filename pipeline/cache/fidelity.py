"""How little a cache loses of its teacher: cached positions against the teacher's whole distributions at the same positions.

What is lost in training is lost through a student, so it is measured through one: a student q sees KL(p ‖ q) of the teacher p, or of what
the cache has of p. Without a student, q is uniform.

- *retained mass*: the teacher's probability of the kept and drawn entries.
- *truncation*: KL(p ‖ q) less what the kept entries, unrounded, show of it. With the tail as a bucket that is P(tail) · KL(p ‖ q within the
  tail), by the chain rule; never less than 0. With a tail that was cut off it may have either sign. With draws it is 0 on average, and a
  position's miss is noise, so its root mean square over positions is given beside it.
- *quantisation*: KL of the kept entries, with the tail's mass, to themselves rounded; about resolution²/24.
- *KL to the live teacher*: the same to what the cache has: rounding, and whatever changed since (a machine, an engine, a batch).
- *gradient cosine*: of the cached loss's gradient in the student's logits with that of the whole distribution, all positions as one vector;
  also the mean over positions, and the 1 % that are worst.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.distributions import Distributions
from pipeline.cache.folder import ScoreCache

POSITIONS_AT_ONCE = 64


class Fidelity:
    """Figures over positions that are added piece by piece, so that memory never has all of the teacher's distributions."""

    def __init__(self, resolution_nats: float | None = None) -> None:
        """`resolution_nats` is what the cache was rounded to."""
        self._resolution = resolution_nats
        self._parts: list[dict[str, Tensor]] = []

    def add(self, full_log_probabilities: Tensor, cached: Distributions, student_logits: Tensor | None = None) -> None:
        """P positions: the teacher's `full_log_probabilities` [P, V], scored now, and what is `cached` of them, both at one temperature.

        `student_logits` [P, V] are divided by that temperature already.
        """
        for start in range(0, len(full_log_probabilities), POSITIONS_AT_ONCE):
            chunk = slice(start, start + POSITIONS_AT_ONCE)
            log_p = full_log_probabilities[chunk].double()
            logits = torch.zeros_like(log_p) if student_logits is None else student_logits[chunk].double()
            self._parts.append(_measure(log_p, cached.take(chunk), logits.log_softmax(-1), self._resolution))

    def figures(self) -> dict[str, float]:
        """Of all positions that were added. Masses and cosines are from 0 to 1, all else is in nats a position."""
        by_position = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        retained, lost, cosine = by_position["retained"], by_position["lost"], by_position["cosine"]
        products = [by_position[name].sum() for name in ("product", "cached_square", "full_square")]
        return {
            "positions": float(len(retained)),
            "retained_mass": float(retained.mean()),
            "retained_mass_worst_percent": float(retained.quantile(0.01)),
            "retained_mass_least": float(retained.min()),
            "truncation_nats": float(lost.mean()),
            "truncation_rms_nats": float(lost.square().mean().sqrt()),
            "quantisation_nats": float(by_position["quantisation"].mean()),
            "kl_to_live_nats": float(by_position["to_live"].mean()),
            "student_kl_nats": float(by_position["student_kl"].mean()),
            "gradient_cosine": float(products[0] / (products[1] * products[2]).sqrt().clamp_min(1e-300)),
            "gradient_cosine_mean": float(cosine.mean()),
            "gradient_cosine_worst_percent": float(cosine.quantile(0.01)),
        }


def kept_mass(cache: ScoreCache) -> dict[str, float | int]:
    """Mass within the top k (mean, 1st percentile, smallest), mass on the verbalisers, bytes a row: from the cache alone."""
    tails: Any = cache.rows["tail_mass"].combine_chunks()
    retained = 1.0 - tails.flatten().to_numpy().astype(np.float64)
    labels = np.exp(np.array(cache.rows["label_logprobs"].to_pylist(), dtype=np.float64)).sum(-1)
    return {
        "rows": len(cache.rows),
        "top_k": cache.manifest["cache"]["top_k"],
        "bytes_per_row": round(sum(file["bytes"] for file in cache.manifest["files"].values()) / max(len(cache.rows), 1), 1),
        "retained_mass_mean": round(float(retained.mean()), 6),
        "retained_mass_p01": round(float(np.quantile(retained, 0.01)), 6),
        "retained_mass_min": round(float(retained.min()), 6),
        "verbaliser_mass_mean": round(float(labels.mean()), 6),
    }


def _measure(log_p: Tensor, cached: Distributions, log_q: Tensor, resolution: float | None) -> dict[str, Tensor]:
    """Figures of each position; a gradient is of KL in the student's logits."""
    exact = _unrounded(log_p, cached)
    rounded = exact if resolution is None else _rounded(exact, resolution)
    true_gradient = log_q.exp() - log_p.exp()
    gradient = _gradient(cached, log_q)
    student_kl = _kl(log_p, log_p, log_q)
    squares = [(one * other).sum(-1) for one, other in ((gradient, true_gradient), (gradient, gradient), (true_gradient, true_gradient))]
    return {
        "retained": exact.retained,
        "lost": student_kl - _cached_kl(exact, log_q),
        "quantisation": _kept_kl(exact, rounded),
        "to_live": _kept_kl(exact, cached),
        "student_kl": student_kl,
        "product": squares[0],
        "cached_square": squares[1],
        "full_square": squares[2],
        "cosine": squares[0] / (squares[1] * squares[2]).sqrt().clamp_min(1e-300),
    }


def _kl(weights_log: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """Σ p (log p - log q) where p > 0."""
    return torch.where(weights_log > -math.inf, weights_log.exp() * (log_p - log_q), 0.0).sum(-1)


def _unrounded(log_p: Tensor, cached: Distributions) -> Distributions:
    """The same entries with the teacher's own numbers; drawn entries keep their weights."""
    real, drawn = cached.log_probabilities > -math.inf, cached.sampled_weights > 0
    kept = log_p.gather(-1, cached.ids).masked_fill(~real, -math.inf)
    tail = log_p.scatter_add(-1, cached.ids, torch.where(real, -math.inf, 0.0).to(log_p.dtype)).exp().sum(-1)
    own = log_p.gather(-1, cached.sampled_ids).masked_fill(~drawn, -math.inf)
    weights = cached.sampled_weights.double()
    retained = kept.exp().sum(-1) + own.exp().sum(-1)
    cut = cached.tail == "cut"
    return replace(
        cached,
        log_probabilities=kept - kept.logsumexp(-1, keepdim=True) if cut else kept,
        sampled_log_probabilities=own,
        sampled_weights=weights,
        rest=tail if cached.tail == "bucket" else torch.zeros_like(tail),
        retained=retained,
    )


def _rounded(exact: Distributions, resolution: float) -> Distributions:
    """As `encode` and `decode` give them."""
    kept = (exact.log_probabilities / resolution).round() * resolution
    scale = exact.log_probabilities.logsumexp(-1, keepdim=True) - kept.logsumexp(-1, keepdim=True) if kept.shape[1] else 0.0
    drawn = (exact.sampled_log_probabilities / resolution).round() * resolution
    return replace(exact, log_probabilities=kept + scale, sampled_log_probabilities=drawn)


def _kept_kl(exact: Distributions, other: Distributions) -> Tensor:
    """KL over kept entries and bucket, and over drawn ones Σ w (e^δ - 1 - δ), δ the error of a log-probability: no term is negative."""
    total = _generalised(exact.log_probabilities, exact.log_probabilities.exp(), other.log_probabilities)
    total = total + _generalised(exact.sampled_log_probabilities, exact.sampled_weights, other.sampled_log_probabilities)
    return total + _generalised(exact.rest.log().unsqueeze(-1), exact.rest.unsqueeze(-1), other.rest.log().unsqueeze(-1))


def _generalised(log_p: Tensor, weights: Tensor, other: Tensor) -> Tensor:
    off = torch.where((weights > 0) & (log_p > -math.inf), other.double() - log_p, 0.0)
    return (weights * (off.expm1() - off)).sum(-1)


def _cached_kl(cached: Distributions, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) as a loss sees it through the cache, [P]."""
    real = cached.log_probabilities > -math.inf
    log_q_kept = log_q.gather(-1, cached.ids)
    value = _kl(cached.log_probabilities, cached.log_probabilities, log_q_kept)
    log_q_tail = log_q.scatter_add(-1, cached.ids, torch.where(real, -math.inf, 0.0).to(log_q.dtype)).logsumexp(-1)
    log_rest = cached.rest.double().log()
    value = value + torch.where(cached.rest > 0, cached.rest * (log_rest - log_q_tail), 0.0)
    drawn = cached.sampled_weights > 0
    ratio = cached.sampled_log_probabilities - log_q.gather(-1, cached.sampled_ids)
    return value + torch.where(drawn, cached.sampled_weights * ratio, 0.0).sum(-1)


def _gradient(cached: Distributions, log_q: Tensor) -> Tensor:
    """Of the cached loss in the student's logits, [P, V] float64: q less what the cache puts at each entry."""
    real = cached.log_probabilities > -math.inf
    p = cached.log_probabilities.double().exp()
    tail = log_q.scatter_add(-1, cached.ids, torch.where(real, -math.inf, 0.0).to(log_q.dtype))
    spread = (tail - torch.nan_to_num(tail.logsumexp(-1, keepdim=True), neginf=0.0)).exp()  # the bucket is spread as the student's tail is
    put = spread * cached.rest.double().unsqueeze(-1)
    put = put.scatter_add(-1, cached.ids, p).scatter_add(-1, cached.sampled_ids, cached.sampled_weights.double())
    return log_q.exp() * put.sum(-1, keepdim=True) - put
