"""`shotless run` over a small DAG that DVC runs: what it says on a terminal and without one, how it fails and ends."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import PROJECT
from serving_world import choose, shotless

from pipeline.commands import reproduce as module
from pipeline.commands.reproduce import Plan, reproduce, shares_of_cores
from pipeline.errors import ShotlessError

METER = "import sys; from pipeline.progress import progress\nwith progress('work', 2, 'rows') as meter:\n    meter.advance(2, 'a note')\n"
DAG = """
stages:
  first: {cmd: "echo chatter && cp in.txt first.txt", deps: [in.txt], outs: [first.txt]}
  second: {cmd: "$SHOTLESS_PYTHON meter.py && cp first.txt second.txt", deps: [first.txt], outs: [second.txt]}
  third: {cmd: "sh third.sh && cp in.txt third.txt", deps: [in.txt, third.sh, second.txt], outs: [third.txt]}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n", "utf-8")
    for name, text in {"dvc.yaml": DAG, "in.txt": "in", "meter.py": METER, "third.sh": "echo ok\n"}.items():
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def log_of(folder):
    [log] = (folder / ".work" / "logs").iterdir()
    return log


def ended(said):
    """The stages of whose end a line tells, in order; what runs is told between them, more often on a slow machine."""
    return [line.split(":")[0] for line in said.splitlines()[1:-1] if not line.startswith("…")]


@pytest.mark.slow
def test_a_line_a_stage_all_in_the_log_and_a_second_run_that_runs_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    reproduce(folder, folder, ["second"])
    said = capsys.readouterr().err
    log = log_of(folder)
    assert ended(said) == ["first", "second"]
    assert "… second  work: 2/2 rows, " in said
    assert f"2 of 2 stages to run; all that they print is in .work/logs/{log.name}" in said
    assert said.splitlines()[-1].startswith("Done in ")
    assert "chatter" in log.read_text("utf-8")
    assert "work: 2/2 rows" in log.read_text("utf-8")
    reproduce(folder, folder, ["second"])
    assert capsys.readouterr() == ("Nothing to run: all 2 stages are up to date.\n", "")
    assert log_of(folder) == log


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo before\necho 'error: 3 rows.' >&2\necho 'Take more.' >&2\nexit 2\n", "third: 3 rows.\nTake more.\nWhat is done"),
        (f"{sys.executable} -c 'raise KeyError(7)'\n", "third: Traceback (most recent call last):"),
        ("echo killed; exit 9\n", "third: Running stage 'third':\n> sh third.sh && cp in.txt third.txt\nkilled\nERROR: failed to"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_stage_that_fails_says_its_own_error_in_front_and_the_next_run_goes_on(folder, capsys, script, said):
    (folder / "third.sh").write_text(script, "utf-8")
    with pytest.raises(ShotlessError) as caught:
        reproduce(folder, folder)
    assert str(caught.value).startswith(said)
    assert ("ERROR: failed to" in str(caught.value)) == ("ERROR: failed to" in said)
    assert str(caught.value).endswith(f"is in .work/logs/{log_of(folder).name}")
    assert "second: " in capsys.readouterr().err
    if "Take more" in said:
        log_of(folder).unlink()
        (folder / "third.sh").write_text("echo ok\n", "utf-8")
        reproduce(folder, folder)
        assert ended(capsys.readouterr().err) == ["third"]


@pytest.mark.slow
def test_an_unknown_stage_is_named_before_anything_runs(folder):
    with pytest.raises(ShotlessError, match=r"dvc\.yaml: .*'nope'"):
        reproduce(folder, folder, ["nope"])
    assert not (folder / ".work").exists()


RUN = "from pathlib import Path; from pipeline.commands.reproduce import reproduce; reproduce(Path(), Path())"


@pytest.mark.slow
def test_on_a_terminal_it_shows_what_runs_and_how_many_are_done(folder):
    (folder / "third.sh").write_text("sleep 2\n", "utf-8")
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen([sys.executable, "-c", RUN], env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # how Linux ends a terminal that nobody holds
        pass
    os.close(ours)
    assert process.wait() == 0
    for text in ("3 of 3 stages to run", "2 of 3 stages", "third", "second: ", "Done in "):  # the others may end between two drawings
        assert text in shown.decode()


@pytest.mark.slow
def test_a_run_that_is_told_to_end_ends_its_stages(folder):
    (folder / "third.sh").write_text("echo $$ > pid\nsleep 60\n", "utf-8")
    process = subprocess.Popen([sys.executable, "-c", RUN], stderr=subprocess.DEVNULL)
    while not (folder / "pid").is_file() or not (folder / "pid").read_text("utf-8"):
        assert process.poll() is None, "the run ended before it could be told to"
        time.sleep(0.02)
    stage = psutil.Process(int((folder / "pid").read_text("utf-8")))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs([stage], timeout=10)
    assert not alive


@pytest.mark.slow
def test_a_lane_that_is_killed_ends_the_run_and_takes_its_stage_with_it(folder):
    (folder / "third.sh").write_text("echo $$ > pid\nsleep 60\n", "utf-8")
    process = subprocess.Popen([sys.executable, "-c", RUN], stderr=subprocess.PIPE, text=True)
    while not (folder / "pid").is_file() or not (folder / "pid").read_text("utf-8"):
        assert process.poll() is None, "the run ended before its lane could be killed"
        time.sleep(0.02)
    stage = psutil.Process(int((folder / "pid").read_text("utf-8")))
    [lane] = psutil.Process(process.pid).children()
    lane.kill()
    _, said = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "third: Running stage 'third'" in said
    _, alive = psutil.wait_procs([stage], timeout=10)
    assert not alive


PLANNED = {
    "prepare": (),
    "teacher@a": ("prepare",),
    "teacher@b": ("prepare",),
    "cost": ("prepare",),
    "report": ("teacher@a", "teacher@b", "cost"),
}


def test_time_left_is_that_of_the_work_at_the_rate_so_far(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    overhead = module.SECONDS_A_STAGE
    plan = Plan(PLANNED, 6, lambda: {"teacher@a": 100.0, "teacher@b": 300.0})
    plan.start("prepare")
    clock[0] = 5.0
    assert plan.end("prepare") == "prepare: 5 s"
    plan.start("teacher@a")
    assert plan.seconds_left(1) is None
    assert plan.whole(1) == "2 of 6 stages; to do: teacher, cost, report"
    clock[0] += overhead + 50.0
    assert plan.end("teacher@a") == f"teacher@a: {overhead + 50:.0f} s"
    plan.start("teacher@b")
    assert plan.seconds_left(1) == pytest.approx((overhead + 150.0) + 2 * overhead)
    clock[0] += 20.0
    assert plan.seconds_left(1) == pytest.approx((overhead + 150.0 - 20.0) + 2 * overhead)
    assert plan.seconds_left(2) == pytest.approx(plan.seconds_left(1) / 2)
    assert plan.whole(1) == "3 of 6 stages, about 2 min left; to do: cost, report"


def test_what_has_most_behind_it_starts_first_and_what_measures_time_runs_alone():
    work = {"teacher@a": 100.0, "teacher@b": 300.0}
    plan = Plan(PLANNED, 5, lambda: work)
    assert plan.next() == "prepare"
    plan.start("prepare")
    assert plan.next() is None, "all others wait for it"
    plan.end("prepare")
    for stage in ("teacher@b", "teacher@a"):
        assert plan.next() == stage
        plan.start(stage)
    assert plan.next() is None
    plan.end("teacher@b")
    assert plan.next() is None, "a teacher still runs"
    plan.end("teacher@a")
    assert plan.next() == "cost"
    plan.start("cost")
    assert plan.next() is None
    plan.end("cost")
    assert plan.next() == "report"


def test_two_lanes_take_half_of_the_cores_each_if_two_long_stages_can_run_at_once(monkeypatch):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _: {3, 1, 2, 0, 7})
    monkeypatch.setattr(module, "cores", lambda: 5)
    assert shares_of_cores(PLANNED, 2) == [[0, 1], [2, 3, 7]]
    assert shares_of_cores(PLANNED, 1) == [[]]
    chain = {"student@a": ("prepare",), "evaluate@a": ("student@a",), "select": ("student@a",), "risk@a": ("evaluate@a",)}
    assert shares_of_cores({"prepare": (), **chain}, 2) == [[]]
    monkeypatch.setattr(module, "cores", lambda: 1)
    assert shares_of_cores(PLANNED, 2) == [[]]


@pytest.mark.slow
def test_two_stages_run_at_once_each_on_its_own_cores(folder, capsys, monkeypatch):
    """Each waits for the other, so one by one neither would end."""
    wait = "touch {}.here; while [ ! -e {}.here ]; do sleep 0.05; done; taskset -cp $$ | sed 's/.*: //' > {}.txt"
    both = {f"teacher@{one}": wait.format(one, other, one) for one, other in ("ab", "ba")}
    each = "".join(f'      {name[-1]}: {{run: "{command}"}}\n' for name, command in both.items())
    stage = "    do: {cmd: '${item.run}', deps: [in.txt], outs: ['${key}.txt']}\n"
    (folder / "dvc.yaml").write_text(f"stages:\n  teacher:\n    foreach:\n{each}{stage}", "utf-8")
    first, *_, last = sorted(os.sched_getaffinity(0)) * 2  # a worker of these tests may have one core
    monkeypatch.setattr(module, "shares_of_cores", lambda *_: [[first], [last]])
    reproduce(folder, folder)
    assert sorted(ended(capsys.readouterr().err)) == sorted(both)
    assert {(folder / f"{name}.txt").read_text("utf-8").strip() for name in "ab"} == {str(first), str(last)}


SHOW = """
import os, signal, sys
import psutil
print("stage", sys.argv[1:], __name__, "torch" in sys.modules, *psutil.Process().parent().cmdline()[1:3])
if sys.argv[1:] == ["killed"]:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_stage_runs_in_a_fork_of_its_lane_and_fails_as_it_does_alone(folder):
    (folder / "stages").mkdir()
    (folder / "stages" / "__init__.py").touch()
    (folder / "stages" / "student.py").write_text(SHOW, "utf-8")
    (folder / "stages" / "report.py").write_text(SHOW, "utf-8")
    stages = {"a": ("report", "light"), "b": ("student", "heavy"), "c": ("student", "killed")}
    line = "  {}: {{cmd: 'sh {}/stages/run {} {}', deps: [in.txt]}}\n"
    each = [line.format(name, PROJECT, *command) for name, command in stages.items()]
    (folder / "dvc.yaml").write_text("stages:\n" + "".join(each), "utf-8")
    with pytest.raises(ShotlessError, match="exited with 137"):
        reproduce(folder, folder)
    said = [line for line in log_of(folder).read_text("utf-8").splitlines() if line.startswith("stage")]
    assert said == [
        "stage ['light'] __main__ False -m pipeline.commands.lane",
        "stage ['heavy'] __main__ True -m pipeline.commands.lane",
        "stage ['killed'] __main__ True -m pipeline.commands.lane",
    ]


@pytest.mark.parametrize("preset", [None, "small"])
@pytest.mark.parametrize("student", ["cd", None])
def test_a_run_ends_with_how_the_chosen_student_is_used(tmp_path, monkeypatch, preset, student):
    workspace = tmp_path if preset is None else tmp_path / "runs" / preset
    choose(workspace, student)
    for name in ("pipeline.params.resolve", "pipeline.commands.reproduce.reproduce", "pipeline.report.tables.print_summary"):
        monkeypatch.setattr(name, lambda *_: None)
    monkeypatch.setattr("pipeline.params.presets.make_workspace", lambda name, project: Path("runs") / name)
    said = shotless(tmp_path, "run", *([] if preset is None else ["--preset", preset])).stdout.splitlines()
    named = "" if preset is None else "--student runs/small/artifacts/students/cd "
    use = f"  use it:          shotless predict {named}--input new.jsonl --output answers.jsonl"
    assert said[0] == "Next:"
    assert (use in said) == (student is not None)
    assert len(said) == 3 + (student is not None)
