"""`python -m stages.round NAME`: a student answers the transfer set and the pool → artifacts/rounds/NAME."""

from pipeline.files import Folders
from pipeline.params import resolved_params
from pipeline.targets.rounds import build_round
from stages import run


def main(name: str) -> None:
    """Have one student answer."""
    build_round(name, resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
