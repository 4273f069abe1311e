"""A model card for each student, in Markdown with the front matter that model hubs read.

It is the README.md of the student's own folder, so it goes wherever the folder goes. That folder is the student stage's output, and a card
changes with every evaluation: `.dvcignore` names the cards, so DVC neither hashes nor caches them.
"""

import json
import re
from functools import partial

from jinja2 import Environment

from pipeline.params import HubDownload
from pipeline.report.collect import DOMAINS, Collected
from pipeline.report.prose import asked, by_chance, layers, learnt, licence_of, number, percent, plural, scaled
from pipeline.report.tables import weakest_slice


def render_card(environment: Environment, found: Collected, student: str) -> str:
    """The card of one student, by an environment that does not escape HTML."""
    params = found.params
    base = params.base_model(params.students[student].base)
    path = params.models[base].path
    origin, hub_base = "a local file or folder", None
    if path.startswith("downloads/"):
        download = params.downloads[path.split("/")[1]]
        hub_base = download.repo if isinstance(download, HubDownload) else None
        origin = f"{hub_base} {download.revision}" if isinstance(download, HubDownload) else f"PyPI {download.package} {download.version}"
    licence = licence_of(params, path, params.models[base].licence)
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    # JSON strings are Python strings too; jinja2's own `tojson` escapes quotes for HTML.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    frame = found.files[f"artifacts/students/{student}/manifest.json"].get("frame", {})
    words = {label: frame["lead"] + text.strip() if frame else text for label, text in params.task.verbalisers.items()}
    return environment.get_template("card.md.jinja").render(
        found=found,
        name=student,
        frame=frame,
        words=words,
        encoder=str(found.of("train", student).get("architecture")).endswith("ForSequenceClassification"),
        distilled=not params.students[student].learn_from.startswith("data/"),
        base=base,
        hub_base=hub_base,
        origin=origin,
        licence=licence,
        licence_id=licence.lower() if re.fullmatch(r"[A-Za-z]+[A-Za-z0-9.-]*", licence) else "other",
        facts=_facts(found, student),
        limits=_limits(found, student),
    )


def _facts(found: Collected, student: str) -> dict[str, str]:
    params, entry = found.params, found.params.students[student]
    facts = {"base": entry.base, "layers": layers(found, student), "parameters": scaled(found.of("train", student).get("parameters"))}
    facts["training"] = learnt(params, student)
    kind, _, target = entry.learn_from.partition("/")
    if kind == "targets":
        facts["teachers"] = ", ".join(asked(params, teacher) for teacher in params.targets[target].teachers)
        facts["transfer examples"] = number(found.of("targets", target).get("rows"))
    if kind == "rounds":
        roles = found.files["metrics/prepare.json"]["roles"]
        facts["teacher"] = f"the student {params.rounds[target].student}"
        facts["transfer examples"] = number(sum(roles[role]["drawn"] for role in ("transfer", "pool")))
    if kind == "data" or (entry.ce_weight and entry.ce_target == "demonstrations"):
        facts["labelled examples"] = number(found.files["metrics/prepare.json"]["roles"]["demonstrations"]["drawn"])
    facts["steps"] = f"{entry.steps:,}, with {plural(entry.batch_size, 'example')} each; learning rate {entry.learning_rate:g}"
    seeds = [str(run.seed) for run in entry.runs.values()]
    facts["seeds"] = ", ".join(seeds) + ("; figures are means over them, and this folder is of the first" if len(seeds) > 1 else "")
    return facts


def _limits(found: Collected, student: str) -> list[str]:
    """Its measured weak sides, a sentence each."""
    sets = found.document["methods"][student]["sets"]
    lowest, most = min(sets, key=lambda name: sets[name]["accuracy"]), max(sets, key=lambda name: sets[name]["ece"])
    lines = [
        f"It is least accurate on `{lowest}`: {percent(sets[lowest]['accuracy'])} % right.",
        f"Its confidence is off by {percent(sets[most]['ece'])} points on `{most}` (expected calibration error); {by_chance(sets[most])}.",
    ]
    if weak := weakest_slice(found, student):
        where = f"{weak['dimension']} “{weak['slice']}”, {DOMAINS[weak['domain']].lower()}"
        lines.append(f"Its weakest slice is {where}: {percent(weak['accuracy'])} % of {plural(weak['n'], 'example')} right.")
    if swapped := [entry for entry in found.of("risk", student).get("swaps", []) if entry["asked"]]:
        worst = max(swapped, key=lambda entry: entry["flips"] / entry["asked"])
        lines.append(f"A swap that should not matter, “{worst['what']}”, changed {worst['flips']:,} of {plural(worst['asked'], 'answer')}.")
    return lines
