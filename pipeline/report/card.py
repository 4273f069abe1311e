"""A model card for each student, in Markdown with the front matter that model hubs read.

It is the `README.md` of the student's own folder, so that it goes wherever the folder goes (`shotless export`, `predict`, a hub). That
folder is the student stage's output, and a card changes with every evaluation: `.dvcignore` names these cards, so DVC neither hashes nor
caches them. The trade-off: a folder restored from the cache has no card until `dvc repro -f -s report`.
"""

import json
import re
from functools import partial

from pipeline.params import HubOrigin, LocalOrigin, PypiOrigin
from pipeline.report.cells import DOMAIN_TITLE
from pipeline.report.collect import Inputs, Json
from pipeline.report.describe import about, beside, context_sizes, gold_weight, layers, root_model
from pipeline.report.slices import weakest
from pipeline.report.templating import make_environment
from pipeline.report.formatting import compact, percent, plural, quantity, scaled, span


def render_card(document: Json, inputs: Inputs, student: str) -> str:
    """The card of one student. Licences are those that the sources recorded, else those of the params."""
    params = inputs.params
    entry, task = params.students[student], params.task
    base = root_model(params, entry.base)
    origin = params.models[base]
    licence = str(inputs.sources.get(base, {}).get("licence", origin.licence))
    environment = make_environment(autoescape=False)
    environment.filters["cell"] = _cell
    # JSON strings are Python strings too; jinja2's own `tojson` would write quotes as HTML wants them.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment.get_template("card.md.jinja").render(
        name=student,
        licence=licence,
        licence_id=licence.lower() if re.fullmatch(r"[A-Za-z]+[A-Za-z0-9.-]*", licence) else "other",
        base=base,
        hub_base=origin.repo if isinstance(origin, HubOrigin) else None,
        origin=_origin(origin),
        distilled=not entry.learn_from.startswith("data/"),
        summary=f"A small model that answers without demonstrations in its prompt: {about(inputs, student)}.",
        facts=_facts(inputs, student),
        labels=list(task.verbalisers),
        template=task.template,
        verbalisers=dict(task.verbalisers),
        fields=task.fields,
        reference=document["reference"],
        limits=_limits(document, inputs, student),
        metrics=_metrics(document, student),
        folder=f"artifacts/students/{student}",
        data_licences={name: source.origin.licence for name, source in params.data.sources.items()},
    )


def _limits(document: Json, inputs: Inputs, student: str) -> list[str]:
    """What was measured of its weak sides, a sentence each."""
    sets = document["methods"][student]["sets"]
    worst = min(sets, key=lambda name: sets[name]["accuracy"])
    most = max(sets, key=lambda name: sets[name]["ece"])
    lines = [
        f"It is least often right on `{worst}`: {percent(sets[worst]['accuracy'])} %.",
        f"Its confidence is not to be relied on: off by {percent(sets[most]['ece'])} points on `{most}` (expected calibration error).",
    ]
    if weak := weakest(inputs.detail, student):
        part = f"{weak['dimension']} “{weak['slice']}”, {DOMAIN_TITLE[weak['domain']].lower()}"
        lines.append(f"Its weakest slice is {part}: {percent(weak['accuracy'])} % of {plural(weak['n'], 'example')}.")
    if asked := [entry for entry in inputs.risks.get(student, {}).get("swaps", []) if entry["asked"]]:
        worst = max(asked, key=lambda entry: entry["flips"] / entry["asked"])
        lines.append(f"A swap that should not matter ({worst['what']}) flipped {worst['flips']:,} of {worst['asked']:,} answers.")
    return lines


def _facts(inputs: Inputs, student: str) -> list[tuple[str, str]]:
    params = inputs.params
    entry, found = params.students[student], inputs.training.get(student, {})
    facts = [("base", entry.base), ("layers", layers(inputs, student)), ("parameters", scaled(found.get("parameters")))]
    labelled = params.data.demonstrations.per_label * len(params.task.verbalisers)
    if entry.learn_from.startswith("targets/"):
        target = entry.learn_from.removeprefix("targets/")
        contexts, demonstrations = context_sizes(params, target)
        teachers = ", ".join(f"{name} ({params.teachers[name].model})" for name in params.targets[target].teachers)
        facts.append(("distilled from", f"{teachers}; {contexts} contexts, up to {demonstrations} demonstrations in each"))
        facts.append(("transfer examples", quantity(inputs.targets.get(target, {}).get("rows"))))
        gold = gold_weight(entry)
        facts.append(("weight of gold labels", f"{gold:g}" + (f" on {labelled} demonstrations" if gold else "")))
        if extras := beside(entry):
            facts.append(("learnt beside the targets", "; ".join(extras)))
    else:
        facts.append(("learnt from", f"{labelled} labelled demonstrations"))
    seeds = [run.seed for run in entry.runs.values()]
    facts.append(
        ("training", f"{entry.steps:,} steps of {entry.batch_size}, learning rate {compact(entry.learning_rate)}, seed {seeds[0]}")
    )
    if len(seeds) > 1:
        facts.append(("seeds", f"{', '.join(map(str, seeds))}; figures are means over them, this folder is that of the first"))
    return facts


def _origin(origin: HubOrigin | LocalOrigin | PypiOrigin) -> str:
    if isinstance(origin, HubOrigin):
        return f"{origin.repo} at {origin.revision}"
    return f"PyPI {origin.package} {origin.version}" if isinstance(origin, PypiOrigin) else "a local folder"


def _metrics(document: Json, student: str) -> list[list[str]]:
    reference = document["methods"][document["reference"]]["sets"]
    return [
        [
            name,
            document["sets"][name]["domain"],
            f"{found['n']:,}",
            percent(found["accuracy"]),
            span(found["ci95"]),
            percent(found["macro_f1"]),
            percent(found["ece"]),
            percent(found["agreement"]),
            percent(reference[name]["accuracy"]),
        ]
        for name, found in document["methods"][student]["sets"].items()
    ]


def _cell(value: object) -> str:
    """Text inside a Markdown table: no line break, no bar."""
    return str(value).replace("|", "\\|").replace("\n", " ")
