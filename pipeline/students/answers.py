"""A student at the answer positions of cached rows: its divergence from the cached distributions, and its hidden states there."""

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.cache.distributions import fit_vocabulary
from pipeline.teachers.hidden import hidden_states
from pipeline.models.packed import PackedModel
from pipeline.models.rows import pack
from pipeline.students.cached import CachedRow, CacheTerm
from pipeline.students.forward import packed_if_exact
from pipeline.students.matching import Matching
from pipeline.students.objectives.fused import fused_divergence
from pipeline.students.objectives.vocabulary import divergence_nats

LIKELY = 1e-4
"""Probability from which on a token's is compared between the packed pass and the plain one."""


class AnswerForward:
    """The forward of one term: packed without padding where that is exact, else in batches of equal length.

    Where the head is a matrix and nothing follows it, logits are never held for all positions at once (`objectives.fused`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        term: CacheTerm,
        matching: Matching | None = None,
        chosen: tuple[PackedModel | None, str] | None = None,
    ) -> None:
        """`chosen` is what `choose_packed` found for several terms on this model; who asked it detaches the pass."""
        self.model, self.term, self.matching = model, term, matching
        self._plain_attention, self._owns = model.config._attn_implementation or "eager", chosen is None
        self.packed, why = choose_packed(model, [term]) if chosen is None else chosen
        self.fused = self.packed is not None and self._head_is_all(self.packed)
        self.why = f"{why}; {'the head and its loss chunk by chunk' if self.fused else 'logits of all positions'}"

    def describe(self) -> str:
        """How positions are reached, in a line."""
        return f"{'plain' if self.packed is None else 'packed'}: {self.why}"

    def detach(self) -> None:
        """Give the model back as it was."""
        if self.packed is not None and self._owns:
            self.packed.detach()
            self.model.set_attn_implementation(self._plain_attention)

    def loss(self, batch: Sequence[CachedRow], positions: int, term: CacheTerm | None = None) -> Tensor:
        """The term's weight · Σ divergence / `positions`, nats, with a gradient; `positions` are those of the whole step.

        Where hidden states are matched, their weight · Σ distance / `positions` is part of it.
        """
        term = term or self.term
        layers = term.hidden.student_layers if term.hidden is not None else []
        if self.fused:
            assert self.packed is not None
            given, states = self._hidden(self.packed, batch, layers)
        else:
            given, states = _plain(self.model, batch, layers) if self.packed is None else _packed(self.packed, batch, layers)
        total = self._divergence(given, batch, positions, term) if term.weight else given.new_zeros(())
        if states is not None and self.matching is not None and term.hidden is not None:
            distances = self.matching(states, term.source.hidden([row.row for row in batch]))
            total = total + term.hidden.weight * distances.sum() / positions
        return total

    def _divergence(self, given: Tensor, batch: Sequence[CachedRow], positions: int, term: CacheTerm) -> Tensor:
        """Of the logits at all positions, or where the loss is fused of what the head is given there."""
        distributions = fit_vocabulary(term.source.distributions([row.row for row in batch]), self._vocabulary).to(self.model.device)
        temperature = term.source.temperature
        if not self.fused:
            return term.weight * divergence_nats(term.divergence, distributions, given, temperature).sum() / positions
        head, weights = self._head, torch.full((len(given),), term.weight / positions, device=given.device)
        return fused_divergence(term.divergence, distributions, given, head.weight, head.bias, temperature=temperature, weights=weights)[0]

    @property
    def _head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[return-value]

    @property
    def _vocabulary(self) -> int:
        return int(self._head.weight.shape[0])

    def _hidden(self, packed: PackedModel, rows: Sequence[CachedRow], layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """The same, with what the head is given, [P, H], in place of logits."""
        head = self._head
        self.model.set_output_embeddings(nn.Identity())
        try:
            return _packed(packed, rows, layers)
        finally:
            self.model.set_output_embeddings(head)

    @torch.no_grad()
    def _head_is_all(self, packed: PackedModel) -> bool:
        """Whether logits are hidden · headᵀ (+ bias), with no scale or cap behind."""
        if not isinstance(self._head, nn.Linear):
            return False
        probe = _probe(self.term)
        given, expected = self._head(self._hidden(packed, probe)[0]), _packed(packed, probe)[0]
        return bool(((given - expected).abs().max() <= 1e-3).item())


def choose_packed(model: PreTrainedModel, terms: Sequence[CacheTerm]) -> tuple[PackedModel | None, str]:
    """A packed pass over `model` if it is exact on a few rows of every term, else None for all of them; and why.

    One training runs a model in one way: its attention is the packed one or its own. Compared are the log-probabilities of what is likelier
    than `LIKELY`: logits of whole vocabularies differ by rounding in more digits, and weigh nothing in a loss where they do.
    """
    probes = [_probe(term) for term in terms]
    with torch.no_grad():
        expected = [_plain(model, probe)[0].log_softmax(-1) for probe in probes]

    def difference(made: PackedModel) -> float:
        found = [_packed(made, probe)[0].log_softmax(-1) for probe in probes]
        return max(float((one - other).abs()[other > math.log(LIKELY)].max()) for one, other in zip(found, expected, strict=True))

    return packed_if_exact(model, difference)


def _probe(term: CacheTerm) -> list[CachedRow]:
    """The shortest row, a middle one, the longest."""
    ordered = sorted(term.examples, key=lambda row: (len(row.ids) + len(row.answer), row.example_id))
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def _packed(packed: PackedModel, rows: Sequence[CachedRow], layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
    """What follows the last layer at the answer positions, [P, V], and the outputs of `layers` there, side by side."""
    laid = pack([row.packed for row in rows], 0, packed.device)
    with hidden_states(packed.model, layers) as kept:
        logits, states = packed.logits(laid, []), kept.at(laid.outputs)
    return logits, None if states is None else states[0]


def _plain(model: PreTrainedModel, rows: Sequence[CachedRow], layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
    """Logits at the answer positions by the plain forward, rows of one shape together: [P, V] in the rows' order, and `layers`' outputs."""

    def shape(number: int) -> tuple[int, int]:
        return len(rows[number].ids), rows[number].positions

    found: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    for (_, positions), group in groupby(sorted(range(len(rows)), key=shape), key=shape):
        numbers = list(group)
        tokens = torch.tensor([[*rows[n].ids, *rows[n].answer[:-1]] for n in numbers], device=model.device)
        with hidden_states(model, layers) as kept:
            found |= dict(zip(numbers, model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits.float(), strict=True))
            if (own := kept.at(slice(-positions, None))) is not None:
                states |= dict(zip(numbers, own, strict=True))
    in_order = range(len(rows))
    return torch.cat([found[n] for n in in_order]), torch.cat([states[n] for n in in_order]) if states else None
