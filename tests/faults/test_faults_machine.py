"""What machines do: full and read-only disks, folders that vanish, two runs at once, clocks that jump, locales without UTF-8, odd paths."""

import shutil
import subprocess
from contextlib import contextmanager

import pytest
from faults_world import IS_QUICK, LARGER, REFUSED, WORKED, count, dice
from serving_world import shotless_process
from small_project import small_params, write_params
from stage_world import bytes_of, copy

STAGES = {  # stage → what it starts from, what it leaves
    "teacher": (("stages.teacher", "few_shot"), "prepared", ("artifacts/scores/few_shot",)),
    "student": (("stages.student", "cd"), "captured", ("artifacts/students/cd", "metrics/train", "metrics/curves")),
}


@pytest.fixture(params=list(STAGES))
def stage(request):
    """Name, command, the folder it starts from, and a function to its outputs."""
    argv, start, outputs = STAGES[request.param]
    return request.param, argv, request.getfixturevalue(start), lambda folder: bytes_of(*(folder / output for output in outputs))


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, stages, request):
    """`unbroken(stage)`: the final bytes of a run that nothing happened to."""
    known = {}

    def result(name):
        if name not in known:
            argv, start, outputs = STAGES[name]
            folder = copy(request.getfixturevalue(start), tmp_path_factory.mktemp("unbroken") / "project")
            stages.good(folder, *argv)
            known[name] = bytes_of(*(folder / output for output in outputs))
        return known[name]

    return result


def mount(*arguments):
    """Mount something; where this user may not, as in most containers, the test is skipped."""
    if shutil.which("mount") is None or subprocess.run(["mount", *arguments], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("mounting needs root")


@contextmanager
def mounted(folder, *options):
    folder.mkdir()
    mount("-t", "tmpfs", *options, "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def size_of(folder):
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


def test_a_full_disk_ends_with_a_message_and_the_next_run_goes_on(stage, stages, unbroken, tmp_path):
    name, argv, start, result = stage
    random = dice(f"full {name}")
    free = {"teacher": 200_000, "student": 1_500_000}[name]
    for _ in range(LARGER):
        room = size_of(start) + 400_000 + random.randrange(free)
        with mounted(tmp_path / "disk", "-o", f"size={room}"):
            folder = shutil.copytree(start, tmp_path / "disk" / "project")
            ended = stages.run(folder, *argv)
            if ended.code:
                assert "the disk is full" in ended.message, ended.err
                assert "Make room and run again" in ended.message
            count("full disk", REFUSED if ended.code else WORKED)
            subprocess.run(["mount", "-o", f"remount,size={room * 20}", str(tmp_path / "disk")], check=True)
            stages.good(folder, *argv)
            assert result(folder) == unbroken(name)
            assert not list(folder.rglob("*.tmp"))
        (tmp_path / "disk").rmdir()


@pytest.mark.parametrize("place", ["artifacts", ".work"] if IS_QUICK else ["artifacts", ".work", "metrics", "."])
def test_a_read_only_folder_ends_with_a_message_that_names_it(stage, stages, unbroken, tmp_path, place):
    name, argv, start, result = stage
    folder = copy(start, tmp_path / "project")
    (folder / place).mkdir(exist_ok=True)
    mount("--bind", str(folder / place), str(folder / place))
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder / place)], check=True)
        ended = stages.run(folder, *argv)
        assert "read-only" in ended.message
        assert place in ended.message or place == "."
    finally:
        subprocess.run(["umount", str(folder / place)], check=True)
    count("read-only folder", REFUSED)
    stages.good(folder, *argv)
    assert result(folder) == unbroken(name)


@pytest.mark.parametrize("gone", ["model.safetensors"] if IS_QUICK else [".", "model.safetensors", "tokenizer.json"])
def test_a_vanished_model_ends_with_a_message_that_names_it(stage, stages, unbroken, tmp_path, gone):
    name, argv, start, result = stage
    folder = copy(start, tmp_path / "project")
    place = folder / "artifacts/models/tiny" / gone
    place.rename(tmp_path / "gone")
    message = stages.run(folder, *argv).message
    assert "artifacts/models/tiny" in message
    (tmp_path / "gone").rename(place)
    stages.good(folder, *argv)
    assert result(folder) == unbroken(name)
    count("vanished model", REFUSED)


def test_two_runs_at_once_leave_what_one_leaves(stage, stages, unbroken, tmp_path):
    name, argv, start, result = stage
    for _ in range(LARGER):
        folder = copy(start, tmp_path / "project")
        stages.good(folder, *argv, at_once=2)
        assert result(folder) == unbroken(name)
        count(f"two runs of {name} at once", WORKED)


@pytest.mark.parametrize(("kind", "start", "output"), [("fetch", "made", ""), ("prepare", "fetched", "data")])
def test_two_runs_of_a_stage_without_a_model_leave_what_one_leaves(request, stages, tmp_path, kind, start, output):
    folder = copy(request.getfixturevalue(start), tmp_path / "project")
    stages.good(folder, f"stages.{kind}")
    one = bytes_of(folder / "artifacts" / output)
    for again in range(3 * LARGER):
        if again % 2:
            shutil.rmtree(folder / "artifacts" / output)
        stages.good(folder, f"stages.{kind}", at_once=2)
        assert bytes_of(folder / "artifacts" / output) == one
        count(f"two runs of {kind} at once", WORKED)


@pytest.mark.parametrize("clock", ["jumps", "stands"])
def test_a_clock_that_jumps_or_stands_changes_nothing(stage, stages, unbroken, tmp_path, clock):
    name, argv, start, result = stage
    for seed in range(LARGER):
        folder = copy(start, tmp_path / "project")
        stages.good(folder, *argv, clock=clock, seed=seed)
        assert result(folder) == unbroken(name)
        count("a clock that jumps or stands", WORKED)


NAMES = ['-n "two" wor\'ds $HOME ünï-日本-🙂\na%20b', "two words", "ünï-日本-🙂", 'quote\'d "and" $HOME', "new\nline", "-n", "a%20b"]


@pytest.mark.parametrize("name", NAMES[:1] if IS_QUICK else NAMES)
def test_any_name_of_a_folder_does(stage, stages, unbroken, tmp_path, name):
    kind, argv, start, result = stage
    folder = copy(start, tmp_path / name)
    stages.good(folder, *argv)
    assert result(folder) == unbroken(kind)
    count("paths with spaces, quotes, unicode", WORKED)


def test_a_terminal_without_utf_8_gets_escapes(stages, trained, tmp_path):
    folder = copy(trained, tmp_path / "project")
    done = stages.good(folder, "shotless", "predict", "--student", "cd", "-i", "mine/gold.jsonl", encoding="ascii")
    assert len(done.out.splitlines()) == 4
    raw = small_params()
    raw["students"]["cd"]["learn_from"] = "targets/naïve…"
    write_params(folder, raw)
    assert "targets/na\\xefve" in stages.run(folder, "shotless", "check", encoding="ascii").message
    count("a locale without UTF-8", WORKED)
    count("a locale without UTF-8", REFUSED)


def test_a_locale_without_utf_8_works_or_says_what_to_set(trained, tmp_path, monkeypatch):
    """In a process of its own: how names are read is decided when Python starts."""
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}.items():
        monkeypatch.setenv(name, value)
    plain, odd = copy(trained, tmp_path / "plain"), copy(trained, tmp_path / "ünï")
    monkeypatch.setenv("SHOTLESS_WORK", str(plain / ".work"))
    if not IS_QUICK:  # it takes as long as importing torch does
        done = shotless_process(plain, "predict", "--student", "cd", "-i", "mine/gold.jsonl")
        assert done.returncode == 0, done.stderr
        count("a locale without UTF-8", WORKED)
    refused = shotless_process(odd, "predict", "--student", "cd", "-i", "mine/gold.jsonl")
    assert refused.returncode == 2, refused.stderr
    assert "set PYTHONUTF8=1" in refused.stderr
    assert "Traceback" not in refused.stderr
    count("a locale without UTF-8", REFUSED)


def test_a_folder_where_a_file_belongs_ends_with_a_message(stage, stages, tmp_path):
    _, argv, start, _ = stage
    for wrong in ("artifacts/data/transfer.parquet", "params.yaml", "artifacts/models/tiny/config.json"):
        folder = copy(start, tmp_path / "project")
        (folder / wrong).unlink()
        (folder / wrong).mkdir()
        assert (folder / wrong).name in stages.run(folder, *argv).message
        count("a folder in a file's place", REFUSED)
