"""What torch will use here: threads, dtype, device, and for each model that was fetched the engine that the probe chooses for it."""

from pathlib import Path

import psutil
import torch

from pipeline.teachers.batches import token_budget
from pipeline.teachers.choice import choose_engine
from pipeline.teachers.scores import Reading
from pipeline.errors import UsageError
from pipeline.models.loading import check_folder, load_model, load_tokenizer, parameter_counts
from pipeline.models.machine import default_device, fast_dtype, memory_bytes, use_machine
from pipeline.params import Params
from pipeline.setup.machine import Finding
from pipeline.task import Task, TaskTokens

PROBES = ("N/A", "It was what it was.", "Some of it is good, some of it is not, and nobody could say which.")


def torch_findings(threads: int | None) -> list[Finding]:
    """Version, threads, instruction set, dtype, device."""
    used = use_machine(threads)
    device = default_device()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    gpu = Finding("gpu", ", ".join(gpus) or "none that torch sees; none is needed")
    return [
        Finding("torch", f"{torch.__version__}, {used} threads, {torch.backends.cpu.get_cpu_capability()}"),
        Finding("dtype", f"teachers with `dtype: auto` {fast_dtype(device)}, students float32, on {device.type}"),
        gpu,
    ]


def model_findings(params: Params, artifacts: Path) -> list[Finding]:
    """For each model in params: whether it is there, what it weighs, which engine it gets and why."""
    return [_model(name, params, artifacts / "models" / name) for name in params.models]


def _model(name: str, params: Params, folder: Path) -> Finding:
    title = f"model {name}"
    if not folder.is_dir():
        return Finding(title, "not fetched yet", "note", "`dvc repro fetch` fetches it")
    try:
        check_folder(folder)
        tokens = TaskTokens(Task(params.task), load_tokenizer(folder))
    except UsageError as error:
        return Finding(title, str(error), "missing", "`dvc repro --force fetch` fetches it again")
    needed = 2 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))  # stored in 16 bits or more, held in 32
    if needed > psutil.virtual_memory().available:
        return Finding(title, f"needs up to {needed / 1e9:.1f} GB of memory", "missing", "take a smaller model, or cut layers")
    device = default_device()
    model = load_model(folder, device=device)
    budget = token_budget(model, memory_bytes(device))
    queries = tokens.query_ids([tokens.task.query(dict.fromkeys(tokens.task.fields, text)) for text in PROBES])
    context = tokens.prefix_ids(tokens.task.context([(dict.fromkeys(tokens.task.fields, PROBES[1]), tokens.task.labels[0])]))
    choice = choose_engine(model, Reading(tokens.completions), budget, context, queries)
    millions = parameter_counts(model)[0] / 1e6
    return Finding(title, f"{millions:,.0f} M parameters; engine {choice.engine.name}: {choice.reason}")


def params_finding(params: Params | str) -> Finding:
    """Whether params.yaml can be used; a text is what is wrong with it."""
    if isinstance(params, str):
        return Finding("params.yaml", params, "missing", "correct it; `shotless check` looks again")
    blocks = ("teachers", "targets", "students", "baselines")
    return Finding("params.yaml", ", ".join(f"{len(getattr(params, block))} {block}" for block in blocks))
