"""`python -m stages.targets NAME`: cached scores become a target set → artifacts/targets/NAME."""

from pipeline.files import Folders
from pipeline.params import pick, resolved_params
from pipeline.targets.build import build_targets
from pipeline.task import Task
from stages import run


def main(name: str) -> None:
    """Build one target set."""
    params = resolved_params()
    build_targets(name, pick("targets", params.targets, name), Task(params.task), Folders.here())


if __name__ == "__main__":
    run(main)
