"""The teacher on Ray: the same files, names and bytes as in one process, whoever dies on the way; how machines are divided."""

import os
import shutil
import signal
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teachers.conftest import CONTEXTS, TEXTS, World

from pipeline.cache.store import Store
from pipeline.errors import ShotlessError, UsageError
from pipeline.params import RuntimeParams
from pipeline.schema import Context
from pipeline.teachers import scorer
from pipeline.teachers.ray import RayBackend, connect, shape_of

RAY = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
every = pytest.mark.skipif(not os.environ.get("SHOTLESS_RAY"), reason="a minute of starting workers; `make test-ray` runs it")
SHOTS = CONTEXTS[1].demonstrations
MORE = [*CONTEXTS, *(Context(f"more/{count}", "", SHOTS * count) for count in (2, 3, 4))]
WORKERS = 2


@pytest.fixture(scope="module")
def ray():
    """One Ray for all tests here: starting it takes seconds."""
    module = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
    yield module
    module.shutdown()


@pytest.fixture
def worlds(tmp_path, model_folder, ray, monkeypatch):
    """Two folders alike, one of them on Ray."""
    monkeypatch.setattr(scorer, "ROWS_PER_PART", 4)
    made = [World(tmp_path / name, model_folder("llama")) for name in ("local", "ray")]
    for world in made:
        world.write_contexts(MORE)
    made[1].runtime = {"threads": 1, "engine": "ray", "workers": WORKERS}
    return made


def captured(world):
    """Everything that a capture leaves: the cache, its metrics, and the store without what depends on the clock."""
    world.capture()
    return world.bytes(), sorted(file.name for file in world.folders.work.rglob("*.parquet"))


@RAY
@every
def test_workers_leave_the_files_that_one_process_leaves(worlds):
    local, on_ray = worlds
    assert captured(on_ray) == captured(local)
    assert len(on_ray.scored()) == len(set(on_ray.scored())) == len(MORE) * (len(TEXTS) + 2)


@RAY
@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced_and_its_part_done_again(worlds, monkeypatch, capsys):
    local, on_ray = worlds
    expected, killed, pools = captured(local), [], []
    original, write = RayBackend.__init__, Store.write
    monkeypatch.setattr(RayBackend, "__init__", lambda self, *args: pools.append(self) or original(self, *args))

    def write_and_kill(self, *args):
        write(self, *args)
        if not killed:
            killed.append(next(iter(pools[0]._ready.values())))
            os.kill(int(killed[0].split()[1]), signal.SIGKILL)

    monkeypatch.setattr(Store, "write", write_and_kill)
    assert captured(on_ray) == expected
    assert f"{killed[0]} died. worker " in capsys.readouterr().err
    assert len(on_ray.scored()) == len(set(on_ray.scored())) == len(MORE) * (len(TEXTS) + 2)
    assert not pools[0]._ready, "the workers have been ended"


@RAY
@every
def test_a_part_in_whose_hands_worker_after_worker_dies_is_named(worlds, monkeypatch):
    from pipeline.teachers.ray import ScoringWorker

    monkeypatch.setattr(ScoringWorker, "score", lambda self, job: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ShotlessError, match=r"\d+ prompts from \w{12} on: worker \d+ on \S+: died 3 times"):
        worlds[1].capture()


@RAY
@every
def test_an_error_of_a_worker_names_the_part_and_what_happened(worlds, monkeypatch):
    from pipeline.teachers.ray import ScoringWorker

    monkeypatch.setattr(ScoringWorker, "score", lambda self, job: [][0])
    with pytest.raises(ShotlessError, match=r"\d+ prompts from \w{12} on: worker \d+ on \S+: IndexError: list index out of range"):
        worlds[1].capture()


@RAY
@every
def test_a_worker_with_other_weights_is_refused(worlds, monkeypatch, model_folder):
    """The folder changes between the driver's look at it and the workers'."""
    world, original = worlds[1], RayBackend.open

    def change_and_open(self, probe):
        shutil.rmtree(world.model)
        shutil.copytree(model_folder("llama", num_hidden_layers=2), world.model)
        return original(self, probe)

    monkeypatch.setattr(RayBackend, "open", change_and_open)
    with pytest.raises(ShotlessError, match=r"nothing was scored: a worker of Ray: MismatchError: (?s:.*)weights"):
        world.capture()


def node(cores, gpus=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cores), **({"GPU": float(gpus)} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "expected"),
    [
        ([node(2)], 2, None, (2, 1, 0)),
        ([node(16)], None, None, (1, 16, 0)),
        ([node(16), node(16)], 3, None, (3, 8, 0)),
        ([node(16), node(16)], None, 4, (2, 4, 0)),
        ([node(64, 8), node(64, 8), node(4)], None, None, (16, 8, 1)),
        ([node(8), node(8, alive=False)], None, None, (1, 8, 0)),
        ([node(0), node(8), node(8)], None, None, (2, 8, 0)),
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
    threads = shape_of(nodes, workers, None)[1]
    assert sum(count // threads for count in cores) >= workers > sum(count // (threads + 1) for count in cores)


def test_more_workers_than_gpus_are_refused():
    with pytest.raises(UsageError, match="3 workers need a GPU each, and Ray's machines have 2"):
        shape_of([node(16, 2)], 3, None)


@pytest.mark.parametrize(("key", "other"), [("token_budget", 64), ("threads", 7), ("name", "generic"), ("device", "cuda:0")])
def test_a_worker_unlike_the_first_is_refused(key, other):
    """On machines that differ, which no test here has: what the pool does with their reports."""
    first = {"name": "shared_prefix", "reason": "", "token_budget": 1024, "device": "cpu", "threads": 1}
    pool = RayBackend({}, {}, None, None)
    pool._note("a", {**first, "who": "worker 1 on one"})
    pool._note("b", {**first, "who": "worker 2 on two"})
    with pytest.raises(ShotlessError, match=f"worker 3 on three has {key} {other!r}, and the first one {first[key]!r}"):
        pool._note("c", {**first, "who": "worker 3 on three", key: other})


def test_without_ray_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install -c constraints.txt 'shotless\[ray\]'"):
        connect(2)


def test_workers_are_for_ray():
    with pytest.raises(ValueError, match="`workers` is for `engine: ray`"):
        RuntimeParams(workers=2)
    assert RuntimeParams(engine="ray", workers=2).workers == 2
