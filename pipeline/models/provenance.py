"""provenance.json of a trained folder: what it was trained to answer, and which bytes it consists of, checked wherever one is used.

A student's numbers mean something only with the tokenizer, template and verbalisers that it was trained with, and these travel as files
beside its weights: a copy that is not whole, or a file replaced by hand, would give answers that look right. So the folder carries the
hashes of its own weights, tokenizer and task. Trade-off: opening a student reads all its bytes, a second for a gigabyte.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import MismatchError, UsageError
from pipeline.files import read_sealed_json
from pipeline.files import sha256_json
from pipeline.models.identity import tokenizer_sha256, weights_sha256
from pipeline.params import CompletionParams, TaskParams
from pipeline.task import TaskTokens

FILE = "provenance.json"
TASK_KEYS = ("template", "verbalisers", "labels")
IDENTITY = {"weights_sha256": "weights or config", "tokenizer_sha256": "tokenizer", "task_sha256": "template, verbalisers or labels"}
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Provenance:
    """What a checked folder says of itself."""

    folder: Path
    name: str
    task: TaskParams
    """Template and verbalisers, in the order of the labels."""
    ids: dict[str, list[int]]
    """Token ids of each label's verbaliser, as they were in training."""
    identity: dict[str, str]
    """The hashes in `IDENTITY`, of the folder as training left it."""
    task_sha256: str
    """The hash of the task's entries as they are now."""

    def check_task(self, params: TaskParams) -> None:
        """Raise MismatchError naming what differs where params.yaml has another template or other verbalisers."""
        for key in ("template", "verbalisers", "completion"):
            trained, asked = getattr(self.task, key), getattr(params, key)
            same_order = key != "verbalisers" or list(trained) == list(asked)
            if trained != asked or not same_order:
                raise MismatchError(f"{self.folder}: trained with {key} {trained!r}, params.yaml has {asked!r}; run `dvc repro`.")

    def check_tokens(self, tokens: TaskTokens) -> None:
        """Raise MismatchError where the tokenizer, as this library reads it, gives a verbaliser other ids than in training."""
        if self.task.completion is not None:
            return
        found = dict(zip(tokens.task.labels, tokens.completions, strict=True))
        if different := [label for label in tokens.task.labels if found[label] != self.ids[label]]:
            label = different[0]
            raise MismatchError(
                f"{self.folder}: the tokenizer turns the verbaliser of {label!r} into {found[label]}, and the student was trained with "
                f"{self.ids[label]}. Train it again with `dvc repro`, or use the transformers and tokenizers that it was trained with."
            )


def identity_entries(folder: Path, provenance: Mapping[str, Any]) -> dict[str, str]:
    """The entries of provenance.json that say which bytes a folder consists of and what it answers.

    `provenance` has the `TASK_KEYS`; the weights and the tokenizer lie in `folder`.
    """
    return {
        "weights_sha256": weights_sha256(folder),
        "tokenizer_sha256": tokenizer_sha256(folder),
        "task_sha256": _task_sha256(provenance),
    }


def read_provenance(folder: Path) -> Provenance:
    """What a trained folder says of itself, not yet held against its files.

    Raises UsageError where there is no provenance.json or it lacks something, CorruptError where it is not what training wrote.
    """
    file = folder / FILE
    if not file.is_file():
        raise UsageError(f"{file}: no such file, so nothing says what this model was trained to answer; is it a student's folder?")
    try:
        found = read_sealed_json(file, may_lack_seal=True)
        free = found.get("completion")
        verbalisers = {} if free is not None else {label: found["verbalisers"][label] for label in found["labels"]}
        texts = {label: entry["text"] for label, entry in verbalisers.items()}
        completion = None if free is None else CompletionParams.model_validate(free)
        return Provenance(
            folder,
            str(found.get("name", folder.name)),
            TaskParams(template=found["template"], verbalisers=texts, completion=completion),
            {label: list(entry["ids"]) for label, entry in verbalisers.items()},
            {key: str(found[key]) for key in IDENTITY},
            _task_sha256(found),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fault = f"no entry {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{file}: cannot be read as a student's provenance ({fault}); `dvc repro` writes it.") from None


def _task_sha256(provenance: Mapping[str, Any]) -> str:
    keys = [*TASK_KEYS, *(["completion"] if "completion" in provenance else [])]
    return sha256_json({key: provenance[key] for key in keys})


def check_provenance(folder: Path) -> Provenance:
    """Read a trained folder's provenance and hold the folder against it, without loading its weights.

    Raises UsageError where there is none or it cannot be read, MismatchError naming each of weights, tokenizer and task that differ.
    """
    said = read_provenance(folder)
    here = {"weights_sha256": weights_sha256(folder), "tokenizer_sha256": tokenizer_sha256(folder), "task_sha256": said.task_sha256}
    lines = [
        f"  {what}: sha256 {here[key][:SHOWN_DIGITS]}… here, {said.identity[key][:SHOWN_DIGITS]}… after training"
        for key, what in IDENTITY.items()
        if here[key] != said.identity[key]
    ]
    if lines:
        changed = "\n".join(lines)
        raise MismatchError(
            f"{folder} is not what its {FILE} says:\n{changed}\n"
            "Files of it were changed or replaced after training; make it again with `dvc repro`, or copy it whole."
        )
    return said
