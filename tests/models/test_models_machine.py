"""Threads, memory, number formats and products as this machine has them."""

import os

import pytest
import torch

from pipeline.models import machine, process


@pytest.fixture
def settings():
    """Put torch's global settings back."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def test_threads_are_those_asked_for_or_the_cores_there_are(settings):
    assert machine.use_machine(3) == torch.get_num_threads() == 3
    assert 1 <= machine.use_machine(None) == torch.get_num_threads()


def test_cores_are_those_of_the_affinity_and_of_a_quota(monkeypatch):
    allowed = process.cores()
    monkeypatch.setattr(process.joblib, "cpu_count", lambda: 64)
    assert allowed <= process.cores() == (process.psutil.cpu_count(logical=False) or 64)
    monkeypatch.setattr(process.joblib, "cpu_count", lambda: 1)  # a container with `--cpus 1`
    assert process.cores() == 1


def test_kernels_are_kept_for_few_lengths_and_a_user_s_own_number_stands(settings, monkeypatch):
    first, second = machine.KERNELS_KEPT
    monkeypatch.delenv(first, raising=False)
    monkeypatch.setenv(second, "7")
    machine.use_machine(None)
    assert os.environ[first] == machine.KERNELS_KEPT[first]
    assert os.environ[second] == "7"


@pytest.mark.parametrize("holds_back", [True, False])
def test_products_stay_float32_whichever_library_multiplies(settings, monkeypatch, holds_back):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(machine, "_mkl_is_slow", lambda: holds_back)
    machine.use_machine(None)
    left, right = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert float(((left @ right).double() - left.double() @ right.double()).abs().max()) < 1e-3  # bfloat16 errs by 0.1
    if not holds_back:
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_that_rounds_to_bfloat16_is_not_taken(settings, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(machine, "_mkl_is_slow", lambda: True)
    monkeypatch.setattr(machine, "_medium_is_float32", lambda: False)
    machine.use_machine(None)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_probe_of_precision_leaves_it_as_it_was(settings):
    torch.set_float32_matmul_precision("high")
    machine._medium_is_float32.__wrapped__()
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx512_bf16 amx_tile amx_bf16", "bfloat16"), ("avx512_bf16", "float32"), (None, "float32")]
)
def test_the_format_follows_from_the_processor_alone(monkeypatch, tmp_path, flags, expected):
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"model name : x\nflags : fpu {flags} sse\n", "utf-8")
    monkeypatch.setattr(machine, "Path", lambda _: info)
    assert machine.fast_dtype(torch.device("cpu")) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_with_units_for_it_runs_in_bfloat16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert machine.fast_dtype(torch.device("cuda")) == expected


def test_the_peak_is_at_least_what_is_in_use_and_counts_what_was_freed():
    before = process.peak_rss_bytes()
    block = bytearray(64 << 20)
    block[::4096] = bytes(len(block[::4096]))
    del block
    machine.give_back_memory()
    assert process.peak_rss_bytes() >= max(before, 64 << 20)


def test_the_peak_without_linux_accounts_is_the_kernels(monkeypatch, tmp_path):
    """As on macOS, which counts in bytes."""
    monkeypatch.setattr(process, "Path", lambda _: tmp_path / "no such file")
    linux = process.peak_rss_bytes()
    monkeypatch.setattr(process.sys, "platform", "darwin")
    assert linux == process.peak_rss_bytes() * 1024
    machine.give_back_memory()
