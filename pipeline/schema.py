"""Every Parquet schema of the project, in one place. Columns are documented where they are declared.

Files are zstd-compressed and byte-identical when written again from the same rows. Token ids are 32-bit: vocabularies pass 131,072.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptError, UsageError
from pipeline.files import replacing
from pipeline.places import Place, Remote
from pipeline.sealing import check_seal, write_sealed_table

SCHEMA_VERSION = 2
ROWS_PER_GROUP = 16_384
"""Rows of a Parquet row group, but in the score cache: what is read at once of a file that is read as it is needed."""

SLICE = "slice."
"""Begins the name of a slice's column; no field's does, since a field is an identifier."""


def examples(fields: Sequence[str], slices: Sequence[str] = ()) -> pa.Schema:
    """Examples: demonstrations, transfer set, evaluation sets. `fields` are the template's input fields, a column each.

    An evaluation set also has the `slices` that its source names, null where a row does not say.
    """
    return pa.schema(
        [
            pa.field("example_id", pa.string(), nullable=False),  # sha256 of the input fields, and of a given answer
            pa.field("label", pa.string()),  # null in the transfer set: its gold labels never leave the raw data
            pa.field("completion", pa.string()),  # a given answer in free text; null where the data have none
            pa.field("source", pa.string(), nullable=False),  # name in data.sources
            pa.field("line", pa.int64(), nullable=False),  # 1-based line (row, for Parquet) in the source file
            *(pa.field(name, pa.string(), nullable=False) for name in fields),
            *(pa.field(SLICE + name, pa.string()) for name in slices),
        ]
    )


CONTEXTS = pa.schema(
    [
        pa.field("context_id", pa.string(), nullable=False),  # sha256 of `text`
        pa.field("name", pa.string(), nullable=False),  # "orders/0"
        pa.field("text", pa.string(), nullable=False),  # rendered; empty for a zero-shot prompt
        pa.field("example_ids", pa.list_(pa.string()), nullable=False),  # the demonstrations in their order
        pa.field("tokens", pa.int32(), nullable=False),  # counted by the tokenizer that the params name
    ]
)

SCORES = pa.schema(
    [
        pa.field("context_id", pa.string(), nullable=False),
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("prompt_sha", pa.string(), nullable=False),  # sha256 of the token ids that the teacher saw
        pa.field("prompt_tokens", pa.int32(), nullable=False),  # context and query
        # The answer. Labels: one position, in front of the verbaliser. Free text: one for each of its tokens, in front of that token.
        pa.field("label_logprobs", pa.list_(pa.float32()), nullable=False),  # nats, summed over a verbaliser's tokens; manifest order
        pa.field("completion_ids", pa.list_(pa.int32()), nullable=False),  # tokens of free text; empty for labels
        pa.field("completion_logprobs", pa.list_(pa.float32()), nullable=False),  # nats, of each of them
        # A list for each position; which columns hold something is the encoding's matter (`cache/encodings.py`). Logarithms are in nats,
        # normalised over the whole vocabulary.
        pa.field("topk_ids", pa.list_(pa.list_(pa.int32())), nullable=False),  # most probable first
        pa.field("topk_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),
        pa.field("sampled_ids", pa.list_(pa.list_(pa.int32())), nullable=False),  # each stands for tail_mass · count / Σ counts
        pa.field("sampled_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),
        pa.field("sampled_counts", pa.list_(pa.list_(pa.int32())), nullable=False),
        pa.field("full_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),  # by token id
        pa.field("log_z", pa.list_(pa.float32()), nullable=False),  # log-sum-exp of the logits
        pa.field("tail_mass", pa.list_(pa.float32()), nullable=False),  # probability outside the top k; 0 where all is kept
        pa.field("log_norms", pa.list_(pa.list_(pa.float32())), nullable=False),  # log Σ p^(1/τ) outside the top k, each τ ≠ 1
        pa.field("entropies", pa.list_(pa.list_(pa.float32())), nullable=False),  # of the whole distribution at τ
        pa.field("hidden_states", pa.list_(pa.list_(pa.float16())), nullable=False),  # the manifest's hidden layers, one after the other
    ]
)

TARGETS = pa.schema(
    [
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),  # over the labels, in calibration.json's order
        pa.field("agreement", pa.float32(), nullable=False),  # share of the weight of contexts whose own answer is the target's
    ]
)

PREDICTIONS = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),  # evaluation set
        pa.field("context_id", pa.string(), nullable=False),  # "" for a student or an ensemble; "seed N" for a student of several seeds
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),  # gold
        pa.field("predicted", pa.string(), nullable=False),
        pa.field("probabilities", pa.list_(pa.float32()), nullable=False),  # over the labels, in the task's order
    ]
)


ANSWERS = pa.schema(
    [
        pa.field("set", pa.string(), nullable=False),  # evaluation set
        pa.field("context_id", pa.string(), nullable=False),  # "" for a prompt without a context
        pa.field("example_id", pa.string(), nullable=False),
        pa.field("label", pa.string()),  # gold, where the set has labels
        pa.field("answer", pa.string(), nullable=False),  # free text
        pa.field("tokens", pa.int32(), nullable=False),  # of the answer
    ]
)


def write_table(table: pa.Table, path: Path) -> None:
    """Write one Parquet file, whole or not at all, whose bytes depend on the rows and its name alone; parents are made."""
    with replacing(path) as temporary:
        write_sealed_table(table, temporary, path, ROWS_PER_GROUP)


def read_table(path: Place, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and check its columns against `schema`.

    Raises UsageError where there is no such file, CorruptError where its bytes are not those that were written, or a column differs.
    """
    source = _checked(path)
    with _reading(path):
        table = pq.read_table(source, page_checksum_verification=True)
    _check_columns(path, table.schema, schema)
    return table.select(schema.names).cast(schema)


class TableFile:
    """A Parquet file with `schema`'s columns whose rows are read as they are asked for; memory holds the last row group.

    Raises what `read_table` raises.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        _checked(path)
        self._path, self._schema = path, schema
        with _reading(path), pq.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, schema)
            groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        self._ends = list(accumulate(groups))
        self._held: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, start: int, stop: int) -> pa.Table:
        """The rows from `start` up to `stop`."""
        found = [self._schema.empty_table()]
        for group in range(bisect_right(self._ends, start), len(self._ends)):
            first = self._ends[group - 1] if group else 0
            if first >= stop:
                break
            found.append(self._group(group)[max(start - first, 0) : stop - first])
        return pa.concat_tables(found)

    def _group(self, number: int) -> pa.Table:
        if self._held is None or self._held[0] != number:
            self._held = None  # frees the old one before the new one is read
            with _reading(self._path), pq.ParquetFile(self._path, page_checksum_verification=True) as file:
                self._held = number, file.read_row_group(number, self._schema.names).select(self._schema.names).cast(self._schema)
        return self._held[1]


def _checked(path: Place) -> Path | pa.BufferReader:
    """What to read of a file that is there and holds what was written: of a remote one its bytes, which are fetched once."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; `dvc repro` runs the stage that writes it.")
    if isinstance(path, Remote):
        data = path.read_bytes()
        check_seal(BytesIO(data), path)
        return pa.BufferReader(data)
    with path.open("rb") as file:
        check_seal(file, path)
    return path


@contextmanager
def _reading(path: Place) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise CorruptError(f"{path}: not readable as Parquet: {error}; run the stage that writes it again.") from error


def _check_columns(path: Place, found: pa.Schema, schema: pa.Schema) -> None:
    for field in schema:
        if field.name not in found.names:
            raise CorruptError(f"{path}: no column {field.name!r}; written by another version? Run the stage that writes it again.")
        if found.field(field.name).type != field.type:
            kind = found.field(field.name).type
            raise CorruptError(f"{path}: column {field.name!r} is {kind}, expected {field.type}; run the stage that writes it again.")
