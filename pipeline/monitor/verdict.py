"""One document from samples, tests and figures: what moved, what that means, and whether retraining is due.

Retraining is due where a test raises an alarm. Memory over its limit is an alarm too, though one that retraining alone does not mend. Rows
that could not be answered are counted and held against `data.bad_rows_limit`: they are a fault of whoever sends them.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.evaluation.metrics import rounded
from pipeline.monitor.drift import Outcome
from pipeline.monitor.kpis import Memory
from pipeline.monitor.sample import Sample
from pipeline.params import MonitorParams

SHOWN = 8


def verdict(
    student: dict[str, str],
    reference: tuple[str, Sample],
    new: tuple[str, Sample, int, int],
    found: Sequence[Outcome],
    memory: Memory,
    params: MonitorParams,
    bad_rows_limit: float,
) -> dict[str, Any]:
    """The monitor's JSON. `reference` has its origin, `new` its origin, the sample, rows read and rows with an error."""
    origin, sample, rows, bad = new
    alarms = [outcome.test.name for outcome in found if outcome.alarm]
    if memory.alarm:
        alarms.append("memory")
    share = bad / rows
    if share > bad_rows_limit:
        alarms.append("bad rows")
    return {
        "student": student,
        "reference": {"from": reference[0], "rows": len(reference[1])},
        "inputs": {"from": origin, "rows": rows, "with_error": bad, "tested": len(sample)},
        "false_alarm_rate": params.false_alarm_rate,
        "tests": [
            {**rounded(asdict(outcome.test)), "adjusted_p": round(outcome.adjusted_p, 6), "alarm": outcome.alarm} for outcome in found
        ],
        "memory": {"peak_mb": round(memory.peak_mb, 1), "limit_mb": memory.limit_mb, "alarm": memory.alarm},
        "bad_rows": {"share": round(share, 6), "limit": bad_rows_limit, "alarm": share > bad_rows_limit},
        "alarms": alarms,
        "due": any(outcome.alarm for outcome in found),
        "farthest": farthest(reference[1], sample),
    }


def farthest(reference: Sample, new: Sample) -> list[dict[str, Any]]:
    """The new inputs that are least like the reference: whose nearest input of the reference, by last hidden state, is farthest away."""
    spread = reference.states.std(axis=0)
    used = spread > 0
    if not used.any():
        return []
    ours, theirs = (sample.states[:, used] / spread[used] for sample in (new, reference))
    squared = (ours**2).sum(1)[:, None] + (theirs**2).sum(1)[None] - 2 * ours @ theirs.T
    nearest = np.sqrt(np.maximum(squared.min(axis=1), 0) / used.sum())
    order = np.argsort(-nearest, kind="stable")[:SHOWN]
    return [
        {
            "text": new.texts[i],
            "label": new.labels[i],
            "confidence": round(float(new.confidence[i]), 6),
            "distance": round(float(nearest[i]), 6),
        }
        for i in order
    ]


def sentence(document: dict[str, Any]) -> str:
    """The verdict in words."""
    tested, rate = document["inputs"]["tested"], document["false_alarm_rate"]
    if not document["alarms"]:
        return f"No alarm: nothing in {tested:,} inputs says that retraining is due (false alarms: at most {rate:.1%} of such checks)."
    moved = ", ".join(document["alarms"])
    due = "Retraining is due" if document["due"] else "Something is wrong, though not what retraining mends"
    return f"{due}: {moved} (of inputs like the reference, at most {rate:.1%} of such checks say so)."
