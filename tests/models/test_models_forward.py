"""Plain logits and packed ones against full prompts, one at a time; when the packed pass is taken."""

import pytest
import torch
from conftest import ARCHITECTURES

from pipeline.errors import UsageError
from pipeline.models.forward import packed_if_exact, packed_logits, plain_logits
from pipeline.models.packed import ATTENTION, PackedModel, Row, Tree, decoder_layers, tree_of

ROWS = [
    Row([5, 9, 3, 7], tree_of([[11, 5, 2], [12, 3], [11, 6, 2], [11, 5, 7, 4]])),
    Row([8]),
    Row([1, 2, 3, 4, 5, 6], tree_of([[7, 8, 9, 1]])),
    Row([3, 4, 5, 6]),
    Row([3, 4, 5], Tree([7, 8, 9, 1, 7], [-1, -1, 0, 1, -1])),
]
UNUSUAL = {"mamba": {"state_size": 4}, "bloom": {"n_head": 4, "n_layer": 4}}


def naive(model, rows, layers=()):
    """Every output as the last token of a full prompt of its own: logits [N, V], and the layers' outputs there, side by side."""
    logits, states = [], []
    for row in rows:
        continued: list = [list(row.query)]
        for token, parent in zip(row.tree.tokens, row.tree.parents, strict=True):
            continued.append([*continued[parent + 1], token])
        for prompt in continued:
            caught = []

            def catch(_module, _args, out, caught=caught):
                caught.append(out[0] if isinstance(out, tuple) else out)

            hooks = [decoder_layers(model)[layer].register_forward_hook(catch) for layer in layers]
            logits.append(model(torch.tensor([prompt]), use_cache=False).logits[0, -1])
            states.append(torch.cat([state[0, -1] for state in caught]) if caught else torch.zeros(0))
            for hook in hooks:
                hook.remove()
    return torch.stack(logits), torch.stack(states)


@torch.no_grad()
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *UNUSUAL])
def test_plain_logits_are_those_of_full_prompts(tiny_model, architecture):
    model = tiny_model(architecture, **UNUSUAL.get(architecture, {}))
    found, states = plain_logits(model, ROWS)
    assert states is None
    assert torch.allclose(found, naive(model, ROWS)[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[-1], [0, 2]])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_hidden_states_come_in_the_same_order_from_both(tiny_model, architecture, layers):
    model = tiny_model(architecture)
    expected = naive(model, ROWS, layers)[1]
    assert torch.allclose(plain_logits(model, ROWS, layers)[1], expected, atol=1e-4)
    packed, _ = packed_if_exact(model, lambda packed: 0.0 if packed.answers_only is (architecture != "gpt2") else 1.0)
    assert torch.allclose(packed_logits(packed, ROWS, layers=layers)[1], expected, atol=1e-4)


def test_a_layer_that_is_not_there_is_refused(tiny_model):
    with pytest.raises(UsageError, match=r"hidden_layers: no layer 4; this model has 4, 0 to 3"):
        plain_logits(tiny_model("llama"), ROWS, [4])


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt_neox"])
def test_both_have_the_gradient_of_full_prompts(tiny_model, architecture):
    def gradient(run):
        model = tiny_model(architecture)
        run(model).log_softmax(-1)[:, 3].sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradient(lambda model: naive(model, ROWS)[0])
    for run in (lambda model: plain_logits(model, ROWS)[0], lambda model: packed_logits(PackedModel(model), ROWS)[0]):
        for name, value in gradient(run).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_packed_pass_is_taken_if_it_is_exact_and_given_back(tiny_model):
    model = tiny_model("llama")
    attention = model.config._attn_implementation
    expected = plain_logits(model, ROWS)[0].detach()
    packed, reason = packed_if_exact(model, lambda packed: float((packed_logits(packed, ROWS)[0] - expected).abs().max()))
    assert packed is not None
    assert packed.answers_only
    assert "the last layer on answer positions alone; a probe differs by" in reason
    assert model.config._attn_implementation == ATTENTION
    packed.detach()
    assert model.config._attn_implementation == attention
    assert torch.equal(plain_logits(model, ROWS)[0], expected)


@pytest.mark.parametrize("difference", [lambda packed: 2e-4, lambda packed: float("nan"), lambda packed: {}["gone"]])
def test_a_pass_that_differs_or_fails_is_refused_and_the_model_is_as_it_was(tiny_model, difference):
    model = tiny_model("llama")
    attention, expected = model.config._attn_implementation, plain_logits(model, ROWS)[0]
    packed, reason = packed_if_exact(model, difference)
    assert packed is None
    assert reason.startswith("packed rows were refused: the last layer on answer positions alone: ")
    assert model.config._attn_implementation == attention
    assert torch.equal(plain_logits(model, ROWS)[0], expected)
    assert not [module for module in model.modules() if "forward" in vars(module)]
