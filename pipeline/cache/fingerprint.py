"""What a score belongs to: teacher, tokenizer, template, verbalisers, capture settings.

A fingerprint keeps its parts, not only their hash, so that a mismatch can say what differs. Contexts are not part of it: each row names
its own, and one more context must not make the others worthless.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.errors import MismatchError
from pipeline.files import sha256_json
from pipeline.models.identity import check_fetched, tokenizer_sha256, weights_sha256
from pipeline.params import CacheParams
from pipeline.places import Place
from pipeline.schema import SCHEMA_VERSION
from pipeline.task import TaskTokens

ENGINE_VERSION = 2
"""Raised when the engines' numbers change by more than rounding: old rows are then scored again."""


class Fingerprint(BaseModel):
    """Everything but contexts and inputs that decides a row's numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str
    """sha256 of the model's config and weights."""
    tokenizer: str
    """sha256 of the tokenizer's files."""
    template: str
    verbalisers: dict[str, str]
    completions: list[list[int]]
    """Token ids of the verbalisers."""
    dtype: str
    cache: dict[str, Any]
    """What is kept of each distribution, `params.CacheParams`."""
    completion: dict[str, Any] | None
    """How free answers come about, `params.TaskParams.answering`."""
    engine_version: int = ENGINE_VERSION
    schema_version: int = SCHEMA_VERSION

    @property
    def sha256(self) -> str:
        """Hash of all parts."""
        return sha256_json(self.model_dump())

    def check(self, found: dict[str, Any], where: Place) -> None:
        """Raise MismatchError naming every part in which `found`, read from `where`, differs."""
        expected = self.model_dump()
        different = [name for name in expected if name not in found or found[name] != expected[name]]
        different += sorted(set(found) - set(expected))
        if different:
            lines = "\n".join(f"  {name}: {where} has {found.get(name)!r}, this run has {expected.get(name)!r}" for name in different)
            raise MismatchError(f"{where} was not made by this run's teacher, tokenizer, template or settings:\n{lines}\nRun `dvc repro`.")


def fingerprint_of(model_folder: Path, tokens: TaskTokens, cache: CacheParams, dtype: str, remembered: Path | None = None) -> Fingerprint:
    """The fingerprint of scores that a model folder gives for a task; hashes of large files may be `remembered` in a folder.

    Raises CorruptError where the model is not the one that was fetched.
    """
    task = tokens.task
    weights = weights_sha256(model_folder, remembered)
    check_fetched(model_folder, weights)
    return Fingerprint(
        weights=weights,
        tokenizer=tokenizer_sha256(model_folder),
        template=task.params.template,
        verbalisers=dict(task.params.verbalisers),
        completions=[list(ids) for ids in tokens.completions],
        dtype=dtype,
        cache=cache.model_dump(mode="json"),
        completion=task.params.answering,
    )
