"""`python -m stages.evaluate NAME`: a student's or baseline's predictions, metrics and cost."""

from pipeline.evaluation.evaluate import evaluate
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main(name: str) -> None:
    """Evaluate one method."""
    evaluate(name, resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
