"""`kill -9` and power cuts at random points of every stage: what is there is whole, and the next run ends with the same bytes."""

import json
import shutil

import pytest
from faults_world import LARGER, WORKED, count, dice
from stage_world import KILLED, bytes_of, copy

from pipeline.cache.folder import read_cache
from pipeline.data.prepare import raw_file
from pipeline.errors import ShotlessError, UsageError
from pipeline.files import read_sealed_json
from pipeline.models.identity import check_fetched, weights_sha256
from pipeline.schema import CONTEXTS, PREDICTIONS, TARGETS, examples, read_table
from pipeline.serving.student import open_student

POINTS = LARGER


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


def json_in(file):
    return lambda folder: json.loads(whole(folder / file))


def read_student(folder):
    return open_student(folder / "artifacts/students/cd").weights_sha256


def read_fetched(folder):
    """A model or data file that is there is the one that was fetched."""
    model, raw = folder / "artifacts/models/tiny", folder / "artifacts/raw"
    found = []
    if model.exists():
        found.append(weights_sha256(model))
        check_fetched(model, found[0])
    found += [raw_file(folder / "artifacts", name.name).read_bytes() for name in (sorted(raw.iterdir()) if raw.exists() else ())]
    if len(found) < 3:
        raise UsageError(f"{folder}: not all was fetched")
    return found


def read_prepared(folder):
    data, fields = folder / "artifacts/data", examples(("text",))
    names = ("demonstrations", "transfer", "evaluation/test")
    return [read_table(data / f"{name}.parquet", fields) for name in names] + [read_table(data / "contexts/orders.parquet", CONTEXTS)]


def read_tuned(folder):
    whole(folder / "metrics/train/tuned-more.json")
    return weights_sha256(folder / "artifacts/tuned/more")


def read_targets(folder):
    calibration = folder / "artifacts/targets/few_shot/calibration.json"
    whole(calibration)
    return read_table(folder / "artifacts/targets/few_shot/targets.parquet", TARGETS), read_sealed_json(calibration)


CASES = {
    "fetch": Case(("stages.fetch",), "made", ("artifacts/models", "artifacts/raw"), read_fetched),
    "prepare": Case(("stages.prepare",), "fetched", ("artifacts/data", "metrics"), read_prepared),
    "tune": Case(("stages.tune", "more"), "tunable", ("artifacts/tuned", "metrics/train", "metrics/curves"), read_tuned),
    "teacher": Case(
        ("stages.teacher", "few_shot"),
        "prepared",
        ("artifacts/scores/few_shot",),
        lambda folder: read_cache(folder / "artifacts/scores/few_shot").rows.to_pylist(),
    ),
    "targets": Case(("stages.targets", "few_shot"), "scored", ("artifacts/targets", "metrics/targets"), read_targets),
    "student": Case(("stages.student", "cd"), "captured", ("artifacts/students/cd", "metrics/train", "metrics/curves"), read_student),
    "evaluate": Case(
        ("stages.evaluate", "cd"),
        "trained",
        ("artifacts/predictions", "metrics"),
        lambda folder: read_table(folder / "artifacts/predictions/cd.parquet", PREDICTIONS),
    ),
    "check": Case(("stages.check", "cd"), "answered", ("metrics/risk",), json_in("metrics/risk/cd.json")),
    "compare": Case(("stages.compare",), "evaluated", ("metrics/compare.json",), json_in("metrics/compare.json")),
    "report": Case(("stages.report",), "evaluated", ("report",), json_in("report/metrics.json")),
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
    assert not [*folder.rglob("*.tmp"), *folder.rglob(".fetch-*")]


def test_killed_at_a_random_step_it_goes_on_to_the_same_bytes(case, stages, tmp_path):
    random = dice(f"kill {case.name}")
    for _ in range(POINTS):
        folder = copy(case.start_folder, tmp_path / "project")
        for _ in range(random.choice([1, 1, 2])):  # a run may be killed again when it goes on
            stages.run(folder, *case.argv, die_at=random.randrange(1, case.steps))
        go_on(case, folder, stages, random)
        count(f"`kill -9` of {case.name}", WORKED)


def test_killed_after_a_random_time_it_goes_on_to_the_same_bytes(case, stages, tmp_path):
    random = dice(f"time {case.name}")
    for _ in range(POINTS):
        folder, seconds = copy(case.start_folder, tmp_path / "project"), random.uniform(0.02, case.seconds * 0.9)
        while stages.run(folder, *case.argv, seconds=seconds).code != KILLED:  # it was done before: the machine is quicker now
            folder, seconds = copy(case.start_folder, tmp_path / "project"), seconds / 2
        go_on(case, folder, stages, random)
        count(f"`kill -9` of {case.name}", WORKED)


@pytest.mark.parametrize("worst", [True, False], ids=["all unsynced lost", "some unsynced lost"])
def test_after_a_power_cut_it_goes_on_to_the_same_bytes(case, stages, tmp_path, worst):
    random = dice(f"power {case.name} {worst}")
    for number in range(POINTS):
        folder = copy(case.start_folder, tmp_path / "project")
        ended = stages.run(folder, *case.argv, power=True, worst=worst, die_at=random.randrange(1, case.steps), seed=number)
        assert ended.code == KILLED, ended.err
        go_on(case, folder, stages, random)
        count(f"power cut under or after {case.name}", WORKED)


def test_what_a_stage_has_finished_survives_a_power_cut_right_after_it(case, stages, tmp_path):
    folder = copy(case.start_folder, tmp_path / "project")
    stages.run(folder, *case.argv, power=True, worst=True, power_at_end=True)
    assert case.result(folder) == case.bytes
    count(f"power cut under or after {case.name}", WORKED)
