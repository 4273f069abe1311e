"""The report of a task whose answers are free text: how many are well formed, right, and say what the teacher's say; and some of them.

There are no probabilities of labels, hence no calibration, reliability or confusion; what both kinds of task have (training, data,
identity) comes from the same sections. Every number is computed from `artifacts/predictions/` by `pipeline.evaluation.judging`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation import judging as answers
from pipeline.files import sha256_text
from pipeline.report import sections
from pipeline.report.cells import Cell, Rows, Table
from pipeline.report.collect import Inputs, Json
from pipeline.report.describe import root_model
from pipeline.report.disagreements import shortened
from pipeline.report.sections import Builder, Section, View
from pipeline.report.templating import make_environment
from pipeline.report.formatting import DASH, percent, plural, quantity, span

SAMPLES = 12


def answers_document(inputs: Inputs) -> Json:
    """`report/metrics.json` of such a task.

    `answers` True; `reference`; `keys` of the form; `sets` {name: domain, n examples}; `methods` {name: kind, sets {name: n answers, mean
    tokens, well_formed and accuracy, each with `_ci95`, agreement {text, key: share}}}. Shares that the task does not define are left out.
    """
    params = inputs.params
    assert params.task.completion is not None
    form, reference = params.task.completion.form, params.evaluation.reference
    methods: Json = {}
    for name, table in inputs.predictions.items():
        judged = answers.judge(table, form)
        same = answers.agreement(table, inputs.predictions[reference], form) if name != reference else {}
        found = {key: judged[key] | ({"agreement": same[key]} if key in same else {}) for key in params.data.evaluation}
        methods[name] = {"kind": inputs.kind(name), "sets": found}
    examples = inputs.predictions[reference].select(["set", "example_id"]).to_pylist()
    sizes = {name: len({row["example_id"] for row in examples if row["set"] == name}) for name in params.data.evaluation}
    return {
        "answers": True,
        "reference": reference,
        "keys": [] if form is None else list(form.keys),
        "sets": {name: {"domain": entry.domain, "n": sizes[name]} for name, entry in params.data.evaluation.items()},
        "methods": methods,
    }


def mean_over_sets(method: Json, what: str) -> float | None:
    """Mean over evaluation sets of a share or count; None where it is not defined."""
    values = [entry[what] for entry in method["sets"].values() if what in entry]
    return sum(values) / len(values) if values else None


def mean_agreement(method: Json, key: str) -> float | None:
    """The same of an agreement; None for the reference itself."""
    values = [entry["agreement"][key] for entry in method["sets"].values() if "agreement" in entry]
    return sum(values) / len(values) if values else None


def render_answers_page(document: Json, inputs: Inputs) -> str:
    """The report as HTML."""
    view = View(document, inputs, make_environment(autoescape=True))
    built: list[Section] = [section for build in SECTIONS if (section := build(view)) is not None]
    params = inputs.params
    models = list(dict.fromkeys(root_model(params, teacher.model) for teacher in params.teachers.values()))
    return view.environment.get_template("page.html.jinja").render(
        title=f"{' + '.join(models)}: answers in free text, {plural(len(params.students), 'student')}",
        lead=_lead(inputs),
        figures=_figures(document),
        sections=built,
    )


def results_table(document: Json) -> Table:
    """Methods of each evaluation set: well formed, right, in agreement with the reference, tokens."""
    keys = ["text", *document["keys"]]
    columns = ["Method", "well formed, %", "right, %", *keys, "tokens"]
    bodies = []
    for name, entry in document["sets"].items():
        rows = []
        for method, found in document["methods"].items():
            own = found["sets"][name]
            same = own.get("agreement", {})
            rows.append(
                [
                    Cell(method, code=True),
                    *(_share(own, what) for what in ("well_formed", "accuracy")),
                    *(Cell(percent(same.get(key))) for key in keys),
                    Cell(quantity(float(own["tokens"]), digits=1)),
                ]
            )
        bodies.append(Rows(f"{name}, {entry['domain']} of domain" if entry["domain"] == "out" else f"{name}, in domain", rows))
    caption = (
        f"Answers of each method. Agreement is the share that says what {document['reference']} says, word for word and by key, percent."
    )
    return Table("answers", caption, columns, bodies, groups=[("", 3), ("Agreement", len(keys)), ("", 1)])


@dataclass(frozen=True)
class Sample:
    """One input and what each method answers."""

    where: str
    text: str
    gold: str | None
    answers: list[tuple[str, str]]
    """(method, answer), an ill-formed one marked."""


def samples(inputs: Inputs, count: int = SAMPLES) -> list[Sample]:
    """`count` examples drawn by their hash, evenly over the sets that have texts, with each method's answer in its first context."""
    assert inputs.params.task.completion is not None
    form = inputs.params.task.completion.form
    first = {name: _first_answers(table.to_pylist()) for name, table in inputs.predictions.items()}
    found: list[Sample] = []
    sets = [name for name in inputs.params.data.evaluation if name in inputs.texts]
    for number, name in enumerate(sets):
        asked = {key: row["label"] for own in first.values() for key, row in own.items() if key[0] == name and key[1] in inputs.texts[name]}
        share = count // len(sets) + (number < count % len(sets))
        for key in sorted(asked, key=lambda key: sha256_text("sample\0" + key[1]))[:share]:
            said = []
            for method, own in first.items():
                answer = own[key]["answer"].strip() if key in own else DASH
                ill = form is not None and key in own and answers.values_of(answer, form) is None
                said.append((method, shortened(answer) + (" (ill-formed)" if ill else "")))
            found.append(Sample(name, shortened(inputs.texts[name][key[1]]), asked[key], said))
    return found


def _first_answers(rows: Iterable[Json]) -> dict[tuple[str, str], Json]:
    """(set, example) → a method's row in the first context."""
    first: dict[tuple[str, str], Json] = {}
    for row in rows:
        first.setdefault((row["set"], row["example_id"]), row)
    return first


def _results(view: View) -> Section:
    return sections.section(
        view,
        "answers",
        "Results",
        "Results",
        table=results_table(view.document),
        samples=samples(view.inputs),
        no_texts=not view.inputs.texts,
        reference=view.document["reference"],
        form=None if (completion := view.inputs.params.task.completion) is None else completion.form,
    )


SECTIONS: list[Builder] = [_results, sections.training, sections.data, sections.reproduce]


def _share(found: Json, what: str) -> Cell:
    return Cell(percent(found[what]), span(found[f"{what}_ci95"])) if what in found else Cell(DASH)


def _lead(inputs: Inputs) -> list[str]:
    params = inputs.params
    lines = [
        f"The teacher is `{params.evaluation.reference}`; its answers, token by token from the score cache, are what students learn from."
    ]
    for name, student in params.students.items():
        kept = f"layers {student.layers} of " if student.layers else ""
        lines.append(f"`{name}` is {kept}`{student.base}`, learns from `{student.learn_from}` and is asked with the bare input.")
    return lines


def _figures(document: Json) -> list[tuple[str, str, str]]:
    """(figure, what, note) of each student: its share of well-formed answers beside the teacher's."""
    teacher = mean_over_sets(document["methods"][document["reference"]], "well_formed")
    found: list[tuple[str, str, str]] = []
    for name, method in document["methods"].items():
        own: Any = mean_over_sets(method, "well_formed")
        if method["kind"] == "student" and own is not None and teacher is not None:
            found.append((f"{percent(own)} %", "well formed", f"`{name}`; the teacher {percent(teacher)} %, mean over sets"))
    return found[:4]
