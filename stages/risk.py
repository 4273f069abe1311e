"""`python -m stages.risk NAME`: the risk checks of a student → metrics/risk/NAME.json."""

from pipeline.evaluation.risk import check_risks
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main(name: str) -> None:
    """Check one student."""
    check_risks(name, resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
