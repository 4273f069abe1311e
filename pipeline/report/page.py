"""The page: a head and a list of sections, put into one HTML file that needs nothing else, opened from disk or sent by mail.

No script, no font, no picture from outside; the content security policy in its head forbids them, so that a slip shows. Everything that
comes from data or params is escaped by jinja2; the charts are the only markup that is passed through, and are built from escaped parts.
"""

from pipeline.report import results
from pipeline.report.collect import Inputs, Json
from pipeline.report.describe import beside, context_sizes, root_model
from pipeline.report.sections import SECTIONS, View
from pipeline.report.templating import make_environment
from pipeline.report.formatting import listed, plural, scaled


def render_page(document: Json, inputs: Inputs) -> str:
    """The report as HTML, from `metrics_document`'s numbers and the other inputs; a section that has nothing to say is left out."""
    view = View(document, inputs, make_environment(autoescape=True))
    sections = [section for build in SECTIONS if (section := build(view)) is not None]
    return view.environment.get_template("page.html.jinja").render(
        title=_title(inputs), lead=_lead(inputs), figures=results.key_figures(document, inputs), sections=sections
    )


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
            source = " and ".join([f"the targets `{student.learn_from.removeprefix('targets/')}`", *beside(student)])
        lines.append(f"`{name}` is {kept}`{student.base}`{size} and learns from {source}.")
    return lines
