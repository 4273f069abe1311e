"""What to label next, and which labels to look at again: from answers that are there already.

Voters are the contexts of a student's target set, calibrated, and the student. A text's label teaches most where their mean is undecided,
because they are, or since they disagree; those chosen are spread over the texts. A label is suspect if every context that has not seen it
names the same other label (docs/data.md, "What to label next").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans

from pipeline.cache.folder import read_cache
from pipeline.errors import MismatchError
from pipeline.files import Folders, read_json
from pipeline.models.held_back import spread
from pipeline.schema import LABELLED, Example, read_examples, read_table
from pipeline.serving.predictor import Predictor
from pipeline.targets.build import scores_in_contexts
from pipeline.targets.calibration import combination_of

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class ToReview:
    """A text whose label is wanted (`why`: next), or is doubted (suspect)."""

    example: Example
    why: str
    suggested: str
    probability: float  # of the suggested label


def choose(probabilities: np.ndarray, states: np.ndarray, most: int) -> list[int]:
    """Rows whose labels teach most, `most` or as many as there are, least decided first; `probabilities` [N, L] are the voters' mean.

    Weighted k-means (1901.05954): `states` [N, H] are clustered, a row weighs (1 - margin)², and each cluster's centre gets the row that is
    nearest to it, no row twice. The margin is that of the most probable label before the next.
    """
    ranked, scaled = np.sort(probabilities, axis=-1), states / spread(states)
    weights = np.maximum(1 - ranked[:, -1] + ranked[:, -2], 1e-6) ** 2
    clusters = KMeans(min(most, len(scaled)), random_state=0).fit(scaled, sample_weight=weights)
    rows = linear_sum_assignment(clusters.transform(scaled).T)[1]
    return rows[np.argsort(-weights[rows], kind="stable")].tolist()


def suspects(voters: np.ndarray, gold: np.ndarray) -> list[int]:
    """Rows in which all `voters` [V, N, L] name one label that is not the row's own, `gold` [N]; most probable in the mean first."""
    named, mean = voters.argmax(-1), voters.mean(0)
    rows = np.flatnonzero((named == named[0]).all(0) & (named[0] != gold))
    return rows[np.argsort(-mean[rows].max(-1), kind="stable")].tolist()


def texts_to_review(targets: str, predictor: Predictor, most: int, folders: Folders) -> list[ToReview]:
    """Suspects first, then the texts to label next, at most `most` of each.

    `predictor` keeps states; `targets` is the target set whose teachers vote. Raises MismatchError if its labels are not the student's.
    """
    task, read = predictor.task, (lambda role: read_examples(folders.artifacts / "data" / f"{role}.parquet", predictor.task.fields))
    calibration = read_json(folders.artifacts / "targets" / targets / "calibration.json")
    if calibration["labels"] != list(task.labels):
        raise MismatchError(f"targets/{targets} has the labels {calibration['labels']}, the student {list(task.labels)}. Run `dvc repro`.")
    names = list(calibration["teachers"])

    tables = {name: read_table(folders.artifacts / "labelled" / f"{name}.parquet", LABELLED) for name in names}
    unseen = set[str]().union(*(table["example_id"].to_pylist() for table in tables.values()))
    labelled = [example for example in read("demonstrations") if example.example_id in unseen]
    found = list[ToReview]()
    if labelled:
        voters = _voters(calibration, tables, labelled)
        gold = np.array([task.labels.index(str(example.label)) for example in labelled])
        found += [_asked(labelled[row], "suspect", task.labels, voters.mean(0)[row]) for row in suspects(voters, gold)[:most]]

    transfer = read("transfer")
    caches = {name: read_cache(folders.artifacts / "teachers" / name, LABELLED.names).rows for name in names}
    answers = [
        answer
        for start in range(0, len(transfer), ROWS_AT_ONCE)
        for answer in predictor.predict([example.fields for example in transfer[start : start + ROWS_AT_ONCE]])
    ]
    usable = [at for at, answer in enumerate(answers) if answer.probabilities is not None]
    if lost := len(answers) - len(usable):
        print(f"{lost:,} texts of the transfer set have no answer of the student and are not asked about")
    voters = _voters(calibration, caches, [transfer[at] for at in usable])
    own = np.array([list((answers[at].probabilities or {}).values()) for at in usable])
    # The student counts as one teacher more, its contexts being one.
    mean = (len(names) * np.tensordot(combination_of(calibration, "").shares, voters, axes=1) + own) / (len(names) + 1)
    states = np.array([answers[at].state for at in usable])
    return found + [_asked(transfer[usable[row]], "next", task.labels, mean[row]) for row in choose(mean, states, most)]


def _voters(calibration: Mapping[str, Any], tables: Mapping[str, pa.Table], examples: Sequence[Example]) -> np.ndarray:
    """Calibrated probabilities of every context, [C, N, L]."""
    contexts, ids = calibration["contexts"], [example.example_id for example in examples]
    own = {name: [context for context in contexts if context["teacher"] == name] for name in tables}
    scores = np.concatenate([scores_in_contexts(name, table, own[name], ids) for name, table in tables.items()])
    voters = np.empty_like(scores)
    for source in {example.source for example in examples}:
        rows = [at for at, example in enumerate(examples) if example.source == source]
        voters[:, rows] = combination_of(calibration, source).each(scores[:, rows])
    return voters


def _asked(example: Example, why: str, labels: Sequence[str], probabilities: np.ndarray) -> ToReview:
    return ToReview(example, why, labels[int(probabilities.argmax())], float(probabilities.max()))
