"""A student's folder as something that can be asked: its task from provenance.json, checked against its tokenizer.

The template and the verbalisers travel with the student, so that no params.yaml is needed to use one, and none can disagree with it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import MismatchError, UsageError
from pipeline.files import read_json
from pipeline.models.identity import tokenizer_sha256, weights_sha256
from pipeline.models.loading import check_folder, load_tokenizer
from pipeline.params import TaskParams
from pipeline.tasks import Task, TaskTokens


@dataclass(frozen=True)
class Student:
    """A checked folder: what it asks and answers, and which bytes it consists of."""

    folder: Path
    name: str
    tokens: TaskTokens
    weights_sha256: str
    tokenizer_sha256: str

    @property
    def task(self) -> Task:
        """Template and labels."""
        return self.tokens.task


def open_student(folder: Path) -> Student:
    """Check a student's folder, without loading its weights into memory.

    Raises UsageError where it is no student's folder, MismatchError where its tokenizer no longer gives its verbalisers the ids that it
    was trained with.
    """
    check_folder(folder)
    task, ids, name = _task(folder / "provenance.json")
    tokens = TaskTokens(task, load_tokenizer(folder))
    found = dict(zip(task.labels, tokens.completions, strict=True))
    if different := [label for label in task.labels if found[label] != ids[label]]:
        label = different[0]
        raise MismatchError(
            f"{folder}: the tokenizer turns the verbaliser of {label!r} into {found[label]}, and the student was trained with {ids[label]}."
            " The tokenizer's files are not the student's own: make the folder again with `dvc repro`, or copy it whole."
        )
    return Student(folder, name, tokens, weights_sha256(folder), tokenizer_sha256(folder))


def _task(file: Path) -> tuple[Task, dict[str, list[int]], str]:
    """Task, ids of each label's verbaliser, and name, as provenance.json has them."""
    if not file.is_file():
        raise UsageError(f"{file}: no such file, so nothing says what this model was trained to answer; is it a student's folder?")
    try:
        found: dict[str, Any] = read_json(file)
        if found.get("completion") is not None:
            raise UsageError(
                f"{file.parent}: this student answers in free text, and predict, serve, monitor and export are for labels. It is a plain "
                'transformers folder: docs/using.md, "A student that answers in free text", asks it in three lines.'
            )
        verbalisers = {label: found["verbalisers"][label] for label in found["labels"]}
        params = TaskParams(template=found["template"], verbalisers={label: entry["text"] for label, entry in verbalisers.items()})
        ids = {label: list(entry["ids"]) for label, entry in verbalisers.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fault = f"no entry {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}: cannot be read as a student's provenance ({fault}); `dvc repro` writes it.") from None
    return Task(params), ids, str(found.get("name", file.parent.name))
