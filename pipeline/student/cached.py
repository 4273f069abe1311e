"""Learning a teacher's distributions over the vocabulary, at every token of its answers, from the score cache.

The student reads the bare query and the answer that the teacher gave (or, where answers are labels, the query alone), and at each of the
answer's positions its distribution is drawn to the cached one. Prompts differ, so positions are paired by the answer's own tokens: the
answer of a row stands in the cache, and the student is asked in front of each of its tokens, wherever that is in its prompt.

Every (context, example) is a row to learn from. The mean over contexts of KL(teacher in a context ‖ student) has the gradient of the KL to
their mean, so an ensemble of contexts needs no distribution of its own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.cache.distributions import Distributions, check_retained, decode, fit_vocabulary
from pipeline.cache.folder import read_cache
from pipeline.cache.reader import CacheReader
from pipeline.engine.hidden import hidden_states
from pipeline.errors import MismatchError
from pipeline.models.packed import PackedModel
from pipeline.models.rows import Row, pack, rows_of
from pipeline.params import CacheParams
from pipeline.places import Place
from pipeline.schema import examples, read_table
from pipeline.student.forward import packed_if_exact
from pipeline.student.matching import HiddenLesson, Matching, states_of
from pipeline.student.objectives.fused import fused_divergence
from pipeline.student.objectives.vocabulary import Divergence, divergence_nats
from pipeline.tasks import TaskTokens

POSITIONS_CHECKED = 4096
"""Positions whose retained mass is weighed before training."""
LIKELY = 1e-4
"""Probability from which on a token's is compared between the packed pass and the plain one."""


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
    """0: hidden states alone are learnt."""
    batch_size: int
    examples: tuple[CachedRow, ...]
    source: "CachedTeacher"
    hidden: HiddenLesson | None = None


class CachedTeacher:
    """The distributions of one score cache, as a student of this task and tokenizer may learn them."""

    def __init__(self, folder: Place, work: Path, tokens: TaskTokens, tokenizer_sha256: str, temperature: float) -> None:
        self._reader = CacheReader(folder, work)
        self.manifest = self._reader.manifest
        self.folder, self.temperature = folder, temperature
        self.fingerprint: str = self.manifest["fingerprint_sha256"]
        self.params = CacheParams.model_validate(self.manifest["fingerprint"]["cache"])
        self._check(tokens, tokenizer_sha256)

    def _check(self, tokens: TaskTokens, tokenizer_sha256: str) -> None:
        """Raise MismatchError where the cache is of another task or tokenizer: its token ids would mean something else."""
        found = self.manifest["fingerprint"]
        task = (tokens.task.of_texts() if self.reads_texts else tokens.task).params
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

    @property
    def reads_texts(self) -> bool:
        """Whether its rows are the inputs themselves, token by token."""
        return (self.manifest["fingerprint"]["completion"] or {}).get("source") == "text"

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
        if self.reads_texts:
            prompts = {example: ids[:1] for example, ids in prompts.items()}
        prefix = tokens.prefix_ids("")
        return tuple(
            CachedRow(
                f"{key['context_id']}:{key['example_id']}", (*prefix, *prompts[key["example_id"]]), tuple(key["completion_ids"]), number
            )
            for number, key in ((n, keys[n]) for n in numbers)
        )

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """The hidden states at all positions of some rows, [P, kept layers, H] float32."""
        return states_of(self._reader.take(rows)["hidden_states"].to_pylist(), max(1, len(self.params.hidden_layers)))

    def hidden_lesson(self, weight: float, pairs: Sequence[tuple[int, int]], rows: Sequence[CachedRow], where: str) -> HiddenLesson:
        """What is to be matched, scaled by a sample of `rows`."""
        kept, sample = self.params.hidden_layers, [row.row for row in rows[:POSITIONS_CHECKED]]
        return HiddenLesson.of(weight, pairs, kept, self.hidden(sample) if kept else torch.zeros(1, 1, 1), where)

    def distributions(self, rows: Sequence[int]) -> Distributions:
        """The distributions at all positions of some rows, one row's after the other's."""
        return decode(self._reader.take(rows), self.params, self.temperature)


class AnswerForward:
    """A student at the answer positions of cached rows: packed without padding where that is exact, else in batches of equal length.

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
