"""The study's curves as SVG files that stand alone: the same bytes for the same numbers, readable on light and dark pages."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert

Json = dict[str, Any]
WIDTH, HEIGHT = 300, 220
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777")
"""Okabe and Ito's, which people who see few colours tell apart."""
SHAPES = ("circle", "diamond", "square", "triangle-up", "cross", "triangle-down", "triangle-right")


def curve(rows: Sequence[Mapping[str, object]], x: str, *, log: bool, order: Sequence[str]) -> str:
    """An SVG of rows `panel`, `line`, `x`, `accuracy`, `low`, `high` (percent): a panel for each domain, lines with their 95 % intervals.

    `x` is the axis' title; `order` the lines as the legend has them.
    """
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(nice=False, zero=False)
    ticks = sorted({float(str(row["x"])) for row in rows})
    across = alt.X("x:Q", title=x, scale=scale, axis=alt.Axis(values=ticks, grid=False, format="~g"))
    colour = alt.Color("line:N", sort=list(order), scale=alt.Scale(domain=list(order), range=list(COLOURS[: len(order)])), title=None)
    shape = alt.Shape("line:N", sort=list(order), scale=alt.Scale(domain=list(order), range=list(SHAPES[: len(order)])), title=None)
    up = alt.Y("accuracy:Q", title="accuracy, %", scale=alt.Scale(zero=False, nice=True))
    base = alt.Chart().encode(x=across, color=colour)
    layers = alt.layer(
        base.mark_rule(opacity=0.35, strokeWidth=2).encode(y=alt.Y("low:Q", title="accuracy, %"), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=up),
        base.mark_point(filled=True, size=60, opacity=1).encode(y=up, shape=shape),
        data=alt.InlineData(values=[dict(row) for row in rows]),
    ).properties(width=WIDTH, height=HEIGHT)
    panels = list(dict.fromkeys(str(row["panel"]) for row in rows))
    chart = layers.facet(column=alt.Column("panel:N", sort=panels, title=None, header=alt.Header(labelFontSize=13)))
    drawn = chart.configure(background="white", aria=False, padding=8).configure_view(stroke="#dddddd").configure_axis(gridColor="#eeeeee")
    return vl_convert.vegalite_to_svg(drawn.to_dict()) + "\n"
