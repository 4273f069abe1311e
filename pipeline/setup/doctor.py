"""What this machine has, which number format and engine a run will use, and what would fail. Nothing is installed or changed."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from pipeline.data.examples import check_limit, read_source
from pipeline.errors import UsageError
from pipeline.params import Params, load_params
from pipeline.params.data import DOWNLOADS
from pipeline.params.reading import absent_files, other_versions
from pipeline.schema import Example
from pipeline.setup.boundary import advice_on
from pipeline.setup.estimate import try_rows
from pipeline.task import Task

DISK_NEEDED_GB = 6.0
MEMORY_NEEDED_GB = 4.0
PROBES = ("N/A", "It was what it was.", "Some of it is good, some of it is not, and nobody could say which.")


class Finding(NamedTuple):
    """One fact, with what to do about it."""

    name: str
    value: str
    state: Literal["ok", "note", "missing"] = "ok"


def findings() -> Iterator[Finding]:
    """Everything that `shotless doctor` says of this machine and the project in the working folder, in order."""
    yield from _machine()
    if other := other_versions(Path("constraints.txt")):
        yield Finding("versions", " ".join(other), "missing")
    params = None
    try:
        params = load_params()
        absent = absent_files(params)
        yield Finding("files", "\n".join(absent), "missing") if absent else Finding("params.yaml", params.summary)
    except UsageError as error:
        yield Finding("params.yaml", str(error), "missing")
    if any("not installed" in line for line in other) or platform.system() == "Windows":
        return
    yield from _torch(params.runtime.threads if params else None)
    if params:
        yield from _data(params)
        yield from (_model(name, params) for name in params.models)


def _machine() -> Iterator[Finding]:
    if platform.system() == "Windows":
        yield Finding("system", "Windows has neither sh, which runs stages, nor make → use WSL", "missing")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cores", f"{usable} usable, {psutil.cpu_count(logical=False) or usable} physical")
    memory = psutil.virtual_memory()
    free, disk = memory.available / 1e9, shutil.disk_usage(".").free / 1e9
    found = f"{free:.1f} of {memory.total / 1e9:.1f} GB free"
    yield _enough("memory", found, free, MEMORY_NEEDED_GB, "close other programs, or use a smaller model")
    yield _enough("disk", f"{disk:.1f} GB free", disk, DISK_NEEDED_GB, "free some, for models, data and scores; `shotless clean` may help")


def _enough(name: str, value: str, found: float, needed: float, hint: str) -> Finding:
    return Finding(name, value) if found >= needed else Finding(name, f"{value}, {needed:.0f} GB needed → {hint}", "missing")


def _torch(threads: int | None) -> Iterator[Finding]:
    import torch

    from pipeline.models.machine import default_device, fast_dtype, use_machine

    used, device = use_machine(threads), default_device()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield Finding("torch", f"{torch.__version__}, {used} threads, {torch.backends.cpu.get_cpu_capability()}")
    yield Finding("dtype", f"teachers with `dtype: auto` {fast_dtype(device)}, students float32, on {device.type}")
    yield Finding("gpu", ", ".join(gpus) or "none that torch sees; none is needed")


def _data(params: Params) -> Iterator[Finding]:
    """Whether the local files can be read as params.yaml says, and whether the prompt suits the models that are there."""
    task = Task(params.task)
    for name, source in params.data.sources.items():
        if source.path.startswith(f"{DOWNLOADS}/") or not Path(source.path).exists():
            continue
        try:
            check_limit(read := read_source(name, source, Path(source.path), task), params.data.bad_rows_limit)
        except UsageError as error:
            yield Finding(f"source {name}", str(error), "missing")
            continue
        texts, labelled = read.counts["examples"], read.counts["labelled"]
        yield Finding(f"source {name}", f"{texts:,} texts, {labelled:,} with a label; {read.bad_rows:,} bad rows")
    with suppress(UsageError):  # of a model, whose own line says it
        if advice := advice_on(params):
            yield Finding("prompt", advice, "note")


def _model(name: str, params: Params) -> Finding:
    """Whether a model is there, its size, which engine it gets and why."""
    title, folder, task = f"model {name}", Path("artifacts") / "models" / name, Task(params.task)
    if not folder.is_dir():
        return Finding(title, f"not made yet → `shotless run model@{name}` makes it", "note")
    needed = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # stored in 16 bits or more, held in 32
    if needed > psutil.virtual_memory().available:
        return Finding(title, f"needs up to {needed / 1e9:.1f} GB of memory → take a smaller model", "missing")
    try:
        trial = try_rows(folder, task, [Example(dict.fromkeys(task.fields, text)) for text in PROBES], params.runtime.threads)
    except UsageError as error:
        return Finding(title, f"{error} → `dvc repro --force model@{name}` makes it again", "missing")
    return Finding(title, f"{trial.parameters / 1e6:,.0f} M parameters; engine {trial.engine}: {trial.reason}")
