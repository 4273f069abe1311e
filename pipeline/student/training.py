"""The training loop, for students and tuned teachers alike.

Float32, dropout off, AdamW, one packed forward a step, or several where `micro_batch` asks for less memory. What comes out depends on
model, terms and params alone: batches follow from content, and a run that was interrupted goes on from its checkpoint to the same weights.
With more than one term, each step takes a batch of each: the labelled demonstrations are few, and a share of every step keeps their weight
even.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ShotlessError
from pipeline.models.rows import Completions
from pipeline.params import TuningParams
from pipeline.progress import progress, rate
from pipeline.student.batches import Example, Order, Term, pieces
from pipeline.student.cached import AnswerForward, CachedRow, CacheTerm
from pipeline.student.checkpoint import Checkpoint
from pipeline.student.early_stopping import Best, HeldBack
from pipeline.student.forward import Forward, choose_forward, plain_log_probabilities, probe_rows
from pipeline.student.frozen import on_stored_states
from pipeline.student.head import on_stored_vectors
from pipeline.student.matching import attach as attach_matchings
from pipeline.student.matching import detach as detach_matchings
from pipeline.student.objectives import cross_entropy_nats, jensen_shannon_nats, kl_nats, reverse_kl_nats
from pipeline.student.optimizer import adamw, clip_gradients, learning_rate, set_learning_rate
from pipeline.student.tuning import Tuning, apply_tuning
from pipeline.student.vocabulary import SmallVocabulary

DIVERGENCES = {"kl": kl_nats, "reverse_kl": reverse_kl_nats, "jensen_shannon": jensen_shannon_nats}


@dataclass(frozen=True)
class Trained:
    """What a training did. All but the last three depend on its inputs alone."""

    losses: list[float]
    """Of each step, before its update; nats. Fewer than the params' steps where it stopped early."""
    looks: list[tuple[int, float]]
    """(steps done, mean KL to the targets of what is held back, nats); empty where nothing is."""
    best_step: int
    """Steps after which the weights were those that the model has now."""
    examples: int
    tokens: int
    """Read in all steps, with the tokens of long verbalisers."""
    trains: str
    """Which weights were learnt, in words."""
    trained_parameters: int
    forward: str
    """The forward pass that was used, and why."""
    resumed_at: int
    """Steps that an earlier, interrupted run had done."""
    seconds: float
    """Of this run's steps."""
    tokens_per_second: float


def train(
    model: PreTrainedModel,
    completions: Completions,
    terms: Sequence[Term],
    params: TuningParams,
    *,
    title: str,
    cached: Sequence[CacheTerm] = (),
    checkpoint: Checkpoint | None = None,
    held_back: HeldBack | None = None,
    adapter: tuple[Path, str] | None = None,
) -> Trained:
    """Train `model` in place; it is a plain model of its architecture before and after, whatever `params.tuning` is.

    `completions` are the token ids of each label's verbaliser, in the labels' order, for `terms` over the labels; `cached` are terms over
    the vocabulary or hidden states, to the first of which `held_back.cached` belongs; `adapter` is the folder where a LoRA adapter is kept
    and the base that it belongs to. Raises ShotlessError naming the step and the examples where a loss or gradient is not finite. The
    checkpoint, where given, stays until the caller removes it: the weights are not on disk yet when this returns.
    """
    model.eval()
    started = time.monotonic()
    if cached:
        trained, tuning = _train_on_caches(model, completions, terms, params, title, checkpoint, held_back, cached, started)
    else:
        trained, tuning = _train_on_labels(model, completions, terms, params, title, checkpoint, held_back, started)
    if adapter is not None:
        tuning.save_adapter(*adapter)
    tuning.merge()
    return trained


def _train_on_caches(
    model: PreTrainedModel,
    completions: Completions,
    terms: Sequence[Term],
    params: TuningParams,
    title: str,
    checkpoint: Checkpoint | None,
    held_back: HeldBack | None,
    cached: Sequence[CacheTerm],
    started: float,
) -> tuple[Trained, Tuning]:
    """Training with terms over the vocabulary or hidden states, which need the whole of it."""
    tuning = apply_tuning(model, params)
    matchings = attach_matchings(model, [term.hidden for term in cached], params.seed)
    answers: list[AnswerForward] = []
    labels = None
    try:
        for term, matching in zip(cached, matchings, strict=True):
            answers.append(AnswerForward(model, term, matching, answers[0].packed if answers else None))
        if terms:
            rows = [example.ids for term in terms for example in term.examples]
            labels = choose_forward(model, completions, rows, packed=answers[0].packed)
        whole = _Vocabulary(completions, None)
        return _Training(model, whole, labels, terms, params, held_back, title, checkpoint, answers).run(tuning, started), tuning
    finally:
        if labels is not None:
            labels.detach()
        for forward in answers:
            forward.detach()
        detach_matchings(model)


def _train_on_labels(
    model: PreTrainedModel,
    completions: Completions,
    terms: Sequence[Term],
    params: TuningParams,
    title: str,
    checkpoint: Checkpoint | None,
    held_back: HeldBack | None,
    started: float,
) -> tuple[Trained, Tuning]:
    """Training whose terms are all over the labels: what they do not need of the vocabulary is left out."""
    rows = [example.ids for term in terms for example in term.examples]
    rows += [example.ids for example in held_back.examples] if held_back is not None else []
    expected = plain_log_probabilities(model, completions, probe_rows(rows))
    tuning = apply_tuning(model, params)
    small = _cut_vocabulary(model, completions, rows, expected)
    probe = [small.ids(row) for row in probe_rows(rows)]
    forward = choose_forward(model, small.completions, probe, expected)
    try:
        if params.tuning == "head":
            taken = [small.ids(example.ids) for example in _taken(terms, params, held_back)]
            forward = on_stored_vectors(model, forward, small.completions, probe + taken, expected)
        elif params.freeze_layers:
            taken = [small.ids(example.ids) for example in _taken(terms, params, held_back)]
            forward = on_stored_states(forward, small.completions, probe + taken, expected, params.freeze_layers)
        return _Training(model, small, forward, terms, params, held_back, title, checkpoint).run(tuning, started), tuning
    finally:
        forward.detach()
        small.restore()


@dataclass
class _Training:
    """One training; its methods are the parts of a step."""

    model: PreTrainedModel
    vocabulary: "_Vocabulary"
    forward: Forward | None
    """None where no term is over the labels."""
    terms: Sequence[Term]
    params: TuningParams
    held_back: HeldBack | None
    title: str
    checkpoint: Checkpoint | None
    answers: Sequence[AnswerForward] = ()
    """For each term over the vocabulary or hidden states."""

    def run(self, tuning: Tuning, started: float) -> Trained:
        params, checkpoint = self.params, self.checkpoint
        optimizer = adamw(self.model, params)
        orders = [Order(term, params.seed) for term in self.terms]
        cached = [Order(forward.term, params.seed) for forward in self.answers]
        losses, saved = checkpoint.load(self.model, optimizer) if checkpoint is not None else ([], {})
        best, resumed_at, done = Best.of(saved), len(losses), 0
        branch_tokens = sum(len(ids) - 1 for ids in self.vocabulary.completions)
        if self.held_back is not None and not best.looks:
            best.add(self.model, 0, self._agreement(self.held_back, 0))

        def tokens_of(step: int) -> int:
            tokens = sum(len(example.ids) + branch_tokens for order in orders for example in order.batch(step))
            return tokens + sum(len(row.ids) + row.positions - 1 for order in cached for row in order.batch(step))

        with progress(self.title, params.steps, "steps") as meter:
            meter.advance(resumed_at, "resumed" if resumed_at else "")
            for step in range(resumed_at, params.steps):
                if self.held_back is not None and best.is_over(self.held_back.patience):
                    meter.advance(0, f"no better for {self.held_back.patience} looks: stopped early")
                    break
                set_learning_rate(optimizer, learning_rate(step, params))
                rows = [order.batch(step) for order in cached]
                losses.append(self._step(optimizer, [order.batch(step) for order in orders], rows, step))
                done += tokens_of(step)
                meter.advance(1, f"loss {losses[-1]:.4f}, {rate(done, time.monotonic() - started):,.0f} tokens/s")
                if self.held_back is not None and ((step + 1) % self.held_back.evaluate_every == 0 or step + 1 == params.steps):
                    best.add(self.model, step + 1, self._agreement(self.held_back, step + 1))
                if checkpoint is not None and checkpoint.due() and step + 1 < params.steps:
                    checkpoint.save(self.model, optimizer, losses, best.tensors())
        if checkpoint is not None and checkpoint.keeps_end and len(losses) > resumed_at:
            checkpoint.save(self.model, optimizer, losses, best.tensors())
        if best.looks:
            best.restore(self.model)
        seconds = time.monotonic() - started
        return Trained(
            losses=losses,
            looks=best.looks,
            best_step=best.looks[best.number][0] if best.looks else len(losses),
            examples=len(losses) * sum(term.batch_size for term in (*self.terms, *(forward.term for forward in self.answers))),
            tokens=sum(map(tokens_of, range(len(losses)))),
            trains=tuning.trains,
            trained_parameters=tuning.trained_parameters,
            forward="; ".join(forward.describe() for forward in (*self.answers, self.forward) if forward is not None),
            resumed_at=resumed_at,
            seconds=seconds,
            tokens_per_second=rate(done, seconds),
        )

    def _step(
        self, optimizer: torch.optim.Optimizer, batches: Sequence[Sequence[Example]], cached: Sequence[Sequence[CachedRow]], step: int
    ) -> float:
        """One update, of the gradients of all pieces; returns the loss before it. `cached` are rows for each of `answers`."""
        sizes, value = [len(batch) for batch in batches], 0.0
        for piece in pieces(batches, self.params.micro_batch):
            assert self.forward is not None
            log_probabilities = self.forward.run([self.vocabulary.ids(example.ids) for batch in piece for example in batch])
            value += self._backward(objective(self.terms, piece, log_probabilities, sizes), step, piece)
        for forward, rows in zip(self.answers, cached, strict=True):
            positions, size = sum(row.positions for row in rows), self.params.micro_batch or len(rows)
            for start in range(0, len(rows), size):
                piece = rows[start : start + size]
                value += self._backward(forward.loss(piece, positions), step, [piece])
        norm = clip_gradients(optimizer, self.params.max_grad_norm)
        _check_finite("norm of the gradient", norm, self.title, step, [*batches, *cached])
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # fresh pages for all gradients would cost 6 % of a step in page faults
        return value

    def _backward(self, loss: Tensor, step: int, examples: Sequence[Sequence[Example | CachedRow]]) -> float:
        value = float(loss.detach())
        _check_finite("loss", value, self.title, step, examples)
        loss.backward()
        return value

    @torch.no_grad()
    def _agreement(self, held_back: HeldBack, steps_done: int) -> float:
        """Mean KL to the targets of what is held back, nats."""
        size = self.params.micro_batch or self.params.batch_size
        if held_back.cached:
            return self._answers_agreement(self.answers[0], held_back, size, steps_done)
        assert self.forward is not None
        ordered = sorted(held_back.examples, key=lambda example: (len(example.ids), example.example_id))
        total = 0.0
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            log_probabilities = self.forward.run([self.vocabulary.ids(example.ids) for example in batch])
            kl = kl_nats(_targets(batch, log_probabilities), log_probabilities)
            _check_finite("KL to the targets of what is held back", float(kl.sum()), self.title, steps_done, [batch])
            total += float(kl.double().sum())
        return total / len(ordered)

    def _answers_agreement(self, answers: AnswerForward, held_back: HeldBack, size: int, steps_done: int) -> float:
        """The same over the positions of cached answers."""
        measure = replace(answers.term, divergence="kl", weight=1.0, hidden=None)
        ordered = sorted(held_back.cached, key=lambda row: (len(row.ids) + row.positions, row.example_id))
        positions, total = sum(row.positions for row in ordered), 0.0
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            total += float(answers.loss(batch, positions, measure))
            _check_finite("KL to the targets of what is held back", total, self.title, steps_done, [batch])
        return total


def objective(
    terms: Sequence[Term], batches: Sequence[Sequence[Example]], log_probabilities: Tensor, sizes: Sequence[int] | None = None
) -> Tensor:
    """Σ weight × mean loss of each term, nats. `log_probabilities` [B, L] has the terms' batches one after the other.

    `sizes` are the terms' examples in the whole step where `batches` are a piece of it: the values of all pieces then add up to the step's.
    """
    total = log_probabilities.new_zeros(())
    parts = log_probabilities.split([len(batch) for batch in batches])
    for term, batch, part, size in zip(terms, batches, parts, sizes or map(len, batches), strict=True):
        if not batch:
            continue
        if term.loss == "cross_entropy":
            loss = cross_entropy_nats([example.label for example in batch], part)
        else:
            loss = DIVERGENCES[term.loss](_targets(batch, part), part)
            if term.label_weight:
                total = total + term.label_weight * (cross_entropy_nats([example.label for example in batch], part).sum() / size)
        total = total + term.weight * (loss.sum() / size)
    return total


def _taken(terms: Sequence[Term], params: TuningParams, held_back: HeldBack | None) -> list[Example]:
    """Every example that some step takes, and what is held back."""
    orders = [Order(term, params.seed) for term in terms]
    taken = [example for order in orders for step in range(params.steps) for example in order.batch(step)]
    return taken + list(held_back.examples if held_back is not None else ())


def _targets(batch: Sequence[Example], like: Tensor) -> Tensor:
    return torch.tensor([example.target for example in batch], device=like.device)


def _check_finite(what: str, value: float, title: str, step: int, batches: Sequence[Sequence[Example | CachedRow]]) -> None:
    if not math.isfinite(value):
        ids = ", ".join(example.example_id for batch in batches for example in batch)
        raise ShotlessError(
            f"{title}: the {what} is {value} at step {step + 1}, on examples {ids}. Lower `learning_rate` or `max_grad_norm`, "
            "or lengthen `warmup`; if it is the first step, look at these examples and at the base model's weights."
        )


class _Vocabulary:
    """The tokens that training sees: all of them, or the small vocabulary."""

    def __init__(self, completions: Completions, small: SmallVocabulary | None) -> None:
        self._small = small
        self.completions = completions if small is None else [small.ids(ids) for ids in completions]

    def ids(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens if self._small is None else self._small.ids(tokens)

    def restore(self) -> None:
        if self._small is not None:
            self._small.restore()


def _cut_vocabulary(model: PreTrainedModel, completions: Completions, rows: Sequence[Sequence[int]], expected: Tensor) -> _Vocabulary:
    """The small vocabulary where it is exact: single-token labels, and a model that gives the same numbers with it."""
    whole = _Vocabulary(completions, None)
    if any(len(ids) > 1 for ids in completions):
        return whole
    small = SmallVocabulary.cut(model, [token for ids in (*rows, *completions) for token in ids])
    cut = _Vocabulary(completions, small)
    found = plain_log_probabilities(model, cut.completions, [cut.ids(row) for row in probe_rows(rows)])
    if torch.allclose(found, expected, rtol=0, atol=1e-4):
        return cut
    small.restore()
    return whole
