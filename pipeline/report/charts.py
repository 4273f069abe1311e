"""Charts of what every run has: accuracy by method on each evaluation set, accuracy by context, and learning curves."""

from collections.abc import Sequence

import altair as alt
import polars as pl
from markupsafe import Markup

from pipeline.report.collect import Json
from pipeline.report.drawing import data, lowest, names, percent_scale, short, svg, ticks
from pipeline.report.formatting import percent

WIDTH = 150
ROW = 21
CURVE_HEIGHT = 120
CURVE_POINTS = 2400
"""Points of all curves together: what keeps the page small with many students."""
SMOOTHING = 0.08
"""Window of a curve's running mean, as a share of its points."""


def accuracy_charts(document: Json) -> dict[str, Markup]:
    """One picture for each evaluation set: accuracy and its 95 % interval by method, all on one scale."""
    return {name: _accuracy_chart(document, name) for name in document["sets"]}


def context_chart(document: Json, method: str) -> Markup:
    """Accuracy of each single context of a baseline, a row for each evaluation set; the same scale as the other charts."""
    sets = {name: m["contexts"]["each"] for name, m in document["methods"][method]["sets"].items() if "contexts" in m}
    rows = [{"set": name, "accuracy": 100 * value} for name, each in sets.items() for value in each]
    low = lowest(document)
    base = alt.Chart(data(rows)).encode(y=alt.Y("set:N", sort=list(sets), title=None, axis=names()))
    reach = base.mark_rule(stroke="var(--grid)", strokeWidth=6).encode(x=_percent("min(accuracy):Q", low), x2="max(accuracy):Q")
    dots = base.mark_point(filled=True, size=48, opacity=0.85, color="var(--muted)").encode(x=_percent("accuracy:Q", low))
    spoken = "; ".join(f"{name} {', '.join(percent(value) for value in each)}" for name, each in sets.items())
    chart = alt.layer(reach, dots).properties(width=WIDTH, height=ROW * len(sets))
    return svg(chart, f"Accuracy by context of {method}: {spoken}", list(sets))


def shift_chart(target: Json, labels: Sequence[str]) -> Markup | None:
    """Share of the last label that each context of a target set answers, before and after calibration.

    None where nothing was recorded, nothing was changed, or with more than two labels, which one share does not tell.
    """
    label = labels[-1]
    rows = [
        {"context": context, "raw": 100 * change["shares_raw"][label], "calibrated": 100 * change["shares_calibrated"][label]}
        for entry in target.get("teachers", {}).values()
        for context, change in entry.get("contexts", {}).items()
    ]
    if len(labels) != 2 or all(row["raw"] == row["calibrated"] for row in rows):
        return None
    order = [row["context"] for row in rows]
    title = f"answered {label}, %"

    def x(field: str) -> alt.X:
        return alt.X(f"{field}:Q", title=title, scale=alt.Scale(domain=[0, 100], nice=False), axis=ticks())

    base = alt.Chart(data(rows)).encode(y=alt.Y("context:N", sort=order, title=None, axis=names()))
    layers = [
        base.mark_rule(stroke="var(--rule)", strokeWidth=2).encode(x=x("raw"), x2="calibrated:Q"),
        base.mark_point(filled=True, size=55, opacity=1, fill="var(--paper)", stroke="var(--muted)", strokeWidth=2).encode(x=x("raw")),
        base.mark_point(filled=True, size=60, opacity=1, color="var(--student)").encode(x=x("calibrated")),
    ]
    spoken = "; ".join(f"{row['context']} {row['raw']:.0f} raw, {row['calibrated']:.0f} calibrated" for row in rows)
    chart = alt.layer(*layers).properties(width=WIDTH + 60, height=ROW * len(rows))
    return svg(chart, f"Share of {label} answered by context, percent: {spoken}", order)


def curve_chart(curve: pl.DataFrame, student: str, students: int) -> Markup:
    """Training loss of one student by step: every (bucketed) value faint, the running mean strong."""
    buckets = max(20, min(160, CURVE_POINTS // max(1, students)))
    width = max(1, -(-curve.height // buckets))
    points = curve.with_row_index().group_by(pl.col("index") // width, maintain_order=True).agg(pl.col("step").max(), pl.col("loss").mean())
    window = max(1, round(points.height * SMOOTHING))
    points = points.with_columns(pl.col("loss").rolling_mean(window, min_samples=1, center=True).alias("smooth")).select(
        "step", "loss", "smooth"
    )
    base = alt.Chart(data([{k: short(v) for k, v in row.items()} for row in points.to_dicts()])).encode(
        x=alt.X("step:Q", title="step", axis=ticks(), scale=alt.Scale(nice=False))
    )
    raw = base.mark_line(stroke="var(--student)", strokeWidth=1, opacity=0.3).encode(y=alt.Y("loss:Q", title="loss, nats", axis=ticks(4)))
    smooth = base.mark_line(stroke="var(--student)", strokeWidth=2).encode(y=alt.Y("smooth:Q", title="loss, nats"))
    first, last = points["smooth"][0], points["smooth"][-1]
    text = f"Training loss of {student}: from {first:.3f} to {last:.3f} nats over {curve['step'].max()} steps"
    return svg(alt.layer(raw, smooth).properties(width=WIDTH + 60, height=CURVE_HEIGHT), text)


def _accuracy_chart(document: Json, name: str) -> Markup:
    methods = document["methods"]
    rows = [
        {
            "method": method,
            "kind": entry["kind"],
            "accuracy": 100 * entry["sets"][name]["accuracy"],
            "low": 100 * entry["sets"][name]["ci95"][0],
            "high": 100 * entry["sets"][name]["ci95"][1],
        }
        for method, entry in methods.items()
    ]
    kinds = ["baseline", "student"]
    low = lowest(document)
    color = alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=["var(--muted)", "var(--student)"]), legend=None)
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=["circle", "diamond"]), legend=None)
    base = alt.Chart(data(rows)).encode(y=alt.Y("method:N", sort=list(methods), title=None, axis=names()))
    reference = (
        alt.Chart(data([row for row in rows if row["method"] == document["reference"]]))
        .mark_rule(stroke="var(--muted)", strokeDash=[3, 3], strokeWidth=1)
        .encode(x=_percent("accuracy:Q", low))
    )
    interval = base.mark_rule(strokeWidth=2.5, opacity=0.45).encode(x=_percent("low:Q", low), x2="high:Q", color=color)
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(x=_percent("accuracy:Q", low), color=color, shape=shape)
    spoken = "; ".join(f"{row['method']} {row['accuracy']:.1f} ({row['low']:.1f} to {row['high']:.1f})" for row in rows)
    chart = alt.layer(reference, interval, dots).properties(width=WIDTH, height=ROW * len(rows))
    return svg(chart, f"Accuracy on {name} in percent with 95 % intervals: {spoken}", list(methods))


def _percent(field: str, low: float) -> alt.X:
    return alt.X(field, title=None, scale=percent_scale(low), axis=ticks())
