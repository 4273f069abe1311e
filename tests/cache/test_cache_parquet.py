"""Shards are plain Parquet: other programs read the same values, and a damaged page is no value."""

import errno

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_rows import FINGERPRINT, rows
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.folder import read_cache, write_cache
from pipeline.cache.rows import MOST_ROWS, parquet_bytes, read_rows, read_sealed, rows_per_shard, write_rows, write_sealed
from pipeline.errors import CorruptError, ShotlessError
from pipeline.params import CacheParams
from pipeline.schema import SCORES

COUNT = 300


def varied_rows(count=COUNT):
    """Rows with lists of all lengths in every column, −inf and half floats among them."""
    generator = np.random.default_rng(0)
    columns = {}
    for field in SCORES:
        columns[field.name] = pa.array([value_of(field.type, generator) for _ in range(count)], field.type)
    return pa.table(columns, schema=SCORES)


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
    write_rows(varied_rows(), path)
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
    write_rows(rows(5), tmp_path / "part-00000.parquet")
    query = f"select example_id, unnest(topk_ids[1]) as token from '{tmp_path}/*.parquet'"
    assert duckdb.sql(query).fetchall()[:2] == [("e0", 151_645), ("e0", 7)]


def test_every_page_has_a_checksum_that_a_reader_verifies(shard, tmp_path):
    """Bytes within a page are flipped; what carries no checksum (the footer) is told apart by the sha256 around it."""
    data = shard.read_bytes()
    about = pq.ParquetFile(shard).metadata
    found = 0
    for column in range(about.num_columns):
        chunk = about.row_group(0).column(column)
        place = chunk.data_page_offset + chunk.total_compressed_size - 2
        if chunk.dictionary_page_offset:
            place = chunk.dictionary_page_offset + chunk.total_compressed_size - 2
        harmed = bytearray(data)
        harmed[place] ^= 4
        with pytest.raises(CorruptError, match="not readable as Parquet"):
            read_rows(bytes(harmed), SCORES)
        found += 1
    assert found == about.num_columns >= len(SCORES)


@pytest.mark.parametrize("harm", ["flip", "cut", "other"])
def test_a_sealed_file_is_read_only_if_its_bytes_are_those_its_name_promises(tmp_path, harm):
    path = write_sealed(rows(3), tmp_path, "part-x")
    assert read_rows(read_sealed(path), SCORES).equals(rows(3))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes({"flip": data, "cut": path.read_bytes()[:-9], "other": parquet_bytes(rows(4)).to_pybytes()}[harm])
    with pytest.raises(CorruptError, match="the name promises"):
        read_sealed(path)


@pytest.mark.parametrize("steps", [[10], [1] * 10, [3, 0, 6, 1], [7, 3]])
def test_shards_are_the_same_bytes_however_rows_arrive(tmp_path, monkeypatch, steps):
    monkeypatch.setattr("pipeline.cache.rows.MOST_ROWS", 4)
    write_cache(tmp_path / "whole", [rows(10)], FINGERPRINT, {})
    starts = np.concatenate([[0], np.cumsum(steps)])[:-1]
    write_cache(tmp_path / "pieces", (rows(10).slice(start, step) for start, step in zip(starts, steps, strict=True)), FINGERPRINT, {})
    assert [file.read_bytes() for file in sorted((tmp_path / "whole").iterdir())] == [
        file.read_bytes() for file in sorted((tmp_path / "pieces").iterdir())
    ]


def test_a_smaller_cache_leaves_nothing_of_a_larger_one(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cache.rows.MOST_ROWS", 4)
    write_cache(tmp_path, [rows(10)], FINGERPRINT, {})
    write_cache(tmp_path, [rows(3)], FINGERPRINT, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "part-00000.parquet"]
    assert read_cache(tmp_path, ["example_id"]).rows.to_pydict() == {"example_id": ["e0", "e1", "e2"]}


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_full_disk_leaves_no_cache_says_so_and_costs_no_bytes(tmp_path, monkeypatch, full_at):
    monkeypatch.setattr("pipeline.cache.rows.MOST_ROWS", 4)
    write_cache(tmp_path / "whole", [rows(10)], FINGERPRINT, {})
    original, written = pq.write_table, []

    def filling(table, where, **settings):
        if len(written) == full_at:
            where.write_bytes(b"half of a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(where)
        original(table, where, **settings)

    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.write_table", filling)
        with pytest.raises(ShotlessError, match="the disk is full"):
            write_cache(tmp_path / "cache", [rows(10)], FINGERPRINT, {})
    assert len(list((tmp_path / "cache").iterdir())) == full_at
    with pytest.raises(ShotlessError, match="did not end"):
        read_cache(tmp_path / "cache")
    write_cache(tmp_path / "cache", [rows(10)], FINGERPRINT, {})
    assert {f.name: f.read_bytes() for f in (tmp_path / "cache").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "whole").iterdir()
    }


@given(
    st.builds(
        CacheParams,
        encoding=st.sampled_from(["top_k", "top_k_tail", "sampled", "hybrid", "full"]),
        top_k=st.integers(1, 4096),
        samples=st.integers(1, 4096),
        hidden_layers=st.lists(st.integers(-4, -1), max_size=4).map(tuple),
    ),
    st.one_of(st.none(), st.integers(1, 4096)),
)
def test_a_shard_s_rows_are_a_power_of_two_that_more_content_never_raises(params, positions):
    completion = None if positions is None else {"max_tokens": positions}
    fingerprint = FINGERPRINT.model_copy(update={"cache": params.model_dump(mode="json"), "completion": completion})
    count = rows_per_shard(fingerprint)
    assert 16 <= count <= MOST_ROWS
    assert count.bit_count() == 1
    more = fingerprint.model_copy(update={"completion": {"max_tokens": 2 * (positions or 1)}})
    assert rows_per_shard(more) <= count
