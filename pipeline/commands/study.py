"""`shotless study`: the study's parts, their workspaces, and the page of results."""

from pathlib import Path

import psutil
import typer

from pipeline.study.plan import load_plan, make_part, part_named, parts

study = typer.Typer(no_args_is_help=True, help="Many runs of the pipeline and what they say together; `make study` runs all of it.")


@study.command(name="parts")
def list_parts() -> None:
    """Print the names of all parts, in the order in which they are run."""
    print("\n".join(part.name for part in parts(load_plan())))


@study.command()
def workspace(part: str) -> None:
    """Make or bring up to date the workspace of a part, and print its folder."""
    plan = load_plan()
    print(make_part(plan, part_named(plan, part), Path.cwd()).relative_to(Path.cwd()))


@study.command()
def results(output: Path = Path("docs/results.md")) -> None:
    """Write the page of results from the parts that have finished, and name those that have not."""
    from pipeline.study.results import write_results  # brings scipy, altair

    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    machine = f"{cores} cores and {psutil.virtual_memory().total / 2**30:.0f} GiB"
    lacking = write_results(load_plan(), Path.cwd(), machine, output)
    print(f"{output}: written" + (f"; not run yet: {'; '.join(lacking)}" if lacking else ""))
