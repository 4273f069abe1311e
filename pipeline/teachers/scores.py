"""What an engine is asked and what it returns: the one place where logits become log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.encodings import DRAWN, Encoded, encode
from pipeline.models.rows import Completions, Row, rows_of
from pipeline.params import CacheParams
from pipeline.schema import Prompt

LABELS_ONLY = CacheParams(encoding="top_k", top_k=1)
"""The least that is kept: for callers who want the labels' log-probabilities and no more."""


@dataclass(frozen=True)
class Scores:
    """Scores of N prompts: L labels at one answer position each, or an own answer with a position for each token; P positions in all."""

    label_logprobs: Tensor  # [N, L] float32 nats, summed over a verbaliser's tokens; L is 0 for free answers
    positions: Tensor  # [N] int64, answer positions of each prompt
    completion_logprobs: Tensor  # [P] float32 nats, of free answers' tokens; empty for labels
    encoded: Encoded  # of all positions, one prompt's after the other's

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
    """What is read of each prompt: log-probabilities of all labels, or of the prompt's own answer; and what is kept of distributions."""

    labels: Completions = ()
    """Token ids of the verbalisers; empty if each prompt has an answer of its own."""
    cache: CacheParams = LABELS_ONLY

    def row(self, prompt: Prompt, start: int = 0) -> Row:
        """A prompt without its first `start` tokens, with the branches that continue it."""
        return rows_of([prompt.ids[start:]], self.labels if prompt.answer is None else [prompt.answer])[0]

    def uniforms(self, prompt: Prompt) -> np.ndarray:
        """The random numbers of a prompt's positions, from its hash; zeros if nothing is drawn."""
        count = 1 if prompt.answer is None else len(prompt.answer)
        return np.random.default_rng(int(prompt.prompt_sha[:16], 16)).random(count) if self.cache.encoding in DRAWN else np.zeros(count)


def read_scores(logits: Tensor, reading: Reading, prompts: Sequence[Prompt], hidden: Tensor | None = None) -> Scores:
    """Scores from the logits of the prompts' rows: for each its answer position, then every branch token, [Σ(1 + branch tokens), V].

    `hidden` [the same, D] are the kept layers' outputs there. For labels the answer position alone is kept; for own answers all are. Either
    all prompts have an answer, or none has.
    """
    logits = logits.float()
    uniforms = torch.from_numpy(np.concatenate([reading.uniforms(prompt) for prompt in prompts]))
    answers = [prompt.answer for prompt in prompts if prompt.answer is not None]
    if not answers:
        return _label_scores(logits, reading, uniforms, hidden)
    encoded = encode(logits, reading.cache, uniforms, hidden)
    tokens = torch.tensor([token for answer in answers for token in answer], device=logits.device)
    return Scores(
        label_logprobs=logits.new_zeros(len(answers), 0),
        positions=torch.tensor([len(answer) for answer in answers]),
        completion_logprobs=logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - encoded.log_z,
        encoded=encoded,
    )


def _label_scores(logits: Tensor, reading: Reading, uniforms: Tensor, hidden: Tensor | None) -> Scores:
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
        encoded=encode(logits[:, 0], reading.cache, uniforms, at_answers),
    )
