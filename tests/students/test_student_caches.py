"""Students that learn from score caches: against full distributions of a live teacher, token by token, and against its hidden states."""

import json

import pytest
import torch

from pipeline.errors import MismatchError, UsageError
from pipeline.files import sha256_json
from pipeline.models.folders import load_model, load_tokenizer, tokenizer_sha256
from pipeline.params import CacheParams
from pipeline.schema import TARGETS, read_examples, read_table, write_table
from pipeline.students.auxiliary import CacheLoss, CacheTerm, Matching, TeacherCache
from pipeline.students.data import split
from pipeline.students.loop import StudentForward
from pipeline.task import Task, TaskTokens

TEMPERED = {"temperatures": (2.0,), "resolution_nats": None}
CACHES = {
    "vocabulary": {"few": {"weight": 0.5, "batch_size": 2}},
    "every token": {"reader": {"weight": 0.3}},
    "hidden states": {"few": {"weight": 0.0, "hidden_weight": 1.0, "layers": [[1, 0], [-1, -1]]}},
    "all": {"few": {"hidden_weight": 0.5, "loss": "reverse_kl"}, "reader": {"weight": 0.3, "loss": "jensen_shannon"}},
}


def cache_of(project, name="few", temperature=1.0, tokenizer=None, task=None):
    base = project.artifacts / "models" / "tiny"
    tokens = TaskTokens(Task(task or project.task), load_tokenizer(base))
    return TeacherCache(
        project.artifacts / "teachers" / name, project.folders.work, tokens, tokenizer or tokenizer_sha256(base), temperature
    )


def transfer(project):
    return read_examples(project.artifacts / "data" / "transfer.parquet", ["text"])


def term_of(project, divergence="kl", temperature=1.0, name="few", **changes):
    cache = cache_of(project, name, temperature)
    return CacheTerm(divergence, 1.0, 4, cache.rows(transfer(project)), cache, **changes)


def loss_of(term, model, rows, seed=0):
    """The loss as training takes it; and whether the pass was packed, whether the head's loss was fused."""
    forward = StudentForward(model, [], [], [term])
    loss = CacheLoss(model, forward.packed, term, seed)
    value = loss(rows, sum(row.positions for row in rows))
    forward.detach()
    return value, forward.packed is not None, loss.is_fused


def naive(divergence, p, q):
    """From the definition: log-probabilities [P, V] each → [P]."""
    if divergence == "kl":
        return (p.exp() * (p - q)).sum(-1)
    if divergence == "reverse_kl":
        return (q.exp() * (q - p)).sum(-1)
    mean = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
    return (naive("kl", p, mean) + naive("kl", q, mean)) / 2


def naive_loss(project, model, rows, divergence="kl", coarse=None, temperature=1.0, shift=0):
    """Mean over all positions of the divergence between full distributions; each token by a forward pass of its own, from the text on."""
    teacher, tokenizer = load_model(project.artifacts / "models" / "large"), load_tokenizer(project.artifacts / "models" / "large")
    task, values = Task(project.task), []
    contexts, examples = {c.context_id: c for c in project.contexts}, {e.example_id: e for e in project.examples}
    for row in rows:
        context, example = row.example_id.split(":")
        query = task.query(examples[example].fields)
        seen = tokenizer(task.context_text(contexts[context]) + query).input_ids
        for place in range(max(1, len(row.answer))):
            written = list(row.answer[:place])
            with torch.no_grad():
                ids = [*seen, *written]
                p = teacher(torch.tensor([ids[: len(ids) - shift]])).logits[0, -1].double()
            q = model(torch.tensor([[*tokenizer(query).input_ids, *written]])).logits[0, -1].double()
            p, q = (p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1)
            if coarse:
                order = p.argsort(descending=True)
                p, q = (torch.cat([x[order][:coarse], x[order][coarse:].logsumexp(-1, keepdim=True)]) for x in (p, q))
            values.append(naive(divergence, p, q))
    return torch.stack(values).mean()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.slow
def test_the_loss_of_a_step_is_that_of_full_distributions_at_every_answer_position(make_project, divergence):
    project = make_project(free=True, caches=["few"])
    term, model = term_of(project, divergence), load_model(project.artifacts / "models" / "tiny")
    rows = term.rows[::4]
    assert len(term.rows) == len(project.examples) * 2  # without the input that has no content
    assert {row.positions for row in rows} != {1}
    expected = naive_loss(project, model, rows, divergence)
    found, packed, fused = loss_of(term, model, rows)
    assert (packed, fused) == (True, True)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=2e-5)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss_of(term, model, rows)[0].backward()
    for one, other in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        assert torch.allclose(one, other, atol=2e-4, rtol=2e-3)
    with torch.no_grad():  # a pairing that is off by one would be seen: 20 times what is allowed above
        assert abs(float(found) - float(naive_loss(project, model, rows, divergence, shift=1))) > 4e-4


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "opt", "gemma2"])
def test_other_architectures_give_the_same(make_project, model_folder, architecture):
    """gemma2 caps its logits behind the head, so that its head is not all there is."""
    settings = {"bloom": {"n_head": 4, "n_layer": 4}, "gemma2": {"num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 3.0}}
    project = make_project(base=model_folder(architecture, **settings.get(architecture, {})), free=True, caches=["few"])
    term, model = term_of(project), load_model(project.artifacts / "models" / "tiny")
    rows = term.rows[::4]
    with torch.no_grad():
        found, _, fused = loss_of(term, model, rows)
        assert float(found) == pytest.approx(float(naive_loss(project, model, rows)), abs=5e-5)
    assert fused == (architecture != "gemma2")


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.slow
def test_the_tail_as_one_bucket_is_the_coarsened_divergence(make_project, temperature):
    project = make_project(free=True)
    project.write_cache(params=CacheParams(encoding="top_k_tail", top_k=300, **TEMPERED))
    term, model = term_of(project, temperature=temperature), load_model(project.artifacts / "models" / "tiny")
    rows = term.rows[::4]
    with torch.no_grad():
        expected = naive_loss(project, model, rows, coarse=300, temperature=temperature)
        assert float(loss_of(term, model, rows)[0]) == pytest.approx(float(expected), abs=5e-5)


@pytest.mark.slow
def test_exact_head_and_drawn_tail_come_near_the_whole(make_project):
    project = make_project(free=True)
    project.write_cache(params=CacheParams(encoding="hybrid", top_k=30, samples=500, resolution_nats=None))
    term, model = term_of(project), load_model(project.artifacts / "models" / "tiny")
    with torch.no_grad():
        assert float(loss_of(term, model, term.rows[:])[0]) == pytest.approx(float(naive_loss(project, model, term.rows)), rel=0.05)


@pytest.mark.slow
def test_labels_have_the_one_position_behind_the_bare_prompt(make_project):
    project = make_project(caches=["few"])
    term, model, tokenizer = (
        term_of(project),
        load_model(project.artifacts / "models" / "tiny"),
        load_tokenizer(project.artifacts / "models" / "tiny"),
    )
    assert {(row.positions, row.answer) for row in term.rows} == {(1, ())}
    texts = {tokenizer.decode(row.ids) for row in term.rows}
    assert texts == {f"Review: {example.fields['text']}\nSentiment:" for example in project.examples}
    with torch.no_grad():
        found = float(loss_of(term, model, term.rows[:])[0])
        assert found == pytest.approx(float(naive_loss(project, model, term.rows)), abs=2e-5)


def test_inputs_read_token_by_token_are_prompted_with_their_first_token(make_project):
    project = make_project(caches=["reader"])
    term, tokenizer = term_of(project, name="reader"), load_tokenizer(project.artifacts / "models" / "tiny")
    for row, example in zip(term.rows, project.examples, strict=True):
        assert [*row.ids, *row.answer] == tokenizer(f"Review: {example.fields['text']}\nSentiment:").input_ids
        assert len(row.ids) == 1
        assert row.tokens == len(row.answer)  # the last token is not read


STATES = torch.randn(50, 2, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 100, 32) + 3.0


def test_the_distance_is_the_mean_square_in_standard_deviations_of_the_teacher():
    matching = Matching(STATES, 32, 0)
    student, teacher = torch.randn(7, 2, 32), STATES[:7]
    expected = (((student - teacher) / STATES.std(0, correction=0)) ** 2).mean((1, 2))
    torch.testing.assert_close(matching(student.flatten(1), teacher), expected, rtol=1e-4, atol=0)
    assert matching(STATES.flatten(1), STATES).abs().max() == 0
    mean = STATES.mean(0, keepdim=True).expand(len(STATES), 2, 32)
    assert float(matching(mean.flatten(1), STATES).mean()) == pytest.approx(1.0, abs=1e-4)
    constant = STATES.clone()
    constant[..., 5] = 2.0  # a dimension that never varies
    assert torch.isfinite(Matching(constant, 32, 0)(torch.zeros(3, 64), constant[:3])).all()


def test_projections_are_learnt_if_widths_differ_and_depend_on_the_seed_alone():
    assert not list(Matching(STATES, 32, 1).parameters())
    first, again, other = (Matching(STATES, 48, seed) for seed in (1, 1, 2))
    assert torch.equal(first.projections[0].weight, again.projections[0].weight)
    assert not torch.equal(first.projections[0].weight, other.projections[0].weight)
    distances = first(torch.randn(5, 96), STATES[:5])
    assert distances.shape == (5,)
    distances.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in first.parameters())
    assert Matching(STATES, 48, 1).to("meta")(torch.zeros(5, 96, device="meta"), STATES[:5].to("meta")).device.type == "meta"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_loss_to_hidden_states_is_that_of_plain_forwards(make_project, model_folder, architecture):
    project = make_project(base=model_folder(architecture), caches=["few"])
    term = term_of(project, hidden_weight=0.7, layers=((1, 0), (-1, 2)))
    term = CacheTerm(term.divergence, 0.0, 4, term.rows, term.cache, 0.7, term.layers)
    model, rows = load_model(project.artifacts / "models" / "tiny"), term.rows[:6]
    cached = term.cache.hidden_states(term.rows[:], (1, -1))  # [P, 2, H]: layers 1 and -1
    deviation, total = cached.std(0, correction=0), 0.0
    for row, theirs in zip(rows, cached, strict=False):
        with torch.no_grad():
            states = model(torch.tensor([row.ids]), output_hidden_states=True).hidden_states
        own = torch.stack([states[1][0, -1], states[3][0, -1]])  # outputs of layers 0 and 2
        total += 0.7 * float((((own - theirs) / deviation) ** 2).mean()) / len(rows)
    found, packed, _ = loss_of(term, model, rows)
    assert packed
    assert float(found.detach()) == pytest.approx(total, rel=1e-4)


def test_a_layer_that_the_student_lacks_is_refused(make_project):
    project = make_project(caches=["few"])
    with pytest.raises(UsageError, match=r"students\.\*\.auxiliary\.few\.layers: the student has no layer 9; it has 4, 0 to 3"):
        project.train(auxiliary={"few": {"hidden_weight": 1.0, "layers": [[-1, 9]]}})


@pytest.mark.parametrize("changes", [{}, {"tuning": "lora", "learning_rate": 2e-2}, {"tuning": "head"}, {"micro_batch": 3}])
@pytest.mark.slow
def test_free_answers_are_learnt(make_project, changes):
    project = make_project(free=True, caches=["few"])
    project.train(**({"steps": 30, "learning_rate": 3e-3} | changes))
    losses = project.losses()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    manifest = project.manifest()
    assert manifest["sources_sha256"] == {"cache": sha256_json(json.loads((project.artifacts / "teachers/few/manifest.json").read_text()))}
    assert manifest["completions"] == {}


OTHERS = [{"tuning": "lora", "learning_rate": 2e-2}, {"tuning": "bitfit", "learning_rate": 2e-2}, {"freeze_layers": 1}]


@pytest.mark.parametrize(("auxiliary", "tuning"), [*((name, {}) for name in CACHES), *(("all", tuning) for tuning in OTHERS)])
@pytest.mark.slow
def test_caches_beside_targets_are_learnt_and_leave_a_plain_student(make_project, auxiliary, tuning):
    project = make_project(caches=["few", "reader"])
    caches = CACHES[auxiliary]
    if "freeze_layers" in tuning and "few" in caches:
        caches = caches | {"few": caches["few"] | {"layers": [[-1, -1]]}}
    project.train(**({"steps": 24, "learning_rate": 3e-3, "layers": "0, 2-3", "ce_weight": 0.2, "auxiliary": caches} | tuning))
    losses = project.losses()
    assert sum(losses[-5:]) < sum(losses[:5])
    names = set(load_model(project.output()).state_dict())
    assert not any("matching" in name or "lora" in name for name in names)
    assert {f"auxiliary.{name}" for name in CACHES[auxiliary]} <= set(project.manifest()["sources_sha256"])


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen3", "gpt_neox"])
@pytest.mark.slow
def test_caches_teach_other_families_and_widths_with_the_same_tokenizer(make_project, model_folder, architecture):
    width = {"n_embd": 16} if architecture == "gpt2" else {}
    project = make_project(base=model_folder(architecture, **width), caches=["few", "reader"])
    project.train(steps=20, learning_rate=3e-3, auxiliary={"few": {"weight": 0.2, "hidden_weight": 0.5}, "reader": {"weight": 0.3}})
    assert sum(project.losses()[-5:]) < sum(project.losses()[:5])


@pytest.mark.slow
def test_micro_batches_of_all_summands_add_up_to_the_step(make_project):
    losses = []
    for micro_batch in (None, 1):
        project = make_project(f"micro-{micro_batch}", caches=["few", "reader"])
        project.train(steps=3, micro_batch=micro_batch, ce_weight=0.5, auxiliary=CACHES["all"])
        losses.append(project.losses())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_plain_and_packed_passes_train_the_same_student(make_project, model_folder):
    """A window shorter than the rows is refused by the packed pass; rows that are shorter than it are not."""
    losses, forwards = [], []
    for window in (None, 600, 6):
        project = make_project(f"window-{window}", base=model_folder("mistral", sliding_window=window), caches=["few", "reader"])
        project.train(steps=3, ce_weight=0.5, auxiliary=CACHES["all"])
        losses.append(project.losses())
        forwards.append(project.manifest()["forward"].partition(":")[0])
    assert forwards == ["packed", "packed", "plain"]
    assert losses[0] == losses[1]
    assert losses[2] != losses[0]  # a window is another model; that its numbers are right is tested above


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.slow
def test_what_is_validated_on_or_not_among_the_targets_is_learnt_from_no_cache(make_project, monkeypatch, free):
    project, seen = make_project(free=free, caches=["few"] if free else ["few", "reader"]), set()
    original = CacheLoss.__call__
    monkeypatch.setattr(CacheLoss, "__call__", lambda self, rows, positions: seen.update(rows) or original(self, rows, positions))
    ids = {example.example_id for example in project.examples}
    if not free:
        file = project.artifacts / "targets" / "mix" / "targets.parquet"
        write_table(read_table(file, TARGETS).slice(0, 8), file)
        ids = {example.example_id for example in project.examples[:8]}
    project.train(steps=20, validation_fraction=0.4, auxiliary={} if free else {"few": {"hidden_weight": 0.5}, "reader": {}})
    rows = term_of(project).rows
    held = {row.example for row in split(rows, "validation_fraction", 0.4)[0]}
    assert held & ids
    assert {row.example for row in seen} == ids - held
    held_rows = len(held & ids) * (2 if free else 1)  # of a cache each context's
    assert project.json("metrics/train/cd.json")["validation_examples"] == held_rows


@pytest.mark.slow
def test_a_cache_s_validation_is_the_mean_kl_over_its_positions(make_project):
    project = make_project(free=True, caches=["few"])
    project.train(steps=1, loss="reverse_kl", validation_fraction=0.4)
    rows = term_of(project).rows
    held, _ = split(rows, "validation_fraction", 0.4)
    with torch.no_grad():
        expected = float(naive_loss(project, load_model(project.artifacts / "models" / "tiny"), held))
    assert project.json("metrics/train/cd.json")["validation_kl_nats_before"] == pytest.approx(expected, rel=1e-4)


def test_rows_of_a_cache_are_ordered_by_context_and_example(make_project):
    project = make_project(free=True, caches=["few"])
    rows = term_of(project).rows
    assert [row.example_id for row in rows] == [f"{c.context_id}:{e.example_id}" for c in project.contexts for e in project.examples]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "{text} ="}, r"task\.template: 'Review: .*this run has '\{text\} ='"),
        ({"completion": {"max_tokens": 9}}, r"task\.completion\.max_tokens: 6, this run has 9"),
        ({"completion": None, "verbalisers": {"a": " bad", "b": " good"}}, "verbalisers"),
    ],
)
def test_a_cache_of_another_task_or_tokenizer_is_refused_with_what_differs(make_project, changes, message):
    project = make_project(free=True, caches=["few"])
    task = type(project.task).model_validate(project.task.model_dump() | changes)
    with pytest.raises(MismatchError, match=message):
        cache_of(project, task=task)
    with pytest.raises(MismatchError, match=r"tokenizer_sha256: '[0-9a-f]+', this run has 'other'\s.*learns from a target set"):
        cache_of(project, tokenizer="other")


def test_an_example_that_left_the_transfer_set_is_named(make_project):
    project = make_project(free=True, caches=["few"])
    with pytest.raises(MismatchError, match=f"example {project.examples[0].example_id} is not in the transfer set.*dvc repro teacher@few"):
        cache_of(project).rows(project.examples[1:])


def test_a_cache_that_is_not_the_target_set_s_is_refused(make_project):
    project = make_project(caches=["few", "reader"])
    project.write_cache("reader", CacheParams(encoding="top_k_tail", top_k=5))
    with pytest.raises(MismatchError, match=r"students\.cd\.auxiliary\.reader: targets/mix was made beside a cache.*dvc repro targets@mix"):
        project.train(auxiliary={"reader": {}})


@pytest.mark.slow
def test_too_little_mass_at_the_temperature_is_refused(make_project):
    project = make_project(free=True)
    project.write_cache(params=CacheParams(encoding="top_k_tail", top_k=1, **TEMPERED))
    with pytest.raises(UsageError, match="at temperature 2 the cache retains"):
        term_of(project, temperature=2.0)
