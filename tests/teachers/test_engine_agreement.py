"""The shared-prefix engine against the plain full-prompt forward, over architectures, context lengths and completions."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st

from pipeline.teachers.batches import plan_batches, shared_head, token_budget
from pipeline.teachers.choice import choose_engine, largest_difference
from pipeline.teachers.generic import GenericEngine
from pipeline.teachers.scores import Reading, read_scores
from pipeline.params import CacheParams

SINGLE = [[5], [9]]
MULTI = [[5], [9, 3, 7], [11, 5]]


def random_ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 300, (count,), generator=generator).tolist()


def queries_of(*lengths):
    return [random_ids(length, 100 + number) for number, length in enumerate(lengths)]


@torch.no_grad()
def naive_scores(model, completions, context, queries):
    """Straight from the definition: one full prompt at a time, each completion's tokens one after the other."""
    rows = []
    for query in queries:
        row = []
        for completion in completions:
            total = 0.0
            for place, token in enumerate(completion):
                logits = model(torch.tensor([context + query + completion[:place]])).logits[0, -1]
                total += float(logits.double().log_softmax(-1)[token])
            row.append(total)
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("completions", [SINGLE, MULTI], ids=["single", "multi"])
@pytest.mark.parametrize("context_tokens", [0, 1, 70])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "phi3", "smollm3", "olmo2"])
def test_fast_path_gives_the_plain_forward_s_numbers(tiny_model, architecture, context_tokens, completions):
    model = tiny_model(architecture)
    context, queries = random_ids(context_tokens, 1), queries_of(9, 3, 17, 1, 9)
    expected = naive_scores(model, completions, context, queries)
    choice = choose_engine(model, Reading(completions, CacheParams(top_k=8)), 24, context, queries[:2])
    assert choice.engine.name == "shared_prefix", choice.reason
    scores = choice.engine.score(context, queries)
    assert float((scores.label_logprobs - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generic_path_gives_the_plain_forward_s_numbers(tiny_model, architecture):
    model = tiny_model(architecture)
    context, queries = random_ids(30, 1), queries_of(4, 9, 4, 2)
    scores = GenericEngine(model, Reading(MULTI, CacheParams(top_k=8)), 100).score(context, queries)
    assert float((scores.label_logprobs - naive_scores(model, MULTI, context, queries)).abs().max()) < 1e-4


@pytest.mark.parametrize("encoding", ["top_k", "top_k_tail", "sampled", "hybrid", "full"])
def test_the_fast_path_is_found_right_whatever_is_kept(tiny_model, encoding):
    context, queries = random_ids(30, 1), queries_of(4, 9, 2)
    reading = Reading(SINGLE, CacheParams(encoding=encoding, top_k=400, samples=300))
    assert choose_engine(tiny_model("llama"), reading, 64, context, queries).engine.name == "shared_prefix"


def test_batching_does_not_change_the_numbers(tiny_model):
    model = tiny_model("llama")
    context, queries = random_ids(40, 2), queries_of(*range(1, 30))
    engine = choose_engine(model, Reading(MULTI, CacheParams(top_k=8)), 64, context, queries[:2]).engine
    engine.token_budget = 1
    one_by_one = engine.score(context, queries)
    engine.token_budget = 10_000
    assert largest_difference(one_by_one, engine.score(context, queries)) < 1e-4


def test_a_window_shorter_than_the_prompt_takes_the_generic_path(tiny_model):
    model = tiny_model("mistral", sliding_window=16)
    context, queries = random_ids(40, 3), queries_of(5, 6)
    expected = naive_scores(model, SINGLE, context, queries)
    choice = choose_engine(model, Reading(SINGLE, CacheParams(top_k=8)), 64, context, queries)
    assert choice.engine.name == "generic"
    assert "sliding window of 16" in choice.reason
    assert float((choice.engine.score(context, queries).label_logprobs - expected).abs().max()) < 1e-4


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
def test_architectures_that_do_not_fit_take_the_generic_path_and_are_right(tiny_model, architecture):
    settings, why = UNFITTING[architecture]
    model = tiny_model(architecture, **settings)
    context, queries = random_ids(40, 3), queries_of(5, 6)
    expected = naive_scores(model, SINGLE, context, queries)
    choice = choose_engine(model, Reading(SINGLE, CacheParams(top_k=8)), 64, context, queries)
    assert choice.engine.name == "generic", choice.reason
    assert choice.reason.startswith("the shared-prefix path was refused")
    assert why in choice.reason
    assert float((choice.engine.score(context, queries).label_logprobs - expected).abs().max()) < 1e-4


def opened(head, *lengths):
    return [head + query for query in queries_of(*lengths)]


@pytest.mark.parametrize("head_tokens", [1, 12])
@pytest.mark.parametrize("context_tokens", [0, 20])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt2"])
def test_tokens_that_all_queries_begin_with_change_no_number(tiny_model, architecture, context_tokens, head_tokens):
    model = tiny_model(architecture)
    context, queries = random_ids(context_tokens, 1), opened(random_ids(head_tokens, 8), 6, 7, 3)
    expected = naive_scores(model, MULTI, context, queries)
    engine = choose_engine(model, Reading(MULTI, CacheParams(top_k=8)), 64, context, queries).engine
    assert engine.name == "shared_prefix"
    assert float((engine.score(context, queries).label_logprobs - expected).abs().max()) < 1e-4


def test_scores_do_not_depend_on_what_was_scored_before(tiny_model):
    model = tiny_model("llama")
    context, queries = random_ids(20, 1), opened(random_ids(5, 8), 6, 7)
    engine = choose_engine(model, Reading(SINGLE, CacheParams(top_k=8)), 64, context, queries).engine
    first = engine.score(context, queries)
    for others in (opened(random_ids(90, 9), 3, 4), queries[:1], opened(random_ids(3, 10), 5, 5)):
        engine.score(context, others)
    assert largest_difference(first, engine.score(context, queries)) == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_a_head_is_the_longest_that_all_begin_with_and_leaves_each_a_token(queries):
    head = shared_head(queries)
    assert all(query[:head] == queries[0][:head] and len(query) > head for query in queries)
    assert any(query[: head + 1] != queries[0][: head + 1] or len(query) == head + 1 for query in queries)


def test_a_second_context_is_not_answered_from_the_first(tiny_model):
    model = tiny_model("llama")
    first, second, queries = random_ids(20, 1), random_ids(20, 2), queries_of(6, 7)
    expected = naive_scores(model, SINGLE, second, queries)
    engine = choose_engine(model, Reading(SINGLE, CacheParams(top_k=8)), 64, first, queries).engine
    engine.score(first, queries)
    assert float((engine.score(second, queries).label_logprobs - expected).abs().max()) < 1e-4


def test_a_context_of_8192_tokens_works_on_a_model_that_takes_it(tiny_model):
    model = tiny_model("llama", max_position_embeddings=8300)
    reading = Reading(SINGLE, CacheParams(top_k=8))
    choice = choose_engine(model, reading, 64, random_ids(8192, 4), queries_of(20, 31))  # compares the two paths
    assert choice.engine.name == "shared_prefix", choice.reason


def test_bfloat16_agrees_within_its_rounding(tiny_model):
    model = tiny_model("llama").to(torch.bfloat16)
    context, queries = random_ids(40, 5), queries_of(20, 31)
    assert choose_engine(model, Reading(SINGLE, CacheParams(top_k=8)), 64, context, queries).engine.name == "shared_prefix"


def read(logits, top_k):
    """Single-token labels 1 and 2, one answer position a row."""
    return read_scores(
        logits,
        Reading([[1], [2]], CacheParams(encoding="top_k_tail", top_k=top_k, resolution_nats=None)),
        None,
        [np.zeros(1)] * len(logits),
    )


def test_head_and_tail_make_the_whole_distribution():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 4
    scores = read(logits, 7)
    full = logits.double().log_softmax(-1)
    assert torch.allclose(scores.encoded.topk_logprobs.double(), full.topk(7).values, atol=1e-5)
    assert torch.allclose(scores.encoded.topk_logprobs.exp().sum(-1) + scores.encoded.tail_mass, torch.ones(6), atol=1e-5)
    assert torch.allclose(scores.encoded.log_z, logits.logsumexp(-1))
    assert torch.allclose(scores.label_logprobs.double(), full[:, [1, 2]], atol=1e-5)


def test_top_k_past_the_vocabulary_keeps_everything():
    scores = read(torch.randn(2, 5), 50)
    assert scores.encoded.topk_ids.shape == (2, 5)
    assert torch.equal(scores.encoded.tail_mass, torch.zeros(2))


def test_minus_infinity_logits_stay_finite_where_they_are_not_asked_for():
    logits = torch.randn(3, 10)
    logits[:, 7:] = -torch.inf
    scores = read(logits, 4)
    assert torch.isfinite(scores.label_logprobs).all()
    assert torch.isfinite(scores.encoded.tail_mass).all()


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
    assert token_budget(model, 1 << 40) >= token_budget(model, 1 << 20) >= 64
    assert token_budget(model.to("meta"), 1 << 40) == 4 * token_budget(tiny_model("llama"), 1 << 40)  # the meta device stands for a GPU
    assert token_budget(model, sum(p.numel() * p.element_size() for p in model.parameters())) == 64
