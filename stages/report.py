"""Write report/index.html, report/metrics.json and a model card in each student's folder. Run by DVC, or as `python -m stages.report`."""

from pathlib import Path

from pipeline.files import Folders
from pipeline.params import resolved_params
from pipeline.report.page import build_report
from stages import run


def main() -> None:
    """Write the report from all predictions and metrics."""
    build_report(resolved_params(), Folders.here(), Path())


if __name__ == "__main__":
    run(main)
