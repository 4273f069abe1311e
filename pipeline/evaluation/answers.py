"""Answers in free text of students and baselines on the evaluation sets, as rows on disk from which every number is made.

All are written by the same generator with the task's own limits: a student behind no context, a teacher's prompts in each of its contexts,
a model folder as it came. Answers go through the store, so that none is written twice.
"""

from pathlib import Path

import pyarrow as pa

from pipeline.teachers.scorer import Query, Scorer
from pipeline.teachers.scores import LABELS_ALONE
from pipeline.evaluation.predict import Rows, read_sets
from pipeline.files import context_id
from pipeline.models.loading import load_tokenizer
from pipeline.models.provenance import check_provenance
from pipeline.params import Params, TaskParams
from pipeline.schema import ANSWERS, CONTEXTS, read_table
from pipeline.task import Task

COLUMNS = ["context_id", "example_id", "completion_ids"]


def answer_sets(name: str, params: Params, artifacts: Path, work: Path) -> pa.Table:
    """`schema.ANSWERS` rows of a student or baseline: sets outermost, then contexts, then examples.

    Raises MismatchError where a student was trained for another template or other answers.
    """
    task = Task(_written(params.task))
    sets = read_sets(artifacts / "data" / "evaluation", list(params.data.evaluation), task)
    if name in params.students:
        folder = artifacts / "students" / name
        check_provenance(folder).check_task(params.task)
        return _answers(Scorer(folder, task, LABELS_ALONE, work, params.runtime.threads), [""], task, sets, folder, name)
    prompts = params.baselines[name].prompts
    if not prompts.startswith("scores/"):
        folder = artifacts / prompts
        return _answers(Scorer(folder, task, LABELS_ALONE, work, params.runtime.threads), [""], task, sets, folder, name)
    teacher = params.teachers[prompts.removeprefix("scores/")]
    contexts = read_table(artifacts / "data" / "contexts" / f"{teacher.contexts}.parquet", CONTEXTS)["text"].to_pylist()
    folder = artifacts / teacher.model
    scorer = Scorer(folder, task, teacher.cache, work, params.runtime.threads, teacher.dtype)
    return _answers(scorer, contexts, task, sets, folder, name)


def _written(task: TaskParams) -> TaskParams:
    """The task with answers that the model asked writes itself: those that are given must not be taken for its own."""
    assert task.completion is not None
    return task.model_copy(update={"completion": task.completion.model_copy(update={"source": "generated"})})


def _answers(scorer: Scorer, contexts: list[str], task: Task, sets: dict[str, Rows], folder: Path, name: str) -> pa.Table:
    queries: dict[str, Query] = {}
    for rows in sets.values():
        for row in rows:
            query = Query(row["example_id"], {field: row[field] for field in task.fields}, row["completion"])
            queries.setdefault(row["example_id"], query)
    scored = scorer.score(contexts, list(queries.values()), f"evaluate {name}", COLUMNS).to_pylist()
    answers = {(row["context_id"], row["example_id"]): row["completion_ids"] for row in scored}
    tokenizer = load_tokenizer(folder)
    found = []
    for key, rows in sets.items():
        for context in map(context_id, contexts):
            for row in rows:
                ids = answers[context, row["example_id"]]
                found.append(
                    {
                        "set": key,
                        "context_id": context if any(contexts) else "",
                        "example_id": row["example_id"],
                        "label": row["label"],
                        "answer": tokenizer.decode(ids, skip_special_tokens=True),
                        "tokens": len(ids),
                    }
                )
    return pa.Table.from_pylist(found, schema=ANSWERS)
