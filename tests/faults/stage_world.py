"""Stages that can be killed, as fixtures: a small project at several points of its way, and damage to its files."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import PROJECT
from faults_world import SEED
from report_files import shipped_params, write_metrics, write_predictions
from small_project import make_project, small_params, write_params

KILLED = -9


@dataclass(frozen=True)
class Ended:
    """How a stage ended."""

    code: int
    out: str
    err: str
    seconds: float
    steps: int | None
    peak_bytes: int

    @property
    def message(self) -> str:
        """The message of a refusal; a traceback, or an ending without a message, is none and fails the test."""
        assert "Traceback" not in self.err, self.err
        assert self.code in {1, 2}, f"ended with {self.code}:\n{self.out}\n{self.err}"
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert lines, self.err
        return self.err[self.err.index("error: ") :]


class Stages:
    """Starts stages as forks of one process that has imported them."""

    def __init__(self, scratch: Path, environment: dict[str, str] | None = None) -> None:
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        paths = os.pathsep.join([str(PROJECT), str(Path(__file__).parent)])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | (environment or {})
        command = [sys.executable, str(Path(__file__).with_name("stage_server.py"))]
        self._log = (scratch / "server.log").open("w")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, cwd=PROJECT
        )
        assert self._said() == "ready"

    @property
    def err_file(self) -> Path:
        """What the present or the last stage says on standard error."""
        return self._scratch / "err"

    def _said(self) -> str:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        assert said, (self._scratch / "server.log").read_text()
        return said

    def run(self, folder: Path, *argv: str, **job) -> Ended:
        """Run `stages.X NAME` or `shotless …` in `folder`, and wait. `job` are the keys of `stage_server`."""
        files = {key: str(self._scratch / key) for key in ("out", "err", "count_file")}
        for file in files.values():
            Path(file).unlink(missing_ok=True)
        work = {"SHOTLESS_WORK": str(folder / ".work")} | job.pop("environment", {})
        order = {"folder": str(folder), "argv": list(argv), "seed": SEED, "environment": work} | files | job
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        done = json.loads(self._said())
        out, err = (Path(files[key]).read_text(encoding="utf-8", errors="replace") for key in ("out", "err"))
        steps = int(Path(files["count_file"]).read_text()) if Path(files["count_file"]).exists() else None
        return Ended(done["code"], out, err, done["seconds"], steps, done["peak_bytes"])

    def good(self, folder: Path, *argv: str, **job) -> Ended:
        """The same; the stage has to end well."""
        ended = self.run(folder, *argv, **job)
        assert ended.code == 0, f"{argv} ended with {ended.code}:\n{ended.out}\n{ended.err}"
        return ended

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._log.close()


def bytes_of(*places: Path, leave_out=("README.md",)) -> dict[str, bytes]:
    """Every file under `places`, with its bytes; leftovers of a killed run count."""
    found = {}
    for place in places:
        for file in [place] if place.is_file() else sorted(place.rglob("*")):
            if file.is_file() and file.name not in leave_out:
                found[str(file.relative_to(place.parent))] = file.read_bytes()
    return found


def copy(source: Path, target: Path) -> Path:
    """A fresh copy of a workspace."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target


def damage(file: Path, kind: str, random: random.Random) -> None:
    """Change a file's bytes as failing disks, cut copies and mistaken hands do."""
    data = bytearray(file.read_bytes())
    if kind == "flipped bit":
        place = random.randrange(len(data))
        data[place] ^= 1 << random.randrange(8)
    elif kind == "truncated":
        del data[random.randrange(len(data)) :]
    elif kind == "zeroed block":
        place = random.randrange(len(data))
        end = min(len(data), place + random.randrange(1, 512))
        zeros = bytes(end - place)
        data[place:end] = zeros if data[place:end] != zeros else b"\xff" * len(zeros)
    elif kind == "longer":
        data += random.randbytes(random.randrange(1, 64))
    else:
        raise ValueError(kind)
    file.write_bytes(data)


DAMAGE = ("flipped bit", "truncated", "zeroed block", "longer")


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """Runs stages; see `Stages`."""
    server = Stages(tmp_path_factory.mktemp("stage_server"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def made(tmp_path_factory, model_folder):
    """A small project of which nothing is run."""
    folder = tmp_path_factory.mktemp("made") / "project"
    folder.mkdir()
    make_project(folder, model_folder("llama"))
    return folder


@pytest.fixture(scope="session")
def fetched(tmp_path_factory, made, stages):
    """The same with its model and data."""
    folder = copy(made, tmp_path_factory.mktemp("fetched") / "project")
    stages.good(folder, "stages.fetch")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, fetched, stages):
    """The same with its data prepared."""
    folder = copy(fetched, tmp_path_factory.mktemp("prepared") / "project")
    stages.good(folder, "stages.prepare")
    return folder


@pytest.fixture(scope="session")
def tunable(tmp_path_factory, prepared):
    """The same, with a teacher's model to be tuned in its params."""
    folder = copy(prepared, tmp_path_factory.mktemp("tunable") / "project")
    tuning = {"base": "models/tiny", "steps": 3, "learning_rate": 1e-3}
    write_params(folder, small_params() | {"tunings": {"more": tuning}})
    return folder


@pytest.fixture(scope="session")
def scored(tmp_path_factory, prepared, stages):
    """The same after its teacher."""
    folder = copy(prepared, tmp_path_factory.mktemp("scored") / "project")
    stages.good(folder, "stages.teacher", "few_shot")
    return folder


@pytest.fixture(scope="session")
def captured(tmp_path_factory, scored, stages):
    """The same after its targets."""
    folder = copy(scored, tmp_path_factory.mktemp("captured") / "project")
    stages.good(folder, "stages.targets", "few_shot")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, captured, stages):
    """The same after its student."""
    folder = copy(captured, tmp_path_factory.mktemp("trained") / "project")
    stages.good(folder, "stages.student", "cd")
    return folder


@pytest.fixture(scope="session")
def answered(tmp_path_factory, trained, stages):
    """The same after its methods have answered the evaluation sets."""
    folder = copy(trained, tmp_path_factory.mktemp("answered") / "project")
    for method in ("cd", "teacher"):
        stages.good(folder, "stages.evaluate", method)
    return folder


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """The shipped params with made-up predictions and metrics of every method: all that a report is made of."""
    folder, params = tmp_path_factory.mktemp("evaluated") / "project", shipped_params(20)
    write_predictions(params, folder, 12)
    write_metrics(params, folder)
    text = (PROJECT / "params.yaml").read_text("utf-8").replace("bootstrap: 2000", "bootstrap: 20")
    (folder / "params.yaml").write_text(text, "utf-8")
    return folder
