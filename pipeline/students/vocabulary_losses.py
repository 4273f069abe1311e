"""Divergences between a cached distribution and a student's logits over the whole vocabulary.

With p the teacher's probabilities at the student's temperature and q the student's, the vocabulary has the entries that the cache keeps
exactly, and the others: the tail. Over the kept entries a divergence is the sum of its terms. Over the tail:

- one bucket: p(tail) and q(tail) are compared as one entry. This is the divergence of the coarsened distributions, never more than the true
  one. The student's q(tail) is its own log-sum-exp, not 1 - Σ q, so that a tiny tail keeps its gradient.
- drawn entries, each for a mass w: Σ f(p, q) over the tail becomes Σ w/p · f(p, q), which is right on average. What is linear in q sums to
  q(tail), which is known. It is taken out of f first, or one draw with q much larger than p would outweigh all others.
- nothing, if the kept entries were scaled up to sum to 1 (`cut`): p(tail) is 0, and the student's tail still costs.

Where p is 0 and q is not, KL(q ‖ p) is infinite; such p count as the smallest float32 number, e^-87, as for labels. All values are in nats
at the student's temperature τ, q = softmax(logits/τ), and are not multiplied by τ² (1503.02531).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.cache.distributions import Distributions

Divergence = Literal["kl", "reverse_kl", "jensen_shannon"]
TINY = torch.finfo(torch.float32).tiny
LARGEST_LOG_RATIO = 30.0
"""Of q/p: beyond it e^x · log(1 + e^-x) is 1 in float32, and in float64 to 13 digits."""
LOGITS_AT_ONCE = 2**22
"""Of a chunk of the fused loss: 16 MB in float32, which stay near the processor."""


def divergence_nats(divergence: Divergence, distributions: Distributions, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The divergence of each position: logits [P, V] of any float type → [P] nats, float32, or float64 for float64.

    `kl` is KL(p ‖ q), `reverse_kl` KL(q ‖ p), `jensen_shannon` the mean KL of both to their mean. V may exceed the teacher's vocabulary:
    what is not kept is tail.
    """
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return _of_parts(divergence, distributions, _Parts(*_PartsOf.apply(logits, distributions)))  # type: ignore[misc]


def fused_divergence(
    divergence: Divergence,
    distributions: Distributions,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    *,
    weights: Tensor,
    temperature: float = 1.0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Σ weight · divergence with a gradient, and the divergence of each position [P] without one, nats; the logits are never all in memory.

    `hidden` [P, H] is the head's input, `head` [V, H] and `bias` [V] are its parameters, `weights` [P]. A chunk of positions is multiplied
    by the head, its loss and its gradient are taken at once, and the logits are gone: no second forward product in the backward pass. A
    model that scales or caps its logits needs `divergence_nats`. Without a need for gradients, call it under `torch.no_grad()`.
    """
    size = max(1, logits_at_once // len(head))
    return _Fused.apply(hidden, head, bias, distributions, divergence, temperature, weights, size)  # type: ignore[return-value]


@dataclass(frozen=True)
class _Parts:
    """All that a divergence needs of a student's logits at its temperature."""

    kept: Tensor  # [P, K] logits of the entries kept exactly; -inf for padding
    drawn: Tensor  # [P, M] logits of the drawn entries
    tail: Tensor  # [P] log-sum-exp over all entries that are not kept exactly


def _parts(logits: Tensor, distributions: Distributions) -> _Parts:
    """The parts of logits [P, V]. `logits` are overwritten with those of the tail: -inf where an entry is kept exactly."""
    padding = distributions.log_probabilities == -math.inf
    kept = logits.gather(-1, distributions.ids).masked_fill_(padding, -math.inf)
    drawn = logits.gather(-1, distributions.sampled_ids)
    # added, not set: a padding entry has id 0, which may also be a real entry
    logits.scatter_add_(-1, distributions.ids, torch.full_like(kept, -math.inf).masked_fill_(padding, 0.0))
    return _Parts(kept, drawn, logits.logsumexp(-1))


def _logits_gradient(tail_logits: Tensor, tail: Tensor, gradient: _Parts, distributions: Distributions) -> Tensor:
    """The gradient in the logits [P, V] from that in their parts. `tail_logits`, as `_parts` leaves them, are overwritten."""
    norm = torch.where(tail > -math.inf, tail, 0.0).unsqueeze(-1)
    out = tail_logits.sub_(norm).exp_().mul_(gradient.tail.unsqueeze(-1))
    out.scatter_add_(-1, distributions.ids, gradient.kept)
    return out.scatter_add_(-1, distributions.sampled_ids, gradient.drawn)


class _PartsOf(torch.autograd.Function):
    """`_parts` with its gradient. Autograd's own is NaN if there is no tail, and keeps one more copy of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, distributions: Distributions) -> tuple[Tensor, Tensor, Tensor]:
        tail_logits = logits.clone()
        parts = _parts(tail_logits, distributions)
        ctx.save_for_backward(tail_logits, parts.tail)
        ctx.distributions = distributions
        return parts.kept, parts.drawn, parts.tail

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        tail_logits, tail = ctx.saved_tensors
        return _logits_gradient(tail_logits.clone(), tail, _Parts(*grad_outputs), ctx.distributions), None


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        distributions: Distributions,
        divergence: Divergence,
        temperature: float,
        weights: Tensor,
        size: int,
    ) -> tuple[Tensor, Tensor]:
        to_hidden, to_head, to_bias = (
            torch.zeros_like(like, dtype=dtype) if like is not None and wanted else None
            for like, dtype, wanted in zip((hidden, head, bias), (hidden.dtype, torch.float32, torch.float32), ctx.needs_input_grad, strict=False)
        )
        nats = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            rows, own = hidden[chunk], distributions.take(chunk)
            logits = functional.linear(rows, head, bias).float().div_(temperature)
            parts = _parts(logits, own)
            if not any(ctx.needs_input_grad[:3]):
                nats[chunk] = _of_parts(divergence, own, parts)
                continue
            leaves = [part.requires_grad_() for part in (parts.kept, parts.drawn, parts.tail)]
            with torch.enable_grad():
                values = _of_parts(divergence, own, parts)
                gradients = torch.autograd.grad((values * weights[chunk]).sum() / temperature, leaves, allow_unused=True, materialize_grads=True)
            nats[chunk] = values.detach()
            gradient = _logits_gradient(logits, parts.tail.detach(), _Parts(*gradients), own)
            if to_bias is not None:
                to_bias += gradient.sum(0)
            gradient = gradient.to(head.dtype)
            if to_hidden is not None:
                to_hidden[chunk] = gradient @ head
            if to_head is not None and head.dtype == torch.float32:
                to_head.addmm_(gradient.t(), rows)
            elif to_head is not None:
                to_head += gradient.t() @ rows
        ctx.gradients = [to_hidden, to_head, to_bias]  # not saved as inputs are: each is handed on without a copy
        ctx.dtypes = hidden.dtype, head.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nats)
        return (nats * weights).sum(), nats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass; call it again for another")
        given, ctx.gradients = ctx.gradients, None
        out = [None if one is None else one.mul_(grad_outputs[0]).to(dtype) for one, dtype in zip(given, ctx.dtypes, strict=True)]
        return (*out, *(None,) * 5)


def _of_parts(divergence: Divergence, distributions: Distributions, parts: _Parts) -> Tensor:
    """[P] nats, differentiable in the parts."""
    log_z = torch.logsumexp(torch.cat([parts.kept, parts.tail.unsqueeze(-1)], -1), -1)
    real = distributions.log_probabilities > -math.inf
    log_p = distributions.log_probabilities.masked_fill(~real, 0.0).to(log_z.dtype)
    log_q = (parts.kept - log_z.unsqueeze(-1)).masked_fill(~real, 0.0)
    over_kept = _terms(divergence, log_p, log_q, log_p.exp() * real, log_q.exp() * real).sum(-1)
    without_tail = log_z.detach() + 2 * math.log(TINY)  # too small to matter
    log_q_tail = torch.where(parts.tail > -math.inf, parts.tail, without_tail) - log_z
    q_tail, log_rest = log_q_tail.exp(), distributions.rest.to(log_z.dtype).clamp_min(TINY).log()
    over_bucket = _terms(divergence, log_rest, log_q_tail, distributions.rest, q_tail)
    drawn = distributions.sampled_weights > 0
    if not drawn.any():
        return over_kept + over_bucket
    log_p_drawn = distributions.sampled_log_probabilities.masked_fill(~drawn, 0.0).to(log_z.dtype)
    log_ratio = (parts.drawn - log_z.unsqueeze(-1)).masked_fill(~drawn, 0.0) - log_p_drawn  # log q/p
    over_draws = (distributions.sampled_weights * _drawn_terms(divergence, log_ratio)).sum(-1)
    linear = {"kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5 * math.log(2.0)}[divergence] * q_tail
    return over_kept + torch.where(drawn.any(-1), over_draws + linear, over_bucket)


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
    to_mean = math.log(2.0) - functional.softplus(log_ratio)  # log of p over the mean
    capped = log_ratio.clamp_max(LARGEST_LOG_RATIO)
    return 0.5 * (to_mean - capped.exp() * functional.softplus(-capped))  # q/p · log(1 + p/q) is at most 1
