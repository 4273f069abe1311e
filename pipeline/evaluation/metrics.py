"""What a method's predictions are worth: accuracy with its interval, calibration, confusion, and accuracy of each slice.

Functions from a table of predictions (`schema.PREDICTIONS`) to plain dicts. A method may answer in several runs: a baseline in each of its
contexts, a student with each of its seeds. Its metrics are means over runs, and its intervals resample *examples*, since runs share their
examples. Intervals are percentile bootstraps with one seed, so every method meets the same resamples. If all examples score alike, the
bootstrap has no spread, and the exact binomial bound (Clopper-Pearson) is used. The intervals are about the draw of examples, not about
another draw of demonstrations or another seed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from scipy import stats
from sklearn.metrics import brier_score_loss, f1_score, log_loss

from pipeline.errors import CorruptError, choices
from pipeline.schema import SLICE, Example

Floats = npt.NDArray[np.float64]
Json = dict[str, Any]
Scores = Mapping[str, pl.DataFrame]

ECE_BINS = 15
LENGTHS = ("short", "middle", "long")
SUM_TOLERANCE, ARGMAX_TOLERANCE = 1e-4, 1e-6  # of float32 probabilities
DIGITS = 6
ELEMENTS_A_BATCH = 8_000_000  # of the bootstrap's resampled array: 64 MB
RIGHT = pl.col("predicted") == pl.col("label")


def evaluate_predictions(table: pa.Table, labels: Sequence[str], *, resamples: int, seed: int) -> dict[str, Json]:
    """Metrics of one method for each evaluation set, in the table's order of sets.

    `labels` is the order of the probabilities. Each set has `n` (examples), `accuracy`, `ci95`, `macro_f1`, `log_loss` (nats), `brier` (0
    to 1), `ece` and `predicted_shares`; if there are several runs, also `contexts`, see `spread`. Shares are fractions with 6 digits.

    Raises CorruptError naming rows whose probabilities are not a distribution or whose labels are unknown, and runs that did not answer the
    same examples.
    """
    found = {}
    for name, frame in frames(table, labels).items():
        each = [_run_metrics(part, labels, name) for _, part in frame.group_by("run", maintain_order=True)]
        mean = {key: float(np.mean([metrics[key] for metrics in each])) for key in each[0]}
        scores = example_scores(frame, name)["score"].to_numpy()
        shares = {label: (frame["predicted"] == label).sum() / frame.height for label in labels}
        head = {"n": len(scores), "accuracy": mean.pop("accuracy"), "ci95": mean_interval([scores], resamples=resamples, seed=seed)}
        found[name] = {**head, **mean, "predicted_shares": shares, **spread([metrics["accuracy"] for metrics in each])}
    return rounded(found)


def spread(accuracies: Sequence[float]) -> Json:
    """`contexts`: `mean`, `sd` (n - 1), `worst`, `best` and `each` of a method's accuracies in its runs; nothing if there is one run."""
    if len(accuracies) < 2:
        return {}
    ends = {"worst": min(accuracies), "best": max(accuracies)}
    return {"contexts": {"mean": float(np.mean(accuracies)), "sd": float(np.std(accuracies, ddof=1)), **ends, "each": list(accuracies)}}


def summary(sets: Mapping[str, Json], domains: Mapping[str, str]) -> dict[str, float]:
    """A method in one flat row, for `dvc metrics`, with what its sets have; `domains[set]` is "in" or "out".

    `well_formed_in`, `well_formed_out`, `accuracy_in` and `accuracy_out` are means over the sets of a domain, `accuracy_lowest` is the
    lowest of a set, `ece` and `log_loss` are means over all sets. Every set has the same weight.
    """

    def values(what: str, *wanted: str) -> list[float]:
        return [found[what] for name, found in sets.items() if domains[name] in wanted and what in found]

    row = {f"{what}_{domain}": values(what, domain) for what in ("well_formed", "accuracy") for domain in ("in", "out")}
    row |= {"accuracy_lowest": sorted(values("accuracy", "in", "out"))[:1]} | {
        what: values(what, "in", "out") for what in ("ece", "log_loss")
    }
    return rounded({key: float(np.mean(found)) for key, found in row.items() if found})


def mean_accuracy(table: pa.Table, sets: Sequence[str], *, resamples: int, seed: int) -> Json:
    """Mean accuracy over evaluation sets, each with the same weight and resampled by itself: `accuracy` and `ci95`."""
    samples = [frame["score"].to_numpy() for frame in scores_by_set(table, sets).values()]
    mean = float(np.mean([sample.mean() for sample in samples]))
    return rounded({"accuracy": mean, "ci95": mean_interval(samples, resamples=resamples, seed=seed)})


def scores_by_set(table: pa.Table | pl.DataFrame, sets: Sequence[str], right: pl.Expr = RIGHT) -> dict[str, pl.DataFrame]:
    """`example_scores` of each of these sets."""
    frame = as_frame(table)
    return {name: example_scores(frame.filter(pl.col("set") == name), name, right) for name in sets}


def example_scores(frame: pl.DataFrame, where: str, right: pl.Expr = RIGHT) -> pl.DataFrame:
    """`example_id` and `score`: the share of runs in which an example was answered right, in order of first appearance.

    A missing prediction (an ill-formed answer in free text) is wrong. Raises CorruptError if an example does not occur once in each run.
    """
    runs = frame["run"].n_unique()
    scores = frame.group_by("example_id", maintain_order=True).agg(
        score=right.fill_null(value=False).mean(), rows=pl.len(), runs=pl.col("run").n_unique()
    )
    wrong = scores.filter((pl.col("rows") != runs) | (pl.col("runs") != runs))
    if frame.is_empty() or wrong.height:
        fault = f"example {wrong['example_id'][0][:12]} has {wrong['rows'][0]} rows in {runs} runs" if wrong.height else "no rows"
        raise CorruptError(f"predictions for set {where!r}: {fault}. Run the method's `evaluate` stage again.")
    return scores.select("example_id", "score")


def mean_interval(samples: Sequence[Floats], *, resamples: int, seed: int, lowest: float = 0.0) -> list[float]:
    """95 % interval of the mean of the samples' means. A sample has a value in [lowest, 1] for each example and is resampled by itself."""
    if all(np.ptp(sample) == 0 for sample in samples):  # at most a share of the examples departs from this value, as far as it can
        value = float(np.mean([sample.mean() for sample in samples]))
        share = float(stats.binomtest(0, sum(map(len, samples))).proportion_ci(0.95, method="exact").high)
        return [value - share * (value - lowest), value + share * (1 - value)]

    def mean_of_means(*resampled: Floats, axis: int) -> Any:
        return np.mean([sample.mean(axis=axis) for sample in resampled], axis=0)

    settings: Json = {"n_resamples": resamples, "method": "percentile", "vectorized": True, "rng": np.random.default_rng(seed)}
    settings["batch"] = max(1, ELEMENTS_A_BATCH // max(map(len, samples)))
    interval = stats.bootstrap(tuple(samples), mean_of_means, **settings).confidence_interval
    return [float(interval.low), float(interval.high)]


def expected_calibration_error(confidence: Floats, correct: npt.NDArray[np.bool_], bins: int = ECE_BINS) -> float:
    """ECE over equal-width bins (lo, hi] of the confidence (Guo et al. 2017, 1706.04599, eq. 5). Both arrays: (examples,)."""
    rows = binned(confidence, bins, {"confidence": confidence, "accuracy": correct})
    return sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(confidence)


def binned(confidence: Floats, bins: int, values: Mapping[str, Any]) -> list[Json]:
    """The bins (low, high] of a confidence that have examples: `n`, and the mean of each of `values`. Arrays: (examples,)."""
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # 0 belongs to the first bin
    return [
        {"low": b / bins, "high": (b + 1) / bins, "n": int((bin_of == b).sum())}
        | {key: float(array[bin_of == b].mean()) for key, array in values.items()}
        for b in np.unique(bin_of).tolist()
    ]


def rounded(value: Any) -> Any:
    """A JSON value with its floats rounded to 6 digits; integers, order and structure stay."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return round(value, DIGITS) + 0.0 if isinstance(value, float) else value  # + 0.0: no -0.0


def _run_metrics(frame: pl.DataFrame, labels: Sequence[str], where: str) -> dict[str, float]:
    """Metrics of one run on one set. sklearn sorts labels, so they become positions first."""
    position = {label: i for i, label in enumerate(labels)}
    probabilities = check_probabilities(frame, labels, where)
    gold, predicted = (np.array([position[label] for label in frame[column]], dtype=np.int64) for column in ("label", "predicted"))
    return {
        "accuracy": float((gold == predicted).mean()),
        # Labels that neither occur nor are predicted do not count: their F1 is undefined.
        "macro_f1": float(f1_score(gold, predicted, labels=sorted({*gold, *predicted}), average="macro", zero_division=cast("Any", 0))),
        "log_loss": float(log_loss(gold, probabilities, labels=list(range(len(labels))))),
        "brier": float(brier_score_loss(np.eye(len(labels))[gold], probabilities, scale_by_half=cast("Any", True))),
        "ece": expected_calibration_error(probabilities.max(axis=1), gold == predicted),
    }


def check_probabilities(frame: pl.DataFrame, labels: Sequence[str], where: str) -> Floats:
    """The probabilities as (rows, labels) float64, each row summing to 1.

    Raises CorruptError naming the first row that is not a distribution, or whose predicted label is not the most probable one.
    """
    for example, predicted, row in frame.select("example_id", "predicted", "probabilities").iter_rows():
        fault = None
        if len(row) != len(labels):
            fault = f"{len(row)} probabilities for {len(labels)} labels"
        elif not (min(row) >= 0 and abs(sum(row) - 1) <= SUM_TOLERANCE):  # NaN fails one of them
            fault = f"probabilities {row} are not a distribution"
        elif row[labels.index(predicted)] < max(row) - ARGMAX_TOLERANCE:
            fault = f"predicted {predicted!r} is not the most probable"
        if fault:
            raise CorruptError(f"predictions for set {where!r}: example {example[:12]}: {fault}. Run the method's `evaluate` stage again.")
    values: Floats = np.array(frame["probabilities"].to_list(), dtype=np.float64)
    return values / values.sum(axis=1, keepdims=True)


def frames(table: pa.Table, labels: Sequence[str]) -> dict[str, pl.DataFrame]:
    """The table's rows for each evaluation set, in order of first appearance. Raises CorruptError if a label is unknown."""
    frame = as_frame(table)
    for column in ("label", "predicted"):
        if unknown := set(frame[column].unique()) - set(labels):
            raise CorruptError(f"predictions: column {column!r} has {choices(unknown)}; the task's labels are {choices(labels)}.")
    return {str(key[0]): part for key, part in frame.group_by("set", maintain_order=True)}


def as_frame(table: pa.Table | pl.DataFrame) -> pl.DataFrame:
    """A table as a polars frame."""
    return table if isinstance(table, pl.DataFrame) else cast("pl.DataFrame", pl.from_arrow(table))


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
    frame = pl.concat(
        [
            own.join(members[name], on="example_id", maintain_order="left").with_columns(set=pl.lit(name), domain=pl.lit(domains[name]))
            for name, own in scores.items()
        ],
        how="diagonal",
    )
    by_domain = {domain: own for domain in ("in", "out") if (own := frame.filter(pl.col("domain") == domain)).height}
    for domain, own in by_domain.items():
        yield {"dimension": "domain", "slice": domain, "domain": domain, "set": None}, own["score"].to_numpy()
    for column in (name for name in frame.columns if name.startswith(SLICE)):
        dimension = column.removeprefix(SLICE)
        order: Sequence[str] = {"label": labels, "length": LENGTHS}.get(dimension, ())
        for domain, everyone in by_domain.items():
            own = everyone.drop_nulls(column)
            for name, rows in [(None, own), *((str(key), part) for (key,), part in own.group_by("set", maintain_order=True))]:
                for value in sorted(rows[column].unique(), key=lambda value: (order.index(value) if value in order else len(order), value)):
                    part = rows.filter(pl.col(column) == value)
                    key: Json = {"dimension": dimension, "slice": value, "domain": domain, "set": name}
                    if dimension == "length":
                        key["words"] = None if name is None else [part["words"].min(), part["words"].max()]
                    yield key, part["score"].to_numpy()
