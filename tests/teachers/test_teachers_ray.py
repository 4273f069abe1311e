"""The teacher on Ray: the same files, names and bytes as in one process, whoever dies on the way."""

import os
import shutil
import signal

import pytest
from test_teacher_capture import KEPT, SHOTS, TASK, TEXTS, World, bytes_of

from pipeline.cache.store import Store
from pipeline.teachers import ray_workers
from pipeline.teachers.sheets import Sheet
from pipeline.errors import ShotlessError
from pipeline.teachers import capture as capture_module
from pipeline.teachers.capture import capture

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra `ray`)")
pytestmark = [pytest.mark.filterwarnings("ignore::ResourceWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
CONTEXTS = ["", *SHOTS, *(shot * 2 for shot in SHOTS), *(shot * 3 for shot in SHOTS)]
WORKERS = 2
every = pytest.mark.skipif(not os.environ.get("SHOTLESS_RAY"), reason="a minute and a half of starting workers; `make test-ray` runs it")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One Ray for all tests here: starting it takes seconds."""
    yield
    ray.shutdown()


@pytest.fixture
def pools(monkeypatch):
    """Every pool of workers that is started."""
    started = []

    class Recorded(ray_workers.Workers):
        def __init__(self, *args):
            started.append(self)
            super().__init__(*args)

    monkeypatch.setattr("pipeline.teachers.ray_scorer.Workers", Recorded)
    return started


@pytest.fixture
def worlds(tmp_path, model_folder):
    """Two folders alike."""
    made = [World(tmp_path / name, model_folder("llama")) for name in ("local", "ray")]
    for world in made:
        world.write_contexts(CONTEXTS)
    return made


def run(world, **how):
    folder = world.artifacts / "scores"
    shutil.rmtree(folder, ignore_errors=True)
    files = world.artifacts / "contexts.parquet", world.artifacts / "transfer.parquet"
    fidelity = world.artifacts / "fidelity.json"
    capture("few", world.model, *files, folder, TASK, KEPT, "float32", world.work, 1, None, fidelity, **how)
    return bytes_of(folder), fidelity.read_bytes()


def stored(world):
    """The store's parts and plans, and its engine's report."""
    files = [file for file in world.work.rglob("*") if file.suffix == ".parquet" or file.name == "engine.json"]
    return {file.relative_to(world.work): file.read_bytes() for file in files}


@every
def test_workers_leave_the_files_that_one_process_leaves(worlds, pools):
    local, on_ray = worlds
    assert run(on_ray, on_ray=True, workers=WORKERS) == run(local)
    assert stored(on_ray) == stored(local)
    assert len(stored(local)) > len(CONTEXTS)
    assert len(pools) == 1
    assert not pools[0].pids, "the workers have been ended"


def test_a_worker_that_is_killed_is_replaced_and_its_part_done_again(worlds, pools, monkeypatch, capsys):
    local, on_ray = worlds
    expected, killed, original = run(local), [], Store.write

    def write_and_kill(self, *args):
        original(self, *args)
        if not killed:
            killed.append(next(iter(pools[0].pids.values())))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Store, "write", write_and_kill)
    assert run(on_ray, on_ray=True, workers=WORKERS) == expected
    assert stored(on_ray) == stored(local)
    assert f"worker {killed[0]} on " in capsys.readouterr().err
    assert len(on_ray.scored()) == len(set(on_ray.scored())) == len(CONTEXTS) * (len(TEXTS) + 2)


@every
def test_a_part_in_whose_hands_worker_after_worker_dies_is_named(worlds, monkeypatch):
    monkeypatch.setattr(ray_workers.ScoringWorker, "score", lambda self, part, sheet: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ShotlessError, match=r"part-\w+-000-\d+: 3 workers died with this part in hand"):
        run(worlds[1], on_ray=True, workers=1)


@every
def test_an_error_of_a_worker_names_the_part_and_what_happened(worlds, monkeypatch):
    original, calls = Sheet.of.__func__, []

    def wrong_after_the_probe(cls, asked, context, examples):
        sheet = original(cls, asked, context, examples)
        calls.append(context)
        return sheet if len(calls) == 1 else Sheet(sheet.prefixes, sheet.examples, [[10**6] for _ in sheet.queries], sheet.answers)

    monkeypatch.setattr(Sheet, "of", classmethod(wrong_after_the_probe))
    rows = len(TEXTS) + 2
    with pytest.raises(ShotlessError, match=rf"part-\w+-000-\d+ \({rows} rows\): worker \d+ on \S+: IndexError: index out of range"):
        run(worlds[1], on_ray=True, workers=WORKERS)


@every
def test_a_worker_with_other_weights_is_refused(worlds, monkeypatch, model_folder):
    """The folder changes between the driver's look at it and the workers'."""
    world, original = worlds[1], capture_module._capture

    def change_and_capture(*args):
        shutil.rmtree(world.model)
        shutil.copytree(model_folder("llama", num_hidden_layers=2), world.model)
        original(*args)

    monkeypatch.setattr(capture_module, "_capture", change_and_capture)
    with pytest.raises(ShotlessError, match=r"no part was begun: a worker of Ray: MismatchError: (?s:.*)weights"):
        run(world, on_ray=True, workers=1)
