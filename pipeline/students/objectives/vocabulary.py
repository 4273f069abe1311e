"""Divergences between a cached distribution and a student's logits over the whole vocabulary.

With p the teacher's probabilities at the student's temperature and q the student's, the vocabulary falls into the entries that the cache
keeps exactly and the others, the tail. A divergence is a sum over entries; over the kept ones it is taken as it stands. Over the tail:

- one bucket: p(tail) and q(tail) are compared as if they were one entry. The student's 1 - Σ q is its own log-sum-exp over the tail, not a
  difference. This is the divergence of the two distributions coarsened to the same cells, never more than the true one.
- drawn entries, each standing for mass w: Σ over the tail of f(p, q) becomes Σ w/p · f(p, q), which is right on average. What is linear in
  q sums to q(tail), which is known, and is taken out of f first: else one draw with q much larger than p would outweigh all others.
- nothing, where the kept ones were scaled up to sum to 1 (`cut`): p(tail) is 0. The student's tail is not free, as it would be if both
  sides were renormalised; but KL(q ‖ p) is then infinite, and refused.

p = 0 with q > 0 (masked entries, which are one bucket) makes KL(q ‖ p) infinite too; such p are taken as the smallest float32 number,
e^-87, as for labels.

All are in nats at the student's temperature τ, q = softmax(logits/τ), and are not multiplied by τ²: a caller that weighs them against a
loss at temperature 1, and wants gradients of the same size (1503.02531), multiplies by τ².
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.cache.distributions import Distributions
from pipeline.errors import UsageError

Divergence = Literal["kl", "reverse_kl", "jensen_shannon"]
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)
LARGEST_LOG_RATIO = 30.0
"""Of q/p: beyond it e^x·log(1 + e^-x) is 1 in float32, and in float64 to 13 digits."""


def divergence_nats(divergence: Divergence, distributions: Distributions, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """`divergence` of each position: [P, V] logits of any float type → [P] nats, float32, or float64 for float64.

    `kl` is KL(p ‖ q), `reverse_kl` KL(q ‖ p), `jensen_shannon` the mean KL of both to their mean. V may pass the largest id that is kept,
    or the teacher's vocabulary: what is not kept is tail. For sequences, `fused.fused_divergence` needs no logits of all positions.
    Raises UsageError for `reverse_kl` on a top k without its tail.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return divergence_of_parts(divergence, distributions, Parts(*_Parts.apply(logits, distributions)))  # type: ignore[misc]


@dataclass(frozen=True)
class Parts:
    """All that a divergence needs of a student's logits at its temperature."""

    kept: Tensor  # [P, K] logits of the entries kept exactly; -inf for padding
    drawn: Tensor  # [P, M] logits of the drawn entries
    tail: Tensor  # [P] log-sum-exp over all entries that are not kept exactly


def parts_of(logits: Tensor, distributions: Distributions) -> Parts:
    """The parts of logits [P, V]. `logits` are overwritten with those of the tail: -inf where an entry is kept exactly."""
    padding = distributions.log_probabilities == -math.inf
    kept = logits.gather(-1, distributions.ids).masked_fill_(padding, -math.inf)
    drawn = logits.gather(-1, distributions.sampled_ids)
    # added, not set: a padding entry has id 0, which may be an entry of its own
    out = torch.full_like(kept, -math.inf).masked_fill_(padding, 0.0)
    logits.scatter_add_(-1, distributions.ids, out)
    return Parts(kept, drawn, logits.logsumexp(-1))


def gradient_of_parts(tail_logits: Tensor, parts: Parts, gradient: Parts, distributions: Distributions) -> Tensor:
    """The gradient in the logits [P, V] from that in their parts; `tail_logits`, as `parts_of` leaves them, are overwritten."""
    norm = torch.where(parts.tail > -math.inf, parts.tail, 0.0).unsqueeze(-1)
    out = tail_logits.sub_(norm).exp_().mul_(gradient.tail.unsqueeze(-1))
    out.scatter_add_(-1, distributions.ids, gradient.kept)
    return out.scatter_add_(-1, distributions.sampled_ids, gradient.drawn)


class _Parts(torch.autograd.Function):
    """`parts_of` with its gradient. Autograd's own is not a number where there is no tail, and keeps one copy of the logits more."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, distributions: Distributions) -> tuple[Tensor, Tensor, Tensor]:
        tail_logits = logits.clone()
        parts = parts_of(tail_logits, distributions)
        ctx.save_for_backward(tail_logits, parts.kept, parts.drawn, parts.tail)
        ctx.distributions = distributions
        return parts.kept, parts.drawn, parts.tail

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        tail_logits, *parts = ctx.saved_tensors
        return gradient_of_parts(tail_logits.clone(), Parts(*parts), Parts(*grad_outputs), ctx.distributions), None


def divergence_of_parts(divergence: Divergence, distributions: Distributions, parts: Parts) -> Tensor:
    """[P] nats, differentiable in the parts."""
    if divergence == "reverse_kl" and distributions.tail == "cut":
        raise UsageError(
            "loss reverse_kl: this cache holds a top k without its tail (encoding top_k), to which KL(student ‖ teacher) is infinite. "
            "Capture with encoding top_k_tail or hybrid, or take loss kl or jensen_shannon."
        )
    log_z = torch.logsumexp(torch.cat([parts.kept, parts.tail.unsqueeze(-1)], -1), -1)
    real = distributions.log_probabilities > -math.inf
    log_p = distributions.log_probabilities.masked_fill(~real, 0.0).to(log_z.dtype)
    log_q = (parts.kept - log_z.unsqueeze(-1)).masked_fill(~real, 0.0)
    p, q = log_p.exp() * real, log_q.exp() * real
    has_tail = parts.tail > -math.inf
    log_q_tail = torch.where(has_tail, parts.tail, log_z.detach() - 2 * abs(LOG_TINY)) - log_z  # of no tail: too small to matter
    over_kept = _terms(divergence, log_p, log_q, p, q).sum(-1)
    drawn = distributions.sampled_weights > 0
    over_bucket = _terms(divergence, _log(distributions.rest.to(log_z.dtype)), log_q_tail, distributions.rest, log_q_tail.exp())
    if not drawn.any():
        return over_kept + over_bucket
    log_p_drawn = distributions.sampled_log_probabilities.masked_fill(~drawn, 0.0).to(log_z.dtype)
    log_ratio = (parts.drawn - log_z.unsqueeze(-1)).masked_fill(~drawn, 0.0) - log_p_drawn  # log q/p
    over_draws = (distributions.sampled_weights * _drawn_terms(divergence, log_ratio)).sum(-1)
    q_tail = log_q_tail.exp()
    known = {"kl": 0.0 * q_tail, "reverse_kl": q_tail, "jensen_shannon": 0.5 * math.log(2.0) * q_tail}[divergence]
    return over_kept + torch.where(drawn.any(-1), over_draws + known, over_bucket)


def _terms(divergence: Divergence, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """What each entry adds to the divergence."""
    if divergence == "kl":
        return p * (log_p - log_q)
    if divergence == "reverse_kl":
        return q * (log_q - log_p)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (p * (log_p - log_mean) + q * (log_q - log_mean))


def _drawn_terms(divergence: Divergence, log_ratio: Tensor) -> Tensor:
    """What each drawn entry adds for a unit of mass, as a function of log q/p, without what is linear in q alone."""
    if divergence == "kl":
        return -log_ratio
    if divergence == "reverse_kl":  # q/p · log(q/p) - q/p: its minimum, -1, is at q = p
        return log_ratio.exp() * (log_ratio - 1.0)
    to_mean = math.log(2.0) - torch.nn.functional.softplus(log_ratio)  # log of p over the mean
    capped = log_ratio.clamp_max(LARGEST_LOG_RATIO)
    return 0.5 * (to_mean - capped.exp() * torch.nn.functional.softplus(-capped))  # q/p · log(1 + p/q) is at most 1


def _log(mass: Tensor) -> Tensor:
    """Logarithm, of 0 as of the smallest number."""
    return mass.clamp_min(torch.finfo(torch.float32).tiny).log()
