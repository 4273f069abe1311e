"""Fidelity figures against their definitions, on small distributions."""

import pytest
import torch
from score_rows import ENCODINGS, params_of, random_logits, table_of

from pipeline.cache.distributions import decode
from pipeline.cache.fidelity import fidelity


def cached_kl(cached, logits):
    """KL(p ‖ q) of each position as a loss on the cache sees it, by the definition: entry by entry, [P] with gradient."""
    values = []
    for row, log_q in enumerate(logits.double().log_softmax(-1)):
        total, kept = log_q.new_zeros(()), []
        for token, log_p in zip(cached.ids[row].tolist(), cached.log_probabilities[row].double(), strict=True):
            if log_p > -torch.inf:
                kept.append(token)
                total = total + log_p.exp() * (log_p - log_q[token])
        for token, log_p, weight in zip(
            cached.sampled_ids[row].tolist(),
            cached.sampled_log_probabilities[row].double(),
            cached.sampled_weights[row].double(),
            strict=True,
        ):
            if weight > 0:
                total = total + weight * (log_p - log_q[token])
        if (rest := cached.rest[row].double()) > 0:
            outside = [token for token in range(len(log_q)) if token not in kept]
            total = total + rest * (rest.log() - log_q[outside].logsumexp(-1))
        values.append(total)
    return torch.stack(values)


def measured(encoding, resolution=None, positions=200, student=True, **changes):
    teacher, logits = random_logits(positions, scale=2.0), random_logits(positions, scale=2.0, seed=9)
    params = params_of(encoding, resolution_nats=resolution, **changes)
    uniforms = torch.rand(positions, generator=torch.Generator().manual_seed(5))
    cached = decode(table_of(teacher, params, uniforms), params)
    return fidelity([(teacher.log_softmax(-1), cached, logits if student else None)], resolution), teacher, cached, logits


@pytest.mark.parametrize("student", [True, False])
def test_the_whole_distribution_loses_nothing(student):
    figures, *_ = measured("full", student=student)
    assert figures["retained_mass"] == pytest.approx(1)
    assert figures["gradient_cosine"] == pytest.approx(1)
    for name in ("truncation_nats", "quantisation_nats", "kl_to_live_nats"):
        assert figures[name] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_lost_is_what_the_student_s_loss_does_not_see(encoding):
    figures, teacher, cached, logits = measured(encoding)
    p, q = teacher.double().log_softmax(-1), logits.double().log_softmax(-1)
    whole = (p.exp() * (p - q)).sum(-1)
    seen = cached_kl(cached, logits)
    assert figures["truncation_nats"] == pytest.approx(float((whole - seen).mean()), abs=1e-4)
    assert figures["student_kl_nats"] == pytest.approx(float(whole.mean()), abs=1e-4)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_cosine_is_that_of_the_losses_gradients(encoding):
    figures, teacher, cached, logits = measured(encoding)
    leaf = logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(cached_kl(cached, leaf).sum(), leaf)
    true = logits.double().softmax(-1) - teacher.double().softmax(-1)
    assert figures["gradient_cosine"] == pytest.approx(float(torch.cosine_similarity(gradient.flatten(), true.flatten(), dim=0)), abs=1e-5)
    assert figures["gradient_cosine_mean"] == pytest.approx(float(torch.cosine_similarity(gradient, true).mean()), abs=1e-5)


def test_a_bucket_loses_its_mass_times_the_divergence_within_it():
    figures, teacher, cached, logits = measured("top_k_tail")
    expected = []
    for row in range(len(teacher)):
        outside = [token for token in range(40) if token not in cached.ids[row]]
        p, q = (x[row, outside].double().log_softmax(-1) for x in (teacher, logits))
        expected.append(float(cached.rest[row]) * float((p.exp() * (p - q)).sum()))
    assert figures["truncation_nats"] == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rounding_costs_about_its_square_over_24_at_most(encoding):
    resolution = 1 / 4
    figures, *_ = measured(encoding, resolution)
    assert 0 < figures["quantisation_nats"] < 1.5 * resolution**2 / 24
    assert figures["kl_to_live_nats"] == pytest.approx(figures["quantisation_nats"], rel=0.1)  # `top_k` is rounded before it is scaled up


def test_a_teacher_that_changed_is_far_from_its_cache():
    _, teacher, cached, logits = measured("top_k_tail")
    changed = (teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(1)) * 0.3).log_softmax(-1)
    assert fidelity([(changed, cached, logits)])["kl_to_live_nats"] > 0.01


@pytest.mark.parametrize("encoding", ["sampled", "hybrid"])
def test_draws_lose_nothing_on_average(encoding):
    figures, *_ = measured(encoding, positions=4000)
    assert abs(figures["truncation_nats"]) < 4 * figures["truncation_rms_nats"] / 4000**0.5


def test_retained_mass_is_that_of_the_kept_entries():
    figures, teacher, cached, _ = measured("top_k_tail")
    mass = teacher.double().softmax(-1).gather(-1, cached.ids).sum(-1)
    assert figures["retained_mass"] == pytest.approx(float(mass.mean()), abs=1e-5)
    assert figures["retained_mass_least"] == pytest.approx(float(mass.min()), abs=1e-5)
    assert figures["retained_mass_worst_percent"] == pytest.approx(float(mass.quantile(0.01)), abs=1e-5)


def test_figures_of_pieces_are_those_of_the_whole():
    figures, teacher, cached, logits = measured("hybrid", 1 / 4)
    parts = [slice(0, 1), slice(1, 130), slice(130, 200)]
    in_pieces = fidelity(((teacher.log_softmax(-1)[part], cached.take(part), logits[part]) for part in parts), 1 / 4)
    assert in_pieces == pytest.approx(figures, rel=1e-9)
