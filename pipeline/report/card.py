"""A model card for each student, in Markdown with the front matter that model hubs read.

It is the README.md of the student's own folder, so it goes wherever the folder goes. That folder is the student stage's output, and a card
changes with every evaluation: `.dvcignore` names the cards, so DVC neither hashes nor caches them.
"""

import json
import re
from functools import partial

from jinja2 import Environment

from pipeline.params import HubDownload, Params
from pipeline.report.collect import DOMAINS, Collected, licence_of
from pipeline.report.prose import about, compact, context_sizes, layers, learnt, number, percent, plural, scaled, span
from pipeline.report.tables import weakest_slice


def render_card(environment: Environment, found: Collected, student: str) -> str:
    """The card of one student, by an environment that does not escape HTML."""
    params, document = found.params, found.document
    entry, task = params.students[student], params.task
    base = params.base_model(entry.base)
    model = params.models[base]
    licence = licence_of(params, model.path, model.licence)
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    # JSON strings are Python strings too; jinja2's own `tojson` escapes quotes for HTML.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    download = params.downloads.get(model.path.split("/")[1]) if model.path.startswith("downloads/") else None
    reference = document["methods"][document["reference"]]["sets"]
    metrics = [
        [
            name,
            document["sets"][name]["domain"],
            number(own["n"]),
            percent(own["accuracy"]),
            span(own["ci95"]),
            *(percent(own[key]) for key in ("macro_f1", "ece", "agreement")),
            percent(reference[name]["accuracy"]),
        ]
        for name, own in document["methods"][student]["sets"].items()
    ]
    return environment.get_template("card.md.jinja").render(
        name=student,
        licence=licence,
        licence_id=licence.lower() if re.fullmatch(r"[A-Za-z]+[A-Za-z0-9.-]*", licence) else "other",
        base=base,
        hub_base=download.repo if isinstance(download, HubDownload) else None,
        origin=_origin(params, model.path),
        distilled=not entry.learn_from.startswith("data/"),
        summary=f"A small model that answers with no demonstrations in its prompt: {about(found, student)}.",
        facts=_facts(found, student),
        task=task,
        reference=document["reference"],
        limits=_limits(found, student),
        metrics=metrics,
        folder=f"artifacts/students/{student}",
        data_licences={name: licence_of(params, source.path) for name, source in params.data.sources.items()},
    )


def _origin(params: Params, path: str) -> str:
    """Where a model came from."""
    if not path.startswith("downloads/"):
        return "a local folder"
    download = params.downloads[path.split("/")[1]]
    if isinstance(download, HubDownload):
        return f"{download.repo} at {download.revision}"
    return f"PyPI {download.package} {download.version}"


def _facts(found: Collected, student: str) -> list[tuple[str, str]]:
    params, entry = found.params, found.params.students[student]
    labelled = params.data.demonstrations.per_label * len(params.task.labels)
    facts = [("base", entry.base), ("layers", layers(found, student)), ("parameters", scaled(found.training.get(student, {}).get("parameters")))]
    facts.append(("training", learnt(entry)))
    kind, _, target = entry.learn_from.partition("/")
    if kind == "targets":
        contexts, demonstrations = context_sizes(params, target)
        teachers = ", ".join(f"{name} ({params.teachers[name].model})" for name in params.targets[target].teachers)
        sizes = f"{plural(contexts, 'context')} of up to {plural(demonstrations, 'demonstration')}"
        facts += [("teachers", f"{teachers}; {sizes}"), ("transfer examples", number(found.targets.get(target, {}).get("rows")))]
    if kind == "data" or (entry.ce_weight and entry.ce_target == "demonstrations"):
        facts.append(("labelled examples", number(labelled)))
    facts.append(("steps", f"{entry.steps:,} of {entry.batch_size} examples, learning rate {compact(entry.learning_rate)}"))
    seeds = [run.seed for run in entry.runs.values()]
    note = "; figures are means over them, and this folder is that of the first" if len(seeds) > 1 else ""
    facts.append(("seeds" if note else "seed", ", ".join(map(str, seeds)) + note))
    return facts


def _limits(found: Collected, student: str) -> list[str]:
    """Its measured weak sides, a sentence each."""
    sets = found.document["methods"][student]["sets"]
    lowest, most = min(sets, key=lambda name: sets[name]["accuracy"]), max(sets, key=lambda name: sets[name]["ece"])
    lines = [
        f"It is least accurate on `{lowest}`: {percent(sets[lowest]['accuracy'])} % right.",
        f"Its confidence is off by {percent(sets[most]['ece'])} points on `{most}` (expected calibration error). Do not rely on it unchecked.",
    ]
    if weak := weakest_slice(found, student):
        where = f"{weak['dimension']} “{weak['slice']}”, {DOMAINS[weak['domain']].lower()}"
        lines.append(f"Its weakest slice is {where}: {percent(weak['accuracy'])} % of {plural(weak['n'], 'example')}.")
    if asked := [entry for entry in found.risks.get(student, {}).get("swaps", []) if entry["asked"]]:
        worst = max(asked, key=lambda entry: entry["flips"] / entry["asked"])
        lines.append(f"A swap that should not matter ({worst['what']}) changed {worst['flips']:,} of {plural(worst['asked'], 'answer')}.")
    return lines
