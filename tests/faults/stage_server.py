"""Runs stages in processes of their own, as DVC does, without the seconds that each would spend on importing torch.

One process imports everything and waits; each job is a fork of it that changes into its folder, runs, and ends as the stage would. A job
may be told to run twice at once, or to die: at its n-th step (a file opened, renamed, removed, synced, a folder made), by SIGKILL or by a
power cut, after some seconds, or when a file appears. Jobs come as JSON lines on standard input, what became of them goes to standard
output.
"""

import importlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from losing_disk import LosingDisk

COUNTED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def without_measuring():
    """An evaluation's cost is made up: measuring it takes a process of its own, and no two times agree."""
    importlib.import_module("pipeline.evaluation.evaluate").measure = lambda job, work: {"measured": {"subject": job.subject}}


def small_pieces():
    """Many parts, shards and checkpoints of few rows: a kill has many places to fall between."""
    from pipeline.teachers import scorer
    from pipeline.students.checkpoint import Checkpoint

    importlib.import_module("pipeline.cache.rows").MOST_ROWS = 32
    importlib.import_module("pipeline.cache.folder").ROWS_PER_SHARD = 32
    importlib.import_module("pipeline.teachers.batches").LARGEST_BUDGET = 128
    scorer.ROWS_PER_PART = 8
    Checkpoint.due = lambda self: True


class Steps:
    """Counts what a job does to its folder, and ends it where it was told to."""

    def __init__(self, folder: Path, job: dict) -> None:
        self.folder, self.job, self.count, self.inside = str(folder), job, 0, False
        self.disk = LosingDisk(folder, job["seed"]) if job.get("power") else None
        synced = os.fsync
        os.fsync = lambda handle: (self.step(), synced(handle), self.step())[1]
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if event in COUNTED and not self.inside:
            path = arguments[0]
            path = str(Path.cwd() / os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if path.startswith(self.folder):
                self.step()

    def step(self):
        if self.inside:
            return
        self.count += 1
        if self.count == self.job.get("die_at"):
            self.inside = True
            if self.disk is not None:
                self.disk.cut(self.job.get("worst", False))
            os.kill(os.getpid(), signal.SIGKILL)


def jumping_clock(seed):
    """Clocks that stand still, and leap hours back and forth."""
    dice, drift = random.Random(seed), [0.0]

    def leaping(clock, unit):
        def read():
            drift[0] += dice.choice([0.0, 0.0, 0.0, -7200.0, 7200.0, 1e-9])
            return clock() + type(clock())(drift[0] * unit)

        return read

    for name, unit in (("time", 1), ("monotonic", 1), ("perf_counter", 1), ("time_ns", 10**9), ("monotonic_ns", 10**9)):
        setattr(time, name, leaping(getattr(time, name), unit))


def still_clock():
    for name in ("time", "monotonic", "perf_counter"):
        stopped = getattr(time, name)()
        setattr(time, name, partial(float, stopped))


def run(job):
    """In the fork: never returns."""
    folder = Path(job["folder"])
    code = 70
    try:
        for number, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(job[stream], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        os.chdir(folder)
        os.environ.update(job.get("environment", {}))
        encoding = job.get("encoding", "utf-8")
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w"), encoding, write_through=True) for number in (1, 2))
        without_measuring()
        if not job.get("large_pieces"):
            small_pieces()
        steps = Steps(folder, job)
        if job.get("clock") == "jumps":
            jumping_clock(job["seed"])
        elif job.get("clock") == "stands":
            still_clock()
        sys.argv = job["argv"]
        try:
            if job["argv"][0] == "shotless":
                from pipeline.cli import app

                app()
            else:
                from stages._command import run as run_command

                run_command(importlib.import_module(job["argv"][0]).main)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        if job.get("power_at_end"):
            steps.inside = True
            steps.disk.cut(worst=True)
        if job.get("count_file"):
            Path(job["count_file"]).write_text(str(steps.count))
    except Exception:  # noqa: BLE001  whatever it is, the test looks for the traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve():
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    for name in ("fetch", "prepare", "teacher", "targets", "student", "evaluate", "report"):
        importlib.import_module(f"stages.{name}")
    importlib.import_module("pipeline.cli")
    for name in ("predict", "verify", "serve", "inputs"):
        importlib.import_module(f"pipeline.commands.{name}")
    importlib.import_module("pipeline.serving.predictor")
    importlib.import_module("transformers").AutoModelForCausalLM  # noqa: B018  its modules are imported when first asked for
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        began = time.monotonic()
        running, codes, peak = [], [], 0
        for _ in range(job.get("at_once", 1)):
            running.append(os.fork())
            if running[-1] == 0:
                run(job)
        while running:
            for child in list(running):
                ended, status, usage = os.wait4(child, os.WNOHANG)
                if ended:
                    running.remove(child)
                    codes.append(os.waitstatus_to_exitcode(status))
                    peak = max(peak, usage.ru_maxrss * 1024)
                elif time.monotonic() - began > job.get("seconds", 120) or ("die_when" in job and Path(job["die_when"]).exists()):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        code = next((code for code in codes if code), 0)
        print(json.dumps({"code": code, "seconds": time.monotonic() - began, "peak_bytes": peak}), flush=True)


if __name__ == "__main__":
    serve()
