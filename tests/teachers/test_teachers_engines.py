"""The shared-prefix engine against the plain full-prompt forward, over architectures, context lengths and completions."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st

from pipeline.models.forward import LOW_PRECISION_TOLERANCE_NATS, in_float32
from pipeline.models.packed import PackedModel, Row, tree_of
from pipeline.params import CacheParams
from pipeline.schema import Prompt
from pipeline.teachers import engines
from pipeline.teachers.engines import (
    Engine,
    largest_difference,
    open_engine,
    plan_batches,
    read_scores,
    shared_prefix,
    token_budget,
)

SINGLE = [[5], [9]]
MULTI = [[5], [9, 3, 7], [11, 5], [9, 3, 4], [9, 8], [9, 3, 12, 2]]
KEPT = CacheParams(top_k=8)


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    monkeypatch.setattr(engines, "LARGEST_BUDGET", 64)


def random_ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 300, (count,), generator=generator).tolist()


def prompts_of(context, *lengths):
    """Prompts that begin with `context` and go on for `lengths` tokens."""
    return [Prompt((*context, *random_ids(length, 100 + number))) for number, length in enumerate(lengths)]


def tokens_of(completions):
    """A task's tokens, of which an engine reads the verbalisers alone."""
    return SimpleNamespace(completions=completions, task=SimpleNamespace(params=SimpleNamespace(completion=None)))


def open_for(model, prompts, completions=SINGLE, cache=KEPT):
    return open_engine(model, tokens_of(completions), cache, prompts)


def labels_of(engine, prompts, shared=None):
    return engine.score(prompts, shared).label_logprobs


@torch.no_grad()
def naive_scores(model, completions, prompts):
    """Straight from the definition: one full prompt at a time, each completion's tokens one after the other."""
    rows = []
    for prompt in prompts:
        row = []
        for completion in completions:
            total = 0.0
            for place, token in enumerate(completion):
                logits = model(torch.tensor([[*prompt.ids, *completion[:place]]])).logits[0, -1]
                total += float(logits.double().log_softmax(-1)[token])
            row.append(total)
        rows.append(row)
    return torch.tensor(rows)


def assert_right(model, found, completions, prompts, expected=None):
    expected = naive_scores(model, completions, prompts) if expected is None else expected
    assert float((found - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("context_tokens", "completions"), [(0, SINGLE), (1, MULTI), (70, SINGLE), (70, MULTI)], ids=["none", "one", "single", "multi"]
)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "phi3", "smollm3", "olmo2"])
@pytest.mark.slow
def test_the_fast_engine_gives_the_plain_forwards_numbers(tiny_model, architecture, context_tokens, completions):
    model = tiny_model(architecture)
    prompts = prompts_of(random_ids(context_tokens, 1), 9, 3, 17, 1, 9)
    expected = naive_scores(model, completions, prompts)
    engine = open_for(model, prompts[:2], completions)
    assert engine.name == "shared_prefix", engine.reason
    engine.token_budget = 24
    assert_right(model, labels_of(engine, prompts), completions, prompts, expected)


def many_labels():
    """Sixteen first tokens, of which one is a label and the others begin one to four each."""
    return [[300], *([first, second] for first in range(1, 16) for second in range(300, 301 + first % 4))]


@pytest.fixture
def sharp_model(tiny_model):
    """It answers in the labels' tokens, with probabilities that differ by orders of magnitude, as a good teacher does."""

    def make(architecture):
        model = tiny_model(architecture)
        others = torch.full((model.config.vocab_size,), -50.0)
        others[list({token for ids in many_labels() for token in ids})] = 0
        model.get_output_embeddings().register_forward_hook(lambda _module, _args, out: 4 * out / out.std(-1, keepdim=True) + others)
        return model

    return make


@pytest.mark.parametrize("name", ["generic", "shared_prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mistral", "phi"])
@pytest.mark.slow
def test_of_many_labels_those_that_can_matter_are_followed_and_the_rest_is_bounded(sharp_model, monkeypatch, architecture, name):
    monkeypatch.setattr(engines, "MOST_NODES", 8)
    monkeypatch.setattr(engines, "MOST_LEFT", 0.02)
    model, labels, prompts = sharp_model(architecture), many_labels(), prompts_of(random_ids(20, 1), 5, 9, 3, 7)
    expected = naive_scores(model, labels, prompts)
    engine = open_for(model, prompts[:2], labels) if name == "shared_prefix" else Engine(model, None, labels, KEPT, 64)
    assert engine.name == name, engine.reason
    found = engine.score(prompts)
    bounded = ~found.label_bounds.isnan()
    assert bounded.any(-1).any(), "the example has something to leave out"
    assert not bounded[:, 0].any(), "a label of one token is always known"
    assert float((found.label_logprobs - expected)[~bounded].abs().max()) < 1e-4
    assert (found.label_bounds >= expected - 1e-4)[bounded].all()
    assert (found.label_bounds >= found.label_logprobs)[bounded].all()
    first = torch.tensor([ids[0] for ids in labels])
    for row, own in enumerate(bounded):
        for token in first[own].unique():
            mass = found.label_logprobs[row, first == token].exp().sum().log()  # shared by all labels that begin so
            assert torch.allclose(mass, found.label_bounds[row, first == token], atol=1e-4)
    assert float((found.label_logprobs.softmax(-1) - expected.softmax(-1)).abs().max()) < engines.MOST_LEFT
    whole = engine.score(prompts, follow_all=True)
    assert whole.label_bounds is None
    assert_right(model, whole.label_logprobs, labels, prompts, expected)
    assert torch.allclose(found.encoded["topk_logprobs"], whole.encoded["topk_logprobs"], atol=1e-4)


@pytest.mark.parametrize("share", [1e-9, 1.0, 1e9])
@pytest.mark.slow
def test_what_labels_are_assumed_to_have_changes_the_work_and_not_the_promise(sharp_model, monkeypatch, share):
    monkeypatch.setattr(engines, "MOST_NODES", 8)
    monkeypatch.setattr(engines, "LABELS_SHARE", share)
    model, labels, prompts = sharp_model("llama"), many_labels(), prompts_of(random_ids(20, 1), 5, 9, 3, 7)
    expected = naive_scores(model, labels, prompts)
    found = open_for(model, prompts[:2], labels).score(prompts).label_logprobs
    assert float((found.softmax(-1) - expected.softmax(-1)).abs().max()) < engines.MOST_LEFT


def test_if_nothing_may_be_left_out_all_labels_are_followed(tiny_model, monkeypatch):
    monkeypatch.setattr(engines, "MOST_LEFT", 0.0)
    labels, prompts = many_labels(), prompts_of(random_ids(20, 1), 5, 9, 3)
    engine = open_for(tiny_model("llama"), prompts[:2], labels)
    whole = engine.score(prompts, follow_all=True)
    monkeypatch.setattr(engines, "MOST_NODES", 8)
    found = engine.score(prompts)
    assert found.label_bounds.isnan().all()
    assert torch.allclose(found.label_logprobs, whole.label_logprobs, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_generic_engine_gives_the_plain_forwards_numbers(tiny_model, architecture):
    model, prompts = tiny_model(architecture), prompts_of(random_ids(30, 1), 4, 9, 4, 2)
    assert_right(model, labels_of(Engine(model, None, MULTI, KEPT, 100), prompts), MULTI, prompts)


@torch.no_grad()
@pytest.mark.parametrize("name", ["generic", "shared_prefix"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_own_answers_are_scored_token_by_token(tiny_model, architecture, name):
    model = tiny_model(architecture)
    prompts = [Prompt(prompt.ids, tuple(random_ids(3 + n, 50 + n))) for n, prompt in enumerate(prompts_of(random_ids(20, 1), 4, 9, 4))]
    expected = []
    for prompt in prompts:
        log_p = model(torch.tensor([[*prompt.ids, *prompt.answer]])).logits[0].double().log_softmax(-1)
        expected += [float(log_p[len(prompt.ids) - 1 + place, token]) for place, token in enumerate(prompt.answer)]
    engine = Engine(model, None, (), KEPT, 64) if name == "generic" else open_free(model, prompts)
    assert engine.name == name
    scores = engine.score(prompts)
    assert scores.positions.tolist() == [3, 4, 5]
    assert torch.allclose(scores.completion_logprobs.double(), torch.tensor(expected).double(), atol=1e-4)


def open_free(model, prompts):
    task = SimpleNamespace(params=SimpleNamespace(completion="free text"))
    return open_engine(model, SimpleNamespace(completions=[], task=task, longest_answer=6), KEPT, prompts)


@pytest.mark.parametrize("encoding", ["top_k", "top_k_tail", "sampled", "hybrid", "full"])
def test_the_fast_engine_is_found_right_whatever_is_kept(tiny_model, encoding):
    cache = CacheParams(encoding=encoding, top_k=400, samples=300)
    assert open_for(tiny_model("llama"), prompts_of(random_ids(30, 1), 4, 9, 2), cache=cache).name == "shared_prefix"


def test_batching_does_not_change_the_numbers(tiny_model):
    prompts = prompts_of(random_ids(40, 2), *range(1, 30))
    engine = open_for(tiny_model("llama"), prompts[:2], MULTI)
    engine.token_budget = 1
    one_by_one = engine.score(prompts)
    engine.token_budget = 10_000
    assert largest_difference(one_by_one, engine.score(prompts)) < 1e-4


def test_a_window_shorter_than_the_prompt_takes_the_generic_engine(tiny_model):
    model, prompts = tiny_model("mistral", sliding_window=16), prompts_of(random_ids(40, 3), 5, 6)
    expected = naive_scores(model, SINGLE, prompts)
    engine = open_for(model, prompts)
    assert engine.name == "generic"
    assert "sliding window of 16" in engine.reason
    assert_right(model, labels_of(engine, prompts), SINGLE, prompts, expected)


UNFITTING = {
    "mamba": ({"state_size": 4}, "was not reached"),
    "jamba": (
        {"num_key_value_heads": 2, "num_experts": 2, "mamba_d_state": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
        "layers have keys",
    ),  # attention in some layers
    "recurrent_gemma": ({"head_dim": 8, "lru_width": 32}, "was not reached"),
    "lfm2": ({"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"] * 2}, "layers have keys"),
    "bloom": ({"n_head": 4, "n_layer": 4}, "was not reached"),  # a bias by distance
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 8}, "soft-capped"),
    "gpt_oss": ({"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "attention sinks"),
    "gemma3_text": ({"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}, "a sliding window of 16"),  # in some layers
    "qwen2": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, "a sliding window of 16"),  # the same
}


@pytest.mark.parametrize("architecture", UNFITTING)
def test_architectures_that_do_not_fit_take_the_generic_engine_and_are_right(tiny_model, architecture):
    settings, why = UNFITTING[architecture]
    model, prompts = tiny_model(architecture, **settings), prompts_of(random_ids(40, 3), 5, 6)
    expected = naive_scores(model, SINGLE, prompts)
    engine = open_for(model, prompts)
    assert engine.name == "generic", engine.reason
    assert engine.reason.startswith("packed rows were refused")
    assert why in engine.reason
    assert_right(model, labels_of(engine, prompts), SINGLE, prompts, expected)


@pytest.mark.parametrize("taken", [0, 7, 8, 20, 25])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_any_part_of_what_prompts_begin_with_may_be_shared(tiny_model, architecture, taken):
    model, prompts = tiny_model(architecture), prompts_of(random_ids(25, 1), 6, 7, 3)
    expected = naive_scores(model, MULTI, prompts)
    engine = open_for(model, prompts, MULTI)
    assert engine.name == "shared_prefix"
    assert_right(model, labels_of(engine, prompts, prompts[0].ids[:taken]), MULTI, prompts, expected)


def test_a_part_that_not_all_begin_with_is_refused(tiny_model):
    prompts = prompts_of(random_ids(20, 1), 6, 7)
    engine = open_for(tiny_model("llama"), prompts)
    for shared in (random_ids(20, 2), prompts[0].ids):
        with pytest.raises(ValueError, match="does not begin with the"):
            engine.score(prompts, shared)


def test_a_prefix_is_read_once_for_as_long_as_calls_have_the_same(tiny_model, monkeypatch):
    read, original = [], PackedModel.read_context
    monkeypatch.setattr(PackedModel, "read_context", lambda self, ids: read.append(tuple(ids)) or original(self, ids))
    first, second = (prompts_of(random_ids(20, seed), 6, 7, 3, 9) for seed in (1, 2))
    engine = open_for(tiny_model("llama"), first)
    read.clear()
    for prompts in (first, second):
        for start in (0, 2):
            engine.score(prompts[start : start + 2], prompts[0].ids[:20])
            engine.score([Prompt(prompts[0].ids[20:])])  # shares nothing, and what is held stays
    assert read == [first[0].ids[:20], second[0].ids[:20]]


def test_scores_do_not_depend_on_what_was_scored_before(tiny_model):
    prompts = prompts_of(random_ids(25, 1), 6, 7)
    engine = open_for(tiny_model("llama"), prompts)
    first = engine.score(prompts)
    for others in (prompts_of(random_ids(90, 9), 3, 4), prompts[:1], prompts_of(random_ids(20, 1), 5, 5)):
        engine.score(others)
    assert largest_difference(first, engine.score(prompts)) == 0


def test_a_second_context_is_not_answered_from_the_first(tiny_model):
    model, first, second = tiny_model("llama"), *(prompts_of(random_ids(20, seed), 6, 7) for seed in (1, 2))
    expected = naive_scores(model, SINGLE, second)
    engine = open_for(model, first)
    engine.score(first)
    assert_right(model, labels_of(engine, second), SINGLE, second, expected)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_shared_prefix_is_the_longest_that_all_begin_with_and_leaves_each_a_token(ids):
    prompts = [Prompt(tuple(own)) for own in ids]
    shared = shared_prefix(prompts)
    count = len(shared)
    assert all(prompt.ids[:count] == shared and len(prompt.ids) > count for prompt in prompts)
    assert any(prompt.ids[: count + 1] != prompts[0].ids[: count + 1] or len(prompt.ids) == count + 1 for prompt in prompts)


@pytest.mark.slow
def test_a_context_of_8192_tokens_works_on_a_model_that_takes_it(tiny_model):
    model = tiny_model("llama", max_position_embeddings=8300, num_hidden_layers=2)
    engine = open_for(model, prompts_of(random_ids(8192, 4), 20, 31))  # compares the two passes
    assert engine.name == "shared_prefix", engine.reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_compared_in_float32_and_then_runs_as_it_is(tiny_model, dtype):
    model, prompts = tiny_model("llama").to(dtype), prompts_of(random_ids(40, 5), 20, 31)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine = open_for(model, prompts)
    assert engine.name == "shared_prefix", engine.reason
    assert "allowed 1e-03" in engine.reason
    assert all(value.dtype == before[name].dtype and torch.equal(value, before[name]) for name, value in model.state_dict().items())
    wide = tiny_model("llama").to(dtype).float()
    assert float((labels_of(engine, prompts) - naive_scores(wide, SINGLE, prompts)).abs().max()) < 0.5  # the format's own rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_pass_that_is_wrong_by_a_hundredth_of_a_nat_is_refused(tiny_model, monkeypatch, dtype):
    """Once 0.25 nats of label log-odds passed in bfloat16."""
    original = engines.packed_logits

    def slightly_wrong(*args):
        logits, hidden = original(*args)
        logits[:, 5] += 0.01
        return logits, hidden

    monkeypatch.setattr(engines, "packed_logits", slightly_wrong)
    engine = open_for(tiny_model("llama").to(dtype), prompts_of(random_ids(40, 5), 20, 31))
    assert engine.name == "generic"
    assert "nats from the plain forward" in engine.reason


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bfloat16_model_computes_in_float32_inside_the_block_alone(tiny_model, architecture):
    ids = torch.tensor([random_ids(9, 1)])
    model = tiny_model(architecture).to(torch.bfloat16)
    expected, low = tiny_model(architecture).to(torch.bfloat16).float()(ids).logits, model(ids).logits
    with in_float32(model) as tolerance:
        wide = model(ids).logits
    assert tolerance == LOW_PRECISION_TOLERANCE_NATS
    assert wide.dtype == torch.float32
    assert torch.allclose(wide, expected, atol=1e-2)  # rotary tables were narrowed by `.to`
    assert torch.equal(model(ids).logits, low)


def read(logits, top_k):
    """Single-token labels 1 and 2, one answer position a row."""
    cache = CacheParams(encoding="top_k_tail", top_k=top_k, resolution_nats=None)
    return read_scores(logits, [tree_of([[1], [2]])] * len(logits), cache, [Prompt((0,))] * len(logits))


def test_head_and_tail_make_the_whole_distribution():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 4
    scores = read(logits, 7)
    full = logits.double().log_softmax(-1)
    assert torch.allclose(scores.encoded["topk_logprobs"].double(), full.topk(7).values, atol=1e-5)
    assert torch.allclose(scores.encoded["topk_logprobs"].exp().sum(-1) + scores.encoded["tail_mass"], torch.ones(6), atol=1e-5)
    assert torch.allclose(scores.encoded["log_z"], logits.logsumexp(-1))
    assert torch.allclose(scores.label_logprobs.double(), full[:, [1, 2]], atol=1e-5)


def test_top_k_past_the_vocabulary_keeps_everything():
    scores = read(torch.randn(2, 5), 50)
    assert scores.encoded["topk_ids"].shape == (2, 5)
    assert torch.equal(scores.encoded["tail_mass"], torch.zeros(2))


def test_minus_infinity_logits_stay_finite_where_they_are_not_asked_for():
    logits = torch.randn(3, 10)
    logits[:, 7:] = -torch.inf
    scores = read(logits, 4)
    assert torch.isfinite(scores.label_logprobs).all()
    assert torch.isfinite(scores.encoded["tail_mass"]).all()


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [5, 9, 1, 30, 7, 7, 2]
    batches = plan_batches(lengths, 16)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or sum(lengths[row] for row in batch) <= 16 for batch in batches)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 100))
def test_the_last_two_batches_are_as_even_as_their_rows_allow(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert all(batches), "an empty batch cannot be packed"
    sums = [sum(lengths[row] for row in batch) for batch in batches]
    if len(batches) > 1:
        assert abs(sums[-1] - sums[-2]) <= 2 * max(lengths)
    assert all(total <= budget or len(batch) == 1 for total, batch in zip(sums, batches, strict=True))


def test_the_token_budget_follows_the_memory(tiny_model):
    model = tiny_model("llama")
    assert engines.LARGEST_BUDGET == token_budget(model, 1 << 40) >= token_budget(model, 1 << 20) >= 64
    assert token_budget(model.to("meta"), 1 << 40) == engines.LARGEST_GPU_BUDGET  # the meta device stands for a GPU
    assert token_budget(model, sum(p.numel() * p.element_size() for p in model.parameters())) == 64


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
@pytest.mark.parametrize("labels", [[[n % 7, 300 + n, 5, n] for n in range(77)], [range(140)]], ids=["77 labels", "a free answer"])
def test_logits_of_a_pass_fit_its_memory(tiny_model, monkeypatch, labels, vocabulary):
    """Of a pass over a whole tree, in float32 twice; a row has a query of 16 tokens or more."""
    monkeypatch.setattr(engines, "LARGEST_BUDGET", 1024)
    model, tree = tiny_model("llama"), tree_of(labels)
    model.config.vocab_size = vocabulary
    row = Row(range(16), tree)
    batches = plan_batches([row.length] * 40, token_budget(model, 1 << 40, len(tree.tokens)))
    assert 1 < len(batches[0]) < 7
    assert len(batches[0]) * row.outputs * vocabulary * 4 * 2 <= engines.ACTIVATIONS


@pytest.mark.slow
def test_a_probe_of_many_labels_costs_the_plain_pass_few_prompts(tiny_model, monkeypatch):
    model, rows, plain = tiny_model("llama"), [], engines.plain_logits
    monkeypatch.setattr(engines, "plain_logits", lambda model, own, layers: rows.extend(own) or plain(model, own, layers))
    labels = [[3 + n, *range(7, 7 + n % 4)] for n in range(77)]
    prompts = prompts_of(random_ids(20, 0), 4, 9)
    expected = naive_scores(model, labels, prompts)
    engine = open_for(model, prompts, labels)
    assert engine.name == "shared_prefix"
    assert all(1 < len(row.tree.paths) <= 9 for row in rows)
    assert {len(path) for row in rows for path in row.tree.paths} == {1, 2, 3}, "all but the last token, of labels of every length"
    assert_right(model, engine.score(prompts, follow_all=True).label_logprobs, labels, prompts, expected)
