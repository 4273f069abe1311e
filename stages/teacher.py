"""`python -m stages.teacher NAME`: a teacher scores the transfer set in its contexts → artifacts/teachers/NAME."""

from pipeline.files import Folders
from pipeline.params import resolved_params
from pipeline.teachers.capture import capture
from stages import run


def main(name: str) -> None:
    """Capture one teacher."""
    capture(name, resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
