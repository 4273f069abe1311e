"""The loop: order, schedule, optimizer, weights of terms, a stop on what is not finite."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from student_naive import MULTI, SINGLE, gold_term, kl_term, make_examples, naive_training, tuning

from pipeline.errors import ShotlessError
from pipeline.files import sha256_json
from pipeline.students import loop
from pipeline.students.batches import Order, Term, permutation
from pipeline.students.objective import objective
from pipeline.students.objectives import label_log_probabilities
from pipeline.students.optimizer import adamw, clip_gradients, learning_rate
from pipeline.students.training import train


@given(st.lists(st.text(max_size=8), unique=True, max_size=40), st.integers(0, 9), st.integers(0, 9))
def test_the_order_of_an_epoch_is_that_of_hashes(ids, seed, epoch):
    assert permutation(ids, seed, epoch).tolist() == sorted(range(len(ids)), key=lambda n: sha256_json([seed, epoch, ids[n]]))


@pytest.mark.parametrize("completions", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
def test_training_gives_the_naive_loop_s_losses_and_answers(tiny_model, architecture, completions):
    model, terms, params = tiny_model(architecture), [kl_term(), gold_term()], tuning(weight_decay=0.1, max_grad_norm=0.5)
    naive = copy.deepcopy(model)
    expected = naive_training(naive, completions, terms, params)
    start = copy.deepcopy(model)
    trained = train(model, completions, terms, params, title="test")
    assert trained.losses == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert trained.losses[-1] != pytest.approx(trained.losses[0], rel=1e-3)
    rows = torch.tensor([make_examples(1)[0].ids])
    with torch.no_grad():
        before, after, wanted = (label_log_probabilities(m(rows).logits[:, -1], SINGLE) for m in (start, model, naive))
    assert torch.allclose(after, wanted, atol=5e-3)
    assert not torch.allclose(after, before, atol=2e-2)


@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "gpt_neox"])
def test_a_student_comes_near_its_targets(tiny_model, architecture):
    trained = train(tiny_model(architecture), SINGLE, [kl_term()], tuning(steps=60, learning_rate=3e-3), title="test")
    assert sum(trained.losses[-5:]) < 0.3 * sum(trained.losses[:5])


def test_tied_embeddings_stay_tied_and_rows_of_other_tokens_stay_as_they_were(tiny_model):
    model = tiny_model("llama")
    before = model.get_input_embeddings().weight.detach().clone()
    term = kl_term()
    train(model, SINGLE, [term], tuning(weight_decay=0.1), title="test")
    after = model.get_input_embeddings().weight
    assert after is model.get_output_embeddings().weight
    seen = sorted({token for example in term.examples for token in example.ids} | {5, 9})
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert set(changed) <= set(seen)
    assert {5, 9} <= set(changed)


def test_tokens_and_examples_are_counted_by_step(tiny_model):
    terms, params = [kl_term(), gold_term()], tuning()
    trained = train(tiny_model("llama"), MULTI, terms, params, title="test")
    batches = [Order(term, params.seed).batch(step) for step in range(params.steps) for term in terms]
    assert trained.examples == 5 * 6
    assert trained.tokens == sum(len(example.ids) + 2 for batch in batches for example in batch)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_examples(tiny_model):
    model, term = tiny_model("llama"), kl_term()
    with torch.no_grad():
        next(model.model.layers[1].mlp.parameters()).fill_(float("nan"))
    ids = [example.example_id for example in Order(term, 0).batch(0)]
    with pytest.raises(ShotlessError, match="the loss is nan at step 1") as caught:
        train(model, SINGLE, [term], tuning(), title="student cd")
    assert all(example_id in str(caught.value) for example_id in ids)
    assert caught.value.exit_code == 1


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tiny_model, monkeypatch):
    model = tiny_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    real = objective
    monkeypatch.setattr(loop, "objective", lambda *args: (real(*args) - real(*args).detach()).sqrt() + 1.0)
    with pytest.raises(ShotlessError, match=r"norm of the gradient is (inf|nan) at step 1"):
        train(model, SINGLE, [kl_term()], tuning(), title="student cd")
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_the_weight_of_a_term_scales_its_loss():
    log_p = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.5, 0.5]]).log()
    kl, gold = kl_term(2), gold_term(1, weight=3.0)
    batches = [kl.examples[:2], gold.examples[:1]]
    alone = objective([kl], [batches[0]], log_p[:2])
    assert float(objective([kl, gold], batches, log_p)) == pytest.approx(float(alone) + 3.0 * -float(log_p[2, 0]))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_takes_every_example_once(count, batch_size, seed):
    term = Term("kl", 1.0, batch_size, make_examples(count))
    order = Order(term, seed)
    taken = [example.example_id for step in range(count) for example in order.batch(step)]
    for epoch in range(batch_size):
        assert Counter(taken[epoch * count : (epoch + 1) * count]) == Counter(example.example_id for example in term.examples)


@given(st.randoms(), st.integers(0, 5))
def test_the_order_depends_on_content_and_not_on_the_file_s_order(random, epoch):
    ids = [example.example_id for example in make_examples(12)]
    shuffled = random.sample(ids, len(ids))
    assert [ids[n] for n in permutation(ids, 3, epoch)] == [shuffled[n] for n in permutation(shuffled, 3, epoch)]


def test_epochs_and_seeds_have_orders_of_their_own():
    ids = [example.example_id for example in make_examples(12)]
    orders = {tuple(permutation(ids, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_learning_rate_rises_then_holds_or_falls():
    constant = [learning_rate(step, tuning(steps=10, warmup=0.4)) / 1e-3 for step in range(10)]
    assert constant == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    linear = [learning_rate(step, tuning(steps=4, warmup=0.0, decay="linear")) / 1e-3 for step in range(4)]
    assert linear == pytest.approx([1, 0.75, 0.5, 0.25])
    cosine = [learning_rate(step, tuning(steps=4, warmup=0.0, decay="cosine")) / 1e-3 for step in range(4)]
    assert cosine[2] == pytest.approx(0.5)
    assert all(value > 0 for value in constant + linear + cosine)
    assert learning_rate(3, tuning(steps=4, warmup=1.0)) == pytest.approx(1e-3)


def test_clipping_scales_to_the_limit_and_leaves_smaller_gradients_alone(tiny_model):
    model = tiny_model("llama")
    optimizer = adamw(model.requires_grad_(True), tuning())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in model.parameters())
    assert clip_gradients(optimizer, 1e9) == pytest.approx(count**0.5, rel=1e-4)
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    clip_gradients(optimizer, 0.5)
    assert float(torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))) == pytest.approx(0.5, rel=1e-4)


def test_norms_biases_and_embeddings_do_not_decay(tiny_model):
    model = tiny_model("opt").requires_grad_(True)
    optimizer = adamw(model, tuning(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert all("layers" in name and name.endswith("weight") and "norm" not in name for name in decayed)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
