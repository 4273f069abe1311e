"""What a method's predictions are worth: accuracy with its interval, calibration, confusion, and accuracy of each slice.

A method may answer in several runs: a baseline in each of its contexts, a student with each of its seeds. Metrics are means over runs, and
intervals resample *examples*, since runs share them. Every method meets the same resamples. The intervals are about the draw of examples,
not about another draw of demonstrations or another seed. `labels` are sorted, as probabilities are.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pipeline.errors import CorruptError, choices
from pipeline.schema import SLICE, Example

Floats = npt.NDArray[np.float64]
Json = dict[str, Any]
Scores = Mapping[str, pl.DataFrame]

ECE_BINS = 15
CHANCE_DRAWS = 200
LENGTHS = ("short", "middle", "long")
SUM_TOLERANCE = 1e-4  # of float32 probabilities
DIGITS = 6
RARE = 0.2  # share of a set under which a label is called rare
ELEMENTS_A_BATCH = 8_000_000  # of the bootstrap's resampled array: 64 MB
RIGHT = pl.col("predicted") == pl.col("label")


def evaluate_predictions(
    table: pa.Table, labels: Sequence[str], *, resamples: int, seed: int, before: pa.Table | None = None
) -> dict[str, Json]:
    """Metrics of `schema.PREDICTIONS` rows for each evaluation set, in the table's order of sets.

    Each set has `n` (examples), `accuracy`, `ci95`, `macro_f1`, `log_loss` (nats), `brier` (0 to 1), `ece`, `ece_by_chance`,
    `predicted_shares` and `per_label`, see `label_metrics`; if there are several runs, also `contexts`, see `spread`; with the rows
    `before` their temperature, also their `uncorrected` log_loss and ece. Shares are fractions with 6 digits. Raises CorruptError as
    `frames` and `example_scores` do.
    """
    found, raw = {}, {} if before is None else frames(before, labels)
    for name, frame in frames(table, labels).items():
        runs = _runs(frame)
        each, mean = _run_metrics(runs, labels)
        scores = example_scores(frame, name)["score"].to_numpy()
        shares = {label: (frame["predicted"] == label).sum() / frame.height for label in labels}
        head = {"n": len(scores), "accuracy": mean.pop("accuracy"), "ci95": mean_interval([scores], resamples=resamples, seed=seed)}
        found[name] = {
            **head,
            **mean,
            "predicted_shares": shares,
            "per_label": label_metrics(runs, labels),
            **spread(each),
        }
        if name in raw:
            mean = _run_metrics(_runs(raw[name]), labels)[1]
            found[name]["uncorrected"] = {key: mean[key] for key in ("log_loss", "ece")}
    return rounded(found)


def before_temperature(table: pa.Table, temperatures: Mapping[str, float]) -> pa.Table:
    """`schema.PREDICTIONS` rows of a student without the temperature T of their run: probabilities ∝ p^T."""
    powers = np.array([temperatures[run] for run in table["run"].to_pylist()])
    values = np.array(table["probabilities"].to_pylist(), dtype=np.float64) ** powers[:, None]
    values = (values / values.sum(axis=1, keepdims=True)).astype(np.float32)
    at = table.schema.get_field_index("probabilities")
    return table.set_column(at, table.schema.field(at), pa.array(list(values), table.schema.field(at).type))


def _runs(frame: pl.DataFrame) -> list[pl.DataFrame]:
    return frame.partition_by("run", maintain_order=True)


def _run_metrics(runs: Sequence[pl.DataFrame], labels: Sequence[str]) -> tuple[list[float], dict[str, float]]:
    """The accuracy of each run, and the mean of each metric over the runs."""
    each = [_metrics(run, labels) for run in runs]
    return [own["accuracy"] for own in each], {key: float(np.mean([own[key] for own in each])) for key in each[0]}


def _metrics(frame: pl.DataFrame, labels: Sequence[str]) -> dict[str, float]:
    from sklearn.metrics import brier_score_loss, f1_score, log_loss

    gold, predicted, probabilities = frame["label"].to_list(), frame["predicted"].to_list(), probabilities_of(frame)
    right, confidence = frame.select(RIGHT).to_series().to_numpy(), probabilities.max(axis=1)
    return {
        "accuracy": float(right.mean()),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=cast("Any", 0))),  # of labels that occur
        "log_loss": float(log_loss(gold, probabilities, labels=labels)),
        "brier": float(brier_score_loss(gold, probabilities, labels=labels, scale_by_half=cast("Any", True))),
        "ece": expected_calibration_error(confidence, right),
        "ece_by_chance": calibration_error_by_chance(confidence),
    }


def label_metrics(runs: Sequence[pl.DataFrame], labels: Sequence[str]) -> dict[str, Json]:
    """Of each label `n` (examples), `precision`, `recall` and `f1`, and `average_precision` of its probability against the rest; means over
    runs. A label that is never answered has precision 0; one without examples has `n` 0 and nothing else.
    """
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    gold, each = np.array(runs[0]["label"].to_list()), []
    for run in runs:
        own, predicted = np.array(run["label"].to_list()), run["predicted"].to_list()
        scores = precision_recall_fscore_support(own, predicted, labels=labels, zero_division=cast("Any", 0))[:3]
        columns = zip(labels, probabilities_of(run).T, strict=True)
        each.append([*scores, [average_precision_score(own == label, p) if (own == label).any() else 0.0 for label, p in columns]])
    means = np.mean(each, axis=0).T.tolist()  # (labels, 4)
    names = ("precision", "recall", "f1", "average_precision")
    counts = [int((gold == label).sum()) for label in labels]
    return {
        label: {"n": count} | (dict(zip(names, own, strict=True)) if count else {})
        for label, count, own in zip(labels, counts, means, strict=True)
    }


def spread(accuracies: Sequence[float]) -> Json:
    """`contexts`: `mean`, `sd` (n - 1), `worst`, `best` and `each` of a method's accuracies in its runs; nothing if there is one run."""
    if len(accuracies) < 2:
        return {}
    ends = {"worst": min(accuracies), "best": max(accuracies)}
    return {"contexts": {"mean": float(np.mean(accuracies)), "sd": float(np.std(accuracies, ddof=1)), **ends, "each": list(accuracies)}}


def summary(sets: Mapping[str, Json], domains: Mapping[str, str]) -> dict[str, float]:
    """A method in one flat row, for `dvc metrics`, with what its sets have; `domains[set]` is "in" or "out".

    `well_formed_in`, `well_formed_out`, `accuracy_in` and `accuracy_out` are means over the sets of a domain, `accuracy_lowest` is the
    lowest of a set, `ece`, `log_loss` and `macro_f1` are means over all sets. `rarest_recall` and
    `rarest_average_precision` are those of the rarest label, means over the sets of which it has less than `RARE`. Every set has the
    same weight.
    """
    row = {
        f"{what}_{domain}": [own[what] for name, own in sets.items() if domains[name] == domain and what in own]
        for what in ("well_formed", "accuracy")
        for domain in ("in", "out")
    }
    row["accuracy_lowest"] = sorted(own["accuracy"] for own in sets.values() if "accuracy" in own)[:1]
    row |= {what: [own[what] for own in sets.values() if what in own] for what in ("ece", "log_loss", "macro_f1")}
    rarest = [
        min((own for own in one["per_label"].values() if own["n"]), key=lambda own: own["n"]) | {"of": one["n"]}
        for one in sets.values()
        if "per_label" in one
    ]
    row |= {f"rarest_{what}": [own[what] for own in rarest if own["n"] < RARE * own["of"]] for what in ("recall", "average_precision")}
    return rounded({key: float(np.mean(values)) for key, values in row.items() if values})


def mean_accuracy(table: pa.Table | pl.DataFrame, sets: Sequence[str], *, resamples: int, seed: int) -> Json:
    """Mean accuracy over evaluation sets, each with the same weight and resampled by itself: `accuracy` and `ci95`."""
    samples = [frame["score"].to_numpy() for frame in scores_by_set(table, sets).values()]
    mean = float(np.mean([sample.mean() for sample in samples]))
    return rounded({"accuracy": mean, "ci95": mean_interval(samples, resamples=resamples, seed=seed)})


def scores_by_set(table: pa.Table | pl.DataFrame, sets: Sequence[str], right: pl.Expr = RIGHT) -> dict[str, pl.DataFrame]:
    """`example_scores` of each of these sets."""
    frame = pl.DataFrame(table)
    return {name: example_scores(frame.filter(pl.col("set") == name), name, right) for name in sets}


def example_scores(frame: pl.DataFrame, where: str, right: pl.Expr = RIGHT) -> pl.DataFrame:
    """`example_id` and `score`: the share of runs in which an example was answered right, in order of first appearance.

    A missing prediction (an ill-formed answer in free text) is wrong. Raises CorruptError if an example does not occur once in each run.
    """
    runs = frame["run"].n_unique()
    scores = frame.group_by("example_id", maintain_order=True).agg(score=right.fill_null(value=False).mean(), rows=pl.len())
    for example, _, rows in scores.filter(pl.col("rows") != runs).iter_rows():
        fault = f"example {example[:12]} has {rows} rows in {runs} runs"
        raise CorruptError(f"predictions for set {where!r}: {fault}. Run the method's `evaluate` stage again.")
    return scores.select("example_id", "score")


def mean_interval(samples: Sequence[Floats], *, resamples: int, seed: int, lowest: float = 0.0) -> list[float]:
    """95 % interval of the mean of the samples' means: a percentile bootstrap.

    A sample has a value in [lowest, 1] for each example and is resampled by itself. If all values are alike the bootstrap has no spread,
    and the exact binomial bound (Clopper-Pearson) is used: at most a share of the examples departs from this value, as far as it can.
    """
    from scipy import stats

    if all(np.ptp(sample) == 0 for sample in samples):
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


def calibration_error_by_chance(confidence: Floats, bins: int = ECE_BINS) -> float:
    """The ECE of a perfectly calibrated method with these confidences (examples,), which is above 0 as examples are few: the mean of
    `CHANCE_DRAWS` draws of which answers are right.
    """
    rng, bin_of = np.random.default_rng(0), _bin_of(confidence, bins)
    draws = ((rng.random(len(confidence)) < confidence) - confidence for _ in range(CHANCE_DRAWS))
    return float(np.mean([np.abs(np.bincount(bin_of, draw)).sum() for draw in draws]) / len(confidence))


def binned(confidence: Floats, bins: int, values: Mapping[str, Any]) -> list[Json]:
    """The bins (low, high] of a confidence that have examples: `n`, and the mean of each of `values`. Arrays: (examples,)."""
    bin_of = _bin_of(confidence, bins)
    return [
        {"low": b / bins, "high": (b + 1) / bins, "n": int((bin_of == b).sum())}
        | {key: float(array[bin_of == b].mean()) for key, array in values.items()}
        for b in np.unique(bin_of).tolist()
    ]


def _bin_of(confidence: Floats, bins: int) -> npt.NDArray[np.int64]:
    return np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)  # 0 belongs to the first bin


def rounded(value: Any) -> Any:
    """A JSON value with its floats rounded to 6 digits."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), DIGITS) + 0.0)  # + 0.0: no -0.0


def frames(table: pa.Table, labels: Sequence[str]) -> dict[str, pl.DataFrame]:
    """The table's rows for each evaluation set, in order of first appearance.

    Raises CorruptError naming the first row with an unknown label, or with probabilities that are not a distribution over the labels.
    """
    frame, values = pl.DataFrame(table), pl.col("probabilities")
    known = pl.col("label").is_in(labels) & pl.col("predicted").is_in(labels)
    fits = known & (values.list.len() == len(labels)) & (values.list.min() >= 0) & ((values.list.sum() - 1).abs() <= SUM_TOLERANCE)
    for row in frame.filter(~fits).head(1).iter_rows(named=True):
        found = f"label {row['label']!r}, predicted {row['predicted']!r}, probabilities {row['probabilities']}"
        raise CorruptError(
            f"predictions for set {row['set']!r}: example {row['example_id'][:12]}: {found}: not a distribution over the task's labels "
            f"{choices(labels)}. Run the method's `evaluate` stage again."
        )
    return {str(key[0]): part for key, part in frame.group_by("set", maintain_order=True)}


def probabilities_of(frame: pl.DataFrame) -> Floats:
    """The probabilities of checked rows (`frames`) as (rows, labels) float64, each row summing to 1."""
    values: Floats = np.array(frame["probabilities"].to_list(), dtype=np.float64)
    return values / values.sum(axis=1, keepdims=True)


def detail(
    table: pa.Table,
    labels: Sequence[str],
    members: Scores,
    domains: Mapping[str, str],
    *,
    resamples: int,
    seed: int,
    before: pa.Table | None = None,
) -> Json:
    """`sets` {set: `reliability` (see `binned`), `confusion` {gold: {predicted: rows}}} and `slices`, the key of `slice_rows` with `n`,
    `accuracy`, `ci95` for each. With the rows `before` their temperature, sets have `uncorrected`, the reliability of these.

    `table` follows `schema.PREDICTIONS`; `members[set]` says which slices its examples belong to (`membership`), `domains[set]` is "in" or
    "out". Rows of several runs are pooled in bins and in the matrix; in slices an example's score is their mean.
    """
    from sklearn.metrics import confusion_matrix

    by_set, sets = frames(table, labels), {}
    raw = {} if before is None else frames(before, labels)
    for name, frame in by_set.items():
        counts = confusion_matrix(frame["label"].to_list(), frame["predicted"].to_list(), labels=labels).tolist()
        sets[name] = {
            "reliability": _reliability(frame),
            "confusion": {gold: dict(zip(labels, row, strict=True)) for gold, row in zip(labels, counts, strict=True)},
        } | ({"uncorrected": _reliability(raw[name])} if name in raw else {})
    scores = {name: example_scores(frame, name) for name, frame in by_set.items()}
    slices = [
        {**key, "n": len(sample), "accuracy": float(sample.mean()), "ci95": mean_interval([sample], resamples=resamples, seed=seed)}
        for key, sample in slice_rows(scores, members, domains)
    ]
    return rounded({"sets": sets, "slices": slices})


def _reliability(frame: pl.DataFrame) -> list[Json]:
    confidence = probabilities_of(frame).max(axis=1)
    return binned(confidence, ECE_BINS, {"confidence": confidence, "accuracy": frame.select(RIGHT).to_series().to_numpy()})


def membership(examples: Sequence[Example]) -> pl.DataFrame:
    """`example_id`, `words` (of all fields together), and for each dimension a column "slice.NAME" with the example's slice.

    Thirds are by words within the set. Equal lengths stay together, so a third may be empty.
    """
    words = [sum(len(text.split()) for text in example.fields.values()) for example in examples]
    low, high = np.quantile(words, [1 / 3, 2 / 3], method="lower")
    columns = {
        f"{SLICE}label": [example.label for example in examples],
        f"{SLICE}length": [LENGTHS[int(count > low) + int(count > high)] for count in words],
        **{SLICE + name: [example.slices[name] for example in examples] for name in examples[0].slices},
    }
    data = {"example_id": [example.example_id for example in examples], "words": words, **columns}
    return pl.DataFrame(data, schema_overrides=dict.fromkeys(columns, pl.String))


def slice_rows(scores: Scores, members: Scores, domains: Mapping[str, str]) -> Iterator[tuple[Json, Floats]]:
    """Each slice's key and its examples' scores: for each dimension and domain, first all sets together, then set by set.

    `scores[set]` is from `example_scores`, `members[set]` from `membership`. A key has `dimension`, `slice`, `domain`, `set` (None for all
    sets of a domain together) and, for lengths within a set, `words` [fewest, most].
    """
    own = {name: frame.join(members[name], on="example_id", maintain_order="left") for name, frame in scores.items()}
    parts: list[tuple[str, str | None, pl.DataFrame]] = []
    for domain in ("in", "out"):
        if names := [name for name in own if domains[name] == domain]:
            everyone = pl.concat([own[name] for name in names], how="diagonal")
            yield {"dimension": "domain", "slice": domain, "domain": domain, "set": None}, everyone["score"].to_numpy()
            parts += [(domain, None, everyone), *((domain, name, own[name]) for name in names)]
    for column in dict.fromkeys(name for frame in own.values() for name in frame.columns if name.startswith(SLICE)):
        dimension = column.removeprefix(SLICE)
        for domain, name, frame in parts:
            values = frame[column].drop_nulls().unique() if column in frame.columns else ()
            for value in sorted(values, key=LENGTHS.index if dimension == "length" else None):
                part = frame.filter(pl.col(column) == value)
                key: Json = {"dimension": dimension, "slice": value, "domain": domain, "set": name}
                if dimension == "length":
                    key["words"] = None if name is None else [part["words"].min(), part["words"].max()]
                yield key, part["score"].to_numpy()
