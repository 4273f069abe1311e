"""What an engine is asked and what it returns: the one place where logits become log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.encodings import Encoded, encode
from pipeline.files import sha256_ids
from pipeline.models.rows import Completions, Row, rows_of
from pipeline.params import CacheParams

LABELS_ALONE = CacheParams(encoding="top_k", top_k=1)
"""The least that is kept: for callers who want the labels' log-probabilities and no more."""


@dataclass(frozen=True)
class Scores:
    """Scores of N queries: L labels at one answer position each, or free answers of one position a token; P positions in all."""

    label_logprobs: Tensor  # [N, L] float32 nats, summed over a verbaliser's tokens; L is 0 for free answers
    positions: Tensor  # [N] int64, each row's answer positions
    completion_logprobs: Tensor  # [P] float32 nats, of free answers' tokens; empty for labels
    encoded: Encoded  # of all rows' positions, one after the other

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """The rows of several scores, in order."""
        return cls(
            label_logprobs=torch.cat([part.label_logprobs for part in parts]),
            positions=torch.cat([part.positions for part in parts]),
            completion_logprobs=torch.cat([part.completion_logprobs for part in parts]),
            encoded=Encoded.concatenate([part.encoded for part in parts]),
        )

    def take(self, rows: Tensor) -> Self:
        """Some rows, in the order given."""
        starts = self.positions.cumsum(0) - self.positions
        places = torch.cat([torch.arange(int(starts[row]), int(starts[row] + self.positions[row])) for row in rows])
        return type(self)(
            label_logprobs=self.label_logprobs[rows],
            positions=self.positions[rows],
            completion_logprobs=self.completion_logprobs[places] if len(self.completion_logprobs) else self.completion_logprobs,
            encoded=self.encoded.take(places.to(self.encoded.log_z.device)),
        )


@dataclass(frozen=True)
class Reading:
    """What is read at each row: log-probabilities of all labels, or of the row's own answer; and what is kept of distributions."""

    labels: Completions = ()
    """Empty where each row has an answer of its own."""
    cache: CacheParams = field(default=LABELS_ALONE)
    texts: bool = False
    """Whether rows' answers are texts that begin alike, so that it is the answer that tells one row from another."""

    def rows(self, queries: Sequence[Sequence[int]], answers: Completions | None) -> list[Row]:
        """Queries with the branches that continue them, as `models.rows.rows_of` lays them."""
        if answers is None:
            return rows_of(queries, self.labels)
        return [row for query, answer in zip(queries, answers, strict=True) for row in rows_of([query], [answer])]

    def uniforms(self, context: Sequence[int], queries: Sequence[Sequence[int]], answers: Completions | None) -> list[np.ndarray]:
        """For each row, the random numbers of its positions, from the hash of its prompt, or of the text that it is."""
        counts = [1] * len(queries) if answers is None else list(map(len, answers))
        if self.cache.encoding not in {"sampled", "hybrid"}:
            return [np.zeros(count) for count in counts]
        read = [[*query, *answer] for query, answer in zip(queries, answers, strict=True)] if self.texts and answers else queries
        seeds = [int(sha256_ids([*context, *ids])[:16], 16) for ids in read]
        return [np.random.default_rng(seed).random(count) for seed, count in zip(seeds, counts, strict=True)]


class Engine(Protocol):
    """Scores queries under one context after another."""

    name: str
    token_budget: int
    reading: Reading

    def score(self, context: Sequence[int], queries: Sequence[Sequence[int]], answers: Completions | None = None) -> Scores:
        """Scores of `queries`, each behind `context`, in order; `answers` are the rows' own, of one token or more."""
        ...


def read_scores(
    logits: Tensor, reading: Reading, answers: Completions | None, uniforms: Sequence[np.ndarray], hidden: Tensor | None = None
) -> Scores:
    """Scores from the logits of `reading.rows(...)`: for each row its answer position, then every branch token, [Σ(1 + branch tokens), V].

    `hidden` [the same, D] are the kept layers' outputs there. For labels the answer position alone is kept; for a row's own answer all are.
    """
    logits = logits.float()
    if answers is None:
        return _label_scores(logits, reading, uniforms, hidden)
    encoded = encode(logits, reading.cache, torch.from_numpy(np.concatenate(uniforms)), hidden)
    tokens = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    return Scores(
        label_logprobs=logits.new_zeros(len(answers), 0),
        positions=torch.tensor([len(answer) for answer in answers]),
        completion_logprobs=logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - encoded.log_z,
        encoded=encoded,
    )


def _label_scores(logits: Tensor, reading: Reading, uniforms: Sequence[np.ndarray], hidden: Tensor | None) -> Scores:
    per_row = 1 + sum(len(ids) - 1 for ids in reading.labels)
    logits = logits.reshape(-1, per_row, logits.shape[-1])
    log_z = logits.logsumexp(-1)  # [N, per_row]
    columns, place = [], 1
    for ids in reading.labels:
        total = logits[:, 0, ids[0]] - log_z[:, 0]
        for token in ids[1:]:
            total = total + logits[:, place, token] - log_z[:, place]
            place += 1
        columns.append(total)
    at_answers = None if hidden is None else hidden.reshape(len(logits), per_row, -1)[:, 0]
    return Scores(
        label_logprobs=torch.stack(columns, -1),
        positions=torch.ones(len(logits), dtype=torch.long),
        completion_logprobs=logits.new_zeros(0),
        encoded=encode(logits[:, 0], reading.cache, torch.from_numpy(np.concatenate(uniforms)), at_answers),
    )
