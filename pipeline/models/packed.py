"""One forward pass over many rows, laid end to end without padding, behind a context that is held once.

Rows are packed into a single sequence, so that every matrix product works on real tokens only. Attention is split in two: a row's own
tokens (a small padded batch, the only padding there is) and the shared context (all rows' queries against one copy of its keys and
values); the halves are merged by their log-sum-exp, as in cascade attention. Key heads are never repeated in memory: grouped query
heads are folded into the query length or broadcast with stride 0.

It plugs into transformers' public `AttentionInterface`, so every architecture that uses it and takes `position_ids` fits; what it cannot
do (sliding windows shorter than the prompt, attention sinks, soft-capped scores) raises `UnsupportedModelError`. The trade-off: it
trusts nothing, and `pipeline.engine.choice` compares it with the plain forward before use.

The last layer runs on answer positions alone: its keys and values are recorded on all rows, by leaving the layer as soon as its
attention is reached, and the layer is then run on the rows that are asked for.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.models.fused import fuse
from pipeline.models.rows import Packed

ATTENTION = "shotless_packed"
LayerKeyValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [1, key heads, tokens, head size]."""


LONGEST_SMALL = 256
"""Rows of at most so many tokens have all their attention scores held at once: 4 bytes × heads × tokens × this, a pass."""


class UnsupportedModelError(Exception):
    """The architecture does something that the packed pass does not reproduce; use the generic engine."""


@dataclass
class _Pass:
    """What the attention function needs to know of the pass that it is called from."""

    packed: Packed | None  # None: the context itself is read, and its keys and values recorded
    prefix: list[LayerKeyValues]
    recorded: dict[int, LayerKeyValues] = field(default_factory=dict)
    leave_at: int | None = None  # layer at whose attention `_KeysRecorded` is raised
    answers_at: int | None = None  # layer that runs on answer positions alone, with the recorded keys
    reached: set[int] = field(default_factory=set)  # layers whose attention came here


class _KeysRecorded(Exception):  # noqa: N818  leaving a layer early is no error
    """Leaves a layer as soon as its keys and values are known."""


_PASS: ContextVar[_Pass] = ContextVar("shotless_pass")


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention and the log-sum-exp of its scores.

    query [B, H, Q, D], key and value [B, H, K, D], mask added to the scores [B, 1, Q, K] → [B, H, Q, D], [B, H, Q]. On the CPU by
    torch's flash kernel; elsewhere from the definition.
    """
    if query.device.type == "cpu":
        mask = None if mask is None else mask.to(query.dtype)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    scores = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(unseen, -torch.inf)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return (scores - lse.unsqueeze(-1)).exp().to(value.dtype) @ value, lse


def small_attention_with_lse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same for many short rows, with key heads as they are.

    query [B, H, Q, D], key and value [B, key heads, K, D], mask [B or 1, 1, Q, K] → [B, H, Q, D], [B, H, Q].

    All scores are held at once, so that a batched product does the work: on rows of 48 tokens the flash kernel, which works on one row
    and head at a time, takes 2 to 9 times as long. Query heads of one key head are folded into the query length.
    """
    batch, heads, queries, size = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch * key.shape[1], groups * queries, size)
    keys, values = key.reshape(-1, *key.shape[2:]), value.reshape(-1, *value.shape[2:])
    seen = mask.to(query.dtype)[:, 0].repeat(1, groups, 1)  # [B or 1, groups · Q, K]
    if len(seen) > 1:
        seen = seen.repeat_interleave(key.shape[1], 0)
    scores = torch.baddbmm(seen, folded, keys.transpose(1, 2), alpha=scale)
    weights = scores.softmax(-1)
    # the log-sum-exp off the largest score and its weight, which is never 0: one pass less than from the scores
    lse = scores.amax(-1).float() - weights.amax(-1).float().log()
    return (weights @ values).reshape(query.shape), lse.reshape(batch, heads, queries)


def _merge(own: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]) -> Tensor:
    """Two attentions over disjoint keys, [T, H, D] with log-sum-exp [T, H], as one over all keys."""
    weight = torch.sigmoid(own[1] - shared[1]).unsqueeze(-1).to(own[0].dtype)
    return torch.lerp(shared[0], own[0], weight)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, ·, D] and [B, key heads, ·, D] → [B·key heads, H / key heads, ·, D], keys broadcast with stride 0."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(batch * key.shape[1], groups, length, size)
    key, value = (x.reshape(batch * x.shape[1], 1, x.shape[2], x.shape[3]).expand(-1, groups, -1, -1) for x in (key, value))
    return query, key, value


def _shared_part(query: Tensor, prefix: LayerKeyValues, scale: float) -> tuple[Tensor, Tensor]:
    """All queries [1, H, T, D] against the context → [T, H, D], [T, H]. Grouped heads are folded into the query length."""
    _, heads, tokens, size = query.shape
    key, value = prefix
    folded = query.reshape(1, key.shape[1], -1, size)
    out, lse = attention_with_lse(folded, key, value, causal=False, scale=scale)
    return out.reshape(heads, tokens, size).transpose(0, 1), lse.reshape(heads, tokens).t()


def _own_part(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
    """Each token against its own row's tokens before it → [T, H, D], [T, H]."""
    rows, width = packed.gather.shape
    heads = query.shape[1]
    padded = [x[0].transpose(0, 1)[packed.gather].transpose(1, 2) for x in (query, key, value)]  # [B, heads, L, D]
    if width <= LONGEST_SMALL:
        mask = packed.mask if packed.mask is not None else _causal(width, query.device)
        out, lse = small_attention_with_lse(*padded, mask=mask, scale=scale)
    else:
        mask = None if packed.mask is None else packed.mask.repeat_interleave(key.shape[1], 0)
        out, lse = attention_with_lse(*_grouped(*padded), causal=mask is None, scale=scale, mask=mask)
    out = out.reshape(rows, heads, width, -1).transpose(1, 2).reshape(rows * width, heads, -1)
    lse = lse.reshape(rows, heads, width).transpose(1, 2).reshape(rows * width, heads)
    return out[packed.scatter], lse[packed.scatter]


def _causal(width: int, device: torch.device) -> Tensor:
    """[1, 1, L, L] to be added to scores."""
    return torch.full((1, 1, width, width), -torch.inf, device=device).triu(1)


def _answer_part(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
    """Answer positions alone, query [1, H, N, D], against their rows' recorded keys → [N, H, D], [N, H]."""
    heads, outputs = query.shape[1], query.shape[2]
    places = packed.gather[packed.output_rows]  # [N, L]
    single = query[0].transpose(0, 1).unsqueeze(2)  # [N, H, 1, D]
    keys, values = (x[0].transpose(0, 1)[places].transpose(1, 2) for x in (key, value))
    unseen = torch.zeros(packed.visible.shape, device=query.device).masked_fill(~packed.visible, -torch.inf)
    mask = unseen[:, None, None, :].repeat_interleave(key.shape[1], 0)
    out, lse = attention_with_lse(*_grouped(single, keys, values), causal=False, scale=scale, mask=mask)
    return out.reshape(outputs, heads, -1), lse.reshape(outputs, heads)


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
    _refuse(query, key, attention_mask, dropout, settings, _longest(current, query))
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    current.reached.add(layer)
    packed = current.packed
    if packed is None or current.leave_at == layer:
        current.recorded[layer] = (key, value)
        if current.leave_at == layer:
            raise _KeysRecorded
    if packed is None:
        out, _ = attention_with_lse(*_grouped(query, key, value), causal=True, scale=scale)
        return out.reshape(1, query.shape[1], query.shape[2], -1).transpose(1, 2), None
    if current.answers_at == layer:
        own = _answer_part(query, *current.recorded[layer], packed, scale)
    else:
        own = _own_part(query, key, value, packed, scale)
    out = _merge(own, _shared_part(query, current.prefix[layer], scale)) if current.prefix else own[0]
    return out.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _packed_attention)  # type: ignore[arg-type]


def _longest(current: _Pass, query: Tensor) -> int:
    """Tokens of the longest prompt in the pass."""
    if current.packed is None:
        return query.shape[2]
    return int(current.packed.position_ids.max()) + 1


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
        if not ids:
            return []
        last = len(self.layers) - 1
        with _active(_Pass(packed=None, prefix=[], leave_at=last)) as current:
            tokens = torch.tensor([list(ids)], dtype=torch.long, device=self.device)
            try:
                self.model(input_ids=tokens, position_ids=torch.arange(len(ids), device=self.device)[None], use_cache=False)
            except _KeysRecorded:
                pass
            else:
                raise UnsupportedModelError("the model's attention was not reached through transformers' attention interface")
        if len(current.recorded) != len(self.layers):
            raise UnsupportedModelError(f"{len(current.recorded)} of {len(self.layers)} layers have keys and values")
        return [tuple(x.contiguous() for x in current.recorded[layer]) for layer in range(len(self.layers))]  # type: ignore[misc]

    def logits(self, packed: Packed, prefix: list[LayerKeyValues]) -> Tensor:
        """Logits at the outputs of packed rows, [N, vocabulary], with a gradient where one is asked for."""
        last = len(self.layers) - 1
        with _active(_Pass(packed=packed, prefix=prefix, answers_at=last if self.answers_only else None)) as current:
            keep = 0 if self.answers_only else packed.outputs
            out = self.model(input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False, logits_to_keep=keep)
        if len(current.reached) != len(self.layers):
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
