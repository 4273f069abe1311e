"""What a student learns from score caches: distributions over the vocabulary at each token of an answer, and hidden states there.

The student reads its own prompt and the teacher's answer (if answers are labels, the prompt alone). Prompts differ, so positions are paired
by the answer's own tokens. Each (context, example) is a row. The mean over contexts of KL(teacher ‖ student) has the gradient of the KL to
their mean, so an ensemble of contexts needs no distribution of its own.

Hidden states are compared in standard deviations of the teacher's own states, dimension by dimension: in many models a few dimensions are a
hundred times larger than the others and would be the whole distance. The teacher's state has distance 0, its mean state 1. If widths
differ, a projection is learnt (1412.6550); it belongs to the training, not to the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.cache.distributions import Distributions, check_retained, decode, fit_vocabulary
from pipeline.cache.folder import CacheReader, check_belongs, described_task, read_cache
from pipeline.errors import MismatchError, UsageError
from pipeline.models.forward import packed_logits, plain_logits
from pipeline.models.packed import PackedModel, Row, tree_of
from pipeline.params import CacheParams
from pipeline.schema import NO_CONTEXT, SCORES, Example
from pipeline.students.data import StudentRow, shortest_and_longest
from pipeline.students.losses import Divergence
from pipeline.students.vocabulary_losses import divergence_nats, fused_divergence
from pipeline.task import EncoderTokens, TaskTokens

SAMPLE = 4096
"""Rows whose retained mass is checked, and whose states give the deviations of each dimension."""
LEAST_DEVIATION = 1e-3
"""Of a dimension, as a share of its layer's mean deviation: a dimension that hardly varies does not count beyond it."""


@dataclass(frozen=True)
class CachedRow(StudentRow):
    """One answer of a teacher, as a student reads it."""

    answer: tuple[int, ...]  # empty for labels, which have the one position behind the prompt
    number: int  # of the row in the cache

    @property
    def positions(self) -> int:
        """Distributions that are learnt."""
        return max(1, len(self.answer))

    @property
    def packed(self) -> Row:
        """The prompt, continued by the answer up to its last token."""
        return Row(self.ids, tree_of([self.answer]))


class TeacherCache:
    """A teacher's score cache, as a student of this task and tokenizer may learn from it."""

    def __init__(self, folder: Path, work: Path, tokens: TaskTokens, tokenizer_sha256: str, temperature: float = 1.0) -> None:
        """Raises MismatchError if the cache belongs to another task or tokenizer: its token ids would mean something else."""
        if isinstance(tokens, EncoderTokens):
            raise MismatchError(f"{folder}: a cache over a vocabulary, which an encoder does not have. It learns from a target set.")
        self._reader = CacheReader(folder, work, SCORES.names[SCORES.names.index("topk_ids") :])
        self.folder, self.temperature, manifest = folder, temperature, self._reader.manifest
        self.params = CacheParams.model_validate(manifest["cache"])
        reads_input = (manifest["task"]["completion"] or {}).get("source") == "input"
        self._tokens = TaskTokens(tokens.task.of_input_tokens(), tokens.tokenizer, tokens.limit) if reads_input else tokens
        self._content_free = set(manifest["content_free"])
        try:
            task = self._tokens.task
            wanted = {"task": described_task(task), "format": task.format, "tokenizer_sha256": tokenizer_sha256}
            check_belongs({"format": "plain", **manifest}, wanted, folder)
        except MismatchError as error:
            raise MismatchError(f"{error} A student with another tokenizer learns from a target set over the labels.") from None

    def rows(self, transfer: Sequence[Example]) -> list[CachedRow]:
        """The rows of all transfer examples, in the cache's order.

        Raises MismatchError if an example is not in the transfer set, UsageError if too little mass is left at the temperature.
        """
        keys = read_cache(self.folder, ("context_id", "example_id", "completion_ids")).rows.to_pylist()
        asked = {key["example_id"] for key in keys} - self._content_free
        examples = [example for example in transfer if example.example_id in asked]
        if not asked or len(examples) < len(asked):
            lacking = sorted(asked - {example.example_id for example in examples})
            fault = f"example {lacking[0]} is not in the transfer set" if lacking else "no rows to learn from"
            raise MismatchError(f"{self.folder}: {fault}. Run `dvc repro teacher@{self.folder.name}`.")
        prompts = dict(zip([example.example_id for example in examples], self._tokens.prompts(NO_CONTEXT, examples), strict=True))
        rows = [
            CachedRow(f"{key['context_id']}:{key['example_id']}", prompts[key["example_id"]].ids, tuple(key["completion_ids"]), number)
            for number, key in enumerate(keys)
            if key["example_id"] in asked
        ]
        check_retained(self.distributions(rows[:SAMPLE]), self.params, self.temperature)
        return rows

    def distributions(self, rows: Sequence[CachedRow]) -> Distributions:
        """The distributions at all positions of some rows, one row's after the other's."""
        return decode(self._reader.take([row.number for row in rows]), self.params, self.temperature)

    def hidden_states(self, rows: Sequence[CachedRow], layers: Sequence[int]) -> Tensor:
        """The hidden states of some of the kept layers at all positions of some rows, [P, layers, H] float32."""
        kept = self.params.hidden_layers
        positions = self._reader.take([row.number for row in rows])["hidden_states"].combine_chunks().flatten()
        values = torch.from_numpy(positions.flatten().to_numpy(zero_copy_only=False).astype(np.float32))
        return values.reshape(len(positions), len(kept), -1)[:, [kept.index(layer) for layer in layers]]


@dataclass(frozen=True)
class CacheTerm:
    """A summand of the objective: weight × mean divergence over a step's positions + hidden_weight × mean distance of hidden states."""

    divergence: Divergence
    weight: float
    batch_size: int
    rows: Sequence[CachedRow]
    cache: TeacherCache
    hidden_weight: float = 0.0
    layers: tuple[tuple[int, int], ...] = ()  # pairs of a teacher's layer, as the cache names it, and the student's


class Matching(nn.Module):
    """The distance of a student's hidden states to cached ones, with a projection for each pair of layers if widths differ."""

    mean: Tensor  # [pairs, H] of the teacher's states
    deviation: Tensor  # [pairs, H]

    def __init__(self, states: Tensor, student_width: int, seed: int) -> None:
        """`states` [P, pairs, H] are a sample of the teacher's, a layer for each pair."""
        super().__init__()
        deviation, mean = torch.std_mean(states.float(), 0, correction=0)
        least = LEAST_DEVIATION * deviation.mean(-1, keepdim=True)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("deviation", deviation.clamp_min(1e-12).maximum(least), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        self.projections = nn.ModuleList()
        for own_mean in mean:
            projection = nn.Identity() if student_width == len(own_mean) else nn.Linear(student_width, len(own_mean))
            if isinstance(projection, nn.Linear):
                nn.init.normal_(projection.weight, 0.0, student_width**-0.5, generator)
                projection.bias.data.copy_(own_mean)
            self.projections.append(projection)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The squared distance of each position in the teacher's variances, the mean over pairs and dimensions.

        student [P, pairs · width], side by side as hooks give them; teacher [P, pairs, H] → [P] float32, with a gradient.
        """
        states = student.float().reshape(len(student), len(self.mean), -1).unbind(1)
        own = torch.stack([projection(state) for projection, state in zip(self.projections, states, strict=True)], 1)
        return ((own - teacher.to(student.device)) / self.deviation).square().mean((-1, -2))


class CacheLoss:
    """A cache term's loss under a model. If the head is a linear layer and no more, logits are never held for all positions at once."""

    def __init__(self, model: PreTrainedModel, packed: PackedModel | None, term: CacheTerm, seed: int) -> None:
        """Raises UsageError if the student lacks a layer."""
        self.term, self.matching = term, None
        self._model, self._packed, self._head = model, packed, cast("Any", model.get_output_embeddings())
        pairs, config = term.layers if term.hidden_weight else (), model.config.get_text_config()
        self._theirs, self._own = ([pair[side] for pair in pairs] for side in (0, 1))
        depth = config.num_hidden_layers
        if wrong := [layer for layer in self._own if not -depth <= layer < depth]:
            where = f"students.*.auxiliary.{term.cache.folder.name}.layers"
            raise UsageError(f"{where}: the student has no layer {wrong[0]}; it has {depth}, 0 to {depth - 1}.")
        if term.hidden_weight:
            states = term.cache.hidden_states(term.rows[:SAMPLE], self._theirs)
            self.matching = Matching(states, config.hidden_size, seed).to(model.device)
        self.is_fused = False
        if isinstance(self._head, nn.Linear):  # and no scale or cap follows it
            probe = shortest_and_longest(term.rows)
            with torch.no_grad():
                expected = self._forward(probe)[0]
                self.is_fused = True
                self.is_fused = float((self._head(self._forward(probe)[0]) - expected).abs().max()) <= 1e-3

    def __call__(self, batch: Sequence[CachedRow], positions: int) -> Tensor:
        """Weight · Σ divergence / positions + hidden_weight · Σ distance / positions, nats, with a gradient.

        `positions` are those of the whole step, of which `batch` may be a piece.
        """
        term = self.term
        given, states = self._forward(batch, self._own)
        total = self._divergence(term.divergence, given, batch) * (term.weight / positions) if term.weight else given.new_zeros(())
        if self.matching is not None and states is not None:
            theirs = term.cache.hidden_states(batch, self._theirs)
            total = total + term.hidden_weight * self.matching(states, theirs).sum() / positions
        return total

    @torch.no_grad()
    def kl_nats(self, batch: Sequence[CachedRow]) -> float:
        """Σ KL(teacher ‖ student) over the positions of some rows, whatever the term's divergence is."""
        return float(self._divergence("kl", self._forward(batch)[0], batch))

    def _divergence(self, divergence: Divergence, given: Tensor, batch: Sequence[CachedRow]) -> Tensor:
        """Σ divergence over the positions; `given` is what `_forward` gave there."""
        head, cache = self._head, self.term.cache
        distributions = fit_vocabulary(cache.distributions(batch), len(head.weight)).to(given.device)
        if not self.is_fused:
            return divergence_nats(divergence, distributions, given, cache.temperature).sum()
        return fused_divergence(divergence, distributions, given, head.weight, head.bias, cache.temperature)

    def _forward(self, batch: Sequence[CachedRow], layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        """Logits [P, V], or the head's inputs [P, H] if the loss is fused, at the batch's positions; and `layers`' outputs there."""
        if self.is_fused:
            self._model.set_output_embeddings(nn.Identity())
        try:
            return logits_of(self._model, self._packed, [row.packed for row in batch], layers)
        finally:
            self._model.set_output_embeddings(self._head)


def logits_of(
    model: PreTrainedModel, packed: PackedModel | None, rows: Sequence[Row], layers: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None]:
    """Logits [P, V] at the rows' outputs and `layers`' outputs there, by the packed pass if there is one."""
    return plain_logits(model, rows, layers) if packed is None else packed_logits(packed, rows, layers=layers)
