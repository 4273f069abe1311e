"""One forward pass over many rows, laid end to end without padding, behind a context that is held once.

Rows are packed into a single sequence, so that every matrix product works on real tokens only; attention is split into a row's own tokens
and the shared context (`pipeline.models.attention`).

It plugs into transformers' public `AttentionInterface`, so every architecture that uses it and takes `position_ids` fits; what it cannot
do (sliding windows shorter than the prompt, attention sinks, soft-capped scores) raises `UnsupportedModelError`. The trade-off: it
trusts nothing, and `pipeline.teachers.choice` compares it with the plain forward before use.

The last layer runs on answer positions alone: its keys and values are recorded on all rows, by leaving the layer as soon as its
attention is reached, and the layer is then run on the rows that are asked for. A context is read in chunks, so that a long one needs no
more memory than its keys and values.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.models.attention import LayerKeyValues, answer_part, attention_with_lse, grouped, merge, own_part, shared_part
from pipeline.models.context import ContextKeys
from pipeline.models.fused import fuse
from pipeline.models.rows import Packed

ATTENTION = "shotless_packed"
CHUNK = 1024
"""Tokens of a context that are read in one pass."""


class UnsupportedModelError(Exception):
    """The architecture does something that the packed pass does not reproduce; use the generic engine."""


@dataclass
class _Pass:
    """What the attention function needs to know of the pass that it is called from."""

    prefix: list[LayerKeyValues]
    longest: int  # tokens of the longest prompt
    packed: Packed | None = None  # None: a chunk of the context itself is read
    context: ContextKeys | None = None  # where the chunk's keys and values go
    leave_at: int | None = None  # layer at whose attention `_KeysRecorded` is raised
    answers_at: int | None = None  # layer that runs on answer positions alone, with the recorded keys
    recorded: LayerKeyValues | None = None
    reached: set[int] = field(default_factory=set)  # layers whose attention came here


class _KeysRecorded(Exception):  # noqa: N818  leaving a layer early is no error
    """Leaves a layer as soon as its keys and values are known."""


_PASS: ContextVar[_Pass] = ContextVar("shotless_pass")


def _packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """The attention function behind `ATTENTION`; query [1, H, T, D] → [1, T, H, D]."""
    current = _PASS.get()
    _refuse(query, key, attention_mask, dropout, settings, current.longest)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    current.reached.add(layer)
    if current.context is not None:
        current.context.write(layer, key, value)
    if current.leave_at == layer:
        current.recorded = (key, value)
        raise _KeysRecorded
    if current.packed is None:
        own = _chunk_part(query, key, value, scale)
    elif current.answers_at == layer and current.recorded is not None:
        own = answer_part(query, *current.recorded, current.packed, scale)
    else:
        own = own_part(query, key, value, current.packed, scale)
    out = merge(own, shared_part(query, current.prefix[layer], scale)) if current.prefix else own[0]
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _packed_attention)  # type: ignore[arg-type]


def _chunk_part(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A chunk of the context, each token against the chunk's tokens before it → [T, H, D], [T, H]."""
    _, heads, tokens, _ = query.shape
    out, lse = attention_with_lse(*grouped(query, key, value), causal=True, scale=scale)
    return out.reshape(heads, tokens, -1).transpose(0, 1), lse.reshape(heads, tokens).t()


def _refuse(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, settings: dict[str, Any], longest: int) -> None:
    """Raise on what would change the result and is not reproduced here."""
    window = settings.get("sliding_window")
    reasons = {
        "attention dropout": dropout > 0,
        "an attention mask of its own": mask is not None,
        "a batch of more than one sequence": query.shape[0] != 1,
        f"a sliding window of {window} tokens, shorter than the prompt of {longest}": window is not None and window < longest,
        "soft-capped attention scores": settings.get("softcap") is not None,
        "attention sinks": settings.get("s_aux") is not None,
        "a position bias": settings.get("position_bias") is not None,
        "query heads that are no multiple of the key heads": query.shape[1] % key.shape[1] != 0,
    }
    for reason, present in reasons.items():
        if present:
            raise UnsupportedModelError(f"the model uses {reason}")


class PackedModel:
    """A causal language model that scores packed rows behind a shared context.

    `answers_only` runs the last layer on answer positions alone; some architectures reshape by the sequence length and do not take it.
    The model's attention implementation is set to `ATTENTION`.
    """

    def __init__(self, model: PreTrainedModel, *, answers_only: bool = True) -> None:
        self.model = model
        self.answers_only = answers_only
        self.layers = decoder_layers(model)
        self.first_layer = 0
        """Layers below are passed by: whoever sets this gives the states that enter it (`pipeline.students.frozen`)."""
        try:
            model.set_attn_implementation(ATTENTION)
        except ValueError as error:
            raise UnsupportedModelError(f"{type(model).__name__} does not take an attention function: {error}") from error
        self._restore = fuse(model)
        self._hook = self.layers[-1].register_forward_pre_hook(_keep_answers, with_kwargs=True) if answers_only else None

    def detach(self) -> None:
        """Give the model back as it was, but for its attention implementation, which the caller sets."""
        self._restore()
        if self._hook is not None:
            self._hook.remove()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def read_context(self, ids: Sequence[int]) -> list[LayerKeyValues]:
        """Keys and values of a context, for each layer; an empty list for an empty context."""
        context = self.room_for(len(ids))
        self.read_on(context, ids)
        return context.layers()

    def room_for(self, tokens: int) -> ContextKeys:
        """An empty context that `read_on` may fill with so many tokens."""
        return ContextKeys(len(self.layers), tokens)

    def read_on(self, context: ContextKeys, ids: Sequence[int]) -> None:
        """Read more tokens of a context, behind those that it has. Raises ValueError where there is no room for them."""
        if context.length + len(ids) > context.capacity:
            raise ValueError(f"room for {context.capacity} tokens, of which {context.length} are taken; {len(ids)} more do not fit")
        for start in range(0, len(ids), CHUNK):
            chunk, before = list(ids[start : start + CHUNK]), context.length
            tokens = torch.tensor([chunk], dtype=torch.long, device=self.device)
            positions = torch.arange(before, before + len(chunk), device=self.device)[None]
            state = _Pass(context.layers(), before + len(chunk), context=context, leave_at=len(self.layers) - 1)
            with _active(state) as current:
                try:
                    self.model(input_ids=tokens, position_ids=positions, use_cache=False)
                except _KeysRecorded:
                    pass
                else:
                    raise UnsupportedModelError("the model's attention was not reached through transformers' attention interface")
            if len(current.reached) != len(self.layers):
                raise UnsupportedModelError(f"{len(current.reached)} of {len(self.layers)} layers have keys and values")
            context.length += len(chunk)

    def logits(self, packed: Packed, prefix: list[LayerKeyValues]) -> Tensor:
        """Logits at the outputs of packed rows, [N, vocabulary], with a gradient where one is asked for."""
        last = len(self.layers) - 1
        longest = int(packed.position_ids.max()) + 1
        with _active(_Pass(prefix, longest, packed, answers_at=last if self.answers_only else None)) as current:
            keep = 0 if self.answers_only else packed.outputs
            out = self.model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, logits_to_keep=keep)
        if len(current.reached) != len(self.layers) - self.first_layer:
            raise UnsupportedModelError("the model's attention was not reached through transformers' attention interface")
        logits = out.logits[0]
        if logits.shape[0] != packed.outputs.shape[0]:
            raise UnsupportedModelError(f"{logits.shape[0]} rows of logits for {packed.outputs.shape[0]} answer positions")
        return logits


@contextmanager
def _active(current: _Pass) -> Iterator[_Pass]:
    token = _PASS.set(current)
    try:
        yield current
    finally:
        _PASS.reset(token)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: the module list as long as the config says."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {depth} layers")


def _keep_answers(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before the last layer: record its keys and values on all tokens, then cut every per-token input to the answer positions."""
    current = _PASS.get(None)
    if current is None or current.packed is None or current.answers_at is None:
        return None
    packed = current.packed
    current.leave_at = current.answers_at
    try:
        layer.forward(*args, **kwargs)
    except _KeysRecorded:
        current.leave_at = None
    else:
        raise UnsupportedModelError("the last layer was left without reaching its attention")
    tokens = packed.input_ids.shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:, packed.outputs] if value.dim() >= 2 and value.shape[1] == tokens else value
        return type(value)(map(cut, value)) if isinstance(value, (tuple, list)) else value

    return cut(args), {name: cut(value) for name, value in kwargs.items()}
