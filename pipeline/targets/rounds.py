"""A round: a student answers the transfer set and the pool, for other students to learn from.

A student costs a small part of its teachers, so it can answer many more texts than they did. Its answers are a target set like that of
teachers, with texts of its own.
"""

from dataclasses import replace

import numpy as np
import pyarrow as pa
from scipy.special import softmax

from pipeline.cache.folder import described_task
from pipeline.files import Folders, write_json
from pipeline.models.trained import open_trained
from pipeline.params import Params, pick
from pipeline.schema import NO_CONTEXT, TARGETS, read_examples, write_examples, write_table
from pipeline.task import Task
from pipeline.teachers.scorer import Scorer


def build_round(name: str, params: Params, folders: Folders) -> None:
    """Write artifacts/rounds/NAME: texts.parquet, targets.parquet, and calibration.json, which says what answered them and how.

    Targets are softmax(log-probabilities of the labels / (the student's temperature × the round's)). Also writes
    metrics/runtime/round-NAME.json, which no stage tracks.
    Rows in the store are not scored again. Raises CorruptError if the student is damaged, MismatchError if it is of another task.
    """
    entry, task, output = pick("rounds", params.rounds, name), Task(params.task), folders.artifacts / "rounds" / name
    student = open_trained(folders.artifacts / "students" / entry.student)
    student.check_task(params.task)
    examples = [e for role in ("transfer", "pool") for e in read_examples(folders.artifacts / "data" / f"{role}.parquet", task.fields)]
    scorer = Scorer(student.folder, replace(task, format=student.task.format), work=folders.work, threads=params.runtime.threads)
    scores = scorer.label_scores([NO_CONTEXT], examples, f"round {name}")[0]  # [N, L]
    probabilities = softmax(scores / (student.temperature * entry.temperature), axis=-1)
    columns = {
        "example_id": [example.example_id for example in examples],
        "probabilities": pa.array(list(probabilities.astype(np.float32)), TARGETS.field("probabilities").type),
        "agreement": np.ones(len(examples), dtype=np.float32),
    }
    write_examples(examples, task.fields, output / "texts.parquet")
    write_table(pa.table(columns, schema=TARGETS), output / "targets.parquet")
    about = {"round": name, "labels": list(task.labels), **described_task(task), **entry.model_dump(), "identity": scorer.identity}
    write_json(about, output / "calibration.json")
    assert scorer.store is not None
    runtime = {"seconds": round(scorer.store.seconds(scorer.keys), 3), "rows": len(examples), "rows_timed": len(examples)}
    write_json(runtime, folders.metrics / "runtime" / f"round-{name}.json")
