"""What a step minimises over the labels: the weighted sum of its terms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.students.batches import Example, Term
from pipeline.students.objectives import cross_entropy_nats, jensen_shannon_nats, kl_nats, reverse_kl_nats

DIVERGENCES = {"kl": kl_nats, "reverse_kl": reverse_kl_nats, "jensen_shannon": jensen_shannon_nats}


def objective(
    terms: Sequence[Term], batches: Sequence[Sequence[Example]], log_probabilities: Tensor, sizes: Sequence[int] | None = None
) -> Tensor:
    """Σ weight × mean loss of each term, nats. `log_probabilities` [B, L] has the terms' batches one after the other.

    `sizes` are the terms' examples in the whole step where `batches` are a piece of it: the values of all pieces then add up to the step's.
    """
    total = log_probabilities.new_zeros(())
    parts = log_probabilities.split([len(batch) for batch in batches])
    for term, batch, part, size in zip(terms, batches, parts, sizes or map(len, batches), strict=True):
        if not batch:
            continue
        if term.loss == "cross_entropy":
            loss = cross_entropy_nats([example.label for example in batch], part)
        else:
            loss = DIVERGENCES[term.loss](targets_of(batch, part), part)
            if term.label_weight:
                total = total + term.label_weight * (cross_entropy_nats([example.label for example in batch], part).sum() / size)
        total = total + term.weight * (loss.sum() / size)
    return total


def targets_of(batch: Sequence[Example], like: Tensor) -> Tensor:
    """The examples' target distributions, [B, L] float32, where `like` lies."""
    return torch.tensor([example.target for example in batch], device=like.device)
