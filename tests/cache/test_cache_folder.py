"""The cache as an artifact: what is read is what was written, and nothing else is read."""

import json

import pytest
from cache_rows import FINGERPRINT, rows
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.folder import read_cache, write_cache
from pipeline.errors import CorruptError, ShotlessError
from pipeline.files import sha256_ids


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cache.folder.ROWS_PER_SHARD", 4)
    write_cache(tmp_path / "cache", [rows(10)], FINGERPRINT, {"teacher": "t"})
    return tmp_path / "cache"


def test_rows_round_trip_with_ids_past_a_16_bit_vocabulary(cache):
    assert read_cache(cache).rows.equals(rows(10))
    assert read_cache(cache).rows["topk_ids"].to_pylist()[0] == [[151_645, 7]]


def test_writing_again_gives_the_same_bytes(cache, tmp_path):
    write_cache(tmp_path / "again", [rows(10)], FINGERPRINT, {"teacher": "t"})
    assert {f.name: f.read_bytes() for f in cache.iterdir()} == {f.name: f.read_bytes() for f in (tmp_path / "again").iterdir()}


@pytest.mark.parametrize("position", [0.0, 0.3, 0.99])
def test_a_flipped_bit_is_found(cache, position):
    shard = cache / "part-00001.parquet"
    data = bytearray(shard.read_bytes())
    data[int(len(data) * position)] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CorruptError, match=r"part-00001\.parquet: sha256"):
        read_cache(cache)


def test_a_missing_shard_is_found(cache):
    (cache / "part-00002.parquet").unlink()
    with pytest.raises(CorruptError, match=r"part-00002\.parquet: the manifest names this shard"):
        read_cache(cache)


def test_a_shard_swapped_with_another_is_found(cache):
    one, other = cache / "part-00000.parquet", cache / "part-00001.parquet"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    with pytest.raises(CorruptError, match="sha256"):
        read_cache(cache)


def test_a_cache_without_a_manifest_is_not_read(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(ShotlessError, match="did not end"):
        read_cache(cache)


def test_a_cache_of_another_schema_version_is_not_read(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(CorruptError, match="schema version 99"):
        read_cache(cache)


@given(st.lists(st.integers(0, 2**31 - 1)))
def test_a_prompt_s_hash_tells_token_ids_apart(ids):
    assert sha256_ids(ids) == sha256_ids(list(ids))
    assert sha256_ids([*ids, 0]) != sha256_ids(ids)
