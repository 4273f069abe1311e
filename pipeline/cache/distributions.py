"""Cached rows as distributions that a loss can be taken of, whatever their encoding.

A distribution is a few entries with their own log-probabilities, and one of four things for the others (`Tail`).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.encodings import DRAWN, temperatures
from pipeline.errors import MismatchError, UsageError
from pipeline.params import CacheParams

Tail = Literal["none", "bucket", "drawn", "cut"]
"""What represents the entries that are not kept. `none`: all are kept; `bucket`: their total mass; `drawn`: entries drawn from them, each
with a part of their mass; `cut`: nothing, and the kept entries are scaled up to sum to 1."""
TAILS: dict[str, Tail] = {"top_k": "cut", "top_k_tail": "bucket", "sampled": "drawn", "hybrid": "drawn", "full": "none"}
LEAST_RETAINED = 0.5  # least mean mass on kept and drawn entries at a student's temperature
NEGLIGIBLE_MASS = 1e-4  # most mass that a teacher may give to token ids that a student's vocabulary lacks: padding


@dataclass(frozen=True)
class Distributions:
    """P distributions over a vocabulary at one temperature: K entries kept, M drawn. Natural logarithms.

    Σ exp(log_probabilities) + rest + Σ sampled_weights is 1 (on average over draws, if the temperature is not 1). Padding has id 0,
    log-probability -inf and weight 0.
    """

    ids: Tensor  # [P, K] int64
    log_probabilities: Tensor  # [P, K] float32
    sampled_ids: Tensor  # [P, M] int64, not among `ids`
    sampled_log_probabilities: Tensor  # [P, M] float32, each entry's own
    sampled_weights: Tensor  # [P, M] float32, the mass that it stands for
    rest: Tensor  # [P] float32, the bucket's mass
    retained: Tensor  # [P] float32, the teacher's mass on kept and drawn entries
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


def decode(rows: pa.Table, params: CacheParams, temperature: float = 1.0) -> Distributions:
    """The distributions of all positions of `rows`, row by row. `params` are those that the cache was captured with.

    Rounded entries are scaled so that they and the tail sum to 1. At a temperature τ ≠ 1 an entry has p^(1/τ) / Z, Z from the entries and
    the stored norm of the others; draws, made at 1, are weighted by the ratio of the two probabilities. Raises UsageError if the cache
    does not have what `temperature` needs.
    """
    known = temperatures(params)
    if temperature not in known:
        raise UsageError(
            f"temperature {temperature:g}: this cache has what is needed for {', '.join(f'{t:g}' for t in known)}. Take one of these, or "
            f"add it to teachers.*.cache.temperatures, which makes the teacher score again."
        )
    at = known.index(temperature)
    if params.encoding == "full":
        log_p = _padded(rows, "full_logprobs", -np.inf)
        ids = torch.arange(log_p.shape[1]).expand(log_p.shape)
    else:
        log_p = _padded(rows, "topk_logprobs", -np.inf)
        ids = _padded(rows, "topk_ids", 0).long()
    tail_mass = torch.from_numpy(np.array(_positions(rows, "tail_mass")))
    drawn_ids, drawn_log_p = _padded(rows, "sampled_ids", 0).long(), _padded(rows, "sampled_logprobs", -np.inf)
    share = _padded(rows, "sampled_counts", 0).float()
    share = share / share.sum(-1, keepdim=True).clamp_min(1)  # of the tail's mass, at temperature 1
    if log_p.shape[1]:  # what rounding took from the entries' sum, or added
        log_p = log_p + (torch.log1p(-tail_mass.clamp_max(1 - 1e-6)) - log_p.logsumexp(-1)).unsqueeze(-1)
    log_tail = tail_mass.log()
    weights = share * tail_mass.unsqueeze(-1)
    if at:
        log_tail = _padded(rows, "log_norms", -np.inf, len(known) - 1)[:, at - 1]
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
        entropy=_padded(rows, "entropies", 0.0, len(known))[:, at],
        tail=TAILS[params.encoding],
    )


def check_retained(distributions: Distributions, params: CacheParams, temperature: float) -> None:
    """Raise UsageError if positions retain too little mass on average. Entries drawn at their own temperature pass: they are unbiased."""
    mean = float(distributions.retained.mean())
    if mean >= LEAST_RETAINED or (temperature == 1.0 and distributions.tail == "drawn"):
        return
    raise UsageError(
        f"at temperature {temperature:g} the cache retains {mean:.1%} of the teacher's mass, the mean of {len(distributions)} positions "
        f"(encoding {params.encoding}, top_k {params.top_k}, {params.samples} samples), and {LEAST_RETAINED:.0%} are needed. Lower the "
        "student's `temperature`, raise teachers.*.cache.top_k or .samples, or take encoding `full`."
    )


def fit_vocabulary(distributions: Distributions, size: int) -> Distributions:
    """The same without the entries from `size` on, which a student's vocabulary lacks. Raises MismatchError unless they are padding."""
    past, drawn_past = distributions.ids >= size, distributions.sampled_ids >= size
    if not past.any() and not drawn_past.any():
        return distributions
    lost = (distributions.log_probabilities.exp() * past).sum(-1) + (distributions.sampled_weights * drawn_past).sum(-1)
    if float(lost.max()) > NEGLIGIBLE_MASS:
        top = int(torch.cat([distributions.ids.flatten(), distributions.sampled_ids.flatten()]).max())
        raise MismatchError(
            f"the teacher gives up to {float(lost.max()):.2%} of its mass to token ids past the student's vocabulary of {size} (the "
            f"largest is {top}), so they do not share a tokenizer. Take a student of the teacher's family."
        )
    return replace(
        distributions,
        ids=distributions.ids.masked_fill(past, 0),
        log_probabilities=distributions.log_probabilities.masked_fill(past, -math.inf),
        sampled_ids=distributions.sampled_ids.masked_fill(drawn_past, 0),
        sampled_log_probabilities=distributions.sampled_log_probabilities.masked_fill(drawn_past, -math.inf),
        sampled_weights=distributions.sampled_weights.masked_fill(drawn_past, 0.0),
    )


def _positions(rows: pa.Table, name: str) -> Any:
    """A column's entries for each position, over all rows."""
    column: Any = rows[name].combine_chunks()
    return column.flatten()


def _padded(rows: pa.Table, name: str, padding: float, least: int = 0) -> Tensor:
    """A column's list for each position, [P, longest], or [P, least] if that is more."""
    lists = _positions(rows, name)
    lengths = np.diff(lists.offsets.to_numpy())
    values = lists.flatten().to_numpy(zero_copy_only=False)
    width = int(lengths.max(initial=least))
    out = np.full((len(lengths), width), padding, dtype=values.dtype)
    out[np.arange(width) < lengths[:, None]] = values
    return torch.from_numpy(out)
