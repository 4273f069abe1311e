"""Stage one: a teacher answers every transfer example in each of its contexts, once, and the answers become a score cache.

Inputs without content are scored along with the transfer set, a row for each context: contextual calibration needs them, and they cost
next to nothing.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache.folder import read_cache, write_shards
from pipeline.cache.keys import ExampleIds
from pipeline.teachers.scorer import Query, Scorer
from pipeline.errors import UsageError
from pipeline.files import one_writer, write_json
from pipeline.files import example_id
from pipeline.params import CacheParams
from pipeline.schema import CONTEXTS, read_table
from pipeline.task import Task
from pipeline.teachers.live_fidelity import live_fidelity
from pipeline.teachers.transfer import Joined, TransferSet


def capture(
    name: str,
    model_folder: Path,
    contexts_file: Path,
    transfer_file: Path,
    output: Path,
    task: Task,
    cache: CacheParams,
    dtype: str,
    work: Path,
    threads: int | None,
    runtime: Path | None = None,
    metrics: Path | None = None,
    *,
    on_ray: bool = False,
    workers: int | None = None,
) -> None:
    """Write the score cache of teacher `name` to `output`: rows for every context × (content-free input, transfer example).

    A task `of_texts` is read token by token, for the distributions at each.

    Rows that the store under `work` holds are not scored again. `runtime` is the file for what the capture took (no output of DVC: it holds
    seconds), `metrics` that for the cache's fidelity. `on_ray`, the model is loaded and asked by so many `workers` of Ray, to the same
    bytes. Raises UsageError where a prompt does not fit the model.
    """
    contexts, free, transfer = asked(contexts_file, transfer_file, task)
    with _scorer(model_folder, task, cache, work, threads, dtype, on_ray, workers) as scorer:
        _capture(scorer, name, (contexts, free, transfer), output, work, runtime, metrics)


@contextmanager
def _scorer(
    folder: Path, task: Task, cache: CacheParams, work: Path, threads: int | None, dtype: str, on_ray: bool, workers: int | None
) -> Iterator[Scorer]:
    if not on_ray:
        yield Scorer(folder, task, cache, work, threads, dtype)
        return
    from pipeline.teachers.ray_scorer import RayScorer

    with closing(RayScorer(folder, task, cache, work, threads, dtype, workers)) as scorer:
        yield scorer


def _capture(
    scorer: Scorer,
    name: str,
    questions: tuple[list[dict[str, Any]], list[Query], TransferSet],
    output: Path,
    work: Path,
    runtime: Path | None,
    metrics: Path | None,
) -> None:
    contexts, free, transfer = questions
    queries = Joined(free, transfer)
    texts = [context["text"] for context in contexts]
    rows = scorer.tables(texts, queries, f"teacher {name}")
    about = {
        "teacher": name,
        "model": "/".join(scorer.model_folder.parts[-2:]),
        "engine": scorer.engine_report,
        "labels": list(scorer.tokens.task.labels),
        "contexts": [{key: context[key] for key in ("context_id", "name", "tokens")} for context in contexts],
        "content_free": [query.example_id for query in free],
        "examples": len(transfer),
    }
    with one_writer(output):  # a second run writes when this one has read what it wrote
        write_shards(output, rows, scorer.fingerprint, about)
        if metrics is not None:
            write_json(live_fidelity(scorer, texts, transfer, output, work), metrics)
        if runtime is not None:
            seconds, timed = scorer.seconds(texts, queries)
            prompts = read_cache(output, ["prompt_tokens"]).rows["prompt_tokens"].to_numpy()
            tokens = int(np.sum(prompts))
            write_json({"seconds": round(seconds, 3), "rows": len(prompts), "rows_timed": timed, "prompt_tokens": tokens}, runtime)


def asked(contexts_file: Path, transfer_file: Path, task: Task) -> tuple[list[dict[str, Any]], list[Query], TransferSet]:
    """What a capture asks: contexts as rows of `schema.CONTEXTS`, inputs without content, the transfer set.

    A cache's rows are each context × (inputs without content, then the transfer set), in this order. Raises UsageError where an example
    would be asked twice.
    """
    contexts = read_table(contexts_file, CONTEXTS).to_pylist()
    transfer, free = TransferSet(transfer_file, task.fields), content_free_queries(task)
    if not ExampleIds(query.example_id for query in Joined(free, transfer)).all_different:
        raise UsageError(f"{transfer_file}: an example stands twice, or is one of task.content_free; run `dvc repro prepare`.")
    return contexts, free, transfer


def content_free_queries(task: Task) -> list[Query]:
    """The task's inputs without content, each put into every field; none where answers are free text, which is not calibrated."""
    if task.params.completion is not None:
        return []
    inputs = [dict.fromkeys(task.fields, text) for text in task.params.content_free]
    return [Query(example_id(fields), fields) for fields in inputs]
