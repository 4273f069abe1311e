"""The shapes that a row takes, and the Parquet schema of each.

`Example` (fields, label or none) → `Prompt` (token ids and their hash) → a score (label log-probabilities, token distributions: `SCORES`)
→ a target (probabilities: `TARGETS`) → a prediction (`PREDICTIONS`). Files are zstd-compressed, and equal rows give equal bytes.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptError, UsageError
from pipeline.files import replacing, sha256_ids, sha256_json
from pipeline.params import Format

SCHEMA_VERSION = 4
SLICE = "slice."  # begins the name of a slice's column. No field's name does, since a field is an identifier.


@dataclass(frozen=True)
class Example:
    """One usable row: the task's input fields, and what else its source says of it."""

    fields: Mapping[str, str]
    label: str | None = None
    completion: str | None = None  # its answer in free text, if the source has one
    source: str = ""
    line: int = 0  # 1-based line (row, for Parquet) in the source file
    slices: Mapping[str, str | None] = field(default_factory=dict)  # slice → value, None if the row does not say

    @cached_property
    def example_id(self) -> str:
        """sha256 of the input fields. Label, answer and origin do not count."""
        return sha256_json(dict(self.fields))


@dataclass(frozen=True)
class Context:
    """What stands in a teacher's prompt before the input: an instruction, then demonstrations as (fields, answer); and as what."""

    name: str
    instruction: str = ""
    demonstrations: tuple[tuple[Mapping[str, str], str], ...] = ()
    format: Format = "plain"

    @cached_property
    def context_id(self) -> str:
        """sha256 of what it holds; its name does not count."""
        shown = [[dict(fields), answer] for fields, answer in self.demonstrations]
        return sha256_json([self.instruction, shown, *([self.format] if self.format == "chat" else [])])


NO_CONTEXT = Context("none")


@dataclass(frozen=True)
class Prompt:
    """What a model sees of one example: token ids, and the answer's own ids if it is to score that answer.

    A server that tokenises for itself sees `request` in their place: text, or the (role, content) of each turn of a chat.
    """

    ids: tuple[int, ...]
    answer: tuple[int, ...] | None = None
    cut: bool = field(default=False, compare=False)  # whether a part of the input is left out, since the model takes no more
    request: str | tuple[tuple[str, str], ...] | None = None

    @cached_property
    def prompt_sha(self) -> str:
        """The key of this prompt's score: sha256 of the exact token ids, or of the request."""
        if self.request is not None:
            return sha256_json(self.request)
        return sha256_ids(self.ids) if self.answer is None else sha256_ids(self.ids, self.answer)

    @property
    def length(self) -> int:
        """Its tokens; of a request about as many: one for every four bytes."""
        texts = [self.request] if isinstance(self.request, str) else [content for _, content in self.request or ()]
        return len(self.ids) + sum(len(text.encode()) // 4 + 1 for text in texts)


FLOATS, LISTS = pa.list_(pa.float32()), pa.list_(pa.list_(pa.float32()))
IDS, ID_LISTS = pa.list_(pa.int32()), pa.list_(pa.list_(pa.int32()))


def _schema(nullable: Collection[str] = (), /, **columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=name in nullable) for name, kind in columns.items()])


def examples_schema(fields: Sequence[str], slices: Sequence[str] = ()) -> pa.Schema:
    """Examples: demonstrations, transfer set, evaluation sets. `fields` are the template's input fields, a column each.

    `label` is null in the transfer set: gold labels never leave the raw data. `source` is a name in data.sources.
    """
    own, of_slices = ("example_id", "label", "completion", "source"), [SLICE + name for name in slices]
    columns = {**dict.fromkeys(own, pa.string()), "line": pa.int64(), **dict.fromkeys((*fields, *of_slices), pa.string())}
    return _schema({"label", "completion", *of_slices}, **columns)


CONTEXTS = _schema(
    context_id=pa.string(),
    name=pa.string(),  # "orders/0"
    instruction=pa.string(),
    demonstrations=pa.string(),  # JSON: [[fields, answer], …] in their order
    format=pa.string(),
)

# What a model says of a prompt. Logarithms are in nats, over the whole vocabulary. Labels have one answer position, in front of the
# verbaliser; free text has one for each of its tokens. Columns from `topk_ids` on have a list for each position; the encoding decides which
# of them hold something (`cache/encodings.py`).
STORED = _schema(
    prompt_sha=pa.string(),
    prompt_tokens=pa.int32(),
    label_logprobs=FLOATS,  # summed over a verbaliser's tokens; sorted labels; an estimate for labels that have a bound
    label_bounds=FLOATS,  # most that the log-probability of a label can be, if no more is known of it, else NaN; empty if all are known
    completion_ids=IDS,  # tokens of free text; empty for labels
    completion_logprobs=FLOATS,  # of each of them
    topk_ids=ID_LISTS,  # most probable first
    topk_logprobs=LISTS,
    sampled_ids=ID_LISTS,  # each stands for tail_mass · count / Σ counts
    sampled_logprobs=LISTS,
    sampled_counts=ID_LISTS,
    full_logprobs=LISTS,  # by token id
    log_z=FLOATS,  # log-sum-exp of the logits
    tail_mass=FLOATS,  # probability outside the top k; 0 if all is kept
    log_norms=LISTS,  # log Σ p^(1/τ) outside the top k, each τ ≠ 1
    entropies=LISTS,  # of the whole distribution at each τ
    hidden_states=pa.list_(pa.list_(pa.float16())),  # the kept layers, one after the other
)
"""Rows of the store: found by `prompt_sha` alone."""

KEY = ("context_id", "example_id")
SCORES = pa.schema([*_schema(**dict.fromkeys(KEY, pa.string())), *STORED])
"""Rows of a score cache: each context × each example, in that order."""

LABELLED = _schema(**dict.fromkeys(KEY, pa.string()), label_logprobs=FLOATS)
"""A teacher's answers to labelled examples that it had not seen: behind each context without those of the example's fold, with its
own lean (`cache/labelled.py`)."""

TARGETS = _schema(
    example_id=pa.string(),
    probabilities=FLOATS,  # over the sorted labels
    agreement=pa.float32(),  # share of the contexts' weight whose own answer is the target's
)

ANSWERED = {
    "set": pa.string(),  # evaluation set
    "run": pa.string(),  # a context's name, "seed N" for a student of several seeds, else ""
    "example_id": pa.string(),
    "label": pa.string(),  # gold
}
PREDICTIONS = _schema(**ANSWERED, predicted=pa.string(), probabilities=FLOATS)  # over the sorted labels
ANSWERS = _schema({"label"}, **ANSWERED, answer=pa.string(), tokens=pa.int32())  # free text; a set may have no labels


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file, whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read the columns of `schema`. Raises UsageError without a file, CorruptError if it is damaged or lacks a column of that type."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file. `dvc repro` runs the stage that writes it.")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            for column in schema:
                place = file.schema_arrow.get_field_index(column.name)
                found = None if place < 0 else file.schema_arrow.field(place).type
                if found != column.type:
                    raise CorruptError(f"{path}: column {column.name!r} is {found or 'missing'}, expected {column.type}. Write it again.")
            return file.read(schema.names).cast(schema)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise CorruptError(f"{path}: not readable as Parquet: {error}. Run the stage that writes it again.") from error


ORIGIN = ("label", "completion", "source", "line")  # what an example has beside its fields and slices


def write_examples(examples: Sequence[Example], fields: Sequence[str], path: Path, slices: Sequence[str] = ()) -> None:
    """Write examples as a Parquet file of `examples_schema(fields, slices)`."""
    columns: dict[str, list[Any]] = {name: [getattr(e, name) for e in examples] for name in ("example_id", *ORIGIN)}
    columns |= {name: [e.fields[name] for e in examples] for name in fields}
    columns |= {SLICE + name: [e.slices[name] for e in examples] for name in slices}
    write_table(pa.table(columns, schema=examples_schema(fields, slices)), path)


def read_examples(path: Path, fields: Sequence[str], slices: Sequence[str] = ()) -> list[Example]:
    """Examples of a file that `write_examples` wrote."""
    return [
        Example(
            {name: row[name] for name in fields},
            slices={name: row[SLICE + name] for name in slices},
            **{name: row[name] for name in ORIGIN},
        )
        for row in read_table(path, examples_schema(fields, slices)).to_pylist()
    ]


def write_contexts(contexts: Iterable[Context], path: Path) -> None:
    """Write a list of contexts."""
    rows = [
        {
            "context_id": context.context_id,
            "name": context.name,
            "instruction": context.instruction,
            "demonstrations": json.dumps([[dict(fields), answer] for fields, answer in context.demonstrations], ensure_ascii=False),
            "format": context.format,
        }
        for context in contexts
    ]
    write_table(pa.Table.from_pylist(rows, schema=CONTEXTS), path)


def read_contexts(path: Path) -> list[Context]:
    """The contexts of a file that `write_contexts` wrote."""
    return [
        Context(row["name"], row["instruction"], tuple(map(tuple, json.loads(row["demonstrations"]))), row["format"])
        for row in read_table(path, CONTEXTS).to_pylist()
    ]
