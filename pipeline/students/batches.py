"""Which examples a step takes: a function of seed, step and the examples' content alone.

An epoch is a permutation that orders examples by sha256(seed, epoch, example_id). It does not depend on the order of rows in a file, on a
random generator's state or on the process, so a run that goes on after an interrupt takes the same batches, and one more example slips into
the order without shuffling the rest. Batches run across the ends of epochs, so that every step has the same size.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np


@dataclass(frozen=True)
class Example:
    """One thing to learn: token ids up to the answer position, and the distribution over the labels that belongs there."""

    example_id: str
    ids: tuple[int, ...]
    target: tuple[float, ...]
    """Probabilities of the labels; a gold label has all of it."""

    @property
    def label(self) -> int:
        """Number of the most probable label: the gold one, where the target is a gold label."""
        return max(range(len(self.target)), key=self.target.__getitem__)


@dataclass(frozen=True)
class Term:
    """One summand of the objective, with examples of its own. Each step takes `batch_size` of them and adds `weight` × their mean loss."""

    loss: Literal["kl", "reverse_kl", "jensen_shannon", "cross_entropy"]
    """`cross_entropy` is that on the most probable label of the target."""
    weight: float
    batch_size: int
    examples: tuple[Example, ...]
    label_weight: float = 0.0
    """Of the cross-entropy on the target's most probable label, on the same examples, beside a divergence."""


def pieces(batches: Sequence[Sequence[Example]], size: int | None) -> list[list[list[Example]]]:
    """A step's batches, one for each term, cut into runs of at most `size` examples; each run has a batch, maybe empty, for each term."""
    numbered = [(number, example) for number, batch in enumerate(batches) for example in batch]
    size = size or max(1, len(numbered))  # no term, no batch: a student may learn from a cache alone
    runs = [numbered[start : start + size] for start in range(0, len(numbered), size)]
    return [[[example for n, example in run if n == number] for number in range(len(batches))] for run in runs]


def permutation(example_ids: Sequence[str], seed: int, epoch: int) -> np.ndarray:
    """Numbers of the examples in the order of an epoch, [N] int64.

    They are ordered by the first 64 bits of sha256_json([seed, epoch, example_id]), which numpy sorts at 8 bytes an example; of 10⁷
    examples two have the same with a chance of 3 in a million, and stand in their own order then.
    """
    front = f"[{seed},{epoch},"
    hashes = (hashlib.sha256(f"{front}{encode_basestring(example)}]".encode()).digest() for example in example_ids)
    digests = np.fromiter((int.from_bytes(found[:8]) for found in hashes), dtype=np.uint64, count=len(example_ids))
    return np.argsort(digests, kind="stable")


class Identified(Protocol):
    """Anything with a content hash to be ordered by."""

    @property
    def example_id(self) -> str:
        """What it is known by."""
        ...


Item = TypeVar("Item", bound=Identified, covariant=True)


class Batched(Protocol[Item]):
    """A summand with examples of its own."""

    @property
    def examples(self) -> tuple[Item, ...]:
        """All of them."""
        ...

    @property
    def batch_size(self) -> int:
        """How many a step takes."""
        ...


class Order(Generic[Item]):
    """The examples of a term, step by step."""

    def __init__(self, term: Batched[Item], seed: int) -> None:
        self._term = term
        example_ids = tuple(example.example_id for example in term.examples)
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permutation(example_ids, seed, epoch))

    def batch(self, step: int) -> list[Item]:
        """The examples of a step, counted from 0."""
        examples, size = self._term.examples, self._term.batch_size
        places = range(step * size, (step + 1) * size)
        return [examples[int(self._epoch(place // len(examples))[place % len(examples)])] for place in places]
