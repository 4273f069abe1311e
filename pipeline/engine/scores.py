"""What an engine returns, and how it is read off logits: the one place where logits become log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol, Self

import torch
from torch import Tensor

from pipeline.models.rows import Row

Completions = Sequence[Sequence[int]]
"""Token ids of each label's verbaliser."""


@dataclass(frozen=True)
class Scores:
    """Scores of N queries at their answer positions; L labels, K entries of the vocabulary. Natural logarithms."""

    label_logprobs: Tensor  # [N, L] float32, summed over a verbaliser's tokens
    topk_ids: Tensor  # [N, K] int32, most probable first
    topk_logprobs: Tensor  # [N, K] float32, normalised over the whole vocabulary
    log_z: Tensor  # [N] float32, log-sum-exp of the logits
    tail_mass: Tensor  # [N] float32, probability outside the top K

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of several scores, in order."""
        return cls(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    def take(self, rows: Tensor) -> Self:
        """Some rows, in the order given."""
        return type(self)(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


class Engine(Protocol):
    """Scores queries under one context after another."""

    name: str
    token_budget: int

    def score(self, context: Sequence[int], queries: Sequence[Sequence[int]]) -> Scores:
        """Scores of `queries`, each behind `context`, in order."""
        ...


def rows_of(queries: Sequence[Sequence[int]], completions: Completions) -> list[Row]:
    """Queries with the branches that multi-token completions need; a completion's last token is never read."""
    branches = tuple(ids[:-1] for ids in completions if len(ids) > 1)
    return [Row(query, branches) for query in queries]


def read_scores(logits: Tensor, completions: Completions, top_k: int) -> Scores:
    """Scores from the logits of `rows_of(...)`: for each row its answer position, then every branch token, [N·(1 + branch tokens), V].

    The tail's mass is summed over the entries outside the top k, not taken as 1 - Σ p: that would be rounding noise where little is left.
    """
    per_row = 1 + sum(len(ids) - 1 for ids in completions)
    logits = logits.float().reshape(-1, per_row, logits.shape[-1])
    log_z = logits.logsumexp(-1)  # [N, per_row]
    answer = logits[:, 0]
    top = answer.topk(min(top_k, answer.shape[-1]), dim=-1)
    outside = answer.scatter(-1, top.indices, -torch.inf)
    columns, place = [], 1
    for ids in completions:
        total = answer[:, ids[0]] - log_z[:, 0]
        for token in ids[1:]:
            total = total + logits[:, place, token] - log_z[:, place]
            place += 1
        columns.append(total)
    return Scores(
        label_logprobs=torch.stack(columns, -1),
        topk_ids=top.indices.to(torch.int32),
        topk_logprobs=top.values - log_z[:, :1],
        log_z=log_z[:, 0],
        tail_mass=(outside - log_z[:, :1]).exp().sum(-1),
    )
