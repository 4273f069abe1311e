"""Charts of what answers cost: accuracy against latency, and latency and memory against the length of the context.

Labels stand beside their points and are moved apart here, because Vega-Lite does not: a label takes the first of a few places where it
covers no point and no other label. With many methods only those that nothing beats in both accuracy and latency are named.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import altair as alt
from markupsafe import Markup

from pipeline.report.collect import Json
from pipeline.report.document import sets_of
from pipeline.report.drawing import data, lowest, percent_scale, svg, ticks
from pipeline.report.formatting import percent, quantity, scaled

WIDTH, HEIGHT = 270, 215
LETTER, LINE = 6.6, 14
"""Size of a label's letter and line, pixels."""
GAP = 9
"""Between a point and its label, pixels."""
MOST_NAMED = 10
ROUND = (1, 2, 5)
Box = tuple[float, float, float, float]
KINDS = alt.Scale(domain=["baseline", "student"], range=["var(--muted)", "var(--student)"])
SHAPES = alt.Scale(domain=["baseline", "student"], range=["circle", "diamond"])


def tradeoff_charts(document: Json) -> dict[str, Markup]:
    """Domain ("in", "out") → mean accuracy against the median latency of an example; no entry where fewer than two have one."""
    found = {}
    for domain in ("in", "out"):
        if sets_of(document, domain):
            rows = [
                {
                    "method": name,
                    "kind": method["kind"],
                    "latency": float(method["cost"]["latency_ms"]),
                    **dict(zip(("low", "high"), (100 * x for x in method["means"][domain]["ci95"]), strict=True)),
                    "accuracy": 100 * method["means"][domain]["accuracy"],
                }
                for name, method in document["methods"].items()
                if (method["cost"] or {}).get("latency_ms")
            ]
            if len(rows) > 1:
                found[domain] = _tradeoff(rows, lowest(document), document["reference"])
    return found


def frontier(rows: Iterable[Json]) -> list[Json]:
    """The rows that no other row beats in accuracy at their latency or less, by latency."""
    kept: list[Json] = []
    for row in sorted(rows, key=lambda row: (row["latency"], -row["accuracy"])):
        if not kept or row["accuracy"] > kept[-1]["accuracy"]:
            kept.append(row)
    return kept


def place_labels(points: Sequence[tuple[str, float, float]], width: float, height: float) -> list[tuple[float, float, str]]:
    """(x, y, "left", "center" or "right") of each label, for points (text, x, y) in pixels.

    `left` is text that begins at x, `right` text that ends there. Labels are placed in order; each takes the first place within the picture
    that covers neither a label before it nor a point, or the first of all.
    """
    taken: list[Box] = []
    placed = []
    for text, x, y in points:
        size = len(text) * LETTER
        # Beside the point, above or below it, then further and further off beside it.
        starts = {"left": x + GAP, "center": min(max(x - size / 2, 0), width - size), "right": x - GAP - size}
        tries = [(0, "left"), (0, "right"), (-LINE, "center"), (LINE, "center")]
        tries += [(shift, align) for step in (1, 2, 3) for shift in (-step * LINE, step * LINE) for align in ("left", "right")]
        places = [((starts[a], y + s - LINE / 2, starts[a] + size, y + s + LINE / 2), a) for s, a in tries]
        inside = [place for place in places if _inside(place[0], width, height)] or places[:1]
        others = [(px, py) for _, px, py in points if (px, py) != (x, y)]
        # Well away from other points if it can be, so that nobody reads it as theirs; else at least not on them.
        for room in (LINE, 5):
            kept_free = [*taken, *((px - 6, py - room, px + 6, py + room) for px, py in others)]
            free = [place for place in inside if not any(_overlap(place[0], other) for other in kept_free)]
            if free:
                break
        box, align = (free or inside)[0]
        taken.append(box)
        at = {"left": box[0], "center": (box[0] + box[2]) / 2, "right": box[2]}[align]
        placed.append((at, (box[1] + box[3]) / 2, align))
    return placed


def context_charts(measured: Sequence[Json], student: str | None, student_cost: Json) -> dict[str, Markup]:
    """What is measured → chart of it against the tokens of a prompt: one line for each model that is prompted, and the student's, level.

    `measured` are the rows `by_demonstrations` of a cost file. A count that does not fit the model has no figures and no point.
    """
    shown = {
        "Latency": ("latency_ms", 1.0, "ms an example", lambda value: f"{quantity(float(value))} ms"),
        "Peak memory": ("peak_rss_bytes", 1e-9, "GB", lambda value: scaled(value, "B")),
    }
    found = {}
    for title, (key, factor, unit, say) in shown.items():
        rows = [row for row in measured if row.get(key) is not None]
        if len(rows) > 1:
            level = student_cost.get(key) if student else None
            found[title] = _against_context(rows, key, factor, unit, say, student if level is not None else None, level)
    return found


def _tradeoff(rows: list[Json], low: float, reference: str) -> Markup:
    left, right = min(row["latency"] for row in rows) / 1.35, max(row["latency"] for row in rows) * 1.35
    scale = alt.Scale(type="log", domain=[left, right], nice=False)
    values = [factor * 10**power for power in range(-2, 8) for factor in ROUND if left <= factor * 10**power <= right]
    x = alt.X("latency:Q", title="latency, ms an example (log scale)", scale=scale, axis=ticks(values=values, format="~s"))
    y = alt.Y("accuracy:Q", title="accuracy, %", scale=percent_scale(low), axis=ticks())
    edge = frontier(rows)
    named = rows if len(rows) <= MOST_NAMED else [row for row in rows if row in edge or row["method"] == reference]
    spots = [
        (row["method"], WIDTH * _share(row["latency"], left, right, log=True), HEIGHT * (1 - _share(row["accuracy"], low, 100)))
        for row in sorted(named, key=lambda row: -row["accuracy"])
    ]
    placed = place_labels(spots, WIDTH, HEIGHT)
    labels = [
        {"method": text, "px": at_x, "py": at_y, "align": align}
        for (text, _, _), (at_x, at_y, align) in zip(spots, placed, strict=True)
    ]  # fmt: skip
    base = alt.Chart(data(rows))
    color = alt.Color("kind:N", scale=KINDS, legend=None)
    layers = [
        alt.Chart(data(edge)).mark_line(interpolate="step-after", stroke="var(--rule)", strokeWidth=1.5).encode(x=x, y=y),
        base.mark_rule(strokeWidth=1.5, opacity=0.4).encode(
            x=x, y=alt.Y("low:Q", scale=percent_scale(low), axis=ticks()), y2="high:Q", color=color
        ),
        base.mark_point(filled=True, size=70, opacity=1).encode(
            x=x, y=y, color=color, shape=alt.Shape("kind:N", scale=SHAPES, legend=None)
        ),
    ]
    for align in ("left", "center", "right"):
        part = [label for label in labels if label["align"] == align]
        if part:
            text = alt.Chart(data(part)).mark_text(align=align, baseline="middle", fill="var(--ink)")  # type: ignore[arg-type]
            layers.append(text.encode(x=alt.X("px:Q", scale=None), y=alt.Y("py:Q", scale=None), text="method:N"))
    spoken = "; ".join(f"{row['method']} {row['accuracy']:.1f} % at {row['latency']:,.0f} ms" for row in rows)
    chart = alt.layer(*layers).properties(width=WIDTH, height=HEIGHT)
    return svg(chart, f"Accuracy against latency: {spoken}")


def _against_context(
    rows: list[Json], key: str, factor: float, unit: str, say: Callable[[float], str], student: str | None, level: float | None
) -> Markup:  # fmt: skip
    points = [
        {
            "model": row["model"].removeprefix("models/"),
            "tokens": float(row["prompt_tokens"]),
            "value": factor * row[key],
            "demonstrations": str(row["demonstrations"]),
        }
        for row in rows
    ]
    right = max(row["tokens"] for row in points) * 1.06
    top = max([*(row["value"] for row in points), (level or 0) * factor]) * 1.12
    x = alt.X("tokens:Q", title="prompt tokens", scale=alt.Scale(domain=[0, right], nice=False), axis=ticks(5, format="~s"))
    y = alt.Y("value:Q", title=unit, scale=alt.Scale(domain=[0, top], nice=False), axis=ticks())
    base = alt.Chart(data(points)).encode(x=x, y=y, detail="model:N")
    layers: list[alt.Chart] = [
        base.mark_line(stroke="var(--muted)", strokeWidth=2),
        base.mark_point(filled=True, shape="circle", size=60, opacity=1, color="var(--muted)"),
        base.mark_text(dy=-12, fill="var(--ink)").encode(text="demonstrations:N"),
    ]
    spoken = "; ".join(
        f"{row['demonstrations']} demonstrations {say(row[key])}" + (" for " + row["model"] if len({r["model"] for r in rows}) > 1 else "")
        for row in rows
    )
    if student is not None and level is not None:
        flat = [{"tokens": 0.0, "value": factor * level}, {"tokens": right, "value": factor * level}]
        layers.append(alt.Chart(data(flat)).mark_line(stroke="var(--student)", strokeWidth=2, strokeDash=[6, 3]).encode(x=x, y=y))
        label = alt.Chart(data([{"tokens": right, "value": factor * level, "name": student}]))
        layers.append(label.mark_text(align="right", dy=12, fill="var(--student)").encode(x=x, y=y, text="name:N"))
        spoken += f"; student {student}, level: {say(level)}"
    return svg(alt.layer(*layers).properties(width=WIDTH, height=180), f"{unit} against prompt tokens: {spoken}")


def _share(value: float, low: float, high: float, *, log: bool = False) -> float:
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if log else (value - low) / (high - low)


def _inside(box: Box, width: float, height: float) -> bool:
    return box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def accuracy_per_cost(document: Json) -> str | None:
    """One sentence on which methods stand on the frontier out of domain (or in domain, where there is nothing else); None without costs."""
    domain = "out" if sets_of(document, "out") else "in"
    rows = [
        {"method": name, "latency": float(method["cost"]["latency_ms"]), "accuracy": method["means"][domain]["accuracy"]}
        for name, method in document["methods"].items()
        if (method["cost"] or {}).get("latency_ms")
    ]
    if len(rows) < 2:
        return None
    told = [f"`{row['method']}` ({percent(row['accuracy'])} % at {row['latency']:,.0f} ms)" for row in frontier(rows)]
    where = {"in": "In domain", "out": "Out of domain"}[domain]
    return f"{where}, nothing measured here is both faster and more often right than {' or '.join(told)}."
