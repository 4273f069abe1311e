"""Charts as inline SVG: no script, no outside resource, the same bytes for the same numbers.

Colours are the page's CSS variables, so a chart follows light, dark and print with the page. A set or a student has a chart of its own,
about as wide as a phone; the page lays them out side by side where there is room, so their text never shrinks. Kinds of methods differ by
shape as well as colour. Vega's own accessibility tree is left out for one label on the whole picture: the tables carry the numbers.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import altair as alt
import polars as pl
import vl_convert
from markupsafe import Markup

from pipeline.report.collect import Json
from pipeline.report.describe import percent

MARK_ROLES = re.compile(r' (role="graphics-[a-z]+"|aria-roledescription="[^"]*"|aria-hidden="true"|pointer-events="none")')
WIDTH = 150
ROW = 21
SPARE_A_LETTER = 1.2
"""Pixels kept free for each letter of a name."""
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
    low = _lowest(document)
    base = alt.Chart(_data(rows)).encode(y=alt.Y("set:N", sort=list(sets), title=None, axis=_names()))
    reach = base.mark_rule(stroke="var(--grid)", strokeWidth=6).encode(x=_percent_axis("min(accuracy):Q", low), x2="max(accuracy):Q")
    dots = base.mark_point(filled=True, size=48, opacity=0.85, color="var(--muted)").encode(x=_percent_axis("accuracy:Q", low))
    spoken = "; ".join(f"{name} {', '.join(percent(value) for value in each)}" for name, each in sets.items())
    chart = alt.layer(reach, dots).properties(width=WIDTH, height=ROW * len(sets))
    return _svg(chart, f"Accuracy by context of {method}: {spoken}", list(sets))


def curve_chart(curve: pl.DataFrame, student: str, students: int) -> Markup:
    """Training loss of one student by step: every (bucketed) value faint, the running mean strong."""
    buckets = max(20, min(160, CURVE_POINTS // max(1, students)))
    width = max(1, -(-curve.height // buckets))
    points = curve.with_row_index().group_by(pl.col("index") // width, maintain_order=True).agg(pl.col("step").max(), pl.col("loss").mean())
    window = max(1, round(points.height * SMOOTHING))
    points = points.with_columns(pl.col("loss").rolling_mean(window, min_samples=1, center=True).alias("smooth")).select(
        "step", "loss", "smooth"
    )
    base = alt.Chart(_data([{k: _short(v) for k, v in row.items()} for row in points.to_dicts()])).encode(
        x=alt.X("step:Q", title="step", axis=_ticks(), scale=alt.Scale(nice=False))
    )
    raw = base.mark_line(stroke="var(--student)", strokeWidth=1, opacity=0.3).encode(y=alt.Y("loss:Q", title="loss, nats", axis=_ticks(4)))
    smooth = base.mark_line(stroke="var(--student)", strokeWidth=2).encode(y=alt.Y("smooth:Q", title="loss, nats"))
    first, last = points["smooth"][0], points["smooth"][-1]
    text = f"Training loss of {student}: from {first:.3f} to {last:.3f} nats over {curve['step'].max()} steps"
    return _svg(alt.layer(raw, smooth).properties(width=WIDTH + 60, height=CURVE_HEIGHT), text)


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
    low = _lowest(document)
    color = alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=["var(--muted)", "var(--student)"]), legend=None)
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=kinds, range=["circle", "diamond"]), legend=None)
    base = alt.Chart(_data(rows)).encode(y=alt.Y("method:N", sort=list(methods), title=None, axis=_names()))
    reference = (
        alt.Chart(_data([row for row in rows if row["method"] == document["reference"]]))
        .mark_rule(stroke="var(--muted)", strokeDash=[3, 3], strokeWidth=1)
        .encode(x=_percent_axis("accuracy:Q", low))
    )
    interval = base.mark_rule(strokeWidth=2.5, opacity=0.45).encode(x=_percent_axis("low:Q", low), x2="high:Q", color=color)
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(x=_percent_axis("accuracy:Q", low), color=color, shape=shape)
    spoken = "; ".join(f"{row['method']} {row['accuracy']:.1f} ({row['low']:.1f} to {row['high']:.1f})" for row in rows)
    chart = alt.layer(reference, interval, dots).properties(width=WIDTH, height=ROW * len(rows))
    return _svg(chart, f"Accuracy on {name} in percent with 95 % intervals: {spoken}", list(methods))


def _lowest(document: Json) -> float:
    """Where the charts' scale of accuracy begins, percent: the multiple of 10 below all intervals and contexts."""
    entries = [entry for method in document["methods"].values() for entry in method["sets"].values()]
    values = [entry["ci95"][0] for entry in entries] + [entry["contexts"]["worst"] for entry in entries if "contexts" in entry]
    return max(0.0, 100 * min(values) // 10 * 10)


def _data(rows: Sequence[Json]) -> alt.InlineData:
    return alt.InlineData(values=[{key: _short(value) for key, value in row.items()} for row in rows])


def _short(value: object) -> object:
    return round(value, 5) if isinstance(value, float) else value


def _percent_axis(field: str, low: float) -> alt.X:
    """Every layer names the one scale: Vega-Lite would widen it to zero for a layer that does not."""
    return alt.X(field, title=None, scale=alt.Scale(domain=[low, 100], nice=False, zero=False), axis=_ticks())


def _names() -> alt.Axis:
    return alt.Axis(domain=False, ticks=False, labelPadding=8, labelLimit=150)


def _ticks(count: int = 5) -> alt.Axis:
    return alt.Axis(tickCount=count, domain=False, ticks=False, grid=True, labelPadding=6, labelFlush=False)


def _svg(chart: Any, label: str, names: Sequence[str] = ()) -> Markup:
    """A layered Altair chart as an SVG element, one labelled picture to a screen reader."""
    axis = {"labelColor": "var(--ink)", "titleColor": "var(--muted)", "gridColor": "var(--grid)"}
    # The reader's font may be wider than the one that names were measured in.
    padding = {"left": 4 + round(SPARE_A_LETTER * max(map(len, names), default=0)), "right": 10, "top": 4, "bottom": 4}
    fonts = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelFont": "sans-serif", "titleFont": "sans-serif"}
    drawn = (
        chart.configure(aria=False, background="transparent", padding=padding).configure_view(stroke=None).configure_axis(**axis, **fonts)
    )
    svg = vl_convert.vegalite_to_svg(drawn.to_dict())
    svg = MARK_ROLES.sub("", svg[svg.index("<svg") :])
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))  # noqa: S704 - built here from escaped parts
