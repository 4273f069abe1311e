"""A student on two processes is the student of one: the same batches, losses and weights but for rounding, and one that writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ShotlessError
from pipeline.files import write_json
from pipeline.models.process import cores
from pipeline.students.processes import Processes, joined
from stages import student as stage

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"batch_size": 5, "ce_weight": 0.5, "max_grad_norm": 0.2}  # one demonstration a step: of two processes one has none
JOBS = {
    "cd": LABELS,
    "pieces": {**LABELS, "micro_batch": 2, "validation_fraction": 0.4, "evaluate_every": 4},
    "lora": {"tuning": "lora", "learning_rate": 1e-2},
    "seeds": {"seeds": [0, 1], "steps": 4, "held_back": 0.3},
    "caches": {"auxiliary": {"few": {"hidden_weight": 0.5}, "reader": {}}, "validation_fraction": 0.4},
}


def weights(folder):
    return load_file(folder / "model.safetensors")


def largest_difference(one, two):
    return max(float((one[key] - two[key]).abs().max()) for key in one)


@pytest.mark.slow
def test_two_processes_train_the_student_of_one(make_project, tmp_path):
    one, two = make_project("one", caches=["few", "reader"]), make_project("two", caches=["few", "reader"])
    for project in (one, two):
        project.write_targets([[0.05, 0.95]] * 10)  # all alike, so that what is learnt helps on the validation part
    jobs = [{"root": str(two.root), "name": name, "params": two.params({name: job}).model_dump(mode="json")} for name, job in JOBS.items()]
    (tmp_path / "jobs.json").write_text(json.dumps([*jobs, {**jobs[0], "again": True}]))
    for name, job in JOBS.items():
        one.train(name, **job)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("process_main.py")), str(tmp_path / "jobs.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    base = weights(one.artifacts / "models" / "tiny")
    for name in JOBS:
        for here, there in zip(one.curve(name), two.curve(name), strict=True):
            assert [float(v or 0) for v in here.values()] == pytest.approx([float(v or 0) for v in there.values()], rel=1e-4, abs=1e-5)
        assert largest_difference(weights(one.output(name)), weights(two.output(name))) < 1e-4
        assert largest_difference(base, weights(two.output(name))) > 1e-3
    assert set(one.files()) == set(two.files())
    assert two.json("metrics/runtime/student-cd.json")["resumed_at_step"] == 7
    unbroken, resumed = weights(two.artifacts / "unbroken"), weights(two.output("cd"))
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


def test_the_stage_trains_from_the_resolved_params(make_project, monkeypatch):
    one, two = make_project("one"), make_project("two")
    one.train(steps=2)
    write_json(two.params({"cd": {"steps": 2}}).model_dump(mode="json"), two.artifacts / "params.json")
    monkeypatch.chdir(two.root)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    stage.main("cd")
    assert one.files() == two.files()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_of_a_batch_and_nothing_twice(count):
    shares = [Processes(rank, count).share(range(5)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == [0, 1, 2, 3, 4]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_of_one_machine_share_its_cores():
    assert [Processes(0, 6, here).threads(None) for here in (1, 2, 1000)] == [cores(), max(1, cores() // 2), 1]
    assert Processes(0, 6, 3).threads(5) == 5


def test_one_process_needs_no_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as processes:
        assert processes.first
        assert processes.total(2.5) == 2.5
        processes.check_same("anything", 1.0)


def test_processes_that_do_not_find_each_other_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ShotlessError, match=r"\$WORLD_SIZE is 2, and the processes do not find each other: .*RANK"), joined():
        pass
