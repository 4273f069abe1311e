"""One forward pass over many rows, laid end to end without padding, behind a context that is held once.

Every matrix product works on real tokens only. Attention has two parts, merged by their log-sum-exp as in cascade attention: a row's own
tokens, a small padded batch, the only padding there is; and the context, whose one copy of keys and values all rows' queries meet. Key
heads are never repeated in memory: grouped query heads are folded into the query length or broadcast with stride 0.

It plugs into transformers' public `AttentionInterface`, so every architecture that uses it and takes `position_ids` fits. What it cannot do
(sliding windows shorter than the prompt, attention sinks, soft-capped scores) raises `UnsupportedModelError`. Nothing is assumed from an
architecture's name: `models.forward.packed_if_exact` compares the pass with the plain forward before use.

The last layer runs on answer positions alone: its keys and values are recorded on all tokens, by leaving the layer as soon as its attention
is reached, and the layer is then run on the tokens that are asked for. A context is read in chunks, so that a long one needs no more memory
than its keys and values.

Letters of shapes: B rows, L places of the longest row, T packed tokens, H query heads, D head size, N outputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from pipeline.models.folders import UnsupportedModelError, decoder_layers

Completions = Sequence[Sequence[int]]
"""Token ids of each label's verbaliser, or of each row's own answer."""


@dataclass(frozen=True)
class Row:
    """One row of a pass: a query, and branches that each continue it."""

    query: Sequence[int]
    branches: tuple[Sequence[int], ...] = ()
    """Token ids that follow the query, each branch blind to the others: all but the last token of multi-token completions."""

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.query) + sum(map(len, self.branches))


def rows_of(queries: Sequence[Sequence[int]], completions: Completions) -> list[Row]:
    """Queries with the branches that multi-token completions need; a completion's last token is never read."""
    branches = tuple(ids[:-1] for ids in completions if len(ids) > 1)
    return [Row(query, branches) for query in queries]


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: T tokens in all, B rows of at most L tokens, N outputs."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    gather: Tensor  # [B, L] token of each row's place; padding repeats the row's first token
    scatter: Tensor  # [T] place in B·L of each token
    outputs: Tensor  # [N] tokens whose logits are asked for: for each row the query's last, then every branch token
    output_rows: Tensor  # [N] row of each output
    mask: Tensor | None  # [B, 1, L, L] added to scores if rows branch; None: causal
    visible: Tensor  # [N, L] whether an output sees its row's place


def pack(rows: Sequence[Row], start: int, device: torch.device | str = "cpu") -> Packed:
    """Lay rows end to end; `start` is the number of context tokens before each."""
    width = max(row.length for row in rows)
    ids: list[int] = []
    positions: list[int] = []
    gather, scatter, outputs, output_rows, visible = [], [], [], [], []
    branched = any(row.branches for row in rows)
    mask = torch.full((len(rows), 1, width, width), -torch.inf) if branched else None
    for number, row in enumerate(rows):
        first = len(ids)
        ids += row.query
        positions += range(start, start + len(row.query))
        seen = torch.ones(row.length, row.length, dtype=torch.bool).tril()
        outputs.append(len(ids) - 1)
        for branch in row.branches:
            begin = len(ids) - first
            ids += branch
            positions += range(start + len(row.query), start + len(row.query) + len(branch))
            seen[begin:, len(row.query) : begin] = False
            outputs += range(first + begin, len(ids))
        for output in outputs[len(output_rows) :]:
            output_rows.append(number)
            visible.append(F.pad(seen[output - first], (0, width - row.length)))
        if mask is not None:
            block = mask[number, 0]
            block[: row.length, : row.length].masked_fill_(seen, 0.0)
            block[row.length :, 0] = 0.0  # a padding place must see something, or it would be NaN
        gather.append(list(range(first, len(ids))) + [first] * (width - row.length))
        scatter += range(number * width, number * width + row.length)

    def long(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Packed(
        input_ids=long([ids]),
        position_ids=long([positions]),
        gather=long(gather),
        scatter=long(scatter),
        outputs=long(outputs),
        output_rows=long(output_rows),
        mask=None if mask is None else mask.to(device),
        visible=torch.stack(visible).to(device),
    )


ATTENTION = "shotless_packed"
CHUNK = 1024
"""Tokens of a context that are read in one pass."""
LONGEST_SMALL = 256
"""Rows of at most this many tokens have all their attention scores held at once: 4 bytes × heads × tokens × this, a pass."""
LayerKeyValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [1, key heads, tokens, head size]."""


class _ContextKeys:
    """Keys and values of a context at every layer, in one block with room for `capacity` tokens, of which `length` have been read.

    One block, and not a piece for each layer: pieces that stay would lie between the large results that come and go, and the allocator
    would give memory back and fetch it again, page by page (51,000 page faults in reading 1,024 tokens, a tenth of the time).
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._blocks: dict[tuple[int, ...], Tensor] = {}  # by heads and size: layers differ in a few architectures
        self._held: list[LayerKeyValues | None] = [None] * layers

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put a layer's keys and values [1, key heads, T, head size] behind those that have been read."""
        held = self._held[layer]
        if held is None:
            held = self._held[layer] = (self._room(layer, 0, key), self._room(layer, 1, value))
        for room, new in zip(held, (key, value), strict=True):
            room[:, :, self.length : self.length + new.shape[2]].copy_(new)

    def layers(self) -> list[LayerKeyValues]:
        """What has been read, for each layer, without a copy; an empty list before anything was read."""
        if not self.length:
            return []
        return [(held[0][:, :, : self.length], held[1][:, :, : self.length]) for held in self._held if held is not None]

    def _room(self, layer: int, which: int, like: Tensor) -> Tensor:
        _, heads, _, size = like.shape
        if (heads, size) not in self._blocks:
            self._blocks[heads, size] = torch.empty(len(self._held), 2, 1, heads, self.capacity, size, dtype=like.dtype, device=like.device)
        return self._blocks[heads, size][layer, which]


class PackedModel:
    """A causal language model that scores packed rows behind a shared context.

    `answers_only` runs the last layer on answer positions alone; architectures that reshape by the sequence length do not take it. The
    model's attention implementation is set to `ATTENTION` until `detach`.
    """

    def __init__(self, model: PreTrainedModel, *, answers_only: bool = True) -> None:
        self.model = model
        self.answers_only = answers_only
        self.layers = decoder_layers(model)
        self.first_layer = 0
        """Layers below are skipped: whoever sets this gives the states that enter this layer."""
        self._plain_attention = model.config._attn_implementation or "eager"
        try:
            model.set_attn_implementation(ATTENTION)
        except ValueError as error:
            raise UnsupportedModelError(f"{type(model).__name__} does not take an attention function: {error}") from error
        self._hook = self.layers[-1].register_forward_pre_hook(_keep_answers, with_kwargs=True) if answers_only else None

    def detach(self) -> None:
        """Give the model back as it was."""
        if self._hook is not None:
            self._hook.remove()
        self.model.set_attn_implementation(self._plain_attention)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    def read_context(self, ids: Sequence[int]) -> list[LayerKeyValues]:
        """Keys and values of a context, for each layer; an empty list for an empty context."""
        context = _ContextKeys(len(self.layers), len(ids))
        for start in range(0, len(ids), CHUNK):
            chunk = list(ids[start : start + CHUNK])
            tokens = torch.tensor([chunk], dtype=torch.long, device=self.device)
            positions = torch.arange(start, start + len(chunk), device=self.device)[None]
            state = _Pass(context.layers(), start + len(chunk), context=context, leave_at=len(self.layers) - 1)
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
        return context.layers()

    def logits(self, packed: Packed, prefix: list[LayerKeyValues]) -> Tensor:
        """Logits at the outputs of packed rows, [N, vocabulary], with a gradient if one is enabled."""
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


@dataclass
class _Pass:
    """What the attention function needs to know of the pass that it is called from."""

    prefix: list[LayerKeyValues]
    longest: int  # tokens of the longest prompt
    packed: Packed | None = None  # None: a chunk of the context itself is read
    context: _ContextKeys | None = None  # where the chunk's keys and values go
    leave_at: int | None = None  # layer at whose attention `_KeysRecorded` is raised
    answers_at: int | None = None  # layer that runs on answer positions alone, with the recorded keys
    recorded: LayerKeyValues | None = None
    reached: set[int] = field(default_factory=set)  # layers whose attention came here


class _KeysRecorded(Exception):  # noqa: N818  leaving a layer early is not an error
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
    """Raise UnsupportedModelError on what would change the result and is not reproduced here."""
    window = settings.get("sliding_window")
    reasons = {
        "attention dropout": dropout > 0,
        "an attention mask of its own": mask is not None,
        "a batch of more than one sequence": query.shape[0] != 1,
        f"a sliding window of {window} tokens, shorter than the prompt of {longest}": window is not None and window < longest,
        "soft-capped attention scores": settings.get("softcap") is not None,
        "attention sinks": settings.get("s_aux") is not None,
        "a position bias": settings.get("position_bias") is not None,
        "query heads that are not a multiple of the key heads": query.shape[1] % key.shape[1] != 0,
    }
    for reason, present in reasons.items():
        if present:
            raise UnsupportedModelError(f"the model uses {reason}")


@contextmanager
def _active(current: _Pass) -> Iterator[_Pass]:
    token = _PASS.set(current)
    try:
        yield current
    finally:
        _PASS.reset(token)


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


def merge(own: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]) -> Tensor:
    """Two attentions over disjoint keys, [T, H, D] with log-sum-exp [T, H], as one over all keys."""
    weight = torch.sigmoid(own[1] - shared[1]).unsqueeze(-1).to(own[0].dtype)
    return torch.lerp(shared[0], own[0], weight)


def grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, ·, D] and [B, key heads, ·, D] → [B·key heads, H / key heads, ·, D], keys broadcast with stride 0."""
    batch, heads, length, size = query.shape
    groups = heads // key.shape[1]
    query = query.reshape(batch * key.shape[1], groups, length, size)
    key, value = (x.reshape(batch * x.shape[1], 1, x.shape[2], x.shape[3]).expand(-1, groups, -1, -1) for x in (key, value))
    return query, key, value


def shared_part(query: Tensor, prefix: LayerKeyValues, scale: float) -> tuple[Tensor, Tensor]:
    """All queries [1, H, T, D] against the context → [T, H, D], [T, H]. Grouped heads are folded into the query length."""
    _, heads, tokens, size = query.shape
    key, value = prefix
    folded = query.reshape(1, key.shape[1], -1, size)
    out, lse = attention_with_lse(folded, key, value, causal=False, scale=scale)
    return out.reshape(heads, tokens, size).transpose(0, 1), lse.reshape(heads, tokens).t()


def own_part(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
    """Each token against its own row's tokens before it → [T, H, D], [T, H]."""
    rows, width = packed.gather.shape
    heads = query.shape[1]
    padded = [x[0].transpose(0, 1)[packed.gather].transpose(1, 2) for x in (query, key, value)]  # [B, heads, L, D]
    if width <= LONGEST_SMALL:
        mask = packed.mask if packed.mask is not None else _causal(width, query.device)
        out, lse = small_attention_with_lse(*padded, mask=mask, scale=scale)
    else:
        mask = None if packed.mask is None else packed.mask.repeat_interleave(key.shape[1], 0)
        out, lse = attention_with_lse(*grouped(*padded), causal=mask is None, scale=scale, mask=mask)
    out = out.reshape(rows, heads, width, -1).transpose(1, 2).reshape(rows * width, heads, -1)
    lse = lse.reshape(rows, heads, width).transpose(1, 2).reshape(rows * width, heads)
    return out[packed.scatter], lse[packed.scatter]


def _causal(width: int, device: torch.device) -> Tensor:
    """[1, 1, L, L] to be added to scores."""
    return torch.full((1, 1, width, width), -torch.inf, device=device).triu(1)


def answer_part(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> tuple[Tensor, Tensor]:
    """Answer positions alone, query [1, H, N, D], against their rows' recorded keys → [N, H, D], [N, H]."""
    heads, outputs = query.shape[1], query.shape[2]
    places = packed.gather[packed.output_rows]  # [N, L]
    single = query[0].transpose(0, 1).unsqueeze(2)  # [N, H, 1, D]
    keys, values = (x[0].transpose(0, 1)[places].transpose(1, 2) for x in (key, value))
    unseen = torch.zeros(packed.visible.shape, device=query.device).masked_fill(~packed.visible, -torch.inf)
    mask = unseen[:, None, None, :].repeat_interleave(key.shape[1], 0)
    out, lse = attention_with_lse(*grouped(single, keys, values), causal=False, scale=scale, mask=mask)
    return out.reshape(outputs, heads, -1), lse.reshape(outputs, heads)
