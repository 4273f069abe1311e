"""The stage prepare: checked sources become examples with roles, and contexts, before any model runs.

Everything follows from the params, the sources and the tokenizers: the same input gives the same bytes. What is set aside is in
artifacts/data/quarantine.jsonl, together with what the sources set aside.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipeline.data.contexts import build_contexts, check_fit
from pipeline.data.examples import Quarantined, SourceExamples, read_written_source, shorten
from pipeline.data.roles import UNLABELLED, assign, text_of
from pipeline.files import Folders, write_json, write_text
from pipeline.models.folders import check_folder, context_limit
from pipeline.models.trained import load_tokens
from pipeline.params import ContextParams, Params
from pipeline.schema import NO_CONTEXT, Context, Example, write_contexts, write_examples
from pipeline.task import Task, TaskTokens


def prepare(params: Params, folders: Folders) -> None:
    """Write artifacts/data (examples of each role, contexts, quarantine.jsonl) and metrics/prepare.json.

    Raises UsageError if a role finds too few examples or a context does not fit a model; quarantine.jsonl, to look rows up, is written.
    """
    task, data, folder = Task(params.task), params.data, folders.artifacts / "data"
    shutil.rmtree(folder, ignore_errors=True)
    context_models, models = params.context_models(), dict[tuple[str, str], tuple[TaskTokens, int | None]]()  # (model, format) → its own
    for name, form in sorted({(name, form) for pairs in context_models.values() for name, form in pairs}):
        check_folder(own := folders.artifacts / "models" / name)
        models[name, form] = load_tokens(replace(task, format=form), own), context_limit(own)

    sources = {name: read_written_source(name, entry, task, folders) for name, entry in data.sources.items()}
    quarantine = "".join((folders.artifacts / "sources" / name / "quarantine.jsonl").read_text(encoding="utf-8") for name in sources)
    reading = {(*model, entry.instruction) for name, entry in params.contexts.items() for model in context_models[name]}
    reading |= {(*model, "") for model in context_models[""]}
    readers = [(models[name, form][0], Context("", instruction)) for name, form, instruction in sorted(reading)]
    quarantine += "".join(entry.json_line() for source in sources.values() for entry in _set_faulty_aside(source, readers))
    write_text(quarantine, folder / "quarantine.jsonl")
    roles = assign(data, task.labels, sources)
    write_text(quarantine + "".join(entry.json_line() for entry in roles.quarantined.values()), folder / "quarantine.jsonl")

    demonstrations, unlabelled = roles.drawn["demonstrations"], {role: roles.drawn[role] for role in UNLABELLED if role in roles.drawn}
    transfer, pool = unlabelled["transfer"], unlabelled.get("pool", [])
    evaluation = {name: roles.drawn[f"evaluation.{name}"] for name in data.evaluation}
    write_examples(demonstrations, task.fields, folder / "demonstrations.parquet")
    # Gold labels never leave the sources, nor do answers that the teacher is to write.
    for role, own in unlabelled.items():
        bare = [replace(e, label=None, completion=e.completion if task.answers_are_given else None) for e in own]
        write_examples(bare, task.fields, folder / f"{role}.parquet")
    for name, examples in evaluation.items():
        slices = tuple(data.sources[data.evaluation[name].source].slices)
        write_examples(examples, task.fields, folder / "evaluation" / f"{name}.parquet", slices)

    inputs = [*transfer, *(example for examples in evaluation.values() for example in examples)]
    lengths: dict[str, dict[str, int]] = {}
    for name, entry in params.contexts.items():
        contexts = build_contexts(name, entry, task, demonstrations, data.seed)
        write_contexts(contexts, folder / "contexts" / f"{name}.parquet")
        tokens = [check_fit(f"contexts.{name}", entry, contexts, *models[model, form], inputs) for model, form in context_models[name]]
        lengths[name] = {context.name: max(of) for context, of in zip(contexts, zip(*tokens, strict=True), strict=False)}
        if tokens:
            print(f"contexts {name}: {', '.join(map(str, lengths[name].values()))} tokens")

    for (name, form), model in models.items():  # any of them may be asked about the pool, or learn it
        if alone := [*(inputs if [name, form] in context_models[""] else ()), *pool]:
            check_fit(f"models.{name}", ContextParams(demonstrations=0), [NO_CONTEXT], *model, alone)

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
                    "copies_of_evaluation_removed": removed[role],
                    "copies_of_demonstrations_removed": roles.copies[role]["demonstrations"],
                }
                for role, own in unlabelled.items()
            },
            "evaluation": {name: numbers(examples) for name, examples in evaluation.items()},
        },
        "contexts": {name: {"tokens": own} for name, own in lengths.items()},
    }
    write_json(counts, folders.metrics / "prepare.json")
    sets = ", ".join(f"{name} {len(examples):,}" for name, examples in evaluation.items())
    more = f", {len(pool):,} in the pool" if pool else ""
    print(f"drawn: {len(demonstrations)} demonstrations, {len(transfer):,} for transfer{more}; evaluation: {sets}")
    copies = ", ".join(f"{sum(of.values())} from {role}" for role, of in removed.items())
    print(f"near copies of evaluation examples kept out: {copies}")


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
