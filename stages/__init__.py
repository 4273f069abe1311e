"""The DVC stages: each file is one thin command that reads the resolved params and calls one function of `pipeline`."""

import logging
import os
import sys
import warnings
from collections.abc import Callable

import typer

from pipeline.errors import ending_with_a_message

# Set-up compiles nothing (Makefile): the first stage that imports a module does, for all.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Read at import by libraries that the stages bring in. Threads that wait spin for microseconds, then sleep: spinning longer, two processes
# on two cores slow each other down (docs/reliability.md). Bars would break up the stages' own lines.
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def run(command: Callable[..., None]) -> None:
    """Run a function as a typer command; what a user can mend ends with a message and an exit code."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("default")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    with ending_with_a_message():
        app()
