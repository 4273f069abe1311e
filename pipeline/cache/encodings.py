"""What a cache keeps of a distribution over the vocabulary: logits in, columns of `schema.STORED` out.

Every encoding is the same few columns: entries kept (`topk_*`), entries drawn that represent the rest (`sampled_*`), or all
(`full_logprobs`), and the mass of the rest. So one reader serves all of them (`cache/distributions.py`).

Draws are systematic: one uniform number a position, equally spaced points on the cumulative distribution of the rest. An entry is drawn in
proportion to its probability on average, as with independent draws (2503.16870), with less variance. The number comes from the prompt's
hash, so a row's bytes do not depend on its batch. A draw represents a mass of 1/`samples`. In a hybrid, an entry of that probability or
more would be drawn for certain, so it is kept, and the tail is drawn from `samples` times its mass: a sure position takes few bytes.

Rounding keeps float32 columns that any reader understands. With a power of two the low bits are zero and compress away. A log-probability
is off by half the resolution at most, a divergence by about resolution²/24 nats.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.params import CacheParams
from pipeline.schema import STORED

ENTRIES_AT_ONCE = 2**23  # logits that are worked on together; a few arrays of this size are in memory
DRAWN = frozenset({"sampled", "hybrid"})  # encodings with entries drawn at random
Encoded = dict[str, Tensor]
"""The columns of P positions by name, see `_encode`; a width is 0 if the encoding has no such part. Natural logarithms."""


def temperatures(params: CacheParams) -> tuple[float, ...]:
    """The temperatures at which a cache can be read: 1 and those asked for, rising."""
    return (1.0, *sorted({t for t in params.temperatures if t != 1.0}))


def encode(logits: Tensor, params: CacheParams, uniforms: Tensor, hidden_states: Tensor | None = None) -> Encoded:
    """Positions as the cache keeps them; each depends on its own logits alone.

    `logits` [P, V] float32, -inf for a masked entry; `uniforms` [P] in [0, 1), for encodings with draws; `hidden_states` [P, D].
    """
    states = logits.new_zeros(len(logits), 0) if hidden_states is None else hidden_states
    size = max(1, ENTRIES_AT_ONCE // logits.shape[-1])
    pieces = zip(logits.split(size), uniforms.split(size), states.split(size), strict=True)
    return concatenate([_encode(*piece, params) for piece in pieces])


def concatenate(parts: Sequence[Encoded]) -> Encoded:
    """The positions of several, in order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _encode(logits: Tensor, uniforms: Tensor, hidden_states: Tensor, params: CacheParams) -> Encoded:
    positions, vocabulary = logits.shape
    log_z = logits.logsumexp(-1)
    log_p = logits - log_z.unsqueeze(-1)
    full = params.encoding == "full"
    width = 0 if full or params.encoding == "sampled" else min(params.top_k, vocabulary)
    top = log_p.topk(width, dim=-1)
    kept = top.values
    if params.encoding == "hybrid":
        unsure = kept < -math.log(params.samples)
        unsure[:, 0] = False
        kept = kept.masked_fill(unsure, -math.inf)
    # the tail's own entries are summed: 1 - Σ p is rounding noise if little is left
    none_kept = torch.where(kept > -math.inf, -math.inf, 0.0)
    log_tail = torch.full_like(log_p, -math.inf) if full else log_p.scatter_add(-1, top.indices, none_kept)
    tail = log_tail.exp()
    ids = counts = torch.zeros(positions, 0, dtype=torch.int32, device=logits.device)
    if params.encoding in DRAWN:
        ids, counts = _draw(tail, params.samples, uniforms.to(logits.device))
    at = temperatures(params)
    norms = [(log_tail / t).logsumexp(-1) for t in at[1:]]
    return {
        "topk_ids": top.indices.to(torch.int32),  # [P, K] int32, most probable first
        "topk_logprobs": rounded(kept, params),  # [P, K] float32; -inf: no entry
        "sampled_ids": ids,  # [P, M] int32, rising
        "sampled_logprobs": rounded(log_p.gather(-1, ids.long()), params),  # [P, M] float32
        "sampled_counts": counts,  # [P, M] int32; 0: no entry
        "full_logprobs": rounded(log_p, params) if full else log_p.new_zeros(positions, 0),  # [P, V] float32, by token id
        "log_z": log_z,  # [P] float32, log-sum-exp of the logits
        "tail_mass": tail.sum(-1),  # [P] float32, probability outside the top k; 0 if all is kept
        "log_norms": torch.stack(norms, -1) if norms else log_p.new_zeros(positions, 0),  # [P, T - 1] float32, of the tail at each τ ≠ 1
        "entropies": torch.stack([torch.special.entr((log_p / t).softmax(-1)).sum(-1) for t in at], -1),  # [P, T] float32
        "hidden_states": hidden_states.half(),  # [P, D] float16, the chosen layers' outputs one after the other
    }


def rounded(values: Tensor, params: CacheParams) -> Tensor:
    """Log-probabilities as multiples of `resolution_nats`."""
    return values if params.resolution_nats is None else (values / params.resolution_nats).round() * params.resolution_nats


def _draw(tail: Tensor, samples: int, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Systematic draws from `tail` [P, V], about `samples` times its mass: ids [P, M] int32 rising, counts [P, M] int32; 0: no entry."""
    cumulative = tail.double().cumsum(-1)
    total = cumulative[:, -1:]
    draws = (total * samples).round().clamp(1, samples)
    points = torch.arange(samples, device=tail.device, dtype=torch.float64)
    used = points < draws
    points = (uniforms.double().unsqueeze(-1) + points) / draws * total
    points = torch.minimum(points, torch.nextafter(total, torch.zeros_like(total)))  # rounding must not lead past the last entry
    ids = torch.searchsorted(cumulative, points, right=True).clamp_max(tail.shape[-1] - 1)  # right: an entry of no mass is never hit
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    counts = ((ids.unsqueeze(-1) == ids.unsqueeze(-2)) & used.unsqueeze(-2)).sum(-1) * first * used * (total > 0)
    return ids.to(torch.int32), counts.to(torch.int32)


def columns_of(encoded: Encoded, positions: np.ndarray) -> dict[str, pa.Array]:
    """The columns of `schema.STORED` that have distributions, without padding; `positions` [N] are the numbers of positions of N rows."""
    rows = _offsets(positions)
    kept = {"sampled": (encoded["sampled_counts"] > 0).cpu().numpy(), "topk": (encoded["topk_logprobs"] > -math.inf).cpu().numpy()}
    columns: dict[str, pa.Array] = {}
    for name, tensor in encoded.items():
        values, value_type = tensor.cpu().numpy(), cast("Any", STORED.field(name).type).value_type
        if values.ndim == 1:
            columns[name] = pa.ListArray.from_arrays(rows, pa.array(values, type=value_type))
            continue
        mask = kept.get(name.partition("_")[0], np.ones(values.shape, dtype=bool))
        inner = pa.ListArray.from_arrays(_offsets(mask.sum(-1)), pa.array(values[mask], type=value_type.value_type))
        columns[name] = pa.ListArray.from_arrays(rows, inner)
    return columns


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
