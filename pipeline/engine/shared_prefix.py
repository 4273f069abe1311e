"""The fast engine: a context is read once, and all its queries attend to that one copy.

Cost for a context of P tokens and N queries of Q tokens is P + N·Q tokens of model work instead of N·(P + Q); only attention to the
context still grows with P. See `pipeline.models.packed`.
"""

from collections.abc import Sequence

import torch

from pipeline.engine.batches import plan_batches
from pipeline.engine.hidden import hidden_states
from pipeline.engine.scores import Reading, Scores, read_scores
from pipeline.models.packed import LayerKeyValues, PackedModel
from pipeline.models.rows import Completions, pack


class SharedPrefixEngine:
    """Scores by packed passes of at most `token_budget` tokens. Remembers the last context's keys and values."""

    name = "shared_prefix"

    def __init__(self, model: PackedModel, reading: Reading, token_budget: int) -> None:
        self.model = model
        self.reading = reading
        self.token_budget = token_budget
        self._context: tuple[tuple[int, ...], list[LayerKeyValues]] | None = None

    @torch.inference_mode()
    def score(self, context: Sequence[int], queries: Sequence[Sequence[int]], answers: Completions | None = None) -> Scores:
        """Scores of `queries`, each behind `context`, in order; `answers` are the rows' own."""
        prefix = self._read(tuple(context))
        rows = self.reading.rows(queries, answers)
        uniforms = self.reading.uniforms(context, queries, answers)
        batches = plan_batches([row.length for row in rows], self.token_budget)
        parts = []
        for batch in batches:
            packed = pack([rows[number] for number in batch], start=len(context), device=self.model.device)
            with hidden_states(self.model.model, self.reading.cache.hidden_layers) as hidden:
                logits = self.model.logits(packed, prefix)
            own = None if answers is None else [answers[number] for number in batch]
            states = hidden.at(packed.outputs)
            at_outputs = None if states is None else states[0]
            parts.append(read_scores(logits, self.reading, own, [uniforms[number] for number in batch], at_outputs))
        order = torch.tensor([number for batch in batches for number in batch])
        return Scores.concatenate(parts).take(order.argsort())

    def _read(self, context: tuple[int, ...]) -> list[LayerKeyValues]:
        if self._context is None or self._context[0] != context:
            self._context = None  # frees the old one before the new one is made
            self._context = (context, self.model.read_context(context))
        return self._context[1]
