"""`--student NAME` as a folder: a name of params.yaml's students, or the path of a student's folder anywhere."""

import logging
from pathlib import Path

from pipeline.errors import UsageError, choices

STUDENTS = Path("artifacts") / "students"
PARAMS = Path("params.yaml")


def student_folder(student: str) -> Path:
    """The folder of a student. Raises UsageError naming the students there are.

    A name stands for this project's student, so one that was trained for another task than params.yaml now has is refused with
    MismatchError; a path stands for the folder as it is.
    """
    path = Path(student)
    if path.is_dir() and ("/" in student or (path / "provenance.json").is_file()):
        return path
    folder = STUDENTS / student
    if not folder.is_dir():
        there = sorted(entry.name for entry in STUDENTS.iterdir() if entry.is_dir()) if STUDENTS.is_dir() else []
        raise UsageError(f"--student {student}: no folder {folder}; there are: {choices(there)}. `dvc repro` makes them.")
    if PARAMS.is_file():
        from pipeline.models.provenance import read_provenance
        from pipeline.params import load_params

        read_provenance(folder).check_task(load_params().task)
    return folder


def quiet_libraries() -> None:
    """Keep transformers' advice and its bars off the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
