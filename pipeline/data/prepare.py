"""The stage prepare: checked sources become examples with roles, and contexts, before any model runs.

Everything follows from the params, the sources and the tokenizers: the same input gives the same bytes. What is set aside is in
artifacts/data/quarantine.jsonl, together with what the sources set aside.
"""

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.data.contexts import build_contexts, check_fit, open_context_model
from pipeline.data.examples import Quarantined, SourceExamples, read_written_source, shorten
from pipeline.data.roles import Roles, assign, text_of
from pipeline.files import Folders, write_json, write_text
from pipeline.params import Params
from pipeline.schema import Context, Example, write_contexts, write_examples
from pipeline.task import Task, TaskTokens


def prepare(params: Params, folders: Folders) -> None:
    """Write artifacts/data (examples of each role, contexts, quarantine.jsonl) and metrics/prepare.json.

    Raises UsageError if a role finds too few examples or a context does not fit a model; quarantine.jsonl, to look rows up, is written.
    """
    task, data, folder = Task(params.task), params.data, folders.artifacts / "data"
    if folder.exists():
        shutil.rmtree(folder)
    context_models = params.context_models()
    used_models = sorted({name for names in context_models.values() for name in names})
    models = {name: open_context_model(task, folders.artifacts / "models" / name) for name in used_models}

    sources = {name: read_written_source(name, data.sources[name], task, folders) for name in data.sources}
    in_sources = "".join((folders.artifacts / "sources" / name / "quarantine.jsonl").read_text(encoding="utf-8") for name in sources)
    reading = {(model, entry.instruction) for name, entry in params.contexts.items() for model in context_models[name]}
    readers = [(models[model].tokens, Context("", instruction)) for model, instruction in sorted(reading)]
    faulty = [entry for source in sources.values() for entry in _set_faulty_aside(source, readers)]
    quarantine = in_sources + "".join(entry.json_line() for entry in faulty)
    write_text(quarantine, folder / "quarantine.jsonl")

    roles = assign(data, task.labels, sources)
    write_text(quarantine + "".join(entry.json_line() for entry in roles.quarantined.values()), folder / "quarantine.jsonl")
    demonstrations, transfer = roles.drawn["demonstrations"], roles.drawn["transfer"]
    evaluation = {name: roles.drawn[f"evaluation.{name}"] for name in data.evaluation}
    write_examples(demonstrations, task.fields, folder / "demonstrations.parquet")
    # Gold labels never leave the sources, nor do answers that the teacher is to write.
    unlabelled = [replace(e, label=None, completion=e.completion if task.answers_are_given else None) for e in transfer]
    write_examples(unlabelled, task.fields, folder / "transfer.parquet")
    for name, examples in evaluation.items():
        slices = tuple(data.sources[data.evaluation[name].source].slices)
        write_examples(examples, task.fields, folder / "evaluation" / f"{name}.parquet", slices)

    inputs = [*transfer, *(example for examples in evaluation.values() for example in examples)]
    context_counts: dict[str, Any] = {}
    for name, entry in params.contexts.items():
        contexts = build_contexts(name, entry, task, demonstrations, data.seed)
        tokens = [check_fit(name, entry, contexts, models[model], inputs) for model in context_models[name]]
        write_contexts(contexts, folder / "contexts" / f"{name}.parquet")
        context_counts[name] = {"tokens": {context.name: max(of) for context, of in zip(contexts, zip(*tokens, strict=True), strict=False)}}

    counts = {
        "sources": {name: source.counts for name, source in sources.items()},
        "roles": _counts(roles, list(evaluation)),
        "contexts": context_counts,
    }
    write_json(counts, folders.metrics / "prepare.json")
    _print(counts)


def _set_faulty_aside(source: SourceExamples, readers: Sequence[tuple[TaskTokens, Context]]) -> list[Quarantined]:
    """Take out of a source the examples that spell a control token of a model that will read them; they count as quarantined."""
    found, kept = list[Quarantined](), list[Example]()
    for example in source.examples:
        fault = next((fault for tokens, context in readers if (fault := tokens.fault_of(example, context))), None)
        if fault is None:
            kept.append(example)
        else:
            found.append(Quarantined(source.name, source.file, example.line, "", fault, shorten(text_of(example))))
    if found:
        source.examples = kept
        source.counts |= {"examples": len(kept), "labelled": sum(example.label is not None for example in kept)}
        source.counts["quarantined"]["control token"] = len(found)
    return found


def _counts(roles: Roles, sets: Sequence[str]) -> dict[str, Any]:
    """Numbers of each role. The transfer set's labels are not counted: they stay in the sources."""

    def labelled(role: str) -> dict[str, Any]:
        labels = Counter(str(example.label) for example in roles.drawn[role])
        return {"drawn": labels.total(), "labels": dict(sorted(labels.items()))}

    def removed(role: str) -> dict[str, int]:
        return {name: roles.copies[role][f"evaluation.{name}"] for name in sets}

    return {
        "demonstrations": labelled("demonstrations") | {"copies_of_evaluation_removed": removed("demonstrations")},
        "transfer": {
            "drawn": len(roles.drawn["transfer"]),
            "copies_of_evaluation_removed": removed("transfer"),
            "copies_of_demonstrations_removed": roles.copies["transfer"]["demonstrations"],
        },
        "evaluation": {name: labelled(f"evaluation.{name}") for name in sets},
    }


def _print(counts: Mapping[str, Any]) -> None:
    roles = counts["roles"]
    sets = ", ".join(f"{name} {entry['drawn']:,}" for name, entry in roles["evaluation"].items())
    print(f"drawn: {roles['demonstrations']['drawn']} demonstrations, {roles['transfer']['drawn']:,} for transfer; evaluation: {sets}")
    removed = [f"{sum(roles[role]['copies_of_evaluation_removed'].values())} from {role}" for role in ("demonstrations", "transfer")]
    print(f"near copies of evaluation examples kept out: {', '.join(removed)}")
    for name, entry in counts["contexts"].items():
        if entry["tokens"]:
            print(f"contexts {name}: {', '.join(str(n) for n in entry['tokens'].values())} tokens")
