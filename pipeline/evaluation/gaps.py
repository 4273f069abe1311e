"""Where a student is weaker: gaps in accuracy between slices, and where it leaves the reference, by confidence.

A gap between the best and the worst of many slices is never zero, so each comes with a chi-square test that right answers do not depend on
the slice at all, and with the reference's own gap: a student may have learnt it from there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.stats import chi2_contingency

from pipeline.evaluation.compare import significant
from pipeline.evaluation.detail import DOMAIN_SLICES, slice_rows
from pipeline.evaluation.metrics import confidence_bins, rounded

SMALLEST_SLICE = 20
CONFIDENCE_BINS = 10
Scores = Mapping[str, pl.DataFrame]


def gaps(student: Scores, reference: Scores, labels: Sequence[str], members: Scores, domains: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each dimension, domain, and set (None: all of the domain) that has two slices of `SMALLEST_SLICE` examples or more.

    `student[set]` and `reference[set]` are from `metrics.example_scores`. A row has `p_value` of the student's right answers, and for
    `student` and `reference` the `lowest` and `highest` slice and their `gap`. Between domains, `domain` is None.
    """
    ours, theirs = (_groups(scores, labels, members, domains) for scores in (student, reference))
    rows = []
    for key, slices in ours.items():
        dimension, domain, name = key
        if len(slices) > 1:
            both = rounded({"student": _extremes(slices), "reference": _extremes(theirs[key])})
            rows.append({"dimension": dimension, "domain": domain, "set": name, "p_value": homogeneity(list(slices.values())), **both})
    return rows


def homogeneity(samples: Sequence[npt.NDArray[np.float64]]) -> float | None:
    """P-value of the chi-square test that right answers are as frequent in every slice; None where all are right, or none.

    Each sample holds the scores, 0 or 1, of a slice's examples.
    """
    right = np.array([sample.sum() for sample in samples])
    wrong = np.array([len(sample) for sample in samples]) - right
    if not right.sum() or not wrong.sum():
        return None
    return significant(cast("Any", chi2_contingency(np.stack([right, wrong]))).pvalue)


def by_confidence(
    confidence: npt.NDArray[np.float64], differ: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_], right_reference: npt.NDArray[np.bool_]
) -> list[dict[str, Any]]:
    """Bins (low, high] of a confidence that hold an example: `n`, share of `disagreement`, and both accuracies. Arrays: (examples,)."""
    bins = confidence_bins(confidence, CONFIDENCE_BINS)
    rows = []
    for b in sorted(set(bins.tolist())):
        here = bins == b
        edges = {"low": b / CONFIDENCE_BINS, "high": (b + 1) / CONFIDENCE_BINS, "n": int(here.sum())}
        shares = {"disagreement": differ, "student_accuracy": right, "reference_accuracy": right_reference}
        rows.append(edges | {key: float(values[here].mean()) for key, values in shares.items()})
    return rows


Group = tuple[str, str | None, str | None]


def _groups(scores: Scores, labels: Sequence[str], members: Scores, domains: Mapping[str, str]) -> dict[Group, dict[str, Any]]:
    """Scores of the slices that are compared with each other. A set that is its domain's only one is not listed twice."""
    groups: dict[Group, dict[str, Any]] = {}
    counts = [[domains[name] for name in scores].count(domain) for domain in ("in", "out")]
    alone = {domain for domain, count in zip(("in", "out"), counts, strict=True) if count == 1}
    for key, sample in slice_rows(scores, labels, members, domains):
        if len(sample) < SMALLEST_SLICE or (key["set"] is not None and key["domain"] in alone):
            continue
        domain = None if key["dimension"] == DOMAIN_SLICES else key["domain"]
        groups.setdefault((key["dimension"], domain, key["set"]), {})[key["slice"]] = sample
    return groups


def _extremes(slices: Mapping[str, Any]) -> dict[str, Any]:
    means = {name: float(sample.mean()) for name, sample in slices.items()}
    ends = {"lowest": min(means, key=lambda name: means[name]), "highest": max(means, key=lambda name: means[name])}
    found = {end: {"slice": name, "n": len(slices[name]), "accuracy": means[name]} for end, name in ends.items()}
    return {**found, "gap": means[ends["highest"]] - means[ends["lowest"]]}
