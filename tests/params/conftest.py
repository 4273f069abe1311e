"""A copy of what presets and DVC need of this project, without its models."""

import shutil
from pathlib import Path

import pytest
from conftest import PROJECT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The DAG, the params, the presets and the code, in an empty folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    for item in ("dvc.yaml", ".dvcignore", "params.yaml", "constraints.txt"):
        shutil.copyfile(PROJECT / item, folder / item)
    for item in ("presets", "pipeline", "stages"):
        shutil.copytree(PROJECT / item, folder / item, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    no_scm = true\n", "utf-8")
    return folder
