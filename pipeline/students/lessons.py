"""What a student learns from, read from artifacts and checked against the task: target sets, and the demonstrations' gold labels.

A student's prompt has no demonstrations: its ids are the beginning-of-text token, where the tokenizer has one, and the query.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import CorruptError, MismatchError, UsageError, choices
from pipeline.files import read_sealed_json
from pipeline.files import sha256_json
from pipeline.places import Place, sha256_of
from pipeline.schema import TARGETS, examples, read_table
from pipeline.students.batches import Example
from pipeline.students.cached import CachedRow
from pipeline.task import TaskTokens


def demonstrations(file: Path, tokens: TaskTokens) -> tuple[Example, ...]:
    """The demonstrations, each with all probability on its gold label.

    Raises MismatchError where one has no label of the task.
    """
    rows = read_table(file, examples(tokens.task.fields)).to_pylist()
    labels = tokens.task.labels
    for row in rows:
        if row["label"] not in labels:
            raise MismatchError(
                f"{file}: example {row['example_id']} has the label {row['label']!r}, which is none of {choices(labels)}; "
                "run `dvc repro prepare`."
            )
    one_hot = [tuple(float(label == row["label"]) for label in labels) for row in rows]
    return _examples(file, rows, one_hot, tokens)


def target_set(folder: Place, transfer_file: Path, tokens: TaskTokens) -> tuple[Example, ...]:
    """The examples of a target set, here or at a URL (`places.place`), in its order, with target distributions in the task's labels' order.

    Raises MismatchError where the targets were made for another template, verbalisers or labels, or have an example that the transfer set
    lacks.
    """
    calibration_file, targets_file = folder / "calibration.json", folder / "targets.parquet"
    calibration = read_sealed_json(_there(calibration_file))
    task = tokens.task
    present = {"template": task.params.template, "verbalisers": dict(task.params.verbalisers)}
    again = f"run `dvc repro targets@{folder.name}`."
    for key, value in present.items():
        if calibration.get(key, value) != value:
            raise MismatchError(f"{calibration_file}: made with {key} {calibration[key]!r}, this run has {value!r}; {again}")
    if sorted(calibration["labels"]) != sorted(task.labels):
        raise MismatchError(
            f"{calibration_file}: made for the labels {choices(calibration['labels'])}, not {choices(task.labels)}; {again}"
        )
    written = calibration.get("targets_sha256")
    if written is not None and sha256_of(_there(targets_file)) != written:
        raise CorruptError(f"{targets_file}: is not the one that {calibration_file.name} was written with; {again}")
    columns = [calibration["labels"].index(label) for label in task.labels]
    fields = {row["example_id"]: row for row in read_table(_there(transfer_file), examples(task.fields)).to_pylist()}
    rows, distributions = [], []
    for target in read_table(_there(targets_file), TARGETS).to_pylist():
        if target["example_id"] not in fields:
            raise MismatchError(f"{targets_file}: example {target['example_id']} is not in {transfer_file}; {again}")
        rows.append(fields[target["example_id"]])
        distributions.append(tuple(target["probabilities"][column] for column in columns))
    return _examples(targets_file, rows, distributions, tokens)


def targets_fingerprint(folder: Place) -> dict[str, str]:
    """Hashes of a target set: of its rows, and of what says how they were made."""
    return {
        "targets": sha256_of(folder / "targets.parquet"),
        "calibration": sha256_json(read_sealed_json(folder / "calibration.json")),
    }


def check_lengths(lessons: Sequence[Example], cached: Sequence[CachedRow], tokens: TaskTokens, limit: int | None, base: Path) -> None:
    """Raise UsageError where an example with its answer is longer than the model takes."""
    branch = max(map(len, tokens.completions), default=1) - 1
    lengths = [(len(example.ids) + branch, example.example_id) for example in lessons]
    longest, example_id = max(lengths + [(len(row.ids) + row.positions - 1, row.example_id) for row in cached])
    if limit is not None and longest > limit:
        raise UsageError(
            f"example {example_id} has {longest} tokens with its answer, and {base} takes {limit}; "
            "lower task.max_chars, so that longer inputs are quarantined."
        )


def _examples(file: Place, rows: Sequence[dict[str, Any]], targets: Sequence[tuple[float, ...]], tokens: TaskTokens) -> tuple[Example, ...]:
    if not rows:
        raise MismatchError(f"{file}: no rows; a student needs at least one example to learn from.")
    prefix = tokens.prefix_ids("")
    queries = tokens.query_ids([tokens.task.query(row) for row in rows])
    triples = zip(rows, queries, targets, strict=True)
    return tuple(Example(row["example_id"], (*prefix, *query), target) for row, query, target in triples)


def _there(file: Place) -> Place:
    if not file.is_file():
        raise UsageError(f"{file}: no such file; `dvc repro` makes it.")
    return file
