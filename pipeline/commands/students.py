"""`--student NAME` as a folder: a name of params.yaml's students, or the path of a student's folder anywhere."""

import logging
from pathlib import Path

from pipeline.errors import UsageError, choices

STUDENTS = Path("artifacts") / "students"


def student_folder(student: str) -> Path:
    """The folder of a student. Raises UsageError naming the students there are."""
    path = Path(student)
    if path.is_dir() and ("/" in student or (path / "provenance.json").is_file()):
        return path
    folder = STUDENTS / student
    if not folder.is_dir():
        there = sorted(entry.name for entry in STUDENTS.iterdir() if entry.is_dir()) if STUDENTS.is_dir() else []
        raise UsageError(f"--student {student}: no folder {folder}; there are: {choices(there)}. `dvc repro` makes them.")
    return folder


def quiet_libraries() -> None:
    """Keep transformers' advice and its bars off the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
