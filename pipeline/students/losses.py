"""Losses over the labels, as functions of logits and targets.

A label's score is the log-probability of its verbaliser's tokens. Scores are normalised over the labels, so log Z of the answer position
cancels: a verbaliser of one token needs its own logit alone, a longer one needs the vocabulary at the tokens after its first. The
trade-off: a student may move probability from verbalisers to other tokens without a penalty. Its answers are read from the labels alone, as
the teacher's were.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.models.packed import Tree
from pipeline.students.data import LabelTerm, TargetRow

Divergence = Literal["kl", "reverse_kl", "jensen_shannon"]
TINY = torch.finfo(torch.float32).tiny


def label_log_probabilities(logits: Tensor, tree: Tree) -> Tensor:
    """Log-probability of each label among the labels, nats: [B · (1 + nodes), V] → [B, L] float32.

    `logits` are those of rows with `tree`, the tree of the labels' verbalisers.
    """
    logits = logits.float().reshape(-1, 1 + len(tree.tokens), logits.shape[-1])
    log_z = functional.pad(logits[:, 1:].logsumexp(-1), (1, 0))  # that of the answer position would cancel
    return tree.label_scores(logits, log_z).log_softmax(-1)


def label_divergence(divergence: Divergence, target: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(target ‖ student), KL(student ‖ target) (2306.08543) or the mean KL of both to their mean: [B, L] each → [B] nats.

    KL(student ‖ target) is infinite if the target is 0 and the student is not, so its log is at least that of the smallest float32, -87.
    """
    return divergence_terms(divergence, target.clamp_min(TINY).log(), log_probabilities, target, log_probabilities.exp()).sum(-1)


def divergence_terms(divergence: Divergence, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """What each entry adds to a divergence between p and q, nats."""
    if divergence == "kl":
        return p * (log_p - log_q)
    if divergence == "reverse_kl":
        return q * (log_q - log_p)
    log_mean = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (p * (log_p - log_mean) + q * (log_q - log_mean))


def objective(
    terms: Sequence[LabelTerm], batches: Sequence[Sequence[TargetRow]], log_probabilities: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Σ weight × mean of the rows' weighted losses for each term, nats. `log_probabilities` [B, L] has a batch of each term, in turn.

    `sizes` are the terms' rows in the whole step, of which `batches` may be a piece: the values of all pieces add up to the step's.
    """
    total = log_probabilities.new_zeros(())
    parts = log_probabilities.split([len(batch) for batch in batches])
    for term, batch, part, size in zip(terms, batches, parts, sizes, strict=True):
        if not batch:
            continue
        weights = torch.tensor([row.weight for row in batch], device=part.device)
        loss = of_labels = functional.nll_loss(part, torch.tensor([row.label for row in batch], device=part.device), reduction="none")
        if term.label_weight:
            total = total + term.label_weight * ((weights * of_labels).sum() / size)
        if term.loss != "cross_entropy":
            loss = label_divergence(term.loss, targets_of(batch, part), part)
        total = total + term.weight * ((weights * loss).sum() / size)
    return total


def contrast(embeddings: Tensor, labels: Sequence[int]) -> Tensor:
    """How far cosines of pairs are from 1 if they share a label, and from 0 if not: the mean squares of both, added (2209.11055).

    `embeddings` [N, H], `labels` [N] → a scalar. A kind of pair that the batch lacks adds nothing.
    """
    unit, own = functional.normalize(embeddings, dim=-1), torch.tensor(labels, device=embeddings.device)
    same = own[:, None] == own
    squares, first = (unit @ unit.T - same.float()).square(), torch.ones_like(same).triu(1)
    kinds = [squares[first & same], squares[first & ~same]]
    return torch.stack([kind.sum() / max(1, len(kind)) for kind in kinds]).sum()


def targets_of(batch: Sequence[TargetRow], like: Tensor) -> Tensor:
    """The rows' target distributions [B, L] float32, on the device of `like`."""
    return torch.tensor([row.target for row in batch], device=like.device)
