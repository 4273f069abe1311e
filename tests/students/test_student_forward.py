"""The training forward and its gradient against plain transformers, one row at a time; the small vocabulary against the whole one."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES

from pipeline.models.packed import UnsupportedModelError
from pipeline.students import forward as forward_module
from pipeline.students.forward import choose_forward, probe_rows
from pipeline.students.objectives import kl_nats
from pipeline.students.vocabulary import SmallVocabulary

SINGLE = [[5], [9]]
MULTI = [[5], [9, 3, 7], [11, 5]]


def random_rows(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(1, 300, (length,), generator=generator).tolist() for length in lengths]


ROWS = random_rows(9, 4, 9, 15, 1)


def naive_log_probabilities(model, completions, rows):
    """Each row and completion on its own, by the model's own logits, with a gradient."""
    result = []
    for row in rows:
        scores = []
        for completion in completions:
            logits = model(torch.tensor([row + completion])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(row) - 1 + place, token] for place, token in enumerate(completion)))
        result.append(torch.stack(scores).log_softmax(-1))
    return torch.stack(result)


def targets(completions):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(len(ROWS), len(completions), generator=generator).softmax(-1)


def gradients(model, log_probabilities, completions):
    model.zero_grad()
    kl_nats(targets(completions), log_probabilities).mean().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected):
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) < 1e-4 * max(largest, 1), name


@pytest.mark.parametrize("completions", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_rows_give_the_plain_values_and_gradients(tiny_model, architecture, completions):
    model = tiny_model(architecture)
    expected_values = naive_log_probabilities(model, completions, ROWS)
    expected = gradients(model, expected_values, completions)
    forward = choose_forward(model, completions, ROWS)
    assert forward.name == "packed", forward.why
    values = forward.run(ROWS)
    assert torch.allclose(values, expected_values, atol=1e-4)
    assert_same(gradients(model, values, completions), expected)
    forward.detach()
    again = naive_log_probabilities(model, completions, ROWS)
    assert torch.allclose(again, expected_values, atol=1e-5)


@pytest.mark.parametrize("completions", [SINGLE, MULTI], ids=["single", "multi"])
def test_a_refused_architecture_trains_by_plain_batches_with_the_same_numbers(tiny_model, monkeypatch, completions):
    def refuse(*args, **kwargs):
        raise UnsupportedModelError("not this one")

    model = tiny_model("llama")
    expected_values = naive_log_probabilities(model, completions, ROWS)
    expected = gradients(model, expected_values, completions)
    monkeypatch.setattr(forward_module, "PackedModel", refuse)
    forward = choose_forward(model, completions, ROWS)
    assert forward.name == "plain"
    assert "not this one" in forward.why
    values = forward.run(ROWS)
    assert torch.allclose(values, expected_values, atol=1e-4)
    assert_same(gradients(model, values, completions), expected)


def test_a_packed_pass_with_other_numbers_is_refused(tiny_model, monkeypatch):
    real = forward_module._packed
    monkeypatch.setattr(forward_module, "_packed", lambda *args: real(*args).roll(1, 0))
    forward = choose_forward(tiny_model("llama"), SINGLE, ROWS)
    assert forward.name == "plain"
    assert "differs by" in forward.why


def test_a_sliding_window_shorter_than_the_rows_is_trained_plainly(tiny_model):
    model = tiny_model("mistral", sliding_window=4)
    forward = choose_forward(model, SINGLE, ROWS)
    assert forward.name == "plain"
    assert torch.allclose(forward.run(ROWS), naive_log_probabilities(model, SINGLE, ROWS), atol=1e-4)


def test_probe_rows_span_the_lengths():
    assert [len(row) for row in probe_rows(ROWS)] == [1, 9, 15]
    assert [len(row) for row in probe_rows(ROWS[:1])] == [9, 9, 9]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_small_vocabulary_has_the_same_values_and_gradients(tiny_model, architecture):
    model = tiny_model(architecture)
    whole = copy.deepcopy(model)
    expected_values = naive_log_probabilities(whole, SINGLE, ROWS)
    expected = gradients(whole, expected_values, SINGLE)
    small = SmallVocabulary.cut(model, [token for ids in (*ROWS, *SINGLE) for token in ids])
    values = naive_log_probabilities(model, [small.ids(ids) for ids in SINGLE], [small.ids(row) for row in ROWS])
    assert torch.allclose(values, expected_values, atol=1e-5)
    found = gradients(model, values, SINGLE)
    for name, gradient in found.items():
        if gradient.shape != expected[name].shape:
            rest = torch.ones(len(expected[name]), dtype=torch.bool)
            rest[small.kept] = False
            assert float(expected[name][rest].abs().max()) < 1e-7, name
            expected[name] = expected[name][small.kept]
    assert_same(found, expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt", "phi"])
def test_restoring_the_vocabulary_puts_trained_rows_back_and_no_others(tiny_model, architecture):
    model = tiny_model(architecture)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    small = SmallVocabulary.cut(model, [4, 17, 4])
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    small.restore()
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    before[name][[4, 17]] += 1
    for other, parameter in model.named_parameters():
        assert torch.equal(parameter, before[other]), other
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
