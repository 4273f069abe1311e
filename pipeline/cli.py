"""The `shotless` command line: what a user asks outside the DAG."""

from pathlib import Path

import typer

from pipeline.commands.doctor import doctor
from pipeline.commands.export import export
from pipeline.commands.init import init
from pipeline.commands.monitor import monitor
from pipeline.commands.predict import predict
from pipeline.commands.serve import serve
from pipeline.commands.study import study
from pipeline.commands.verify import verify
from pipeline.data.fetch import changed_local_files
from pipeline.errors import ending_well
from pipeline.params import load_params
from pipeline.params.presets import make_workspace
from pipeline.report.summary import print_summary

commands = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@commands.callback()
def _about() -> None:
    """Turn a few-shot prompt into a small model."""


@commands.command()
def check() -> None:
    """Check params.yaml: every key, value and name in it, before anything runs."""
    params = load_params()
    counts = (f"{len(getattr(params, block))} {block}" for block in ("teachers", "targets", "students", "baselines"))
    print(f"params.yaml is in order: {', '.join(counts)}.")


@commands.command()
def fresh() -> None:
    """Whether local files are still what was fetched; ends with 1 and names them where not. DVC tracks their params, not the files."""
    changed = changed_local_files(load_params(), Path("artifacts"))
    if changed:
        print(f"changed since they were fetched: {', '.join(changed)}; fetching again")
        raise typer.Exit(1)


@commands.command()
def preset(name: str) -> None:
    """Make or bring up to date the workspace of a preset, and print its folder."""
    print(make_workspace(name, Path.cwd()).relative_to(Path.cwd()))


@commands.command()
def summary() -> None:
    """Print the headline table of the last run."""
    print_summary()


commands.command()(predict)
commands.command()(serve)
commands.command()(monitor)
commands.command()(doctor)
commands.command()(export)
commands.command()(init)
commands.command()(verify)
commands.add_typer(study, name="study")


def app() -> None:
    """Run the command line; an error ends with its message and its exit code."""
    with ending_well():
        commands()
