"""What a trained folder (a student, a tuned teacher) says of itself, in its manifest.json.

A student's numbers mean something only with the tokenizer, template and verbalisers that it was trained with. They travel in the folder,
and the manifest has the hash of each file, so that a copy that is not whole, or a file changed by hand, is refused by name. The trade-off:
opening a student reads all its bytes, a second for a gigabyte; where there is a `.work`, only if they were touched since.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.files import MANIFEST, Folders, check_manifest
from pipeline.models.folders import load_tokenizer, remembered_sha256
from pipeline.params import TaskParams
from pipeline.task import Task, TaskTokens


@dataclass(frozen=True)
class Trained:
    """A trained folder whose files were compared with its manifest."""

    folder: Path
    name: str
    task: Task
    """What it was trained to answer."""
    tokens: TaskTokens
    """That task in the folder's tokenizer."""
    manifest: dict[str, Any]

    def check_task(self, params: TaskParams) -> None:
        """Raise MismatchError if params.yaml asks with another template, other verbalisers or another completion."""
        for key, own, other in (
            ("template", self.task.params.template, params.template),
            ("verbalisers", self.task.params.verbalisers, params.verbalisers),
            ("completion", self.task.params.answering, params.answering),
        ):
            if own != other:
                raise MismatchError(f"{self.folder}: trained with task.{key} {own!r}, and params.yaml has {other!r}. Run `dvc repro`.")


def about_trained(name: str, tokens: TaskTokens, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What a trained folder's manifest says beside its files; `provenance` is what the training adds."""
    task = tokens.task
    completions = dict(zip(task.labels, tokens.completions, strict=True)) if tokens.completions else {}
    about = {"name": name, "task": task.params.model_dump(mode="json"), "labels": list(task.labels), "completions": completions}
    return {**about, **provenance}


def open_trained(folder: Path) -> Trained:
    """Check a trained folder and read what it was trained to answer, without loading its weights.

    Raises UsageError if it has no manifest, CorruptError naming each file that differs from it, MismatchError if this tokenizer library
    gives a verbaliser other ids than in training.
    """
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder / MANIFEST}: no such file, so nothing says what this model was trained to answer. Is it a student's folder?"
        )
    work = Folders.here().work
    manifest = check_manifest(folder, partial(remembered_sha256, folder=work / "hashes" if work.is_dir() else None))
    try:
        task, name, completions = Task(TaskParams.model_validate(manifest["task"])), str(manifest["name"]), dict(manifest["completions"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"{folder / MANIFEST}: not a trained model's manifest ({error}). Make the folder again with `dvc repro`."
        ) from None
    tokens = TaskTokens(task, load_tokenizer(folder))
    for label, ids in zip(task.labels if tokens.completions else (), tokens.completions, strict=True):
        if ids != completions.get(label):
            raise MismatchError(
                f"{folder}: the tokenizer turns the verbaliser of {label!r} into {ids}, and it was trained with {completions.get(label)}. "
                "Train it again with `dvc repro`, or use the transformers and tokenizers that it was trained with."
            )
    return Trained(folder, name, task, tokens, manifest)
