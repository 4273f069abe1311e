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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.cache.distributions import Distributions
from pipeline.students.losses import TINY, Divergence, divergence_terms

REMOVED, NO_TAIL = -1e30, -1000.0
"""Added to a logit that is not in the tail; log-probability of a tail that has no entry. Both are finite, and so are their gradients."""
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
    real = distributions.log_probabilities > -math.inf
    kept = logits.gather(-1, distributions.ids).masked_fill(~real, -math.inf)
    # added, not set: a padding entry has id 0, which may also be a real entry
    tail = logits.scatter_add(-1, distributions.ids, torch.where(real, REMOVED, 0.0).to(logits.dtype)).logsumexp(-1)
    log_z = torch.logsumexp(torch.cat([kept, tail.unsqueeze(-1)], -1), -1)
    log_p = distributions.log_probabilities.masked_fill(~real, 0.0).to(log_z.dtype)
    log_q = (kept - log_z.unsqueeze(-1)).masked_fill(~real, 0.0)
    over_kept = divergence_terms(divergence, log_p, log_q, log_p.exp() * real, log_q.exp() * real).sum(-1)
    log_q_tail = (tail - log_z).clamp_min(NO_TAIL)
    log_rest = distributions.rest.to(log_z.dtype).clamp_min(TINY).log()
    over_bucket = divergence_terms(divergence, log_rest, log_q_tail, distributions.rest, log_q_tail.exp())
    drawn = distributions.sampled_weights > 0
    if not drawn.any():
        return over_kept + over_bucket
    log_p_drawn = distributions.sampled_log_probabilities.masked_fill(~drawn, 0.0).to(log_z.dtype)
    log_q_drawn = (logits.gather(-1, distributions.sampled_ids) - log_z.unsqueeze(-1)).masked_fill(~drawn, 0.0)
    over_draws = (distributions.sampled_weights * _drawn_terms(divergence, log_q_drawn - log_p_drawn)).sum(-1)
    linear = {"kl": 0.0, "reverse_kl": 1.0, "jensen_shannon": 0.5 * math.log(2.0)}[divergence] * log_q_tail.exp()
    return over_kept + torch.where(drawn.any(-1), over_draws + linear, over_bucket)


def fused_divergence(
    divergence: Divergence,
    distributions: Distributions,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    temperature: float = 1.0,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """Σ divergence over positions, nats, with a gradient; the logits are never all in memory.

    `hidden` [P, H] is the head's input, `head` [V, H] and `bias` [V] are its parameters. The loss and gradient of a chunk of positions are
    taken at once, so there is no second product on the way back. A model that scales or caps its logits needs `divergence_nats`.
    """
    if not torch.is_grad_enabled():
        hidden, head, bias = hidden.detach(), head.detach(), None if bias is None else bias.detach()
    size = max(1, logits_at_once // len(head))
    return _Fused.apply(hidden, head, bias, distributions, divergence, temperature, size)  # type: ignore[return-value]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        hidden, head, bias, distributions, divergence, temperature, size = args
        of_hidden, of_head, of_bias = (
            torch.zeros_like(one, dtype=torch.float32) if wanted else None
            for one, wanted in zip((hidden, head, bias), ctx.needs_input_grad, strict=False)
        )
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            rows = hidden[chunk]
            logits = functional.linear(rows, head, bias).float().requires_grad_(any(ctx.needs_input_grad))
            with torch.set_grad_enabled(logits.requires_grad):
                value = divergence_nats(divergence, distributions.take(chunk), logits, temperature).sum()
            total += value.detach()
            if not logits.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(value, logits)
            if of_bias is not None:
                of_bias += gradient.sum(0)
            if of_hidden is not None:
                of_hidden[chunk] = gradient.to(head.dtype) @ head
            if of_head is not None:
                of_head.addmm_(gradient.t(), rows.float())
        ctx.gradients = of_hidden, of_head, of_bias  # not saved as inputs are, so that each is handed on without a copy
        ctx.dtypes = [None if one is None else one.dtype for one in (hidden, head, bias)]
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        given, ctx.gradients = ctx.gradients, ()  # for one way back: the gradients are scaled in place
        scaled = [None if one is None else one.mul_(grad_outputs[0]).to(dtype) for one, dtype in zip(given, ctx.dtypes, strict=True)]
        return (*scaled, *(None,) * 4)


def _drawn_terms(divergence: Divergence, log_ratio: Tensor) -> Tensor:
    """What each drawn entry adds for a unit of mass, as a function of log q/p, without what is linear in q alone."""
    if divergence == "kl":
        return -log_ratio
    if divergence == "reverse_kl":  # q/p · log(q/p) - q/p: its minimum, -1, is at q = p
        return log_ratio.exp() * (log_ratio - 1.0)
    to_mean = math.log(2.0) - functional.softplus(log_ratio)  # log of p over the mean
    capped = log_ratio.clamp_max(LARGEST_LOG_RATIO)
    return 0.5 * (to_mean - capped.exp() * functional.softplus(-capped))  # q/p · log(1 + p/q) is at most 1
