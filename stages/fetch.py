"""Fetch the models and raw data that params.yaml names. Run by DVC, or as `python -m stages.fetch`."""

from pathlib import Path

from pipeline.data.fetch import fetch
from pipeline.params import load_params
from stages._command import run


def main() -> None:
    """Write artifacts/models and artifacts/raw."""
    fetch(load_params(), Path("artifacts"))


if __name__ == "__main__":
    run(main)
