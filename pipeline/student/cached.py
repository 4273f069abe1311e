"""Learning a teacher's distributions over the vocabulary, at every token of its answers, from the score cache.

The student reads the bare query and the answer that the teacher gave (or, where answers are labels, the query alone), and at each of the
answer's positions its distribution is drawn to the cached one. Prompts differ, so positions are paired by the answer's own tokens: the
answer of a row stands in the cache, and the student is asked in front of each of its tokens, wherever that is in its prompt.

Every (context, example) is a row to learn from. The mean over contexts of KL(teacher in a context ‖ student) has the gradient of the KL to
their mean, so an ensemble of contexts needs no distribution of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.cache.distributions import Distributions, check_retained, decode, fit_vocabulary
from pipeline.cache.folder import read_cache
from pipeline.cache.reader import CacheReader
from pipeline.errors import MismatchError
from pipeline.models.packed import PackedModel
from pipeline.models.rows import Row, pack, rows_of
from pipeline.params import CacheParams
from pipeline.schema import examples, read_table
from pipeline.student.forward import packed_if_exact
from pipeline.student.objectives.fused import fused_divergence
from pipeline.student.objectives.vocabulary import Divergence, divergence_nats
from pipeline.tasks import TaskTokens

POSITIONS_CHECKED = 4096
"""Positions whose retained mass is weighed before training."""


@dataclass(frozen=True)
class CachedRow:
    """One answer of the teacher to learn."""

    example_id: str
    """Of context and example: a row's own."""
    ids: tuple[int, ...]
    """The student's prompt."""
    answer: tuple[int, ...]
    """The answer's tokens; empty where answers are labels, which have the one position behind the prompt."""
    row: int
    """In the cache."""

    @property
    def positions(self) -> int:
        """Distributions that belong to it."""
        return max(1, len(self.answer))

    @property
    def packed(self) -> Row:
        """The prompt, continued by the answer up to its last token."""
        return rows_of([self.ids], [self.answer])[0]


@dataclass(frozen=True)
class CacheTerm:
    """A summand of the objective: weight × mean divergence to cached distributions over the positions of a step."""

    divergence: Divergence
    weight: float
    batch_size: int
    examples: tuple[CachedRow, ...]
    source: "CachedTeacher"


class CachedTeacher:
    """The distributions of one score cache, as a student of this task and tokenizer may learn them."""

    def __init__(self, folder: Path, work: Path, tokens: TaskTokens, tokenizer_sha256: str, temperature: float) -> None:
        self._reader = CacheReader(folder, work)
        self.manifest = self._reader.manifest
        self.folder, self.temperature = folder, temperature
        self.fingerprint: str = self.manifest["fingerprint_sha256"]
        self.params = CacheParams.model_validate(self.manifest["fingerprint"]["cache"])
        self._check(tokens, tokenizer_sha256)

    def _check(self, tokens: TaskTokens, tokenizer_sha256: str) -> None:
        """Raise MismatchError where the cache is of another task or tokenizer: its token ids would mean something else."""
        found, task = self.manifest["fingerprint"], tokens.task.params
        wanted = {
            "tokenizer": tokenizer_sha256,
            "template": task.template,
            "verbalisers": dict(task.verbalisers),
            "completion": task.answering,
        }
        different = [
            f"  {key}: the cache has {found[key]!r}, this student {value!r}" for key, value in wanted.items() if found[key] != value
        ]
        if different:
            raise MismatchError(
                f"{self.folder}: its distributions are over another tokenizer's ids, or belong to another task:\n"
                + "\n".join(different)
                + "\nA student of another family learns from a target set over the labels (`learn_from: targets/NAME`)."
            )

    def lessons(self, transfer_file: Path, tokens: TaskTokens) -> tuple[CachedRow, ...]:
        """The rows to learn from, in the cache's order.

        Raises MismatchError where an example is not in the transfer set, UsageError where too little mass is left at the temperature.
        """
        fields = {row["example_id"]: row for row in read_table(transfer_file, examples(tokens.task.fields)).to_pylist()}
        free = set(self.manifest["content_free"])
        keys = read_cache(self.folder, ["context_id", "example_id", "completion_ids"]).rows.to_pylist()
        numbers = [number for number, key in enumerate(keys) if key["example_id"] not in free]
        unknown = next((keys[n]["example_id"] for n in numbers if keys[n]["example_id"] not in fields), None)
        if unknown is not None or not numbers:
            what = "has no rows" if unknown is None else f"example {unknown} is not in {transfer_file}"
            raise MismatchError(f"{self.folder}: {what}; run `dvc repro teacher@{self.folder.name}`.")
        check_retained(self.distributions(numbers[:POSITIONS_CHECKED]), self.params, self.temperature)
        asked = {keys[n]["example_id"]: tokens.task.query(fields[keys[n]["example_id"]]) for n in numbers}
        prompts = dict(zip(asked, tokens.query_ids(list(asked.values())), strict=True))
        prefix = tokens.prefix_ids("")
        return tuple(
            CachedRow(
                f"{key['context_id']}:{key['example_id']}", (*prefix, *prompts[key["example_id"]]), tuple(key["completion_ids"]), number
            )
            for number, key in ((n, keys[n]) for n in numbers)
        )

    def distributions(self, rows: Sequence[int]) -> Distributions:
        """The distributions at all positions of some rows, one row's after the other's."""
        return decode(self._reader.take(rows), self.params, self.temperature)


class AnswerForward:
    """A student at the answer positions of cached rows: packed without padding where that is exact, else in batches of equal length.

    Where the head is a matrix and nothing follows it, logits are never held for all positions at once (`objectives.fused`).
    """

    def __init__(self, model: PreTrainedModel, term: CacheTerm) -> None:
        self.model, self.term = model, term
        ordered = sorted(term.examples, key=lambda row: (len(row.ids) + len(row.answer), row.example_id))
        probe = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
        with torch.no_grad():
            expected = _plain_logits(model, probe)
        plain_attention = model.config._attn_implementation or "eager"
        self.packed, why = packed_if_exact(model, lambda packed: float((self._logits(packed, probe) - expected).abs().max()))
        self._plain_attention = plain_attention
        self.fused = self.packed is not None and self._head_is_all(self.packed, probe, expected)
        self.why = f"{why}; {'the head and its loss chunk by chunk' if self.fused else 'logits of all positions'}"

    def describe(self) -> str:
        """How positions are reached, in a line."""
        return f"{'plain' if self.packed is None else 'packed'}: {self.why}"

    def detach(self) -> None:
        """Give the model back as it was."""
        if self.packed is not None:
            self.packed.detach()
            self.model.set_attn_implementation(self._plain_attention)

    def loss(self, batch: Sequence[CachedRow], positions: int, term: CacheTerm | None = None) -> Tensor:
        """The term's weight · Σ divergence / `positions`, nats, with a gradient; `positions` are those of the whole step."""
        term = term or self.term
        distributions = fit_vocabulary(term.source.distributions([row.row for row in batch]), self._vocabulary).to(self.model.device)
        temperature = term.source.temperature
        if not self.fused:
            logits = _plain_logits(self.model, batch) if self.packed is None else self._logits(self.packed, batch)
            return term.weight * divergence_nats(term.divergence, distributions, logits, temperature).sum() / positions
        assert self.packed is not None
        hidden, head = self._hidden(self.packed, batch), self._head
        weights = torch.full((len(hidden),), term.weight / positions, device=hidden.device)
        return fused_divergence(term.divergence, distributions, hidden, head.weight, head.bias, temperature=temperature, weights=weights)[0]

    @property
    def _head(self) -> nn.Linear:
        return self.model.get_output_embeddings()  # type: ignore[return-value]

    @property
    def _vocabulary(self) -> int:
        return int(self._head.weight.shape[0])

    def _logits(self, packed: PackedModel, rows: Sequence[CachedRow]) -> Tensor:
        return packed.logits(pack([row.packed for row in rows], 0, packed.device), [])

    def _hidden(self, packed: PackedModel, rows: Sequence[CachedRow]) -> Tensor:
        """What the head is given at the answer positions, [P, H]."""
        head = self._head
        self.model.set_output_embeddings(nn.Identity())
        try:
            return self._logits(packed, rows)
        finally:
            self.model.set_output_embeddings(head)

    @torch.no_grad()
    def _head_is_all(self, packed: PackedModel, probe: Sequence[CachedRow], expected: Tensor) -> bool:
        """Whether logits are hidden · headᵀ (+ bias), with no scale or cap behind."""
        if not isinstance(self._head, nn.Linear):
            return False
        return bool(((self._head(self._hidden(packed, probe)) - expected).abs().max() <= 1e-3).item())


def _plain_logits(model: PreTrainedModel, rows: Sequence[CachedRow]) -> Tensor:
    """Logits at the answer positions by the plain forward, rows of one shape together, [P, V] in the rows' order."""

    def shape(number: int) -> tuple[int, int]:
        return len(rows[number].ids), rows[number].positions

    found: dict[int, Any] = {}
    for (_, positions), group in groupby(sorted(range(len(rows)), key=shape), key=shape):
        numbers = list(group)
        tokens = torch.tensor([[*rows[n].ids, *rows[n].answer[:-1]] for n in numbers], device=model.device)
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits.float()
        found |= dict(zip(numbers, logits, strict=True))
    return torch.cat([found[number] for number in range(len(rows))])
