"""The objectives against references written straight from their definitions, values and gradients."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.packed import tree_of
from pipeline.students.losses import label_divergence, label_log_probabilities

kl_nats, reverse_kl_nats, jensen_shannon_nats = (partial(label_divergence, kind) for kind in ("kl", "reverse_kl", "jensen_shannon"))
COMPLETIONS = {"single": [[5], [9], [2]], "multi": [[5], [9, 3, 7], [2, 5]], "shared": [[9, 3, 7], [9, 3, 5, 1], [9, 4], [2, 3, 7]]}
finite = st.floats(-30, 30)
logit_rows = st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5)


def random_logits(completions, rows=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows * (1 + len(tree_of(completions).tokens)), 12, generator=generator, dtype=torch.float64) * 3


def found_log_probabilities(logits, completions):
    return label_log_probabilities(logits, tree_of(completions))


def naive_label_log_probabilities(logits, completions):
    """Each completion's tokens one after the other, over the whole vocabulary, in plain Python: beginnings in order of first occurrence."""
    beginnings = list(dict.fromkeys(tuple(ids[:end]) for ids in [(), *completions] for end in range(min(1, len(ids)), len(ids) or 1)))
    rows = []
    for start in range(0, len(logits), len(beginnings)):

        def log_p(beginning, token, start=start):
            row = [float(z) for z in logits[start + beginnings.index(tuple(beginning))]]
            return row[token] - math.log(sum(math.exp(z) for z in row))

        scores = [sum(log_p(ids[:place], token) for place, token in enumerate(ids)) for ids in completions]
        log_sum = math.log(sum(math.exp(s) for s in scores))
        rows.append([s - log_sum for s in scores])
    return torch.tensor(rows, dtype=torch.float64)


def naive_kl(target, log_probabilities):
    return [
        sum(p * (math.log(p) - float(q)) for p, q in zip(ps.tolist(), qs, strict=True) if p > 0)
        for ps, qs in zip(target, log_probabilities, strict=True)
    ]


@pytest.mark.parametrize("kind", COMPLETIONS)
def test_label_log_probabilities_are_those_of_the_definition(kind):
    logits = random_logits(COMPLETIONS[kind])
    found = found_log_probabilities(logits, COMPLETIONS[kind])
    assert torch.allclose(found.double(), naive_label_log_probabilities(logits, COMPLETIONS[kind]), atol=1e-5)


@pytest.mark.parametrize("kind", COMPLETIONS)
def test_a_shift_of_all_logits_changes_nothing(kind):
    logits = random_logits(COMPLETIONS[kind])
    shifted = logits + torch.randn(len(logits), 1, dtype=torch.float64) * 10
    assert torch.allclose(
        found_log_probabilities(logits, COMPLETIONS[kind]), found_log_probabilities(shifted, COMPLETIONS[kind]), atol=1e-4
    )


def test_single_token_labels_see_their_own_logits_alone():
    logits = random_logits(COMPLETIONS["single"]).requires_grad_()
    kl_nats(torch.tensor([[0.2, 0.3, 0.5]]), found_log_probabilities(logits, COMPLETIONS["single"])).sum().backward()
    touched = logits.grad.abs().sum(0).nonzero().flatten().tolist()
    assert touched == [2, 5, 9]


@pytest.mark.parametrize("kind", COMPLETIONS)
def test_an_answer_position_shifted_by_one_gives_other_numbers(kind):
    logits = random_logits(COMPLETIONS[kind])
    expected = naive_label_log_probabilities(logits, COMPLETIONS[kind])
    assert not torch.allclose(found_log_probabilities(logits.roll(1, 0), COMPLETIONS[kind]).double(), expected, atol=1e-2)


def test_labels_in_another_order_are_another_objective():
    log_p = torch.tensor([[0.7, 0.2, 0.1]]).log()
    target = torch.tensor([[0.7, 0.2, 0.1]])
    assert float(kl_nats(target, log_p)) == pytest.approx(0, abs=1e-7)
    assert float(kl_nats(target.roll(1, -1), log_p)) > 0.3


@given(logit_rows, logit_rows)
def test_kl_is_that_of_the_definition_and_never_negative(one, other):
    rows = min(len(one), len(other))
    target = torch.tensor(one[:rows], dtype=torch.float64).softmax(-1)
    log_p = torch.tensor(other[:rows], dtype=torch.float64).log_softmax(-1)
    found = kl_nats(target, log_p)
    assert found.tolist() == pytest.approx(naive_kl(target, log_p), rel=1e-9, abs=1e-12)
    assert float(found.min()) > -1e-12


@given(logit_rows, logit_rows)
def test_the_gradient_of_kl_is_student_minus_target(one, other):
    rows = min(len(one), len(other))
    target = torch.tensor(one[:rows], dtype=torch.float64).softmax(-1)
    logits = torch.tensor(other[:rows], dtype=torch.float64, requires_grad=True)
    kl_nats(target, logits.log_softmax(-1)).sum().backward()
    assert torch.allclose(logits.grad, logits.detach().softmax(-1) - target, atol=1e-10)


def naive_divergence(kind, p, q):
    """Of two distributions in plain Python, from the definition."""

    def kl(one, other):
        return sum(a * math.log(a / b) for a, b in zip(one, other, strict=True) if a > 0)

    if kind is reverse_kl_nats:
        return kl(q, p)
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, mean) + kl(q, mean)) / 2


@pytest.mark.parametrize("kind", [reverse_kl_nats, jensen_shannon_nats])
@given(one=logit_rows, other=logit_rows)
def test_other_divergences_are_those_of_the_definition(kind, one, other):
    rows = min(len(one), len(other))
    target = torch.tensor(one[:rows], dtype=torch.float64).softmax(-1)
    log_p = torch.tensor(other[:rows], dtype=torch.float64).log_softmax(-1)
    found = kind(target, log_p)
    expected = [naive_divergence(kind, p, q) for p, q in zip(target.tolist(), log_p.exp().tolist(), strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert float(found.min()) > -1e-12


@pytest.mark.parametrize("kind", [reverse_kl_nats, jensen_shannon_nats])
def test_the_gradients_of_other_divergences_are_those_of_finite_differences(kind):
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(4, 3, generator=generator, dtype=torch.float64).softmax(-1)
    logits = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: kind(target, z.log_softmax(-1)), logits)


@pytest.mark.parametrize("kind", [kl_nats, reverse_kl_nats, jensen_shannon_nats])
def test_a_divergence_and_its_gradient_vanish_where_student_and_target_agree(kind):
    logits = torch.tensor([[0.3, -1.0, 2.0], [30.0, -30.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = kind(logits.detach().softmax(-1), logits.log_softmax(-1))
    loss.sum().backward()
    assert float(loss.detach().abs().max()) < 1e-12
    assert float(logits.grad.abs().max()) < 1e-12


@given(logit_rows, logit_rows)
def test_the_jensen_shannon_divergence_is_symmetric_and_at_most_log_2(one, other):
    rows = min(len(one), len(other))
    p, q = (torch.tensor(x[:rows], dtype=torch.float64).softmax(-1) for x in (one, other))
    forth, back = jensen_shannon_nats(p, q.log()), jensen_shannon_nats(q, p.log())
    assert torch.allclose(forth, back, atol=1e-12)
    assert float(forth.max()) <= math.log(2) + 1e-12


@pytest.mark.parametrize("kind", [reverse_kl_nats, jensen_shannon_nats])
def test_a_label_without_probability_gives_finite_divergences_and_gradients(kind):
    logits = torch.tensor([[2.0, 0.0, -150.0]], requires_grad=True)
    loss = kind(torch.tensor([[1.0, 0.0, 0.0]]), logits.log_softmax(-1))
    loss.sum().backward()
    assert math.isfinite(float(loss.detach()))
    assert bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad[0, 1]) > 0


def test_a_label_without_probability_adds_neither_value_nor_nan():
    log_p = torch.tensor([[0.0, -80.0, -120.0]], requires_grad=True)
    loss = kl_nats(torch.tensor([[1.0, 0.0, 0.0]]), log_p)
    loss.sum().backward()
    assert float(loss.detach()) == 0
    assert log_p.grad.tolist() == [[-1, 0, 0]]
