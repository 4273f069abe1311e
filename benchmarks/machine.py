"""What a benchmark ran on, for its JSON."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.models.machine import use_machine


def about() -> dict[str, Any]:
    """Processor, cores, memory, threads and versions."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line.split(":", 1)[1].strip() for line in info.read_text("utf-8").splitlines() if line.startswith("model name")]
        model = lines[0] if lines else model
    return {
        "processor": model,
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": use_machine(None),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
