"""`python -m stages.evaluate NAME`: a student's or baseline's predictions, metrics and cost."""

from pathlib import Path

from pipeline.evaluation.evaluate import evaluate
from pipeline.params import resolved_params
from pipeline.files import work_folder
from stages import run


def main(name: str) -> None:
    """Evaluate one method."""
    evaluate(name, resolved_params(), Path("artifacts"), Path("metrics"), work_folder())


if __name__ == "__main__":
    run(main)
