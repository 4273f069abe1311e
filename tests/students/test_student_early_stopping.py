"""The part that is held back, the choice of the step, and steps made of several forward passes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from student_naive import MULTI, SINGLE, gold_term, kl_term, make_examples, tuning

from pipeline.errors import ShotlessError, UsageError
from pipeline.students import objective as objective_module
from pipeline.students.batches import Order, Term, pieces
from pipeline.students.early_stopping import Best, HeldBack, split
from pipeline.students.objective import objective
from pipeline.students.objectives import kl_nats
from pipeline.students.training import train

HELD = make_examples(7, seed=4)


def held_back(every=1, patience=None, examples=HELD):
    return HeldBack(examples, every, patience)


def naive_agreement(model, examples=HELD):
    """Mean KL to the targets, one row at a time."""
    total = 0.0
    for example in examples:
        with torch.no_grad():
            log_p = model(torch.tensor([example.ids])).logits[0, -1, [5, 9]].log_softmax(-1)
        total += float(kl_nats(torch.tensor(example.target), log_p))
    return total / len(examples)


@given(st.integers(0, 5), st.floats(0.2, 0.8))
def test_a_split_is_a_partition_in_the_given_order(seed, share):
    examples = make_examples(60, seed)
    learnt, held = split(examples, share)
    assert sorted(e.example_id for e in (*learnt, *held)) == sorted(e.example_id for e in examples)
    assert [e for e in examples if e in set(held)] == list(held)


def test_the_share_that_is_held_back_is_met_on_average():
    assert len(split(make_examples(4000), 0.1)[1]) == pytest.approx(400, abs=60)


@given(st.randoms(), st.integers(20, 60))
def test_more_examples_or_another_order_move_none_to_the_other_side(random, count):
    examples = make_examples(60)
    held = set(split(examples, 0.4)[1])
    some = random.sample(examples, count)
    assert set(split(some, 0.4)[1]) == held & set(some)


def test_a_larger_share_holds_back_the_same_examples_and_more():
    examples = make_examples(60)
    assert set(split(examples, 0.2)[1]) < set(split(examples, 0.5)[1])


@pytest.mark.parametrize(("share", "what"), [(1e-9, "held back"), (1 - 1e-9, "left to learn from")])
def test_a_split_with_an_empty_side_is_refused(share, what):
    with pytest.raises(UsageError, match=f"held_back: of 10 examples, a share of {share} leaves none {what}"):
        split(make_examples(10), share)


@pytest.mark.parametrize("changes", [{}, {"tuning": "lora"}, {"tuning": "bitfit"}, {"tuning": "head"}, {"micro_batch": 2}])
def test_the_best_step_s_weights_are_those_the_model_ends_with(tiny_model, changes):
    model = tiny_model("llama")
    before = naive_agreement(model)
    trained = train(model, SINGLE, [kl_term()], tuning(steps=12, learning_rate=3e-2, **changes), title="t", held_back=held_back())
    steps, values = zip(*trained.looks, strict=True)
    assert steps == tuple(range(13))
    assert values[0] == pytest.approx(before, rel=1e-4)
    assert trained.best_step == steps[values.index(min(values))]
    assert naive_agreement(model) == pytest.approx(min(values), rel=2e-3, abs=1e-4)


def test_looking_does_not_change_the_training(tiny_model):
    losses = [
        train(tiny_model("llama"), SINGLE, [kl_term()], tuning(steps=6), title="t", held_back=held).losses
        for held in (None, held_back(every=2))
    ]
    assert losses[0] == losses[1]


def test_a_run_that_only_gets_worse_ends_early_with_the_model_as_it_was(tiny_model):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    turned = tuple(
        type(e)(e.example_id, e.ids, tuple(torch.tensor(naive_answer(model, e)).tolist())) for e in HELD
    )  # targets that the untouched model meets exactly
    trained = train(
        model, SINGLE, [kl_term()], tuning(steps=50, learning_rate=1e-2), title="t", held_back=held_back(2, patience=3, examples=turned)
    )
    assert trained.best_step == 0
    assert [step for step, _ in trained.looks] == [0, 2, 4, 6]
    assert len(trained.losses) == 6
    assert trained.examples == 6 * 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def naive_answer(model, example):
    with torch.no_grad():
        return model(torch.tensor([example.ids])).logits[0, -1, [5, 9]].softmax(-1).tolist()


def test_looks_come_before_the_first_step_at_intervals_and_after_the_last(tiny_model):
    trained = train(tiny_model("llama"), SINGLE, [kl_term()], tuning(steps=7), title="t", held_back=held_back(3))
    assert [step for step, _ in trained.looks] == [0, 3, 6, 7]


def test_patience_counts_looks_since_the_best_one():
    best, model = Best(), torch.nn.Linear(1, 1)
    over = []
    for step, value in enumerate([3.0, 2.0, 2.5, 2.0, 1.0, 1.5, 1.5]):
        best.add(model, step, value)
        over.append(best.is_over(2))
    assert over == [False, False, False, True, False, False, True]
    assert not best.is_over(None)
    assert best.looks[best.number] == (4, 1.0)


def test_a_checkpoint_s_tensors_hold_all_that_was_seen():
    best, model = Best(), torch.nn.Linear(2, 3)
    assert Best.of(best.tensors()) == Best()
    best.add(model, 0, 1.25)
    again = Best.of(best.tensors())
    assert again.looks == best.looks
    assert {name: tensor.tolist() for name, tensor in again.weights.items()} == {n: t.tolist() for n, t in best.weights.items()}


def test_an_agreement_that_is_not_finite_stops_the_training(tiny_model):
    model = tiny_model("llama")
    with torch.no_grad():
        next(model.model.layers[1].mlp.parameters()).fill_(float("nan"))
    with pytest.raises(ShotlessError, match="KL to the targets of what is held back is nan"):
        train(model, SINGLE, [kl_term()], tuning(), title="student cd", held_back=held_back())


@pytest.mark.parametrize("completions", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_several_passes_a_step_give_the_numbers_of_one(tiny_model, size, completions):
    whole, parted = tiny_model("llama"), tiny_model("llama")
    terms = [kl_term(), gold_term()]
    one = train(whole, completions, terms, tuning(steps=6), title="t")
    other = train(parted, completions, terms, tuning(steps=6, micro_batch=size), title="t")
    assert other.losses == pytest.approx(one.losses, rel=1e-4, abs=1e-5)
    assert (other.tokens, other.examples) == (one.tokens, one.examples)
    row = torch.tensor([HELD[0].ids])
    with torch.no_grad():
        assert torch.allclose(parted(row).logits, whole(row).logits, atol=1e-2)


def test_the_gradient_of_the_pieces_is_the_gradient_of_the_step():
    terms = [kl_term(batch_size=4), gold_term(batch_size=3, weight=0.7)]
    batches = [Order(term, 0).batch(0) for term in terms]
    logits = torch.randn(7, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(size):
        leaf, place, total = logits.clone().requires_grad_(), 0, 0.0
        for piece in pieces(batches, size):
            count = sum(map(len, piece))
            loss = objective(terms, piece, leaf[place : place + count].log_softmax(-1), [4, 3])
            loss.backward()
            place, total = place + count, total + float(loss.detach())
        return leaf.grad, total

    whole, value = gradient(None)
    assert value == pytest.approx(float(objective(terms, batches, logits.log_softmax(-1))))
    for size in (1, 2, 3, 5, 7, 100):
        parted, total = gradient(size)
        assert torch.allclose(parted, whole, atol=1e-12)
        assert total == pytest.approx(value)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 9))
def test_pieces_keep_every_example_in_its_term(sizes, size):
    batches = [list(make_examples(count, seed)) for seed, count in enumerate(sizes)]
    cut = pieces(batches, size) if any(sizes) else []
    assert all(len(piece) == len(batches) and 1 <= sum(map(len, piece)) <= size for piece in cut)
    assert [[e for piece in cut for e in piece[n]] for n in range(len(batches))] == (batches if cut else [[] for _ in batches])


@pytest.mark.parametrize("loss", ["reverse_kl", "jensen_shannon", "cross_entropy"])
def test_every_loss_brings_a_student_near_its_targets(tiny_model, loss):
    term = Term(loss, 1.0, 5, make_examples(10))
    trained = train(tiny_model("llama"), SINGLE, [term], tuning(steps=80, learning_rate=3e-3), title="t")
    assert sum(trained.losses[-5:]) < 0.4 * sum(trained.losses[:5])


def test_hard_labels_are_the_targets_argmax(tiny_model):
    examples = make_examples(10)
    hard = tuple(type(e)(e.example_id, e.ids, tuple(float(p == max(e.target)) for p in e.target)) for e in examples)
    losses = [
        train(tiny_model("llama"), SINGLE, [Term("cross_entropy", 1.0, 4, chosen)], tuning(), title="t").losses
        for chosen in (examples, hard)
    ]
    assert losses[0] == losses[1]
    assert objective_module.DIVERGENCES["kl"] is kl_nats
