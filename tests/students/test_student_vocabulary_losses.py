"""Divergences on cached distributions against a full-vocabulary oracle written straight from the definition, values and gradients."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.distributions import decode, fit_vocabulary
from pipeline.cache.encodings import columns_of, encode
from pipeline.params import CacheParams
from pipeline.students.vocabulary_losses import divergence_nats, fused_divergence

DIVERGENCES = ["kl", "reverse_kl", "jensen_shannon"]
TINY = float(np.finfo(np.float32).tiny)
V = 23


def random_logits(positions=5, vocabulary=V, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, vocabulary, generator=generator, dtype=torch.float64) * scale


def cached(logits, encoding, temperature=1.0, uniforms=None, **changes):
    params = CacheParams(**{"encoding": encoding, "top_k": 4, "samples": 6, "resolution_nats": None, "temperatures": (2.0,), **changes})
    uniforms = torch.full((len(logits),), 0.37) if uniforms is None else uniforms
    table = pa.table(columns_of(encode(logits.float(), params, uniforms), np.ones(len(logits), dtype=int)))
    return decode(table, params, temperature)


def naive(divergence, p, q):
    """From the definition over whole distributions [P, cells]; p of 0 is the smallest float32 number where its logarithm is asked for."""
    floor, q = p.clamp_min(TINY), q.clamp_min(1e-300)  # log 0 has no gradient
    mean = (p + q) / 2
    if divergence == "kl":
        return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)
    if divergence == "reverse_kl":
        return (torch.special.xlogy(q, q) - q * floor.log()).sum(-1)
    return (torch.special.xlogy(p, p) + torch.special.xlogy(q, q) - 2 * torch.special.xlogy(mean, mean)).sum(-1) / 2


def cells(encoding, teacher, student, temperature, top_k=4):
    """The two distributions as the encoding lets them be seen: whole, or the tail as one cell, or the teacher's tail cut off."""
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    if encoding in {"full", "sampled", "hybrid"}:
        return p, q
    top = teacher.topk(top_k, -1).indices
    head_p, head_q = p.gather(-1, top), q.gather(-1, top)
    if encoding == "top_k":
        head_p = head_p / head_p.sum(-1, keepdim=True)
    return (torch.cat([head, 1 - head.sum(-1, keepdim=True)], -1) for head in (head_p, head_q))


def gradient_of(function, student):
    leaf = student.clone().requires_grad_()
    values = function(leaf)
    weights = torch.arange(1.0, len(student) + 1, dtype=torch.float64)
    (values * weights).sum().backward()
    return values.detach(), leaf.grad


PAIRS = [(e, d) for e in ("top_k", "top_k_tail", "full") for d in DIVERGENCES if (e, d) != ("top_k", "reverse_kl")]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("encoding", "divergence"), PAIRS)
def test_values_and_gradients_are_those_of_the_definition(encoding, divergence, temperature):
    teacher, student = random_logits(), random_logits(seed=1)
    distributions = cached(teacher, encoding, temperature)
    found = gradient_of(lambda s: divergence_nats(divergence, distributions, s, temperature), student)
    expected = gradient_of(lambda s: naive(divergence, *cells(encoding, teacher, s, temperature)), student)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("encoding", ["sampled", "hybrid"])
def test_drawn_entries_are_unbiased_in_value_and_gradient(encoding, divergence, temperature):
    """The mean over a fine grid of the uniform number is the expectation over draws."""
    teacher, student, grid = random_logits(1, scale=1.2), random_logits(1, scale=1.2, seed=1), 4000
    uniforms = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    distributions = cached(teacher.expand(grid, -1), encoding, temperature, uniforms)
    leaf = student.clone().requires_grad_()
    value = divergence_nats(divergence, distributions, leaf.expand(grid, -1), temperature).mean()
    value.backward()
    expected, gradient = gradient_of(lambda s: naive(divergence, *cells(encoding, teacher, s, temperature)), student)
    assert float(value.detach()) == pytest.approx(float(expected[0]), abs=2e-3)
    assert torch.allclose(leaf.grad, gradient, atol=2e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_draws_of_everything_are_the_exact_divergence(divergence):
    """A hybrid whose draws hit each entry of the tail in proportion to its mass has nothing left to chance."""
    teacher = torch.zeros(1, 12, dtype=torch.float64)
    teacher[0, :4] = torch.tensor([3.0, 2.5, 2.0, 1.5])
    student = random_logits(1, 12)
    found = divergence_nats(divergence, cached(teacher, "hybrid", samples=52), student)
    assert torch.allclose(found, naive(divergence, teacher.softmax(-1), student.softmax(-1)), atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_equal_to_the_teacher_has_no_divergence_and_no_gradient(divergence):
    teacher = random_logits()
    for encoding in ("top_k_tail", "full", "hybrid", "sampled"):
        value, gradient = gradient_of(lambda s, e=encoding: divergence_nats(divergence, cached(teacher, e), s), teacher)
        assert value.abs().max() < 1e-5, encoding
        if encoding in {"top_k_tail", "full"} or divergence != "kl":  # draws of a cross-entropy have a gradient of mean 0
            assert divergence == "jensen_shannon" or gradient.abs().max() < 1e-4, encoding


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 12), st.sampled_from(DIVERGENCES))
def test_a_bucket_never_sees_more_than_the_whole_and_never_less_than_nothing(seed, scale, divergence):
    teacher, student = random_logits(scale=scale, seed=seed), random_logits(scale=scale, seed=seed + 1)
    whole = divergence_nats(divergence, cached(teacher, "full"), student)
    coarse = divergence_nats(divergence, cached(teacher, "top_k_tail"), student)
    assert (coarse >= -1e-4).all()
    assert (coarse <= whole + 1e-4 * (1 + whole.abs())).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ragged_padding_gives_finite_values_and_gradients(divergence):
    teacher, student = random_logits(), random_logits(seed=1)
    teacher[0, 2:] = -torch.inf  # two entries are left: fewer than k
    teacher[1, 6:] = -torch.inf
    for encoding in ("top_k_tail", "hybrid", "sampled", "full"):
        value, gradient = gradient_of(lambda s, e=encoding: divergence_nats(divergence, cached(teacher, e), s), student)
        assert torch.isfinite(value).all(), encoding
        assert torch.isfinite(gradient).all(), encoding

    def masked_as_one_cell(s):
        p, q, masked = teacher.softmax(-1), s.softmax(-1), teacher == -torch.inf
        return naive(divergence, *(torch.cat([x * ~masked, (x * masked).sum(-1, keepdim=True)], -1) for x in (p, q)))

    found = gradient_of(lambda s: divergence_nats(divergence, cached(teacher, "full"), s), student)
    for one, other in zip(found, gradient_of(masked_as_one_cell, student), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def test_the_first_token_of_the_vocabulary_is_no_padding():
    """Padding entries have id 0: they must neither hide the true token 0 nor take it out of the tail."""
    teacher, student = random_logits(2), random_logits(2, seed=1)
    teacher[0, 3:] = -torch.inf
    teacher[1, 0] = 9.0
    found = divergence_nats("kl", cached(teacher, "top_k_tail", top_k=3), student)
    assert torch.allclose(
        found, torch.cat([naive("kl", *cells("top_k_tail", teacher[n : n + 1], student[n : n + 1], 1.0, 3)) for n in (0, 1)]), atol=1e-5
    )


def test_the_student_s_tail_is_not_free():
    """Moving the student's mass from the head to the tail costs, in every encoding: it would not if both sides were renormalised."""
    teacher = random_logits(1)
    shifted = teacher.clone()
    shifted[0, teacher[0].argsort()[:-4]] += 3.0
    for encoding in ("top_k", "top_k_tail", "hybrid", "full"):
        distributions = cached(teacher, encoding)
        assert float(divergence_nats("kl", distributions, shifted)) > float(divergence_nats("kl", distributions, teacher)) + 0.1


def test_a_tail_of_almost_no_mass_keeps_its_gradient():
    """The student's 1 - Σ head is its own log-sum-exp: at e^-60 it is still there."""
    student = torch.tensor([[60.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
    teacher = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    found = gradient_of(lambda s: divergence_nats("kl", cached(teacher, "top_k_tail", top_k=1), s), student)
    expected = gradient_of(lambda s: naive("kl", *cells("full", teacher, s, 1.0)), student)
    assert torch.allclose(found[1][0, 0], expected[1][0, 0])
    assert (found[1][0, 1:] < 0).all()


def test_certain_tokens_give_cross_entropy():
    student = random_logits()
    ids = torch.tensor([3, 0, 7, 22, 1])
    certain = cached((torch.nn.functional.one_hot(ids, student.shape[1]) - 1) * 1e4, "full")
    assert torch.allclose(divergence_nats("kl", certain, student), torch.nn.functional.cross_entropy(student, ids, reduction="none"))


def test_entries_past_the_student_s_vocabulary_leave_the_rest_as_it_was():
    teacher, student = random_logits(vocabulary=V + 9), random_logits(seed=1)
    teacher[:, V:] = -40.0
    padded = fit_vocabulary(cached(teacher, "full"), V)
    exact = naive("kl", teacher[:, :V].softmax(-1), student.softmax(-1))
    assert torch.allclose(divergence_nats("kl", padded, student), exact, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("encoding", ["top_k_tail", "hybrid", "full"])
def test_the_fused_loss_is_the_plain_one_in_value_and_gradients(encoding, divergence, temperature, bias):
    generator = torch.Generator().manual_seed(3)
    distributions = cached(random_logits(7), encoding, temperature, torch.rand(7, generator=generator))
    tensors = [torch.randn(*shape, generator=generator).requires_grad_() for shape in ((7, 8), (V, 8), (V,))]
    hidden, head, offset = tensors if bias else [*tensors[:2], None]
    leaves = [t for t in (hidden, head, offset) if t is not None]
    plain = divergence_nats(divergence, distributions, torch.nn.functional.linear(hidden, head, offset), temperature).sum()
    total = fused_divergence(divergence, distributions, hidden, head, offset, temperature, logits_at_once=3 * V)
    assert torch.allclose(total, plain, atol=1e-5)
    expected = torch.autograd.grad(3.0 * plain, leaves)
    for one, other in zip(torch.autograd.grad(3.0 * total, leaves), expected, strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_the_fused_loss_learns_only_what_asks_for_a_gradient():
    distributions = cached(random_logits(), "hybrid")
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(V, 8)
    total = fused_divergence("kl", distributions, hidden, head, None)
    total.backward()
    assert hidden.grad is not None
    assert head.grad is None
    with torch.no_grad():
        without = fused_divergence("kl", distributions, hidden, head, None)
    assert torch.allclose(without, total)
    assert not without.requires_grad


def test_half_precision_heads_are_computed_in_float32_logits():
    distributions = cached(random_logits(), "hybrid")
    hidden, head = torch.randn(5, 8), torch.randn(V, 8)
    exact = fused_divergence("kl", distributions, hidden, head, None)
    halves = [x.bfloat16().requires_grad_() for x in (hidden, head)]
    total = fused_divergence("kl", distributions, *halves, None)
    total.backward()
    assert total.dtype == torch.float32
    assert halves[1].grad.dtype == torch.bfloat16
    assert float(total.detach()) == pytest.approx(float(exact), rel=0.05)


def test_a_shifted_pairing_is_seen():
    """Positions paired with the neighbour's distribution: the bug of shifted labels."""
    teacher = random_logits(8, scale=4.0)
    distributions = cached(teacher, "hybrid")
    right = divergence_nats("kl", distributions, teacher).mean()
    wrong = divergence_nats("kl", distributions, teacher.roll(1, 0)).mean()
    assert float(right) < 1e-4
    assert float(wrong) > 1.0
