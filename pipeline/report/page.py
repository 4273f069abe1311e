"""The stage `report`: one HTML page that needs nothing else, the same numbers as JSON, and a card for each student.

The page has no script, font or picture from outside; the content security policy in its head forbids them. jinja2 escapes everything that
comes from data or params. Charts are the only markup passed through, and they are built from escaped parts. A section is an entry of
`SECTIONS` and `templates/sections/ANCHOR.html.jinja`, which calls `tables`, `charts`, `prose` and the functions below.
"""

import platform
import re
from importlib.metadata import version
from pathlib import Path

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.evaluation.free_text import values_of
from pipeline.evaluation.metrics import RIGHT
from pipeline.files import Folders, sha256_json, sha256_text, write_json, write_text
from pipeline.params import Params, yaml_text
from pipeline.params.reading import VERSIONS
from pipeline.report import charts, prose, tables
from pipeline.report.card import render_card
from pipeline.report.collect import DOMAINS, Collected, Json, collect, domains_of, ranked
from pipeline.report.prose import percent

SAMPLES, FLIPS = 12, 3
# Anchors; capitalised, they are the headings.
SECTIONS = ("findings", "results", "cost", "confidence", "mistakes", "risks", "contexts", "training", "data", "reproduce")
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
    for function in (code, prose.milliseconds, prose.number, prose.p_value, prose.percent, prose.scaled, prose.span):
        environment.filters[function.__name__] = function
    for function in (domains_of, ranked, disagreements, flipped, samples, identity, yaml_text):
        environment.globals[function.__name__] = function
    environment.globals |= {"DOMAINS": DOMAINS, "cell": tables.Cell, "charts": charts, "prose": prose, "tables": tables}
    return environment


def identity(found: Collected) -> Json:
    """What a run is known by: hashes of its params and of the students' files, versions of the libraries."""
    shown: Json = {"Params": {"sha256": sha256_json(found.params.model_dump(mode="json", exclude={"runtime", "monitor"}))}}
    for name in found.params.students:
        files = found.files[f"artifacts/students/{name}/manifest.json"]["files"]
        shown[f"Student {name}"] = {file: entry["sha256"] for file, entry in files.items()}
    libraries = {name: version(name) for group in VERSIONS.values() for name in group}
    return shown | {"Versions": {"python": platform.python_version()} | libraries}


# Texts with what was said of them, for the macro `articles`: `where`, `texts` and `pairs`.


def disagreements(found: Collected, student: str) -> list[Json]:
    """Of each evaluation set, the most confident disagreement in which the student is right and the one in which it is wrong."""
    reference, sets = found.document["reference"], list(found.texts)
    ours, theirs = (found.predictions[name].with_columns(p=pl.col("probabilities").list.max()) for name in (student, reference))
    rows = ours.join(theirs, on=["set", "example_id"], suffix="_reference").filter(pl.col("predicted") != pl.col("predicted_reference"))
    rows = rows.with_columns(sure=pl.col("p") * pl.col("p_reference"), right=RIGHT).sort("sure", "example_id", descending=[True, False])
    chosen, shown = rows.unique(["set", "right"], keep="first", maintain_order=True).to_dicts(), list[Json]()
    for row in sorted(chosen, key=lambda row: (sets.index(row["set"]), not row["right"])):
        pairs = {"gold": row["label"], student: f"{row['predicted']}, {percent(row['p'], 0)} %"}
        pairs[reference] = f"{row['predicted_reference']}, {percent(row['p_reference'], 0)} %"
        heading = f"{row['set']} · student {'right' if row['right'] else 'wrong'}"
        shown.append({"where": heading, "texts": [found.texts[row["set"]][row["example_id"]]], "pairs": pairs})
    return shown


def flipped(found: Collected, student: str) -> list[Json]:
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
        for entry in found.of("risk", student)["swaps"]
        for one in entry["examples"]
        if one["answer_before"] != one["answer_after"]
    ][:FLIPS]


def samples(found: Collected) -> list[Json]:
    """Examples drawn by their hash, evenly over the sets, with each method's answer in its first run."""
    form = found.params.task.completion and found.params.task.completion.form
    rows = {name: {(row["set"], row["example_id"]): row for row in frame.reverse().to_dicts()} for name, frame in found.predictions.items()}
    shown = []
    for where, texts in found.texts.items():
        for example in sorted(texts, key=lambda example: sha256_text("sample\0" + example))[: max(1, SAMPLES // len(found.texts))]:
            said = {name: own[where, example]["answer"].strip() for name, own in rows.items()}
            ill = {name for name, answer in said.items() if form is not None and values_of(answer, form) is None}
            gold = rows[found.document["reference"]][where, example]["label"]
            pairs = {name: f"(ill-formed) {answer}" if name in ill else answer for name, answer in said.items()}
            shown.append({"where": where if gold is None else f"{where} · gold {gold}", "texts": [texts[example]], "pairs": pairs})
    return shown
