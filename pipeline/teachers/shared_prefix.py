"""The fast engine: a context is read once, and all its queries attend to that one copy.

Cost for a context of P tokens and N queries of Q tokens is P + N·Q tokens of model work instead of N·(P + Q); only attention to the
context still grows with P. Tokens that all queries begin with (a template's or an instruction's) are read once too, behind the context.
See `pipeline.models.packed`.
"""

from collections.abc import Sequence

import torch

from pipeline.teachers.batches import plan_batches, shared_head
from pipeline.teachers.hidden import hidden_states
from pipeline.teachers.scores import Reading, Scores, read_scores
from pipeline.models.attention import LayerKeyValues
from pipeline.models.context import ContextKeys
from pipeline.models.packed import PackedModel
from pipeline.models.rows import Completions, pack

WORTH_A_CONTEXT = 8
"""Tokens of a head for which it is read as a context where there is none: attending to one costs every layer a few passes over memory."""
ROOM_FOR_HEADS = 64
"""Tokens of room kept behind a context, so that another head does not make it be read again."""


class SharedPrefixEngine:
    """Scores by packed passes of at most `token_budget` tokens. Remembers the last context's keys and values."""

    name = "shared_prefix"

    def __init__(self, model: PackedModel, reading: Reading, token_budget: int) -> None:
        self.model = model
        self.reading = reading
        self.token_budget = token_budget
        self._read: tuple[tuple[int, ...], ContextKeys] | None = None

    @torch.inference_mode()
    def score(self, context: Sequence[int], queries: Sequence[Sequence[int]], answers: Completions | None = None) -> Scores:
        """Scores of `queries`, each behind `context`, in order; `answers` are the rows' own."""
        head = shared_head(queries) if len(queries) > 1 else 0
        if not context and head < WORTH_A_CONTEXT:
            head = 0
        start = len(context) + head
        prefix = self._prefix(tuple(context), queries[0][:head])
        rows = self.reading.rows([query[head:] for query in queries], answers)
        uniforms = self.reading.uniforms(context, queries, answers)
        batches = plan_batches([row.length for row in rows], self.token_budget)
        parts = []
        for batch in batches:
            packed = pack([rows[number] for number in batch], start, device=self.model.device)
            with hidden_states(self.model.model, self.reading.cache.hidden_layers) as hidden:
                logits = self.model.logits(packed, prefix)
            own = None if answers is None else [answers[number] for number in batch]
            states = hidden.at(packed.outputs)
            at_outputs = None if states is None else states[0]
            parts.append(read_scores(logits, self.reading, own, [uniforms[number] for number in batch], at_outputs))
        order = torch.tensor([number for batch in batches for number in batch])
        return Scores.concatenate(parts).take(order.argsort())

    def _prefix(self, context: tuple[int, ...], head: Sequence[int]) -> list[LayerKeyValues]:
        """Keys and values of the context, which is read unless it was the last call's, and of the head behind it."""
        held = self._read
        if held is None or held[0] != context or held[1].capacity < len(context) + len(head):
            held = self._read = None  # frees the old one before the new one is made
            keys = self.model.room_for(len(context) + max(len(head), ROOM_FOR_HEADS))
            self.model.read_on(keys, context)
            held = self._read = (context, keys)
        keys = held[1]
        keys.length = len(context)  # forgets the last call's head
        self.model.read_on(keys, head)
        return keys.layers()
