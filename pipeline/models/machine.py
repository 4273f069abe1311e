"""What the machine has, and what follows from it: threads, device, memory, number format, and which library multiplies."""

import os
from functools import lru_cache
from pathlib import Path

import psutil
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_SIZE = 768
KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Products that oneDNN, and torch's own layer above it, keep a compiled kernel with its buffers for: 1,024 each unless told.

Packed passes differ in length, and each length is five to twelve products: with SmolLM2-135M memory grew by 12 MB a pass. 32 serve all
layers of a pass.
"""
BFLOAT16_SINCE = (8, 0)
"""Compute capability of the first GPUs that multiply in bfloat16 (Ampere)."""


def use_machine(threads: int | None) -> int:
    """Set torch up for products on this machine: `threads`, or as many as there are cores for this process; returns the number."""
    for name, count in KERNELS_KEPT.items():  # read at the first product, so that torch may have been imported before
        os.environ.setdefault(name, count)
    chosen = threads or cores()
    torch.set_num_threads(chosen)
    if _mkl_holds_back() and _medium_is_float32():
        torch.set_float32_matmul_precision("medium")
    return chosen


def cores() -> int:
    """Cores that this process may run on."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(logical=False) or 1
    return min(available, psutil.cpu_count(logical=False) or available)


def _mkl_holds_back() -> bool:
    """Whether torch multiplies by MKL on a processor with AVX-512 that is not Intel's: MKL then keeps to AVX2, at half the rate."""
    info = Path("/proc/cpuinfo")
    intel = not info.is_file() or "GenuineIntel" in info.read_text(encoding="utf-8", errors="replace")
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not intel


@lru_cache
def _medium_is_float32() -> bool:
    """Whether precision "medium" rounds as float32 does here.

    It hands products to oneDNN and allows it bfloat16, which only processors with matrix units (AMX) make use of; on others it brings
    oneDNN's float32 kernels, 2.2 times as fast as MKL's on an AMD EPYC.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(PROBE_SIZE, PROBE_SIZE, generator=generator) for _ in range(2))
    exact = left.double() @ right.double()
    before, errors = torch.get_float32_matmul_precision(), []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        errors.append(float(((left @ right).double() - exact).abs().max()))
    torch.set_float32_matmul_precision(before)
    return errors[1] < 10 * errors[0]


def default_device() -> torch.device:
    """A GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_bytes(device: torch.device) -> int:
    """Memory of the device, in all."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else psutil.virtual_memory().total


def fast_dtype(device: torch.device) -> str:
    """Name in `DTYPES` of the format to run a model in: bfloat16 where there are matrix units for it (AMX, or a GPU's), else float32.

    What it says is part of a score cache's fingerprint, so it is read off the hardware, and not timed: on a busy machine a probe's answer
    changes, and a teacher would score all its rows again in another format. Without matrix units bfloat16 is no gain: with products twice
    as fast (AVX-512) a pass at 1,024 context tokens took 0.8 of the time, for 0.07 nats of rounding in the labels' log-odds.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= BFLOAT16_SINCE else "float32"
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8", errors="replace").split() if info.is_file() else []
    return "bfloat16" if "amx_bf16" in flags else "float32"
