"""The stage `report`: one HTML page that needs nothing else, the same numbers as JSON, and a card for each student.

The page has no script, font or picture from outside; the content security policy in its head forbids them. jinja2 escapes everything that
comes from data or params. Charts are the only markup passed through, and they are built from escaped parts.

A section is an entry of `SECTIONS` and `templates/sections/ANCHOR.html.jinja`, which calls `tables`, `charts`, `prose` and the functions
below for what it shows.
"""

import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.evaluation.free_text import values_of
from pipeline.files import Folders, sha256_json, sha256_text, write_json, write_text
from pipeline.params import Params, yaml_text
from pipeline.params.reading import VERSIONS
from pipeline.report import charts, prose, tables
from pipeline.report.card import render_card
from pipeline.report.collect import DOMAINS, Collected, Json, collect, domains_of, ranked
from pipeline.report.prose import percent

SAMPLES, FLIPS = 12, 3
SECTIONS = ("findings", "results", "cost", "confidence", "mistakes", "risks", "contexts", "training", "data", "reproduce")
"""Anchors; capitalised, they are the headings."""
ANSWER_SECTIONS = ("answers", *SECTIONS[-3:])


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
    environment, sections = _environment(escaping=True), {}
    for anchor in ANSWER_SECTIONS if "answers" in found.document else SECTIONS:
        if found.params.students or anchor not in {"risks", "training"}:
            template = environment.get_template(f"sections/{anchor}.html.jinja")
            body = template.render(found=found, document=found.document, reference=found.document["reference"])
            sections[anchor] = Markup(body)  # noqa: S704  a template's output
    return environment.get_template("page.html.jinja").render(found=found, sections=sections)


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
    filters = (code, prose.number, prose.p_value, prose.percent, prose.scaled, prose.span)
    environment.filters |= {function.__name__: function for function in filters}
    functions = (domains_of, ranked, disagreements, risks_of_best, flipped, samples, identity, yaml_text)
    environment.globals |= {function.__name__: function for function in functions}
    environment.globals |= {"DOMAINS": DOMAINS, "cell": tables.Cell, "charts": charts, "prose": prose, "tables": tables}
    return environment


def identity(found: Collected) -> Json:
    """What a run is known by: hashes of its params and of the students' files, versions of the libraries."""
    params = found.params
    shown: Json = {"Params": {"sha256": sha256_json(params.model_dump(mode="json", exclude={"runtime", "monitor"}))}}
    for name in params.students:
        if manifest := found.files.get(f"artifacts/students/{name}/manifest.json"):
            shown[f"Student {name}"] = {file: entry["sha256"] for file, entry in manifest["files"].items()}
    libraries = {name: version(name) for group in VERSIONS.values() for name in group}
    return shown | {"Versions": {"python": platform.python_version()} | libraries}


# Texts with what was said of them, for the macro `articles`: `where`, `texts` and `pairs`.


def disagreements(found: Collected, student: str) -> list[Json]:
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
            "texts": [found.texts[where].get(row["example_id"], "")],
            "pairs": {
                "gold": row["label"],
                student: _answer(row["predicted"], row["p"]),
                reference: _answer(row["predicted_reference"], row["p_reference"]),
            },
        }
        for where in found.texts
        for right in (True, False)
        if (row := chosen.get((where, right))) is not None
    ]


def risks_of_best(found: Collected) -> dict[str, Json]:
    """The best students, and what was found of their risks."""
    return {name: found.of("risk", name) for name in ranked(found.document, "student")[: tables.COMPARED]}


def flipped(risk: Json) -> list[Json]:
    """Texts whose answer changed with a swap, before and after."""
    return [
        {
            "where": entry["name"].replace("_", " "),
            "texts": [" / ".join(one["before"].values()), " / ".join(one["after"].values())],
            "pairs": {
                "answer": f"{one['answer_before']} → {one['answer_after']} (gold {one['label']})",
                "probability of the first answer": f"{percent(one['p_before'], 0)} → {percent(one['p_after'], 0)} %",
            },
        }
        for entry in risk["swaps"]
        for one in entry["examples"]
        if one["answer_before"] != one["answer_after"]
    ][:FLIPS]


def samples(found: Collected) -> list[Json]:
    """Examples drawn by their hash, evenly over the sets that have texts, with each method's answer in its first run."""
    form = found.params.task.completion and found.params.task.completion.form
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for method, frame in found.predictions.items():
        for row in frame.unique(["set", "example_id"], keep="first", maintain_order=True).iter_rows(named=True):
            ill = "(ill-formed) " if form is not None and values_of(row["answer"].strip(), form) is None else ""
            said = answers.setdefault((row["set"], row["example_id"]), {"gold": row["label"], "pairs": {}})
            said["pairs"][method] = ill + row["answer"].strip()
    shown = []
    for where, texts in found.texts.items():
        drawn = sorted(texts, key=lambda example: sha256_text("sample\0" + example))
        for example in drawn[: max(1, SAMPLES // len(found.texts))]:
            gold, pairs = answers[where, example].values()
            heading = where if gold is None else f"{where} · gold {gold}"
            shown.append({"where": heading, "texts": [texts[example]], "pairs": pairs})
    return shown


def _answer(label: str, probability: float) -> str:
    return f"{label}, {percent(probability, 0)} %"
