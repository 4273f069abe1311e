"""What a trained folder (a student, a tuned teacher) says of itself, in its manifest.json.

A student's numbers mean something only with the tokenizer, template and verbalisers that it was trained with, so they travel in the folder.
Opening one compares all its bytes with the manifest's hashes: a second for a gigabyte.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.errors import CorruptError, MismatchError, UsageError
from pipeline.files import MANIFEST, check_manifest
from pipeline.params import TaskParams
from pipeline.task import ChatTokens, EncoderTokens, Task, TaskTokens, TextTokens


@dataclass(frozen=True)
class Trained:
    """A trained folder whose files were compared with its manifest."""

    folder: Path
    name: str
    task: Task  # what it was trained to answer
    tokens: TaskTokens  # that task in the folder's tokenizer
    manifest: dict[str, Any]

    @property
    def temperature(self) -> float:
        """Of its probabilities: they are softmax(log-probabilities of the labels / temperature)."""
        return float(self.manifest.get("temperature", 1.0))

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
    completions = dict(zip(task.labels, tokens.completions, strict=False))  # none if answers are free text, which may have labels too
    about = {"name": name, "task": task.params.model_dump(mode="json"), "labels": list(task.labels), "completions": completions}
    about |= {"format": task.format, "frame": tokens.frame}
    return {**about, **provenance}


def load_tokens(task: Task, folder: Path) -> TaskTokens:
    """A task in the ids of a folder's model, or of a server's. Raises UsageError if it cannot answer the task in its format."""
    from pipeline.models import folders  # brings torch, which an exported folder does without

    kind, own = ChatTokens if task.format == "chat" else TaskTokens, folder
    if (server := folders.server_of(folder)) is not None:
        if server["settings"]["tokenizer"] is None:
            return TextTokens(task)
        own = folder.parent.parent / server["settings"]["tokenizer"]
        if server["settings"]["sends"] == "text":
            return TextTokens(task, None if task.params.completion is None else kind(task, folders.load_tokenizer(own)))
    elif folders.is_encoder(folders.load_config(folder)):
        kind = EncoderTokens
    return kind(task, folders.load_tokenizer(own), folders.context_limit(folder))


def open_trained(folder: Path, tokens_of: Callable[[Task, Path], TaskTokens] = load_tokens) -> Trained:
    """Check a trained folder and read what it was trained to answer, without loading its weights; `tokens_of` reads its tokenizer.

    Raises UsageError if it has no manifest, CorruptError naming each file that differs from it, MismatchError if another version
    of shotless trained it, or this tokenizer library gives a verbaliser other ids than in training.
    """
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder / MANIFEST}: no such file, so nothing says what this model was trained to answer. Is it a student's folder?"
        )
    manifest = check_manifest(folder)
    try:
        task = Task(TaskParams.model_validate(manifest["task"]), "chat" if manifest.get("format") == "chat" else "plain")
        name, completions = str(manifest["name"]), dict(manifest["completions"])
    except ValidationError as error:
        faults = ", ".join(f"task.{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise MismatchError(
            f"{folder / MANIFEST}: trained by another version of shotless ({faults}). Train it again with `dvc repro`, or use that version."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptError(
            f"{folder / MANIFEST}: not a trained model's manifest ({error}). Make the folder again with `dvc repro`."
        ) from None
    tokens = tokens_of(task, folder)
    if tokens.frame != (trained := manifest.get("frame", {})):
        raise MismatchError(f"{folder}: its chat template writes {tokens.frame}, and in training it wrote {trained}. Run `dvc repro`.")
    for label, ids in zip(task.labels, tokens.completions, strict=False):
        if ids != completions.get(label):
            raise MismatchError(
                f"{folder}: the tokenizer turns the verbaliser of {label!r} into {ids}, and it was trained with {completions.get(label)}. "
                "Train it again with `dvc repro`, or use the transformers and tokenizers that it was trained with."
            )
    return Trained(folder, name, task, tokens, manifest)
