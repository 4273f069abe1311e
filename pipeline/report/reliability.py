"""Whether confidence is deserved, and which labels are taken for which: from the bins and counts in `metrics/detail/`."""

from collections.abc import Sequence
from typing import Any

import altair as alt
from markupsafe import Markup

from pipeline.report.cells import DOMAIN_TITLE, Cell, Rows, Table
from pipeline.report.collect import Json
from pipeline.report.document import sets_of
from pipeline.report.drawing import data, svg, ticks
from pipeline.report.formatting import percent

SIZE = 190
MOST_LABELS = 12
DOMAINS = {"in": "in domain", "out": "out of domain"}


def reliability_chart(document: Json, detail: Json, method: str) -> Markup | None:
    """Accuracy against confidence in bins, a line for each domain, the sets of a domain pooled; None where no bin was recorded."""
    rows = [
        {"domain": domain, **{key: 100 * entry[key] for key in ("confidence", "accuracy")}, "n": entry["n"]}
        for domain in ("in", "out")
        for entry in pooled_bins(detail, sets_of(document, domain))
    ]
    if not rows:
        return None
    labels = len(next(iter(next(iter(detail["sets"].values()))["confusion"].values())))
    scale = alt.Scale(domain=[100 // labels, 100], nice=False)
    full = alt.Scale(domain=[0, 100], nice=False)
    x = alt.X("confidence:Q", title="confidence, %", scale=scale, axis=ticks())
    y = alt.Y("accuracy:Q", title="right, %", scale=full, axis=ticks())
    color = alt.Color("domain:N", scale=alt.Scale(domain=["in", "out"], range=["var(--muted)", "var(--student)"]), legend=None)
    shape = alt.Shape("domain:N", scale=alt.Scale(domain=["in", "out"], range=["circle", "diamond"]), legend=None)
    ideal = alt.Chart(data([{"confidence": 100 // labels, "accuracy": 100 // labels}, {"confidence": 100, "accuracy": 100}]))
    base = alt.Chart(data(rows)).encode(x=x, y=y, color=color)
    sizes = alt.Size("n:Q", scale=alt.Scale(type="sqrt", range=[18, 170], domain=[1, max(row["n"] for row in rows)]), legend=None)
    layers = [
        ideal.mark_line(stroke="var(--rule)", strokeDash=[4, 3]).encode(x=x, y=y),
        base.mark_line(strokeWidth=1.5, opacity=0.6),
        base.mark_point(filled=True, opacity=0.9).encode(shape=shape, size=sizes),
    ]
    spoken = "; ".join(
        f"{DOMAINS[row['domain']]}, confidence {row['confidence']:.0f} %: {row['accuracy']:.0f} % right of {row['n']:,}" for row in rows
    )
    return svg(alt.layer(*layers).properties(width=SIZE, height=SIZE), f"Reliability of {method}: {spoken}")


def pooled_bins(detail: Json, sets: Sequence[str]) -> list[dict[str, Any]]:
    """The bins of several sets as one: counts add up, confidence and accuracy are means over rows. Bins without rows are left out."""
    found: dict[tuple[float, float], list[Json]] = {}
    for name in sets:
        for entry in detail["sets"].get(name, {}).get("reliability", []):
            found.setdefault((entry["low"], entry["high"]), []).append(entry)
    pooled = []
    for (low, high), entries in sorted(found.items()):
        n = sum(entry["n"] for entry in entries)
        mean = {key: sum(entry["n"] * entry[key] for entry in entries) / n for key in ("confidence", "accuracy")}
        pooled.append({"low": low, "high": high, "n": n, **mean})
    return pooled


def confusion(document: Json, details: dict[str, Json], labels: Sequence[str]) -> Table | None:
    """Rows of each gold label by predicted label, for some methods side by side; a domain's sets pooled. None with too many labels."""
    if not details or len(labels) > MOST_LABELS:
        return None
    bodies = []
    for domain in ("in", "out"):
        rows = []
        for gold in labels:
            row = [Cell(gold)]
            for detail in details.values():
                counts = {
                    predicted: sum(detail["sets"][name]["confusion"].get(gold, {}).get(predicted, 0) for name in sets_of(document, domain))
                    for predicted in labels
                }
                total = sum(counts.values())
                row += [
                    Cell(percent(count / total if total else None), f"{count:,}", heat=round(count / total, 2) if total else None)
                    for count in counts.values()
                ]
            rows.append(row)
        if sets_of(document, domain):
            bodies.append(Rows(DOMAIN_TITLE[domain], rows))
    groups = [("", 1), *((method, len(labels)) for method in details)]
    columns = ["Gold label", *(label for _ in details for label in labels)]
    caption = "Of the examples with a gold label (row), the percentage answered with each label (column), and their number."
    return Table("confusion", caption, columns, bodies, groups)
