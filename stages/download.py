"""`python -m stages.download NAME`: a release or a hub repository is downloaded → downloads/NAME."""

from pathlib import Path

from pipeline.data.download import download
from pipeline.params import pick, resolved_params
from stages import run


def main(name: str) -> None:
    """Download one entry."""
    download(name, pick("downloads", resolved_params().downloads, name), Path("downloads") / name)


if __name__ == "__main__":
    run(main)
