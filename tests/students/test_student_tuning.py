"""Each tuning against a naive loop that learns the same weights; what stays frozen; what is kept in memory; what is saved."""

import copy
import gc

import pytest
import torch
from conftest import ARCHITECTURES
from peft import PeftModel
from student_naive import MULTI, SINGLE, gold_term, kl_term, make_examples, naive_training, tuning
from torch.nn.utils import parametrize

from pipeline.errors import UsageError
from pipeline.models.loading import load_model
from pipeline.models.truncation import cut_layers
from pipeline.students import gradients, loop
from pipeline.students import head as head_module
from pipeline.students.batches import Order
from pipeline.students.head import TOKENS_A_PASS, token_batches
from pipeline.students.training import train
from pipeline.students.tuning import apply_tuning, trained_weights

ROWS = torch.tensor([make_examples(1)[0].ids])
LORA = {"tuning": "lora", "lora": {"rank": 3, "alpha": 5}}
TUNINGS = {
    "frozen": {"freeze_embeddings": True},
    "lora": LORA,
    "lora_all": {"tuning": "lora", "lora": {"rank": 2, "alpha": 2, "modules": "all_linear"}},
    "bitfit": {"tuning": "bitfit"},
    "head": {"tuning": "head"},
}


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
    if kind == "frozen":
        tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        return [p for p in named.values() if id(p) not in tables]
    if kind == "bitfit":
        biases = [p for name, p in named.items() if name.endswith(".bias")]
        return biases or [p for name, p in named.items() if "norm" in name]
    if kind == "head":
        model.lm_head = copy.deepcopy(model.get_output_embeddings()) if hasattr(model, "lm_head") else model.lm_head
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        return list(model.lm_head.parameters())
    other = copy.deepcopy(model)
    apply_tuning(other, params)
    learnt = []
    for name, module in list(other.named_modules()):
        if hasattr(module, "lora_A"):
            target = model.get_submodule(name)
            low_rank = LowRank(
                module.lora_A["default"].weight,
                module.lora_B["default"].weight,
                params.lora.alpha / params.lora.rank,
                type(target).__name__ == "Conv1D",
            )
            parametrize.register_parametrization(target, "weight", low_rank)
            learnt += [low_rank.a, low_rank.b]
    return learnt


@pytest.mark.parametrize("kind", TUNINGS)
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2", "phi"])
def test_a_tuning_gives_the_naive_loop_s_losses_and_answers(tiny_model, architecture, kind):
    params = tuning(weight_decay=0.1, max_grad_norm=0.5, learning_rate=1e-2, **TUNINGS[kind])
    model, terms = tiny_model(architecture), [kl_term(), gold_term()]
    naive, start = copy.deepcopy(model), copy.deepcopy(model)
    expected = naive_training(naive, SINGLE, terms, params, learnt_by_hand(naive, kind, params))
    trained = train(model, SINGLE, terms, params, title="test")
    assert trained.forward.startswith("packed")
    assert trained.losses == pytest.approx(expected, rel=5e-3, abs=5e-4)
    with torch.no_grad():
        before, after, wanted = (m(ROWS).logits[0, -1, [5, 9]].log_softmax(-1) for m in (start, model, naive))
    assert torch.allclose(after, wanted, atol=5e-3)
    assert not torch.allclose(after, before, atol=5e-3)


@pytest.mark.parametrize("kind", ["lora", "bitfit", "head"])
def test_labels_of_several_tokens_are_tuned_like_the_naive_loop(tiny_model, kind):
    params, terms = tuning(learning_rate=1e-2, **TUNINGS[kind]), [kl_term()]
    model = tiny_model("llama")
    naive = copy.deepcopy(model)
    expected = naive_training(naive, MULTI, terms, params, learnt_by_hand(naive, kind, params))
    assert train(model, MULTI, terms, params, title="test").losses == pytest.approx(expected, rel=5e-3, abs=5e-4)


@pytest.mark.parametrize("kind", TUNINGS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tuned_model_is_plain_again_and_frozen_weights_are_as_they_were(tiny_model, architecture, kind):
    model = tiny_model(architecture)
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}
    params = tuning(learning_rate=1e-2, steps=2, **TUNINGS[kind])
    trained = train(model, SINGLE, [kl_term()], params, title="test")
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    embeddings = {name for name in before if name.endswith(("embed_tokens.weight", "embed_positions.weight", "wte.weight", "wpe.weight"))}
    assert not changed & (embeddings | {name for name in before if name.endswith("embed_in.weight")})
    if kind == "bitfit":
        assert all(before[name].dim() == 1 for name in changed)
        assert trained.trained_parameters <= sum(p.numel() for p in before.values() if p.dim() == 1)
    if kind == "head":
        assert all(name.startswith(("lm_head", "embed_out")) for name in changed)
        assert not model.config.tie_word_embeddings
    if kind.startswith("lora"):
        assert all(before[name].dim() == 2 for name in changed)
        assert not any(hasattr(module, "lora_A") for module in model.modules())


@pytest.mark.parametrize("kind", ["lora", "bitfit", "head"])
def test_tuning_starts_from_the_model_s_own_answers(tiny_model, kind):
    model = tiny_model("llama")
    expected = model(ROWS).logits.detach()
    tuned = apply_tuning(model, tuning(**TUNINGS[kind]))
    assert torch.equal(model(ROWS).logits, expected)
    assert tuned.trained_parameters == sum(p.numel() for p in trained_weights(model).values())


def test_the_number_of_learnt_weights_is_that_of_the_definition(tiny_model):
    counts = {kind: apply_tuning(tiny_model("llama"), tuning(**changes)) for kind, changes in TUNINGS.items()}
    vocabulary, width, layers, keys = tiny_model("llama").config.vocab_size, 32, 4, 16
    assert counts["lora"].trained_parameters == layers * 3 * ((width + width) + (width + keys))
    assert counts["lora"].trains == "LoRA of rank 3, alpha 5 on q_proj, v_proj"
    assert counts["bitfit"].trained_parameters == (2 * layers + 1) * width
    assert "no biases" in counts["bitfit"].trains
    assert counts["head"].trained_parameters == vocabulary * width
    whole = sum(p.numel() for p in tiny_model("llama").parameters())
    assert counts["frozen"].trained_parameters == whole - vocabulary * width
    assert "the head tied to them" in counts["frozen"].trains


def test_bitfit_learns_biases_and_no_norm_weights_where_there_are_biases(tiny_model):
    model = tiny_model("qwen2")
    tuned = apply_tuning(model, tuning(tuning="bitfit"))
    assert tuned.trains == "biases"
    assert {name.split(".")[-2] for name in trained_weights(model)} == {"q_proj", "k_proj", "v_proj"}


def test_lora_s_random_halves_follow_the_seed_and_leave_torch_s_generator_alone(tiny_model):
    found = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        torch.manual_seed(17 + len(found))
        state = torch.random.get_rng_state()
        apply_tuning(model, tuning(seed=seed, **LORA))
        assert torch.equal(torch.random.get_rng_state(), state)
        found.append(next(iter(trained_weights(model).values())).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_architecture_without_a_usual_choice_of_layers_says_what_to_write(tiny_model, monkeypatch):
    import peft.tuners.lora.model as lora_model

    table = {key: value for key, value in lora_model.LoraModel.target_module_mapping.items() if key != "llama"}
    monkeypatch.setattr(lora_model.LoraModel, "target_module_mapping", table)
    with pytest.raises(UsageError, match=r"lora\.modules: peft has no usual choice for a llama model.*all_linear"):
        apply_tuning(tiny_model("llama"), tuning(tuning="lora"))
    assert apply_tuning(tiny_model("llama"), tuning(**TUNINGS["lora_all"])).trained_parameters


def graph_of(output):
    """Names of the operations behind a tensor."""
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    return [node.name() for node in seen]


@pytest.mark.parametrize("kind", ["frozen", "lora", "bitfit", "head"])
def test_nothing_below_the_first_learnt_weight_has_a_graph(tiny_model, monkeypatch, kind):
    graphs = []
    real = loop.objective

    def spy(*args):
        loss = real(*args)
        graphs.append(graph_of(loss))
        return loss

    monkeypatch.setattr(loop, "objective", spy)
    monkeypatch.setattr(gradients, "_is_trained", lambda module: False)  # a learnt matrix is one node there, and several in autograd
    train(tiny_model("llama"), SINGLE, [kl_term()], tuning(steps=1, **TUNINGS[kind]), title="test")
    train(tiny_model("llama"), SINGLE, [kl_term()], tuning(steps=1), title="test")
    tuned, full = graphs
    assert "EmbeddingBackward0" in full
    assert "EmbeddingBackward0" not in tuned
    assert len(tuned) < (20 if kind == "head" else len(full) + 20)
    gc.collect()


def test_head_only_training_reads_each_example_once(tiny_model, monkeypatch):
    passes = []
    real = head_module._vectors

    def counting(model, *args):
        hook = model.model.layers[0].register_forward_pre_hook(lambda module, args: passes.append(args[0].shape[1]))
        try:
            return real(model, *args)
        finally:
            layer = model.model.layers[0]
            hook.remove()
            layer.register_forward_pre_hook(lambda module, args: pytest.fail("the body ran again"))

    monkeypatch.setattr(head_module, "_vectors", counting)
    term, params = kl_term(count=40), tuning(steps=9, tuning="head")
    trained = train(tiny_model("llama"), SINGLE, [term], params, title="test")
    taken = {example.ids for step in range(9) for example in Order(term, params.seed).batch(step)}
    assert len(taken) == 36
    [tokens] = passes
    assert sum(map(len, taken)) <= tokens <= sum(map(len, taken)) + 3 * 12, "what the steps take, and the three rows of the check"
    assert "the body once for each example" in trained.forward


def test_a_model_that_changes_its_logits_after_the_head_runs_whole(tiny_model, monkeypatch):
    model = tiny_model("llama")
    real = type(model).forward

    def scaled(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    monkeypatch.setattr(type(model), "forward", scaled)
    trained = train(model, SINGLE, [kl_term()], tuning(steps=2, tuning="head"), title="test")
    assert trained.forward.startswith("packed")
    assert "the body once" not in trained.forward


def test_rows_are_read_in_runs_of_bounded_length():
    rows = [(1,) * length for length in (5, 1000, 1000, 1000, 5000, 3)]
    runs = token_batches(rows, len)
    assert [row for run in runs for row in run] == rows
    assert all(sum(map(len, run)) <= TOKENS_A_PASS or len(run) == 1 for run in runs)
    assert len(runs) == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_a_kept_adapter_on_the_cut_base_is_the_merged_model(model_folder, tmp_path, architecture):
    folder = model_folder(architecture)
    model = cut_layers(load_model(folder), [0, 2, 3])
    params = tuning(learning_rate=1e-2, adapters="kept", **LORA)
    train(model, SINGLE, [kl_term()], params, title="test", adapter=(tmp_path / "adapter", "models/tiny"))
    base = cut_layers(load_model(folder), [0, 2, 3])
    with torch.no_grad():
        bare = base(ROWS).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.allclose(adapted(ROWS).logits, model(ROWS).logits, atol=1e-4)
        assert not torch.allclose(bare, model(ROWS).logits, atol=1e-2)
    assert adapted.peft_config["default"].base_model_name_or_path == "models/tiny"
