"""Methods against each other, from their predictions on disk: agreement with the reference, and paired differences in accuracy.

Every pair is compared on the same examples, twice: by a paired bootstrap of the difference, and by McNemar's exact test, which asks whether
the examples that only one of the two gets right could have fallen either way by the toss of a coin. Pairs grow with the square of the
number of methods; with more than `ALL_PAIRS_UP_TO`, each method is compared with the reference alone. The p-values are of single pairs:
of twenty pairs without a difference, one falls below 0.05.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import pyarrow as pa
from scipy.special import rel_entr
from scipy.stats import binomtest

from pipeline.evaluation import judging as answers
from pipeline.files import write_json
from pipeline.evaluation.metrics import agreement, check_probabilities, compare, example_scores, frames, mean_interval, rounded
from pipeline.params import Params
from pipeline.schema import ANSWERS, PREDICTIONS, read_table

ALL_PAIRS_UP_TO = 12
SMALLEST_PROBABILITY = 1e-12
"""Stands in for a probability of 0, where KL would be infinite."""


def compare_methods(params: Params, artifacts: Path, output: Path) -> None:
    """Write the comparisons of all methods of `params` to the file `output`; see `comparisons` and `to_reference`."""
    names = [*params.students, *params.baselines]
    if params.task.completion is not None:
        _compare_answers(params, names, artifacts, output)
        return
    tables = {name: read_table(artifacts / "predictions" / f"{name}.parquet", PREDICTIONS) for name in names}
    reference, labels = params.evaluation.reference, list(params.task.verbalisers)
    domains = {name: entry.domain for name, entry in params.data.evaluation.items()}
    bootstrap = {"resamples": params.evaluation.bootstrap, "seed": params.evaluation.seed}
    every = len(names) <= ALL_PAIRS_UP_TO
    pairs = [(one, other) for one, other in combinations(names, 2) if every or reference in (one, other)]
    document = {
        "reference": reference,
        "pairs": "all" if every else "reference",
        "to_reference": {
            name: to_reference(table, tables[reference], labels, **bootstrap) for name, table in tables.items() if name != reference
        },
        "comparisons": [row for pair in pairs for row in comparisons(*pair, tables, domains, **bootstrap)],
    }
    write_json(document, output)


def _compare_answers(params: Params, names: Sequence[str], artifacts: Path, output: Path) -> None:
    """The same for answers in free text: how often they say what the reference's say."""
    assert params.task.completion is not None
    tables = {name: read_table(artifacts / "predictions" / f"{name}.parquet", ANSWERS) for name in names}
    reference, form = params.evaluation.reference, params.task.completion.form
    shares = {name: answers.agreement(table, tables[reference], form) for name, table in tables.items() if name != reference}
    write_json({"reference": reference, "to_reference": shares}, output)


def to_reference(table: pa.Table, reference: pa.Table, labels: Sequence[str], *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """How close a method's answers are to the reference's, for each evaluation set.

    `n` examples, `agreement` (share of equal answers), `agreement_ci95`, `kl_nats`, `kl_ci95`. KL is KL(reference ‖ method), what
    distillation minimises: a mean over examples, and over contexts where there are several. Raises what `metrics.agreement` raises.
    """
    shares, theirs = agreement(table, reference), frames(reference, labels)
    found: dict[str, dict[str, Any]] = {}
    for name, frame in frames(table, labels).items():
        other = theirs[name]
        place = {example: row for row, example in enumerate(other["example_id"])}
        rows = np.array([place[example] for example in frame["example_id"]])
        target = check_probabilities(other, labels, name)[rows]
        kl = rel_entr(target, check_probabilities(frame, labels, name).clip(SMALLEST_PROBABILITY)).sum(axis=1)
        same = (frame["predicted"].to_numpy() == other["predicted"].to_numpy()[rows]).astype(np.float64)
        means = frame.select("example_id").with_columns(pl.Series("kl", kl), pl.Series("same", same))
        means = means.group_by("example_id", maintain_order=True).mean()
        found[name] = {
            "n": means.height,
            "agreement": shares[name],
            "agreement_ci95": mean_interval([means["same"].to_numpy()], resamples=resamples, seed=seed),
            "kl_nats": float(means["kl"].mean()),  # type: ignore[arg-type]
            "kl_ci95": mean_interval([means["kl"].to_numpy()], resamples=resamples, seed=seed),
        }
    return rounded(found)


def comparisons(
    method: str, other: str, tables: Mapping[str, pa.Table], domains: Mapping[str, str], *, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """The differences of two methods, `method` minus `other`, for each domain (`set` None) and each evaluation set.

    A row has `n` examples, `difference` in accuracy (over a domain, the mean over its sets), `ci95` and `clear` as `metrics.compare` has
    them; `only_method_right`, `only_other_right` (examples; over a domain, of all its sets together) and `mcnemar_p`, which are None where
    a method answers an example several times, once in each context.
    """
    wheres: list[tuple[str, str | None, list[str]]] = []
    for domain in ("in", "out"):
        members = [name for name, own in domains.items() if own == domain]
        wheres += [(domain, None, members)] if members else []
        wheres += [(domain, name, [name]) for name in members]
    rows = []
    for domain, name, members in wheres:
        found = compare(tables[method], tables[other], members, resamples=resamples, seed=seed)
        one, two = (_scores(tables[key], members) for key in (method, other))
        rows.append({"method": method, "other": other, "domain": domain, "set": name, "n": one.height, **found, **_mcnemar(one, two)})
    return rows


def mcnemar_exact(only_one: int, only_other: int) -> float:
    """Two-sided p-value of McNemar's exact test: the chance that fair tosses divide the discordant pairs at least as unevenly."""
    return float(binomtest(only_one, only_one + only_other, 0.5).pvalue) if only_one + only_other else 1.0


def significant(p_value: float) -> float:
    """A p-value with three significant digits."""
    return float(f"{p_value:.3g}")


def _mcnemar(one: pl.DataFrame, other: pl.DataFrame) -> dict[str, Any]:
    pairs = one.join(other, on=["set", "example_id"], suffix="_other", maintain_order="left")
    mine, theirs = pairs["score"].to_numpy(), pairs["score_other"].to_numpy()
    if not (np.isin(mine, (0, 1)).all() and np.isin(theirs, (0, 1)).all()):
        return {"only_method_right": None, "only_other_right": None, "mcnemar_p": None}
    only_one, only_other = int((mine > theirs).sum()), int((mine < theirs).sum())
    return {"only_method_right": only_one, "only_other_right": only_other, "mcnemar_p": significant(mcnemar_exact(only_one, only_other))}


def _scores(table: pa.Table, sets: Sequence[str]) -> pl.DataFrame:
    """`metrics.example_scores` of several sets, with the column `set`."""
    frame = cast("pl.DataFrame", pl.from_arrow(table))
    parts = {name: example_scores(frame.filter(pl.col("set") == name), name) for name in sets}
    return pl.concat([part.with_columns(pl.lit(name).alias("set")) for name, part in parts.items()])
