"""Every Parquet schema of the project, in one place. Columns are documented where they are declared.

Files are zstd-compressed and byte-identical when written again from the same rows. Token ids are 32-bit: vocabularies pass 131,072.
"""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptError, UsageError
from pipeline.files import replacing
from pipeline.sealing import check_seal, write_sealed_table

SCHEMA_VERSION = 2


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
        pa.field("context_id", pa.string(), nullable=False),  # "" for a student or an ensemble
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
        write_sealed_table(table, temporary, path)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and check its columns against `schema`.

    Raises UsageError where there is no such file, CorruptError where its bytes are not those that were written, or a column differs.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; `dvc repro` runs the stage that writes it.")
    check_seal(path)
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise CorruptError(f"{path}: not readable as Parquet: {error}; run the stage that writes it again.") from error
    for field in schema:
        if field.name not in table.schema.names:
            raise CorruptError(f"{path}: no column {field.name!r}; written by another version? Run the stage that writes it again.")
        if table.schema.field(field.name).type != field.type:
            found = table.schema.field(field.name).type
            raise CorruptError(f"{path}: column {field.name!r} is {found}, expected {field.type}; run the stage that writes it again.")
    return table.select(schema.names).cast(schema)
