"""What every stage's command shares: params, quiet libraries, and errors that end with a message and an exit code, not a traceback."""

import logging
import warnings
from collections.abc import Callable

import typer

from pipeline.ending import ending_well


def run(command: Callable[..., None]) -> None:
    """Run a function as a typer command.

    A ShotlessError, or what the machine refuses, prints its message and ends with its exit code; anything else is a bug and shows its
    traceback.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("default")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    with ending_well():
        app()
