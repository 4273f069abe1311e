"""What the method's risks ask to be looked at: swaps that should not matter, gaps between slices, disagreement by confidence."""

from collections.abc import Sequence
from typing import Any

from pipeline.report.cells import DOMAIN_TITLE, Cell, Rows, Table, as_float
from pipeline.report.collect import Json
from pipeline.report.formatting import DASH, percent, plural, points, quantity, span

EXAMPLES = 3
"""Flipped texts shown of each student."""


def swaps(risks: dict[str, Json], students: Sequence[str]) -> Table | None:
    """How often an answer flips when something is swapped that should not matter; None where nothing was swapped."""
    bodies = []
    for student in students:
        rows = []
        for entry in risks[student].get("swaps", []):
            interval = entry.get("ci95")
            rows.append(
                [
                    Cell(_title(entry["name"]), entry["what"]),
                    Cell(f"{entry['with_swap']:,}", f"of {entry['texts']:,}"),
                    Cell(f"{entry['asked']:,}"),
                    Cell(f"{entry['flips']:,}"),
                    Cell(percent(entry.get("flip_rate")), span(interval) if interval else ""),
                    Cell(percent(entry.get("mean_shift"))),
                    Cell(percent(entry.get("largest_shift"))),
                ]
            )
        if rows:
            bodies.append(Rows(student, rows))
    columns = ["Swap", "texts with one", "asked again", "answers flipped", "flipped, %", "mean shift, points", "largest shift, points"]
    caption = "A shift is the change in the probability of the answer given before; the interval of the share flipped is exact."
    return Table("swaps", caption, columns, bodies) if bodies else None


def flipped(risk: Json) -> list[dict[str, Any]]:
    """Texts whose answer flipped, as the page shows them: swap, before, after, and the answers with their probabilities."""
    found = []
    for entry in risk.get("swaps", []):
        for example in entry.get("examples", []):
            if example["answer_before"] != example["answer_after"]:
                found.append(
                    {
                        "swap": _title(entry["name"]),
                        "before": " / ".join(example["before"].values()),
                        "after": " / ".join(example["after"].values()),
                        "answers": f"{example['answer_before']} → {example['answer_after']}",
                        "label": example["label"],
                        "fell": f"{percent(example['p_before'], 0)} → {percent(example['p_after'], 0)} %",
                    }
                )
    return found[:EXAMPLES]


def gaps(risks: dict[str, Json], students: Sequence[str]) -> Table | None:
    """The widest gap in accuracy between slices of each dimension, the student's beside the reference's; None where none was computed."""
    bodies = []
    for student in students:
        rows = []
        for entry in risks[student].get("gaps", []):
            if entry["set"] is None:
                p = as_float(entry.get("p_value"))
                cells = [_gap(entry.get(side)) for side in ("student", "reference")]
                rows.append(
                    [
                        Cell(entry["dimension"]),
                        Cell("both" if entry["domain"] is None else DOMAIN_TITLE[entry["domain"]].lower()),
                        *cells,
                        Cell(DASH if p is None else "under 0.001" if p < 0.001 else f"{p:.3f}"),
                    ]
                )
        if rows:
            bodies.append(Rows(student, rows))
    reference = risks[students[0]]["reference"] if students else ""
    columns = ["Slices by", "domain", "student’s gap, points", f"{reference}’s gap, points", "p of no difference"]
    caption = "Gap in accuracy between the best and the worst slice; p is of a chi-square test that the student is as often right in all."
    return Table("gaps", caption, columns, bodies, text_columns=(0, 1)) if bodies else None


def disagreement(risk: Json) -> Table | None:
    """How often one student answers otherwise than the reference, by its own confidence, and who is right then."""
    bodies = []
    for part in risk.get("disagreement", []):
        rows = [
            [
                Cell(f"{percent(entry['low'], 0)}–{percent(entry['high'], 0)} %"),
                Cell(quantity(entry["n"])),
                *(Cell(percent(entry[key])) for key in ("disagreement", "student_accuracy", "reference_accuracy")),
            ]
            for entry in part["by_student_confidence"]
        ]
        if rows:
            title = f"{DOMAIN_TITLE[part['domain']]}: {percent(part['share'])} % of {plural(part['n'], 'example')}"
            bodies.append(Rows(title, rows))
    columns = ["Student’s confidence", "examples", "disagrees, %", "student right, %", f"{risk.get('reference')} right, %"]
    caption = f"Disagreement of {risk.get('student')} with {risk.get('reference')} by the student’s confidence."
    return Table("disagreement-by-confidence", caption, columns, bodies) if bodies else None


def _title(name: str) -> str:
    return name.replace("_", " ")


def _gap(side: Json | None) -> Cell:
    if not side:
        return Cell(DASH)
    low, high = side["lowest"], side["highest"]
    return Cell(points(side["gap"]).lstrip("+"), f"{low['slice']} {percent(low['accuracy'])}, {high['slice']} {percent(high['accuracy'])}")
