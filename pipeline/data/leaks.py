"""Copies of evaluation examples among what is learnt from: exact ones and near ones, found exactly and not by sampling.

Two texts are compared as sets of character 5-grams, with case, punctuation and runs of white space put aside; they are copies where the
Jaccard similarity |A ∩ B| / |A ∪ B| reaches a threshold. Only 5-grams of the evaluation examples can be shared, so the vocabulary is
theirs alone, and a sparse product in blocks counts what is shared at bounded memory. The trade-off: every pair is looked at, about 0.1 ms
for a candidate against 1,200 short evaluation texts. A locality-sensitive hash would be quicker and could miss a leak.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from pipeline.progress import progress

GRAM = 5
PAIRS_IN_A_BLOCK = 4_000_000
"""Entries of one block's product at most; a block then takes at most about 50 MB."""
CANDIDATES_IN_A_BLOCK = 4096
"""However few the originals: 5-grams of short texts take about 10 kB each."""
_NOT_WORD = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True, slots=True)
class Copy:
    """`candidate` and `original` are positions in the two lists; the most similar original, the first of equals."""

    candidate: int
    original: int
    similarity: float


def normalise(text: str) -> str:
    """Text without case, punctuation and runs of white space; a text of punctuation alone keeps it."""
    plain = text.casefold()
    return " ".join(_NOT_WORD.sub(" ", plain).split()) or " ".join(plain.split())


def grams(text: str) -> frozenset[str]:
    """Character 5-grams of the normalised text; the text itself where it is shorter."""
    plain = normalise(text)
    return frozenset([plain[i : i + GRAM] for i in range(max(len(plain) - GRAM + 1, 1))])


def find_copies(candidates: Sequence[str], originals: Sequence[str], threshold: float) -> Iterator[Copy]:
    """Yield each candidate that is a copy of an original: similarity at least `threshold`, in (0, 1]; 1 means the same 5-grams."""
    if not originals:
        return
    original_grams = [grams(text) for text in originals]
    counter: Any = CountVectorizer(analyzer=_as_given, dtype=np.int32)  # type: ignore[arg-type] (stubs know no callable)
    original_sizes = np.array([len(own) for own in original_grams])
    shared_by = counter.fit_transform(original_grams).T.tocsr()  # (5-grams, originals)
    block = min(max(1, PAIRS_IN_A_BLOCK // len(originals)), CANDIDATES_IN_A_BLOCK)
    with progress("leak check", len(candidates), "texts") as meter:
        for start in range(0, len(candidates), block):
            own_grams = [grams(text) for text in candidates[start : start + block]]
            sizes = np.array([len(own) for own in own_grams])
            pairs = (counter.transform(own_grams) @ shared_by).tocoo()  # (candidates, originals): 5-grams in common
            similarity = pairs.data / (sizes[pairs.row] + original_sizes[pairs.col] - pairs.data)
            close = np.flatnonzero(similarity >= threshold)
            best: dict[int, Copy] = {}
            for at in close[np.lexsort((pairs.col[close], -similarity[close], pairs.row[close]))]:
                row = int(pairs.row[at])
                best.setdefault(row, Copy(start + row, int(pairs.col[at]), float(similarity[at])))
            yield from best.values()
            meter.advance(len(own_grams))


def _as_given(own: frozenset[str]) -> frozenset[str]:
    """The vectoriser's analyzer: it is given sets of 5-grams, so that their sizes need no second pass over the text."""
    return own
