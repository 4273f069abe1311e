"""A method's predictions broken down: reliability bins, confusion matrix, and accuracy for each slice of the evaluation sets.

A slice is a named part of a set: its domain, a gold label, a third by length, or a value of a column that the source names in `slices`.
The rows are flat, so that a table can be made of them without knowing the dimensions. Trade-off: intervals are one slice's own; with
many slices some lie apart by chance, which is what the test in `pipeline.evaluation.gaps` is for.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.evaluation.metrics import ECE_BINS, check_probabilities, confidence_bins, example_scores, frames, mean_interval, rounded
from pipeline.schema import SLICE

LENGTHS = ("short", "middle", "long")
DOMAIN_SLICES = "domain"


def detail(
    table: pa.Table, labels: Sequence[str], members: Mapping[str, pl.DataFrame], domains: Mapping[str, str], *, resamples: int, seed: int
) -> dict[str, Any]:
    """`sets` {set: `reliability`, `confusion`} and `slices`, a list of rows; see `slice_rows` for theirs.

    `table` follows `schema.PREDICTIONS`; `members[set]` says which slices its examples belong to (`membership`), `domains[set]` is
    "in" or "out". Several contexts' rows are pooled in bins and in the matrix; in slices an example's score is their mean.
    """
    by_set = frames(table, labels)
    sets = {
        name: {"reliability": reliability(frame, labels, name), "confusion": confusion(frame, labels)} for name, frame in by_set.items()
    }
    scores = {name: example_scores(frame, name) for name, frame in by_set.items()}
    rows = [_row(key, sample, resamples, seed) for key, sample in slice_rows(scores, labels, members, domains)]
    return rounded({"sets": sets, "slices": rows})


def reliability(frame: pl.DataFrame, labels: Sequence[str], where: str) -> list[dict[str, Any]]:
    """The bins of the expected calibration error that hold a row: `low` (not in it), `high` (in it), `n`, mean `confidence`, `accuracy`."""
    confidence = check_probabilities(frame, labels, where).max(axis=1)
    right = (frame["predicted"] == frame["label"]).to_numpy()
    bins = confidence_bins(confidence)
    return [
        {
            "low": b / ECE_BINS,
            "high": (b + 1) / ECE_BINS,
            "n": int((bins == b).sum()),
            "confidence": float(confidence[bins == b].mean()),
            "accuracy": float(right[bins == b].mean()),
        }
        for b in sorted(set(bins.tolist()))
    ]


def confusion(frame: pl.DataFrame, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Gold label → predicted label → rows."""
    counts = {(gold, predicted): n for gold, predicted, n in frame.group_by("label", "predicted").len().iter_rows()}
    return {gold: {predicted: counts.get((gold, predicted), 0) for predicted in labels} for gold in labels}


def words_of(examples: pl.DataFrame, fields: Sequence[str]) -> pl.Series:
    """Words of each example, all fields together: runs of characters that are no white space."""
    return examples.select(pl.sum_horizontal(pl.col(field).str.count_matches(r"\S+") for field in fields).cast(pl.Int64)).to_series()


def membership(examples: pl.DataFrame, fields: Sequence[str]) -> pl.DataFrame:
    """An evaluation set's examples with what they are sliced by: `example_id`, `words`, and a column for each dimension.

    `examples` has the columns of `schema.examples`. Thirds are by words within the set; lengths that tie stay together, so that a third
    may be empty.
    """
    words = words_of(examples, fields)
    low, high = np.quantile(words.to_numpy(), [1 / 3, 2 / 3], method="lower") if len(words) else (0, 0)
    third = pl.when(pl.col("words") <= low).then(pl.lit(LENGTHS[0])).when(pl.col("words") <= high).then(pl.lit(LENGTHS[1]))
    named = {column.removeprefix(SLICE): column for column in examples.columns if column.startswith(SLICE)}
    return examples.with_columns(words.alias("words")).select(
        "example_id", "words", "label", third.otherwise(pl.lit(LENGTHS[2])).alias("length"), *(pl.col(c).alias(n) for n, c in named.items())
    )


Key = dict[str, Any]


def slice_rows(
    scores: Mapping[str, pl.DataFrame], labels: Sequence[str], members: Mapping[str, pl.DataFrame], domains: Mapping[str, str]
) -> Iterator[tuple[Key, np.ndarray]]:
    """Each slice's key and its examples' scores: for each dimension and domain, first all sets together, then set by set.

    `scores[set]` is from `metrics.example_scores`, `members[set]` from `membership`. A key has `dimension`, `slice`, `domain`, `set` (None
    for all sets of a domain together) and, for lengths within a set, `words` [fewest, most].
    """
    joined = {name: frame.join(members[name], on="example_id", maintain_order="left") for name, frame in scores.items()}
    present = [domain for domain in ("in", "out") if domain in {domains[name] for name in joined}]
    for domain in present:
        pooled = [joined[name]["score"].to_numpy() for name in joined if domains[name] == domain]
        yield {"dimension": DOMAIN_SLICES, "slice": domain, "domain": domain, "set": None}, np.concatenate(pooled)
    dimensions = dict.fromkeys(c for frame in joined.values() for c in frame.columns if c not in {"example_id", "score", "words"})
    for dimension in dimensions:
        for domain in present:
            own = {name: frame for name, frame in joined.items() if domains[name] == domain and dimension in frame.columns}
            columns = ["score", "words", dimension]
            everyone = [(None, pl.concat([frame.select(columns) for frame in own.values()]))] if own else []
            for name, frame in [*everyone, *own.items()]:
                for value in _in_order(dimension, frame[dimension].drop_nulls().unique().to_list(), labels):
                    part = frame.filter(pl.col(dimension) == value)
                    key: Key = {"dimension": dimension, "slice": value, "domain": domain, "set": name}
                    if dimension == "length":
                        key["words"] = None if name is None else [part["words"].min(), part["words"].max()]
                    yield key, part["score"].to_numpy()


def _in_order(dimension: str, values: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The task's order of labels, short before long, otherwise the alphabet's."""
    known = {"label": list(labels), "length": list(LENGTHS)}.get(dimension, [])
    return sorted(values, key=lambda value: (known.index(value) if value in known else len(known), value))


def _row(key: Key, sample: np.ndarray, resamples: int, seed: int) -> dict[str, Any]:
    interval = mean_interval([sample], resamples=resamples, seed=seed)
    return {**key, "n": len(sample), "accuracy": float(sample.mean()), "ci95": interval}
