"""The report's charts as inline SVG, drawn by Vega-Lite: no script, nothing from outside, the same bytes for the same numbers.

Colours are the page's CSS variables, so charts follow light, dark and print. Kinds of methods differ by shape as well as by colour. Each
picture has one label for screen readers; the tables have the numbers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from typing import Any

import numpy as np
import polars as pl
import vl_convert
from markupsafe import Markup

from pipeline.report.collect import DOMAINS, Collected, Json, domains_of, sets_of, surest_first
from pipeline.report.prose import milliseconds, percent, scaled

WIDTH, ROW = 150, 21  # pixels: width of a chart with names beside it, and height of its rows
TRADEOFF_WIDTH, TRADEOFF_HEIGHT = 270, 215
CURVE_POINTS = 80
INK, MUTED, STUDENT, RULE, GRID = "var(--ink)", "var(--muted)", "var(--student)", "var(--rule)", "var(--grid)"
NAMES = {"domain": False, "ticks": False, "labelPadding": 8, "labelLimit": 150}
TICKS = {"tickCount": 4, "domain": False, "ticks": False, "grid": True, "labelPadding": 6, "labelFlush": False}


def accuracy(document: Json, where: str) -> Markup:
    """Accuracy of each method on one evaluation set, with its 95 % interval; the dashed line is the reference."""
    rows, low, names = _rows(document, "sets", where), _lowest(document), list(document["methods"])
    color, shape = _two("kind", ["baseline", "student"])
    y, reference = _named("method", names), [row for row in rows if row["method"] == document["reference"]]
    layers = [
        _layer(reference, "rule", {"x": _share("accuracy", low)}, stroke=MUTED, strokeDash=[3, 3], strokeWidth=1),
        _layer(rows, "rule", {"x": _share("low", low), "x2": {"field": "high"}, "y": y, **color}, strokeWidth=2.5, opacity=0.45),
        _layer(rows, "point", {"x": _share("accuracy", low), "y": y, **color, **shape}, filled=True, size=70, opacity=1),
    ]
    spoken = "; ".join(f"{row['method']} {row['accuracy']:.1f} ({row['low']:.1f} to {row['high']:.1f})" for row in rows)
    return _svg(layers, WIDTH, ROW * len(rows), f"Accuracy on {where} in percent with 95 % intervals: {spoken}", names)


def _rows(document: Json, kind: str, key: str) -> list[Json]:
    """Each method's accuracy and its interval (percent) on a set (`kind` "sets") or over a domain ("means")."""
    rows = []
    for name, method in document["methods"].items():
        accuracy, low, high = (100 * value for value in (method[kind][key]["accuracy"], *method[kind][key]["ci95"]))
        rows.append({"method": name, "kind": method["kind"], "accuracy": accuracy, "low": low, "high": high})
    return rows


def spread(document: Json, method: str) -> Markup | None:
    """Accuracy of a method in each of its contexts (or with each seed), a row for each evaluation set. None if it answered once."""
    sets = {where: entry["contexts"]["each"] for where, entry in document["methods"][method]["sets"].items() if "contexts" in entry}
    if not sets:
        return None
    low, rows = _lowest(document), [{"set": where, "accuracy": 100 * value} for where, each in sets.items() for value in each]
    y, x = _named("set", list(sets)), _share("accuracy", low)
    ends = {"x": {**x, "aggregate": "min"}, "x2": {"field": "accuracy", "aggregate": "max"}}
    layers = [
        _layer(rows, "rule", {**ends, "y": y}, stroke=GRID, strokeWidth=6),
        _layer(rows, "point", {"x": x, "y": y}, filled=True, size=48, opacity=0.85, color=MUTED),
    ]
    spoken = "; ".join(f"{where} {', '.join(percent(value) for value in each)}" for where, each in sets.items())
    return _svg(layers, WIDTH, ROW * len(sets), f"Accuracy by context of {method}: {spoken}", list(sets))


def curve(found: Collected, student: str) -> Markup:
    """Training loss of one student by step, in means over neighbouring steps."""
    steps: pl.DataFrame = found.files[f"metrics/curves/{student}.csv"]
    group = (pl.int_range(pl.len()) // math.ceil(steps.height / CURVE_POINTS)).alias("group")
    rows = steps.group_by(group, maintain_order=True).agg(pl.col("step").max(), pl.col("loss").mean())
    x = {"field": "step", "type": "quantitative", "title": "step", "axis": TICKS, "scale": {"nice": False}}
    y = {"field": "loss", "type": "quantitative", "title": "loss, nats", "axis": TICKS}
    layers = [_layer(rows.to_dicts(), "line", {"x": x, "y": y}, stroke=STUDENT, strokeWidth=2)]
    fall = f"from {rows['loss'][0]:.3f} to {rows['loss'][-1]:.3f} nats over {rows['step'][-1]} steps"
    return _svg(layers, 210, 120, f"Training loss of {student}: {fall}")


def reliability(found: Collected, method: str) -> Markup:
    """Accuracy by confidence in bins, a line for each domain, a dotted one for a student before its temperature; sets are pooled."""
    lowest, rows, before = 100 / len(found.params.task.labels), _bins(found, method, "reliability"), _bins(found, method, "uncorrected")
    place = {"x": _share("confidence", lowest, "confidence, %"), "y": _share("accuracy", 0, "right, %")}
    color, shape = _two("domain", ["in", "out"])
    areas = {"type": "sqrt", "range": [18, 170], "domain": [1, max(row["n"] for row in rows)]}
    size = {"size": {"field": "n", "type": "quantitative", "scale": areas, "legend": None}}
    ideal = [{"confidence": value, "accuracy": value} for value in (lowest, 100)]
    layers = [
        _layer(ideal, "line", place, stroke=RULE, strokeDash=[4, 3]),
        _layer(rows, "line", place | color, strokeWidth=1.5, opacity=0.6),
        _layer(rows, "point", place | color | shape | size, filled=True, opacity=0.9),
    ]
    if before:
        layers.append(_layer(before, "line", place | color, strokeWidth=1.5, strokeDash=[1, 3]))
    each = "{}, confidence {:.0f} %: {:.0f} % right of {:,}"
    spoken = "; ".join(each.format(DOMAINS[row["domain"]].lower(), row["confidence"], row["accuracy"], row["n"]) for row in rows)
    return _svg(layers, 190, 190, f"Reliability of {method}: {spoken}")


def _bins(found: Collected, method: str, kind: str) -> list[Json]:
    """The bins of metrics/detail, each domain's sets pooled, in percent; none if the sets have none of this kind."""
    rows, sets = list[Json](), found.of("detail", method)["sets"]
    for domain in domains_of(found.document):
        if entries := [entry for where in sets_of(found.document, domain) for entry in sets[where].get(kind, ())]:
            means = [(pl.col(key) * pl.col("n")).sum() / pl.col("n").sum() * 100 for key in ("confidence", "accuracy")]
            bins = pl.DataFrame(entries).group_by("low").agg(*means, pl.col("n").sum(), pl.lit(domain).alias("domain"))
            rows += bins.sort("low").to_dicts()
    return rows


def answered(found: Collected, student: str) -> Markup:
    """What the surest answers of a student are worth, by their share: agreement with the reference, and how many are right (dotted).

    A line for each domain, its sets pooled. Marks: what the thresholds of `predict --agree` reach, see `collect.thresholds`.
    """
    rows, marks = list[Json](), list[Json]()
    for domain in domains_of(found.document):
        surest = surest_first(found, student, domain)
        places = np.unique(np.linspace(len(surest) / 20, len(surest), CURVE_POINTS).round().astype(int))
        for what in ("agrees", "right"):
            means = surest[what].cum_sum() / np.arange(1, len(surest) + 1)
            rows += [{"domain": domain, "what": what, "share": 100 * n / len(surest), "value": 100 * means[int(n) - 1]} for n in places]
        for promise, least in found.thresholds[student].items():
            kept = surest.filter(pl.col("confidence") >= least)
            if len(kept):
                reached = {
                    "share": 100 * len(kept) / len(surest),
                    "value": 100 * float(kept["agrees"].to_numpy().mean()),
                    "promise": promise,
                }
                marks.append({"domain": domain, "right": 100 * float(kept["right"].to_numpy().mean()), **reached})
    low = min(row["value"] for row in rows) // 5 * 5
    place = {"x": _share("share", 0, "answered, %"), "y": _share("value", low, "agrees, %")}
    color, shape = _two("domain", ["in", "out"])
    dashes = {"domain": ["agrees", "right"], "range": [[1, 0], [2, 3]]}
    dash = {"strokeDash": {"field": "what", "type": "nominal", "scale": dashes, "legend": None}}
    layers = [_layer(rows, "line", place | color | dash, strokeWidth=1.5)]
    if marks:
        layers.append(_layer(marks, "point", place | color | shape, filled=True, size=60, opacity=1))
    each = "{}, promised {:.0%}: {:.1f} % answered, of these {:.1f} % agree and {:.1f} % are right"
    said = [each.format(DOMAINS[m["domain"]].lower(), m["promise"], m["share"], m["value"], m["right"]) for m in marks]
    return _svg(layers, 190, 190, f"Answered share of {student}: {'; '.join(said)}")


COSTS: dict[str, tuple[str, tuple[str, ...], Callable[[float], str]]] = {
    "latency": ("ms an example", ("latency_ms",), lambda value: f"{milliseconds(value)} ms"),
    "peak memory": ("bytes", ("peak_rss_bytes", "peak_device_bytes"), partial(scaled, unit="B")),
}
"""What accuracy is drawn against: its unit, the entries of a cost file whose sum it is, and how it is said."""


def frontier(document: Json, domain: str, against: str) -> tuple[list[Json], list[Json]]:
    """`_rows` of the methods whose `cost` was measured, the lowest first; and those more accurate than all with a lower one."""
    keys = COSTS[against][1]
    costs = {name: sum((method["cost"] or {}).get(key, 0) for key in keys) for name, method in document["methods"].items()}
    rows = [row | {"cost": costs[row["method"]]} for row in _rows(document, "means", domain) if costs[row["method"]]]
    rows.sort(key=lambda row: (row["cost"], -row["accuracy"]))
    return rows, [row for n, row in enumerate(rows) if all(row["accuracy"] > other["accuracy"] for other in rows[:n])]


def tradeoff(document: Json, domain: str, against: str) -> Markup | None:
    """Mean accuracy over a domain against a cost of `COSTS`; the stepped line joins the frontier. None if fewer than two were measured.

    Names are placed beside their points, else above or below: first those on the frontier, then the reference, then by accuracy. A name
    that would run into a point or another name everywhere is left out, since the table has it.
    """
    rows, unbeaten = frontier(document, domain, against)
    if len(rows) < 2:
        return None
    unit, _, in_words = COSTS[against]
    low, left, right = min(row["low"] for row in rows) // 10 * 10, rows[0]["cost"] / 1.35, rows[-1]["cost"] * 1.35
    digits = (1, 2, 5) if right < 50 * left else (1,)
    values = [digit * 10**power for power in range(-2, 13) for digit in digits if left <= digit * 10**power <= right]
    scale = {"type": "log", "domain": [left, right], "nice": False}
    axis = TICKS | {"values": values, "format": "~s"}
    x = {"x": {"field": "cost", "type": "quantitative", "title": f"{against}, {unit} (log scale)", "scale": scale, "axis": axis}}
    color, shape = _two("kind", ["baseline", "student"])
    point, bar = x | {"y": _share("accuracy", low, "accuracy, %")}, {"y": _share("low", low, "accuracy, %"), "y2": {"field": "high"}}
    layers = [
        _layer(unbeaten, "line", point, interpolate="step-after", stroke=RULE, strokeWidth=1.5),
        _layer(rows, "rule", x | bar | color, strokeWidth=1.5, opacity=0.4),
        _layer(rows, "point", point | color | shape, filled=True, size=70, opacity=1),
    ]
    heights = {row["method"]: TRADEOFF_HEIGHT * (100 - row["accuracy"]) / (100 - low) for row in rows}  # pixels from the top
    places = {row["method"]: TRADEOFF_WIDTH * math.log(row["cost"] / left) / math.log(right / left) for row in rows}
    taken = [(places[name] - 6, places[name] + 6, heights[name]) for name in places]
    for row in sorted(rows, key=lambda row: (row not in unbeaten, row["method"] != document["reference"], -row["accuracy"])):
        place, size = places[row["method"]], 6.6 * len(row["method"])
        align, way = ("left", 1) if place < TRADEOFF_WIDTH / 2 else ("right", -1)
        for dx, dy in ((9 * way, 0), (0, -13), (0, 13)):
            start, end = sorted((place + dx, place + dx + way * size))
            height = heights[row["method"]] + dy
            if height > 0 and all(abs(height - other) > 12 or end < begins or ends < start for begins, ends, other in taken):
                taken.append((start, end, height))
                text = point | {"text": {"field": "method", "type": "nominal"}}
                layers.append(_layer([row], "text", text, align=align, dx=dx, dy=dy, fill=INK))
                break
    spoken = "; ".join(f"{row['method']} {row['accuracy']:.1f} % at {in_words(row['cost'])}" for row in rows)
    return _svg(layers, TRADEOFF_WIDTH, TRADEOFF_HEIGHT, f"Accuracy against {against}: {spoken}")


def _layer(rows: Sequence[Json], mark: str, encoding: Json, **looks: Any) -> Json:
    """One mark for each row; numbers are rounded to what a screen can show."""
    values = [{key: round(own, 5) if isinstance(own, float) else own for key, own in row.items()} for row in rows]
    return {"data": {"values": values}, "mark": {"type": mark, **looks}, "encoding": encoding}


def _lowest(document: Json) -> float:
    """Where scales of accuracy begin, percent: the multiple of 10 below all intervals and contexts."""
    entries = [entry for method in document["methods"].values() for entry in method["sets"].values()]
    values = [entry["ci95"][0] for entry in entries] + [entry["contexts"]["worst"] for entry in entries if "contexts" in entry]
    return max(0.0, 100 * min(values) // 10 * 10)


def _share(field: str, low: float, title: str | None = None) -> Json:
    """A scale from `low` to 100 percent. Each layer states it: Vega-Lite widens the scale to zero if one does not."""
    scale = {"domain": [low, 100], "nice": False, "zero": False}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": TICKS}


def _named(field: str, order: Sequence[str]) -> Json:
    """A row for each name."""
    return {"field": field, "type": "nominal", "sort": order, "title": None, "axis": NAMES}


def _two(field: str, values: list[str]) -> tuple[Json, Json]:
    """Colour and shape of two kinds: a grey circle, a diamond in the students' colour."""
    color, shape = (
        {channel: {"field": field, "type": "nominal", "scale": {"domain": values, "range": looks}, "legend": None}}
        for channel, looks in {"color": [MUTED, STUDENT], "shape": ["circle", "diamond"]}.items()
    )
    return color, shape


def _svg(layers: Sequence[Json], width: int, height: int, label: str, names: Sequence[str] = ()) -> Markup:
    """Layers as an SVG element with one label. There is room for `names` at its left in a wider font than the one they are measured in."""
    axis = {"labelColor": INK, "titleColor": MUTED, "gridColor": GRID, "labelFontSize": 12, "titleFontSize": 12}
    fonts = {"titleFontWeight": "normal", "labelFont": "sans-serif", "titleFont": "sans-serif"}
    config = {
        "aria": False,
        "background": "transparent",
        "padding": {"left": 4 + round(1.2 * max(map(len, names), default=0)), "right": 10, "top": 4, "bottom": 4},
        "view": {"stroke": None},
        "axis": axis | fonts,
        "axisY": {"titlePadding": 9},
        "text": {"font": "sans-serif", "fontSize": 12},
    }
    text = vl_convert.vegalite_to_svg({"layer": layers, "width": width, "height": height, "config": config})
    text = text[text.index("<svg") :]
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))  # noqa: S704  built here from escaped parts
