"""Threads, number formats and products as this machine has them; fused modules against the ones they stand for."""

import pytest
import torch

from pipeline.models import machine
from pipeline.models.fused import fuse


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


@pytest.mark.parametrize("holds_back", [True, False])
def test_products_stay_float32_whichever_library_multiplies(settings, monkeypatch, holds_back):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(machine, "_mkl_holds_back", lambda: holds_back)
    machine.use_machine(None)
    left, right = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert float(((left @ right).double() - left.double() @ right.double()).abs().max()) < 1e-3  # bfloat16 errs by 0.1
    if not holds_back:
        assert torch.get_float32_matmul_precision() == "highest"


def test_a_precision_that_rounds_to_bfloat16_is_not_taken(settings, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(machine, "_mkl_holds_back", lambda: True)
    monkeypatch.setattr(machine, "_medium_is_float32", lambda: False)
    machine.use_machine(None)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_probe_of_precision_leaves_it_as_it_was(settings):
    torch.set_float32_matmul_precision("high")
    machine._medium_is_float32.__wrapped__()
    assert torch.get_float32_matmul_precision() == "high"


def test_the_fast_format_is_bfloat16_only_where_it_is_worth_it(monkeypatch):
    for ratio, expected in {0.5: "float32", 2.0: "float32", 8.0: "bfloat16"}.items():
        monkeypatch.setattr(machine, "_seconds", lambda dtype, device, ratio=ratio: ratio if dtype == torch.float32 else 1.0)
        assert machine.fast_dtype.__wrapped__(torch.device("cpu")) == expected
    monkeypatch.undo()
    assert machine.fast_dtype(torch.device("cpu")) in machine.DTYPES


def test_other_work_on_the_machine_does_not_change_the_format(monkeypatch):
    calls = []

    def seconds(dtype, device):
        calls.append(dtype)
        busy = len(calls) < 12  # a burst of other work, in which float32 fares worse
        return (0.010 if busy else 0.002) if dtype == torch.float32 else 0.001

    monkeypatch.setattr(machine, "_seconds", seconds)
    assert machine.fast_dtype.__wrapped__(torch.device("cpu")) == "float32"


def test_the_probe_of_a_slow_format_ends_early(monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "_seconds", lambda dtype, device: calls.append(dtype) or (3.0 if dtype == torch.bfloat16 else 0.002))
    assert machine.fast_dtype.__wrapped__(torch.device("cpu")) == "float32"
    assert len(calls) == 2 * machine.LEAST_TURNS


def test_a_fused_mlp_gives_the_same_numbers_and_is_given_back(tiny_model):
    model = tiny_model("llama")
    ids = torch.arange(1, 20)[None]
    with torch.inference_mode():
        expected = model(ids).logits
    restore = fuse(model)
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
    model(ids).logits.sum().backward()  # in place, a gradient would be wrong or refused
    assert all("forward" in vars(layer.mlp) for layer in model.model.layers)
    restore()
    assert not any("forward" in vars(layer.mlp) for layer in model.model.layers)
