"""A student's folder for other programs: a checked copy that plain transformers loads.

A student is saved merged, so there is no adapter to fold in. llama.cpp's `convert_hf_to_gguf.py` reads the copy as it is.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.errors import CorruptError, UsageError
from pipeline.files import MANIFEST, check_manifest
from pipeline.models.trained import Trained


def export(student: Trained, output: Path, force: bool) -> str:
    """Copy the files of a student's manifest, and its card, to `output`, check the copy, and say what was written.

    Raises UsageError if `output` exists and `force` is not set, CorruptError if a weight is not finite or the copy differs.
    """
    if output.exists() and (not force or not output.is_dir() or output.resolve() == student.folder.resolve()):
        raise UsageError(f"{output} exists; name another folder, or replace it with --force.")
    tensors, dtypes = 0, set[str]()
    for file in student.folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            if not torch.isfinite(tensor).all():
                raise CorruptError(f"{file}: {name} has numbers that are not finite; train the student again.")
            tensors += 1
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    names = [name for name in (*student.manifest["files"], MANIFEST, "README.md") if (student.folder / name).is_file()]
    for name in names:
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(student.folder / name, building / name)  # not the mode: weights are saved for their owner alone
    check_manifest(building)
    shutil.rmtree(output, ignore_errors=True)
    building.rename(output)
    megabytes = sum((output / name).stat().st_size for name in names) / 1e6
    return f"{output}: {tensors} tensors ({', '.join(sorted(dtypes))}), {len(names)} files, {megabytes:,.1f} MB; all weights are finite"
