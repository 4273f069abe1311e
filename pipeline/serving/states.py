"""The student's last hidden state at the answer position, taken off the pass that gives the answer: it costs no second one.

The language-model head reads exactly those vectors, so they are recorded where it is called. The engines call it once or several times for
a batch, and for branch tokens too; `AnswerStates.take` knows which of its inputs are answers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.teachers.scores import Engine
from pipeline.errors import ShotlessError
from pipeline.models.rows import Completions


class AnswerStates:
    """Inputs of the head, as recorded while an engine scored queries in rising order of length."""

    def __init__(self, engine: Engine, completions: Completions) -> None:
        self.recorded: list[Tensor] = []
        self._shared = engine.name == "shared_prefix"
        self._completions = completions

    def take(self, count: int) -> Tensor:
        """The answers' states [count, H] in float32, in the order in which the queries were given, which has to be that of their length.

        The shared-prefix engine has each row's answer followed by its branch tokens in one pass; the generic one has a pass for answers,
        then one for each completion of several tokens.
        """
        if self._shared:
            per_row = 1 + sum(len(ids) - 1 for ids in self._completions)
            parts = [states[0, ::per_row] for states in self.recorded]
        else:
            passes = 1 + sum(len(ids) > 1 for ids in self._completions)
            parts = [states[:, -1] for states in self.recorded[::passes]]
        states = torch.cat(parts).float()
        if states.shape[0] != count:
            raise ShotlessError(f"{states.shape[0]} hidden states were recorded for {count} inputs; this is a bug, please report it.")
        return states


@contextmanager
def recording(model: PreTrainedModel, engine: Engine, completions: Completions) -> Iterator[AnswerStates]:
    """Record while the block runs."""
    states = AnswerStates(engine, completions)

    def keep(_module: Any, args: tuple[Any, ...]) -> None:
        states.recorded.append(args[0])

    head = model.get_output_embeddings()
    if head is None:
        raise ShotlessError(f"{type(model).__name__} has no language-model head, so its last state cannot be read.")
    hook = head.register_forward_pre_hook(keep)
    try:
        yield states
    finally:
        hook.remove()
