"""`python -m stages.source NAME`: a file of examples is read and checked → artifacts/sources/NAME."""

from pipeline.data.examples import write_source
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main(name: str) -> None:
    """Read one source."""
    write_source(name, resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
