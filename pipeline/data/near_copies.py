"""Near copies of some texts among others: every pair is compared, so none is missed.

Two texts are compared as sets of character 5-grams, without case, punctuation and runs of white space. They are copies if the Jaccard
similarity |A ∩ B| / |A ∪ B| reaches a threshold. What the rows of both sides have in common says nothing about one of them, and is left
out: 5-grams that many rows have (the headings of a form, everybody's footer), and passages of words that some rows have (one sender's
signature). A text that has nothing else is compared as a whole, so that equal texts are always copies.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import CountVectorizer

GRAM = 5
COMMON_SHARE, COMMON_ROWS = 0.2, 10
"""A 5-gram is common if, in either of the two sets of texts, it is in more than this share of the rows and in at least this many."""
SAMPLE = 400
"""Rows of each side, about, in which common 5-grams are counted."""
PASSAGE, PASSAGE_ORIGINALS, PASSAGE_SAMPLE, LEAST_REST = 8, 3, 1000, 20
"""A passage is a run of this many words that COMMON_ROWS of the rows and this many originals have, counted in samples of this many texts.
Characters that a text must have besides its passages."""
BLOCK = 1024
"""Candidates compared at once; 1,000 originals then take about 10 MB."""
_NOT_WORD = re.compile(r"[^\w\s]|_")


@dataclass(frozen=True, slots=True)
class Copy:
    """The most similar original, the first of equals: its group, its place there, and the similarity in (0, 1]."""

    group: str
    original: int
    similarity: float


class Originals:
    """Texts of which copies are looked for, in named groups.

    `rows` are texts of the source that the candidates come from. A 5-gram that is common there and in one of the groups is left out.
    """

    def __init__(self, groups: Mapping[str, Sequence[str]], rows: Sequence[str], threshold: float) -> None:
        self._places = [(group, at) for group, texts in groups.items() for at in range(len(texts))]
        self._threshold = threshold
        self._common = _common(rows).intersection(set[str]().union(*(_common(texts) for texts in groups.values())))
        originals = [text for texts in groups.values() for text in texts]
        known = _passages(originals, PASSAGE_ORIGINALS)
        self._passages = known and known & _passages(rows, COMMON_ROWS)
        grams = [self._grams(text) for text in originals]
        self._sizes = np.array([len(own) for own in grams])
        self._counter = CountVectorizer(analyzer=cast("Any", list))  # of sets of 5-grams
        self._having = csr_array(self._counter.fit_transform(grams or [[""]])).T.tocsr()  # (5-grams, originals): 1 for each that one has

    def copies(self, candidates: Sequence[str]) -> list[Copy | None]:
        """For each candidate the original that it is a copy of, or None."""
        found: list[Copy | None] = [None] * len(candidates)
        for start in range(0, len(candidates) if self._places else 0, BLOCK):
            grams = [self._grams(text) for text in candidates[start : start + BLOCK]]
            sizes = np.array([len(own) for own in grams])
            pairs = (csr_array(self._counter.transform(grams)) @ self._having).tocoo()  # (candidates, originals): 5-grams in common
            similarity = pairs.data / (sizes[pairs.row] + self._sizes[pairs.col] - pairs.data)
            close = np.flatnonzero(similarity >= self._threshold)
            for at in close[np.lexsort((-pairs.col[close], similarity[close]))]:  # the best comes last
                group, original = self._places[int(pairs.col[at])]
                found[start + int(pairs.row[at])] = Copy(group, original, float(similarity[at]))
        return found

    def _grams(self, text: str) -> frozenset[str]:
        if self._passages:
            words = normalise(text).split()
            covered = {at + i for at, run in enumerate(_runs(words)) if run in self._passages for i in range(PASSAGE)}
            rest = " ".join(word for at, word in enumerate(words) if at not in covered)
            text = rest if len(rest) >= LEAST_REST else text
        return (grams(text) - self._common) or frozenset([normalise(text)])


def normalise(text: str) -> str:
    """Text without case, punctuation and runs of white space; a text of punctuation alone keeps it."""
    plain = text.casefold()
    return " ".join(_NOT_WORD.sub(" ", plain).split()) or " ".join(plain.split())


def grams(text: str) -> frozenset[str]:
    """Character 5-grams of the normalised text; the text itself if it is shorter."""
    plain = normalise(text)
    return frozenset(plain[i : i + GRAM] for i in range(max(len(plain) - GRAM + 1, 1)))


def _runs(words: Sequence[str]) -> list[str]:
    return [" ".join(words[at : at + PASSAGE]) for at in range(len(words) - PASSAGE + 1)]


def _common(texts: Sequence[str]) -> frozenset[str]:
    """The 5-grams that many of the texts have, counted in every n-th of them."""
    sample = texts[:: max(1, len(texts) // SAMPLE)]
    counts = Counter(gram for text in sample for gram in grams(text))
    return frozenset(gram for gram, count in counts.items() if count >= COMMON_ROWS and count > COMMON_SHARE * len(sample))


def _passages(texts: Sequence[str], least: int) -> frozenset[str]:
    """The runs of words that enough of the texts share; only every n-th text is counted."""
    sample = texts[:: max(1, len(texts) // PASSAGE_SAMPLE)]
    counts = Counter(run for text in sample for run in set(_runs(normalise(text).split())))
    return frozenset(run for run, count in counts.items() if count >= least)
