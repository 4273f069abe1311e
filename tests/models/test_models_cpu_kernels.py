"""Kernels: values and gradients against autograd's own on the definition; what is kept; the switch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES

from pipeline.models.cpu_kernels import MatrixGradients, fuse, gated, rms_norm


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


TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}


def passes(model, seed, count):
    """Backward passes of made-up batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, 300, (2, 9), generator=generator)
        model(ids).logits.square().mean().backward()


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_of_several_passes_have_the_gradients_of_autograd(tiny_model, architecture):
    plain = tiny_model(architecture)
    model = copy.deepcopy(plain)
    in_place = MatrixGradients(model)
    for step in range(3):
        in_place.forget(model.parameters())
        plain.zero_grad()
        passes(plain, step, step + 1)
        passes(model, step, step + 1)
        in_place.settle()
        found, expected = gradients(model), gradients(plain)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, **TOLERANCE)


def test_a_matrix_that_no_pass_came_by_has_no_gradient_left_of_the_step_before(tiny_model):
    model = tiny_model("llama")
    in_place = MatrixGradients(model)
    passes(model, 0, 1)
    assert all(module.weight.grad.abs().sum() > 0 for module in in_place._modules)
    in_place.forget([])
    in_place.settle()
    assert all(module.weight.grad.abs().sum() == 0 for module in in_place._modules)


def test_a_weight_that_is_also_used_outside_its_layer_has_both_gradients(tiny_model):
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    in_place = MatrixGradients(model)
    x = torch.linspace(-1, 1, 32)[None]
    for step in range(2):
        in_place.forget(model.parameters())
        plain.zero_grad()
        for one in (plain, model):
            (x @ one.model.layers[0].self_attn.q_proj.weight).square().sum().backward()
            passes(one, step, 1)
        in_place.settle()
        for name, value in gradients(plain).items():
            torch.testing.assert_close(gradients(model)[name], value, **TOLERANCE)


def test_frozen_matrices_are_left_to_autograd_and_detaching_gives_all_back(tiny_model):
    model = tiny_model("llama")
    frozen = model.model.layers[0].mlp.up_proj
    frozen.weight.requires_grad_(False)
    in_place = MatrixGradients(model)
    assert "forward" not in vars(frozen)
    passes(model, 0, 1)
    assert frozen.weight.grad is None
    in_place.detach()
    assert all(not module.weight._backward_hooks for module in in_place._modules)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_the_switch_leaves_every_model_with_its_own_code(tiny_model, monkeypatch):
    monkeypatch.setenv("SHOTLESS_KERNELS", "0")
    model = tiny_model("llama")
    fuse(model)()
    MatrixGradients(model).detach()
    fuse(model)
    in_place = MatrixGradients(model)
    assert not [module for module in model.modules() if "forward" in vars(module)]
    passes(model, 0, 1)
    first = gradients(model)
    in_place.forget(model.parameters())
    passes(model, 0, 1)
    in_place.settle()
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, first[name])
