"""How often a student changes its answer where it should not: the swaps of `swaps.py` on the evaluation sets.

An answer before a swap is the one in the predictions on disk; the swapped text is put to the student. Flips are counted over the texts
that held something to swap, with the exact binomial interval: few texts with a name say little, and the interval shows it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from pipeline.evaluation.swaps import SWAPS, Swap, swap_fields
from pipeline.files import example_id

Fields = Mapping[str, str]
Ask = Callable[[Sequence[Fields]], npt.NDArray[np.float64]]
"""Inputs → the student's label probabilities [N, L]."""
SHOWN = 5


@dataclass(frozen=True)
class Answered:
    """An evaluation example with the answer that is on disk."""

    set: str
    example_id: str
    fields: Fields
    label: str
    probabilities: npt.NDArray[np.float64]  # [L]


def flips(answered: Sequence[Answered], ask: Ask, labels: Sequence[str], per_set: int) -> list[dict[str, Any]]:
    """One entry for each swap, see `flips_of`; at most `per_set` texts of each set are asked again for a swap, drawn by their hash."""
    plans = {swap.name: _plan(swap, answered, per_set) for swap in SWAPS}
    asked = [fields for _, chosen in plans.values() for _, fields in chosen]
    after = iter(ask(asked) if asked else [])
    found = []
    for swap in SWAPS:
        holding, chosen = plans[swap.name]
        rows = [(before, fields, next(after)) for before, fields in chosen]
        counts = {"texts": len(answered), "with_swap": holding}
        found.append({"name": swap.name, "what": swap.what, **counts, **flips_of(rows, labels)})
    return found


def flips_of(rows: Sequence[tuple[Answered, Fields, npt.NDArray[np.float64]]], labels: Sequence[str]) -> dict[str, Any]:
    """What a swap did: `rows` are the example, its swapped fields, and the probabilities after.

    `asked` texts, `flips` among them with `flip_rate` and `ci95`; `mean_shift` and `largest_shift` are absolute changes in the
    probability of the answer given before; `by_set`; `examples`, flips before the largest shifts. Rates and shifts are None where nothing
    was asked.
    """
    entries, by_set = [], {}
    for before, fields, after in rows:
        old, new = int(before.probabilities.argmax()), int(after.argmax())
        own = by_set.setdefault(before.set, {"asked": 0, "flips": 0})
        own["asked"] += 1
        own["flips"] += old != new
        entries.append(
            {
                "set": before.set,
                "example_id": before.example_id,
                "before": dict(before.fields),
                "after": dict(fields),
                "label": before.label,
                "answer_before": labels[old],
                "answer_after": labels[new],
                "p_before": float(before.probabilities[old]),
                "p_after": float(after[old]),
            }
        )
    shifts = [abs(entry["p_after"] - entry["p_before"]) for entry in entries]
    count, flipped = len(entries), sum(own["flips"] for own in by_set.values())
    interval = binomtest(flipped, count).proportion_ci(0.95, method="exact") if count else None
    entries.sort(key=lambda e: (e["answer_before"] == e["answer_after"], -abs(e["p_after"] - e["p_before"]), e["example_id"]))
    return {
        "asked": count,
        "flips": flipped,
        "flip_rate": flipped / count if count else None,
        "ci95": [float(interval.low), float(interval.high)] if interval else None,
        "mean_shift": float(np.mean(shifts)) if count else None,
        "largest_shift": max(shifts, default=None),
        "by_set": by_set,
        "examples": entries[:SHOWN],
    }


def _plan(swap: Swap, answered: Sequence[Answered], per_set: int) -> tuple[int, list[tuple[Answered, dict[str, str]]]]:
    """How many examples hold something to swap, and those that are asked, set by set, with their swapped fields."""
    holding = [(before, fields) for before in answered if (fields := swap_fields(swap, before.fields)) is not None]
    chosen = []
    for name in dict.fromkeys(before.set for before, _ in holding):
        own = sorted(((b, f) for b, f in holding if b.set == name), key=lambda pair: (example_id(pair[1]), pair[0].example_id))
        chosen += own[:per_set]
    return len(holding), chosen
