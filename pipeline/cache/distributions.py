"""Cached rows read back as distributions that a loss can be taken of, whatever encoding they were written in.

A distribution is a few entries with their exact log-probabilities, and one of four things for the others (`Tail`). What a loss has to know
is the same for all encodings, so none asks which it was. Everything is padded batches of tensors: reading is a handful of array operations
for a batch, none for a row.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.encodings import DRAWN, temperatures
from pipeline.errors import MismatchError, UsageError
from pipeline.params import CacheParams

Tail = Literal["none", "bucket", "drawn", "cut"]
"""What stands for the entries that are not kept exactly: nothing, for all are; one bucket of known mass; entries drawn from them at random,
each standing for a part of their mass; nothing, though they had mass, and the kept ones were scaled up to sum to 1."""
TAILS: dict[str, Tail] = {"top_k": "cut", "top_k_tail": "bucket", "sampled": "drawn", "hybrid": "drawn", "full": "none"}
LEAST_RETAINED = 0.5
"""Mass that must be left at a student's temperature, in the mean over positions."""
NEGLIGIBLE_MASS = 1e-4
"""What a teacher may give to the padding of its vocabulary, which a student's vocabulary lacks."""


@dataclass(frozen=True)
class Distributions:
    """P distributions over a vocabulary at one temperature: K entries kept exactly, M drawn. Natural logarithms.

    Σ exp(log_probabilities) + rest is 1, and so is Σ exp(log_probabilities) + Σ sampled_weights where entries are drawn (on average over
    draws, if the temperature is not 1). An entry that is padding has id 0, log-probability -inf and weight 0.
    """

    ids: Tensor  # [P, K] int64
    log_probabilities: Tensor  # [P, K] float32
    sampled_ids: Tensor  # [P, M] int64, none of them among `ids`
    sampled_log_probabilities: Tensor  # [P, M] float32, each entry's own
    sampled_weights: Tensor  # [P, M] float32, the mass that it stands for
    rest: Tensor  # [P] float32, mass without any entry: the bucket's
    retained: Tensor  # [P] float32, the teacher's mass on the entries that are kept or drawn
    entropy: Tensor  # [P] float32, of the teacher's whole distribution
    tail: Tail

    def __len__(self) -> int:
        return len(self.rest)

    def take(self, positions: Tensor | slice) -> "Distributions":
        """Some positions, in the order given."""
        return replace(self, **{name: getattr(self, name)[positions] for name in TENSORS})

    def to(self, device: torch.device | str) -> "Distributions":
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})


TENSORS = tuple(name for name in Distributions.__annotations__ if name != "tail")


def certain(ids: Tensor) -> Distributions:
    """All mass on one token at each position, as a text that is given says: ids [P]."""
    nothing = torch.zeros(len(ids), 0, device=ids.device)
    zero = nothing.new_zeros(len(ids))
    one = torch.ones_like(zero)
    return Distributions(ids.unsqueeze(-1), zero.unsqueeze(-1), nothing.long(), nothing, nothing, zero, one, zero, "none")


def decode(rows: pa.Table | pa.RecordBatch, params: CacheParams, temperature: float = 1.0) -> Distributions:
    """The distributions of all positions of `rows`, one row's after the other's.

    `rows` have the columns of `schema.SCORES` that begin with topk, sampled and full, tail_mass, log_norms, entropies. `params` are what
    the cache was captured with. Rounded entries are scaled so that they and the tail sum to 1. At another temperature τ than 1, p^(1/τ)/Z
    with Z from the entries and the stored norm of the others; draws, made at 1, are weighted by the ratio of the two probabilities.
    Raises UsageError where the cache cannot be read at `temperature`.
    """
    known = temperatures(params)
    if temperature not in known:
        raise UsageError(
            f"temperature {temperature:g}: this cache holds what is needed for {', '.join(f'{t:g}' for t in known)}. Take one of these, or "
            f"add it to teachers.*.cache.temperatures, which makes the teacher score again."
        )
    at = known.index(temperature)
    columns = _Columns(rows)
    if params.encoding == "full":
        log_p = columns.padded("full_logprobs", -np.inf)
        ids = torch.arange(log_p.shape[1]).expand(log_p.shape)
    else:
        log_p = columns.padded("topk_logprobs", -np.inf)
        ids = columns.padded("topk_ids", 0).long()
    tail_mass = columns.scalars("tail_mass")
    drawn_ids, drawn_log_p = columns.padded("sampled_ids", 0).long(), columns.padded("sampled_logprobs", -np.inf)
    share = columns.padded("sampled_counts", 0).float()
    share = share / share.sum(-1, keepdim=True).clamp_min(1)  # of the tail's mass, at temperature 1
    if log_p.shape[1]:  # what rounding took from the entries' sum, or added
        log_p = log_p + (torch.log1p(-tail_mass.clamp_max(1 - 1e-6)) - log_p.logsumexp(-1)).unsqueeze(-1)
    log_tail = tail_mass.log()
    weights = share * tail_mass.unsqueeze(-1)
    if at:
        log_tail = columns.padded("log_norms", -np.inf, len(known) - 1)[:, at - 1]
        log_p, drawn_tempered = log_p / temperature, drawn_log_p / temperature
        log_z = torch.logsumexp(torch.cat([log_p, log_tail.unsqueeze(-1)], -1), -1, keepdim=True)
        log_p, log_tail, drawn_tempered = log_p - log_z, log_tail - log_z.squeeze(-1), drawn_tempered - log_z
        weights = torch.where(weights > 0, weights * (drawn_tempered - drawn_log_p).exp(), 0.0)
        drawn_log_p = drawn_tempered
    head, rest = log_p.exp().sum(-1), log_tail.exp()
    if params.encoding == "top_k":
        log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    return Distributions(
        ids=ids,
        log_probabilities=log_p,
        sampled_ids=drawn_ids,
        sampled_log_probabilities=drawn_log_p,
        sampled_weights=weights,
        rest=rest if params.encoding == "top_k_tail" else torch.zeros_like(rest),
        retained=(head + drawn_log_p.exp().sum(-1)).clamp_max(1.0) if params.encoding in DRAWN else head,
        entropy=columns.padded("entropies", 0.0, len(known))[:, at],
        tail=TAILS[params.encoding],
    )


def hidden_states(rows: pa.Table | pa.RecordBatch) -> Tensor:
    """The kept layers' outputs at all positions of `rows`, side by side, [P, D] float16; D is 0 where none were kept."""
    return _Columns(rows).padded("hidden_states", 0)


def check_retained(distributions: Distributions, params: CacheParams, temperature: float, least: float = LEAST_RETAINED) -> float:
    """Mean retained mass; `distributions` are a sample of a cache's positions, or all, at `temperature`.

    Raises UsageError where it is under `least`: a student would learn from what happened to be kept. Entries drawn at the very temperature
    they are used at are an unbiased sample however little mass they have, and are let pass.
    """
    mean = float(distributions.retained.mean())
    if mean >= least or (temperature == 1.0 and distributions.tail == "drawn"):
        return mean
    kept = {"sampled": f"{params.samples} draws", "hybrid": f"top {params.top_k} and {params.samples} draws"}
    raise UsageError(
        f"at temperature {temperature:g} the cache retains {mean:.1%} of the teacher's mass in the mean over {len(distributions)} "
        f"positions ({kept.get(params.encoding, f'top {params.top_k}')}), and {least:.0%} is the least: lower the student's `temperature`, "
        "or raise teachers.*.cache.top_k or .samples, or take encoding `full`."
    )


def fit_vocabulary(distributions: Distributions, size: int) -> Distributions:
    """The same for a student whose token ids end before `size`: entries past it, a teacher's padding, are taken out.

    Raises MismatchError where they have mass: then the two do not share a vocabulary.
    """
    past, drawn_past = distributions.ids >= size, distributions.sampled_ids >= size
    if not past.any() and not drawn_past.any():
        return distributions
    lost = (distributions.log_probabilities.exp() * past).sum(-1) + (distributions.sampled_weights * drawn_past).sum(-1)
    if float(lost.max()) > NEGLIGIBLE_MASS:
        top = int(max(distributions.ids.max() if past.any() else 0, distributions.sampled_ids.max() if drawn_past.any() else 0))
        raise MismatchError(
            f"the teacher gives up to {float(lost.max()):.2%} of its mass to token ids past the student's vocabulary of {size} (the "
            f"largest is {top}): they do not share a tokenizer. Take a student of the teacher's family, or a teacher of the student's."
        )
    return replace(
        distributions,
        ids=distributions.ids.masked_fill(past, 0),
        log_probabilities=distributions.log_probabilities.masked_fill(past, -math.inf),
        sampled_ids=distributions.sampled_ids.masked_fill(drawn_past, 0),
        sampled_log_probabilities=distributions.sampled_log_probabilities.masked_fill(drawn_past, -math.inf),
        sampled_weights=distributions.sampled_weights.masked_fill(drawn_past, 0.0),
    )


class _Columns:
    """Lists of lists, a list for each position, as arrays over all positions."""

    def __init__(self, rows: pa.Table | pa.RecordBatch) -> None:
        self.rows = rows

    def _positions(self, name: str) -> pa.Array:
        column = self.rows.column(name)
        if isinstance(column, pa.ChunkedArray):
            column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # an empty table, or one too large for a chunk
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return column.flatten()

    def scalars(self, name: str) -> Tensor:
        """A number a position, [P]."""
        return torch.from_numpy(np.array(self._positions(name)))

    def padded(self, name: str, padding: float, least: int = 0) -> Tensor:
        """A list a position, [P, longest], or [P, least] where that is more."""
        lists = self._positions(name)
        lengths = np.diff(lists.offsets.to_numpy())
        values = lists.flatten().to_numpy(zero_copy_only=False)
        width = int(lengths.max(initial=least))
        if len(values) == len(lengths) * width:  # all of one length
            return torch.from_numpy(np.array(values.reshape(len(lengths), width)))
        out = np.full((len(lengths), width), padding, dtype=values.dtype)
        out[np.arange(width) < lengths[:, None]] = values
        return torch.from_numpy(out)
