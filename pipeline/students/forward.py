"""The student's forward pass in training: token ids in, label log-probabilities out, with a gradient.

A model that the packed pass reproduces (no padding, last layer and head on answer positions alone) uses it; any other runs plain batches of
rows of equal length, which need no padding either. Neither is assumed to be right from the architecture's name: a few rows are compared
with the plain forward before training. Dropout stays off, so that both paths give the same numbers and a run is a function of its inputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.packed import PackedModel, UnsupportedModelError
from pipeline.models.rows import Completions, pack, rows_of
from pipeline.students.objectives import label_log_probabilities, positions_per_row

Rows = Sequence[Sequence[int]]
TOLERANCE_NATS = 1e-4
"""Largest difference of a label's log-probability that float32 rounding explains."""
PROBE_ROWS = 3


@dataclass(frozen=True)
class Forward:
    """How label log-probabilities are computed, and why so."""

    name: str
    why: str
    run: Callable[[Rows], Tensor]
    """Rows of token ids → [B, L] log-probabilities among the labels."""
    detach: Callable[[], None]
    """Give the model back as it was."""
    packed: PackedModel | None = None
    """The packed pass behind it, where there is one."""

    def describe(self) -> str:
        """The two in a line."""
        return f"{self.name}: {self.why}"


def same_forward(model: PreTrainedModel, completions: Completions, packed: PackedModel | None, why: str) -> Forward:
    """The pass that something else was found to run this model by; whoever made it detaches it."""
    if packed is None:
        return Forward("plain", why, lambda rows: _plain(model, completions, rows), lambda: None)
    return Forward("packed", why, lambda rows: _packed(packed, completions, rows), lambda: None, packed)


def choose_forward(model: PreTrainedModel, completions: Completions, rows: Rows, expected: Tensor | None = None) -> Forward:
    """The packed pass if it gives the plain forward's numbers on a few of `rows`, else the plain one.

    `expected`, where given, are the plain forward's numbers on `probe_rows(rows)` from before the model was prepared for training.
    """
    probe = probe_rows(rows)
    plain_attention = model.config._attn_implementation or "eager"
    if expected is None:
        expected = plain_log_probabilities(model, completions, probe)
    packed, why = packed_if_exact(model, lambda packed: float((_packed(packed, completions, probe) - expected).abs().max()))
    if packed is not None:
        return _packed_forward(model, packed, completions, plain_attention, why)
    return same_forward(model, completions, None, why)


def packed_if_exact(model: PreTrainedModel, difference: Callable[[PackedModel], float]) -> tuple[PackedModel | None, str]:
    """A packed pass over `model` whose `difference` from the plain forward is what rounding explains, nats, and why or why not.

    The model's attention implementation is the packed one where there is such a pass, and as it was otherwise.
    """
    plain_attention = model.config._attn_implementation or "eager"
    refusals = []
    for answers_only in (True, False):
        what = "packed rows, the last layer on " + ("answer positions alone" if answers_only else "all tokens")
        packed = None
        try:
            packed = PackedModel(model, answers_only=answers_only)
            with torch.no_grad():
                found = difference(packed)
        except (UnsupportedModelError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            # A foreign architecture may fail anywhere inside its own code; the reason is kept, and the plain path still works.
            refusals.append(f"{what}: {type(error).__name__}: {error}")
        else:
            if found <= TOLERANCE_NATS:
                return packed, what
            refusals.append(f"{what}: differs by {found:.1e} nats from the plain forward (allowed {TOLERANCE_NATS:.0e})")
        if packed is not None:
            packed.detach()
        model.set_attn_implementation(plain_attention)
    return None, "packed rows were refused: " + "; ".join(refusals)


def probe_rows(rows: Rows) -> list[Sequence[int]]:
    """A few rows of different lengths: the shortest, a middle one, the longest."""
    ordered = sorted(rows, key=lambda row: (len(row), list(row)))
    return [ordered[round(number * (len(ordered) - 1) / (PROBE_ROWS - 1))] for number in range(PROBE_ROWS)]


@torch.no_grad()
def plain_log_probabilities(model: PreTrainedModel, completions: Completions, rows: Rows) -> Tensor:
    """Label log-probabilities by the plain forward, without a gradient: the reference."""
    return _plain(model, completions, rows)


def _packed_forward(model: PreTrainedModel, packed: PackedModel, completions: Completions, plain_attention: str, why: str) -> Forward:
    def detach() -> None:
        packed.detach()
        model.set_attn_implementation(plain_attention)

    return Forward("packed", why, lambda rows: _packed(packed, completions, rows), detach, packed)


def _packed(model: PackedModel, completions: Completions, rows: Rows) -> Tensor:
    return label_log_probabilities(model.logits(pack(rows_of(rows, completions), 0, model.device), []), completions)


def _plain(model: PreTrainedModel, completions: Completions, rows: Rows) -> Tensor:
    """Batches of equal length. A completion of n tokens costs one more pass, which reads its first n - 1."""
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
    parts = []
    for _, group in groupby(order, key=lambda number: len(rows[number])):
        batch = [list(rows[number]) for number in group]
        passes = [_last_logits(model, batch, 1)]
        for ids in completions:
            if len(ids) > 1:
                passes.append(_last_logits(model, [row + list(ids[:-1]) for row in batch], len(ids) - 1))
        logits = torch.cat(passes, 1)  # [B, positions, V]
        assert logits.shape[1] == positions_per_row(completions)
        parts.append(label_log_probabilities(logits.flatten(0, 1), completions))
    return torch.cat(parts)[torch.tensor(order).argsort()]


def _last_logits(model: PreTrainedModel, batch: list[list[int]], positions: int) -> Tensor:
    tokens = torch.tensor(batch, dtype=torch.long, device=model.device)
    return model(input_ids=tokens, use_cache=False, logits_to_keep=positions).logits
