"""`python -m stages.check NAME`: the risk checks of a student → metrics/risk/NAME.json."""

from pathlib import Path

from pipeline.evaluation.check import check_student
from pipeline.params import load_params
from pipeline.work import work_folder
from stages._command import run


def main(name: str) -> None:
    """Check one student."""
    check_student(name, load_params(), Path("artifacts"), Path("metrics") / "risk" / f"{name}.json", work_folder())


if __name__ == "__main__":
    run(main)
