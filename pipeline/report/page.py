"""The page: tables, charts and sentences put into one HTML file that needs nothing else, opened from disk or sent by mail.

No script, no font, no picture from outside; the content security policy in its head forbids them, so that a slip shows. Everything that
comes from data or params is escaped by jinja2; the charts are the only markup that is passed through, and are built from escaped parts.
"""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.hashing import sha256_json
from pipeline.params import Params
from pipeline.report import charts, origins, results
from pipeline.report.cells import DOMAIN_TITLE
from pipeline.report.collect import Inputs, Json
from pipeline.report.describe import context_sizes, listed, plural, root_model, scaled
from pipeline.report.document import sets_of
from pipeline.report.findings import findings

PACKAGES = (
    "shotless", "torch", "transformers", "tokenizers", "safetensors", "pyarrow", "polars", "numpy", "scipy", "scikit-learn", "dvc",
    "altair", "vl-convert-python",
)  # fmt: skip
HASH_DIGITS = 16
MAX_CURVES = 12
LONGEST_VALUE, MOST_VALUES = 120, 24
"""Of what a file records about itself: the page shows a digest, the file has it all."""


def render_page(document: Json, inputs: Inputs) -> str:
    """The report as HTML, from `metrics_document`'s numbers and the other inputs."""
    environment = make_environment(autoescape=True)
    context_charts = {
        name: charts.context_chart(document, name)
        for name, method in document["methods"].items()
        if any("contexts" in entry for entry in method["sets"].values())
    }
    curves = list(inputs.curves.items())[:MAX_CURVES]
    return environment.get_template("page.html.jinja").render(
        title=_title(inputs),
        lead=_lead(inputs),
        figures=results.key_figures(document, inputs),
        findings=findings(document),
        headline=results.headline(document, inputs),
        comparisons=results.comparisons(document),
        accuracy_charts=charts.accuracy_charts(document),
        domains={name: DOMAIN_TITLE[entry["domain"]].lower() for name, entry in document["sets"].items()},
        spread=results.spread(document),
        context_charts=context_charts,
        shift=origins.shift(inputs),
        targets=origins.target_sets(inputs),
        caches=origins.caches(inputs),
        calibration=results.calibration(document),
        cost=results.cost(document, inputs),
        unmeasured=[name for name, method in document["methods"].items() if method["cost"] is None],
        students=origins.students(inputs) if inputs.params.students else None,
        curves={name: charts.curve_chart(curve, name, len(curves)) for name, curve in curves},
        curves_left_out=len(inputs.curves) - len(curves),
        curves_missing=[name for name in inputs.params.students if name not in inputs.curves],
        roles=origins.roles(document, inputs),
        sources=origins.sources(inputs),
        leaks=(inputs.prepare or {}).get("leaks_left"),
        context_tokens=_context_tokens(inputs),
        reference=document["reference"],
        bootstrap=inputs.params.evaluation.bootstrap,
        template=inputs.params.task.template,
        verbalisers=dict(inputs.params.task.verbalisers),
        identity=_identity(inputs),
        has_out=bool(sets_of(document, "out")),
    )


def make_environment(*, autoescape: bool) -> Environment:
    """jinja2 with this project's templates; an undefined name is an error. `code` sets names in backticks as code."""
    environment = Environment(
        loader=PackageLoader("pipeline.report", "templates"),
        autoescape=autoescape,  # noqa: S701 - the page escapes; a card is Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    return environment


def flatten(value: Any, path: str = "") -> Any:
    """(path, text) for each scalar in a JSON value, paths joined by " · "; lists of scalars stay in one line."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from flatten(entry, f"{path} · {key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        for i, entry in enumerate(value):
            yield from flatten(entry, f"{path} · {i}")
    elif isinstance(value, list):
        yield path, ", ".join(map(str, value))
    elif isinstance(value, bool) or value is None:
        yield path, {True: "yes", False: "no", None: "–"}[value]
    else:
        yield path, f"{value:,}" if isinstance(value, int) else str(value)


def params_digest(params: Params) -> str:
    """sha256 of all params that have a meaning for the results."""
    return sha256_json(params.model_dump(mode="json", exclude={"runtime"}))


def _code(text: str) -> Markup:
    """Escaped text whose `names` are code elements and whose numbers keep their sign of percent and their ranges in one line."""
    whole = re.sub(r"(?<=\d)–(?=[\d−])", "\u2060–\u2060", text.replace(" %", "\u00a0%"))
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(whole))))  # noqa: S704 - escaped above


def _title(inputs: Inputs) -> str:
    models = list(dict.fromkeys(root_model(inputs.params, teacher.model) for teacher in inputs.params.teachers.values()))
    return f"{' + '.join(models)}: from prompt to {plural(len(inputs.params.students), 'student')}"


def _lead(inputs: Inputs) -> list[str]:
    """What was distilled into what, from how much."""
    params = inputs.params
    target = params.baselines[params.evaluation.reference].target_set
    contexts, demonstrations = context_sizes(params, target)
    teachers = listed(list(params.targets[target].teachers))
    models = listed(list(dict.fromkeys(params.teachers[name].model for name in params.targets[target].teachers)))
    rows = inputs.targets.get(target, {}).get("rows")
    text = f"The teacher is {models}, prompted as {teachers}: {plural(contexts, 'context')} with up to {demonstrations} demonstrations."
    if rows is not None:
        text += f" Its answers to {rows:,} unlabelled examples are what the students can learn from."
    lines = [text]
    for name, student in params.students.items():
        found = inputs.training.get(name, {})
        size = f" ({scaled(found['parameters'])} parameters)" if found.get("parameters") is not None else ""
        kept = f"layers {student.layers} of " if student.layers else ""
        if student.learn_from.startswith("data/"):
            source = "the demonstrations’ labels alone"
        else:
            source = f"the targets `{student.learn_from.removeprefix('targets/')}`"
            source += f" and, with weight {student.ce_weight:g}, the demonstrations’ labels" if student.ce_weight else ""
        lines.append(f"`{name}` is {kept}`{student.base}`{size} and learns from {source}.")
    return lines


def _context_tokens(inputs: Inputs) -> list[str]:
    """A sentence for each list of contexts on how many tokens its contexts have."""
    lines = []
    for name, entry in (inputs.prepare or {}).get("contexts", {}).items():
        counts = list(entry.get("tokens", {}).values())
        if counts:
            size = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
            lines.append(f"`{name}`: {plural(len(counts), 'context')} of {size} tokens")
    return lines


def _identity(inputs: Inputs) -> list[tuple[str, list[tuple[str, str]]]]:
    """Digests, fingerprints and versions: (heading, [(name, value)])."""
    found: list[tuple[str, list[tuple[str, str]]]] = [("Params", [("sha256", params_digest(inputs.params))])]
    found += [(f"Model {name}", _scalars(source)) for name, source in inputs.sources.items()]
    for name, manifest in inputs.manifests.items():
        found.append((f"Scores of {name}", _scalars(manifest.get("fingerprint", {})) + _scalars(manifest.get("totals", {}))))
    found += [(f"Student {name}", _scalars(entry)) for name, entry in inputs.provenance.items()]
    versions = [("python", platform.python_version())]
    for package in PACKAGES:
        try:
            versions.append((package, version(package)))
        except PackageNotFoundError:  # the project itself, run from a folder without being installed
            versions.append((package, "not installed as a package"))
    return [*((title, rows) for title, rows in found if rows), ("Versions", versions)]


def _scalars(value: Json) -> list[tuple[str, str]]:
    """The flattened entries that are short enough to read; hashes are cut."""
    rows = []
    for path, text in flatten(value):
        short = text[:HASH_DIGITS] + "…" if re.fullmatch(r"[0-9a-f]{40,}", text) else text
        if len(short) <= LONGEST_VALUE:
            rows.append((path, short))
    return rows[:MOST_VALUES]
