"""Gradients multiplied straight into place against those that autograd adds up."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES

from pipeline.models.cpu_kernels import MatrixGradients

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
