"""The page's sections, in their order: each builder makes its tables and charts and returns its HTML, or None where it does not apply.

A section of its own for another kind of run is one more function in `SECTIONS` and one more template. What an optional file would have
shown is replaced by a sentence that says which command writes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from pipeline.report import charts, costs, origins, reliability, results, risks, slices, tradeoffs
from pipeline.report.cells import DOMAIN_TITLE
from pipeline.report.collect import Inputs, Json, stage_of
from pipeline.report.disagreements import attributions, disagreements, voters
from pipeline.report.document import ranked_students
from pipeline.report.findings import findings
from pipeline.report.identity import identity, params_text
from pipeline.report.formatting import listed, plural

MAX_CURVES = 12
STUDENTS_COMPARED = 3
"""Students shown side by side in slices and risk checks: the best out of domain."""


@dataclass(frozen=True)
class View:
    """What every builder is given."""

    document: Json
    inputs: Inputs
    environment: Environment


@dataclass(frozen=True)
class Section:
    """A part of the page; `anchor` is its address, `nav` its name in the list of sections."""

    anchor: str
    nav: str
    heading: str
    body: Markup


Builder = Callable[[View], Section | None]


def shows(view: View) -> Section:
    """The run in sentences."""
    return section(view, "shows", "What it shows", "What this run shows", findings=findings(view.document))


def accuracy(view: View) -> Section:
    """The headline table, a chart for each evaluation set, differences."""
    document, inputs = view.document, view.inputs
    return section(
        view,
        "results",
        "Results",
        "Results",
        headline=results.headline(document, inputs),
        comparisons=results.comparisons(document, inputs.compare),
        accuracy_charts=charts.accuracy_charts(document),
        domains={name: DOMAIN_TITLE[entry["domain"]].lower() for name, entry in document["sets"].items()},
        reference=document["reference"],
    )


def cost(view: View) -> Section:
    """Accuracy against cost, cost against the length of the context, break-even."""
    document, inputs = view.document, view.inputs
    reference, top = document["reference"], next(iter(ranked_students(document)), None)
    measured = inputs.cost.get(reference, {}).get("by_demonstrations") or []
    return section(
        view,
        "cost",
        "Cost",
        "Cost",
        tradeoff={DOMAIN_TITLE[domain]: chart for domain, chart in tradeoffs.tradeoff_charts(document).items()},
        frontier=tradeoffs.accuracy_per_cost(document),
        cost=costs.cost(document, inputs),
        unmeasured=[name for name, method in document["methods"].items() if method["cost"] is None],
        context_charts=tradeoffs.context_charts(measured, top, inputs.cost.get(top or "", {})),
        by_demonstrations=costs.by_demonstrations(inputs, reference),
        break_even=costs.break_even(inputs),
        lacking=costs.lacking(inputs),
        reference=reference,
        student=top,
    )


def calibration(view: View) -> Section:
    """Reliability diagrams and the scores of probabilities."""
    document, inputs = view.document, view.inputs
    shown = [*ranked_students(document)[:STUDENTS_COMPARED], document["reference"]]
    drawn = {name: reliability.reliability_chart(document, inputs.detail[name], name) for name in shown if name in inputs.detail}
    return section(
        view,
        "calibration",
        "Confidence",
        "Confidence",
        calibration=results.calibration(document, inputs.compare),
        reliability_charts={name: chart for name, chart in drawn.items() if chart},
        missing=[name for name in shown if name not in inputs.detail],
        reference=document["reference"],
        has_both=len({entry["domain"] for entry in document["sets"].values()}) > 1,
    )


def mistakes(view: View) -> Section:
    """Which labels are taken for which, in which slices, and single examples."""
    document, inputs = view.document, view.inputs
    students, reference = ranked_students(document), document["reference"]
    top = students[:1]
    confused = {name: inputs.detail[name] for name in [*top, reference] if name in inputs.detail}
    return section(
        view,
        "mistakes",
        "Mistakes",
        "Mistakes",
        confusion=reliability.confusion(document, confused, list(inputs.params.task.verbalisers)),
        slices=slices.slices(inputs.detail, [*students[:STUDENTS_COMPARED], reference]),
        missing=[name for name in [*top, reference] if name not in inputs.detail],
        student=top[0] if top else None,
        reference=reference,
        voters=voters(inputs, reference),
        examples=disagreements(inputs, top[0], reference) if top else [],
        no_texts=not inputs.texts,
    )


def risk_checks(view: View) -> Section | None:
    """Swaps, gaps, disagreement by confidence, words that carried an answer; nothing where there is no student."""
    document, found = view.document, view.inputs.risks
    students = ranked_students(document)
    if not students:
        return None
    shown = [name for name in students if name in found][:STUDENTS_COMPARED]
    return section(
        view,
        "risks",
        "Risks",
        "Risk checks",
        swaps=risks.swaps(found, shown),
        flipped={name: risks.flipped(found[name]) for name in shown if risks.flipped(found[name])},
        gaps=risks.gaps(found, shown),
        disagreement=risks.disagreement(found[shown[0]]) if shown else None,
        attributions=attributions(found[shown[0]]) if shown else [],
        student=shown[0] if shown else None,
        reference=document["reference"],
        missing=[name for name in students[:STUDENTS_COMPARED] if name not in found],
    )


def contexts(view: View) -> Section:
    """Spread between contexts, target sets, calibration shift, cache fidelity."""
    document, inputs = view.document, view.inputs
    target = inputs.params.baselines[document["reference"]].target_set
    return section(
        view,
        "contexts",
        "Contexts",
        "Contexts and targets",
        spread=results.spread(document),
        context_charts={
            name: charts.context_chart(document, name)
            for name, method in document["methods"].items()
            if any("contexts" in entry for entry in method["sets"].values())
        },
        targets=origins.target_sets(inputs),
        caches=origins.caches(inputs),
        shift=origins.shift(inputs),
        shift_chart=charts.shift_chart(inputs.targets.get(target, {}), list(inputs.params.task.verbalisers)),
        target=target,
        context_tokens=_context_tokens(inputs),
    )


def training(view: View) -> Section | None:
    """How the students were made, and their learning curves; nothing where there is no student."""
    inputs = view.inputs
    if not inputs.params.students:
        return None
    curves = list(inputs.curves.items())[:MAX_CURVES]
    return section(
        view,
        "training",
        "Training",
        "Training",
        students=origins.students(inputs),
        curves={name: charts.curve_chart(curve, name, len(curves)) for name, curve in curves},
        curves_left_out=len(inputs.curves) - len(curves),
        curves_missing=[name for name in inputs.params.students if name not in inputs.curves],
    )


def data(view: View) -> Section:
    """Roles of the sources, quarantine, leaks, template."""
    inputs = view.inputs
    return section(
        view,
        "data",
        "Data",
        "Data",
        roles=origins.roles(view.document, inputs),
        sources=origins.sources(inputs),
        quarantined=origins.quarantined(inputs),
        leaks=(inputs.prepare or {}).get("leaks_left"),
        template=inputs.params.task.template,
        verbalisers=dict(inputs.params.task.verbalisers),
    )


def reproduce(view: View) -> Section:
    """Digests, fingerprints, versions."""
    params = view.inputs.params
    shown = {"identity": identity(view.inputs), "params": params_text(params), "bootstrap": params.evaluation.bootstrap}
    return section(view, "reproduce", "Reproduce", "Reproduce", **shown)


SECTIONS: list[Builder] = [shows, accuracy, cost, calibration, mistakes, risk_checks, contexts, training, data, reproduce]


def section(view: View, anchor: str, nav: str, heading: str, **values: Any) -> Section:
    """A section from `templates/sections/ANCHOR.html.jinja`."""
    template = view.environment.get_template(f"sections/{anchor}.html.jinja")

    def stages(methods: list[str]) -> str:
        return " ".join(stage_of(view.inputs.params, method) for method in methods)

    return Section(anchor, nav, heading, Markup(template.render(stages=stages, **values)))  # noqa: S704 - an autoescaping template's own output


def _context_tokens(inputs: Inputs) -> list[str]:
    """A sentence for each list of contexts on how many tokens its contexts have."""
    lines = []
    for name, entry in (inputs.prepare or {}).get("contexts", {}).items():
        counts = list(entry.get("tokens", {}).values())
        if counts:
            size = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
            lines.append(f"{listed([name])}: {plural(len(counts), 'context')} of {size} tokens")
    return lines
