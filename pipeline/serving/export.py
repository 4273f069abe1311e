"""A student's folder for other programs: checked safetensors with everything needed to use them.

A student is saved merged (no adapters are left to fold in), so a copy is all there is to make; the copy is verified, weight by weight, to
be finite and to be those the hashes name. GGUF and ONNX are not written: no package that this project keeps converts a transformers folder.
`gguf` knows tensors' names, not what else an architecture needs (reordered heads, metadata, the tokenizer's kind: that is llama.cpp's
`convert_hf_to_gguf.py`); torch's ONNX exporter needs packages that nothing else here does.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from pipeline.errors import CorruptError, UsageError
from pipeline.models.identity import weights_sha256
from pipeline.serving.student import Student

ELSEWHERE = {
    "gguf": "llama.cpp's `convert_hf_to_gguf.py FOLDER` reads a student's folder as it is",
    "onnx": "`optimum-cli export onnx --model FOLDER OUTPUT`, of the optimum-onnx package, reads a student's folder as it is",
}
FORMATS = ("safetensors", *ELSEWHERE)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    files: int
    bytes: int
    tensors: int
    dtype: str


def export(student: Student, form: str, output: Path, force: bool) -> Exported:
    """Copy a student's folder to `output` and verify the copy.

    Raises UsageError where the format is not one that is written here, with what writes it, or where `output` is there; CorruptError where
    a weight is not finite.
    """
    if form in ELSEWHERE:
        raise UsageError(f"--format {form}: not written by shotless. {ELSEWHERE[form].replace('FOLDER', str(student.folder))}.")
    if form not in FORMATS:
        raise UsageError(f"--format: no {form!r}; choose one of: {', '.join(FORMATS)}")
    if output.exists() and (not force or not output.is_dir() or output.resolve() == student.folder.resolve()):
        raise UsageError(f"{output} is there; name another folder, or replace it with --force.")
    tensors, dtypes = _verify(student.folder)
    building = output.with_name(f".{output.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(student.folder, building, copy_function=shutil.copyfile)  # not the mode: weights are saved for their owner alone
    if weights_sha256(building) != student.weights_sha256:
        raise CorruptError(f"{building}: the copy's weights are not the student's; is the disk full or failing?")
    shutil.rmtree(output, ignore_errors=True)
    building.rename(output)
    files = [file for file in output.rglob("*") if file.is_file()]
    return Exported(output, len(files), sum(file.stat().st_size for file in files), tensors, ", ".join(sorted(dtypes)))


def _verify(folder: Path) -> tuple[int, set[str]]:
    """Number and dtypes of the tensors. Raises CorruptError naming the first that holds a number that is not finite."""
    count, dtypes = 0, set[str]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  not a mapping
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise CorruptError(f"{file}: {name} holds numbers that are not finite; train the student again.")
                count += 1
                dtypes.add(str(tensor.dtype).removeprefix("torch."))
    return count, dtypes
