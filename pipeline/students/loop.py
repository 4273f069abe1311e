"""Training a model on what it is to learn: the forward pass, the steps, validation, checkpoints.

Float32, dropout off, AdamW. What comes out depends on model, terms and params alone: batches follow from content, and an interrupted run
goes on from its checkpoint to the same bytes. With several terms each step takes a batch of each: the labelled demonstrations are few, and a
share of every step keeps their weight even. With `validation`, the weights of the best step are kept; gold labels play no part in it.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ShotlessError
from pipeline.models.cpu_kernels import MatrixGradients
from pipeline.models.forward import TOLERANCE_NATS, packed_if_exact
from pipeline.models.packed import PackedModel
from pipeline.models.rows import Completions, rows_of
from pipeline.params import TuningParams
from pipeline.progress import progress, rate
from pipeline.students.auxiliary import MATCHING, CachedRow, CacheLoss, CacheTerm, Matching, attach_matchings, logits_of
from pipeline.students.checkpoint import Checkpoint, Reached
from pipeline.students.data import Batches, LabelTerm, StudentRow, TargetRow, micro_batches, shortest_and_longest
from pipeline.students.losses import kl_nats, label_log_probabilities, objective, targets_of
from pipeline.students.processes import ALONE, Processes
from pipeline.students.small_vocabulary import SmallVocabulary
from pipeline.students.tuning import adamw, apply_tuning, clip_gradients, learning_rate

LIKELY_NATS = math.log(1e-4)
"""Log-probability from which a token of the vocabulary is compared between two passes: less likely ones weigh nothing in a loss."""


@dataclass(frozen=True)
class Validation:
    """Rows that choose the step: of the label terms, or of the first cache term."""

    rows: Sequence[TargetRow] | Sequence[CachedRow]
    every: int
    """Steps between two validations; there is one before the first step and one after the last, too."""
    patience: int | None
    """Validations without an improvement that end the training; None: it runs through."""


@dataclass(frozen=True)
class Outcome:
    """What a training did. All but the last three depend on its inputs alone."""

    reached: Reached
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
    label_terms: Sequence[LabelTerm],
    params: TuningParams,
    *,
    title: str,
    cache_terms: Sequence[CacheTerm] = (),
    validation: Validation | None = None,
    checkpoint: Checkpoint | None = None,
    adapter: tuple[Path, str] | None = None,
    processes: Processes = ALONE,
) -> Outcome:
    """Train `model` in place; it is a plain model of its architecture before and after, whatever `params.tuning` is.

    `completions` are the token ids of each label's verbaliser. `adapter` is the folder where a LoRA adapter is kept, and the base that it
    belongs to. Of several `processes` each trains a model of its own, to the same weights. Raises ShotlessError naming the step and the
    examples if a loss or gradient is not finite. The checkpoint stays until the caller removes it: the weights are not on disk yet.
    """
    model.eval()
    tuning = apply_tuning(model, params)
    matchings = attach_matchings(model, cache_terms, params.seed)
    label_rows = [row for term in label_terms for row in term.rows]
    label_rows += [row for row in (validation.rows if validation is not None else ()) if isinstance(row, TargetRow)]
    forward = StudentForward(model, completions, label_rows, cache_terms)
    try:
        losses = [CacheLoss(model, forward.packed, term, matching) for term, matching in zip(cache_terms, matchings, strict=True)]
        steps = _Steps(model, forward, label_terms, losses, params, title, validation, processes)
        outcome = steps.run(checkpoint, tuning.trains, tuning.trained_parameters)
    finally:
        forward.detach()
        delattr(model, MATCHING)
    if adapter is not None and processes.first:
        tuning.save_adapter(*adapter)
    tuning.merge()
    return outcome


class StudentForward:
    """A student's forward pass in training: prompts in, label log-probabilities out, with a gradient.

    Losses over single-token labels alone use a small vocabulary. The pass is packed, without padding, if it gives the plain forward's numbers
    on a few rows of every term; else rows of equal length run together.
    """

    def __init__(
        self, model: PreTrainedModel, completions: Completions, label_rows: Sequence[TargetRow], cache_terms: Sequence[CacheTerm] = ()
    ) -> None:
        self._model, self._completions = model, completions
        self._small: SmallVocabulary | None = None
        self._attention = model.config._attn_implementation or "eager"
        self._label_probe = shortest_and_longest(label_rows) if label_rows else []
        self._cache_probe = [row.packed for term in cache_terms for row in shortest_and_longest(term.rows)]
        self._expected = self._probed(None)
        if not cache_terms and all(len(ids) == 1 for ids in completions):
            self._small = SmallVocabulary(model, [token for ids in (*(row.ids for row in label_rows), *completions) for token in ids])
            if not self._difference(None) <= TOLERANCE_NATS:
                self._small.restore()
                self._small = None
        self.packed, reason = packed_if_exact(model, self._difference, TOLERANCE_NATS)
        self.description = f"{'plain' if self.packed is None else 'packed'}: {reason}"

    def label_log_probabilities(self, rows: Sequence[TargetRow]) -> Tensor:
        """Log-probabilities of the labels among each other, [B, L] nats."""
        return self._labels(self.packed, rows)

    def detach(self) -> None:
        """Give the model back as it was, with the trained weights."""
        if self.packed is not None:
            self.packed.detach()
            self._model.set_attn_implementation(self._attention)
        if self._small is not None:
            self._small.restore()

    def _labels(self, packed: PackedModel | None, rows: Sequence[TargetRow]) -> Tensor:
        small, ids, completions = self._small, [row.ids for row in rows], self._completions
        if small is not None:
            ids, completions = [small.ids(one) for one in ids], [small.ids(one) for one in completions]
        return label_log_probabilities(logits_of(self._model, packed, rows_of(ids, completions))[0], completions)

    @torch.no_grad()
    def _probed(self, packed: PackedModel | None) -> list[Tensor]:
        labels = [self._labels(packed, self._label_probe)] if self._label_probe else []
        cached = [logits_of(self._model, packed, self._cache_probe)[0].float().log_softmax(-1)] if self._cache_probe else []
        return labels + cached

    def _difference(self, packed: PackedModel | None) -> float:
        """The largest difference of a label's or a likely token's log-probability from the plain forward of the whole model, nats."""
        found, expected = self._probed(packed), self._expected
        compared = [torch.ones_like(expected[0], dtype=torch.bool)] if self._label_probe else []
        compared += [expected[-1] > LIKELY_NATS] if self._cache_probe else []
        triples = zip(found, expected, compared, strict=True)
        return max(float((one - other).abs()[mask].max()) for one, other, mask in triples)


@dataclass
class _Steps:
    """The steps of one training."""

    model: PreTrainedModel
    forward: StudentForward
    label_terms: Sequence[LabelTerm]
    cache_losses: Sequence[CacheLoss]
    params: TuningParams
    title: str
    validation: Validation | None
    processes: Processes

    def run(self, checkpoint: Checkpoint | None, trains: str, trained_parameters: int) -> Outcome:
        """All steps that are still to do. The model then has the weights that are kept."""
        started, params, processes, validation = time.monotonic(), self.params, self.processes, self.validation
        labels = [Batches(term.rows, term.batch_size, params.seed) for term in self.label_terms]
        cached = [Batches(loss.term.rows, loss.term.batch_size, params.seed) for loss in self.cache_losses]
        per_row = self.forward.tokens_of_labels
        self.optimizer = adamw(self.model, params)
        reached = checkpoint.load(self.model, self.optimizer) if checkpoint is not None else Reached()
        resumed_at, seen = len(reached.losses), 0
        processes.check_same("steps that an earlier run had done", resumed_at)
        if validation is not None and not reached.validations:
            reached.validated(self.model, self._validate(validation, 0))

        def tokens_of(step: int) -> int:
            return sum(row.tokens + per_row for order in labels for row in order.at(step)) + sum(row.tokens for order in cached for row in order.at(step))

        self.matrices = MatrixGradients(self.model)
        try:
            with progress(self.title, params.steps, "steps") as meter:
                meter.advance(resumed_at, "resumed" if resumed_at else "")
                for step in range(resumed_at, params.steps):
                    if validation is not None and reached.is_over(validation.patience):
                        meter.advance(0, f"no better in {validation.patience} validations: stopped early")
                        break
                    for group in self.optimizer.param_groups:
                        group["lr"] = learning_rate(step, params)
                    reached.losses.append(self._step(step, [order.at(step) for order in labels], [order.at(step) for order in cached]))
                    seen += tokens_of(step)
                    meter.advance(1, f"loss {reached.losses[-1]:.4f}, {rate(seen, time.monotonic() - started):,.0f} tokens/s")
                    if validation is not None and ((step + 1) % validation.every == 0 or step + 1 == params.steps):
                        reached.validated(self.model, self._validate(validation, step + 1))
                    if checkpoint is not None and processes.first and checkpoint.due() and step + 1 < params.steps:
                        checkpoint.save(self.model, self.optimizer, reached)
        finally:
            self.matrices.detach()
        steps = len(reached.losses)
        if checkpoint is not None and processes.first and checkpoint.keeps_end and steps > resumed_at:
            checkpoint.save(self.model, self.optimizer, reached)
        reached.restore_best(self.model)
        return Outcome(
            reached=reached,
            examples=steps * sum(term.batch_size for term in (*self.label_terms, *(loss.term for loss in self.cache_losses))),
            tokens=sum(map(tokens_of, range(steps))),
            trains=trains,
            trained_parameters=trained_parameters,
            forward=self.forward.description + ("; the head and its loss in chunks" if any(loss.is_fused for loss in self.cache_losses) else ""),
            resumed_at=resumed_at,
            seconds=(seconds := time.monotonic() - started),
            tokens_per_second=rate(seen, seconds),
        )

    def _step(self, step: int, labels: Sequence[Sequence[TargetRow]], cached: Sequence[Sequence[CachedRow]]) -> float:
        """One update, of the gradients of all pieces; returns the loss before it."""
        share, micro_batch, value = self.processes.share, self.params.micro_batch, 0.0
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        self.matrices.forget(weights)  # kept, not freed: fresh pages for all gradients would cost 6 % of a step
        for piece in micro_batches([share(batch) for batch in labels], micro_batch):
            log_probabilities = self.forward.label_log_probabilities([row for batch in piece for row in batch])
            loss = objective(self.label_terms, piece, log_probabilities, [len(batch) for batch in labels])
            value += self._backward(loss, step, [row for batch in piece for row in batch])
        for cache_loss, rows in zip(self.cache_losses, cached, strict=True):
            own = share(rows)
            for start in range(0, len(own), micro_batch or max(1, len(own))):
                piece = own[start : start + (micro_batch or len(own))]
                value += self._backward(cache_loss(piece, sum(row.positions for row in rows)), step, piece)
        self.matrices.settle()
        self.processes.add_gradients(weights)
        norm = clip_gradients(weights, self.params.max_grad_norm)
        self._check_finite("norm of the gradient", norm, step, [row for batch in (*labels, *cached) for row in batch])
        self.optimizer.step()
        return self.processes.total(value)

    def _backward(self, loss: Tensor, step: int, rows: Sequence[StudentRow]) -> float:
        value = float(loss.detach())
        self._check_finite("loss", value, step, rows)
        loss.backward()
        return value

    @torch.no_grad()
    def _validate(self, validation: Validation, steps_done: int) -> float:
        """Mean KL to the targets of the validation rows (for cached rows over their positions), nats; each process reads its share."""
        rows = self.processes.share(sorted(validation.rows, key=lambda row: (row.tokens, row.example_id)))
        size, total = self.params.micro_batch or self.params.batch_size, 0.0
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            labels, cached = [row for row in batch if isinstance(row, TargetRow)], [row for row in batch if isinstance(row, CachedRow)]
            if labels:
                log_probabilities = self.forward.label_log_probabilities(labels)
                value = float(kl_nats(targets_of(labels, log_probabilities), log_probabilities).double().sum())
            else:
                value = self.cache_losses[0].kl_nats(cached)
            self._check_finite("KL to the validation targets", value, steps_done, batch)
            total += value
        return self.processes.total(total) / sum(row.positions if isinstance(row, CachedRow) else 1 for row in validation.rows)

    def _check_finite(self, what: str, value: float, step: int, rows: Sequence[StudentRow]) -> None:
        if not math.isfinite(value):
            raise ShotlessError(
                f"{self.title}: the {what} is {value} at step {step + 1}, on examples {', '.join(row.example_id for row in rows)}. Lower "
                "`learning_rate` or `max_grad_norm`, or lengthen `warmup`; if it is the first step, look at these examples and at the base "
                "model's weights."
            )
