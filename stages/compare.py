"""`python -m stages.compare`: compare all methods from their predictions → metrics/compare.json."""

from pipeline.evaluation.compare import compare_methods
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Write the comparisons."""
    compare_methods(resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
