"""`python -m stages.cost`: what an answer of each method costs on this machine."""

from pipeline.evaluation.cost import measure_costs
from pipeline.files import Folders
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Measure the cost of all methods, one after the other."""
    measure_costs(resolved_params(), Folders.here())


if __name__ == "__main__":
    run(main)
