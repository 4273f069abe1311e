"""What the machine has, and what follows from it: threads, device, memory, number format, and which library multiplies."""

import os
import time
from functools import lru_cache
from pathlib import Path

import psutil
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE_SIZE = 768
LEAST_TURNS, MOST_TURNS, PROBE_SECONDS = 4, 40, 0.4
"""Products of each format that the probe times: a slow format ends it after the least."""
WORTH = 3.0
"""So many times faster must products in bfloat16 be for a model to run in it. Attention and the rest gain less: with products twice as fast
(AVX-512 without AMX) a pass at 1,024 context tokens took 0.8 of the time, for 0.07 nats of rounding in the labels' log-odds. Emulated
formats are slower than float32, matrix units 8 times faster or more, so noise does not decide."""


def use_machine(threads: int | None) -> int:
    """Set torch up for products on this machine: `threads`, or as many as there are cores for this process; returns the number."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(logical=False) or 1
    chosen = threads or min(available, psutil.cpu_count(logical=False) or available)
    torch.set_num_threads(chosen)
    if _mkl_holds_back() and _medium_is_float32():
        torch.set_float32_matmul_precision("medium")
    return chosen


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


@lru_cache
def fast_dtype(device: torch.device) -> str:
    """Name in `DTYPES` of the format to run a model in: bfloat16 where a short probe finds its products fast, else float32.

    What it says is part of a score cache's fingerprint, so that other work on the machine must not change it: the formats take turns, and
    each counts by its best time.
    """
    formats = ("float32", "bfloat16")
    best = dict.fromkeys(formats, float("inf"))
    spent = 0.0
    for turn in range(MOST_TURNS):
        if turn >= LEAST_TURNS and spent > PROBE_SECONDS:
            break
        for name in formats:
            seconds = _seconds(DTYPES[name], device)
            best[name], spent = min(best[name], seconds), spent + seconds
    return "bfloat16" if best["float32"] > WORTH * best["bfloat16"] else "float32"


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """The time of one matrix product."""
    values = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype, device=device)
    start = time.perf_counter()
    float((values @ values)[0, 0])  # reading a value waits for the device
    return time.perf_counter() - start
