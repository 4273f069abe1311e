"""The stage `report`: one HTML page that needs nothing else, the same numbers as JSON, and a card for each student.

The page has no script, font or picture from outside; the content security policy in its head forbids them. jinja2 escapes everything that
comes from data or params. Charts are the only markup passed through, and they are built from escaped parts.

A section is an entry of `SECTIONS` (anchor, name in the navigation, heading, a function that gives the values of its template, or None if
the section does not apply) and `templates/sections/ANCHOR.html.jinja`.
"""

import platform
import re
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from ruamel.yaml import YAML

from pipeline.evaluation.judging import values_of
from pipeline.files import Folders, sha256_json, sha256_text, write_json, write_text
from pipeline.params import Params
from pipeline.params.reading import VERSIONS
from pipeline.report import charts, tables
from pipeline.report.card import render_card
from pipeline.report.collect import (
    DOMAINS, Collected, Json, best, collect, comparison, domains_of, licence_of, main_domain, ranked_students, stage_of,
)  # fmt: skip
from pipeline.report.prose import (
    DASH, accuracy_for_time, findings, layers, lead, listed, measured_on, missing_files, percent, plural, points, scaled, span, title,
)  # fmt: skip

MAX_CURVES = 12
STUDENTS_COMPARED = 3
"""Students shown side by side in slices and risk checks: the best ones."""
SAMPLES, LONGEST_TEXT, FLIPS, ATTRIBUTIONS, STRONGEST_WORDS = 12, 320, 3, 4, 4
"""Texts shown on the page, and their longest length."""
Values = dict[str, Any]


def build_report(params: Params, folders: Folders, project: Path) -> None:
    """Write `report/index.html`, `report/metrics.json` and the card of each student (README.md in its folder) below `project`.

    The same inputs give the same bytes. Students that answer in free text have no card. Raises UsageError if predictions or their metrics
    are missing, CorruptError if a file cannot be read.
    """
    found = collect(params, folders)
    write_text(render_page(found), project / "report" / "index.html")
    write_json(found.document, project / "report" / "metrics.json")
    for name in params.students if params.task.completion is None else ():
        if (folder := folders.artifacts / "students" / name).is_dir():
            write_text(render_card(_environment(escaping=False), found, name), folder / "README.md")


def render_page(found: Collected) -> str:
    """The report as HTML. A section that does not apply is left out."""
    environment, free = _environment(escaping=True), found.document.get("answers", False)
    sections = []
    for anchor, nav, heading, values in ANSWER_SECTIONS if free else SECTIONS:
        if (given := values(found)) is not None:
            template = environment.get_template(f"sections/{anchor}.html.jinja")
            common = {"params": found.params, "document": found.document, "reference": found.document["reference"]}
            body = template.render(**common, missing=lambda *prefixes: missing_files(found, *prefixes), **given)
            sections.append({"anchor": anchor, "nav": nav, "heading": heading, "body": Markup(body)})  # noqa: S704  a template's output
    figures = _answer_figures(found) if free else _figures(found)
    return environment.get_template("page.html.jinja").render(title=title(found.params), lead=lead(found), figures=figures, sections=sections)


def _environment(*, escaping: bool) -> Environment:
    """jinja2 with this package's templates; an undefined name is an error. The filter `code` sets names in backticks as code."""

    def code(text: str) -> Markup:
        whole = re.sub(r"(?<=\d)–(?=[\d−])", "\u2060–\u2060", text.replace(" %", "\u00a0%"))  # no line break inside
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(whole))))  # noqa: S704  escaped above

    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=escaping,  # noqa: S701  the page escapes; a card is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code
    return environment


def _figures(found: Collected) -> list[tuple[str, str, str]]:
    """At most four of (figure, what it is, note) about the best student."""
    document, reference = found.document, found.document["reference"]
    domain = main_domain(document)
    names = best(document, domain, "student")
    if not names:
        return []
    top, teacher = document["methods"][names[0]], document["methods"][reference]
    ours, theirs = top["means"][domain], teacher["means"][domain]["accuracy"]
    row = comparison(document, names[0], reference, domain)
    unclear = "" if row is None or row["clear"] else "; not told apart"
    figures = [
        (f"{percent(ours['accuracy'])} %", f"right {DOMAINS[domain].lower()}", f"best student, `{names[0]}`; 95 % interval {span(ours['ci95'])}"),
        (points(ours["accuracy"] - theirs), f"points compared with {reference}", f"which has {percent(theirs)} %{unclear}"),
    ]
    for key, unit, what in (("prompt_tokens", "", "prompt tokens an example"), ("latency_ms", " ms", "an example, median")):
        both = [(method["cost"] or {}).get(key) for method in (top, teacher)]
        if None not in both:
            figures.append((f"{both[0]:,.0f}{unit}", what, f"instead of {both[1]:,.0f}{unit}"))
    if len(figures) < 4 and (count := found.training.get(names[0], {}).get("parameters")) is not None:
        figures.append((scaled(count), "parameters", layers(found, names[0])))
    return figures


def _answer_figures(found: Collected) -> list[tuple[str, str, str]]:
    """The share of well-formed answers of each student, beside the teacher's."""
    sets = {name: [own["well_formed"] for own in m["sets"].values() if "well_formed" in own] for name, m in found.document["methods"].items()}
    shares = {name: sum(values) / len(values) for name, values in sets.items() if values}
    reference = found.document["reference"]
    note = f"the teacher {percent(shares.get(reference))} %, means over sets"
    return [(f"{percent(shares[name])} %", "well formed", f"`{name}`; {note}") for name in found.params.students if name in shares][:4]


def _results(found: Collected) -> Values:
    return {
        "headline": tables.headline(found),
        "charts": {where: charts.accuracy(found.document, where) for where in found.document["sets"]},
        "domains": {where: DOMAINS[entry["domain"]].lower() for where, entry in found.document["sets"].items()},
        "comparisons": tables.comparisons(found.document),
    }


def _cost(found: Collected) -> Values:
    document = found.document
    top, domain = next(iter(ranked_students(document)), None), main_domain(document)
    measured, own = found.cost.get(document["reference"], {}).get("by_demonstrations") or [], found.cost.get(top or "", {})
    by_context = {
        heading: charts.cost_by_context(measured, key, unit, factor, top, own.get(key))
        for heading, key, unit, factor in (("Latency", "latency_ms", "ms an example", 1.0), ("Peak memory", "peak_rss_bytes", "GB", 1e-9))
    }
    lacking = [line for entry in (found.break_even.get("students") or {}).values() for line in entry.get("missing") or []]
    unbeaten = charts.frontier(document, domain)[1]
    drawn = {DOMAINS[own]: charts.tradeoff(document, own) for own in domains_of(document)}
    return {
        "tradeoff": {heading: chart for heading, chart in drawn.items() if chart},
        "frontier": accuracy_for_time(document, unbeaten, domain) if unbeaten else "",
        "cost": tables.cost(found),
        "measured_on": measured_on(found),
        "stale": " ".join(stage_of(found.params, name) for name in sorted(found.stale_cost)),
        "by_context": {heading: chart for heading, chart in by_context.items() if chart},
        "by_demonstrations": tables.by_demonstrations(found),
        "break_even": tables.break_even(found),
        "lacking": list(dict.fromkeys(lacking)),
        "student": top,
    }


def _confidence(found: Collected) -> Values:
    shown = [*ranked_students(found.document)[:STUDENTS_COMPARED], found.document["reference"]]
    drawn = {name: charts.reliability(found, name) for name in shown if name in found.detail}
    return {"charts": drawn, "calibration": tables.calibration(found), "has_both": len(domains_of(found.document)) > 1}


def _mistakes(found: Collected) -> Values:
    students, reference = ranked_students(found.document), found.document["reference"]
    return {
        "confusion": tables.confusion(found, [*students[:1], reference]),
        "slices": tables.slices(found, [*students[:STUDENTS_COMPARED], reference]),
        "student": next(iter(students), None),
        "voters": _voters(found),
        "examples": _disagreements(found, students[0]) if students else [],
    }


def _risks(found: Collected) -> Values | None:
    shown = [name for name in ranked_students(found.document) if name in found.risks][:STUDENTS_COMPARED]
    if not found.params.students:
        return None
    return {
        "student": next(iter(shown), None),
        "swaps": tables.swaps(found, shown),
        "flipped": {name: flips for name in shown if (flips := _flipped(found.risks[name]))},
        "gaps": tables.gaps(found, shown),
        "disagreement": tables.disagreement(found, shown[0]) if shown else None,
        "attributions": _attributions(found.risks[shown[0]]) if shown else [],
    }


def _contexts(found: Collected) -> Values:
    params, document = found.params, found.document
    several = [name for name, method in document["methods"].items() if any("contexts" in entry for entry in method["sets"].values())]
    target, labels = params.baselines[document["reference"]].target_set, params.task.labels
    tokens = {name: list(entry["tokens"].values()) for name, entry in found.prepare.get("contexts", {}).items() if entry.get("tokens")}
    return {
        "charts": {name: charts.spread(document, name) for name in several},
        "spread": tables.spread(document),
        "targets": tables.target_sets(found),
        "tokens": [f"`{name}`: {plural(len(own), 'context')} of {min(own):,} to {max(own):,} tokens" for name, own in tokens.items()],
        "shift": tables.calibration_shift(found),
        # With more than two labels, the share of one of them does not tell much.
        "shift_chart": charts.calibration_shift(found.targets.get(target, {}), labels[-1]) if len(labels) == 2 else None,
        "target": target,
        "caches": tables.caches(found),
    }


def _training(found: Collected) -> Values | None:
    if not found.params.students:
        return None
    shown = list(found.curves.items())[:MAX_CURVES]
    drawn = {name: charts.curve(curve, name, len(shown)) for name, curve in shown}
    return {"students": tables.students(found), "curves": drawn, "curves_left_out": len(found.curves) - len(shown)}


def _data(found: Collected) -> Values:
    given = {"roles": tables.roles(found), "sources": tables.sources(found), "quarantined": tables.quarantined(found)}
    models = {name: licence_of(found.params, model.path, model.licence) for name, model in found.params.models.items()}
    return {**given, "models": models, "leaks": found.prepare.get("leaks_left")}


def _reproduce(found: Collected) -> Values:
    """Params, what was downloaded, digests of the students, versions of the libraries."""
    params, text = found.params, StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.default_flow_style, yaml.width = False, 120
    yaml.dump(params.model_dump(mode="json", exclude_defaults=True, exclude={"runtime", "monitor"}), text)
    identity = {"Params": {"sha256": sha256_json(params.model_dump(mode="json", exclude={"runtime", "monitor"}))}}
    identity |= {f"Download {name}": {key: str(v) for key, v in entry.model_dump(exclude_defaults=True).items()} for name, entry in params.downloads.items()}
    for name, manifest in found.manifests.items():
        identity[f"Student {name}"] = {file: entry["sha256"] for file, entry in manifest.get("files", {}).items()}
    versions = {"python": platform.python_version()} | {name: version(name) for group in VERSIONS.values() for name in group}
    return {"identity": identity | {"Versions": versions}, "text": text.getvalue()}


def _answers(found: Collected) -> Values:
    completion = found.params.task.completion
    return {"table": tables.answers(found.document), "samples": _samples(found), "form": completion and completion.form}


Section = tuple[str, str, str, Callable[[Collected], Values | None]]
SECTIONS: list[Section] = [
    ("shows", "What it shows", "What this run shows", lambda found: {"findings": findings(found.document)}),
    ("results", "Results", "Results", _results),
    ("cost", "Cost", "Cost", _cost),
    ("calibration", "Confidence", "Confidence", _confidence),
    ("mistakes", "Mistakes", "Mistakes", _mistakes),
    ("risks", "Risks", "Risk checks", _risks),
    ("contexts", "Contexts", "Contexts and targets", _contexts),
    ("training", "Training", "Training", _training),
    ("data", "Data", "Data", _data),
    ("reproduce", "Reproduce", "Reproduce", _reproduce),
]
ANSWER_SECTIONS: list[Section] = [("answers", "Results", "Results", _answers), *SECTIONS[-3:]]


def _disagreements(found: Collected, student: str) -> list[Json]:
    """Of each evaluation set, the most confident disagreement in which the student is right and the one in which it is wrong."""
    reference, voters = found.document["reference"], _voters(found)
    votes: dict[tuple[str, str], Counter[str]] = {}
    for *key, answer in found.predictions[voters].select("set", "example_id", "predicted").iter_rows() if voters else ():
        votes.setdefault((key[0], key[1]), Counter())[answer] += 1
    sides = [found.predictions[name].with_columns(pl.col("probabilities").list.max().alias("p")) for name in (student, reference)]
    rows = sides[0].join(sides[1], on=["set", "example_id"], suffix="_reference").filter(pl.col("predicted") != pl.col("predicted_reference"))
    rows = rows.with_columns((pl.col("p") * pl.col("p_reference")).alias("sure")).sort(["sure", "example_id"], descending=[True, False])
    shown = []
    for where, texts in found.texts.items():
        for right in (True, False):
            own = rows.filter((pl.col("set") == where) & ((pl.col("predicted") == pl.col("label")) == right))
            for row in own.head(1).iter_rows(named=True):
                counted = sorted(votes.get((where, row["example_id"]), {}).items(), key=lambda item: (-item[1], item[0]))
                answers = {
                    "gold": row["label"],
                    student: f"{row['predicted']}, {percent(row['p'], 0)} %",
                    reference: f"{row['predicted_reference']}, {percent(row['p_reference'], 0)} %",
                    "contexts’ votes": ", ".join(f"{label} {count}" for label, count in counted),
                }
                text = _shortened(texts.get(row["example_id"], ""))
                where_right = f"{where} · student {'right' if right else 'wrong'}"
                shown.append({"where": where_right, "texts": [text], "pairs": {key: value for key, value in answers.items() if value}})
    return shown


def _voters(found: Collected) -> str | None:
    """The baseline whose contexts vote: preferably one of the reference's own teachers, and a calibrated one."""
    params = found.params
    teachers = set(params.targets[params.baselines[found.document["reference"]].target_set].teachers)
    targets = {name: params.targets[entry.target_set] for name, entry in params.baselines.items() if entry.contexts == "each"}
    return max(targets, key=lambda name: (set(targets[name].teachers) <= teachers, targets[name].calibration != "none"), default=None)


def _flipped(risk: Json) -> list[Json]:
    """Texts whose answer changed with a swap, before and after."""
    examples = [(entry["name"].replace("_", " "), one) for entry in risk.get("swaps", []) for one in entry.get("examples", [])]
    return [
        {
            "where": swap,
            "texts": [" / ".join(one["before"].values()), " / ".join(one["after"].values())],
            "pairs": {
                "answer": f"{one['answer_before']} → {one['answer_after']} (gold {one['label']})",
                "probability of the first answer": f"{percent(one['p_before'], 0)} → {percent(one['p_after'], 0)} %",
            },
        }
        for swap, one in examples
        if one["answer_before"] != one["answer_after"]
    ][:FLIPS]


def _attributions(risk: Json) -> list[Json]:
    """Sampled disagreements with their words: each field as pieces (text, "for" or "against" if the word weighs much, else "")."""
    shown = []
    for entry in risk.get("attributions", [])[:ATTRIBUTIONS]:
        bar = max((abs(word["weight"]) for word in entry["words"]), default=0.0) / 2
        texts = []
        for field, text in entry["fields"].items():
            pieces, at = [], 0
            for word in sorted((word for word in entry["words"] if word["field"] == field), key=lambda word: word["start"]):
                if abs(word["weight"]) >= bar > 0:
                    side = "for" if word["weight"] > 0 else "against"
                    pieces += [(text[at : word["start"]], ""), (text[word["start"] : word["end"]], side)]
                    at = word["end"]
            texts.append([piece for piece in [*pieces, (text[at:], "")] if piece[0]])
        strongest = sorted(entry["words"], key=lambda word: -abs(word["weight"]))[:STRONGEST_WORDS]
        pairs = {
            "gold": entry["label"],
            risk["student"]: f"{entry['student']}, {percent(entry['student_p'], 0)} %",
            risk["reference"]: f"{entry['reference']}, {percent(entry['reference_p'], 0)} %",
            "strongest words": ", ".join(f"“{word['word']}” {word['weight']:+.2f}".replace("-", "−") for word in strongest),
        }
        shown.append({"where": entry["set"], "texts": texts, "pairs": pairs})
    return shown


def _samples(found: Collected) -> list[Json]:
    """Examples drawn by their hash, evenly over the sets that have texts, with each method's answer in its first run."""
    form = found.params.task.completion.form if found.params.task.completion is not None else None
    first: dict[str, Json] = {}
    for method, frame in found.predictions.items():
        rows = frame.unique(["set", "example_id"], keep="first", maintain_order=True)
        first[method] = {(row["set"], row["example_id"]): row for row in rows.iter_rows(named=True)}
    shown = []
    for number, (where, texts) in enumerate(found.texts.items()):
        share = SAMPLES // len(found.texts) + (number < SAMPLES % len(found.texts))
        gold = {key[1]: row["label"] for own in first.values() for key, row in own.items() if key[0] == where and key[1] in texts}
        for example in sorted(gold, key=lambda example: sha256_text("sample\0" + example))[:share]:
            pairs = {}
            for method, own in first.items():
                answer = own[where, example]["answer"].strip() if (where, example) in own else None
                ill = answer is not None and form is not None and values_of(answer, form) is None
                pairs[method] = DASH if answer is None else _shortened(answer) + (" (ill-formed)" if ill else "")
            heading = where if gold[example] is None else f"{where} · gold {gold[example]}"
            shown.append({"where": heading, "texts": [_shortened(texts[example])], "pairs": pairs})
    return shown


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1].rstrip() + "…"
