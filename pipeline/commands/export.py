"""`shotless export`: a student's folder for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.students import quiet_libraries, student_folder


def export(
    student: Annotated[str, typer.Option(help="Name of a student, or its folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    form: Annotated[str, typer.Option("--format", help="safetensors; for gguf and onnx it says what writes them.")] = "safetensors",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder where it is there.")] = False,
) -> None:
    """Write a checked copy of a student that plain `transformers` loads."""
    folder = student_folder(student)
    quiet_libraries()

    from pipeline.serving.export import export as write
    from pipeline.serving.student import open_student

    done = write(open_student(folder), form, output, force)
    print(f"{done.folder}: {done.tensors} tensors ({done.dtype}), {done.files} files, {done.bytes / 1e6:,.1f} MB; all weights are finite")
