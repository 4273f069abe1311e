"""Compare all methods from their predictions → metrics/compare.json. Run by DVC, or as `python -m stages.compare`."""

from pathlib import Path

from pipeline.evaluation.break_even import write_break_even
from pipeline.evaluation.compare import compare_methods
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Write the comparisons, and metrics/runtime/break-even.json, which is no output of DVC: it is made of times."""
    params, metrics = resolved_params(), Path("metrics")
    # The report depends on this folder, and a task whose answers are free text has no target sets.
    (metrics / "targets").mkdir(parents=True, exist_ok=True)
    compare_methods(params, Path("artifacts"), metrics / "compare.json")
    write_break_even(params, metrics, metrics / "runtime" / "break-even.json")


if __name__ == "__main__":
    run(main)
