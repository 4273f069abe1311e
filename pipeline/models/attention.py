"""Attention in two parts, merged: a row's own tokens, and the context that all rows share.

The context's keys and values are held once, and all rows' queries meet that one copy; a row's own part is a small padded batch, the only
padding there is. The halves are merged by their log-sum-exp, as in cascade attention. Key heads are never repeated in memory: grouped
query heads are folded into the query length or broadcast with stride 0.

Letters of shapes: B rows, L places of the longest row, T packed tokens, H query heads, D head size, N outputs.
"""

import torch
from torch import Tensor

from pipeline.models.rows import Packed

LayerKeyValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [1, key heads, tokens, head size]."""
LONGEST_SMALL = 256
"""Rows of at most so many tokens have all their attention scores held at once: 4 bytes × heads × tokens × this, a pass."""


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
