"""Students' folders for tests of what comes after training: a small random model with the manifest that training would write."""

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa

from pipeline.cli import app
from pipeline.files import read_manifest, write_json, write_manifest
from pipeline.models.folders import load_tokenizer
from pipeline.models.held_back import HELD_BACK, HELD_BACK_FILE, LEARNT, LEARNT_FILE
from pipeline.models.trained import about_trained
from pipeline.params import TaskParams
from pipeline.schema import write_table
from pipeline.task import Task, TaskTokens

PROJECT = Path(__file__).resolve().parent.parent
TEMPLATE = "Review: {text}\nSentiment:"
VERBALISERS = {"negative": " bad", "positive": " good"}
LONG_VERBALISERS = {"negative": " bad", "mixed": " so-so", "positive": " good"}  # the second has several tokens
TEXTS = [
    "a warm film", "a dull, lifeless mess", "the plot goes nowhere", "I loved every minute of it", "strange little picture",
    "the actors seem bored and so was I", "funny", "N/A x great", "terrible service, cold food, late", "every minute of this",
]  # fmt: skip


def make_student(folder: Path, model: Path, template: str = TEMPLATE, verbalisers: dict[str, str] | None = None) -> Path:
    """A folder as `stages.student` leaves it, around the model in `model`."""
    shutil.copytree(model, folder)
    task = Task(TaskParams(template=template, verbalisers=verbalisers or VERBALISERS))
    seal(folder, task)
    return folder


def choose(project: Path, student: str | None = "cd", **reasons: str) -> None:
    """Write the file of the stage `select`: the student that is taken if none is named, and why others are no candidates."""
    write_json({"student": student, "no_candidates": reasons}, project / "artifacts" / "best.json")


def seal(folder: Path, task: Task) -> None:
    """Write a student's manifest for the files that `folder` has now."""
    write_manifest(folder, about_trained(folder.name, TaskTokens(task, load_tokenizer(folder)), {}))


def hold_back(student: Path, rows: Sequence[tuple[Any, Any, float]], learnt: Sequence[tuple[str, Any]]) -> None:
    """Give a student held-back texts (label_logprobs, target, distance) and learnt ones (id, state), as training leaves them."""
    held = [dict(zip(HELD_BACK.names, (f"held {n}", *row), strict=True)) for n, row in enumerate(rows)]
    write_table(pa.Table.from_pylist(held, HELD_BACK), student / HELD_BACK_FILE)
    known = [{"example_id": one, "state": np.float16(state)} for one, state in learnt]
    write_table(pa.Table.from_pylist(known, LEARNT), student / LEARNT_FILE)
    write_manifest(student, {key: value for key, value in read_manifest(student).items() if key != "files"} | {"temperature": 1.0})


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def shotless(folder: Path, *arguments: str, check: bool = True) -> Done:
    """Run the command line in `folder`, in this process: a new one would spend seconds on importing torch."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with chdir(folder), redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", ["shotless", *arguments]):
        try:
            app()
        except SystemExit as end:
            code = int(end.code or 0)
    assert not check or code == 0, f"{arguments} ended with {code}:\n{out.getvalue()}\n{err.getvalue()}"
    return Done(code, out.getvalue(), err.getvalue())


def shotless_process(folder: Path, *arguments: str, stdin: str = "") -> Done:
    """Run the command line in `folder` in a process of its own, as a user does."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", "from pipeline.cli import app; app()", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, input=stdin, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)
