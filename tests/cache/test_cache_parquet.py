"""Shards and parts are plain Parquet: other programs read the same values, a damaged page is found, equal rows are equal bytes."""

import os
import subprocess
import sys

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_rows import bytes_of, capture, keys, rows, stored

from pipeline.cache.folder import SHARD_LEVEL
from pipeline.cache.store import write_rows
from pipeline.errors import CorruptError
from pipeline.schema import SCORES, read_table


def varied_rows(count=300):
    """Rows with lists of all lengths in every column, -inf and half floats among them."""
    generator = np.random.default_rng(0)
    return pa.table([pa.array([value_of(field.type, generator) for _ in range(count)], field.type) for field in SCORES], schema=SCORES)


def value_of(kind, generator):
    if pa.types.is_list(kind):
        return [value_of(kind.value_type, generator) for _ in range(generator.integers(0, 4))]
    if pa.types.is_string(kind):
        return f"{generator.integers(0, 3)}é"
    if pa.types.is_integer(kind):
        return int(generator.integers(0, 2**31 - 1))
    number = -np.inf if generator.random() < 0.1 else generator.normal()
    return np.float16(number) if pa.types.is_float16(kind) else float(np.float32(number))


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "part-00000.parquet"
    write_rows(varied_rows(), path, SHARD_LEVEL)
    return path


def test_pyarrow_reads_a_shard_as_it_was_written(shard):
    assert pq.read_table(shard).equals(varied_rows())


def test_polars_reads_a_shard_as_it_was_written(shard):
    assert pl.read_parquet(shard).to_dicts() == varied_rows().to_pylist()


def test_duckdb_reads_a_shard_as_it_was_written(shard):
    duckdb = pytest.importorskip("duckdb")
    read = duckdb.sql(f"select * from '{shard}'").fetchall()
    assert [dict(zip(SCORES.names, row, strict=True)) for row in read] == varied_rows().to_pylist()


def test_duckdb_s_example_in_the_docs_works(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    write_rows(rows(5), tmp_path / "part-00000.parquet", SHARD_LEVEL)
    query = f"select example_id, unnest(topk_ids[1]) as token from '{tmp_path}/*.parquet'"
    expected = [(row["example_id"], token) for row in rows(5).to_pylist() for token in row["topk_ids"][0]]
    assert duckdb.sql(query).fetchall() == expected


def test_every_page_has_a_checksum_that_a_reader_verifies(shard, tmp_path):
    data, about = shard.read_bytes(), pq.read_metadata(shard)
    for column in range(about.num_columns):
        chunk = about.row_group(0).column(column)
        harmed = bytearray(data)
        harmed[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 2] ^= 4
        (tmp_path / "harmed.parquet").write_bytes(harmed)
        with pytest.raises(CorruptError, match="not readable as Parquet"):
            read_table(tmp_path / "harmed.parquet", SCORES)
    assert about.num_columns == len(SCORES)


def test_the_bytes_of_a_position_are_few(tmp_path):
    """What all columns but the key take: numbers in split byte streams are smaller than in plain Parquet."""
    few = stored(keys(500))
    write_rows(few, tmp_path / "few.parquet", SHARD_LEVEL)
    pq.write_table(few, tmp_path / "plain.parquet", compression="zstd", compression_level=SHARD_LEVEL)

    def size(file):
        group = pq.read_metadata(file).row_group(0)
        columns = [group.column(column) for column in range(group.num_columns)]
        return sum(column.total_compressed_size for column in columns if column.path_in_schema != "prompt_sha") / len(few)

    assert size(tmp_path / "few.parquet") < size(tmp_path / "plain.parquet") / 1.2


@pytest.mark.slow
def test_another_process_with_another_hash_seed_gives_the_same_bytes(tmp_path):
    code = "import sys, pathlib, score_rows\nfolder = pathlib.Path(sys.argv[1])\nscore_rows.capture(folder / 'work', folder / 'cache', 5)\n"
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code, tmp_path / "there"], env=environment, check=True)
    capture(tmp_path / "here" / "work", tmp_path / "here" / "cache", 5)
    assert bytes_of(tmp_path / "there" / "cache") == bytes_of(tmp_path / "here" / "cache")
