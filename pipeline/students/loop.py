"""Training a model on what it is to learn: the forward pass, the steps, validation, checkpoints.

Float32, dropout off, AdamW. What comes out depends on model, terms and params alone: batches follow from content, and an interrupted run
goes on from its checkpoint to the same bytes. With several terms each step takes a batch of each: demonstrations are few, and a share of
every step keeps their weight even. With a validation, the weights of the best step are kept; gold labels play no part in it.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import ShotlessError
from pipeline.models.folders import is_encoder, label_layer
from pipeline.models.forward import TOLERANCE_NATS, packed_if_exact
from pipeline.models.packed import Completions, PackedModel, Row, tree_of
from pipeline.params import TuningParams
from pipeline.progress import progress, rate
from pipeline.students.auxiliary import CachedRow, CacheLoss, CacheTerm, logits_of
from pipeline.students.checkpoint import Checkpoint, Reached
from pipeline.students.data import Batches, LabelTerm, StudentRow, TargetRow, micro_batches, shortest_and_longest
from pipeline.students.losses import contrast, label_divergence, label_log_probabilities, objective, targets_of
from pipeline.students.processes import ALONE, Processes
from pipeline.students.tuning import Tuning, adamw, apply_tuning, fit_label_layer, learning_rate

UNLIKELY_NATS = math.log(1e-4)
"""Two passes are not compared on tokens of a lower log-probability: these weigh nothing in a loss."""
MOST_PADDED = 1.4
"""Times its own length that an encoder's row is padded to, at most: a padding token costs as much as another."""


@dataclass(frozen=True)
class Validation:
    """Rows of the label terms, or of the first cache term, that choose the step.

    There is a validation before the first step, one `every` so many steps, and one after the last. `patience` of them without an
    improvement end the training; None: it runs through.
    """

    rows: Sequence[StudentRow]
    every: int
    patience: int | None


@dataclass(frozen=True)
class Outcome:
    """What a training did. `resumed_at` are steps of an interrupted run, `seen` and `seconds` are tokens and time of this one."""

    reached: Reached
    tokens: int  # read in all steps, with the tokens of long verbalisers
    tuning: Tuning
    forward: str  # the forward pass that was used, and why
    resumed_at: int
    seen: int
    seconds: float


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
    rows = [row for one in (*label_terms, validation) if one is not None for row in one.rows]
    forward = StudentForward(model, completions, [row for row in rows if isinstance(row, TargetRow)], cache_terms)
    try:
        losses = [CacheLoss(model, forward.packed, term, params.seed) for term in cache_terms]
        model.add_module("matching", nn.ModuleList(loss.matching for loss in losses if loss.matching is not None))  # learnt with it
        outcome = _Steps(model, forward, label_terms, losses, params, title, validation, processes).run(tuning, checkpoint)
        delattr(model, "matching")
        if params.tuning == "contrastive":
            [term] = label_terms
            with torch.no_grad():
                ordered = sorted(term.rows, key=lambda row: row.tokens)
                embeddings = torch.cat([forward.embeddings(rows) for [rows] in micro_batches([ordered], params.batch_size)])
            outcome.reached.losses.append(fit_label_layer(model, embeddings, [row.label for row in ordered]))
    finally:
        forward.detach()
    if adapter is not None and processes.first:
        tuning.save_adapter(*adapter)
    tuning.merge()
    return outcome


@torch.no_grad()
def answers(model: PreTrainedModel, completions: Completions, rows: Sequence[TargetRow], size: int) -> tuple[np.ndarray, np.ndarray]:
    """A trained model's answers, `size` rows in a pass: log-probabilities of the labels among each other, [N, L] nats float32, and the last
    layer's outputs at the answer position, [N, H] float16.
    """
    forward, order = StudentForward(model, completions, rows), sorted(range(len(rows)), key=lambda number: rows[number].tokens)
    try:
        found = [forward.answers(piece) for [piece] in micro_batches([[rows[number] for number in order]], size)]
    finally:
        forward.detach()
    places = np.argsort(order)
    scores, states = (torch.cat(parts).cpu().numpy()[places] for parts in zip(*found, strict=True))
    return scores, states.clip(-65504, 65504).astype(np.float16)


class SmallVocabulary:
    """A model whose embeddings have the rows of some tokens alone, until `restore`. Tied matrices stay tied, frozen ones frozen.

    With losses over single-token labels, an embedding row has a gradient only if its token occurs in a row that is learnt, or is a label.
    Adam leaves the others as they are: their moments stay zero, and embeddings get no weight decay here. Without them, SmolLM2-135M has a
    fifth less of parameters, gradients and moments in memory and in every step, and MiniLM half less. A token's number among the kept ones
    is its place in `token_ids` sorted.
    """

    def __init__(self, model: PreTrainedModel, token_ids: Iterable[int]) -> None:
        self._kept = sorted(set(token_ids))
        self._numbers = {token: number for number, token in enumerate(self._kept)}
        self._embedding: Any = model.get_input_embeddings()
        self._full: list[tuple[nn.Module, str, nn.Parameter]] = []
        small: dict[int, nn.Parameter] = {}
        for module in filter(None, dict.fromkeys([self._embedding, model.get_output_embeddings()])):
            for name, full in list(module.named_parameters(recurse=False)):
                self._full.append((module, name, full))
                rows = small.setdefault(id(full), nn.Parameter(full.detach()[self._kept].clone(), full.requires_grad))
                setattr(module, name, rows)
        self._padding_idx = getattr(self._embedding, "padding_idx", None)
        if self._padding_idx is not None:  # its gradient is masked; a padding token that does not occur needs no mask
            self._embedding.padding_idx = self._numbers.get(self._padding_idx)

    def ids(self, tokens: Sequence[int]) -> list[int]:
        """Token ids as numbers of kept rows."""
        return [self._numbers[token] for token in tokens]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the trained rows into the full matrices, and those back into the model."""
        for module, name, full in self._full:
            full.data[self._kept] = getattr(module, name).detach()
            setattr(module, name, full)
        if self._padding_idx is not None:
            self._embedding.padding_idx = self._padding_idx


class StudentForward:
    """A student's forward pass in training: prompts in, label log-probabilities out, with a gradient.

    Losses over single-token labels alone use a small vocabulary. The pass is packed if it gives the plain forward's numbers on a few rows
    of every term; else it is the plain one.
    """

    def __init__(
        self, model: PreTrainedModel, completions: Completions, label_rows: Sequence[TargetRow], cache_terms: Sequence[CacheTerm] = ()
    ) -> None:
        self._model, self._completions = model, completions
        self.branch_tokens = len(tree_of(completions).tokens)  # that it reads for each row over the labels
        self._small: SmallVocabulary | None = None
        self._label_probe = shortest_and_longest(label_rows) if label_rows else []
        self._cache_probe = [row.packed for term in cache_terms for row in shortest_and_longest(term.rows)]
        self.packed: PackedModel | None = None
        self._is_encoder = is_encoder(model.config)
        self._expected = self._probed()
        if not cache_terms and not self.branch_tokens:
            # an encoder's completions are numbers of labels; its padding keeps its number, which some families find positions by
            others = [range((model.config.pad_token_id or 0) + 1)] if self._is_encoder else completions
            self._small = SmallVocabulary(model, [token for ids in (*(row.ids for row in label_rows), *others) for token in ids])
            if not self._difference(None) <= TOLERANCE_NATS:
                self._small.restore()
                self._small = None
        if self._is_encoder:
            self.description = f"plain: an encoder, rows padded to at most {MOST_PADDED} times their length"
            return
        self.packed, reason = packed_if_exact(model, self._difference)
        self.description = f"{'plain' if self.packed is None else 'packed'}: {reason}"

    def label_log_probabilities(self, rows: Sequence[TargetRow]) -> Tensor:
        """Log-probabilities of the labels among each other, [B, L] nats."""
        return self._in_groups(rows, lambda own: self._scored(own)[0])

    def answers(self, rows: Sequence[TargetRow]) -> tuple[Tensor, Tensor]:
        """The same of rows of about the same length, and the last layer's outputs at the answer position, [B, H]."""
        scores, states = self._scored(rows, (-1,))
        assert states is not None
        return scores, states.unflatten(0, (len(rows), -1))[:, 0]

    def _scored(self, rows: Sequence[TargetRow], layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        ids_of: Callable[[Sequence[int]], Sequence[int]] = tuple if self._small is None else self._small.ids
        tree = tree_of(self._completions if self._is_encoder else [ids_of(ids) for ids in self._completions])
        inputs = [Row(ids_of(row.ids), tree) for row in rows]
        logits, states = logits_of(self._model, self.packed, inputs, layers)
        return label_log_probabilities(logits, tree), states

    def embeddings(self, rows: Sequence[TargetRow]) -> Tensor:
        """What an encoder's last layer makes logits of, [B, H]."""
        caught: list[Tensor] = []
        handle = label_layer(self._model).register_forward_pre_hook(lambda _layer, given: caught.append(given[0]))

        def caught_from(own: Sequence[TargetRow]) -> Tensor:
            self._scored(own)
            return caught.pop()

        try:
            return self._in_groups(rows, caught_from)
        finally:
            handle.remove()

    def _in_groups(self, rows: Sequence[TargetRow], computed: Callable[[Sequence[TargetRow]], Tensor]) -> Tensor:
        """What is computed of rows, in their order. An encoder's rows are padded, so those of about the same length share a pass."""
        if not self._is_encoder:
            return computed(rows)
        order, groups = sorted(range(len(rows)), key=lambda number: rows[number].tokens), list[list[int]]()
        for number in order:
            if not groups or rows[number].tokens > MOST_PADDED * rows[groups[-1][0]].tokens:
                groups.append([])
            groups[-1].append(number)
        return torch.cat([computed([rows[number] for number in group]) for group in groups])[torch.tensor(order).argsort()]

    def detach(self) -> None:
        """Give the model back as it was, with the trained weights."""
        if self.packed is not None:
            self.packed.detach()
        if self._small is not None:
            self._small.restore()

    @torch.no_grad()
    def _probed(self) -> list[Tensor]:
        """Log-probabilities of the labels, and of the vocabulary, of the probes."""
        labels = [self.label_log_probabilities(self._label_probe)] if self._label_probe else []
        cached = [logits_of(self._model, self.packed, self._cache_probe)[0].float().log_softmax(-1)] if self._cache_probe else []
        return labels + [one.clamp_min(UNLIKELY_NATS) for one in cached]

    def _difference(self, packed: PackedModel | None) -> float:
        """The largest difference of a probe from the plain forward of the whole model, nats."""
        self.packed = packed
        pairs = zip(self._probed(), self._expected, strict=True)
        return float(torch.stack([(one - expected).abs().max() for one, expected in pairs]).max())


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

    def run(self, tuning: Tuning, checkpoint: Checkpoint | None) -> Outcome:
        """All steps that are still to do. The model then has the weights that are kept."""
        started, params, validation = time.monotonic(), self.params, self.validation
        labels = [Batches(term.rows, term.batch_size, params.seed) for term in self.label_terms]
        cached = [Batches(loss.term.rows, loss.term.batch_size, params.seed) for loss in self.cache_losses]
        self.optimizer = adamw(self.model, params)
        self.weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        reached = checkpoint.load(self.model, self.optimizer) if checkpoint is not None else Reached()
        checkpoint = checkpoint if self.processes.first else None
        resumed_at, seen = len(reached.losses), 0
        self.processes.check_same("steps that an earlier run had done", resumed_at)
        if validation is not None and not reached.validations:
            reached.add(self.model, self._validate(validation, 0))

        def tokens_of(step: int) -> int:
            of_labels = sum(row.tokens + self.forward.branch_tokens for order in labels for row in order.at(step))
            return of_labels + sum(row.tokens for order in cached for row in order.at(step))

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
                    reached.add(self.model, self._validate(validation, step + 1))
                if checkpoint is not None and checkpoint.due() and step + 1 < params.steps:
                    checkpoint.save(self.model, self.optimizer, reached)
        steps = len(reached.losses)
        if checkpoint is not None and checkpoint.keeps_end and steps > resumed_at:
            checkpoint.save(self.model, self.optimizer, reached)
        reached.restore_best(self.model)
        chunks = "; the head and its loss in chunks" if any(loss.is_fused for loss in self.cache_losses) else ""
        tokens, seconds = sum(map(tokens_of, range(steps))), time.monotonic() - started
        return Outcome(reached, tokens, tuning, self.forward.description + chunks, resumed_at, seen, seconds)

    def _step(self, step: int, labels: Sequence[Sequence[TargetRow]], cached: Sequence[Sequence[CachedRow]]) -> float:
        """One update, of the gradients of all pieces; returns the loss before it."""
        share, micro_batch, value = self.processes.share, self.params.micro_batch, 0.0
        self.optimizer.zero_grad(set_to_none=False)  # fresh pages for all gradients would cost 6 % of a step
        for piece in micro_batches([share(batch) for batch in labels], micro_batch):
            rows = [row for batch in piece for row in batch]
            if self.params.tuning == "contrastive":
                loss = contrast(self.forward.embeddings(rows), [row.label for row in rows])
            else:
                loss = objective(self.label_terms, piece, self.forward.label_log_probabilities(rows), [len(batch) for batch in labels])
            value += self._backward(loss, step, rows)
        for cache_loss, batch in zip(self.cache_losses, cached, strict=True):
            for [rows] in micro_batches([share(batch)], micro_batch):
                value += self._backward(cache_loss(rows, sum(row.positions for row in batch)), step, rows)
        self.processes.add_gradients(self.weights)
        norm = float(nn.utils.clip_grad_norm_(self.weights, self.params.max_grad_norm))
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
        """Mean KL to the targets over the positions of the validation rows, nats; each process reads its share."""
        total, ordered = 0.0, sorted(validation.rows, key=lambda row: (row.tokens, row.example_id))
        for [batch] in micro_batches([self.processes.share(ordered)], self.params.micro_batch or self.params.batch_size):
            if labels := [row for row in batch if isinstance(row, TargetRow)]:
                log_probabilities = self.forward.label_log_probabilities(labels)
                value = float(label_divergence("kl", targets_of(labels, log_probabilities), log_probabilities).double().sum())
            else:
                value = self.cache_losses[0].kl_nats([row for row in batch if isinstance(row, CachedRow)])
            self._check_finite("KL to the validation targets", value, steps_done, batch)
            total += value
        return self.processes.total(total) / sum(row.positions for row in validation.rows)

    def _check_finite(self, what: str, value: float, step: int, rows: Sequence[StudentRow]) -> None:
        if not math.isfinite(value):
            raise ShotlessError(
                f"{self.title}: the {what} is {value} at step {step + 1}, on examples {', '.join(row.example_id for row in rows)}. Lower "
                "`learning_rate` or `max_grad_norm`. At the first step, look at these examples and at the base model's weights."
            )
