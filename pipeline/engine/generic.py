"""The engine for every causal model: full prompts, as plain transformers runs them, in batches of equal length.

Nothing is padded and nothing is cached, so it holds for sliding windows, state-space layers and any other architecture. It pays for the
context once for every query; it is the reference that the fast engine is compared with.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine.scores import Completions, Scores, read_scores


class GenericEngine:
    """Scores full prompts, `token_budget` tokens or one prompt a pass."""

    name = "generic"

    def __init__(self, model: PreTrainedModel, completions: Completions, top_k: int, token_budget: int) -> None:
        self.model = model
        self.completions = completions
        self.top_k = top_k
        self.token_budget = token_budget

    @torch.inference_mode()
    def score(self, context: Sequence[int], queries: Sequence[Sequence[int]]) -> Scores:
        """Scores of `queries`, each behind `context`, in order."""
        prompts = [[*context, *query] for query in queries]
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        parts = []
        for length, group in groupby(order, key=lambda number: len(prompts[number])):
            numbers = list(group)
            size = max(1, self.token_budget // length)
            for start in range(0, len(numbers), size):
                parts.append(self._score_batch([prompts[number] for number in numbers[start : start + size]]))
        return Scores.concatenate(parts).take(torch.tensor(order).argsort())

    def _score_batch(self, prompts: list[list[int]]) -> Scores:
        """Prompts of one length. A completion of n tokens costs one more pass, which reads its first n - 1."""
        logits = [self._last_logits(prompts, 1)]  # each [B, positions, V]
        logits += [
            self._last_logits([prompt + list(ids[:-1]) for prompt in prompts], len(ids) - 1) for ids in self.completions if len(ids) > 1
        ]
        return read_scores(torch.cat(logits, 1).flatten(0, 1), self.completions, self.top_k)

    def _last_logits(self, prompts: list[list[int]], positions: int) -> Tensor:
        tokens = torch.tensor(prompts, dtype=torch.long, device=self.model.device)
        return self.model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits
