"""Check the raw data and make examples, demonstrations and contexts of it. Run by DVC, or as `python -m stages.prepare`."""

from pathlib import Path

from pipeline.data.prepare import prepare
from pipeline.params import resolved_params
from stages import run


def main() -> None:
    """Write artifacts/data and metrics/prepare.json."""
    prepare(resolved_params(), Path("artifacts"), Path("metrics/prepare.json"))


if __name__ == "__main__":
    run(main)
