"""`python -m stages.student NAME`: a student learns from a target set, a cache or the demonstrations' labels → artifacts/students/NAME.

`torchrun --nproc-per-node 2 -m stages.student NAME` trains the same student on two processes (docs/scale.md).
"""

from pipeline.files import Folders
from pipeline.params import resolved_params
from pipeline.students.processes import joined
from pipeline.students.train import train_student
from stages import run


def main(name: str) -> None:
    """Train one student."""
    with joined() as processes:
        train_student(name, resolved_params(), Folders.here(), processes)


if __name__ == "__main__":
    run(main)
