"""A method's predictions broken down: reliability bins, confusion matrix, accuracy of each slice, and gaps between slices.

A slice is a named part of an evaluation set: its domain, a gold label, a third by length, or a value of a column that the source names in
`slices`. With many slices some intervals lie apart by chance, and the gap between the best and the worst is never zero. So each gap comes
with a chi-square test that right answers do not depend on the slice, and with the reference's own gap: a student may have learnt it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
from scipy.stats import chi2_contingency

from pipeline.evaluation.metrics import ECE_BINS, Floats, Json, binned, check_probabilities, example_scores, frames, mean_interval, rounded
from pipeline.schema import SLICE, Example

LENGTHS = ("short", "middle", "long")
SMALLEST_SLICE = 20
Scores = Mapping[str, pl.DataFrame]


def detail(table: pa.Table, labels: Sequence[str], members: Scores, domains: Mapping[str, str], *, resamples: int, seed: int) -> Json:
    """`sets` {set: `reliability`, `confusion`} and `slices`: the key of `slice_rows`, `n`, `accuracy`, `ci95` for each.

    `table` follows `schema.PREDICTIONS`; `members[set]` says which slices its examples belong to (`membership`), `domains[set]` is "in" or
    "out". Rows of several runs are pooled in bins and in the matrix; in slices an example's score is their mean.
    """
    by_set = frames(table, labels)
    sets = {
        name: {"reliability": reliability(frame, labels, name), "confusion": confusion(frame, labels)} for name, frame in by_set.items()
    }
    scores = {name: example_scores(frame, name) for name, frame in by_set.items()}
    slices = [
        {**key, "n": len(sample), "accuracy": float(sample.mean()), "ci95": mean_interval([sample], resamples=resamples, seed=seed)}
        for key, sample in slice_rows(scores, labels, members, domains)
    ]
    return rounded({"sets": sets, "slices": slices})


def reliability(frame: pl.DataFrame, labels: Sequence[str], where: str) -> list[Json]:
    """The bins of the expected calibration error that have rows: `low`, `high`, `n`, mean `confidence`, `accuracy`."""
    confidence = check_probabilities(frame, labels, where).max(axis=1)
    right = (frame["predicted"] == frame["label"]).to_numpy()
    return binned(confidence, ECE_BINS, {"confidence": confidence, "accuracy": right})


def confusion(frame: pl.DataFrame, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Gold label → predicted label → rows."""
    counts = {(gold, predicted): n for gold, predicted, n in frame.group_by("label", "predicted").len().iter_rows()}
    return {gold: {predicted: counts.get((gold, predicted), 0) for predicted in labels} for gold in labels}


def membership(examples: Sequence[Example]) -> pl.DataFrame:
    """`example_id`, `words` (of all fields together), and for each dimension a column "slice.NAME" with the example's slice.

    Thirds are by words within the set. Equal lengths stay together, so a third may be empty.
    """
    words = [sum(len(text.split()) for text in example.fields.values()) for example in examples]
    low, high = np.quantile(words, [1 / 3, 2 / 3], method="lower") if words else (0, 0)
    columns = {
        f"{SLICE}label": [example.label for example in examples],
        f"{SLICE}length": [LENGTHS[int(count > low) + int(count > high)] for count in words],
        **{SLICE + name: [example.slices[name] for example in examples] for name in (examples[0].slices if examples else ())},
    }
    data = {"example_id": [example.example_id for example in examples], "words": words, **columns}
    return pl.DataFrame(data, schema_overrides=dict.fromkeys(columns, pl.String))


def slice_rows(scores: Scores, labels: Sequence[str], members: Scores, domains: Mapping[str, str]) -> Iterator[tuple[Json, Floats]]:
    """Each slice's key and its examples' scores: for each dimension and domain, first all sets together, then set by set.

    `scores[set]` is from `metrics.example_scores`, `members[set]` from `membership`. A key has `dimension`, `slice`, `domain`, `set` (None
    for all sets of a domain together) and, for lengths within a set, `words` [fewest, most].
    """
    joined = {name: frame.join(members[name], on="example_id", maintain_order="left") for name, frame in scores.items()}
    present = [domain for domain in ("in", "out") if domain in {domains[name] for name in joined}]
    for domain in present:
        pooled = [frame["score"].to_numpy() for name, frame in joined.items() if domains[name] == domain]
        yield {"dimension": "domain", "slice": domain, "domain": domain, "set": None}, np.concatenate(pooled)
    columns = dict.fromkeys(column for frame in joined.values() for column in frame.columns if column.startswith(SLICE))
    for column in columns:
        dimension = column.removeprefix(SLICE)
        order: Sequence[str] = {"label": labels, "length": LENGTHS}.get(dimension, ())
        for domain in present:
            own = {name: frame for name, frame in joined.items() if domains[name] == domain and column in frame.columns}
            everyone = [(None, pl.concat([frame.select("score", "words", column) for frame in own.values()]))] if own else []
            for name, frame in [*everyone, *own.items()]:
                values = frame[column].drop_nulls().unique().to_list()
                for value in sorted(values, key=lambda value: (order.index(value) if value in order else len(order), value)):
                    part = frame.filter(pl.col(column) == value)
                    key: Json = {"dimension": dimension, "slice": value, "domain": domain, "set": name}
                    if dimension == "length":
                        key["words"] = None if name is None else [part["words"].min(), part["words"].max()]
                    yield key, part["score"].to_numpy()


def gaps(student: Scores, reference: Scores, labels: Sequence[str], members: Scores, domains: Mapping[str, str]) -> list[Json]:
    """One row for each dimension, domain, and set (None: all of the domain) with at least two slices of `SMALLEST_SLICE` examples.

    `student[set]` and `reference[set]` are from `metrics.example_scores`. A row has `p_value` of the student's right answers, and for
    `student` and `reference` the `lowest` and `highest` slice and their `gap`. Between domains, `domain` is None. A domain's only set
    is not listed again.
    """
    present = [domains[name] for name in student]
    groups: list[dict[tuple[str, str | None, str | None], dict[str, Floats]]] = [{}, {}]
    for scores, own in zip((student, reference), groups, strict=True):
        for key, sample in slice_rows(scores, labels, members, domains):
            if len(sample) >= SMALLEST_SLICE and (key["set"] is None or present.count(key["domain"]) > 1):
                domain = None if key["dimension"] == "domain" else key["domain"]
                own.setdefault((key["dimension"], domain, key["set"]), {})[key["slice"]] = sample
    return [
        dict(zip(("dimension", "domain", "set"), key, strict=True))
        | {"p_value": homogeneity(list(slices.values()))}
        | rounded({"student": _extremes(slices), "reference": _extremes(groups[1][key])})
        for key, slices in groups[0].items()
        if len(slices) > 1
    ]


def homogeneity(samples: Sequence[Floats]) -> float | None:
    """P-value of the chi-square test that right answers are as frequent in every slice; None if all answers are right, or all wrong.

    A sample has the score, 0 or 1, of each example of a slice.
    """
    right = np.array([sample.sum() for sample in samples])
    wrong = np.array([len(sample) for sample in samples]) - right
    if not right.sum() or not wrong.sum():
        return None
    return float(f"{cast('Any', chi2_contingency(np.stack([right, wrong]))).pvalue:.3g}")


def _extremes(slices: Mapping[str, Floats]) -> Json:
    means = {name: float(sample.mean()) for name, sample in slices.items()}
    low, high = (end(means, key=means.__getitem__) for end in (min, max))
    found = {end: {"slice": name, "n": len(slices[name]), "accuracy": means[name]} for end, name in (("lowest", low), ("highest", high))}
    return {**found, "gap": means[high] - means[low]}
