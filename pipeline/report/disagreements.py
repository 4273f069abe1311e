"""Examples in which a student and the reference part: the text, both answers, how the single contexts voted, and,
for a few more, which words spoke for the answer.

Chosen, not drawn: of each evaluation set the surest disagreement in which the student is right and the surest in which it is wrong, so that
a reader sees both kinds. Votes are the answers of a baseline that was scored for each context on its own.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import polars as pl

from pipeline.report.collect import Inputs, Json
from pipeline.report.formatting import percent

LONGEST_TEXT = 320
STRONGEST_WORDS = 4
ATTRIBUTIONS = 4
"""Texts shown with their words' weights; the others are in `metrics/risk/`."""


@dataclass(frozen=True)
class Disagreement:
    """One example, in words."""

    where: str
    text: str
    gold: str
    student: str
    reference: str
    votes: str
    student_is_right: bool


def disagreements(inputs: Inputs, student: str, reference: str) -> list[Disagreement]:
    """At most two examples of each evaluation set whose texts are there; in the order of the params' sets."""
    joined = _frame(inputs, student).join(_frame(inputs, reference), on=["set", "example_id"], suffix="_reference")
    parted = joined.filter(pl.col("predicted") != pl.col("predicted_reference")).with_columns(
        (pl.col("p") * pl.col("p_reference")).alias("sureness"), (pl.col("predicted") == pl.col("label")).alias("right")
    )
    baseline = voters(inputs, reference)
    votes = {} if baseline is None else _votes(inputs, baseline)
    found = []
    for name, texts in inputs.texts.items():
        for right in (True, False):
            rows = parted.filter((pl.col("set") == name) & (pl.col("right") == right)).sort(
                ["sureness", "example_id"], descending=[True, False]
            )
            for row in rows.head(1).iter_rows(named=True):
                key = (name, row["example_id"])
                found.append(
                    Disagreement(
                        where=name,
                        text=shortened(texts.get(row["example_id"], "")),
                        gold=row["label"],
                        student=f"{row['predicted']}, {percent(row['p'], 0)} %",
                        reference=f"{row['predicted_reference']}, {percent(row['p_reference'], 0)} %",
                        votes=_told(votes.get(key, Counter())),
                        student_is_right=right,
                    )
                )
    return [entry for entry in found if entry.text]


def voters(inputs: Inputs, reference: str) -> str | None:
    """The baseline whose contexts vote: scored for each context, calibrated where one is, of the reference's teachers where one is."""
    params = inputs.params
    teachers = set(params.targets[params.baselines[reference].target_set].teachers)

    def order(name: str) -> tuple[bool, bool]:
        target = params.targets[params.baselines[name].target_set]
        return set(target.teachers) <= teachers, target.calibration != "none"

    several = [name for name, entry in params.baselines.items() if entry.contexts == "each"]
    return max(several, key=order) if several else None


def attributions(risk: Json) -> list[dict[str, Any]]:
    """Sampled disagreements with the weight of each word: pieces of the text as (text, class, weight), and who answered what."""
    found = []
    for entry in risk.get("attributions", [])[:ATTRIBUTIONS]:
        found.append(
            {
                "where": entry["set"],
                "gold": entry["label"],
                "student": f"{entry['student']}, {percent(entry['student_p'], 0)} %",
                "reference": f"{entry['reference']}, {percent(entry['reference_p'], 0)} %",
                "fields": [_pieces(name, text, entry["words"]) for name, text in entry["fields"].items()],
                "words": _strongest(entry["words"]),
            }
        )
    return found


def shortened(text: str) -> str:
    """A text as the page shows it."""
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1].rstrip() + "…"


def _frame(inputs: Inputs, method: str) -> pl.DataFrame:
    """set, example_id, label, predicted, p (of the answer) of a method with one answer for each example."""
    frame = pl.from_arrow(inputs.predictions[method])
    assert isinstance(frame, pl.DataFrame)
    return frame.select("set", "example_id", "label", "predicted", pl.col("probabilities").list.max().alias("p"))


def _votes(inputs: Inputs, baseline: str) -> dict[tuple[str, str], Counter[str]]:
    votes: dict[tuple[str, str], Counter[str]] = {}
    for row in inputs.predictions[baseline].select(["set", "example_id", "predicted"]).to_pylist():
        votes.setdefault((row["set"], row["example_id"]), Counter())[row["predicted"]] += 1
    return votes


def _told(votes: Counter[str]) -> str:
    return ", ".join(f"{label} {count}" for label, count in sorted(votes.items(), key=lambda item: (-item[1], item[0])))


def _strongest(words: list[Json]) -> str:
    """The words that weigh most, either way: “dull” +1.20, “warm” −0.31."""
    top = sorted(words, key=lambda word: -abs(word["weight"]))[:STRONGEST_WORDS]
    return ", ".join(f"“{word['word']}” " + f"{word['weight']:+.2f}".replace("-", "−") for word in top)


def _pieces(field: str, text: str, words: list[Json]) -> list[tuple[str, str]]:
    """The text in pieces of (text, class): class `for` or `against` where a word weighs at least half of the heaviest, else none."""
    own = sorted((word for word in words if word["field"] == field), key=lambda word: word["start"])
    bar = max((abs(word["weight"]) for word in words), default=0.0) / 2
    pieces, at = [], 0
    for word in own:
        if abs(word["weight"]) >= bar > 0:
            pieces += [(text[at : word["start"]], ""), (text[word["start"] : word["end"]], "for" if word["weight"] > 0 else "against")]
            at = word["end"]
    return [piece for piece in [*pieces, (text[at:], "")] if piece[0]]
