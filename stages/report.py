"""Write the report from all predictions and metrics. Run by DVC, or as `python -m stages.report`."""

from pathlib import Path

from pipeline.params import resolved_params
from pipeline.report.build import build_report
from stages import run


def main() -> None:
    """Write report/index.html, report/metrics.json and a model card in each student's folder."""
    build_report(resolved_params(), Path())


if __name__ == "__main__":
    run(main)
