"""What a method's predictions are worth: accuracy with its interval, calibration, agreement, and differences between methods.

Functions from a table of predictions (`schema.PREDICTIONS`) to plain dicts, so that `evaluate` and `report` give the same numbers for the
same rows. A method may answer in several runs: a baseline in each of its contexts, a student with each of its seeds. Its metrics are means
over runs, and its intervals resample *examples*, since runs share their examples. Intervals are percentile bootstraps with one seed, so
every method meets the same resamples. If all examples score alike, the bootstrap has no spread, and the exact binomial bound
(Clopper-Pearson) is used. The intervals are about the draw of examples, not about another draw of demonstrations or another seed.
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
Json = dict[str, Any]

ECE_BINS = 15
SUM_TOLERANCE = 1e-4  # of a float32 probability vector's sum
ARGMAX_TOLERANCE = 1e-6
DIGITS = 6
ROWS_NAMED = 3
ELEMENTS_A_BATCH = 8_000_000  # of the bootstrap's resampled array: 64 MB
RIGHT = pl.col("predicted") == pl.col("label")


def evaluate_predictions(table: pa.Table, labels: Sequence[str], *, resamples: int, seed: int) -> dict[str, Json]:
    """Metrics of one method for each evaluation set, in the table's order of sets.

    `table` follows `schema.PREDICTIONS`; `labels` is the order of its probabilities. Each set has `n` (examples), `accuracy`, `ci95`,
    `macro_f1`, `log_loss` (nats), `brier` (0 to 1), `ece` and `predicted_shares`; if there are several runs, also `contexts`, see
    `spread`. Shares are fractions; floats have 6 digits.

    Raises CorruptError naming rows whose probabilities are not a distribution or whose labels are unknown, and runs that did not answer the
    same examples.
    """
    found = {}
    for name, frame in frames(table, labels).items():
        each = [_run_metrics(part, labels, name) for _, part in frame.group_by("run", maintain_order=True)]
        mean = {key: float(np.mean([metrics[key] for metrics in each])) for key in each[0]}
        scores = example_scores(frame, name)["score"].to_numpy()
        shares = {label: (frame["predicted"] == label).sum() / frame.height for label in labels}
        interval = mean_interval([scores], resamples=resamples, seed=seed)
        head = {"n": len(scores), "accuracy": mean.pop("accuracy"), "ci95": interval}
        found[name] = {**head, **mean, "predicted_shares": shares, **spread([metrics["accuracy"] for metrics in each])}
    return rounded(found)


def spread(accuracies: Sequence[float]) -> Json:
    """`contexts`: `mean`, `sd` (n - 1), `worst`, `best` and `each` of a method's accuracies in its runs; nothing if there is one run."""
    if len(accuracies) < 2:
        return {}
    ends = {"worst": min(accuracies), "best": max(accuracies)}
    return {"contexts": {"mean": float(np.mean(accuracies)), "sd": float(np.std(accuracies, ddof=1)), **ends, "each": list(accuracies)}}


def summary(sets: Mapping[str, Json], domains: Mapping[str, str]) -> dict[str, float]:
    """A method in one flat row, for `dvc metrics`, with what `sets` has: metrics of labels, or of free text.

    `well_formed_in`, `well_formed_out`, `accuracy_in` and `accuracy_out` are means over the sets of a domain (`domains`: "in" or "out"),
    `accuracy_lowest` is the lowest of a set, `ece` and `log_loss` are means over all sets. Every set has the same weight.
    """
    row = {}
    for what in ("well_formed", "accuracy"):
        for domain in ("in", "out"):
            if values := [found[what] for name, found in sets.items() if domains[name] == domain and what in found]:
                row[f"{what}_{domain}"] = float(np.mean(values))
    if values := [found["accuracy"] for found in sets.values() if "accuracy" in found]:
        row["accuracy_lowest"] = min(values)
    for what in ("ece", "log_loss"):
        if values := [found[what] for found in sets.values() if what in found]:
            row[what] = float(np.mean(values))
    return rounded(row)


def agreement(table: pa.Table, reference: pa.Table) -> dict[str, float]:
    """Share of rows with the reference's predicted label, for each evaluation set. Raises as `beside_reference` does."""
    same = pl.col("predicted") == pl.col("predicted_reference")
    shares = beside_reference(table, reference).group_by("set", maintain_order=True).agg(same.mean())
    return {name: round(share, DIGITS) for name, share in shares.iter_rows()}


def beside_reference(table: pa.Table, reference: pa.Table) -> pl.DataFrame:
    """The rows of `table`, each with the reference's `predicted_reference` and `probabilities_reference` for the same example.

    Raises UsageError if the reference has several predictions for an example, CorruptError if it has none for one.
    """
    keys = ["set", "example_id"]
    theirs = as_frame(reference).select(*keys, "predicted", "probabilities")
    if theirs.select(keys).is_duplicated().any():
        raise UsageError(
            "evaluation.reference: the reference has several predictions for one example, one for each context. "
            "Choose a baseline with `contexts: ensemble`."
        )
    joined = as_frame(table).join(theirs, on=keys, how="left", suffix="_reference", maintain_order="left")
    lacking = joined.filter(pl.col("predicted_reference").is_null())
    if lacking.height:
        raise CorruptError(
            f"predictions: {lacking.height} rows have no counterpart in the reference's predictions, first example "
            f"{lacking['example_id'][0][:12]} of set {lacking['set'][0]!r}. Run the `evaluate` stages again."
        )
    return joined


def mean_accuracy(table: pa.Table, sets: Sequence[str], *, resamples: int, seed: int) -> Json:
    """Mean accuracy over evaluation sets, each with the same weight and resampled by itself: `accuracy` and `ci95`."""
    samples = [frame["score"].to_numpy() for frame in scores_by_set(table, sets).values()]
    mean = float(np.mean([sample.mean() for sample in samples]))
    return rounded({"accuracy": mean, "ci95": mean_interval(samples, resamples=resamples, seed=seed)})


def compare(
    table: pa.Table | pl.DataFrame,
    other: pa.Table | pl.DataFrame,
    sets: Sequence[str],
    *,
    resamples: int,
    seed: int,
    right: pl.Expr = RIGHT,
) -> Json:
    """Mean difference in accuracy over evaluation sets, `table` minus `other`: `difference`, `ci95`, `clear` (the interval excludes zero).

    The bootstrap is paired: both methods are scored on the same resampled examples, which is far sharper than asking whether two intervals
    overlap. `right` says which rows score 1. Raises CorruptError if the examples differ.
    """
    samples: list[Floats] = []
    mine, theirs = scores_by_set(table, sets, right), scores_by_set(other, sets, right)
    for name in sets:
        pairs = mine[name].join(theirs[name], on="example_id", suffix="_other", maintain_order="left")
        if not pairs.height == mine[name].height == theirs[name].height:
            raise CorruptError(f"predictions for set {name!r}: two methods answered different examples. Run their `evaluate` stages again.")
        samples.append((pairs["score"] - pairs["score_other"]).to_numpy())
    low, high = mean_interval(samples, resamples=resamples, seed=seed, lowest=-1.0)
    difference = float(np.mean([sample.mean() for sample in samples]))
    return rounded({"difference": difference, "ci95": [low, high], "clear": bool(low > 0 or high < 0)})


def scores_by_set(table: pa.Table | pl.DataFrame, sets: Sequence[str], right: pl.Expr = RIGHT) -> dict[str, pl.DataFrame]:
    """`example_scores` of each of these sets."""
    frame = as_frame(table)
    return {name: example_scores(frame.filter(pl.col("set") == name), name, right) for name in sets}


def example_scores(frame: pl.DataFrame, where: str, right: pl.Expr = RIGHT) -> pl.DataFrame:
    """`example_id` and `score`: the share of runs in which an example was answered right, in order of first appearance.

    Raises CorruptError if an example occurs twice in a run or is missing from one.
    """
    if frame.is_empty():
        raise CorruptError(f"predictions: no rows for set {where!r}. Run the method's `evaluate` stage again.")
    if frame.select("run", "example_id").is_duplicated().any():
        raise CorruptError(f"predictions for set {where!r}: an example occurs twice in one run. Run `evaluate` again.")
    # A missing prediction (an ill-formed answer in free text) is wrong.
    scores = frame.group_by("example_id", maintain_order=True).agg(
        right.fill_null(value=False).mean().alias("score"), pl.len().alias("rows")
    )
    runs = frame["run"].n_unique()
    if (incomplete := scores.filter(pl.col("rows") != runs)).height:
        raise CorruptError(
            f"predictions for set {where!r}: example {incomplete['example_id'][0][:12]} has {incomplete['rows'][0]} of {runs} runs. "
            "Run `evaluate` again."
        )
    return scores.select("example_id", "score")


def mean_interval(samples: Sequence[Floats], *, resamples: int, seed: int, lowest: float = 0.0) -> list[float]:
    """95 % interval of the mean of the samples' means. A sample has a value in [lowest, 1] for each example and is resampled by itself."""
    if all(np.ptp(sample) == 0 for sample in samples):  # at most a share of the examples departs from this value, as far as it can
        value = float(np.mean([sample.mean() for sample in samples]))
        share = float(stats.binomtest(0, sum(map(len, samples))).proportion_ci(0.95, method="exact").high)
        return [value - share * (value - lowest), value + share * (1 - value)]

    def statistic(*parts: Floats, axis: int = -1) -> Floats:
        return cast("Floats", np.mean([part.mean(axis=axis) for part in parts], axis=0))

    batch, rng = max(1, ELEMENTS_A_BATCH // max(map(len, samples))), np.random.default_rng(seed)
    settings: Json = {"n_resamples": resamples, "batch": batch, "method": "percentile", "vectorized": True, "rng": rng}
    interval = stats.bootstrap(tuple(samples), statistic, **settings).confidence_interval
    return [float(interval.low), float(interval.high)]


def expected_calibration_error(confidence: Floats, correct: npt.NDArray[np.bool_], bins: int = ECE_BINS) -> float:
    """ECE over equal-width bins (lo, hi] of the confidence (Guo et al. 2017, 1706.04599, eq. 5). Both arrays: (examples,)."""
    excess = np.bincount(confidence_bins(confidence, bins), weights=correct - confidence, minlength=bins)
    return float(np.abs(excess).sum() / len(confidence))


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


def significant(p_value: float) -> float:
    """A p-value with three significant digits."""
    return float(f"{p_value:.3g}")


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

    Raises CorruptError naming the first rows that are not a distribution, or whose predicted label is not the most probable one.
    """
    rows, predicted = frame["probabilities"].to_list(), frame["predicted"].to_list()
    wrong = {i: f"{len(row)} probabilities for {len(labels)} labels" for i, row in enumerate(rows) if len(row) != len(labels)}
    values: Floats = np.array(rows if not wrong else [], dtype=np.float64).reshape(-1, len(labels))
    sums = values.sum(axis=1)
    for i in np.flatnonzero(~((values >= 0).all(axis=1) & (np.abs(sums - 1) <= SUM_TOLERANCE))):  # NaN fails both
        wrong[int(i)] = f"probabilities {rows[i]} are not a distribution"
    if not wrong:
        chosen = values[np.arange(len(values)), [labels.index(label) for label in predicted]]
        for i in np.flatnonzero(chosen < values.max(axis=1, initial=0) - ARGMAX_TOLERANCE):
            wrong[int(i)] = f"predicted {predicted[i]!r} is not the most probable"
    if wrong:
        named = "; ".join(f"example {frame['example_id'][i][:12]}: {why}" for i, why in list(wrong.items())[:ROWS_NAMED])
        more = f" and {len(wrong) - ROWS_NAMED} more" if len(wrong) > ROWS_NAMED else ""
        raise CorruptError(f"predictions for set {where!r}: {named}{more}. Run the method's `evaluate` stage again.")
    return values / sums[:, None]


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
