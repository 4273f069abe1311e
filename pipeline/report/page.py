"""The stage `report`: one HTML page that needs nothing else, the same numbers as JSON, and a card for each student.

The page has no script, font or picture from outside; the content security policy in its head forbids them. jinja2 escapes everything that
comes from data or params. Charts are the only markup passed through, and they are built from escaped parts.

A section is an entry of `SECTIONS` (anchor, name in the navigation, heading, a function that gives what its template needs beyond `found`,
or None if the section does not apply) and `templates/sections/ANCHOR.html.jinja`.
"""

import platform
import re
from collections.abc import Callable
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from ruamel.yaml import YAML

from pipeline.evaluation.free_text import values_of
from pipeline.files import Folders, sha256_json, sha256_text, write_json, write_text
from pipeline.params import FormParams, Params
from pipeline.params.reading import VERSIONS
from pipeline.report import charts, prose, tables
from pipeline.report.card import render_card
from pipeline.report.collect import DOMAINS, Collected, Json, collect, domains_of, licence_of, ranked_students, stage_of
from pipeline.report.prose import percent

STUDENTS_COMPARED = 3
"""Students shown side by side in slices and risk checks: the best ones."""
SAMPLES, LONGEST_TEXT, FLIPS, ATTRIBUTIONS, STRONGEST_WORDS = 12, 320, 3, 4, 4
"""Texts shown on the page, and their longest length."""
FILTERS = (prose.compact, prose.number, prose.p_value, prose.percent, prose.scaled, prose.span)


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
    environment = _environment(escaping=True)
    common = {"found": found, "document": found.document, "reference": found.document["reference"]}
    sections = []
    for anchor, nav, heading, values in ANSWER_SECTIONS if "answers" in found.document else SECTIONS:
        if (given := values(found)) is not None:
            template = environment.get_template(f"sections/{anchor}.html.jinja")
            body = template.render(**common, missing=lambda *prefixes: prose.missing_files(found, *prefixes), **given)
            sections.append({"anchor": anchor, "nav": nav, "heading": heading, "body": Markup(body)})  # noqa: S704  a template's output
    texts = {"title": prose.title(found.params), "lead": prose.lead(found), "figures": prose.key_figures(found)}
    return environment.get_template("page.html.jinja").render(**texts, sections=sections)


def _environment(*, escaping: bool) -> Environment:
    """jinja2 with this package's templates; an undefined name is an error. The filter `code` sets names in backticks as code."""

    def code(text: str) -> Markup:
        whole = re.sub(r"(?<=\d)–(?=[\d−])", "\u2060–\u2060", str(escape(text)).replace(" %", "\u00a0%"))  # no line break inside
        return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", whole))  # noqa: S704  escaped above

    environment = Environment(
        loader=PackageLoader("pipeline.report"),
        autoescape=escaping,  # noqa: S701  the page escapes; a card is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code} | {function.__name__: function for function in FILTERS}
    functions = (licence_of, prose.calibrated, prose.layers, prose.learnt)
    environment.globals |= {"cell": tables.Cell} | {function.__name__: function for function in functions}
    return environment


def _results(found: Collected) -> Json:
    drawn = {
        f"{where}, {DOMAINS[own['domain']].lower()}": charts.accuracy(found.document, where)
        for where, own in found.document["sets"].items()
    }
    return {"headline": tables.headline(found), "charts": drawn, "comparisons": tables.comparisons(found.document)}


def _cost(found: Collected) -> Json:
    tradeoff = {DOMAINS[domain]: charts.tradeoff(found.document, domain) for domain in domains_of(found.document)}
    break_even = found.of("runtime", "break-even").get("students", {})
    return {
        "tradeoff": {heading: chart for heading, chart in tradeoff.items() if chart},
        "measured_on": prose.measured_on(found),
        "stale": " ".join(stage_of(found.params, name) for name in sorted(found.stale_cost)),
        "break_even": [_break_even(name, entry) for name, entry in break_even.items()],
        "lacking": list(dict.fromkeys(line for entry in break_even.values() for line in entry["missing"])),
    }


def _break_even(name: str, entry: Json) -> Json:
    """A student's seconds, and after how many predictions they are saved, as (text, note)."""
    parts = [seconds for key in ("capture_seconds", "tuning_seconds", "base_training_seconds") for seconds in entry.get(key, {}).values()]
    row: Json = {"name": name, "makers": None if None in parts else sum(parts), "training": entry["training_seconds"]}
    for key in ("one_by_one", "batched"):
        count, saved = entry[key]["predictions"], entry[key]["saved_seconds"] or 0.0
        row[key] = ("never" if saved < 0 else prose.DASH, "") if count is None else (f"{count:,}", f"saves {1000 * saved:,.0f} ms each")
    return row


def _confidence(found: Collected) -> Json:
    shown = [*ranked_students(found.document)[:STUDENTS_COMPARED], found.document["reference"]]
    drawn = {name: charts.reliability(found, name) for name in shown if found.of("detail", name)}
    return {"charts": drawn, "calibration": tables.calibration(found), "has_both": len(domains_of(found.document)) > 1}


def _mistakes(found: Collected) -> Json:
    students, reference = ranked_students(found.document), found.document["reference"]
    return {
        "confusion": tables.confusion(found, [*students[:1], reference]),
        "slices": tables.slices(found, [*students[:STUDENTS_COMPARED], reference]),
        "student": next(iter(students), None),
        "examples": _disagreements(found, students[0]) if students else [],
    }


def _risks(found: Collected) -> Json | None:
    shown = [name for name in ranked_students(found.document) if found.of("risk", name)][:STUDENTS_COMPARED]
    flipped = {name: _flipped(found.of("risk", name)) for name in shown}
    given = {"shown": shown, "flipped": flipped, "attributions": _attributions(found.of("risk", shown[0])) if shown else []}
    return given if found.params.students else None


def _contexts(found: Collected) -> Json:
    document = found.document
    several = [name for name, method in document["methods"].items() if any("contexts" in entry for entry in method["sets"].values())]
    counted = found.files.get("metrics/prepare.json", {}).get("contexts", {})
    tokens = {name: list(entry["tokens"].values()) for name, entry in counted.items() if entry["tokens"]}
    return {
        "charts": {name: charts.spread(document, name) for name in several},
        "tokens": [f"`{name}`: {prose.plural(len(own), 'context')} of {min(own):,} to {max(own):,} tokens" for name, own in tokens.items()],
        "fidelity": {name: entry for name in found.params.teachers if (entry := found.of("fidelity", name))},
    }


def _training(found: Collected) -> Json | None:
    drawn = {name: charts.curve(curve, name, len(found.curves)) for name, curve in found.curves.items()}
    return {"curves": drawn} if found.params.students else None


def _reproduce(found: Collected) -> Json:
    """Params, what was downloaded, digests of the students, versions of the libraries."""
    params, text, idle = found.params, StringIO(), {"runtime", "monitor"}
    yaml = YAML(typ="safe", pure=True)
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.default_flow_style, yaml.width = False, 120
    yaml.dump(params.model_dump(mode="json", exclude_defaults=True, exclude=idle), text)
    identity: Json = {"Params": {"sha256": sha256_json(params.model_dump(mode="json", exclude=idle))}}
    identity |= {f"Download {name}": entry.model_dump(exclude_defaults=True) for name, entry in params.downloads.items()}
    for name in params.students:
        if (manifest := found.files.get(f"artifacts/students/{name}/manifest.json")) is not None:
            identity[f"Student {name}"] = {file: entry["sha256"] for file, entry in manifest["files"].items()}
    versions = {"python": platform.python_version()} | {name: version(name) for group in VERSIONS.values() for name in group}
    return {"identity": identity | {"Versions": versions}, "text": text.getvalue()}


def _answers(found: Collected) -> Json:
    form = found.params.task.completion and found.params.task.completion.form
    compared = tables.comparisons(found.document)
    return {"table": tables.answers(found.document), "comparisons": compared, "samples": _samples(found, form), "form": form}


SECTIONS: list[tuple[str, str, str, Callable[[Collected], Json | None]]] = [
    ("shows", "What it shows", "What this run shows", lambda found: {"findings": prose.findings(found.document)}),
    ("results", "Results", "Results", _results),
    ("cost", "Cost", "Cost", _cost),
    ("calibration", "Confidence", "Confidence", _confidence),
    ("mistakes", "Mistakes", "Mistakes", _mistakes),
    ("risks", "Risks", "Risk checks", _risks),
    ("contexts", "Contexts", "Contexts and targets", _contexts),
    ("training", "Training", "Training", _training),
    ("data", "Data", "Data", lambda _: {}),
    ("reproduce", "Reproduce", "Reproduce", _reproduce),
]
ANSWER_SECTIONS = [("answers", "Results", "Results", _answers), *SECTIONS[-3:]]


def _disagreements(found: Collected, student: str) -> list[Json]:
    """Of each evaluation set, the most confident disagreement in which the student is right and the one in which it is wrong."""
    reference, keys = found.document["reference"], ["set", "example_id"]
    ours, theirs = (found.predictions[name].with_columns(p=pl.col("probabilities").list.max()) for name in (student, reference))
    rows = ours.join(theirs, on=keys, suffix="_reference").filter(pl.col("predicted") != pl.col("predicted_reference"))
    rows = rows.with_columns(sure=pl.col("p") * pl.col("p_reference"), right=pl.col("predicted") == pl.col("label"))
    rows = rows.sort(["sure", "example_id"], descending=[True, False]).unique(["set", "right"], keep="first", maintain_order=True)
    chosen = {(row["set"], row["right"]): row for row in rows.iter_rows(named=True)}
    return [
        {
            "where": f"{where} · student {'right' if right else 'wrong'}",
            "texts": [_shortened(found.texts[where].get(row["example_id"], ""))],
            "pairs": {
                "gold": row["label"],
                student: f"{row['predicted']}, {percent(row['p'], 0)} %",
                reference: f"{row['predicted_reference']}, {percent(row['p_reference'], 0)} %",
            },
        }
        for where in found.texts
        for right in (True, False)
        if (row := chosen.get((where, right))) is not None
    ]


def _flipped(risk: Json) -> list[Json]:
    """Texts whose answer changed with a swap, before and after."""
    examples = [(entry["name"].replace("_", " "), one) for entry in risk["swaps"] for one in entry["examples"]]
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
    for entry in risk["attributions"][:ATTRIBUTIONS]:
        strongest, texts = sorted(entry["words"], key=lambda word: -abs(word["weight"]))[:STRONGEST_WORDS], []
        for field, text in entry["fields"].items():
            pieces, at = list[tuple[str, str]](), 0
            for word in sorted((word for word in entry["words"] if word["field"] == field), key=lambda word: word["start"]):
                if abs(word["weight"]) >= abs(strongest[0]["weight"]) / 2 > 0:
                    side = "for" if word["weight"] > 0 else "against"
                    pieces += [(text[at : word["start"]], ""), (text[word["start"] : word["end"]], side)]
                    at = word["end"]
            texts.append([*pieces, (text[at:], "")])
        pairs = {
            "gold": entry["label"],
            risk["student"]: f"{entry['student']}, {percent(entry['student_p'], 0)} %",
            risk["reference"]: f"{entry['reference']}, {percent(entry['reference_p'], 0)} %",
            "strongest words": ", ".join(f"“{word['word']}” {word['weight']:+.2f}".replace("-", "−") for word in strongest),
        }
        shown.append({"where": entry["set"], "texts": texts, "pairs": pairs})
    return shown


def _samples(found: Collected, form: FormParams | None) -> list[Json]:
    """Examples drawn by their hash, evenly over the sets that have texts, with each method's answer in its first run."""

    def said(row: dict[str, Any]) -> str:
        answer = row["answer"].strip()
        return _shortened(answer) + (" (ill-formed)" if form is not None and values_of(answer, form) is None else "")

    first = {method: frame.unique(["set", "example_id"], keep="first", maintain_order=True) for method, frame in found.predictions.items()}
    answers = {(method, row["set"], row["example_id"]): row for method, frame in first.items() for row in frame.iter_rows(named=True)}
    shown = []
    for where, texts in found.texts.items():
        drawn = sorted(texts, key=lambda example: sha256_text("sample\0" + example))
        for example in drawn[: max(1, SAMPLES // len(found.texts))]:
            rows = {method: answers[method, where, example] for method in first if (method, where, example) in answers}
            gold = next((f" · gold {row['label']}" for row in rows.values() if row["label"] is not None), "")
            pairs = {method: said(row) for method, row in rows.items()}
            shown.append({"where": where + gold, "texts": [_shortened(texts[example])], "pairs": pairs})
    return shown


def _shortened(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1].rstrip() + "…"
