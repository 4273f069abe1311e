"""Models and data files on this machine.

They are checked before anything is downloaded, with every fault at once, and copied, not linked, so that a later edit of theirs cannot
reach into an artifact. The trade-off: a large local model takes its space twice.
"""

import shutil
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.files import sha256_file, sha256_json
from pipeline.params import LocalOrigin

RECORD = "source.json"
"""Fetch's own record beside each thing fetched."""
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt")
"""What is taken of a model folder: no pickles, no Python files."""


def local_path(origin: LocalOrigin) -> Path:
    """The path as given, from the working folder, with `~` for the home folder."""
    return Path(origin.path).expanduser()


def local_faults(origin: LocalOrigin, is_model: bool) -> list[str]:
    """What keeps a local origin from being used; empty where nothing does."""
    path = local_path(origin)
    if not path.exists():
        obtain = f" To have it: {origin.obtain.strip()}" if origin.obtain else ""
        return [f"{origin.path!r} does not exist; give a path from the project's folder, or an absolute one.{obtain}"]
    if path.is_dir():
        return _folder_faults(origin, path, is_model)
    if is_model and path.suffix != ".gguf":
        return [f"{origin.path!r} is a file; a model is a folder of safetensors and tokenizer files, or a .gguf file."]
    if not is_model and path.name == RECORD:
        return [f"a data file cannot be called {RECORD}, the name of fetch's own record; rename it."]
    if origin.sha256 is not None and (found := sha256_file(path)) != origin.sha256:
        return [f"{origin.path!r} has sha256 {found}, params.yaml expects {origin.sha256}; correct the one or the other."]
    return []


def _folder_faults(origin: LocalOrigin, path: Path, is_model: bool) -> list[str]:
    if not is_model:
        return [f"{origin.path!r} is a folder; a data source is one file."]
    from pipeline.models.loading import check_folder  # brings torch, which data alone does not need

    faults = [] if origin.sha256 is None else [f"{origin.path!r} is a folder, and `sha256` is that of one file; leave it out."]
    try:
        check_folder(path)
    except UsageError as error:
        faults.append(str(error))
    return faults


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that are taken, sorted by name."""
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file() and file.name != RECORD})


def local_sha256(origin: LocalOrigin) -> str | None:
    """One hash of what a local origin holds now; None where it is gone."""
    path = local_path(origin)
    if path.is_dir():
        return sha256_json({file.name: sha256_file(file) for file in model_files(path)})
    return sha256_file(path) if path.is_file() else None


def copy_model(folder: Path, target: Path) -> None:
    """Copy a model folder's safetensors, configuration and tokenizer files into `target`."""
    for file in model_files(folder):
        shutil.copyfile(file, target / file.name)
