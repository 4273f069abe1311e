"""The steps of a training: batches, gradients, updates, looks at what is held back, checkpoints.

With more than one term, each step takes a batch of each: the labelled demonstrations are few, and a share of every step keeps their weight
even.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ShotlessError
from pipeline.models.rows import Completions
from pipeline.params import TuningParams
from pipeline.progress import progress, rate
from pipeline.students.answers import AnswerForward
from pipeline.students.batches import Example, Order, Term, pieces
from pipeline.students.cached import CachedRow, CacheTerm
from pipeline.students.checkpoint import Checkpoint
from pipeline.students.early_stopping import Best, HeldBack
from pipeline.students.forward import Forward
from pipeline.students.gradients import MatrixGradients
from pipeline.students.objective import objective, targets_of
from pipeline.students.objectives import kl_nats
from pipeline.students.optimizer import adamw, clip_gradients, learning_rate, set_learning_rate
from pipeline.students.processes import Processes
from pipeline.students.tokens_seen import Vocabulary
from pipeline.students.tuning import Tuning


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


@dataclass(frozen=True)
class Plan:
    """What `train` was asked for."""

    completions: Completions
    terms: Sequence[Term]
    params: TuningParams
    title: str
    cached: Sequence[CacheTerm]
    checkpoint: Checkpoint | None
    held_back: HeldBack | None
    processes: Processes
    started: float

    @property
    def rows(self) -> list[Sequence[int]]:
        """Token ids of everything over the labels that the model reads."""
        rows: list[Sequence[int]] = [example.ids for term in self.terms for example in term.examples]
        return rows + [example.ids for example in (self.held_back.examples if self.held_back is not None else ())]

    def taken(self) -> list[Example]:
        """Every example that some step of this process takes, and its share of what is held back."""
        orders = [Order(term, self.params.seed) for term in self.terms]
        share = self.processes.share
        taken = [example for order in orders for step in range(self.params.steps) for example in share(order.batch(step))]
        return taken + (share(_by_length(self.held_back.examples)) if self.held_back is not None else [])


@dataclass
class Training:
    """One training; its methods are the parts of a step."""

    model: PreTrainedModel
    vocabulary: Vocabulary
    forward: Forward | None
    """None where no term is over the labels."""
    plan: Plan
    answers: Sequence[AnswerForward] = ()
    """For each term over the vocabulary or hidden states."""
    matrices: MatrixGradients = field(init=False)

    def run(self, tuning: Tuning) -> Trained:
        """All steps that are still to do; the model then has the weights that are kept."""
        self.matrices = MatrixGradients(self.model)
        try:
            return self._run(tuning)
        finally:
            self.matrices.detach()

    def _run(self, tuning: Tuning) -> Trained:
        plan, params, held_back = self.plan, self.plan.params, self.plan.held_back
        checkpoint, started, first = plan.checkpoint, plan.started, plan.processes.first
        optimizer = adamw(self.model, params)
        orders = [Order(term, params.seed) for term in plan.terms]
        cached = [Order(forward.term, params.seed) for forward in self.answers]
        losses, saved = checkpoint.load(self.model, optimizer) if checkpoint is not None else ([], {})
        best, resumed_at, done = Best.of(saved), len(losses), 0
        plan.processes.agree("steps that an earlier run had done", resumed_at)
        branch_tokens = sum(len(ids) - 1 for ids in self.vocabulary.completions)
        if held_back is not None and not best.looks:
            best.add(self.model, 0, self._agreement(held_back, 0))

        def tokens_of(step: int) -> int:
            tokens = sum(len(example.ids) + branch_tokens for order in orders for example in order.batch(step))
            return tokens + sum(len(row.ids) + row.positions - 1 for order in cached for row in order.batch(step))

        with progress(plan.title, params.steps, "steps") as meter:
            meter.advance(resumed_at, "resumed" if resumed_at else "")
            for step in range(resumed_at, params.steps):
                if held_back is not None and best.is_over(held_back.patience):
                    meter.advance(0, f"no better for {held_back.patience} looks: stopped early")
                    break
                set_learning_rate(optimizer, learning_rate(step, params))
                rows = [order.batch(step) for order in cached]
                losses.append(self._step(optimizer, [order.batch(step) for order in orders], rows, step))
                done += tokens_of(step)
                meter.advance(1, f"loss {losses[-1]:.4f}, {rate(done, time.monotonic() - started):,.0f} tokens/s")
                if held_back is not None and ((step + 1) % held_back.evaluate_every == 0 or step + 1 == params.steps):
                    best.add(self.model, step + 1, self._agreement(held_back, step + 1))
                if checkpoint is not None and first and checkpoint.due() and step + 1 < params.steps:
                    checkpoint.save(self.model, optimizer, losses, best.tensors())
        if checkpoint is not None and first and checkpoint.keeps_end and len(losses) > resumed_at:
            checkpoint.save(self.model, optimizer, losses, best.tensors())
        if best.looks:
            best.restore(self.model)
        seconds = time.monotonic() - started
        return Trained(
            losses=losses,
            looks=best.looks,
            best_step=best.looks[best.number][0] if best.looks else len(losses),
            examples=len(losses) * sum(term.batch_size for term in (*plan.terms, *(forward.term for forward in self.answers))),
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
        plan, processes = self.plan, self.plan.processes
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.matrices.forget(trained)  # kept, not freed: fresh pages for all gradients would cost 6 % of a step in page faults
        sizes, value = [len(batch) for batch in batches], 0.0
        for piece in pieces([processes.share(batch) for batch in batches], plan.params.micro_batch):
            assert self.forward is not None
            log_probabilities = self.forward.run([self.vocabulary.ids(example.ids) for batch in piece for example in batch])
            value += self._backward(objective(plan.terms, piece, log_probabilities, sizes), step, piece)
        for forward, rows in zip(self.answers, cached, strict=True):
            positions, own = sum(row.positions for row in rows), processes.share(rows)
            size = plan.params.micro_batch or max(1, len(own))
            for start in range(0, len(own), size):
                piece = own[start : start + size]
                value += self._backward(forward.loss(piece, positions), step, [piece])
        self.matrices.settle()
        processes.add_gradients(trained)
        norm = clip_gradients(optimizer, plan.params.max_grad_norm)
        _check_finite("norm of the gradient", norm, plan.title, step, [*batches, *cached])
        optimizer.step()
        return processes.total(value)

    def _backward(self, loss: Tensor, step: int, examples: Sequence[Sequence[Example | CachedRow]]) -> float:
        value = float(loss.detach())
        _check_finite("loss", value, self.plan.title, step, examples)
        loss.backward()
        return value

    @torch.no_grad()
    def _agreement(self, held_back: HeldBack, steps_done: int) -> float:
        """Mean KL to the targets of what is held back, nats; each process reads its share."""
        size = self.plan.params.micro_batch or self.plan.params.batch_size
        if held_back.cached:
            return self._answers_agreement(self.answers[0], held_back, size, steps_done)
        assert self.forward is not None
        ordered = self.plan.processes.share(_by_length(held_back.examples))
        total = 0.0
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            log_probabilities = self.forward.run([self.vocabulary.ids(example.ids) for example in batch])
            kl = kl_nats(targets_of(batch, log_probabilities), log_probabilities)
            _check_finite("KL to the targets of what is held back", float(kl.sum()), self.plan.title, steps_done, [batch])
            total += float(kl.double().sum())
        return self.plan.processes.total(total) / len(held_back.examples)

    def _answers_agreement(self, answers: AnswerForward, held_back: HeldBack, size: int, steps_done: int) -> float:
        """The same over the positions of cached answers."""
        measure = replace(answers.term, divergence="kl", weight=1.0, hidden=None)
        ordered = sorted(held_back.cached, key=lambda row: (len(row.ids) + row.positions, row.example_id))
        positions, total = sum(row.positions for row in ordered), 0.0
        ordered = self.plan.processes.share(ordered)
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            total += float(answers.loss(batch, positions, measure))
            _check_finite("KL to the targets of what is held back", total, self.plan.title, steps_done, [batch])
        return self.plan.processes.total(total)


def _by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: (len(example.ids), example.example_id))


def _check_finite(what: str, value: float, title: str, step: int, batches: Sequence[Sequence[Example | CachedRow]]) -> None:
    if not math.isfinite(value):
        ids = ", ".join(example.example_id for batch in batches for example in batch)
        raise ShotlessError(
            f"{title}: the {what} is {value} at step {step + 1}, on examples {ids}. Lower `learning_rate` or `max_grad_norm`, "
            "or lengthen `warmup`; if it is the first step, look at these examples and at the base model's weights."
        )
