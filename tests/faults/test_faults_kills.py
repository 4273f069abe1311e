"""`kill -9` and power cuts at random points of every long stage: what is there is whole, and the next run ends with the same bytes."""

import json
import shutil

import pytest
from faults_world import LARGER, WORKED, count, dice
from stage_world import KILLED, bytes_of, copy

from pipeline.cache.folder import read_cache
from pipeline.errors import ShotlessError, UsageError
from pipeline.serving.student import open_student

POINTS = 2 * LARGER


class Case:
    """A stage, what it starts from, what it leaves, and how its output is read."""

    def __init__(self, argv, start, outputs, read):
        self.argv, self.start, self.outputs, self.read = argv, start, outputs, read

    def result(self, folder):
        return bytes_of(*(folder / output for output in self.outputs))


def whole(file):
    if not file.is_file():
        raise UsageError(f"{file}: no such file")
    return file.read_text("utf-8")


def read_student(folder):
    return open_student(folder / "artifacts/students/cd").weights_sha256


CASES = {
    "teacher": Case(
        ("stages.teacher", "few_shot"),
        "prepared",
        ("artifacts/scores/few_shot",),
        lambda folder: read_cache(folder / "artifacts/scores/few_shot").rows.to_pylist(),
    ),
    "student": Case(("stages.student", "cd"), "captured", ("artifacts/students/cd", "metrics/train", "metrics/curves"), read_student),
    "report": Case(("stages.report",), "evaluated", ("report",), lambda folder: json.loads(whole(folder / "report/metrics.json"))),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory, stages):
    """A stage with its unbroken run: final bytes, what is read of them, steps, seconds."""
    case = CASES[request.param]
    case.name, case.start_folder = request.param, request.getfixturevalue(case.start)
    whole = copy(case.start_folder, tmp_path_factory.mktemp("whole") / "project")
    ended = stages.good(whole, *case.argv)
    case.steps, case.seconds, case.bytes, case.rows = ended.steps, ended.seconds, case.result(whole), case.read(whole)
    return case


def go_on(case, folder, stages, random):
    """What a killed run has left is whole or refused; the next run, with or without DVC's emptying of outputs, ends with the same bytes."""
    try:
        found = case.read(folder)
    except ShotlessError:
        pass
    else:
        assert found == case.rows
    if random.random() < 0.5:
        shutil.rmtree(folder / case.outputs[0], ignore_errors=True)
    stages.good(folder, *case.argv)
    assert case.result(folder) == case.bytes
    assert not list(folder.rglob("*.tmp"))


def test_killed_at_a_random_step_it_goes_on_to_the_same_bytes(case, stages, tmp_path):
    random = dice(f"kill {case.name}")
    for _ in range(POINTS):
        folder = copy(case.start_folder, tmp_path / "project")
        for _ in range(random.choice([1, 1, 2])):  # a run may be killed again when it goes on
            stages.run(folder, *case.argv, die_at=random.randrange(1, case.steps))
        go_on(case, folder, stages, random)
        count(f"`kill -9` of the {case.name} at a step", WORKED)


def test_killed_after_a_random_time_it_goes_on_to_the_same_bytes(case, stages, tmp_path):
    random = dice(f"time {case.name}")
    killed = 0
    for _ in range(POINTS):
        folder = copy(case.start_folder, tmp_path / "project")
        killed += stages.run(folder, *case.argv, seconds=random.uniform(0.02, case.seconds * 0.9)).code == KILLED
        go_on(case, folder, stages, random)
        count(f"`kill -9` of the {case.name} at a moment", WORKED)
    assert killed


@pytest.mark.parametrize("worst", [True, False], ids=["all unsynced lost", "some unsynced lost"])
def test_after_a_power_cut_it_goes_on_to_the_same_bytes(case, stages, tmp_path, worst):
    random = dice(f"power {case.name} {worst}")
    for number in range(POINTS):
        folder = copy(case.start_folder, tmp_path / "project")
        ended = stages.run(folder, *case.argv, power=True, worst=worst, die_at=random.randrange(1, case.steps), seed=number)
        assert ended.code == KILLED, ended.err
        go_on(case, folder, stages, random)
        count(f"power cut under the {case.name}", WORKED)


def test_what_a_stage_has_finished_survives_a_power_cut_right_after_it(case, stages, tmp_path):
    folder = copy(case.start_folder, tmp_path / "project")
    stages.run(folder, *case.argv, power=True, worst=True, power_at_end=True)
    assert case.result(folder) == case.bytes
    count(f"power cut after the {case.name}", WORKED)
