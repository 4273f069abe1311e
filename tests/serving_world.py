"""Students' folders for tests of what comes after training: a small random model with the provenance that training would write."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from conftest import PROJECT

from pipeline.cli import app
from pipeline.models.identity import tokenizer_sha256, weights_sha256
from pipeline.models.loading import load_tokenizer
from pipeline.models.provenance import identity_entries
from pipeline.params import TaskParams
from pipeline.task import Task, TaskTokens

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
    tokens = TaskTokens(task, load_tokenizer(folder))
    pairs = zip(task.params.verbalisers.items(), tokens.completions, strict=True)
    provenance = {
        "kind": "student",
        "name": folder.name,
        "base": "models/tiny",
        "base_weights_sha256": weights_sha256(folder),
        "base_tokenizer_sha256": tokenizer_sha256(folder),
        "template": template,
        "verbalisers": {label: {"text": text, "ids": ids} for (label, text), ids in pairs},
        "labels": list(task.labels),
    }
    (folder / "provenance.json").write_text(json.dumps(provenance | identity_entries(folder, provenance)), encoding="utf-8")
    return folder


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
