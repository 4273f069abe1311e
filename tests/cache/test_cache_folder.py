"""The cache as an artifact: what is read is what was written, from a folder or a URL, and nothing else is read."""

import errno
import json
import threading

import boto3
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from score_rows import TASK, about, bytes_of, flip, rows

from pipeline.cache.folder import CacheReader, check_belongs, described_task, read_cache, write_cache
from pipeline.errors import CorruptError, MismatchError, ShotlessError, UsageError
from pipeline.files import check_manifest
from pipeline.params import CacheParams
from pipeline.task import Task

COUNT = 10


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Ten rows in shards of four."""
    monkeypatch.setattr("pipeline.cache.folder.MOST_ROWS", 4)
    write_cache(tmp_path / "few_shot", [rows(COUNT)], about())
    return tmp_path / "few_shot"


def test_rows_and_what_is_said_of_them_come_back(cache):
    found = read_cache(cache)
    assert found.rows.equals(rows(COUNT))
    assert {key: found.manifest[key] for key in about()} == about()
    assert found.manifest["shards"] == {"part-00000.parquet": 4, "part-00001.parquet": 4, "part-00002.parquet": 2}
    assert check_manifest(cache) == found.manifest


def test_some_columns_alone_are_read(cache):
    assert read_cache(cache, ["label_logprobs", "example_id"]).rows.equals(rows(COUNT).select(["label_logprobs", "example_id"]))


def test_a_cache_of_no_rows_is_one(tmp_path):
    write_cache(tmp_path / "empty", [], about())
    assert len(read_cache(tmp_path / "empty").rows) == 0
    reader = CacheReader(tmp_path / "empty", tmp_path / "work")
    assert len(reader) == len(reader.take([])) == 0


@pytest.mark.parametrize("steps", [[10], [1] * 10, [3, 0, 6, 1], [7, 3]])
def test_the_bytes_are_the_same_however_rows_arrive(cache, tmp_path, steps):
    starts = np.concatenate([[0], np.cumsum(steps)])[:-1]
    write_cache(tmp_path / "pieces", (rows(COUNT).slice(start, step) for start, step in zip(starts, steps, strict=True)), about())
    assert bytes_of(tmp_path / "pieces") == bytes_of(cache)


def test_a_smaller_cache_leaves_nothing_of_a_larger_one_nor_of_a_killed_run(cache):
    (cache / ".part-00001.parquet.123.tmp").write_bytes(b"x")
    write_cache(cache, [rows(3)], about())
    assert sorted(bytes_of(cache)) == ["manifest.json", "part-00000.parquet"]
    assert read_cache(cache).rows.equals(rows(3))


@pytest.mark.parametrize("full_at", [0, 1, 2])
def test_a_full_disk_leaves_no_cache_and_costs_no_bytes(cache, tmp_path, monkeypatch, full_at):
    original, written = pq.write_table, []

    def filling(table, where, **settings):
        if len(written) == full_at:
            where.write_bytes(b"half of a fi")
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(where)
        original(table, where, **settings)

    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.write_table", filling)
        with pytest.raises(OSError, match="No space left"):
            write_cache(tmp_path / "cache", [rows(COUNT)], about())
    assert len(bytes_of(tmp_path / "cache")) == full_at
    with pytest.raises(ShotlessError, match="not complete"):
        read_cache(tmp_path / "cache")
    write_cache(tmp_path / "cache", [rows(COUNT)], about())
    assert bytes_of(tmp_path / "cache") == bytes_of(cache)


def swap(folder):
    one, other = folder / "part-00000.parquet", folder / "part-00001.parquet"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: flip(folder / "part-00001.parquet", 0.0), r"part-00001\.parquet: sha256"),
        (lambda folder: flip(folder / "part-00001.parquet", 0.99), r"part-00001\.parquet: sha256"),
        (lambda folder: (folder / "part-00002.parquet").write_bytes(b""), r"part-00002\.parquet: sha256 .*, 0 bytes instead of"),
        (lambda folder: (folder / "part-00002.parquet").unlink(), r"part-00002\.parquet: missing"),
        (swap, r"part-00000\.parquet: sha256"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"manifest\.json: not JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), r"manifest\.json: not a manifest"),
    ],
)
def test_a_damaged_cache_is_refused_by_name(cache, tmp_path, harm, message):
    harm(cache)
    with pytest.raises(CorruptError, match=message):
        read_cache(cache)
    with pytest.raises(CorruptError, match=message):
        CacheReader(cache, tmp_path / "work")


def test_a_cache_without_a_manifest_is_not_complete(cache):
    (cache / "manifest.json").unlink()
    with pytest.raises(ShotlessError, match="this folder is not complete"):
        read_cache(cache)


def test_a_cache_of_another_schema_version_is_refused(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(CorruptError, match="schema version 99"):
        read_cache(cache)


def test_a_second_writer_waits_for_the_first_and_both_leave_it_whole(tmp_path):
    started, go_on, done = threading.Event(), threading.Event(), threading.Event()

    def slow():
        started.set()
        go_on.wait(10)
        yield rows(5)

    def second():
        write_cache(tmp_path / "cache", [rows(7)], about())
        done.set()

    threads = [threading.Thread(target=write_cache, args=(tmp_path / "cache", slow(), about())), threading.Thread(target=second)]
    threads[0].start()
    started.wait(10)
    threads[1].start()
    assert not done.wait(0.3)
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert read_cache(tmp_path / "cache").rows.equals(rows(7))


# --- of this run


def test_a_cache_of_other_params_is_refused_with_all_that_differs(cache):
    wanted = {"cache": CacheParams(top_k=7, samples=8).model_dump(mode="json"), "model": "models/other", "task": described_task(TASK)}
    with pytest.raises(MismatchError) as refused:
        check_belongs(read_cache(cache).manifest, wanted, cache)
    assert str(refused.value).splitlines()[1:] == [
        "  cache.top_k: 4, this run has 7",
        "  cache.samples: 96, this run has 8",
        "  model: 'models/tiny', this run has 'models/other'",
        "Run `dvc repro teacher@few_shot`.",
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"template": "{text} It was"}, "task.template: "),
        ({"verbalisers": {"negative": " bad", "positive": " positive"}}, "task.verbalisers.negative: ' negative', this run has ' bad'"),
        (
            {"verbalisers": {"negative": " negative", "positive": " good", "mixed": " so"}},
            "task.verbalisers.mixed: None, this run has ' so'",
        ),
    ],
)
def test_a_cache_of_another_task_is_refused(cache, change, named):
    manifest = read_cache(cache).manifest
    check_belongs(manifest, {"task": described_task(TASK)}, cache)
    with pytest.raises(MismatchError, match=named):
        check_belongs(manifest, {"task": described_task(Task(TASK.params.model_copy(update=change)))}, cache)


def test_the_order_of_verbalisers_does_not_matter(cache):
    turned = dict(reversed(TASK.params.verbalisers.items()))
    assert list(turned) != list(TASK.params.verbalisers)
    other = Task(TASK.params.model_copy(update={"verbalisers": turned}))
    assert json.dumps(described_task(other)) == json.dumps(described_task(TASK))
    check_belongs(read_cache(cache).manifest, {"task": described_task(other)}, cache)


# --- the reader


@pytest.mark.parametrize("wanted", [[0], [9], [5, 5, 5], list(range(COUNT)), [], np.random.default_rng(0).permutation(COUNT)], ids=str)
def test_rows_come_in_the_order_asked_for(cache, tmp_path, wanted):
    reader = CacheReader(cache, tmp_path / "work")
    assert len(reader) == COUNT
    taken = reader.take(wanted)
    assert taken.equals(rows(COUNT).take(pa.array(wanted, pa.int64())))
    assert all(column.num_chunks <= 1 for column in taken.columns)


def test_some_columns_alone_are_decoded(cache, tmp_path):
    reader = CacheReader(cache, tmp_path / "work", ["example_id", "topk_ids"])
    assert reader.take([7]).to_pylist() == rows(COUNT).select(["example_id", "topk_ids"]).slice(7, 1).to_pylist()


@pytest.mark.parametrize("number", [-1, COUNT])
def test_a_row_that_is_not_there_is_named(cache, tmp_path, number):
    with pytest.raises(UsageError, match=f"there is no row {number}; it has 10 rows"):
        CacheReader(cache, tmp_path / "work").take([0, number])


def test_the_decoded_rows_have_no_name_under_the_work_folder_and_outlive_the_cache(cache, tmp_path):
    reader = CacheReader(cache, tmp_path / "work")
    for file in cache.iterdir():
        file.unlink()
    assert list((tmp_path / "work").iterdir()) == []
    taken = reader.take(range(COUNT))
    del reader
    assert taken.equals(rows(COUNT))


# --- URLs


@pytest.fixture
def in_memory(cache):
    memory = fsspec.filesystem("memory")
    for name, data in bytes_of(cache).items():
        memory.pipe_file(f"/bucket/{name}", data)
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def test_a_cache_at_a_url_is_read_like_one_in_a_folder(cache, in_memory, tmp_path):
    assert read_cache(in_memory).rows.equals(rows(COUNT))
    assert read_cache(f"{in_memory}/").manifest == read_cache(cache).manifest
    assert CacheReader(in_memory, tmp_path / "work").take([8, 2]).equals(rows(COUNT).take([8, 2]))


def test_damage_at_a_url_is_found(in_memory):
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/part-00001.parquet", b"x")
    with pytest.raises(CorruptError, match=r"memory://bucket/part-00001\.parquet: sha256"):
        read_cache(in_memory)
    memory.rm("/bucket/part-00001.parquet")
    with pytest.raises(CorruptError, match=r"memory://bucket/part-00001\.parquet: missing"):
        read_cache(in_memory)
    with pytest.raises(ShotlessError, match=r"nope://bucket/manifest\.json: cannot be read: "):
        read_cache("nope://bucket")


def test_a_cache_in_s3_is_read(cache, monkeypatch):
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "test", "SECRET_ACCESS_KEY": "test"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        for name, data in bytes_of(cache).items():
            client.put_object(Bucket="bucket", Key=f"scores/{name}", Body=data)
        assert read_cache("s3://bucket/scores").rows.equals(rows(COUNT))
        client.delete_object(Bucket="bucket", Key="scores/part-00000.parquet")
        with pytest.raises(CorruptError, match=r"part-00000\.parquet: missing"):
            read_cache("s3://bucket/scores")
    finally:
        server.stop()
