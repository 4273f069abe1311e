"""The stage `select`: it chooses the student that commands use by default.

Students are compared on the texts that all of them held back, so that none is judged by what it learnt. A student's score is the mean
probability that the reference's target set gives to the label that the student answers: how often the teacher expects it to be right. One
target set judges all students, whichever each of them learnt from. Texts that it lacks, those of a pool, do not count. Evaluation sets have
no say.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.errors import UsageError
from pipeline.evaluation.cost import measured_apart
from pipeline.evaluation.metrics import rounded
from pipeline.evaluation.predictions import Answering
from pipeline.files import Folders, write_json
from pipeline.models.held_back import HELD_BACK, HELD_BACK_FILE
from pipeline.models.process import cores
from pipeline.models.trained import Trained, open_trained
from pipeline.params import DEMONSTRATIONS_FILE, Params, StudentParams
from pipeline.schema import TARGETS, read_examples, read_table

MOST_TIMED = 32
"""Held-back texts that a student is timed on."""
EQUAL = 1e-9
"""Scores that differ by no more are equal."""


def select_student(params: Params, folders: Folders) -> None:
    """Write artifacts/best.json; and metrics/runtime/select.json, which no stage tracks, if `select.within_ms` is set.

    best.json has `student`, the chosen one or None; `targets`, the target set that judges; `texts`, their number; `candidates`, the best
    first, each with its `score` (a share), `standard_error` (None for one text) and `parameters`; `no_candidates`, each with the reason. Of
    equal scores the student of fewer parameters is chosen. Raises UsageError if no candidate is quick enough, CorruptError if a student's
    folder is damaged, MismatchError if it is of another task.
    """
    reasons = {name: reason for name, student in params.students.items() if (reason := _reason_against(student))}
    students = {name: open_trained(folders.artifacts / "students" / name) for name in params.students if name not in reasons}
    for student in students.values():
        student.check_task(params.task)
    judge = params.baselines[params.evaluation.reference].target_set
    texts, scores = list[str](), dict[str, npt.NDArray[np.float64]]()
    if students:
        targets = _rows(folders.artifacts / "targets" / judge / "targets.parquet", TARGETS, "probabilities")
        answers = {name: _rows(student.folder / HELD_BACK_FILE, HELD_BACK, "label_logprobs") for name, student in students.items()}
        texts = sorted(targets.keys() & set.intersection(*map(set, answers.values())))
        scores = {name: np.array([targets[text][own[text].argmax()] for text in texts]) for name, own in answers.items()}  # [N] each
    if not texts:
        reasons |= dict.fromkeys(students, f"the candidates ({', '.join(students)}) held back no text in common that targets/{judge} has")
    elif params.select.within_ms is not None:
        reasons |= dict.fromkeys(_slow(students, texts, params, folders), "it is slower than select.within_ms")
    candidates = {
        name: {
            "score": float(scores[name].mean()),
            "standard_error": float(scores[name].std(ddof=1) / np.sqrt(len(texts))) if len(texts) > 1 else None,
            "parameters": student.manifest["counts"]["parameters"],
        }
        for name, student in students.items()
        if name not in reasons
    }
    ranked = sorted(candidates, key=lambda name: -candidates[name]["score"])
    best = [name for name in ranked if candidates[ranked[0]]["score"] - candidates[name]["score"] <= EQUAL]
    document = {
        "student": min(best, key=lambda name: candidates[name]["parameters"], default=None),
        "targets": judge,
        "texts": len(texts),
        "candidates": {name: candidates[name] for name in ranked},
        "no_candidates": reasons,
    }
    write_json(rounded(document), folders.artifacts / "best.json")


def _reason_against(student: StudentParams) -> str | None:
    """Why a student is no candidate, as far as its params say; None if it is one."""
    if student.learn_from == DEMONSTRATIONS_FILE:
        return "it learns from labels alone"
    if not student.holds_back:
        return "it learns from a teacher's cache, not from a target set or a round"
    return None if student.held_back else "its `held_back` is 0"


def _rows(path: Path, schema: pa.Schema, column: str) -> dict[str, npt.NDArray[np.float64]]:
    """A column of N lists, [L] each, by the example's id."""
    rows = read_table(path, schema).to_pylist()
    return {row["example_id"]: np.array(row[column], dtype=np.float64) for row in rows}


def _slow(students: Mapping[str, Trained], texts: Sequence[str], params: Params, folders: Folders) -> list[str]:
    """The students whose median time for one of `texts` is above `select.within_ms`; it is that of the report's table of costs.

    Raises UsageError if all are.
    """
    limit, threads = params.select.within_ms, params.runtime.threads or cores()
    assert limit is not None
    examples = read_examples(folders.artifacts / "data" / "transfer.parquet", params.task.fields)
    by_id = {example.example_id: example for example in examples}
    asked, times = [by_id[text] for text in texts[:MOST_TIMED]], dict[str, float]()
    for name, student in students.items():
        models = [Answering(student.folder, format=student.task.format)]
        times[name] = measured_apart(name, models, params.task, asked, len(asked), threads)["latency_ms"]
    write_json({"latency_ms": times, "texts": len(asked), "threads": threads}, folders.metrics / "runtime" / "select.json")
    slow, quickest = [name for name, time in times.items() if time > limit], min(times, key=times.__getitem__)
    if len(slow) == len(times):
        raise UsageError(
            f"select.within_ms: {limit:g}, and no student is that quick on this machine. The quickest, {quickest!r}, takes "
            f"{times[quickest]:g} ms a text (median of {len(asked)}, {threads} threads). Raise the limit, or add a student with fewer "
            "`layers` or of a smaller `base`."
        )
    return slow
