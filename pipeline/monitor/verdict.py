"""One document from samples and tests: what moved, what that means, and whether retraining is due.

Retraining is due if a test raises an alarm. Two more alarms are not for retraining to mend: memory over its limit, and too many rows that
could not be answered, which are a fault of whoever sends them.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pipeline.evaluation.metrics import rounded
from pipeline.files import read_json
from pipeline.monitor.drift import DriftTest, Outcome
from pipeline.monitor.sample import Inputs, Sample
from pipeline.params import MonitorParams

SHOWN = 8


def accuracy_bound(params: MonitorParams, evaluation: Path | None, domains: dict[str, str]) -> tuple[float, str] | None:
    """What accuracy is compared with, and where that comes from: params, else the student's own `metrics/eval/NAME.json`; else None.

    From the file it is the mean accuracy over the sets that `domains` says are out of domain, or over all if none is, less the tolerated
    drop.
    """
    if params.min_accuracy is not None:
        return params.min_accuracy, "monitor.min_accuracy"
    if evaluation is None or not evaluation.is_file():
        return None
    sets = {name: entry["accuracy"] for name, entry in read_json(evaluation)["sets"].items()}
    chosen = [name for name in sets if domains.get(name) == "out"] or list(sets)
    mean = sum(sets[name] for name in chosen) / len(chosen)
    return mean - params.accuracy_drop, f"{mean:.1%} on {', '.join(chosen)}, less {params.accuracy_drop:.0%}"


def accuracy_test(predicted: Sequence[str], gold: Sequence[str], bound: float, origin: str) -> DriftTest:
    """Is accuracy under the bound? Exact binomial test, one-sided, corrected with the drift tests: a few labelled inputs are noisy."""
    right = sum(one == other for one, other in zip(predicted, gold, strict=True))
    found = right / len(gold)
    p_value = float(stats.binomtest(right, len(gold), min(1.0, max(0.0, bound)), alternative="less").pvalue)
    then, now = f"at least {bound:.1%} ({origin})", f"{found:.1%} of {len(gold):,} labelled"
    return DriftTest("accuracy", "accuracy", "below the bound", max(0.0, bound - found), 0.0, p_value, then, now)


def verdict(
    student: dict[str, str],
    reference: tuple[str, Sample],
    new: Inputs,
    found: Sequence[Outcome],
    peak_mb: float,
    params: MonitorParams,
    bad_rows_limit: float,
) -> dict[str, Any]:
    """The monitor's JSON. `reference` is its origin and its sample; `peak_mb` the peak memory of the process that answered."""
    alarms = [outcome.test.name for outcome in found if outcome.alarm]
    share, limit_mb = new.bad / new.rows, params.max_memory_mb
    too_large, too_bad = limit_mb is not None and peak_mb > limit_mb, share > bad_rows_limit
    return {
        "student": student,
        "reference": {"from": reference[0], "rows": len(reference[1])},
        "inputs": {"from": new.origin, "rows": new.rows, "with_error": new.bad, "tested": len(new.sample)},
        "false_alarm_rate": params.false_alarm_rate,
        "tests": [
            {**rounded(asdict(outcome.test)), "adjusted_p": round(outcome.adjusted_p, 6), "alarm": outcome.alarm} for outcome in found
        ],
        "memory": {"peak_mb": round(peak_mb, 1), "limit_mb": limit_mb, "alarm": too_large},
        "bad_rows": {"share": round(share, 6), "limit": bad_rows_limit, "alarm": too_bad},
        "alarms": [*alarms, *["memory"] * too_large, *["bad rows"] * too_bad],
        "due": bool(alarms),
        "farthest": farthest(reference[1], new.sample),
    }


def farthest(reference: Sample, new: Sample) -> list[dict[str, Any]]:
    """The new inputs least like the reference: by the distance of their last hidden state to the nearest one of the reference."""
    spread = reference.states.std(axis=0)
    used = spread > 0
    if not used.any():
        return []
    ours, theirs = (sample.states[:, used] / spread[used] for sample in (new, reference))
    squared = (ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T
    nearest = np.sqrt(np.maximum(squared.min(axis=1), 0) / used.sum())
    rows = np.argsort(-nearest, kind="stable")[:SHOWN]
    return [
        rounded({"text": new.texts[i], "label": new.labels[i], "confidence": float(new.confidence[i]), "distance": float(nearest[i])})
        for i in rows
    ]


def sentence(document: dict[str, Any]) -> str:
    """The verdict in words."""
    tested, rate = document["inputs"]["tested"], document["false_alarm_rate"]
    if not document["alarms"]:
        return f"No alarm: nothing in {tested:,} inputs says that retraining is due (false alarms: at most {rate:.1%} of such checks)."
    due = "Retraining is due" if document["due"] else "Something is wrong, but not what retraining mends"
    return f"{due}: {', '.join(document['alarms'])} (of inputs like the reference, at most {rate:.1%} of such checks say so)."
