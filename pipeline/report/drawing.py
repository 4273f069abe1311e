"""Charts as inline SVG: no script, no outside resource, the same bytes for the same numbers.

Colours are the page's CSS variables, so a chart follows light, dark and print with the page. A chart is about as wide as a phone; the page
lays several out side by side where there is room, so their text never shrinks. Kinds of methods differ by shape as well as colour. Vega's
own accessibility tree is left out for one label on the whole picture: the tables carry the numbers.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import Any

import altair as alt
import vl_convert
from markupsafe import Markup

from pipeline.report.collect import Json

MARK_ROLES = re.compile(r' (role="graphics-[a-z]+"|aria-roledescription="[^"]*"|aria-hidden="true"|pointer-events="none")')
SPARE_A_LETTER = 1.2
"""Pixels kept free for each letter of a name."""


def data(rows: Sequence[Json]) -> alt.InlineData:
    """Rows of a chart, numbers cut to what a screen can show."""
    return alt.InlineData(values=[{key: short(value) for key, value in row.items()} for row in rows])


def short(value: object) -> object:
    """A float with 5 digits; anything else as it is."""
    return round(value, 5) if isinstance(value, float) else value


def lowest(document: Json) -> float:
    """Where scales of accuracy begin, percent: the multiple of 10 below all intervals and contexts."""
    entries = [entry for method in document["methods"].values() for entry in method["sets"].values()]
    values = [entry["ci95"][0] for entry in entries] + [entry["contexts"]["worst"] for entry in entries if "contexts" in entry]
    return max(0.0, 100 * min(values) // 10 * 10)


def percent_scale(low: float) -> alt.Scale:
    """Every layer names the one scale: Vega-Lite would widen it to zero for a layer that does not."""
    return alt.Scale(domain=[low, 100], nice=False, zero=False)


def names() -> alt.Axis:
    """An axis of names: no line, no ticks."""
    return alt.Axis(domain=False, ticks=False, labelPadding=8, labelLimit=150)


def ticks(count: int = 5, **settings: Any) -> alt.Axis:
    """An axis of numbers: a faint grid and no line."""
    return alt.Axis(tickCount=count, domain=False, ticks=False, grid=True, labelPadding=6, labelFlush=False, **settings)


def svg(chart: Any, label: str, row_names: Sequence[str] = ()) -> Markup:
    """An Altair chart as an SVG element, one labelled picture to a screen reader."""
    axis = {"labelColor": "var(--ink)", "titleColor": "var(--muted)", "gridColor": "var(--grid)"}
    # The reader's font may be wider than the one that names were measured in.
    padding = {"left": 4 + round(SPARE_A_LETTER * max(map(len, row_names), default=0)), "right": 10, "top": 4, "bottom": 4}
    fonts = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelFont": "sans-serif", "titleFont": "sans-serif"}
    drawn = (
        chart.configure(aria=False, background="transparent", padding=padding)
        .configure_view(stroke=None)
        .configure_axis(**axis, **fonts)
        .configure_text(font="sans-serif", fontSize=12)
    )
    text = vl_convert.vegalite_to_svg(drawn.to_dict())
    text = MARK_ROLES.sub("", text[text.index("<svg") :])
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))  # noqa: S704 - built here from escaped parts
