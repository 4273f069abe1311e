"""Which step's weights are kept: those that agree best with the targets of examples that are not learnt from.

The part that is held back is known by content: an example belongs to it if the hash of its id falls into the first `share` of all hashes.
So it is the same for every student, whatever its seed, and a transfer set that grows moves no example from one side to the other; the
share is met on average, not exactly. Gold labels play no part, and neither do evaluation sets: the measure is the mean KL to the targets.

The trade-off: the best weights are held in memory beside the present ones, and what is held back teaches nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.errors import UsageError
from pipeline.files import sha256_json
from pipeline.students.batches import Example
from pipeline.students.cached import CachedRow
from pipeline.students.tuning import trained_weights

Lesson = TypeVar("Lesson", Example, CachedRow)


@dataclass(frozen=True)
class HeldBack:
    """Examples to choose the step by."""

    examples: tuple[Example, ...]
    evaluate_every: int
    """Steps between two looks; there is one before the first step and one after the last, too."""
    patience: int | None
    """Looks without an improvement that end the training; None: it runs through."""
    cached: tuple[CachedRow, ...] = ()
    """What is held back of a cache's rows, instead of examples."""


def split(examples: Sequence[Lesson], share: float) -> tuple[tuple[Lesson, ...], tuple[Lesson, ...]]:
    """(learnt from, held back), each in the given order.

    Raises UsageError where either is empty.
    """
    places = [_place(example.example_id.rpartition(":")[2]) for example in examples]  # all contexts of an example go together
    held = tuple(example for example, place in zip(examples, places, strict=True) if place < share)
    learnt = tuple(example for example, place in zip(examples, places, strict=True) if place >= share)
    if not held or not learnt:
        lacking = "held back" if not held else "left to learn from"
        raise UsageError(f"held_back: of {len(examples)} examples, a share of {share} leaves none {lacking}; choose another share, or 0.")
    return learnt, held


@dataclass
class Best:
    """What was seen so far, and the weights of the best look."""

    looks: list[tuple[int, float]] = field(default_factory=list)
    """(steps done, mean KL in nats)."""
    weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The best look; of equal ones the first, which moved the model least."""
        return min(range(len(self.looks)), key=lambda n: self.looks[n][1])

    def add(self, model: nn.Module, steps_done: int, kl_nats: float) -> None:
        """One more look; its weights are copied if they are the best."""
        self.looks.append((steps_done, kl_nats))
        if self.number == len(self.looks) - 1:
            self.weights = {name: parameter.detach().clone() for name, parameter in trained_weights(model).items()}

    def is_over(self, patience: int | None) -> bool:
        """Whether there were `patience` looks without an improvement."""
        return patience is not None and bool(self.looks) and len(self.looks) - 1 - self.number >= patience

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the best weights back into the model."""
        for name, parameter in trained_weights(model).items():
            parameter.copy_(self.weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""
        if not self.looks:
            return {}
        return {"looks": torch.tensor(self.looks, dtype=torch.float64)} | {f"best.{name}": tensor for name, tensor in self.weights.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Best":
        """The same from a checkpoint's tensors."""
        looks = [(int(step), kl) for step, kl in tensors["looks"].tolist()] if "looks" in tensors else []
        return cls(looks, {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")})


def _place(example_id: str) -> float:
    """Where an example's hash lies between 0 and 1."""
    return int(sha256_json(["held back", example_id])[:13], 16) / 16**13
