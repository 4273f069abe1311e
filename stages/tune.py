"""`python -m stages.tune NAME`: a teacher's model is fine-tuned on the demonstrations' labels → artifacts/tuned/NAME."""

from pathlib import Path

from pipeline.params import resolved_params, pick
from pipeline.students.runs import Places, tune_teacher
from pipeline.task import Task
from pipeline.files import work_folder
from stages import run


def main(name: str) -> None:
    """Tune one teacher."""
    params = resolved_params()
    places = Places(Path("artifacts"), Path("metrics"), work_folder())
    tune_teacher(name, pick("tunings", params.tunings, name), Task(params.task), places, params.runtime.threads)


if __name__ == "__main__":
    run(main)
