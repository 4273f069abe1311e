"""A cache in an S3 store: the bytes are those of a folder, each is fetched once, nothing is listed, and damage is refused."""

from collections import Counter

import boto3
import pyarrow as pa
import pytest
from cache_rows import FINGERPRINT, rows
from cache_world import TEACHER, Workspace
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import ThreadedMotoServer

from pipeline.cache.check import check_cache
from pipeline.cache.folder import read_cache, read_manifest, write_cache
from pipeline.cache.keys import KEY
from pipeline.cache.reader import CacheReader
from pipeline.commands.verify import verify
from pipeline.errors import CorruptError, ShotlessError, UsageError
from pipeline.places import place, write_bytes
from pipeline.schema import SCORES, TARGETS, read_table, write_table

URL = "s3://bucket/scores/few_shot"
OWN = f"s3://bucket/verified/{TEACHER}"
COUNT = 23


class Counted:
    """The server's application, with a note of every request: method, file, bytes that were sent."""

    def __init__(self):
        self.application = DomainDispatcherApplication(create_backend_app)
        self.requests = []

    def __call__(self, environ, start_response):
        sent = list(self.application(environ, start_response))
        listed = "list-type" in environ["QUERY_STRING"]
        method = "LIST" if listed else environ["REQUEST_METHOD"]
        self.requests.append((method, environ["PATH_INFO"].rpartition("/")[2], sum(map(len, sent))))
        return sent

    @property
    def methods(self):
        return dict(Counter(method for method, _, _ in self.requests))

    def bytes_of(self, ending):
        return sum(count for method, name, count in self.requests if method == "GET" and name.endswith(ending))


@pytest.fixture(scope="module")
def server():
    """A store on this machine. pyarrow reads its place from the environment."""
    counted = Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moto.moto_server.threaded_moto_server.DomainDispatcherApplication", lambda *_, **__: counted)
        started = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        started.start()
        host, port = started.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield counted
        started.stop()


@pytest.fixture
def caches(server, tmp_path, monkeypatch):
    """The same rows in a folder and in the store, in shards of 4; requests are counted from here on."""
    monkeypatch.setattr("pipeline.cache.rows.MOST_ROWS", 4)
    for where in (tmp_path / "cache", place(URL)):
        write_cache(where, [rows(COUNT)], FINGERPRINT, {})
    server.requests.clear()
    return tmp_path / "cache", place(URL)


def test_the_bytes_are_those_of_a_folder(caches):
    local, remote = caches
    assert {f.name: f.read_bytes() for f in remote.iterdir()} == {f.name: f.read_bytes() for f in local.iterdir()}
    assert len(list(remote.iterdir())) == 7


def test_a_shorter_cache_leaves_no_shard_of_a_longer_one(caches):
    write_cache(caches[1], [rows(5)], FINGERPRINT, {})
    assert sorted(f.name for f in caches[1].iterdir()) == ["manifest.json", "part-00000.parquet", "part-00001.parquet"]


def test_opening_fetches_the_manifest_and_nothing_else(caches, server, tmp_path):
    CacheReader(caches[1], tmp_path / "work")
    assert [(method, name) for method, name, _ in server.requests] == [("HEAD", "manifest.json"), ("GET", "manifest.json")]


def test_a_row_costs_its_shard_once_and_no_other(caches, server, tmp_path):
    with CacheReader(caches[1], tmp_path / "work") as reader:
        for _ in range(3):
            taken = reader.take([9, 11])
    assert taken.equals(read_cache(caches[0]).rows.take(pa.array([9, 11])))
    assert server.methods == {"HEAD": 2, "GET": 2}
    assert server.bytes_of(".parquet") == (caches[0] / "part-00002.parquet").stat().st_size


def test_some_columns_fetch_their_bytes_and_the_footer_s(caches, server):
    found = read_cache(caches[1], KEY).rows
    assert found.equals(read_cache(caches[0], KEY).rows)
    numbers = [*(SCORES.get_field_index(name) for name in KEY), len(SCORES)]
    shards = read_manifest(caches[0])["shards"]
    assert server.bytes_of(".parquet") == sum(int(shard["pieces"][number].split()[0]) for shard in shards for number in numbers)
    assert server.methods == {"HEAD": 1 + len(shards), "GET": 1 + len(numbers) * len(shards)}


def test_pieces_are_the_whole_shard(caches):
    for shard in read_manifest(caches[0])["shards"]:
        assert sum(int(piece.split()[0]) for piece in shard["pieces"]) == shard["bytes"]
        assert len(shard["pieces"]) == len(SCORES) + 1


def test_any_flipped_byte_of_what_is_read_is_refused(caches):
    shard = caches[1] / "part-00001.parquet"
    whole = shard.read_bytes()
    ends, start = [], 0
    for piece in read_manifest(caches[1])["shards"][1]["pieces"]:
        start += int(piece.split()[0])
        ends.append(start)
    read = {0, 1, len(SCORES)}
    for number, end in enumerate(ends):
        harmed = bytearray(whole)
        harmed[end - 1] ^= 1
        write_bytes(bytes(harmed), shard)
        if number in read:
            with pytest.raises(CorruptError, match=rf"{shard}: piece {number} has"):
                read_cache(caches[1], KEY)
        else:
            assert read_cache(caches[1], KEY).rows.equals(read_cache(caches[0], KEY).rows)
        with pytest.raises(CorruptError, match=rf"{shard}: sha256"):
            read_cache(caches[1])


def test_another_run_s_shard_a_cut_one_and_none_are_refused(caches):
    manifest, shard = caches[1] / "manifest.json", caches[1] / "part-00001.parquet"
    other = (caches[1] / "part-00000.parquet").read_bytes()
    for data in (other, other[:-9], b""):
        write_bytes(data, shard)
        for columns in (None, KEY):
            with pytest.raises(CorruptError, match="part-00001"):
                read_cache(caches[1], columns)
    shard.unlink()
    for columns in (None, KEY):
        with pytest.raises(CorruptError, match=r"part-00001\.parquet: .* missing"):
            read_cache(caches[1], columns)
    manifest.unlink()
    with pytest.raises(ShotlessError, match="did not end"):
        read_cache(caches[1])


def test_verify_names_what_is_wrong(caches):
    assert not check_cache(caches[1], None, FINGERPRINT).faults
    write_bytes(b"x", caches[1] / "stray")
    write_bytes(b"y", caches[1] / "part-00003.parquet")
    found = [fault.what for fault in check_cache(caches[1], None, FINGERPRINT).faults]
    assert len(found) == 2
    assert found[0].startswith(f"{URL}/part-00003.parquet: sha256")
    assert "does not name stray" in found[1]


def test_targets_are_read_in_one_piece(server, tmp_path):
    table = pa.table({"example_id": ["e"], "probabilities": [[0.25, 0.75]], "agreement": [1.0]}, schema=TARGETS)
    file = tmp_path / "mix" / "targets.parquet"
    write_table(table, file)
    remote = place("s3://bucket/targets/mix/targets.parquet")
    write_bytes(file.read_bytes(), remote)
    server.requests.clear()
    assert read_table(remote, TARGETS).equals(table)
    assert server.bytes_of(".parquet") == file.stat().st_size
    write_bytes(file.read_bytes()[:-9] + b"damaged!!", remote)
    with pytest.raises(CorruptError, match=r"s3://bucket/targets/mix/targets\.parquet"):
        read_table(remote, TARGETS)
    with pytest.raises(UsageError, match="s3://bucket/nowhere: no such file"):
        read_table(place("s3://bucket/nowhere"), TARGETS)


def test_fsspec_s_stores_hold_caches_too(tmp_path):
    where = place("memory://folder/scores")
    write_cache(where, [rows(COUNT)], FINGERPRINT, {})
    assert read_cache(where).rows.equals(rows(COUNT))


def test_a_url_that_nothing_reaches_is_named():
    with pytest.raises(UsageError, match="nowhere://bucket: no filesystem for it here"):
        place("nowhere://bucket/scores")
    assert place("file:///a/b") == place("/a/b")


def test_the_command_verifies_a_url_and_repairs_none(server, tmp_path, raw_params, model_folder, monkeypatch, capsys):
    world = Workspace(tmp_path, raw_params, model_folder("llama"), monkeypatch)
    for name, data in world.capture().items():
        write_bytes(data, place(OWN) / name)
    verify([OWN])
    assert f"{TEACHER}: 24 rows in 3 shards" in capsys.readouterr().out
    write_bytes(b"x", place(OWN) / "part-00001.parquet")
    with pytest.raises(CorruptError, match="not in order: few_shot"):
        verify([OWN])
    assert f"{OWN}/part-00001.parquet: sha256" in capsys.readouterr().out
    with pytest.raises(UsageError, match=f"{OWN}: --repair writes under artifacts"):
        verify([OWN], repair=True)
