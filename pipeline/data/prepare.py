"""The stage prepare: checked sources become examples with roles, and contexts, before any model runs.

Everything follows from the params, the sources and the tokenizers: the same input gives the same bytes. What is set aside is in
artifacts/data/quarantine.jsonl, together with what the sources set aside.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pipeline.data.contexts import build_contexts, check_fit, not_shown
from pipeline.data.examples import Quarantined, SourceExamples, read_written_source, shorten
from pipeline.data.roles import UNLABELLED, assign, in_windows, text_of
from pipeline.files import Folders, write_json, write_text
from pipeline.models.folders import check_folder
from pipeline.models.trained import load_tokens
from pipeline.params import ContextParams, Params
from pipeline.schema import NO_CONTEXT, Context, Example, write_contexts, write_examples
from pipeline.task import Task, TaskTokens

LABEL_COUNTS = "label_counts.json"
"""In artifacts/data: how many texts of the labelled source have each label."""


def prepare(params: Params, folders: Folders) -> None:
    """Write artifacts/data (examples of each role, contexts, quarantine.jsonl) and metrics/prepare.json.

    Raises UsageError if a role finds too few examples or a context does not fit a model; quarantine.jsonl, to look rows up, is written.
    """
    task, data, folder = Task(params.task), params.data, folders.artifacts / "data"
    shutil.rmtree(folder, ignore_errors=True)
    context_models, models = params.context_models(), dict[tuple[str, str], TaskTokens]()  # (model, format) → its own
    for name, form in sorted({(name, form) for pairs in context_models.values() for name, form in pairs}):
        check_folder(own := folders.artifacts / "models" / name)
        models[name, form] = load_tokens(replace(task, format=form), own)

    sources = {name: read_written_source(name, entry, task, folders) for name, entry in data.sources.items()}
    quarantine = "".join((folders.artifacts / "sources" / name / "quarantine.jsonl").read_text(encoding="utf-8") for name in sources)
    reading = {(*model, entry.instruction) for name, entry in params.contexts.items() for model in context_models[name]}
    reading |= {(*model, "") for model in context_models[""]}
    readers = [(models[name, form], Context("", instruction)) for name, form, instruction in sorted(reading)]
    quarantine += "".join(entry.json_line() for source in sources.values() for entry in _set_faulty_aside(source, readers))
    write_text(quarantine, folder / "quarantine.jsonl")
    roles = assign(data, task.labels, sources)
    texts = {role: len(own) for role, own in roles.drawn.items()}
    write_text(quarantine + "".join(entry.json_line() for entry in roles.quarantined.values()), folder / "quarantine.jsonl")
    demonstrations = roles.drawn["demonstrations"]
    contexts = {name: build_contexts(name, entry, task, demonstrations, data.seed) for name, entry in params.contexts.items()}
    if params.task.long_texts == "windows":
        put = [(models[name, form], one) for key, own in contexts.items() for name, form in context_models[key] for one in own]
        put += [(tokens, NO_CONTEXT) for tokens in models.values()]
        in_windows(roles, data, sources, partial(_windows, put))
        write_text(quarantine + "".join(entry.json_line() for entry in roles.quarantined.values()), folder / "quarantine.jsonl")

    unlabelled = {role: roles.drawn[role] for role in UNLABELLED if role in roles.drawn}
    transfer, pool = unlabelled["transfer"], unlabelled.get("pool", [])
    evaluation = {name: roles.drawn[f"evaluation.{name}"] for name in data.evaluation}
    write_examples(demonstrations, task.fields, folder / "demonstrations.parquet")
    labels = Counter(example.label for example in sources[data.demonstrations.source].examples)
    write_json({label: labels[label] for label in task.labels}, folder / LABEL_COUNTS)
    # Gold labels never leave the sources, nor do answers that the teacher is to write.
    for role, own in unlabelled.items():
        bare = [replace(e, label=None, completion=e.completion if task.answers_are_given else None) for e in own]
        write_examples(bare, task.fields, folder / f"{role}.parquet")
    for name, examples in evaluation.items():
        slices = tuple(data.sources[data.evaluation[name].source].slices)
        write_examples(examples, task.fields, folder / "evaluation" / f"{name}.parquet", slices)

    inputs = [*transfer, *(example for examples in evaluation.values() for example in examples)]
    about_contexts, cut = dict[str, dict[str, Any]](), dict[str, set[str]]()
    for name, entry in params.contexts.items():
        write_contexts(contexts[name], folder / "contexts" / f"{name}.parquet")
        tokens = list[list[int]]()
        for model, form in context_models[name]:
            added, cut[f"{model} behind {name}"] = check_fit(f"contexts.{name}", entry, contexts[name], models[model, form], inputs)
            tokens.append(added)
        lengths = {context.name: max(of) for context, of in zip(contexts[name], zip(*tokens, strict=True), strict=False)}
        absent = not_shown(contexts[name], tuple(task.params.verbalisers))
        about_contexts[name] = {"tokens": lengths, "labels_not_shown": absent}
        if tokens:
            print(f"contexts {name}: {', '.join(map(str, lengths.values()))} tokens")
        if absent:
            print(
                f"contexts {name}: none shows {len(absent)} of {len(task.labels)} labels (metrics/prepare.json names them); raise `count`"
            )
    for (name, form), model in models.items():  # any of them may be a student's base, or be asked about the pool
        alone = [*demonstrations, *inputs, *pool]
        place = f"{name} in chat turns" if form == "chat" else name
        _, cut[place] = check_fit(f"models.{name}", ContextParams(demonstrations=0), [NO_CONTEXT], model, alone)

    def numbers(examples: Sequence[Example]) -> dict[str, Any]:
        return {"drawn": len(examples), "labels": dict(sorted(Counter(str(example.label) for example in examples).items()))}

    removed = {role: {name: roles.copies[role][f"evaluation.{name}"] for name in evaluation} for role in ("demonstrations", *unlabelled)}
    counts = {
        "sources": {name: source.counts for name, source in sources.items()},
        "roles": {
            "demonstrations": numbers(demonstrations) | {"copies_of_evaluation_removed": removed["demonstrations"]},
            **{
                role: {  # without labels, which stay in the sources
                    "drawn": len(own),
                    **({"texts": texts[role]} if params.task.long_texts == "windows" else {}),  # before they were read in windows
                    "copies_of_evaluation_removed": removed[role],
                    "copies_of_demonstrations_removed": roles.copies[role]["demonstrations"],
                }
                for role, own in unlabelled.items()
            },
            "evaluation": {name: numbers(examples) for name, examples in evaluation.items()},
        },
        "contexts": about_contexts,
        "cut": {  # reader → role → texts that do not fit
            reader: {role: count for role, own in roles.drawn.items() if (count := sum(example.example_id in ids for example in own))}
            for reader, ids in cut.items()
            if ids
        },
    }
    write_json(counts, folders.metrics / "prepare.json")
    sets = ", ".join(f"{name} {len(examples):,}" for name, examples in evaluation.items())
    more = f", {len(pool):,} in the pool" if pool else ""
    print(f"drawn: {len(demonstrations)} demonstrations, {len(transfer):,} for transfer{more}; evaluation: {sets}")
    for name, examples in evaluation.items():
        if absent := set(task.labels).difference(example.label for example in examples if example.label):
            print(f"evaluation {name}: no example of {len(absent)} of {len(task.labels)} labels (metrics/prepare.json counts them)")
    copies = ", ".join(f"{sum(of.values())} from {role}" for role, of in removed.items())
    print(f"near copies of evaluation examples kept out: {copies}")
    for reader, own in counts["cut"].items():
        too_long = ", ".join(f"{count:,} of {role}" for role, count in own.items())
        print(f"texts that do not fit {reader} (task.long_texts: {params.task.long_texts}): {too_long}")


def _windows(put: Sequence[tuple[TaskTokens, Context]], examples: Sequence[Example]) -> list[Example]:
    """The examples, each that does not fit as windows that fit all models behind all contexts that they are put to."""
    for tokens, context in put:
        examples = [window for own in tokens.windows(context, examples) for window in own]
    return list(examples)


def _set_faulty_aside(source: SourceExamples, readers: Sequence[tuple[TaskTokens, Context]]) -> list[Quarantined]:
    """Take out of a source the examples that spell a control token of a model that will read them; they count as quarantined."""
    faults = {
        example.example_id: fault
        for example in source.examples
        for tokens, context in readers
        if (fault := tokens.fault_of(example, context))
    }
    faulty = [example for example in source.examples if example.example_id in faults]
    if faulty:
        source.examples = [example for example in source.examples if example.example_id not in faults]
        source.counts |= {"examples": len(source.examples), "labelled": sum(example.label is not None for example in source.examples)}
        source.counts["quarantined"]["control token"] = len(faulty)
    return [Quarantined(source.name, *source.place(e.line), "", faults[e.example_id], shorten(text_of(e))) for e in faulty]
