"""Students that learn a teacher's distributions from its score cache, against full distributions of live models, token by token."""

import pytest
import torch
from cached_world import CONTEXTS_OF_TWO, FREE, LABELS, TEMPLATE, TEXTS, World

from pipeline.cache.folder import read_cache
from pipeline.errors import MismatchError, UsageError
from pipeline.files import read_json
from pipeline.files import context_id, example_id
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.params import CacheParams, CompletionParams
from pipeline.students import loop
from pipeline.students.answers import AnswerForward
from pipeline.students.checkpoint import Checkpoint
from pipeline.task import Task


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


@pytest.fixture
def make(tmp_path, model_folder):
    def build(name="one", architecture="llama", student=None, **settings):
        return World(tmp_path / name, model_folder("llama", seed=1), student or model_folder(architecture), **settings)

    return build


@torch.no_grad()
def teacher_log_probabilities(world, shift=0):
    """For each lesson (context, text), the teacher's log-probabilities [positions, V] at its answer's tokens, a full prompt a token."""
    tokenizer, model = load_tokenizer(world.teacher), load_model(world.teacher)
    found = {}
    answers = {(row["context_id"], row["example_id"]): row["completion_ids"] for row in read_cache(world.scores).rows.to_pylist()}
    for context in CONTEXTS_OF_TWO:
        for text in TEXTS:
            prompt = tokenizer(context).input_ids + tokenizer(TEMPLATE.format(text=text)).input_ids
            answer = answers[context_id(context), example_id({"text": text})]
            rows = []
            for place in range(max(1, len(answer))):
                ids = prompt + answer[:place]
                rows.append(model(torch.tensor([ids[: len(ids) - shift]])).logits[0, -1].double().log_softmax(-1))
            found[f"{context_id(context)}:{example_id({'text': text})}"] = (text, answer, torch.stack(rows))
    return found


def student_log_probabilities(model, tokenizer, text, answer):
    prompt = tokenizer(TEMPLATE.format(text=text)).input_ids
    rows = [model(torch.tensor([prompt + answer[:place]])).logits[0, -1].double() for place in range(max(1, len(answer)))]
    return torch.stack(rows)


def naive(divergence, p, q):
    if divergence == "kl":
        return (p.exp() * (p - q)).sum(-1)
    if divergence == "reverse_kl":
        return (q.exp() * (q - p)).sum(-1)
    mean = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return (naive("kl", p, mean) + naive("kl", q, mean)) / 2


def naive_loss(world, model, batch, divergence="kl", coarse=None, temperature=1.0, shift=0):
    """Mean over all positions of a batch's rows of the divergence between full distributions; `coarse` keeps the top k and a bucket."""
    live, tokenizer, values = teacher_log_probabilities(world, shift), load_tokenizer(world.base), []
    for row in batch:
        text, answer, p = live[row.example_id]
        q = (student_log_probabilities(model, tokenizer, text, answer) / temperature).log_softmax(-1)
        p = (p / temperature).log_softmax(-1)
        if coarse:
            order = p.argsort(-1, descending=True)
            p, q = p.gather(-1, order), q.gather(-1, order)
            p, q = (torch.cat([x[:, :coarse], x[:, coarse:].logsumexp(-1, keepdim=True)], -1) for x in (p, q))
        values.append(naive(divergence, p, q))
    return torch.cat(values).mean()


def loss_of(term, model, batch):
    forward = AnswerForward(model, term)
    try:
        return forward.loss(batch, sum(row.positions for row in batch))
    finally:
        forward.detach()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jensen_shannon"])
def test_the_loss_of_a_step_is_that_of_full_distributions_at_every_answer_position(make, divergence):
    world = make()
    term, model = world.term(divergence), load_model(world.base)
    batch = term.examples[::3]
    assert {len(row.answer) for row in batch} != {1}
    assert len({row.example_id for row in term.examples}) == len(TEXTS) * 2
    expected = naive_loss(world, model, batch, divergence)
    found = loss_of(term, model, batch)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=2e-5)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss_of(term, model, batch).backward()
    for one, other in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert torch.allclose(one, other, atol=2e-4, rtol=2e-3)


def test_a_pairing_that_is_off_by_one_would_be_seen(make):
    world = make()
    term, model = world.term(), load_model(world.base)
    with torch.no_grad():
        found, shifted = float(loss_of(term, model, term.examples)), float(naive_loss(world, model, term.examples, shift=1))
    assert abs(found - shifted) > 1e-3  # 50 times what the test above allows


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "opt"])
def test_other_architectures_give_the_same(make, model_folder, architecture):
    settings = {"n_head": 4, "n_layer": 4} if architecture == "bloom" else {}
    world = make(student=model_folder(architecture, **settings))
    term, model = world.term(), load_model(world.base)
    with torch.no_grad():
        assert float(loss_of(term, model, term.examples)) == pytest.approx(float(naive_loss(world, model, term.examples)), abs=5e-5)


def test_the_tail_as_one_bucket_is_the_coarsened_divergence(make):
    world = make(cache=CacheParams(encoding="top_k_tail", top_k=300, temperatures=(2.0,), resolution_nats=None))
    model = load_model(world.base)
    with torch.no_grad():
        for temperature in (1.0, 2.0):
            term = world.term(temperature=temperature)
            expected = naive_loss(world, model, term.examples, coarse=300, temperature=temperature)
            assert float(loss_of(term, model, term.examples)) == pytest.approx(float(expected), abs=5e-5)


def test_exact_head_and_drawn_tail_come_near_the_whole(make):
    world = make(cache=CacheParams(encoding="hybrid", top_k=30, samples=3000, resolution_nats=None))
    term, model = world.term(), load_model(world.base)
    with torch.no_grad():
        assert float(loss_of(term, model, term.examples)) == pytest.approx(float(naive_loss(world, model, term.examples)), rel=0.02)


def test_labels_have_the_one_position_behind_the_prompt(make):
    world = make(task=LABELS)
    term, model = world.term(), load_model(world.base)
    assert {row.positions for row in term.examples} == {1}
    assert {row.answer for row in term.examples} == {()}
    with torch.no_grad():
        assert float(loss_of(term, model, term.examples)) == pytest.approx(float(naive_loss(world, model, term.examples)), abs=2e-5)


def test_the_student_s_prompt_is_the_bare_query_and_the_answer_s_last_token_is_not_read(make):
    world = make()
    tokenizer = load_tokenizer(world.base)
    for row in world.term().examples:
        text = tokenizer.decode(row.ids)
        assert text.startswith("Review: ")
        assert text.count("Review:") == 1
        assert row.packed.length == len(row.ids) + len(row.answer) - 1


@pytest.mark.parametrize("changes", [{}, {"tuning": "lora", "learning_rate": 2e-2}, {"tuning": "head"}, {"micro_batch": 3}, {"ce": True}])
def test_training_brings_the_loss_down(make, changes):
    beside = changes == {"ce": True}
    world = make(task=LABELS if beside else FREE)
    world.train(steps=30, **({"ce_weight": 0.3} if beside else changes))
    curve = (world.root / "metrics/curves/cd.csv").read_text(encoding="utf-8").splitlines()[1:]
    losses = [float(line.split(",")[1]) for line in curve]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    found = read_json(world.places.artifacts / "students/cd/provenance.json")
    assert set(found["sources_sha256"]) == ({"scores", "demonstrations"} if beside else {"scores"})


def test_pieces_of_a_step_add_up_to_it(make):
    world = make()
    world.train("whole", steps=1)
    world.train("pieces", steps=1, micro_batch=3)
    one, two = (read_json(world.root / f"metrics/train/{name}.json")["final_loss"] for name in ("whole", "pieces"))
    assert one == pytest.approx(two, rel=1e-5)


def test_what_is_held_back_chooses_the_step_and_keeps_an_example_s_contexts_together(make):
    world = make()
    world.train(held_back=0.4, evaluate_every=4, steps=12)
    found = read_json(world.places.artifacts / "students/cd/provenance.json")
    source, tokens = world.source()
    rows = source.lessons(world.places.artifacts / "data" / "transfer.parquet", tokens)
    learnt, held = training_split(rows, 0.4)
    assert held
    assert not {row.example_id.rpartition(":")[2] for row in learnt} & {row.example_id.rpartition(":")[2] for row in held}
    assert found["held_back_examples"] == len(held)


def training_split(rows, share):
    from pipeline.students.early_stopping import split

    return split(rows, share)


@pytest.mark.parametrize("changes", [{}, {"held_back": 0.4, "evaluate_every": 2}])
def test_a_killed_training_ends_with_the_bytes_of_an_unbroken_one(make, monkeypatch, changes):
    whole, broken = make("whole"), make("broken")
    whole.train(steps=8, **changes)
    original, taken = loop.Training._step, []

    def step(self, *others):
        taken.append(others[-1])
        if len(taken) == 5:
            raise Killed
        return original(self, *others)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", step)
        patch.setattr(Checkpoint, "due", lambda _: True)
        with pytest.raises(Killed):
            broken.train(steps=8, **changes)
    broken.train(steps=8, **changes)
    assert read_json(broken.root / "metrics/runtime/student-cd.json")["resumed_at_step"] == 4
    assert broken.weights() == whole.weights()


def test_a_cache_of_another_tokenizer_or_task_is_refused_with_what_differs(make):
    world = make()
    with pytest.raises(MismatchError, match=r"tokenizer: the cache has .* this student 'other'"):
        world.source(tokenizer="other")
    changed = FREE.params.model_copy(update={"template": "{text} ="})
    with pytest.raises(MismatchError, match=r"template: the cache has 'Review: .*this student '\{text\} ='"):
        world.source(task=Task(changed))
    longer = FREE.params.model_copy(update={"completion": CompletionParams(max_tokens=9)})
    with pytest.raises(MismatchError, match=r"completion: .*'max_tokens': 6.*'max_tokens': 9"):
        world.source(task=Task(longer))
    with pytest.raises(MismatchError, match="verbalisers"):
        world.source(task=LABELS)


def test_an_example_that_left_the_transfer_set_is_named(make):
    world = make()
    world.write("transfer", [(text, None) for text in TEXTS[1:]])
    source, tokens = world.source()
    with pytest.raises(MismatchError, match=f"example {example_id({'text': TEXTS[0]})} is not in .*dvc repro teacher@few"):
        source.lessons(world.places.artifacts / "data" / "transfer.parquet", tokens)


def test_settings_that_do_not_suit_a_cache_are_refused(make):
    world = make()
    with pytest.raises(UsageError, match="`loss: hard` is over the labels"):
        world.train(loss="hard")
    with pytest.raises(UsageError, match="temperature 3: this cache holds what is needed for 1"):
        world.train(temperature=3.0)
    with pytest.raises(UsageError, match="ce_weight"):
        world.train(ce_weight=0.5)
    with pytest.raises(UsageError, match="free text"):
        world.train(learn_from="data/demonstrations.parquet")
