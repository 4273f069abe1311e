"""Losses over the labels, as functions of logits and targets.

A label's score is the log-probability of its verbaliser's tokens. Scores are normalised over the labels, so log Z of the answer position
cancels: a verbaliser of one token needs its own logit alone, a longer one needs the vocabulary at the tokens after its first. The
trade-off: a student may move probability from verbalisers to other tokens without a penalty. Its answers are read from the labels alone, as
the teacher's were.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.models.rows import Completions
from pipeline.students.data import LabelTerm, TargetRow


def label_log_probabilities(logits: Tensor, completions: Completions) -> Tensor:
    """Log-probability of each label among the labels, nats: [B · positions, V] → [B, L] float32.

    `logits` are those of `rows_of(queries, completions)`: of each row its answer position, then all but the last token of each verbaliser.
    """
    positions = 1 + sum(len(ids) - 1 for ids in completions)
    logits = logits.float().reshape(-1, positions, logits.shape[-1])
    scores, place = [], 1
    for ids in completions:
        score = logits[:, 0, ids[0]]
        for token in ids[1:]:
            score = score + logits[:, place].log_softmax(-1)[:, token]
            place += 1
        scores.append(score)
    return torch.stack(scores, -1).log_softmax(-1)


def kl_nats(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(target ‖ student): probabilities and log-probabilities [B, L] → [B] nats. A label of probability 0 adds nothing."""
    return (torch.special.xlogy(target, target) - target * log_probabilities).sum(-1)


def reverse_kl_nats(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(student ‖ target), which seeks the target's mode (2306.08543): [B, L] → [B] nats.

    It is infinite if the target is 0 and the student is not. So the target is at least the smallest float32 number, e^-87.
    """
    log_target = target.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (log_probabilities.exp() * (log_probabilities - log_target)).sum(-1)


def jensen_shannon_nats(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """The mean KL of target and student to their mean: [B, L] → [B] nats, at most log 2."""
    log_mean = torch.logaddexp(target.log(), log_probabilities) - math.log(2.0)
    to_target = torch.special.xlogy(target, target) - target * log_mean
    return 0.5 * (to_target + log_probabilities.exp() * (log_probabilities - log_mean)).sum(-1)


def cross_entropy_nats(labels: Sequence[int] | Tensor, log_probabilities: Tensor) -> Tensor:
    """-log of the student's probability of each row's label: numbers [B] and log-probabilities [B, L] → [B] nats."""
    chosen = torch.as_tensor(labels, dtype=torch.long, device=log_probabilities.device)
    return -log_probabilities.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


DIVERGENCES = {"kl": kl_nats, "reverse_kl": reverse_kl_nats, "jensen_shannon": jensen_shannon_nats}


def objective(
    terms: Sequence[LabelTerm], batches: Sequence[Sequence[TargetRow]], log_probabilities: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Σ weight × mean loss of each term, nats. `log_probabilities` [B, L] has the terms' batches one after the other.

    `sizes` are the terms' rows in the whole step, of which `batches` may be a piece: the values of all pieces add up to the step's.
    """
    total = log_probabilities.new_zeros(())
    parts = log_probabilities.split([len(batch) for batch in batches])
    for term, batch, part, size in zip(terms, batches, parts, sizes, strict=True):
        if not batch:
            continue
        of_labels = cross_entropy_nats([row.label for row in batch], part)
        if term.label_weight:
            total = total + term.label_weight * (of_labels.sum() / size)
        loss = of_labels if term.loss == "cross_entropy" else DIVERGENCES[term.loss](targets_of(batch, part), part)
        total = total + term.weight * (loss.sum() / size)
    return total


def targets_of(batch: Sequence[TargetRow], like: Tensor) -> Tensor:
    """The rows' target distributions [B, L] float32, on the device of `like`."""
    return torch.tensor([row.target for row in batch], device=like.device)
