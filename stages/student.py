"""`python -m stages.student NAME`: a student learns from a target set or from the demonstrations' labels → artifacts/students/NAME.

`torchrun --nproc-per-node 2 -m stages.student NAME` trains the same student on two processes (docs/scale.md).
"""

from pathlib import Path

from pipeline.params import resolved_params, pick
from pipeline.students.processes import joined
from pipeline.students.runs import Places, train_student
from pipeline.task import Task
from pipeline.files import work_folder
from stages import run


def main(name: str) -> None:
    """Train one student."""
    params = resolved_params()
    places = Places(Path("artifacts"), Path("metrics"), work_folder())
    student = pick("students", params.students, name)
    with joined() as processes:
        train_student(name, student, Task(params.task), places, params.runtime.threads, processes=processes)


if __name__ == "__main__":
    run(main)
