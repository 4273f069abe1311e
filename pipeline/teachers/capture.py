"""A teacher answers every transfer example in each of its contexts, once, and the answers become a score cache.

Inputs without content are scored along with the transfer set, for contextual calibration. How much of the live teacher the cache has is
measured on a few rows that are scored once more, whole (`cache.fidelity`). The student through which losses are seen is the same model
behind no context: what a student starts from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from pipeline.cache.distributions import Distributions, decode
from pipeline.cache.fidelity import censored, fidelity
from pipeline.cache.folder import described_task, write_cache
from pipeline.cache.labelled import LABELLED_FILE, compared_texts, folds_of, with_the_teachers_lean
from pipeline.cache.store import Store
from pipeline.errors import CorruptError, UsageError
from pipeline.files import Folders, read_json, read_manifest, sha256_json, write_json
from pipeline.models.folders import tokenizer_sha256
from pipeline.params import Params, pick
from pipeline.schema import LABELLED, NO_CONTEXT, Context, Example, read_contexts, read_examples, read_table, write_table
from pipeline.task import Task
from pipeline.teachers.scorer import Scorer

FIDELITY_CONTEXTS = 4
FIDELITY_ROWS = 8  # examples of each of these contexts that are scored once more
DIGITS = 6


def capture(name: str, params: Params, folders: Folders) -> None:
    """Write the score cache artifacts/teachers/NAME: rows for every context × (content-free input, transfer example).

    Also writes artifacts/labelled/NAME.parquet, its answers to labelled examples that it had not seen, metrics/fidelity/NAME.json, and
    metrics/runtime/teacher-NAME.json, which no stage tracks: it has seconds. Rows in the store are not scored again. Raises UsageError if
    a prompt does not fit the model.
    """
    teacher = pick("teachers", params.teachers, name)
    data = folders.artifacts / "data"
    contexts = read_contexts(data / "contexts" / f"{teacher.contexts}.parquet")
    task = Task(params.task, contexts[0].format)
    free = content_free(task)
    examples = [*free, *read_examples(data / "transfer.parquet", task.fields)]
    if len({example.example_id for example in examples}) < len(examples):
        raise UsageError(f"{data / 'transfer.parquet'}: an example is there twice, or is in task.content_free. Run `dvc repro prepare`.")
    if teacher.scores == "input_tokens":
        task, free, examples = task.of_input_tokens(), [], examples[len(free) :]
    with Scorer(
        folders.artifacts / teacher.model,
        task,
        params.kept_of(name),
        work=folders.work,
        threads=params.runtime.threads,
        dtype=teacher.dtype,
        on_ray=params.runtime.engine == "ray",
        workers=params.runtime.workers,
    ) as scorer:
        assert scorer.store is not None
        tables = scorer.tables(contexts, examples, f"teacher {name}")
        keys, store = scorer.keys, scorer.store
        about = {
            "teacher": name,
            "model": teacher.model,
            "identity": scorer.identity,
            "tokenizer_sha256": scorer.server["found"]["tokenizer_sha256"] if scorer.server else tokenizer_sha256(scorer.model_folder),
            "cache": scorer.cache.model_dump(mode="json"),
            "task": described_task(task),
            "format": task.format,
            "labels": list(task.labels),
            "contexts": [
                {"context_id": context.context_id, "name": context.name, "tokens": scorer.tokens.added_by(context)} for context in contexts
            ],
            "content_free": [example.example_id for example in free],
            "engines": store.engines(keys),
        }
        folder = folders.artifacts / "teachers" / name
        write_cache(folder, tables, about)
        rows = store.read(keys, ["prompt_tokens", "tail_mass"])
        size = sum(entry["bytes"] for entry in read_manifest(folder)["files"].values())
        positions, tokens = sum(map(len, rows["tail_mass"])), sum(rows["prompt_tokens"].to_pylist())
        sizes = {"positions": positions, "bytes_per_row": size / len(keys), "bytes_per_position": size / positions}
        measured = {"rows": len(keys), **_rounded(sizes), **_fidelity_once(scorer, store, contexts, examples)}
        write_json(measured, folders.metrics / "fidelity" / f"{name}.json")
        write_table(_labelled(scorer, contexts, folders), folders.artifacts / "labelled" / f"{name}.parquet")
        runtime = {"seconds": round(store.seconds(keys), 3), "rows": len(keys), "rows_timed": len(keys), "prompt_tokens": tokens}
        write_json(runtime, folders.metrics / "runtime" / f"teacher-{name}.json")


def _labelled(scorer: Scorer, contexts: Sequence[Context], folders: Folders) -> pa.Table:
    """`schema.LABELLED` of a teacher: each context is asked about each fold of the labelled examples without those of the fold, and about
    a few unlabelled texts, which tell how it leans then.

    Empty if answers are free text, and of a model that learnt the examples, unless it is tuned and asked without any.
    """
    task, kind = scorer.tokens.task, scorer.model_folder.parent.name
    if kind == "tuned" and not any(context.demonstrations for context in contexts):
        answers = read_table(scorer.model_folder / LABELLED_FILE, LABELLED)
        return pa.concat_tables([answers.set_column(0, LABELLED.field(0), pa.repeat(own.context_id, len(answers))) for own in contexts])
    if task.params.completion is not None or kind in {"tuned", "students"}:
        return LABELLED.empty_table()
    data, rows = folders.artifacts / "data", list[dict[str, Any]]()
    examples, transfer = (read_examples(data / f"{role}.parquet", task.fields) for role in ("demonstrations", "transfer"))
    asked = compared_texts(transfer)
    usual = scorer.label_scores(contexts, asked, "unlabelled texts")  # [C, P, L], from the store
    for number, places in enumerate(folds_of([example.label for example in examples]), 1):
        fold = [examples[place] for place in places]
        seen = {tuple(sorted(example.fields.items())) for example in fold}
        unseen = [
            replace(one, demonstrations=tuple(shown for shown in one.demonstrations if tuple(sorted(shown[0].items())) not in seen))
            for one in contexts
        ]
        said = scorer.label_scores(unseen, [*fold, *asked], f"labelled examples, fold {number}")  # [C, fold + P, L]
        scores = with_the_teachers_lean(said[:, : len(fold)], said[:, len(fold) :], usual)
        rows += [
            {"context_id": context.context_id, "example_id": example.example_id, "label_logprobs": answer.astype(np.float32)}
            for context, own in zip(contexts, scores, strict=True)
            for example, answer in zip(fold, own, strict=True)
        ]
    return pa.Table.from_pylist(rows, schema=LABELLED)


def content_free(task: Task) -> list[Example]:
    """The task's inputs without content, each put into every field; none if answers are free text, which is not calibrated."""
    texts = task.params.content_free if task.params.completion is None else ()
    return [Example(dict.fromkeys(task.fields, text)) for text in texts]


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in figures.items()}


def _fidelity_once(scorer: Scorer, store: Store, contexts: Sequence[Context], examples: Sequence[Example]) -> dict[str, Any]:
    """Figures of fidelity, measured once for a request and kept beside the store's rows: measuring them asks the model."""
    kept = store.folder / f"fidelity-{sha256_json(list(scorer.keys))[:32]}.json"
    try:
        return read_json(kept)
    except (FileNotFoundError, CorruptError):
        measure = _fidelity if scorer.server is None else _server_fidelity
        write_json(_rounded(measure(scorer, store, contexts, examples)), kept)
        return read_json(kept)


def _fidelity(scorer: Scorer, store: Store, contexts: Sequence[Context], examples: Sequence[Example]) -> dict[str, float]:
    """Figures of `cache.fidelity`. Examples are taken one after the other, so that memory has the whole distributions of one."""
    keys, numbers = scorer.keys, _numbers(examples)
    chosen = [examples[number] for number in numbers]
    has_context = any(context.context_id != NO_CONTEXT.context_id for context in contexts)

    def pieces() -> Iterator[tuple[Tensor, Distributions, Tensor | None]]:
        for place, context in enumerate(contexts[:FIDELITY_CONTEXTS]):
            rows = store.read([keys[place * len(examples) + number] for number in numbers])
            answers = rows["completion_ids"].to_pylist() if scorer.tokens.task.params.completion is not None else None
            live = scorer.distributions(context, chosen, answers)
            students = scorer.distributions(NO_CONTEXT, chosen, answers) if has_context else repeat(None)
            for number, (distribution, student) in enumerate(zip(live, students, strict=False)):
                yield distribution, decode(rows.slice(number, 1), scorer.cache), student

    figures = fidelity(pieces(), scorer.cache.resolution_nats)
    del figures["positions"]
    labels = store.read(keys, ["label_logprobs", "label_bounds"])
    unknown = censored(labels) if any(labels["label_bounds"].to_pylist()) else {}  # of many labels not all are followed
    return {"scored_again": len(chosen) * len(contexts[:FIDELITY_CONTEXTS]), **figures, **unknown}


def _numbers(examples: Sequence[Example]) -> list[int]:
    """Which examples are scored once more."""
    order = sorted(range(len(examples)), key=lambda number: examples[number].example_id)
    return order[:: max(1, len(examples) // FIDELITY_ROWS)][:FIDELITY_ROWS]


def _server_fidelity(scorer: Scorer, store: Store, contexts: Sequence[Context], examples: Sequence[Example]) -> dict[str, float]:
    """Figures of `teachers.server_rows.server_fidelity`."""
    from pipeline.teachers.server_rows import server_fidelity

    keys, numbers, some = scorer.keys, _numbers(examples), contexts[:FIDELITY_CONTEXTS]
    columns = ["label_logprobs", "label_bounds", "completion_ids", "topk_ids", "tail_mass"]
    chosen = store.read([keys[place * len(examples) + number] for place in range(len(some)) for number in numbers], columns)
    again = scorer.asked_again(some, [examples[number] for number in numbers])
    return {"scored_again": len(chosen), **server_fidelity(store.read(keys, columns), chosen, again)}
