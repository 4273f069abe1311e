"""`python -m stages.targets NAME`: cached scores become a target set → artifacts/targets/NAME."""

from pathlib import Path

from pipeline.params import resolved_params, pick
from pipeline.schema import examples, read_table
from pipeline.targets.build import build_targets
from pipeline.task import Task
from stages import run


def main(name: str) -> None:
    """Build one target set."""
    params = resolved_params()
    settings = pick("targets", params.targets, name)
    task = Task(params.task)
    artifacts = Path("artifacts")
    transfer = read_table(artifacts / "data" / "transfer.parquet", examples(task.fields))
    build_targets(
        name,
        settings,
        params.teachers,
        task,
        transfer,
        artifacts / "scores",
        artifacts / "targets" / name,
        Path("metrics") / "targets" / f"{name}.json",
    )


if __name__ == "__main__":
    run(main)
