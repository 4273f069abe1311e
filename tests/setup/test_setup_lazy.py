"""The command line starts fast: what a command needs is imported by that command."""

import subprocess
import sys

from conftest import PROJECT

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "pyarrow", "polars", "numpy", "pydantic", "rich.table", "dvc")


def test_the_command_line_is_there_before_any_library_is():
    code = f"import sys, pipeline.cli; sys.exit(','.join(set({HEAVY}) & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_commands_are_those_of_the_documents_and_nothing_else():
    from pipeline.cli import commands

    names = {command.name or command.callback.__name__ for command in commands.registered_commands if not command.hidden}
    assert names == {"init", "check", "run", "doctor", "clean", "predict", "serve", "monitor", "export", "review", "verify"}
