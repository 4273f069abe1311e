"""`python -m stages.tune NAME`: a teacher's model is fine-tuned on the demonstrations' labels → artifacts/tuned/NAME."""

from pipeline.files import Folders
from pipeline.params import resolved_params
from pipeline.students.train import tune_teacher
from stages import run


def main(name: str) -> None:
    """Tune one teacher."""
    tune_teacher(name, resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
