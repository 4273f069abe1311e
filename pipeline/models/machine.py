"""What the machine has, and what follows from it: threads, device, memory, number format, and which library multiplies."""

import ctypes
import os
import sys
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from pipeline.models.process import cores

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}
"""Products that oneDNN, and torch's layer above it, keep a compiled kernel with its buffers for; by default 1,024 each. A pass of another
length is five to twelve new products: with SmolLM2-135M memory grew by 12 MB a pass. 32 serve all layers of a pass."""


def use_machine(threads: int | None) -> int:
    """Set torch up for products on this machine with `threads`, or as many as this process has cores; returns the number."""
    for name, count in KERNELS_KEPT.items():  # read at the first product, so torch may have been imported before
        os.environ.setdefault(name, count)
    chosen = threads or cores()
    torch.set_num_threads(chosen)
    if _mkl_is_slow() and _medium_is_float32():
        torch.set_float32_matmul_precision("medium")
    return chosen


def cpu_info() -> str:
    """What Linux says of the processor; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""


def _mkl_is_slow() -> bool:
    """Whether torch multiplies by MKL on a processor with AVX-512 that is not Intel's: MKL then uses AVX2, at half the rate."""
    info = cpu_info()
    intel = not info or "GenuineIntel" in info
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512" and not intel


@lru_cache
def _medium_is_float32() -> bool:
    """Whether precision "medium" rounds as float32 does here.

    It hands products to oneDNN and allows it bfloat16, which only processors with matrix units (AMX) use. On others it brings oneDNN's
    float32 kernels, 2.2 times as fast as MKL's on an AMD EPYC.
    """
    left, right = torch.randn(2, 768, 768, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = float(((left @ right).double() - left.double() @ right.double()).abs().max())
    torch.set_float32_matmul_precision(before)
    return error < 1e-2  # float32 errs by 1e-4, bfloat16 by 0.1 and more


def default_device() -> torch.device:
    """A GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def memory_bytes(device: torch.device) -> int:
    """Memory of the device, in all."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else psutil.virtual_memory().total


def fast_dtype(device: torch.device) -> str:
    """Name in `DTYPES` of the format to run a model in: bfloat16 if there are matrix units for it (AMX, or a GPU's), else float32.

    It is part of the identity of scores, so it is read off the hardware and not timed: on a busy machine a timing's answer changes, and a
    teacher would score all its rows again. Without matrix units bfloat16 is no gain: with products twice as fast (AVX-512) a pass at 1,024
    context tokens took 0.8 of the time, for 0.07 nats of rounding in the labels' log-odds.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"  # since Ampere
    return "bfloat16" if "amx_bf16" in cpu_info().split() else "float32"


def give_back_memory() -> None:
    """Return freed memory to the system if the C library is one that holds on to it (glibc).

    Passes of different lengths leave holes among the large results that come and go; by itself glibc only gives back the end of its heap.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
