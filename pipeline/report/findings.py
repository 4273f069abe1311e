"""What a run shows, in plain sentences computed from its numbers.

No conclusion is written down beforehand: each sentence is chosen by the sign of a difference and by whether its paired interval leaves
out zero. A sentence whose numbers are missing is left out. Names stand in backticks; page and model card set them as code.
"""

from pipeline.report.collect import Json
from pipeline.report.document import best, comparison_of, sets_of
from pipeline.report.formatting import listed, percent, points, scaled, span

ONE_LABEL_SHARE = 0.9
MAX_RIVALS = 3
DOMAIN = {"in": "in domain", "out": "out of domain"}


def findings(document: Json) -> list[str]:
    """Sentences for "What this run shows", the most important first."""
    domains = [domain for domain in ("out", "in") if sets_of(document, domain)]
    lines: list[str] = []
    if all(method["kind"] != "student" for method in document["methods"].values()):
        lines.append("This run has no student: it shows prompting alone.")
    for domain in domains:
        lines += _best_student(document, domain)
    if domains:
        lines += _rivals(document, domains[0])
    lines += _contexts(document) + _one_label(document) + _calibration(document) + _cost(document)
    return lines


def verdict(comparison: Json) -> str:
    """`clear` when the interval leaves out zero; else what that means for a reader."""
    low, high = comparison["ci95"]
    interval = f"95 % interval of the difference {points(low)} to {points(high)}"
    return interval if comparison["clear"] else f"{interval}: this run does not tell them apart"


def _sentence(document: Json, method: str, other: str, domain: str, subject: str) -> str | None:
    comparison = comparison_of(document, method, other, domain)
    if comparison is None:
        return None
    difference = comparison["difference"]
    if difference == 0:
        return f"{subject} is level with `{other}` ({verdict(comparison)})."
    side = "above" if difference > 0 else "below"
    return f"{subject} is {percent(abs(difference))} points {side} `{other}` ({verdict(comparison)})."


def _best_student(document: Json, domain: str) -> list[str]:
    names = best(document, domain, "student")
    if not names:
        return []
    top, reference = names[0], document["reference"]
    mean = document["methods"][top]["means"][domain]
    where = listed(sets_of(document, domain))
    text = f"{DOMAIN[domain].capitalize()} ({where}), the best student is {listed(names)} with {percent(mean['accuracy'])} % right"
    text += f" (95 % interval {span(mean['ci95'])}), no demonstrations in its prompt."
    against = _sentence(document, top, reference, domain, "It")
    return [f"{text} {against}" if against else text]


def _rivals(document: Json, domain: str) -> list[str]:
    """The best student against the other students and the best prompt, over the domain that matters most."""
    names = best(document, domain, "student")
    if not names:
        return []
    top, methods, lines = names[0], document["methods"], []
    others = [name for name, method in methods.items() if method["kind"] == "student" and name not in names]
    others.sort(key=lambda name: -methods[name]["means"][domain]["accuracy"])
    for other in others[:MAX_RIVALS]:
        lines.append(_sentence(document, top, other, domain, f"{DOMAIN[domain].capitalize()}, `{top}`"))
    for winner in best(document, domain):
        if methods[winner]["kind"] == "baseline" and winner != document["reference"]:
            subject = f"The best method of all {DOMAIN[domain]} is the prompt `{winner}`; `{top}`"
            lines.append(_sentence(document, top, winner, domain, subject))
    return [line for line in lines if line is not None]


def _contexts(document: Json) -> list[str]:
    """The widest range between contexts, or a student's seeds, of each method that was scored for each."""
    lines = []
    for name, method in document["methods"].items():
        ranges = {s: m["contexts"] for s, m in method["sets"].items() if "contexts" in m}
        if ranges:
            widest = max(ranges, key=lambda s: ranges[s]["best"] - ranges[s]["worst"])
            low, high = percent(ranges[widest]["worst"]), percent(ranges[widest]["best"])
            what = "seed" if method["kind"] == "student" else "choice of context"
            lines.append(f"The {what} alone moves `{name}` between {low} % and {high} % on `{widest}`.")
    return lines


def _one_label(document: Json) -> list[str]:
    """Methods that hardly tell labels apart on some set."""
    lines = []
    for name, method in document["methods"].items():
        shares = {(s, label): share for s, m in method["sets"].items() for label, share in m["predicted_shares"].items()}
        (where, label), share = max(shares.items(), key=lambda item: item[1])
        if share >= ONE_LABEL_SHARE:
            lines.append(f"`{name}` answers `{label}` to {percent(share)} % of `{where}`: there it hardly looks at the input.")
    return lines


def _calibration(document: Json) -> list[str]:
    domain = "out" if sets_of(document, "out") else "in"
    names, reference = best(document, domain, "student"), document["reference"]
    if not names:
        return []
    ours, theirs = (document["methods"][name]["means"][domain]["ece"] for name in (names[0], reference))
    return [
        f"{DOMAIN[domain].capitalize()}, the confidence of `{names[0]}` is off by {percent(ours)} points on average (expected "
        f"calibration error), that of `{reference}` by {percent(theirs)}."
    ]


def _cost(document: Json) -> list[str]:
    domain = "out" if sets_of(document, "out") else "in"
    names, reference = best(document, domain, "student"), document["reference"]
    if not names:
        return []
    ours, theirs = (document["methods"][name]["cost"] or {} for name in (names[0], reference))
    words = {
        "prompt_tokens": ("prompt tokens", lambda value: f"{value:,.0f}"),
        "latency_ms": ("ms an example", lambda value: f"{value:,.0f}"),
        "peak_rss_bytes": ("of memory at its peak", lambda value: scaled(value, "B")),
        "parameters": ("parameters", scaled),
    }
    parts = [
        f"{say(ours[key])} instead of {say(theirs[key])} {unit}" for key, (unit, say) in words.items() if key in ours and key in theirs
    ]
    return [f"`{names[0]}` against `{reference}`: {'; '.join(parts)}."] if parts else []
