"""The risks of a distilled student, checked: flips under swaps, gaps between slices, disagreement by confidence, words behind it.

Everything is computed from the predictions on disk, but for the swapped and shortened texts, which the student answers through the store of
scores: the same texts are never asked twice.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl

from pipeline.teachers.scorer import Query, Scorer
from pipeline.teachers.scores import LABELS_ALONE
from pipeline.targets.calibration import normalised
from pipeline.evaluation.attribution import attribute, disagreements
from pipeline.evaluation.detail import membership
from pipeline.evaluation.flips import Answered, Ask, Fields, flips
from pipeline.evaluation.gaps import by_confidence, gaps
from pipeline.evaluation.predict import Rows, read_sets
from pipeline.files import write_json
from pipeline.files import example_id
from pipeline.evaluation.metrics import check_probabilities, example_scores, frames, rounded
from pipeline.models.provenance import check_provenance
from pipeline.params import Params, pick
from pipeline.schema import PREDICTIONS, read_table
from pipeline.task import Task


def check_student(name: str, params: Params, artifacts: Path, output: Path, work: Path) -> None:
    """Write the risk checks of a student to the file `output`: `swaps`, `gaps`, `disagreement`, `attributions`."""
    pick("students", params.students, name)
    if params.task.completion is not None:
        write_json({"student": name, "skipped": "answers are free text, and the checks compare probabilities of labels"}, output)
        return
    task, reference = Task(params.task), params.evaluation.reference
    folder, sets = artifacts / "students" / name, artifacts / "data" / "evaluation"
    check_provenance(folder).check_task(task.params)
    rows = read_sets(sets, list(params.data.evaluation), task)
    domains = {key: entry.domain for key, entry in params.data.evaluation.items()}
    ours, theirs = (
        frames(read_table(artifacts / "predictions" / f"{method}.parquet", PREDICTIONS), task.labels) for method in (name, reference)
    )
    mine, other = (answered_by(predictions, rows, task) for predictions in (ours, theirs))
    ask = asker(Scorer(folder, task, LABELS_ALONE, work, params.runtime.threads), task, f"check {name}")
    scores = [{key: example_scores(frame, key) for key, frame in predictions.items()} for predictions in (ours, theirs)]
    members = {key: membership(pl.read_parquet(sets / f"{key}.parquet"), task.fields) for key in rows}
    document = {
        "student": name,
        "reference": reference,
        "swaps": rounded(flips(mine, ask, task.labels, params.evaluation.risk_examples)),
        "gaps": gaps(scores[0], scores[1], task.labels, members, domains),
        "disagreement": [disagreement(mine, other, task.labels, domains, domain) for domain in ("in", "out") if domain in domains.values()],
        **rounded(attributions(mine, other, ask, task.labels)),
    }
    write_json(document, output)


def answered_by(predictions: Mapping[str, pl.DataFrame], sets: Mapping[str, Rows], task: Task) -> list[Answered]:
    """The examples of all sets, in their order, with a method's answers; it answers each once."""
    found = []
    for name, rows in sets.items():
        frame = predictions[name]
        place = {example: at for at, example in enumerate(frame["example_id"])}
        probabilities = check_probabilities(frame, task.labels, name)
        for row in rows:
            fields = {field: row[field] for field in task.fields}
            found.append(Answered(name, row["example_id"], fields, row["label"], probabilities[place[row["example_id"]]]))
    return found


def asker(scorer: Scorer, task: Task, title: str) -> Ask:
    """A function that puts inputs to a model with no context; equal inputs are asked once."""

    def ask(inputs: Sequence[Fields]) -> np.ndarray:
        ids = [example_id(dict(fields)) for fields in inputs]
        queries = {key: Query(key, {field: fields[field] for field in task.fields}) for key, fields in zip(ids, inputs, strict=True)}
        table = scorer.score([""], list(queries.values()), title)
        found = dict(zip(table["example_id"].to_pylist(), table["label_logprobs"].to_pylist(), strict=True))
        return np.exp(normalised(np.array([found[key] for key in ids])))

    return cast("Ask", ask)


def disagreement(
    mine: Sequence[Answered], other: Sequence[Answered], labels: Sequence[str], domains: Mapping[str, str], domain: str
) -> dict[str, Any]:
    """How often student and reference answer differently in a domain, over all and by the confidence of each (`gaps.by_confidence`)."""
    pairs = [(a, b) for a, b in zip(mine, other, strict=True) if domains[a.set] == domain]
    gold = np.array([labels.index(a.label) for a, _ in pairs])
    ours, theirs = (np.stack([pair[side].probabilities for pair in pairs]) for side in (0, 1))
    differ = ours.argmax(axis=1) != theirs.argmax(axis=1)
    right, right_reference = ours.argmax(axis=1) == gold, theirs.argmax(axis=1) == gold
    found = {
        "domain": domain,
        "n": len(pairs),
        "share": float(differ.mean()),
        "by_student_confidence": by_confidence(ours.max(axis=1), differ, right, right_reference),
        "by_reference_confidence": by_confidence(theirs.max(axis=1), differ, right, right_reference),
    }
    return rounded(found)


def attributions(mine: Sequence[Answered], other: Sequence[Answered], ask: Ask, labels: Sequence[str]) -> dict[str, Any]:
    """`attributions` of sampled disagreements: both answers with their probabilities, and the words' weights for the student's answer."""
    chosen, long = disagreements(mine, other)
    answers = [int(mine[place].probabilities.argmax()) for place, _ in chosen]
    words = attribute([mine[place].fields for place, _ in chosen], answers, ask)
    entries = []
    for (place, at), own in zip(chosen, words, strict=True):
        entry: dict[str, Any] = {"set": mine[place].set, "example_id": mine[place].example_id, "fields": dict(mine[place].fields)}
        entry["label"] = mine[place].label
        for who, answer in (("student", mine[place]), ("reference", other[at])):
            best = int(answer.probabilities.argmax())
            entry |= {who: labels[best], f"{who}_p": float(answer.probabilities[best])}
        entries.append({**entry, "words": own})
    return {"attributions": entries, "attributions_skipped_long": long}
