"""`python -m stages.student NAME`: a student learns from a target set or from the demonstrations' labels → artifacts/students/NAME."""

from pathlib import Path

from pipeline.params import load_params, pick
from pipeline.student.runs import Places, train_student
from pipeline.tasks import Task
from pipeline.work import work_folder
from stages._command import run


def main(name: str) -> None:
    """Train one student."""
    params = load_params()
    places = Places(Path("artifacts"), Path("metrics"), work_folder())
    train_student(name, pick("students", params.students, name), Task(params.task), places, params.runtime.threads)


if __name__ == "__main__":
    run(main)
