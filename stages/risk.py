"""`python -m stages.check NAME`: the risk checks of a student → metrics/risk/NAME.json."""

from pathlib import Path

from pipeline.evaluation.check import check_student
from pipeline.params import resolved_params
from pipeline.files import work_folder
from stages import run


def main(name: str) -> None:
    """Check one student."""
    check_student(name, resolved_params(), Path("artifacts"), Path("metrics") / "risk" / f"{name}.json", work_folder())


if __name__ == "__main__":
    run(main)
