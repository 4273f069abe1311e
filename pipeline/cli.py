"""The `shotless` command line: what a user asks for outside the DAG."""

import logging
import os

import typer

from pipeline.commands.project import check, clean, doctor, init, run, verify
from pipeline.commands.review import review
from pipeline.commands.students import export, monitor, predict, serve
from pipeline.errors import ending_with_a_message

commands = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@commands.callback()
def _about() -> None:
    """Turn a few-shot prompt into a small model."""


for command in (init, check, run, doctor, clean, predict, serve, monitor, review, export, verify):
    commands.command()(command)


def app() -> None:
    """Run the command line; an error ends with its message and its exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars and advice would break up the commands' own lines
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with ending_with_a_message():
        commands()
