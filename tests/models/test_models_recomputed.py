"""What is computed again on the way back: values and gradients against autograd's own on the definition; what is kept."""

import copy

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.cpu_kernels import fuse, gated, rms_norm


def numbers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(True)


def test_the_gated_product_s_gradients_are_right():
    gate, up = numbers(5, 7), numbers(5, 7, seed=1)
    torch.testing.assert_close(gated(gate, up), F.silu(gate) * up)
    assert torch.autograd.gradcheck(gated, (gate, up))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6)])
def test_the_norm_s_gradients_are_right(shape):
    x, weight = numbers(1, *shape), numbers(6, seed=1)
    expected = weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), expected)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def test_a_frozen_weight_has_no_gradient_and_vectors_of_zeros_stay_finite():
    x, weight = torch.zeros(2, 6, requires_grad=True), torch.ones(6)
    rms_norm(x, weight, 1e-6).sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gpt2"])
def test_a_model_s_gradients_stay_as_they_are(tiny_model, architecture):
    plain = copy.deepcopy(tiny_model(architecture))
    fused, ids = copy.deepcopy(plain), torch.tensor([[3, 9, 17, 4, 120, 7]])
    restore = fuse(fused)
    for model in (plain, fused):
        model.requires_grad_(True)
        model(ids, labels=ids).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-5, msg=name)
    restore()
    assert all("forward" not in vars(module) for module in fused.modules())


def test_less_is_kept_for_the_way_back(tiny_model):
    def kept(model):
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = model(torch.arange(3, 67)[None]).logits
        del out
        return sum(sizes.values())

    model = copy.deepcopy(tiny_model("llama", hidden_size=128, intermediate_size=512))
    before = kept(model)
    restore = fuse(model)
    after = kept(model)
    restore()
    assert after < 0.9 * before
