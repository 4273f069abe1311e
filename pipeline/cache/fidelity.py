"""How little a cache loses of its teacher: cached positions against the teacher's whole distributions at the same positions.

What is lost in training is lost through a student q, which sees KL(p ‖ q) of the teacher p, or of what the cache has of p. Without a
student, q is uniform.

- *retained mass*: the teacher's probability of the kept and drawn entries.
- *truncation*: KL(p ‖ q) less what the kept entries, unrounded, show of it. With the tail as a bucket that is P(tail) · KL(p ‖ q within the
  tail), by the chain rule, never less than 0; with a tail that was cut off it may have either sign; with draws it is 0 on average, so the
  root mean square over positions is given beside it.
- *quantisation*: KL of the kept entries, with the tail's mass, to themselves rounded.
- *KL to the live teacher*: the same to what the cache has: rounding, and whatever changed since (a machine, an engine, a batch).
- *gradient cosine*: of the cached loss's gradient in the student's logits with that of the whole distribution, all positions as one vector;
  also the mean over positions.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.distributions import Distributions

POSITIONS_AT_ONCE = 64
GRADIENTS = ("product", "own_square", "full_square")
"""Of each position: the product of the cached loss's gradient with that of the whole distribution, and the square of each."""


def fidelity(pieces: Iterable[tuple[Tensor, Distributions, Tensor | None]], resolution_nats: float | None = None) -> dict[str, float]:
    """Figures over positions that come in pieces, so that memory never has all of the teacher's distributions.

    A piece has, at one temperature, the teacher's log-probabilities [P, V], scored now, what is cached of them, and a student's logits
    [P, V], or None. `resolution_nats` is what the cache was rounded to. Masses and cosines are from 0 to 1, all else is in nats a position.
    """
    parts = []
    for full_log_probabilities, cached, student_logits in pieces:
        for start in range(0, len(full_log_probabilities), POSITIONS_AT_ONCE):
            chunk = slice(start, start + POSITIONS_AT_ONCE)
            log_p = full_log_probabilities[chunk].double()
            logits = torch.zeros_like(log_p) if student_logits is None else student_logits[chunk].double()
            parts.append(_measure(log_p, cached.take(chunk), logits.log_softmax(-1), resolution_nats))
    by_position = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    retained, truncation, product, own, full = (by_position[name] for name in ("retained_mass", "truncation_nats", *GRADIENTS))
    cosine = product / (own * full).sqrt().clamp_min(1e-300)
    return {
        "positions": float(len(retained)),
        **{name: float(values.mean()) for name, values in by_position.items() if name not in GRADIENTS},
        "retained_mass_worst_percent": float(retained.quantile(0.01)),
        "retained_mass_least": float(retained.min()),
        "truncation_rms_nats": float(truncation.square().mean().sqrt()),
        "gradient_cosine": float(product.sum() / (own.sum() * full.sum()).sqrt().clamp_min(1e-300)),
        "gradient_cosine_mean": float(cosine.mean()),
    }


def censored(rows: pa.Table) -> dict[str, float]:
    """Of rows with labels (`schema.STORED`): the share of labels of which a bound alone is known, the share of rows that have such labels,
    and of these labels the estimated mass and the most that it can be, means over all rows.
    """
    logprobs = np.array(rows["label_logprobs"].to_pylist())
    bounds = np.array([own or [math.nan] * logprobs.shape[1] for own in rows["label_bounds"].to_pylist()])
    unknown = ~np.isnan(bounds)
    return {
        "censored_labels": float(unknown.mean()),
        "censored_rows": float(unknown.any(-1).mean()),
        "censored_mass": float(np.where(unknown, np.exp(logprobs), 0).sum(-1).mean()),
        "censored_mass_most": float(np.minimum(1, np.where(unknown, np.exp(bounds), 0).sum(-1)).mean()),
    }


def _measure(log_p: Tensor, cached: Distributions, log_q: Tensor, resolution: float | None) -> dict[str, Tensor]:
    exact = _unrounded(log_p, cached)
    rounded = exact if resolution is None else _rounded(exact, resolution)
    own, full = _gradient(cached, log_q), log_q.exp() - log_p.exp()
    student_kl = _kl(log_p, log_q)
    return {
        "retained_mass": exact.retained,
        "truncation_nats": student_kl - _cached_kl(exact, log_q),
        "quantisation_nats": _kept_kl(exact, rounded),
        "kl_to_live_nats": _kept_kl(exact, cached),
        "student_kl_nats": student_kl,
        **dict(zip(GRADIENTS, ((own * full).sum(-1), own.square().sum(-1), full.square().sum(-1)), strict=True)),
    }


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


def _tail(values: Tensor, cached: Distributions) -> Tensor:
    """`values` [P, V] with -inf at the kept entries."""
    none_kept = torch.where(cached.log_probabilities > -math.inf, -math.inf, 0.0).to(values.dtype)
    return values.scatter_add(-1, cached.ids, none_kept)


def _unrounded(log_p: Tensor, cached: Distributions) -> Distributions:
    """The same entries with the teacher's own numbers; drawn entries keep their weights."""
    kept = log_p.gather(-1, cached.ids).masked_fill(cached.log_probabilities == -math.inf, -math.inf)
    drawn = log_p.gather(-1, cached.sampled_ids).masked_fill(cached.sampled_weights <= 0, -math.inf)
    tail = _tail(log_p, cached).exp().sum(-1)
    return replace(
        cached,
        log_probabilities=kept - kept.logsumexp(-1, keepdim=True) if cached.tail == "cut" else kept,
        sampled_log_probabilities=drawn,
        sampled_weights=cached.sampled_weights.double(),
        rest=tail if cached.tail == "bucket" else torch.zeros_like(tail),
        retained=kept.exp().sum(-1) + drawn.exp().sum(-1),
    )


def _rounded(exact: Distributions, resolution: float) -> Distributions:
    kept = (exact.log_probabilities / resolution).round() * resolution
    scale = exact.log_probabilities.logsumexp(-1, keepdim=True) - kept.logsumexp(-1, keepdim=True) if kept.shape[1] else 0.0
    drawn = (exact.sampled_log_probabilities / resolution).round() * resolution
    return replace(exact, log_probabilities=kept + scale, sampled_log_probabilities=drawn)


def _kept_kl(exact: Distributions, other: Distributions) -> Tensor:
    """KL over kept entries and bucket, and over drawn ones Σ w (e^δ - 1 - δ), δ the error of a log-probability: no term is negative."""

    def off(log_p: Tensor, weights: Tensor, other: Tensor) -> Tensor:
        error = torch.where((weights > 0) & (log_p > -math.inf), other.double() - log_p, 0.0)
        return (weights * (error.expm1() - error)).sum(-1)

    return (
        off(exact.log_probabilities, exact.log_probabilities.exp(), other.log_probabilities)
        + off(exact.sampled_log_probabilities, exact.sampled_weights, other.sampled_log_probabilities)
        + off(exact.rest.log().unsqueeze(-1), exact.rest.unsqueeze(-1), other.rest.log().unsqueeze(-1))
    )


def _cached_kl(exact: Distributions, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) as a loss sees it through the cache, [P]."""
    value = _kl(exact.log_probabilities, log_q.gather(-1, exact.ids))
    value = value + torch.where(exact.rest > 0, exact.rest * (exact.rest.log() - _tail(log_q, exact).logsumexp(-1)), 0.0)
    ratio = exact.sampled_log_probabilities - log_q.gather(-1, exact.sampled_ids)
    return value + torch.where(exact.sampled_weights > 0, exact.sampled_weights * ratio, 0.0).sum(-1)


def _gradient(cached: Distributions, log_q: Tensor) -> Tensor:
    """Of the cached loss in the student's logits, [P, V] float64: q less what the cache puts at each entry."""
    tail = _tail(log_q, cached)
    spread = (tail - torch.nan_to_num(tail.logsumexp(-1, keepdim=True), neginf=0.0)).exp()  # the bucket is spread as the student's tail is
    put = spread * cached.rest.double().unsqueeze(-1)
    put = put.scatter_add(-1, cached.ids, cached.log_probabilities.double().exp())
    put = put.scatter_add(-1, cached.sampled_ids, cached.sampled_weights.double())
    return log_q.exp() * put.sum(-1, keepdim=True) - put
