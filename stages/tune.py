"""`python -m stages.tune NAME`: a teacher's model is fine-tuned on the demonstrations' labels → artifacts/tuned/NAME."""

from pathlib import Path

from pipeline.params import load_params, pick
from pipeline.student.runs import Places, tune_teacher
from pipeline.tasks import Task
from pipeline.work import work_folder
from stages._command import run


def main(name: str) -> None:
    """Tune one teacher."""
    params = load_params()
    places = Places(Path("artifacts"), Path("metrics"), work_folder())
    tune_teacher(name, pick("tunings", params.tunings, name), Task(params.task), places, params.runtime.threads)


if __name__ == "__main__":
    run(main)
