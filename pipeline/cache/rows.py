"""Rows of the cache as files: how Parquet is written, how a file carries its own checksum, how many rows one file holds.

A *sealed* file has the sha256 of its bytes in its name: name and checksum cannot come apart, since one rename puts both there. Shards
of the artifact have plain names, and their sha256 in the manifest. In both, every page has a checksum of its own (CRC-32, part of the
Parquet format), which readers other than this project can verify.
"""

import hashlib
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cache.fingerprint import Fingerprint
from pipeline.errors import CorruptError
from pipeline.files import replacing
from pipeline.files import sha256_bytes
from pipeline.places import Place, Remote, write_bytes

MOST_ROWS = 16_384
"""Rows of a shard, where its bytes allow."""
SHARD_BYTES = 64 << 20
"""A shard, decoded, stays under about so many bytes whatever is kept of a distribution: so much memory does reading or writing take."""
VOCABULARY = 1 << 16
"""Entries that a full distribution is taken to have."""
HIDDEN_SIZE = 2048
LABEL_BYTES = 200
"""Of a row's keys and counts."""


def rows_per_shard(fingerprint: Fingerprint) -> int:
    """Rows of each shard but the last: a power of two that follows from what is captured, and from nothing else."""
    kept = fingerprint.cache
    entries = {"sampled": kept["samples"], "hybrid": kept["top_k"] + kept["samples"], "full": VOCABULARY}.get(
        kept["encoding"], kept["top_k"]
    )
    temperatures = 1 + len(kept["temperatures"])
    position = 12 * entries + 8 * temperatures + 2 * HIDDEN_SIZE * len(kept["hidden_layers"]) + 20
    positions = 1 if fingerprint.completion is None else fingerprint.completion["max_tokens"]
    rows = SHARD_BYTES // (LABEL_BYTES + positions * position)
    return min(MOST_ROWS, 1 << max(4, rows.bit_length() - 1))


SPLIT = (pa.int32(), pa.int64(), pa.float32())
"""Numbers that DuckDB reads from split byte streams too: half floats it does not."""
STORE_LEVEL = 3
SHARD_LEVEL = 19
"""zstd levels: parts of the store are written while the teacher waits; shards once, and are carried about (19 saves a tenth over 3)."""


def settings(schema: pa.Schema, level: int) -> dict[str, Any]:
    """How `pyarrow.parquet.write_table` writes rows: numbers split into byte streams (sign and exponent of log-probabilities, high bytes of
    ids compress well, the rest hardly), a dictionary for contexts alone, a checksum for each page. Measured in `benchmarks/cache.py`.
    """
    leaves = {_leaf(field.name, field.type): _number(field.type) for field in schema if not pa.types.is_string(field.type)}
    split = {leaf for leaf, number in leaves.items() if number in SPLIT}
    return {
        "compression": "zstd",
        "compression_level": level,
        "use_dictionary": [field.name for field in schema if field.name == "context_id"],
        "column_encoding": {leaf: "BYTE_STREAM_SPLIT" if leaf in split else "PLAIN" for leaf in leaves},
        "write_statistics": [field.name for field in schema if not pa.types.is_nested(field.type)],
        "write_page_checksum": True,
    }


def _leaf(name: str, kind: pa.DataType) -> str:
    """The name that Parquet gives a column's numbers."""
    return _leaf(f"{name}.list.element", kind.value_type) if pa.types.is_list(kind) else name


def _number(kind: pa.DataType) -> pa.DataType:
    return _number(kind.value_type) if pa.types.is_list(kind) else kind


def parquet_bytes(table: pa.Table) -> pa.Buffer:
    """A table as the bytes of a Parquet file, which depend on its rows alone."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **settings(table.schema, STORE_LEVEL))
    return sink.getvalue()


def write_rows(rows: pa.Table, path: Place) -> memoryview:
    """Write rows of `schema.SCORES` as one Parquet file of one row group, whole or not at all, and return its bytes: they depend on the
    rows alone.
    """
    how: dict[str, Any] = {"row_group_size": len(rows), **settings(rows.schema, SHARD_LEVEL)}
    if isinstance(path, Remote):
        sink = pa.BufferOutputStream()
        pq.write_table(rows.combine_chunks(), sink, **how)
        data = sink.getvalue().to_pybytes()
        write_bytes(data, path)
        return memoryview(data)
    with replacing(path) as temporary:
        pq.write_table(rows.combine_chunks(), temporary, **how)
        return memoryview(temporary.read_bytes())


def pieces_of(shard: memoryview) -> list[str]:
    """A shard cut at the ends of its columns, in the schema's order, and the footer: of each piece "BYTES SHA256", of the hash one half.

    With them in the manifest, some columns can be fetched from a remote store and be known for what was written, without the others.
    """
    with pq.ParquetFile(pa.BufferReader(pa.py_buffer(shard))) as file:
        group = file.metadata.row_group(0)
        columns = [group.column(number) for number in range(group.num_columns)]
    starts = [column.dictionary_page_offset or column.data_page_offset for column in columns]
    ends = [start + column.total_compressed_size for start, column in zip(starts, columns, strict=True)]
    return [_piece(shard[start:end]) for start, end in pairwise([0, *ends, len(shard)])]


def _piece(data: bytes | memoryview) -> str:
    return f"{len(data)} {sha256_bytes(data)[:32]}"


def with_pieces(size: int, pieces: list[str], wanted: list[bytes], numbers: list[int]) -> bytearray:
    """A shard of `size` bytes in which the `wanted` pieces stand in their places, and zeros elsewhere.

    Raises CorruptError where one is not what `pieces` says.
    """
    ends = _ends(pieces)
    shard = bytearray(size)
    for number, data in zip(numbers, wanted, strict=True):
        if _piece(data) != pieces[number]:
            raise CorruptError(f"piece {number} has {_piece(data)} (bytes and sha256), the manifest says {pieces[number]}")
        shard[ends[number] - len(data) : ends[number]] = data
    return shard


def ranges_of(pieces: list[str], numbers: list[int]) -> list[tuple[int, int]]:
    """First byte of each piece, and the one behind its last."""
    ends = [0, *_ends(pieces)]
    return [(ends[number], ends[number + 1]) for number in numbers]


def _ends(pieces: list[str]) -> list[int]:
    return list(accumulate(int(piece.split()[0]) for piece in pieces))


def read_rows(source: Place | bytes | bytearray, schema: pa.Schema) -> pa.Table:
    """The columns of `schema` from a Parquet file or its bytes, with every page's checksum verified.

    Raises CorruptError naming the column that is missing or of another type, or the page that is damaged.
    """
    name = "rows that were read" if isinstance(source, bytes | bytearray) else source
    try:
        data = source.read_bytes() if isinstance(source, Remote) else source
        with pq.ParquetFile(data if isinstance(data, Path) else pa.BufferReader(data), page_checksum_verification=True) as file:
            for field in schema:
                place = file.schema_arrow.get_field_index(field.name)
                found = None if place < 0 else file.schema_arrow.field(place).type
                if found != field.type:
                    raise CorruptError(f"{name}: column {field.name!r} is {found or 'missing'}, expected {field.type}")
            return file.read(schema.names).cast(schema)
    except (OSError, pa.ArrowException) as error:
        raise CorruptError(f"{name}: not readable as Parquet: {error}") from error


def write_sealed(table: pa.Table, folder: Path, stem: str) -> Path:
    """Write a table to `folder/stem-SHA256.parquet`, whole or not at all."""
    data = parquet_bytes(table)
    path = folder / f"{stem}-{hashlib.sha256(data).hexdigest()}.parquet"
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return path


def read_sealed(path: Path) -> bytes:
    """A sealed file's bytes.

    Raises CorruptError where they are not those that the name promises, or cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptError(f"{path}: cannot be read: {error.strerror or error}") from error
    if (found := hashlib.sha256(data).hexdigest()) != sealed_sha256(path):
        raise CorruptError(f"{path}: {len(data):,} bytes of sha256 {found[:12]}…, the name promises {sealed_sha256(path)[:12]}…")
    return data


def sealed_sha256(path: Path) -> str:
    """The sha256 in a sealed file's name."""
    return path.stem.rpartition("-")[2]


def sealed_stem(path: Path) -> str:
    """A sealed file's name without its sha256."""
    return path.stem.rpartition("-")[0]
