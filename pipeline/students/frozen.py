"""Training above frozen layers without running them again.

Where the embeddings and the lowest layers are frozen, what enters the first layer above them never changes for an example. So the lower
layers run once over all rows that the steps will take, and each step begins with the stored states. The order and the batches of that one
pass follow from the rows alone, so that an interrupted run computes the same states again.

The trade-off is memory: a vector of the model's width for each token, 2,304 bytes on SmolLM2-135M, 65 MB for 800 rows of 35 tokens. Up to
`MEMORY_BYTES` they are held in memory, above it in a memory-mapped file without a name, which the system removes however the process ends.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.models.packed import PackedModel
from pipeline.models.rows import Completions, Row, pack, rows_of
from pipeline.students.forward import TOLERANCE_NATS, Forward, Rows
from pipeline.students.head import token_batches
from pipeline.students.objectives import label_log_probabilities
from pipeline.files import work_folder

MEMORY_BYTES = 1 << 30
"""States that are held in memory; more go to a file under the work folder."""
Key = tuple[tuple[int, ...], ...]


class StatesUnusableError(Exception):
    """Why a model's lower layers must run in every step."""


class StoredStates:
    """What enters layer `layer` of a packed model, for each of `rows`, [tokens, width] float32."""

    def __init__(self, packed: PackedModel, rows: Sequence[Row], layer: int, *, memory_bytes: int = MEMORY_BYTES) -> None:
        """Run the layers below once. Raises StatesUnusableError where something below is learnt, or no layer is left above."""
        if not 0 < layer < len(packed.layers):
            raise StatesUnusableError(f"{layer} frozen layers of {len(packed.layers)}: states are stored for 1 to {len(packed.layers) - 1}")
        self._packed, self._layer = packed, layer
        self._places: dict[Key, slice] = {}
        found = {_key(row): row for row in rows}
        batches = token_batches([found[key] for key in sorted(found, key=lambda key: (found[key].length, key))], lambda row: row.length)
        with torch.enable_grad():
            if batches and self._read(batches[0][:1]).requires_grad:
                raise StatesUnusableError(f"something below layer {layer} is learnt")
        states, place = None, 0
        for batch in batches:
            with torch.no_grad():
                read = self._read(batch)
            if states is None:
                states = _room(sum(row.length for row in found.values()), read.shape[1], read, memory_bytes)
            states[place : place + len(read)] = read
            for row in batch:
                self._places[_key(row)] = slice(place, place + row.length)
                place += row.length
        self._states = states
        self.in_memory = states is None or states.numel() * states.element_size() <= memory_bytes

    def _read(self, rows: Sequence[Row]) -> Tensor:
        """Run the layers below on some rows → [tokens, width]."""
        given: list[Tensor] = []

        def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given.append(_hidden(args, kwargs)[0])
            raise _StatesReached

        hook = self._packed.layers[self._layer].register_forward_pre_hook(leave, with_kwargs=True, prepend=True)
        try:
            self._packed.logits(pack(rows, 0, self._packed.device), [])
        except _StatesReached:
            return given[0]
        finally:
            hook.remove()
        raise StatesUnusableError(f"layer {self._layer} was not reached")

    @contextmanager
    def entered(self, rows: Sequence[Row]) -> Iterator[None]:
        """Inside, a packed pass over these very rows begins at the layer, with the stored states."""
        assert self._states is not None
        states = torch.cat([self._states[self._places[_key(row)]] for row in rows])[None].to(self._packed.device)
        packed, below = self._packed, list(self._packed.layers)[: self._layer]

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((states, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": states})

        hook = packed.layers[self._layer].register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        for layer in below:
            layer.forward = _passed_by
        packed.first_layer = self._layer
        try:
            yield
        finally:
            packed.first_layer = 0
            for layer in below:
                del layer.forward
            hook.remove()


def on_stored_states(
    forward: Forward, completions: Completions, rows: Rows, expected: Tensor, layers: int, *, memory_bytes: int = MEMORY_BYTES
) -> Forward:
    """The packed forward over `rows` and no others, with the lowest `layers` layers run once for each.

    `expected` are the plain forward's numbers for the first of `rows`. Where the forward is not packed, something below is learnt, or the
    numbers differ, the result runs everything as `forward` does and says why.
    """
    packed = forward.packed
    if packed is None:
        return _in_full(forward, layers, "the forward pass is not packed")
    try:
        stored = StoredStates(packed, rows_of(rows, completions), layers, memory_bytes=memory_bytes)
    except StatesUnusableError as error:
        return _in_full(forward, layers, str(error))

    def run(wanted: Rows) -> Tensor:
        made = rows_of(wanted, completions)
        with stored.entered(made):
            return label_log_probabilities(packed.logits(pack(made, 0, packed.device), []), completions)

    with torch.no_grad():
        difference = float((run(rows[: len(expected)]) - expected).abs().max())
    if not difference <= TOLERANCE_NATS:
        return _in_full(forward, layers, f"stored states differ by {difference:.1e} nats (allowed {TOLERANCE_NATS:.0e})")
    place = "in memory" if stored.in_memory else "in a file"
    why = f"{forward.why}; the lowest {layers} layers once for each example, their states {place}"
    return Forward(forward.name, why, run, forward.detach, packed)


def _in_full(forward: Forward, layers: int, why: str) -> Forward:
    return replace(forward, why=f"{forward.why}; the lowest {layers} layers in every step: {why}")


class _StatesReached(Exception):  # noqa: N818  leaving a pass early is no error
    """Leaves a pass as soon as the states are known."""


def _passed_by(*args: Any, **kwargs: Any) -> Tensor:
    """A layer that does nothing; what it returns is replaced before anything reads it."""
    return _hidden(args, kwargs)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _key(row: Row) -> Key:
    return (tuple(row.query), *map(tuple, row.branches))


def _room(tokens: int, width: int, like: Tensor, memory_bytes: int) -> Tensor:
    """An empty [tokens, width], in memory or in a file without a name."""
    if tokens * width * like.element_size() <= memory_bytes:
        return torch.empty((tokens, width), dtype=like.dtype)
    folder: Path = work_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:  # the map holds it open
        return torch.from_numpy(np.memmap(file, dtype=str(like.dtype).removeprefix("torch."), mode="w+", shape=(tokens, width)))
