"""Hidden-state matching: the trace that a context leaves in the teacher's representation, drawn into the student's.

A pair of layers is compared at the answer positions. Both sides are measured in standard deviations of the teacher's own states, dimension
by dimension: the few dimensions that are a hundred times larger than all others in many models would else be the whole distance. A
distance of 1 is what answering with the teacher's mean state gives; 0 is the teacher's state. Where widths differ, a learnt projection
stands between (1412.6550); it belongs to the training, not to the student.

Several contexts of one example are several rows. The mean squared distance to them has the gradient of that to their mean state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import UsageError

LEAST_DEVIATION = 1e-3
"""Of a dimension, as a share of the layer's mean deviation: dimensions that hardly vary do not count beyond it."""
MODULE = "matching"
"""The name under which projections are part of a model while it is trained."""


@dataclass(frozen=True)
class HiddenLesson:
    """What is to be matched, whatever the student."""

    weight: float
    pairs: tuple[tuple[int, int], ...]
    """(teacher's layer, student's layer)."""
    places: tuple[int, ...]
    """Of each pair's teacher layer among the layers that the cache keeps."""
    mean: Tensor  # [layers, H] of each kept layer's states
    deviation: Tensor  # [layers, H]

    @classmethod
    def of(cls, weight: float, pairs: Sequence[tuple[int, int]], kept: Sequence[int], states: Tensor, where: str) -> "HiddenLesson":
        """From a sample of cached states [P, layers, H]; `kept` are the cache's hidden layers, `where` names the params' entry.

        Raises UsageError where the cache does not keep a teacher's layer.
        """
        for layer, _ in pairs:
            if layer not in kept:
                has = ", ".join(map(str, kept)) or "none"
                raise UsageError(
                    f"{where}.layers: the cache holds no hidden states of the teacher's layer {layer}; it has {has}. Add it to the "
                    "teacher's `cache.hidden_layers`, by the same number, which makes the teacher score again."
                )
        deviation, mean = torch.std_mean(states.float(), 0, correction=0)
        least = LEAST_DEVIATION * deviation.mean(-1, keepdim=True)
        return cls(weight, tuple(pairs), tuple(kept.index(layer) for layer, _ in pairs), mean, deviation.clamp_min(1e-12).maximum(least))

    @property
    def student_layers(self) -> list[int]:
        """The student's layers, in the pairs' order."""
        return [layer for _, layer in self.pairs]


class Matching(nn.Module):
    """The distance of a student's states to cached ones, with a projection for each pair where widths differ."""

    def __init__(self, lesson: HiddenLesson, width: int, seed: int) -> None:
        super().__init__()
        self.lesson, teacher_width = lesson, lesson.mean.shape[-1]
        self.projections = nn.ModuleDict()
        if width != teacher_width:
            generator = torch.Generator().manual_seed(seed)
            for number in range(len(lesson.pairs)):
                linear = nn.Linear(width, teacher_width)
                with torch.no_grad():
                    linear.weight.normal_(0.0, width**-0.5, generator=generator)
                    linear.bias.copy_(lesson.mean[lesson.places[number]])
                self.projections[str(number)] = linear

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Squared distance of each position, the mean over pairs and dimensions, in the teacher's variances.

        student [P, pairs · width], side by side as hooks give them; teacher [P, layers, H] → [P] float32, with a gradient.
        """
        lesson, device = self.lesson, student.device
        parts = student.float().reshape(len(student), len(lesson.pairs), -1).unbind(1)
        distances = []
        for number, (state, place) in enumerate(zip(parts, lesson.places, strict=True)):
            own = self.projections[str(number)](state) if len(self.projections) else state
            difference = (own - teacher[:, place].to(device)) / lesson.deviation[place].to(device)
            distances.append(difference.square().mean(-1))
        return torch.stack(distances).mean(0)


def attach(model: PreTrainedModel, lessons: Sequence[HiddenLesson | None], seed: int) -> list[Matching | None]:
    """A `Matching` for each lesson, learnt along with the model's own weights until `detach`.

    Raises UsageError where the student has no such layer.
    """
    config = model.config.get_text_config()
    depth = config.num_hidden_layers
    for lesson in filter(None, lessons):
        if wrong := [layer for layer in lesson.student_layers if not -depth <= layer < depth]:
            raise UsageError(f"students.*.also.*.layers: the student has no layer {wrong[0]}; it has {depth}, 0 to {depth - 1}.")
    made = [None if lesson is None else Matching(lesson, config.hidden_size, seed) for lesson in lessons]
    model.add_module(MODULE, nn.ModuleList(filter(None, made)).to(model.device))  # made on the CPU: its numbers are the seed's everywhere
    return made


def detach(model: PreTrainedModel) -> None:
    """Give the model back without the projections."""
    delattr(model, MODULE)


def states_of(column: Sequence[Sequence[Sequence[float]]], layers: int) -> Tensor:
    """The cache's `hidden_states` of some rows, all positions one after the other, as [P, layers, H] float32."""
    positions = [np.asarray(position, dtype=np.float32) for row in column for position in row]
    return torch.from_numpy(np.stack(positions)).reshape(len(positions), layers, -1)
