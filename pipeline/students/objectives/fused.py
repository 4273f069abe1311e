"""The divergences of `vocabulary.py` from hidden states and the head's matrix, with never more logits in memory than a chunk's.

Logits of a batch of sequences are its largest tensor by far: 512 positions of a vocabulary of 49,152 are 100 MB, and autograd keeps several
of that size. Here a chunk of positions is multiplied by the head, its loss and at once its gradient are taken, and the logits are gone. So
the gradient costs no second forward product, as recomputing each chunk in the backward pass would (a third more work). The trade-off: each
position's weight in the total has to be known beforehand, and a call without a need for gradients should be made under `torch.no_grad()`.
"""

from typing import Any

import torch
from torch import Tensor

from pipeline.cache.distributions import Distributions
from pipeline.students.objectives.vocabulary import Divergence, Parts, divergence_of_parts, gradient_of_parts, parts_of

LOGITS_AT_ONCE = 2**22
"""Of a chunk, at most: 16 MB in float32, which stay near the processor (`make bench-cache` compares sizes)."""


def fused_divergence(
    divergence: Divergence,
    distributions: Distributions,
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Σ weight · divergence over positions, with a gradient, and the divergence of each [P], nats, without one.

    `hidden` [P, H] is what the head is given, `head` [V, H] and `bias` [V] its parameters; logits are hidden · headᵀ + bias, so a model
    that scales or caps its logits behind the head needs `divergence_nats`. `weights` [P] are 1/P where they are not given: the total is a
    mean. A weight of 0 leaves a position out. Raises UsageError as `divergence_nats` does.
    """
    if weights is None:
        weights = torch.full((len(hidden),), 1.0 / max(1, len(hidden)), device=hidden.device)
    size = max(1, logits_at_once // len(head))
    return _Fused.apply(hidden, head, bias, distributions, divergence, temperature, weights, size)  # type: ignore[return-value]


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
        wanted = ctx.needs_input_grad[:3]
        to_hidden = torch.zeros_like(hidden) if wanted[0] else None
        to_head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] else None
        to_bias = torch.zeros_like(head[:, 0], dtype=torch.float32) if wanted[2] else None
        nats = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            rows, own = hidden[chunk], distributions.take(chunk)
            logits = torch.nn.functional.linear(rows, head, bias).float().div_(temperature)
            parts = parts_of(logits, own)
            if not any(wanted):
                nats[chunk] = divergence_of_parts(divergence, own, parts)
                continue
            leaves = [part.requires_grad_() for part in (parts.kept, parts.drawn, parts.tail)]
            with torch.enable_grad():
                values = divergence_of_parts(divergence, own, parts)
                gradients = torch.autograd.grad((values * weights[chunk]).sum() / temperature, leaves, allow_unused=True)
            nats[chunk] = values.detach()
            given = Parts(*(torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)))
            with torch.no_grad():
                gradient = gradient_of_parts(logits, Parts(*(leaf.detach() for leaf in leaves)), given, own)
            if to_bias is not None:
                to_bias += gradient.sum(0)
            gradient = gradient.to(head.dtype)
            if to_hidden is not None:
                to_hidden[chunk] = gradient @ head
            if to_head is not None and head.dtype == torch.float32:
                to_head.addmm_(gradient.t(), rows)
            elif to_head is not None:
                to_head += gradient.t() @ rows
        ctx.gradients = [to_hidden, to_head, to_bias]  # not saved as inputs are: each is handed on as it is, without a copy
        ctx.dtypes = hidden.dtype, head.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nats)
        return (nats * weights).sum(), nats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss keeps its gradients for one backward pass; call it again for another")
        given, ctx.gradients = ctx.gradients, None
        out: list[Tensor | None] = []
        while given:
            gradient = given.pop(0)
            out.append(None if gradient is None else gradient.mul_(grad_outputs[0]).to(ctx.dtypes[len(out)]))
            del gradient
        return (*out, *(None,) * 5)
