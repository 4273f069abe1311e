"""`python -m stages.prepare`: sources become examples with roles and contexts → artifacts/data, metrics/prepare.json."""

from pipeline.data.prepare import prepare
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Draw every role and build every list of contexts."""
    prepare(resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
