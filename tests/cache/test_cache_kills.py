"""`kill -9` at several moments of a capture: what is there is whole, and the next run ends with the bytes of an unbroken one.

The writer is the store and the cache with made-up scores (`score_rows.capture`), a process of its own that is killed from outside. Every
file of this project is written beside its place and renamed (`files.replacing`), so what holds for this writer holds for the other stages.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from score_rows import IDENTITY, bytes_of, capture, keys

from pipeline.cache.folder import read_cache
from pipeline.cache.store import Store
from pipeline.errors import ShotlessError

COUNT = 24
"""Prompts, in eight parts of three."""
WRITER = """
import sys, time, pathlib, score_rows
folder = pathlib.Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
score_rows.capture(folder / "work", folder / "cache", int(sys.argv[2]), before=lambda _: time.sleep(0.02))
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    capture(folder / "work", folder / "cache", COUNT)
    return bytes_of(folder / "cache")


@pytest.fixture
def writer(tmp_path):
    """A process that captures when it is told to."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path, str(COUNT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    yield process
    process.kill()
    process.wait(30)
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("files", [0, 1, 9], ids=["at once", "a part", "a shard"])
@pytest.mark.slow
def test_killed_at_a_moment_it_goes_on_to_the_same_bytes(writer, unbroken, tmp_path, files):
    """The writer is killed when so many files are there."""
    writer.stdin.write(b"go\n")
    writer.stdin.flush()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("part-*.parquet"))) < files and writer.poll() is None:
        assert time.monotonic() < deadline
    writer.send_signal(signal.SIGKILL)
    assert writer.wait(30) in {-signal.SIGKILL, 0}
    try:
        assert bytes_of(tmp_path / "cache") == unbroken
        assert len(read_cache(tmp_path / "cache").rows) == COUNT
    except (ShotlessError, AssertionError, FileNotFoundError):
        assert not (tmp_path / "cache" / "manifest.json").exists()
    store = Store(tmp_path / "work", IDENTITY)
    with store.lock():
        lacking = store.missing(keys(COUNT))
    assert sorted(capture(tmp_path / "work", tmp_path / "cache", COUNT)) == sorted(lacking)
    assert bytes_of(tmp_path / "cache") == unbroken
    assert not list(tmp_path.rglob("*.tmp"))
