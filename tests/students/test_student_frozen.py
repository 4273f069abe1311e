"""Frozen lower layers run once: the numbers, gradients and steps of the whole pass, on several architectures; and when not."""

import copy

import pytest
import torch
from student_naive import MULTI, SINGLE, make_examples

from pipeline.models.packed import PackedModel, decoder_layers
from pipeline.models.rows import Row
from pipeline.students import frozen as frozen_module
from pipeline.students.forward import choose_forward, plain_log_probabilities
from pipeline.students.frozen import StatesUnusableError, StoredStates, on_stored_states

ROWS = [list(example.ids) for example in make_examples(7)]
PACKED = ["llama", "qwen3", "gpt2", "opt", "gpt_neox", "gemma"]


def freeze(model, layers):
    """All but the layers from `layers` on."""
    model.requires_grad_(False)
    for layer in list(decoder_layers(model))[layers:]:
        layer.requires_grad_(True)
    return model


def stored(model, completions, layers, **budget):
    expected = plain_log_probabilities(model, completions, ROWS[:3])
    forward = choose_forward(model, completions, ROWS, None)
    return forward, on_stored_states(forward, completions, [*ROWS[:3], *ROWS], expected, layers, **budget)


def gradients(model, values):
    model.zero_grad()
    (values * torch.arange(1.0, values.numel() + 1).reshape(values.shape)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("completions", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("architecture", PACKED)
def test_values_and_gradients_are_those_of_the_whole_pass(tiny_model, architecture, layers, completions):
    model = freeze(copy.deepcopy(tiny_model(architecture)), layers)
    whole, short = stored(model, completions, layers)
    assert f"the lowest {layers} layers once for each example, their states in memory" in short.why
    batch = [ROWS[4], ROWS[0], ROWS[5]]
    expected, found = whole.run(batch), short.run(batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    wanted, got = gradients(model, expected), gradients(model, found)
    assert wanted
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-4)


def test_the_layers_below_do_not_run(tiny_model):
    model = freeze(copy.deepcopy(tiny_model("llama")), 2)
    _, short = stored(model, SINGLE, 2)
    ran = []
    layers = decoder_layers(model)
    hooks = [part.register_forward_hook(lambda *_, number=n: ran.append(number)) for n, layer in enumerate(layers) for part in [layer.mlp]]
    short.run(ROWS[:2])
    assert ran == [2, 3]
    for hook in hooks:
        hook.remove()


def test_the_model_is_as_it_was_afterwards(tiny_model):
    model = freeze(copy.deepcopy(tiny_model("llama")), 2)
    before = plain_log_probabilities(model, SINGLE, ROWS)
    whole, short = stored(model, SINGLE, 2)
    short.run(ROWS)
    torch.testing.assert_close(whole.run(ROWS), before, rtol=0, atol=2e-5)
    short.detach()
    assert torch.equal(plain_log_probabilities(model, SINGLE, ROWS), before)


def test_what_is_learnt_above_changes_the_numbers_and_the_states_stay_right(tiny_model):
    model = freeze(copy.deepcopy(tiny_model("gpt2")), 2)
    whole, short = stored(model, SINGLE, 2)
    before = whole.run(ROWS).detach()
    with torch.no_grad():
        for parameter in decoder_layers(model)[3].parameters():
            parameter.mul_(1.5)
    assert (whole.run(ROWS) - before).abs().max() > 1e-3
    torch.testing.assert_close(short.run(ROWS), whole.run(ROWS), rtol=0, atol=2e-5)


def test_a_learnt_layer_below_is_seen_and_everything_runs(tiny_model):
    model = freeze(copy.deepcopy(tiny_model("llama")), 1)
    whole, result = stored(model, SINGLE, 2)
    assert result.run is whole.run
    assert "in every step: something below layer 2 is learnt" in result.why


def test_learnt_positions_are_seen(tiny_model):
    model = freeze(copy.deepcopy(tiny_model("gpt2")), 2)
    model.transformer.wpe.requires_grad_(True)
    assert "something below layer 2 is learnt" in stored(model, SINGLE, 2)[1].why


def test_a_plain_forward_stays_as_it_is(tiny_model):
    model = freeze(copy.deepcopy(tiny_model("llama")), 2)
    expected = plain_log_probabilities(model, SINGLE, ROWS[:3])
    plain = choose_forward(model, SINGLE, ROWS, expected + 1)
    result = on_stored_states(plain, SINGLE, ROWS, expected, 2)
    assert result.run is plain.run
    assert "the forward pass is not packed" in result.why


def test_states_that_give_other_numbers_are_refused(tiny_model):
    model = freeze(copy.deepcopy(tiny_model("llama")), 2)
    wrong = plain_log_probabilities(model, SINGLE, ROWS[:3]) + 0.01
    forward = choose_forward(model, SINGLE, ROWS)
    result = on_stored_states(forward, SINGLE, ROWS, wrong, 2)
    assert result.run is forward.run
    assert "stored states differ by 1.0e-02 nats (allowed 1e-04)" in result.why


@pytest.mark.parametrize("layers", [0, 4, 9])
def test_a_layer_must_be_left_above_and_one_below(tiny_model, layers):
    packed = PackedModel(copy.deepcopy(tiny_model("llama")).requires_grad_(False))
    with pytest.raises(StatesUnusableError, match=f"{layers} frozen layers of 4: states are stored for 1 to 3"):
        StoredStates(packed, [Row([3, 4])], layers)


def test_states_over_the_budget_lie_in_a_file_without_a_name(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("SHOTLESS_WORK", str(tmp_path / "work"))
    model = freeze(copy.deepcopy(tiny_model("llama")), 2)
    in_memory = stored(copy.deepcopy(model), SINGLE, 2)[1].run(ROWS)
    _, short = stored(model, SINGLE, 2, memory_bytes=100)
    assert "their states in a file" in short.why
    assert torch.equal(short.run(ROWS), in_memory)
    assert list((tmp_path / "work").iterdir()) == []


def test_two_recordings_give_the_same_bytes_whatever_the_order(tiny_model):
    packed = PackedModel(copy.deepcopy(tiny_model("llama")).requires_grad_(False))
    rows = [Row(ids) for ids in ROWS]
    first, second = StoredStates(packed, rows, 2), StoredStates(packed, [*rows[::-1], rows[0]], 2)
    for row in rows:
        with first.entered([row]):
            one = packed.logits(frozen_module.pack([row], 0), [])
        with second.entered([row]):
            assert torch.equal(packed.logits(frozen_module.pack([row], 0), []), one)
