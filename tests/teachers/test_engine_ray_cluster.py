"""How Ray's machines are divided among workers, and what is said where there is no Ray."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.teachers.ray_cluster import Shape, connect, shape_of
from pipeline.teachers.ray_workers import Workers
from pipeline.errors import ShotlessError, UsageError
from pipeline.params.evaluation import RuntimeParams


def node(cores, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cores), **({"GPU": float(gpus)} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "expected"),
    [
        ([node(2)], 2, None, Shape(2, 1, 0)),
        ([node(16)], None, None, Shape(1, 16, 0)),
        ([node(16), node(16)], 3, None, Shape(3, 8, 0)),
        ([node(16), node(16)], None, 4, Shape(2, 4, 0)),
        ([node(64, 8), node(64, 8), node(4)], None, None, Shape(16, 8, 1)),
        ([node(8), node(8, alive=False)], None, None, Shape(1, 8, 0)),
        ([node(0), node(8), node(8)], None, None, Shape(2, 8, 0)),
    ],
)
def test_workers_share_the_cores_of_their_machines(nodes, workers, threads, expected):
    assert shape_of(nodes, workers, threads) == expected


@given(st.lists(st.integers(1, 64), min_size=1, max_size=6), st.integers(1, 40))
def test_all_workers_fit_and_with_one_thread_more_they_would_not(cores, workers):
    nodes = [node(count) for count in cores]
    if sum(cores) < workers:
        with pytest.raises(UsageError, match=f"runtime.workers: {workers} workers do not fit"):
            shape_of(nodes, workers, None)
        return
    threads = shape_of(nodes, workers, None).threads
    assert sum(count // threads for count in cores) >= workers > sum(count // (threads + 1) for count in cores)


def test_more_workers_than_gpus_are_refused():
    with pytest.raises(UsageError, match="3 workers need a GPU each, and Ray's machines have 2"):
        shape_of([node(16, 2)], 3, None)


@pytest.mark.parametrize(
    ("key", "other"), [("token_budget", 64), ("torch", "1.0"), ("threads", 7), ("name", "generic"), ("device", "cuda:0")]
)
def test_a_worker_unlike_the_first_is_refused(key, other):
    """On machines that differ, which no test here has: what the pool does with their reports."""
    first = {"name": "shared_prefix", "token_budget": 1024, "device": "cpu", "torch": "2.0", "transformers": "5.0", "threads": 1}
    pool = object.__new__(Workers)
    pool.report, pool._starting, pool._who, pool.pids = None, set(), {}, {}
    pool._ready("a", {**first, "host": "one", "pid": 1})
    pool._ready("b", {**first, "host": "two", "pid": 2})
    with pytest.raises(ShotlessError, match=f"worker 3 on three has {key} {other!r}, and the first one {first[key]!r}"):
        pool._ready("c", {**first, "host": "three", "pid": 3, key: other})
    assert pool.pids == {"a": 1, "b": 2}


def test_without_ray_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install -c constraints.txt 'shotless\[ray\]'"):
        connect(2)


def test_workers_are_for_ray():
    with pytest.raises(ValueError, match="`workers` is for `engine: ray`"):
        RuntimeParams(workers=2)
    assert RuntimeParams(engine="ray", workers=2).workers == 2
