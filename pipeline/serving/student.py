"""A student's folder as something that can be asked: its task from provenance.json, checked against its bytes and its tokenizer.

The template and the verbalisers travel with the student, so that no params.yaml is needed to use one, and none can disagree with it.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.models.loading import check_folder, load_tokenizer
from pipeline.models.provenance import check_provenance
from pipeline.task import Task, TaskTokens


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

    Raises UsageError where it is no student's folder, MismatchError where its weights, tokenizer or task are not those of its training,
    or the tokenizer no longer gives its verbalisers the ids that it was trained with.
    """
    check_folder(folder)
    provenance = check_provenance(folder)
    if provenance.task.completion is not None:
        raise UsageError(
            f"{folder}: this student answers in free text, and predict, serve, monitor and export are for labels. It is a plain "
            'transformers folder: docs/using.md, "A student that answers in free text", asks it in three lines.'
        )
    tokens = TaskTokens(Task(provenance.task), load_tokenizer(folder))
    provenance.check_tokens(tokens)
    identity = provenance.identity
    return Student(folder, provenance.name, tokens, identity["weights_sha256"], identity["tokenizer_sha256"])
