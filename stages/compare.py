"""`python -m stages.compare`: compare all methods from their predictions → metrics/compare.json."""

from pipeline.evaluation.compare import compare_methods, write_break_even
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Write the comparisons, and metrics/runtime/break-even.json, which is made of times and not an output of DVC."""
    params, folders = resolved_params(), Folders.here()
    # The report depends on this folder, and a task whose answers are free text has no target sets.
    (folders.metrics / "targets").mkdir(parents=True, exist_ok=True)
    compare_methods(params, folders)
    write_break_even(params, folders)


if __name__ == "__main__":
    run(main)
