"""What the predictions of a method are worth: accuracy with its interval, calibration, agreement, and differences between methods.

Pure functions from a PREDICTIONS table (`pipeline.schema`) to plain dicts, so that `evaluate` and `report` give the same numbers from the
same rows. A baseline scored for each context on its own has a row for each (context, example): its metrics are means over its contexts,
and its intervals resample *examples*, since contexts that share examples are not independent draws. Intervals are percentile bootstraps
with one seed, so every method meets the same resamples; where every example scores alike, the bootstrap has no spread and the exact
binomial bound (Clopper-Pearson) stands in. Trade-off: the intervals speak of the draw of examples, not of another draw of
demonstrations or another training seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from scipy import stats
from sklearn.metrics import brier_score_loss, f1_score, log_loss

from pipeline.errors import CorruptError, UsageError, choices

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

ECE_BINS = 15
SUM_TOLERANCE = 1e-4  # of a float32 probability vector's sum
ARGMAX_TOLERANCE = 1e-6
DIGITS = 6
ROWS_NAMED = 3
ELEMENTS_A_BATCH = 8_000_000  # of the bootstrap's resampled array: 64 MB


def evaluate_predictions(table: pa.Table, labels: Sequence[str], *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Metrics of one method for each evaluation set, in the table's order of sets.

    `table` follows `schema.PREDICTIONS`; `labels` is the order of its probabilities. Each set has `n` (examples), `accuracy`, `ci95`,
    `macro_f1`, `log_loss` (nats), `brier` (0 to 1), `ece`, `predicted_shares`, and, where it was scored under several contexts,
    `contexts` with the accuracies' `mean`, `sd` (n - 1), `worst`, `best` and `each`; the seeds of a student
    of several stand in the place of contexts. Shares are fractions; floats have 6 digits.

    Raises CorruptError naming rows whose probabilities are no distribution or whose labels are unknown, and contexts that were not scored
    on the same examples.
    """
    return {name: evaluate_set(frame, labels, where=name, resamples=resamples, seed=seed) for name, frame in frames(table, labels).items()}


def evaluate_set(frame: pl.DataFrame, labels: Sequence[str], *, where: str, resamples: int, seed: int) -> dict[str, Any]:
    """Metrics of one method on one evaluation set; `frame` has PREDICTIONS' columns. See `evaluate_predictions`."""
    contexts = [part for _, part in frame.group_by("context_id", maintain_order=True)]
    each = [_context_metrics(part, labels, where) for part in contexts]
    scores = example_scores(frame, where)
    mean = {key: float(np.mean([metrics[key] for metrics in each])) for key in each[0]}
    result: dict[str, Any] = {
        "n": len(scores),
        "accuracy": mean["accuracy"],
        "ci95": mean_interval([scores["score"].to_numpy()], resamples=resamples, seed=seed),
        "macro_f1": mean["macro_f1"],
        "log_loss": mean["log_loss"],
        "brier": mean["brier"],
        "ece": mean["ece"],
        "predicted_shares": {label: (frame["predicted"] == label).sum() / frame.height for label in labels},
    }
    if len(each) > 1:
        accuracies = [metrics["accuracy"] for metrics in each]
        spread = float(np.std(accuracies, ddof=1))
        ends = {"worst": min(accuracies), "best": max(accuracies)}
        result["contexts"] = {"mean": mean["accuracy"], "sd": spread, **ends, "each": accuracies}
    return rounded(result)


def summary(sets: Mapping[str, Mapping[str, Any]], domains: Mapping[str, str]) -> dict[str, float]:
    """A method in one flat row, for `dvc metrics` and `dvc exp`: `sets` as of `evaluate_predictions`, `domains` their "in" or "out".

    `accuracy_in` and `accuracy_out` (where there are such sets), `accuracy_lowest` (of a set), and `ece` and `log_loss` over all sets;
    means are unweighted over sets.
    """
    row = {}
    for domain in ("in", "out"):
        if members := [found for name, found in sets.items() if domains[name] == domain]:
            row[f"accuracy_{domain}"] = float(np.mean([found["accuracy"] for found in members]))
    row["accuracy_lowest"] = min(found["accuracy"] for found in sets.values())
    row |= {key: float(np.mean([found[key] for found in sets.values()])) for key in ("ece", "log_loss")}
    return rounded(row)


def agreement(table: pa.Table, reference: pa.Table) -> dict[str, float]:
    """Share of rows with the reference's predicted label, for each evaluation set; joined on set and example.

    Raises UsageError where the reference has several predictions for an example, CorruptError where examples lack one.
    """
    keys = ["set", "example_id"]
    ours = _from_arrow(table).select(*keys, "predicted")
    theirs = _from_arrow(reference).select(*keys, pl.col("predicted").alias("reference"))
    if theirs.select(keys).is_duplicated().any():
        raise UsageError(
            "evaluation.reference: the reference has several predictions for one example, one for each context; "
            "choose a baseline with `contexts: ensemble`."
        )
    joined = ours.join(theirs, on=keys, how="left", maintain_order="left")
    if lacking := joined.filter(pl.col("reference").is_null()).height:
        first = joined.filter(pl.col("reference").is_null()).row(0, named=True)
        raise CorruptError(
            f"predictions: {lacking} rows have no counterpart in the reference's predictions, first example {first['example_id'][:12]} of "
            f"set {first['set']!r}; run the `evaluate` stages again."
        )
    shares = joined.group_by("set", maintain_order=True).agg((pl.col("predicted") == pl.col("reference")).mean().alias("share"))
    return {name: round(share, DIGITS) for name, share in shares.iter_rows()}


def mean_accuracy(table: pa.Table, sets: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """Unweighted mean accuracy over evaluation sets: `accuracy` and `ci95`, each set resampled by itself."""
    frame = _from_arrow(table)
    samples = [example_scores(frame.filter(pl.col("set") == name), name)["score"].to_numpy() for name in sets]
    mean = float(np.mean([sample.mean() for sample in samples]))
    return rounded({"accuracy": mean, "ci95": mean_interval(samples, resamples=resamples, seed=seed)})


def compare(table: pa.Table, other: pa.Table, sets: Sequence[str], *, resamples: int, seed: int) -> dict[str, Any]:
    """Mean difference in accuracy over evaluation sets, `table` minus `other`: `difference`, `ci95`, `clear`.

    The bootstrap is paired: both methods are scored on the same resampled examples, which is far sharper than asking whether two
    intervals overlap. `clear` says that the interval leaves out zero. Raises CorruptError where the examples differ.
    """
    ours, theirs = _from_arrow(table), _from_arrow(other)
    samples: list[Floats] = []
    for name in sets:
        mine = example_scores(ours.filter(pl.col("set") == name), name)
        others = example_scores(theirs.filter(pl.col("set") == name), name)
        pairs = mine.join(others, on="example_id", suffix="_other", maintain_order="left")
        if not pairs.height == mine.height == others.height:
            raise CorruptError(f"predictions for set {name!r}: two methods were scored on different examples; run `evaluate` again.")
        samples.append((pairs["score"] - pairs["score_other"]).to_numpy())
    low, high = mean_interval(samples, resamples=resamples, seed=seed, lowest=-1.0)
    difference = float(np.mean([sample.mean() for sample in samples]))
    return rounded({"difference": difference, "ci95": [low, high], "clear": bool(low > 0 or high < 0)})


def example_scores(frame: pl.DataFrame, where: str) -> pl.DataFrame:
    """`example_id` and `score`: the share of contexts in which an example was answered right, in order of first appearance.

    Raises CorruptError where an example occurs twice in one context or is missing from one.
    """
    if frame.is_empty():
        raise CorruptError(f"predictions: no rows for set {where!r}; run the method's `evaluate` stage again.")
    if frame.select("context_id", "example_id").is_duplicated().any():
        raise CorruptError(f"predictions for set {where!r}: an example occurs twice in one context; run `evaluate` again.")
    scores = frame.group_by("example_id", maintain_order=True).agg(
        (pl.col("predicted") == pl.col("label")).mean().alias("score"), pl.len().alias("rows")
    )
    contexts = frame["context_id"].n_unique()
    if (incomplete := scores.filter(pl.col("rows") != contexts)).height:
        raise CorruptError(
            f"predictions for set {where!r}: example {incomplete['example_id'][0][:12]} has {incomplete['rows'][0]} of {contexts} "
            "contexts; run `evaluate` again."
        )
    return scores.select("example_id", "score")


def mean_interval(samples: Sequence[Floats], *, resamples: int, seed: int, lowest: float = 0.0) -> list[float]:
    """95 % interval of the mean of the samples' means; each sample holds one value in [lowest, 1] for each example, and is resampled
    by itself.
    """
    if all(np.ptp(sample) == 0 for sample in samples):
        return _spreadless_interval(samples, lowest)

    def statistic(*parts: Floats, axis: int = -1) -> Floats:
        return cast("Floats", np.mean([part.mean(axis=axis) for part in parts], axis=0))

    batch = max(1, ELEMENTS_A_BATCH // max(len(sample) for sample in samples))
    outcome = stats.bootstrap(
        tuple(samples),
        statistic,
        n_resamples=resamples,
        batch=batch,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return [float(outcome.confidence_interval.low), float(outcome.confidence_interval.high)]


def expected_calibration_error(confidence: Floats, correct: npt.NDArray[np.bool_], bins: int = ECE_BINS) -> float:
    """ECE over equal-width bins (lo, hi] of the confidence (Guo et al. 2017, 1706.04599, eq. 5). Both arrays: (examples,)."""
    bin_of = confidence_bins(confidence, bins)
    count = np.bincount(bin_of, minlength=bins)
    gap = np.bincount(bin_of, weights=correct.astype(np.float64), minlength=bins) - np.bincount(bin_of, weights=confidence, minlength=bins)
    return float(np.abs(gap).sum() / count.sum())


def confidence_bins(confidence: Floats, bins: int = ECE_BINS) -> Ints:
    """The bin, from 0, of each confidence: bin b is (b / bins, (b + 1) / bins], and 0 belongs to the first. Both arrays: (examples,)."""
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def rounded(value: Any) -> Any:
    """A JSON value with its floats rounded to 6 digits; integers, order and structure stay."""
    if isinstance(value, Mapping):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return round(value, DIGITS) + 0.0 if isinstance(value, float) else value  # + 0.0: no -0.0


def _spreadless_interval(samples: Sequence[Floats], lowest: float) -> list[float]:
    """Interval where all examples have one value: at most a share `u` departs from it, by Clopper-Pearson, and as far as it can."""
    value = float(np.mean([sample.mean() for sample in samples]))
    n = sum(len(sample) for sample in samples)
    u = float(stats.binomtest(0, n).proportion_ci(0.95, method="exact").high)
    return [value - u * (value - lowest), value + u * (1 - value)]


def _context_metrics(frame: pl.DataFrame, labels: Sequence[str], where: str) -> dict[str, float]:
    """Metrics of one context on one set. sklearn orders labels by sorting them, so gold labels become positions first."""
    position = {label: i for i, label in enumerate(labels)}
    probabilities = check_probabilities(frame, labels, where)
    gold: Ints = np.array([position[label] for label in frame["label"]], dtype=np.int64)
    predicted: Ints = np.array([position[label] for label in frame["predicted"]], dtype=np.int64)
    order = list(range(len(labels)))
    return {
        "accuracy": float((gold == predicted).mean()),
        # Labels that neither occur nor are predicted do not count: their F1 is undefined.
        "macro_f1": float(f1_score(gold, predicted, labels=sorted({*gold, *predicted}), average="macro", zero_division=cast("Any", 0))),
        "log_loss": float(log_loss(gold, probabilities, labels=order)),
        "brier": float(brier_score_loss(np.eye(len(labels))[gold], probabilities, scale_by_half=cast("Any", True))),
        "ece": expected_calibration_error(probabilities.max(axis=1), gold == predicted),
    }


def check_probabilities(frame: pl.DataFrame, labels: Sequence[str], where: str) -> Floats:
    """The probabilities as (rows, labels) float64, each row summing to 1.

    Raises CorruptError naming the first rows that are no distribution, or whose predicted label is not the most probable one.
    """
    rows = frame["probabilities"].to_list()
    wrong = {i: f"{len(row)} probabilities for {len(labels)} labels" for i, row in enumerate(rows) if len(row) != len(labels)}
    _refuse(frame, wrong, where)
    values: Floats = np.array(rows, dtype=np.float64)
    finite = np.isfinite(values).all(axis=1) & (values >= 0).all(axis=1)
    sums = values.sum(axis=1)
    bad = ~finite | (np.abs(sums - 1) > SUM_TOLERANCE)
    _refuse(frame, {int(i): f"probabilities {rows[i]}, no distribution" for i in np.flatnonzero(bad)}, where)
    position = {label: i for i, label in enumerate(labels)}
    chosen = values[np.arange(len(values)), [position[label] for label in frame["predicted"]]]
    lower = chosen < values.max(axis=1) - ARGMAX_TOLERANCE
    _refuse(frame, {int(i): f"predicted {frame['predicted'][int(i)]!r} is not the most probable" for i in np.flatnonzero(lower)}, where)
    return values / sums[:, None]


def _refuse(frame: pl.DataFrame, wrong: Mapping[int, str], where: str) -> None:
    if not wrong:
        return
    named = "; ".join(f"example {frame['example_id'][i][:12]}: {why}" for i, why in list(wrong.items())[:ROWS_NAMED])
    more = f" and {len(wrong) - ROWS_NAMED} more" if len(wrong) > ROWS_NAMED else ""
    raise CorruptError(f"predictions for set {where!r}: {named}{more}. Run the method's `evaluate` stage again.")


def frames(table: pa.Table, labels: Sequence[str]) -> dict[str, pl.DataFrame]:
    """The table's rows for each evaluation set, in order of first appearance; labels are checked."""
    frame = _from_arrow(table)
    for column in ("label", "predicted"):
        unknown = sorted(set(frame[column].unique()) - set(labels))
        if unknown:
            raise CorruptError(f"predictions: column {column!r} has {choices(unknown)}; the task's labels are {choices(labels)}.")
    return {str(key[0]): part for key, part in frame.group_by("set", maintain_order=True)}


def _from_arrow(table: pa.Table) -> pl.DataFrame:
    return cast("pl.DataFrame", pl.from_arrow(table))
