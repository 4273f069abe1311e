"""The engine for every causal model: full prompts, as plain transformers runs them, in batches of equal length.

Nothing is padded and nothing is cached, so it holds for sliding windows, state-space layers and any other architecture. It pays for the
context once for every query; it is the reference that the fast engine is compared with.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.teachers.hidden import hidden_states
from pipeline.teachers.scores import Reading, Scores, read_scores
from pipeline.models.rows import Completions


class GenericEngine:
    """Scores full prompts, `token_budget` tokens or one prompt a pass."""

    name = "generic"

    def __init__(self, model: PreTrainedModel, reading: Reading, token_budget: int) -> None:
        self.model = model
        self.reading = reading
        self.token_budget = token_budget

    @torch.inference_mode()
    def score(self, context: Sequence[int], queries: Sequence[Sequence[int]], answers: Completions | None = None) -> Scores:
        """Scores of `queries`, each behind `context`, in order; `answers` are the rows' own."""
        uniforms = self.reading.uniforms(context, queries, answers)
        prompts = [[*context, *query] for query in queries]

        def kind(number: int) -> tuple[int, int]:  # rows of one kind share a pass
            return len(prompts[number]), 0 if answers is None else len(answers[number])

        order = sorted(range(len(prompts)), key=kind)
        parts = []
        for (length, answer), group in groupby(order, key=kind):
            numbers = list(group)
            size = max(1, self.token_budget // (length + answer))
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                own = None if answers is None else [answers[number] for number in batch]
                parts.append(self._score_batch([prompts[number] for number in batch], own, [uniforms[number] for number in batch]))
        return Scores.concatenate(parts).take(torch.tensor(order).argsort())

    def _score_batch(self, prompts: list[list[int]], answers: Completions | None, uniforms: list[np.ndarray]) -> Scores:
        """Prompts of one length, with answers of one length. A label of n tokens costs one more pass, which reads its first n - 1."""
        if answers is not None:
            logits, hidden = self._last([[*p, *answer[:-1]] for p, answer in zip(prompts, answers, strict=True)], len(answers[0]))
            return read_scores(logits.flatten(0, 1), self.reading, answers, uniforms, None if hidden is None else hidden.flatten(0, 1))
        passes = [self._last(prompts, 1)]
        passes += [self._last([prompt + list(ids[:-1]) for prompt in prompts], len(ids) - 1) for ids in self.reading.labels if len(ids) > 1]
        logits = torch.cat([logits for logits, _ in passes], 1).flatten(0, 1)
        states = [hidden for _, hidden in passes if hidden is not None]
        return read_scores(logits, self.reading, None, uniforms, torch.cat(states, 1).flatten(0, 1) if states else None)

    def _last(self, prompts: list[list[int]], positions: int) -> tuple[Tensor, Tensor | None]:
        """Logits [B, positions, V] and kept states [B, positions, D] at the last positions."""
        tokens = torch.tensor(prompts, dtype=torch.long, device=self.model.device)
        with hidden_states(self.model, self.reading.cache.hidden_layers) as hidden:
            logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits
        return logits, hidden.at(slice(-positions, None))
