"""The training loop, for students and tuned teachers alike.

Float32, dropout off, AdamW, one packed forward a step. What comes out depends on model, terms and params alone: batches follow from
content, and a run that was interrupted goes on from its checkpoint to the same weights. With more than one term, each step takes a batch of
each: the labelled demonstrations are few, and a share of every step keeps their weight even.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.engine.scores import Completions
from pipeline.errors import ShotlessError
from pipeline.params import TuningParams
from pipeline.progress import progress
from pipeline.student.batches import Example, Order, Term
from pipeline.student.checkpoint import Checkpoint
from pipeline.student.forward import Forward, choose_forward, plain_log_probabilities, probe_rows
from pipeline.student.objectives import cross_entropy_nats, kl_nats
from pipeline.student.optimizer import adamw, clip_gradients, learning_rate, set_learning_rate
from pipeline.student.vocabulary import SmallVocabulary


@dataclass(frozen=True)
class Trained:
    """What a training did. The first three depend on its inputs alone."""

    losses: list[float]
    """Of each step, before its update; nats."""
    examples: int
    tokens: int
    """Read in all steps, with the tokens of long verbalisers."""
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
    checkpoint: Checkpoint | None = None,
) -> Trained:
    """Train all weights of `model` in place. `completions` are the token ids of each label's verbaliser, in the labels' order.

    Raises ShotlessError naming the step and the examples where a loss or gradient is not finite. The checkpoint, where given, stays until
    the caller removes it: the weights are not on disk yet when this returns.
    """
    model.eval().requires_grad_(True)
    rows = [example.ids for term in terms for example in term.examples]
    expected = plain_log_probabilities(model, completions, probe_rows(rows))
    small = _cut_vocabulary(model, completions, rows, expected)
    forward = choose_forward(model, small.completions, [small.ids(row) for row in probe_rows(rows)], expected)
    try:
        return _steps(model, small, forward, terms, params, title, checkpoint)
    finally:
        forward.detach()
        small.restore()


def _steps(
    model: PreTrainedModel,
    vocabulary: "_Vocabulary",
    forward: Forward,
    terms: Sequence[Term],
    params: TuningParams,
    title: str,
    checkpoint: Checkpoint | None,
) -> Trained:
    optimizer = adamw(model, params)
    orders = [Order(term, params.seed) for term in terms]
    losses = checkpoint.load(model, optimizer) if checkpoint is not None else []
    resumed_at = len(losses)
    branch_tokens = sum(len(ids) - 1 for ids in vocabulary.completions)

    def tokens_of(step: int) -> int:
        return sum(len(example.ids) + branch_tokens for order in orders for example in order.batch(step))

    started, done = time.monotonic(), 0
    with progress(title, params.steps, "steps") as meter:
        meter.advance(resumed_at, "resumed" if resumed_at else "")
        for step in range(resumed_at, params.steps):
            batches = [order.batch(step) for order in orders]
            set_learning_rate(optimizer, learning_rate(step, params))
            log_probabilities = forward.run([vocabulary.ids(example.ids) for batch in batches for example in batch])
            loss = objective(terms, batches, log_probabilities)
            value = float(loss.detach())
            _check_finite("loss", value, title, step, batches)
            loss.backward()
            _check_finite("norm of the gradient", clip_gradients(optimizer, params.max_grad_norm), title, step, batches)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # fresh pages for all gradients would cost 6 % of a step in page faults
            losses.append(value)
            done += tokens_of(step)
            meter.advance(1, f"loss {value:.4f}, {done / (time.monotonic() - started):,.0f} tokens/s")
            if checkpoint is not None and checkpoint.due() and step + 1 < params.steps:
                checkpoint.save(model, optimizer, losses)
    seconds = time.monotonic() - started
    return Trained(
        losses=losses,
        examples=params.steps * sum(term.batch_size for term in terms),
        tokens=sum(map(tokens_of, range(params.steps))),
        forward=f"{forward.name}: {forward.why}",
        resumed_at=resumed_at,
        seconds=seconds,
        tokens_per_second=done / seconds,
    )


def objective(terms: Sequence[Term], batches: Sequence[Sequence[Example]], log_probabilities: Tensor) -> Tensor:
    """Σ weight × mean loss of each term, nats. `log_probabilities` [B, L] has the terms' batches one after the other."""
    total = log_probabilities.new_zeros(())
    parts = log_probabilities.split([len(batch) for batch in batches])
    for term, batch, part in zip(terms, batches, parts, strict=True):
        if term.loss == "kl":
            loss = kl_nats(torch.tensor([example.target for example in batch], device=part.device), part)
        else:
            loss = cross_entropy_nats([example.label for example in batch], part)
        total = total + term.weight * loss.mean()
    return total


def _check_finite(what: str, value: float, title: str, step: int, batches: Sequence[Sequence[Example]]) -> None:
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
