"""A student on two processes is the student of one: the same batches, losses and weights but for rounding, and one that writes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cached_world import FREE
from cached_world import World as CachedWorld
from conftest import PROJECT
from process_main import run
from safetensors.torch import load_file
from stage_world import copy
from student_world import make_world

from pipeline.errors import ShotlessError
from pipeline.students.processes import Processes, joined

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LABELS = {"batch_size": 5, "ce_weight": 0.5, "max_grad_norm": 0.2}  # one demonstration a step: of two processes one has none
JOBS = [
    {"name": "cd", **LABELS},
    {"name": "pieces", **LABELS, "micro_batch": 2, "held_back": 0.3, "evaluate_every": 4},
    {"name": "head", "batch_size": 4, "tuning": "head"},
    {"name": "seeds", "batch_size": 4, "seeds": [0, 1]},
]
AGAIN = [{"name": "again", **LABELS, "stop_at": 7}, {"name": "again", **LABELS}]
FREE_JOBS = [{"name": "free", "free": True, "learn_from": "scores/few", "batch_size": 5, "held_back": 0.3}]


@dataclass(frozen=True)
class Folders:
    """What one process left, and what two did."""

    one: Path
    two: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    """All jobs on one process, and on two that torchrun starts: once for all tests, for starting takes seconds."""
    root, base = tmp_path_factory.mktemp("processes"), model_folder("llama")
    labels = Folders(*(make_world(root / name, base).root for name in ("one", "two")))
    cache = Folders(*(CachedWorld(root / name, base, model_folder("llama", seed=3), FREE).root for name in ("free one", "free two")))
    for folder, jobs in ((labels.one, JOBS), (cache.one, FREE_JOBS)):
        for job in jobs:
            run({**job, "root": str(folder)}, Processes())
    jobs = [{**job, "root": str(labels.two)} for job in (*JOBS, *AGAIN)] + [{**job, "root": str(cache.two)} for job in FREE_JOBS]
    command = [*LAUNCHER, str(Path(__file__).with_name("process_main.py")), json.dumps(jobs)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"labels": labels, "cache": cache}


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / "artifacts" / "students" / name / "model.safetensors")


def losses(root: Path, name: str) -> list[list[float]]:
    lines = (root / "metrics" / "curves" / f"{name}.csv").read_text(encoding="utf-8").splitlines()[1:]
    return [[float(value or 0) for value in line.split(",")] for line in lines]


def files(root: Path) -> set[Path]:
    """All but locks, whose names follow from the place."""
    return {file.relative_to(root) for file in root.rglob("*") if file.is_file() and file.suffix != ".lock"}


@pytest.mark.parametrize(("world", "name"), [*(("labels", job["name"]) for job in JOBS), ("cache", "free")])
def test_two_processes_train_the_student_of_one(trained, world, name):
    one, two = trained[world].one, trained[world].two
    for here, there in zip(losses(one, name), losses(two, name), strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5)
    first, second = weights(one, name), weights(two, name)
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4


def test_two_processes_learn_something(trained, model_folder):
    before, after = load_file(model_folder("llama") / "model.safetensors"), weights(trained["labels"].two, "cd")
    assert max(float((after[key] - before[key]).abs().max()) for key in before) > 1e-3


def test_two_processes_leave_the_files_of_one(trained):
    one, two = (files(trained["labels"].one), files(trained["labels"].two))
    assert {file for file in two if "again" not in str(file)} == one


def test_two_processes_that_were_stopped_go_on_to_the_same_bits(trained):
    root = trained["labels"].two
    assert json.loads((root / "metrics" / "runtime" / "student-again.json").read_text(encoding="utf-8"))["resumed_at_step"] == 7
    unbroken, resumed = weights(root, "cd"), weights(root, "again")
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_the_stage_under_torchrun_leaves_the_student_of_one_process(captured, stages, tmp_path):
    """The command of docs/scale.md, in a project after its targets."""
    one, two = copy(captured, tmp_path / "one"), copy(captured, tmp_path / "two")
    stages.good(one, "stages.student", "cd")
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "SHOTLESS_WORK": str(two / ".work"), "OMP_NUM_THREADS": "1"}
    command = [*LAUNCHER, "-m", "stages.student", "cd"]
    done = subprocess.run(command, cwd=two, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = weights(one, "cd"), weights(two, "cd")
    assert max(float((first[key] - second[key]).abs().max()) for key in first) < 1e-4
    assert {file for file in files(two) if ".work" not in file.parts} == {file for file in files(one) if ".work" not in file.parts}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_of_a_batch_and_nothing_twice(count):
    batch = list(range(5))
    shares = [Processes(rank, count).share(batch) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == batch
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr("pipeline.students.processes.cores", lambda: 8)
    assert [Processes(0, 6, here).threads(None) for here in (1, 3, 6, 16)] == [8, 2, 1, 1]
    assert Processes(0, 6, 3).threads(5) == 5


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes.first
        assert processes.total(2.5) == 2.5
        processes.agree("anything", 1.0)


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ShotlessError, match=r"\$WORLD_SIZE is 2, and the processes do not find each other: .*RANK"), joined():
        pass
