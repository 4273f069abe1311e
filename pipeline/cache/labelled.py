"""Folds of the labelled examples: whoever answers an example of a fold has not seen the fold, and so leans a little otherwise."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.schema import Example

LABELLED_FILE = "labelled.parquet"
"""In a tuned model's folder: `schema.LABELLED` of models that were tuned as it was, each without a fold."""
MOST_FOLDS = 4
MOST_JUDGED = 256
"""Labelled examples that are in a fold, about: enough to judge by, and each costs a teacher as much as an unlabelled text."""
COMPARED = 32
"""Unlabelled texts by which leans are compared. Few are enough, since both answer the same ones."""


def folds_of(labels: Sequence[object]) -> list[list[int]]:
    """Places of examples by fold, the first ones of each label in turn; `labels` has each example's own.

    There are `MOST_FOLDS`, or as many as the most frequent label has examples. The only example of a label is in none: no one could know
    its label without it.
    """
    counts = Counter(labels)
    folds = min(MOST_FOLDS, max(counts.values(), default=0))
    if folds < 2:
        return []
    found, seen, most = [list[int]() for _ in range(folds)], Counter[object](), max(folds, MOST_JUDGED // len(counts))
    for place, label in enumerate(labels):
        if counts[label] > 1 and seen[label] < most:
            found[seen[label] % folds].append(place)
        seen[label] += 1
    return found


def compared_texts(transfer: Sequence[Example]) -> list[Example]:
    """The `COMPARED` of the unlabelled texts."""
    return sorted(transfer, key=lambda example: example.example_id)[:COMPARED]


def with_the_teachers_lean(answers: np.ndarray, own: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """The answers [..., N, L] of a model or prompt without a fold, as if it leaned to the labels as the teacher does.

    `own` and `teacher` [..., P, L] are what both say of `compared_texts`, whose labels are not needed: on the same texts the mean
    difference is one of leans. All are log-probabilities of labels in nats, but for a constant that the labels share.
    """
    return answers + (teacher - own).mean(-2, keepdims=True)
