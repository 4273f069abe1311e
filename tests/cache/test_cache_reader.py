"""Random access to a cache: any rows in any order, equal to the whole table's, and none from a file that is not what its manifest says."""

import gc
import os
import resource

import numpy as np
import psutil
import pyarrow as pa
import pytest
from cache_rows import FINGERPRINT, rows

from pipeline.cache import reader as reader_module
from pipeline.cache.folder import read_cache, write_cache
from pipeline.cache.reader import CacheReader
from pipeline.errors import CorruptError, MismatchError, ShotlessError, UsageError

COUNT = 23


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cache.rows.MOST_ROWS", 4)
    write_cache(tmp_path / "cache", [rows(COUNT)], FINGERPRINT, {})
    return tmp_path / "cache"


@pytest.fixture
def reader(cache, tmp_path):
    with CacheReader(cache, tmp_path / "work") as opened:
        yield opened


@pytest.mark.parametrize("wanted", [[0], [22], [5, 5, 5], list(range(COUNT)), [], np.random.default_rng(0).permutation(COUNT)], ids=str)
def test_rows_come_in_the_order_asked_for(reader, cache, wanted):
    assert len(reader) == COUNT
    assert reader.take(wanted).equals(read_cache(cache).rows.take(pa.array(wanted, pa.int64())))


def test_pages_that_are_given_back_are_read_again(reader, cache, monkeypatch):
    monkeypatch.setattr(reader_module, "MAPPED_BYTES", 0)
    whole = read_cache(cache).rows
    generator = np.random.default_rng(1)
    for _ in range(5):
        wanted = generator.integers(0, COUNT, 9)
        assert reader.take(wanted).equals(whole.take(pa.array(wanted)))


def test_what_was_taken_outlives_the_reader(cache, tmp_path):
    with CacheReader(cache, tmp_path / "work") as opened:
        taken = opened.take([3, 20])
    del opened
    gc.collect()
    assert taken.equals(read_cache(cache).rows.take(pa.array([3, 20])))


def test_more_shards_than_files_may_be_open_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cache.rows.MOST_ROWS", 1)
    monkeypatch.setattr(reader_module, "SPARE_HANDLES", psutil.Process().num_fds() + 8)
    write_cache(tmp_path / "cache", [rows(COUNT)], FINGERPRINT, {})
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (reader_module.SPARE_HANDLES, allowed[1]))
        with CacheReader(tmp_path / "cache", tmp_path / "work") as opened:
            assert opened.take(list(range(COUNT))).equals(read_cache(tmp_path / "cache").rows)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


def test_a_cache_of_more_shards_than_the_system_allows_files_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module.resource, "getrlimit", lambda _: (100, 100))
    monkeypatch.setattr(reader_module.sys, "version_info", (3, 12))
    with pytest.raises(UsageError, match=r"has 6 shards, and this process may have 100 files open; raise `ulimit -Hn` to 518"):
        CacheReader(cache, tmp_path / "work")


def test_some_columns_alone_are_decoded(cache, tmp_path):
    with CacheReader(cache, tmp_path / "work", ["example_id", "topk_ids"]) as opened:
        assert opened.take([7]).to_pylist() == [{"example_id": "e7", "topk_ids": [[151_645, 7]]}]


def test_keys_are_found_and_unknown_ones_are_not(reader):
    assert reader.find([("c", "e22"), ("c", "e0"), ("c", "e99"), ("other", "e0")]).tolist() == [22, 0, -1, -1]


@pytest.mark.parametrize("number", [-1, COUNT])
def test_a_row_that_is_not_there_is_named(reader, number):
    with pytest.raises(UsageError, match=f"there is no row {number}; it has 23 rows"):
        reader.take([0, number])


def test_opening_reads_no_shard_and_a_damaged_one_is_found_when_it_is_touched(cache, tmp_path):
    data = bytearray((cache / "part-00001.parquet").read_bytes())
    data[len(data) // 2] ^= 1
    (cache / "part-00001.parquet").write_bytes(data)
    (cache / "part-00002.parquet").unlink()
    opened = CacheReader(cache, tmp_path / "work")
    opened.take([0, 3])
    with pytest.raises(CorruptError, match=r"part-00001\.parquet: sha256"):
        opened.take([0, 4])
    with pytest.raises(CorruptError, match=r"part-00002\.parquet: .* missing"):
        opened.take([8])


def test_another_teacher_s_cache_is_refused(cache, tmp_path):
    with pytest.raises(MismatchError, match="weights: "):
        CacheReader(cache, tmp_path / "work", fingerprint=FINGERPRINT.model_copy(update={"weights": "other"}))


def test_an_unfinished_cache_is_not_opened(cache, tmp_path):
    (cache / "manifest.json").unlink()
    with pytest.raises(ShotlessError, match="did not end"):
        CacheReader(cache, tmp_path / "work")


def test_nothing_lies_under_the_work_folder_even_while_reading(reader, tmp_path):
    reader.take(range(COUNT))
    assert os.listdir(tmp_path / "work") == []  # noqa: PTH208
