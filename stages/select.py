"""`python -m stages.select`: the student that commands take if none is named → artifacts/best.json."""

from pipeline.evaluation.select import select_student
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Choose among the students of this run."""
    select_student(resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
