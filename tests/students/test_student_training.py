"""The training loop against a naive one: batches, schedule, tunings, the small vocabulary, validation, steps of several passes."""

import copy
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import PeftModel
from torch.nn.utils import parametrize

from pipeline.errors import ShotlessError, UsageError
from pipeline.files import sha256_json
from pipeline.models.folders import cut_layers, load_model
from pipeline.params import TuningParams
from pipeline.students.checkpoint import Checkpoint, Reached
from pipeline.students.data import Batches, LabelTerm, TargetRow, balanced, micro_batches, split
from pipeline.students.loop import SmallVocabulary, StudentForward, Validation, train
from pipeline.students.losses import label_divergence, objective
from pipeline.students.tuning import adamw, apply_tuning, learning_rate, trained_weights

SINGLE, MULTI, SHARED = [[5], [9]], [[5], [9, 3, 7]], [[9, 3, 5], [9, 3, 7]]
ARCHITECTURES = ["gemma", "gpt2", "gpt_neox", "llama", "mistral", "opt", "phi", "qwen2", "qwen3"]
TUNINGS = {
    "full": {},
    "frozen": {"freeze_embeddings": True},
    "upper": {"freeze_layers": 2},
    "lora": {"tuning": "lora", "lora": {"rank": 3, "alpha": 5}},
    "lora_all": {"tuning": "lora", "lora": {"rank": 2, "alpha": 2, "modules": "all_linear"}},
    "bitfit": {"tuning": "bitfit"},
    "head": {"tuning": "head"},
}


def make_rows(count, seed=0, gold=False):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(3, 12, (1,), generator=generator))
        ids = tuple(torch.randint(1, 300, (length,), generator=generator).tolist())
        share = float(number % 2) if gold else float(torch.rand(1, generator=generator))
        made.append(TargetRow(f"{seed:032x}{number:032x}", ids, (1 - share, share)))
    return made


def kl_term(count=10, batch_size=4, weight=1.0):
    return LabelTerm("kl", weight, batch_size, make_rows(count))


def gold_term(count=4, batch_size=2, weight=0.5):
    return LabelTerm("cross_entropy", weight, batch_size, make_rows(count, seed=9, gold=True))


def tuning(**changes):
    return TuningParams(**({"steps": 5, "batch_size": 4, "learning_rate": 1e-3} | changes))


def naive_log_probabilities(model, completions, ids):
    """[B, L], each row and completion on its own, by the model's own logits over the whole vocabulary, with a gradient."""
    found = []
    for row in ids:
        scores = []
        for completion in completions:
            logits = model(torch.tensor([[*row, *completion]])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(row) - 1 + n, token] for n, token in enumerate(completion)))
        found.append(torch.stack(scores).log_softmax(-1))
    return torch.stack(found)


def naive_training(model, completions, terms, params, learnt):
    """The same training from the definition: one row at a time, torch's default AdamW, clipping by hand."""
    model.requires_grad_(False)
    for parameter in learnt:
        parameter.requires_grad_(True)
    tables = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [model.get_output_embeddings().weight]
    decayed = [p for p in model.parameters() if p.dim() >= 2 and all(p is not table for table in tables)]
    rest = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": params.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=params.learning_rate, fused=False, foreach=False)
    losses = []
    for step in range(params.steps):
        total = torch.zeros(())
        for term in terms:
            batch = Batches(term.rows, term.batch_size, params.seed).at(step)
            log_p = naive_log_probabilities(model, completions, [row.ids for row in batch])
            for row, own in zip(batch, log_p, strict=True):
                loss = sum(p * (torch.tensor(p).log() - own[n]) for n, p in enumerate(row.target) if p > 0)
                total = total + term.weight * loss / len(batch)
        optimizer.zero_grad()
        total.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters() if p.grad is not None))
        for p in model.parameters():
            if p.grad is not None and norm > params.max_grad_norm:
                p.grad *= params.max_grad_norm / norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, params)
        optimizer.step()
        losses.append(float(total.detach()))
    return losses


class LowRank(torch.nn.Module):
    """W + scale · B·A, transposed for layers that keep their weights as [in, out]."""

    def __init__(self, a, b, scale, transposed):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(x.detach().clone()) for x in (a, b))
        self.scale, self.transposed = scale, transposed

    def forward(self, weight):
        update = self.scale * self.b @ self.a
        return weight + (update.T if self.transposed else update)


def learnt_by_hand(model, kind, params):
    """The weights that a tuning learns, marked by rules written down here; LoRA's random halves are those of the run."""
    named = dict(model.named_parameters())
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    if kind == "full":
        return list(named.values())
    if kind == "frozen":
        return [p for p in named.values() if id(p) not in tables]
    if kind == "upper":
        return [p for name, p in named.items() if id(p) not in tables and ".0." not in name and ".1." not in name]
    if kind == "bitfit":
        return [p for name, p in named.items() if name.endswith(".bias")] or [p for name, p in named.items() if "norm" in name]
    if kind == "head":
        model.lm_head = copy.deepcopy(model.get_output_embeddings())
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return list(model.lm_head.parameters())
    other, learnt = copy.deepcopy(model), []
    apply_tuning(other, params)
    for name, module in list(other.named_modules()):
        if hasattr(module, "lora_A"):
            target = model.get_submodule(name)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            low_rank = LowRank(a, b, params.lora.alpha / params.lora.rank, type(target).__name__ == "Conv1D")
            parametrize.register_parametrization(target, "weight", low_rank)
            learnt += [low_rank.a, low_rank.b]
    return learnt


@pytest.mark.parametrize("kind", TUNINGS)
@pytest.mark.parametrize(
    ("architecture", "completions"), [("llama", SINGLE), ("llama", MULTI), ("opt", SINGLE), ("gpt2", MULTI)],
    ids=["llama-single", "llama-multi", "opt-single", "gpt2-multi"],
)  # fmt: skip
@pytest.mark.slow
def test_training_gives_the_naive_loop_s_losses_and_answers(tiny_model, architecture, kind, completions):
    params = tuning(steps=5, weight_decay=0.1, max_grad_norm=0.5, learning_rate=1e-2 if kind != "full" else 1e-3, **TUNINGS[kind])
    model, terms, ids = tiny_model(architecture), [kl_term(), gold_term()], [make_rows(1)[0].ids]
    naive, start = copy.deepcopy(model), copy.deepcopy(model)
    expected = naive_training(naive, completions, terms, params, learnt_by_hand(naive, kind, params))
    outcome = train(model, completions, terms, params, title="test")
    assert outcome.forward.startswith("packed")
    assert outcome.reached.losses == pytest.approx(expected, rel=5e-3, abs=5e-4)
    with torch.no_grad():
        before, after, wanted = (naive_log_probabilities(m, completions, ids) for m in (start, model, naive))
    assert torch.allclose(after, wanted, atol=5e-3)
    assert not torch.allclose(after, before, atol=5e-3)


@pytest.mark.parametrize("completions", [SINGLE, MULTI, SHARED], ids=["single", "multi", "shared"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mistral with a short window"])
def test_the_forward_has_the_plain_values_and_gradients(tiny_model, architecture, completions):
    """Packed, but for a window shorter than the rows; with the small vocabulary for single-token labels."""
    short = architecture not in ARCHITECTURES
    model = tiny_model("mistral", sliding_window=4) if short else tiny_model(architecture)
    rows = make_rows(5)
    target = torch.tensor([row.target for row in rows])

    def gradients(log_probabilities):
        model.zero_grad()
        label_divergence("kl", target, log_probabilities).mean().backward()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}

    expected_values = naive_log_probabilities(model, completions, [row.ids for row in rows])
    expected = gradients(expected_values)
    forward = StudentForward(model, completions, rows)
    assert forward.description.startswith("plain" if short else "packed"), forward.description
    values = forward.label_log_probabilities(rows)
    assert torch.allclose(values, expected_values, atol=1e-4)
    kept = sorted({token for ids in (*(row.ids for row in rows), *completions) for token in ids})
    for name, found in gradients(values).items():
        wanted = expected[name] if found.shape == expected[name].shape else expected[name][kept]
        assert torch.allclose(found, wanted, atol=1e-4 * max(1.0, float(wanted.abs().max()))), name
        assert (completions is SINGLE) >= (found.shape != expected[name].shape)
    forward.detach()
    again = naive_log_probabilities(model, completions, [row.ids for row in rows])
    assert torch.allclose(again, expected_values, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt", "phi"])
def test_restoring_the_vocabulary_puts_trained_rows_back_and_no_others(tiny_model, architecture):
    model = tiny_model(architecture)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    small = SmallVocabulary(model, [4, 17, 4])
    assert small.ids([17, 4]) == [1, 0]
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    small.restore()
    name = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    before[name][[4, 17]] += 1
    for other, parameter in model.named_parameters():
        assert torch.equal(parameter, before[other]), other


def test_tied_embeddings_stay_tied_and_rows_of_other_tokens_stay_as_they_were(tiny_model):
    model, term = tiny_model("llama"), kl_term()
    before = model.get_input_embeddings().weight.detach().clone()
    train(model, SINGLE, [term], tuning(weight_decay=0.1), title="test")
    after = model.get_input_embeddings().weight
    assert after is model.get_output_embeddings().weight
    seen = {token for row in term.rows for token in row.ids} | {5, 9}
    changed = set((after != before).any(1).nonzero().flatten().tolist())
    assert {5, 9} <= changed <= seen


@pytest.mark.parametrize("kind", TUNINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tuned_model_is_plain_again_and_frozen_weights_are_as_they_were(tiny_model, architecture, kind):
    model = tiny_model(architecture)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    outcome = train(model, SINGLE, [kl_term()], tuning(learning_rate=1e-2, steps=2, **TUNINGS[kind]), title="test")
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    embeddings = {
        n for n in before if n.endswith(("embed_tokens.weight", "embed_positions.weight", "wte.weight", "wpe.weight", "embed_in.weight"))
    }
    assert kind == "full" or not changed & embeddings
    if kind == "upper":
        assert not any(".0." in name or ".1." in name for name in changed)
    if kind == "bitfit":
        assert all(before[name].dim() == 1 for name in changed)
        assert outcome.tuning.trained_parameters <= sum(p.numel() for p in before.values() if p.dim() == 1)
    if kind == "head":
        assert all(name.startswith(("lm_head", "embed_out")) for name in changed)
        assert not model.config.tie_word_embeddings
    if kind.startswith("lora"):
        assert all(before[name].dim() == 2 for name in changed)
        assert not any(hasattr(module, "lora_A") for module in model.modules())


def test_what_is_learnt_is_counted_and_named(tiny_model):
    made = {kind: apply_tuning(tiny_model("llama"), tuning(**changes)) for kind, changes in TUNINGS.items()}
    vocabulary, width, layers, keys = tiny_model("llama").config.vocab_size, 32, 4, 16
    whole = sum(p.numel() for p in tiny_model("llama").parameters())
    assert made["full"].trained_parameters == whole
    assert made["lora"].trained_parameters == layers * 3 * ((width + width) + (width + keys))
    assert made["lora"].trains == "LoRA of rank 3, alpha 5 on q_proj, v_proj"
    assert made["bitfit"].trained_parameters == (2 * layers + 1) * width
    assert "no biases" in made["bitfit"].trains
    assert made["head"].trained_parameters == vocabulary * width
    assert made["frozen"].trained_parameters == whole - vocabulary * width
    assert "the head tied to them" in made["frozen"].trains
    qwen = tiny_model("qwen2")
    assert apply_tuning(qwen, tuning(tuning="bitfit")).trains == "biases"
    assert {name.split(".")[-2] for name in trained_weights(qwen)} == {"q_proj", "k_proj", "v_proj"}


def test_freezing_every_layer_is_refused(tiny_model):
    with pytest.raises(UsageError, match="freeze_layers: 4, and the student has 4"):
        apply_tuning(tiny_model("llama"), tuning(freeze_layers=4))


def test_lora_s_random_halves_follow_the_seed_and_leave_torch_s_generator_alone(tiny_model):
    found = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        torch.manual_seed(17 + len(found))
        state = torch.random.get_rng_state()
        apply_tuning(model, tuning(seed=seed, **TUNINGS["lora"]))
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(next(iter(trained_weights(model).values())).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_architecture_without_a_usual_choice_of_layers_says_what_to_write(tiny_model):
    model = tiny_model("olmo")
    with pytest.raises(UsageError, match=r"lora\.modules: peft has no usual choice for the model type 'olmo'.*all_linear"):
        apply_tuning(model, tuning(tuning="lora"))
    assert apply_tuning(model, tuning(**TUNINGS["lora_all"])).trained_parameters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_kept_adapter_on_the_cut_base_is_the_merged_model(model_folder, tmp_path, architecture):
    folder, ids = model_folder(architecture), torch.tensor([make_rows(1)[0].ids])
    model = cut_layers(load_model(folder), [0, 2, 3])
    params = tuning(learning_rate=1e-2, adapters="kept", **TUNINGS["lora"])
    train(model, SINGLE, [kl_term()], params, title="test", adapter=(tmp_path / "adapter", "models/tiny"))
    base = cut_layers(load_model(folder), [0, 2, 3])
    with torch.no_grad():
        bare = base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.allclose(adapted(ids).logits, model(ids).logits, atol=1e-4)
        assert not torch.allclose(bare, model(ids).logits, atol=1e-2)
    assert adapted.peft_config["default"].base_model_name_or_path == "models/tiny"


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jensen_shannon", "cross_entropy"])
@pytest.mark.slow
def test_every_loss_brings_a_student_near_its_targets(tiny_model, loss):
    term = LabelTerm(loss, 1.0, 5, make_rows(10))
    losses = train(tiny_model("llama"), SINGLE, [term], tuning(steps=80, learning_rate=3e-3), title="t").reached.losses
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


def test_hard_labels_are_the_targets_argmax(tiny_model):
    rows = make_rows(10)
    hard = [TargetRow(row.example_id, row.ids, tuple(float(p == max(row.target)) for p in row.target)) for row in rows]
    terms = [LabelTerm("cross_entropy", 1.0, 4, chosen) for chosen in (rows, hard)]
    one, two = (train(tiny_model("llama"), SINGLE, [term], tuning(), title="t").reached.losses for term in terms)
    assert one == two


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_balanced_classes_are_the_mean_over_labels_of_the_mean_loss_of_each(loss):
    rows = [TargetRow(str(n), (1,), (0.7, 0.3) if n < 6 else (0.2, 0.8)) for n in range(8)]
    log_p = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    term = LabelTerm(loss, 1.0, 8, balanced(rows))
    each = [float(objective([LabelTerm(loss, 1.0, 1, [row])], [[row]], own[None], [1])) for row, own in zip(rows, log_p, strict=True)]
    assert float(objective([term], [term.rows], log_p, [8])) == pytest.approx((sum(each[:6]) / 6 + sum(each[6:]) / 2) / 2)
    rare = balanced([TargetRow(str(n), (1,), (float(n > 0), float(n == 0))) for n in range(200)])
    assert [rare[0].weight, rare[1].weight] == [10.0, pytest.approx(200 / 2 / 199)]


def test_the_objective_is_the_weighted_sum_of_means():
    log_p = torch.tensor([[0.6, 0.4], [0.3, 0.7], [0.5, 0.5]]).log()
    kl, gold = kl_term(2), gold_term(1, weight=3.0)
    both = LabelTerm("kl", 1.0, 2, kl.rows, label_weight=0.5)
    alone = float(objective([kl], [kl.rows], log_p[:2], [2]))
    assert alone == pytest.approx(float(label_divergence("kl", torch.tensor([row.target for row in kl.rows]), log_p[:2]).mean()))
    assert float(objective([kl, gold], [kl.rows, gold.rows], log_p, [2, 1])) == pytest.approx(alone + 3.0 * -float(log_p[2, 0]))
    labels = -sum(float(own[row.label]) for row, own in zip(kl.rows, log_p, strict=False)) / 2
    assert float(objective([both], [kl.rows], log_p[:2], [2])) == pytest.approx(alone + 0.5 * labels)


@given(st.lists(st.text(max_size=8), unique=True, min_size=1, max_size=15), st.integers(0, 9), st.integers(0, 9))
def test_the_order_of_an_epoch_is_that_of_hashes(ids, seed, epoch):
    rows = [TargetRow(one, (1,), (0.0, 1.0)) for one in ids]
    taken = [row.example_id for row in Batches(rows, len(rows), seed).at(epoch)]
    assert taken == sorted(ids, key=lambda one: int(sha256_json([seed, epoch, one]), 16))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 5), st.randoms())
def test_an_epoch_takes_every_row_once_whatever_the_file_s_order(count, batch_size, seed, random):
    rows = make_rows(count)
    batches = Batches(rows, batch_size, seed)
    taken = [row.example_id for step in range(count) for row in batches.at(step)]
    for epoch in range(batch_size):
        assert Counter(taken[epoch * count : (epoch + 1) * count]) == Counter(row.example_id for row in rows)
    shuffled = Batches(random.sample(rows, count), batch_size, seed)
    assert [row.example_id for step in range(count) for row in shuffled.at(step)] == taken


def test_tokens_are_counted_by_step(tiny_model):
    terms, params = [kl_term(), gold_term()], tuning()
    outcome = train(tiny_model("llama"), MULTI, terms, params, title="test")
    batches = [Batches(term.rows, term.batch_size, params.seed).at(step) for step in range(params.steps) for term in terms]
    assert outcome.tokens == sum(len(row.ids) + 2 for batch in batches for row in batch)


def test_the_learning_rate_rises_then_holds_or_falls():
    constant = [learning_rate(step, tuning(steps=10, warmup=0.4)) / 1e-3 for step in range(10)]
    assert constant == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1])
    linear = [learning_rate(step, tuning(steps=4, warmup=0.0, decay="linear")) / 1e-3 for step in range(4)]
    assert linear == pytest.approx([1, 0.75, 0.5, 0.25])
    cosine = [learning_rate(step, tuning(steps=4, warmup=0.0, decay="cosine")) / 1e-3 for step in range(4)]
    assert cosine == pytest.approx([1, 0.853553, 0.5, 0.146447], abs=1e-5)
    assert learning_rate(3, tuning(steps=4, warmup=1.0)) == pytest.approx(1e-3)


def test_norms_biases_and_embeddings_do_not_decay(tiny_model):
    model = tiny_model("opt").requires_grad_(True)
    optimizer = adamw(model, tuning(weight_decay=0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed
    assert all("layers" in name and name.endswith("weight") and "norm" not in name for name in decayed)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)


@pytest.mark.parametrize("validated", [False, True])
def test_what_is_not_finite_stops_with_the_step_and_the_examples(tiny_model, validated):
    model, term = tiny_model("llama"), kl_term()
    with torch.no_grad():
        next(model.model.layers[1].mlp.parameters()).fill_(float("nan"))
    validation = Validation(make_rows(3, seed=4), 1, None) if validated else None
    what = "KL to the validation targets" if validated else "loss"
    with pytest.raises(ShotlessError, match=f"student cd: the {what} is nan at step 1") as caught:
        train(model, SINGLE, [term], tuning(), title="student cd", validation=validation)
    assert all(row.example_id in str(caught.value) for row in (validation.rows if validation else Batches(term.rows, 4, 0).at(0)))
    assert caught.value.exit_code == 1


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(tiny_model):
    model = tiny_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    huge = LabelTerm("kl", 1e38, 4, make_rows(10))
    with pytest.raises(ShotlessError, match=r"norm of the gradient is (inf|nan) at step 1"):
        train(model, SINGLE, [huge], tuning(), title="student cd")
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


HELD = make_rows(7, seed=4)


def naive_agreement(model):
    """Mean KL to the targets of the validation rows, one row at a time."""
    with torch.no_grad():
        log_p = naive_log_probabilities(model, SINGLE, [row.ids for row in HELD])
    return float(label_divergence("kl", torch.tensor([row.target for row in HELD]), log_p).mean())


@pytest.mark.parametrize("changes", [*TUNINGS.values(), {"micro_batch": 2}])
@pytest.mark.slow
def test_the_best_step_s_weights_are_those_the_model_ends_with(tiny_model, changes):
    model = tiny_model("llama")
    before = naive_agreement(model)
    params = tuning(steps=6, learning_rate=3e-2, **changes)
    outcome = train(model, SINGLE, [kl_term()], params, title="t", validation=Validation(HELD, 1, None))
    steps, values = zip(*outcome.reached.validations, strict=True)
    assert steps == tuple(range(7))
    assert values[0] == pytest.approx(before, rel=1e-4)
    assert outcome.reached.best[0] == steps[values.index(min(values))]
    assert naive_agreement(model) == pytest.approx(min(values), rel=2e-3, abs=1e-4)


def test_validation_does_not_change_the_training_and_comes_first_at_intervals_and_last(tiny_model):
    outcomes = [
        train(tiny_model("llama"), SINGLE, [kl_term()], tuning(steps=7), title="t", validation=one)
        for one in (None, Validation(HELD, 3, None))
    ]
    assert outcomes[0].reached.losses == outcomes[1].reached.losses
    assert [step for step, _ in outcomes[1].reached.validations] == [0, 3, 6, 7]


def test_a_run_that_only_gets_worse_ends_early_with_the_model_as_it_was(tiny_model):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():  # targets that the untouched model meets exactly
        answers = naive_log_probabilities(model, SINGLE, [row.ids for row in HELD]).exp().tolist()
    met = [TargetRow(row.example_id, row.ids, tuple(answer)) for row, answer in zip(HELD, answers, strict=True)]
    outcome = train(model, SINGLE, [kl_term()], tuning(steps=50, learning_rate=1e-2), title="t", validation=Validation(met, 2, patience=3))
    assert outcome.reached.best[0] == 0
    assert [step for step, _ in outcome.reached.validations] == [0, 2, 4, 6]
    assert len(outcome.reached.losses) == 6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_patience_counts_validations_since_the_best_one():
    reached, over = Reached(), []
    for value in [3.0, 2.0, 2.5, 2.0, 1.0, 1.5, 1.5]:
        reached.add(torch.nn.Linear(1, 1), value)
        over.append(reached.is_over(2))
    assert over == [False, False, False, True, False, False, True]
    assert not reached.is_over(None)
    assert reached.best[1] == 1.0


@given(st.integers(0, 5), st.floats(0.2, 0.6), st.randoms(), st.integers(20, 60))
def test_the_validation_part_follows_from_content_and_grows_with_the_fraction(seed, fraction, random, count):
    rows = make_rows(60, seed)
    (held, learnt), (larger, _) = (split(rows, "validation_fraction", share) for share in (fraction, fraction + 0.3))
    assert sorted(held + learnt, key=rows.index) == rows
    assert set(held) < set(larger)
    some = random.sample(rows, count)
    expected = [row for row in some if row in held]
    assume(0 < len(expected) < count)  # an empty side is refused, as the next test shows
    assert split(some, "validation_fraction", fraction)[0] == expected


def test_the_fraction_is_met_on_average_and_an_empty_side_is_refused():
    assert len(split(make_rows(4000), "held_back", 0.1)[0]) == pytest.approx(400, abs=60)
    for fraction, what in ((1e-9, "for it"), (1 - 1e-9, "to learn from")):
        with pytest.raises(UsageError, match=f"validation_fraction: {fraction} of 10 examples leaves none {what}"):
            split(make_rows(10), "validation_fraction", fraction)


@pytest.mark.parametrize("completions", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_several_passes_a_step_give_the_numbers_of_one(tiny_model, size, completions):
    whole, parted = tiny_model("llama"), tiny_model("llama")
    terms = [kl_term(), gold_term()]
    one = train(whole, completions, terms, tuning(steps=3), title="t")
    other = train(parted, completions, terms, tuning(steps=3, micro_batch=size), title="t")
    assert other.reached.losses == pytest.approx(one.reached.losses, rel=1e-4, abs=1e-5)
    assert other.tokens == one.tokens
    with torch.no_grad():
        first, second = (naive_log_probabilities(m, completions, [HELD[0].ids]) for m in (whole, parted))
    assert torch.allclose(first, second, atol=1e-3)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(1, 9))
@pytest.mark.slow
def test_micro_batches_keep_every_row_in_its_term(sizes, size):
    batches = [make_rows(count, seed) for seed, count in enumerate(sizes)]
    cut = list(micro_batches(batches, size))
    assert all(len(piece) == len(batches) and 1 <= sum(map(len, piece)) <= size for piece in cut)
    assert [[row for piece in cut for row in piece[n]] for n in range(len(batches))] == batches
    assert list(micro_batches(batches, None)) == ([batches] if any(sizes) else [])


class Killed(BaseException):
    """Stands for a signal: nothing in the pipeline may catch it."""


class DyingCheckpoint(Checkpoint):
    """Is taken at once, and ends the process."""

    def due(self):
        return True

    def save(self, *args):
        super().save(*args)
        raise Killed


@pytest.mark.parametrize("changes", [*TUNINGS.values(), {"micro_batch": 3, "decay": "cosine"}])
@pytest.mark.slow
def test_killed_after_every_step_the_training_ends_with_the_same_bits(tiny_model, tmp_path, changes):
    """A weight that no row reaches has no gradient and no moments yet; a checkpoint has to do without them."""

    def model():
        made = tiny_model("llama")
        made.register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
        return made

    params, terms = tuning(steps=4, weight_decay=0.01, learning_rate=1e-2, **changes), [kl_term(), gold_term()]
    validation = Validation(HELD, 2, None)
    whole, resumed_at = model(), []
    expected = train(whole, SINGLE, terms, params, title="t", validation=validation)
    for step in range(1, params.steps):
        with pytest.raises(Killed):
            train(model(), SINGLE, terms, params, title="t", validation=validation, checkpoint=DyingCheckpoint(tmp_path, "s", "f" * 64))
        resumed_at.append(step)
    broken = model()
    found = train(broken, SINGLE, terms, params, title="t", validation=validation, checkpoint=Checkpoint(tmp_path, "s", "f" * 64))
    assert found.resumed_at == resumed_at[-1] == params.steps - 1
    assert found.reached.losses == expected.reached.losses
    assert found.reached.validations == expected.reached.validations
    for one, other in zip(whole.state_dict().values(), broken.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_something_else_or_a_broken_one_is_not_used(tiny_model, tmp_path, capsys):
    checkpoint = DyingCheckpoint(tmp_path, "student-cd", "f" * 64)
    with pytest.raises(Killed):
        train(tiny_model("llama"), SINGLE, [kl_term()], tuning(), title="t", checkpoint=checkpoint)

    def resumed(fingerprint, name="student-cd"):
        checkpoint = Checkpoint(tmp_path, name, fingerprint)
        return train(tiny_model("llama"), SINGLE, [kl_term()], tuning(), title="t", checkpoint=checkpoint).resumed_at

    assert resumed("f" * 64) == 1
    assert resumed("e" * 64) == 0
    assert resumed("f" * 64, "student-cd-raw") == 0
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-100])
    assert resumed("f" * 64) == 0
    assert f"{checkpoint.path}: cannot be read" in capsys.readouterr().err


def test_one_student_s_checkpoints_are_removed_and_no_others(tmp_path):
    own, longer = (Checkpoint(tmp_path, name, "0123456789abcdef00") for name in ("student-cd", "student-cd-raw"))
    for file in (own.path, own.path.with_name(own.path.name.replace("0", "1")), longer.path):
        file.write_bytes(b"")
    own.path.with_name(f".{own.path.name}.17.tmp").write_bytes(b"")  # a kill while it was written
    own.remove()
    assert list(tmp_path.iterdir()) == [longer.path]
