"""Check the raw data and make examples, demonstrations and contexts of it. Run by DVC, or as `python -m stages.prepare`."""

from pathlib import Path

from pipeline.data.prepare import prepare
from pipeline.params import load_params
from stages._command import run


def main() -> None:
    """Write artifacts/data and metrics/prepare.json."""
    prepare(load_params(), Path("artifacts"), Path("metrics/prepare.json"))


if __name__ == "__main__":
    run(main)
