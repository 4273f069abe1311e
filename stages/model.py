"""`python -m stages.model NAME`: a model on disk becomes a plain model folder → artifacts/models/NAME."""

from pathlib import Path

from pipeline.files import Folders
from pipeline.models.folders import build_model
from pipeline.params import pick, resolved_params
from stages import run


def main(name: str) -> None:
    """Copy or convert one model."""
    model = pick("models", resolved_params().models, name)
    build_model(Path(model.path).expanduser(), Folders.here().artifacts / "models" / name)


if __name__ == "__main__":
    run(main)
