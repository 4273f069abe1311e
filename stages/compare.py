"""`python -m stages.compare`: compare all methods from their predictions → metrics/compare.json."""

from pipeline.evaluation.compare import compare_methods
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Write the comparisons."""
    folders = Folders.here()
    # The report depends on this folder, and a task whose answers are free text has no target sets.
    (folders.metrics / "targets").mkdir(parents=True, exist_ok=True)
    compare_methods(resolved_params(), folders)


if __name__ == "__main__":
    run(main)
