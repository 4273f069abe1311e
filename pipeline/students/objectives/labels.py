"""What a student minimises, as pure functions of logits and targets.

Everything here is over the labels, at the answer position. A label's score is the log-probability of its verbaliser's tokens; scores are
renormalised over the labels, and the log Z of the answer position, which all labels share, cancels there. So a single-token verbaliser
needs its own logit and nothing else of the vocabulary, and a longer one the vocabulary only at the tokens after its first.

The trade-off: a student may move probability from verbalisers to other tokens unpunished. Its answers are read from the labels alone,
as the teacher's were, so nothing that is asked of it depends on that.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.models.rows import Completions


def positions_per_row(completions: Completions) -> int:
    """Answer positions of a row: the query's last token, then all but the last token of each verbaliser."""
    return 1 + sum(len(ids) - 1 for ids in completions)


def label_log_probabilities(logits: Tensor, completions: Completions) -> Tensor:
    """Log-probability of each label among the labels, nats.

    `logits` are those of `models.rows.rows_of(queries, completions)`: for each row its answer position, then every branch token,
    [B · positions, V] → [B, L] float32. A verbaliser's tokens are summed.
    """
    logits = logits.float().reshape(-1, positions_per_row(completions), logits.shape[-1])
    columns, place = [], 1
    for ids in completions:
        total = logits[:, 0, ids[0]]
        for token in ids[1:]:
            total = total + logits[:, place].log_softmax(-1)[:, token]
            place += 1
        columns.append(total)
    return torch.stack(columns, -1).log_softmax(-1)


def kl_nats(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(target ‖ student) of each row: [B, L] probabilities and log-probabilities → [B], nats.

    A label of probability 0 adds nothing, to the value or to the gradient.
    """
    return (torch.special.xlogy(target, target) - target * log_probabilities).sum(-1)


def reverse_kl_nats(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(student ‖ target) of each row, which seeks the target's mode where `kl_nats` covers all of it (2306.08543): [B, L] → [B], nats.

    It is infinite where the target is 0 and the student is not; the target is held at the smallest float32 number, e^-87.
    """
    log_target = target.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (log_probabilities.exp() * (log_probabilities - log_target)).sum(-1)


def jensen_shannon_nats(target: Tensor, log_probabilities: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each row, the mean KL of target and student to their mean: [B, L] → [B], nats, at most log 2."""
    log_mean = torch.logaddexp(target.log(), log_probabilities) - math.log(2.0)
    to_target = torch.special.xlogy(target, target) - target * log_mean
    to_student = log_probabilities.exp() * (log_probabilities - log_mean)
    return 0.5 * (to_target + to_student).sum(-1)


def cross_entropy_nats(labels: Sequence[int] | Tensor, log_probabilities: Tensor) -> Tensor:
    """-log of the student's probability of each row's label: label numbers [B] and log-probabilities [B, L] → [B], nats."""
    chosen = torch.as_tensor(labels, dtype=torch.long, device=log_probabilities.device)
    return -log_probabilities.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
