"""Gradients multiplied straight into place against those that autograd adds up."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES

from pipeline.student.gradients import MatrixGradients

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
        in_place.forget()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and not any(parameter is module.weight for module in in_place._modules):
                parameter.grad.zero_()
                assert name
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
    in_place.forget()
    in_place.settle()
    assert all(module.weight.grad.abs().sum() == 0 for module in in_place._modules)


def test_frozen_matrices_are_left_to_autograd_and_detaching_gives_all_back(tiny_model):
    model = tiny_model("llama")
    frozen = model.model.layers[0].mlp.up_proj
    frozen.weight.requires_grad_(False)
    in_place = MatrixGradients(model)
    assert "forward" not in vars(frozen)
    passes(model, 0, 1)
    assert frozen.weight.grad is None
    in_place.detach()
    assert not [module for module in model.modules() if "forward" in vars(module)]
