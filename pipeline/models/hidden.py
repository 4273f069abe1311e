"""The outputs of chosen layers at answer positions, caught by hooks on the layers, so that any architecture gives them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import UsageError
from pipeline.models.folders import decoder_layers


class HiddenStates:
    """What the chosen layers gave in the last forward pass: each [rows, tokens, hidden size]."""

    def __init__(self, layers: int) -> None:
        self._outputs: list[Tensor | None] = [None] * layers

    def put(self, number: int, output: Any) -> None:
        """Keep a layer's output, which is a tensor or a tuple that begins with one."""
        self._outputs[number] = output[0] if isinstance(output, tuple) else output

    def at(self, outputs: Tensor | slice) -> Tensor | None:
        """States at `outputs` of the tokens, layers side by side, [rows, outputs, layers · H]; None if no layer is kept.

        A layer that ran on the asked tokens alone is taken as it is.
        """
        if not self._outputs:
            return None
        found = []
        for state in self._outputs:
            assert state is not None
            asked = outputs.shape[0] if isinstance(outputs, Tensor) else None
            found.append(state if asked == state.shape[1] else state[:, outputs])
        return torch.cat(found, -1)


@contextmanager
def hidden_states(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[HiddenStates]:
    """Catch the outputs of `layers` (negative ones count from the last) while the block runs.

    Raises UsageError if the model has no such layer.
    """
    kept = HiddenStates(len(layers))
    if not layers:
        yield kept
        return
    modules = decoder_layers(model)
    if wrong := [layer for layer in layers if not -len(modules) <= layer < len(modules)]:
        raise UsageError(f"cache.hidden_layers: no layer {wrong[0]}; this model has {len(modules)}, 0 to {len(modules) - 1}.")
    handles = [
        modules[layer].register_forward_hook(lambda _module, _args, output, number=number: kept.put(number, output))
        for number, layer in enumerate(layers)
    ]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
