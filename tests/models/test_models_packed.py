"""The packed pass against full prompts, logit by logit, and its attention against the definition; what it cannot do is refused."""

import pytest
import torch

from pipeline.models import packed
from pipeline.models.packed import PackedModel, Row, UnsupportedModelError, attention_with_lse, decoder_layers, merge, pack, tree_of

SEVERAL = ["llama", "gpt2", "opt", "qwen2", "gpt_neox", "mistral"]
RESHAPING = {("gpt2", True)}  # reshapes by the sequence length, so its last layer does not run on answer positions alone


def random_ids(count, seed):
    return torch.randint(1, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


ROWS = [
    Row(random_ids(9, 1), tree_of([[3, 7, 1], [5, 1], [3, 8, 1], [3, 7, 2, 1]])),
    Row(random_ids(1, 2)),
    Row(random_ids(14, 3), tree_of([[11, 1], [12, 13, 14, 1], [11, 12, 1]])),
    Row(random_ids(5, 4)),
]
CONTEXT = random_ids(23, 5)


def random_tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def naive_attention(query, key, value, scale, allowed=None):
    """One query of one head at a time, in float64: softmax of the scaled products over the keys that it may see."""
    batch, heads, queries, _ = query.shape
    out = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    lse = torch.zeros(batch, heads, queries, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                seen = [k for k in range(key.shape[2]) if allowed is None or allowed[b, q, k]]
                scores = [float(query[b, h, q].double() @ key[b, h, k].double()) * scale for k in seen]
                weights = torch.tensor(scores, dtype=torch.float64).exp()
                lse[b, h, q] = weights.sum().log()
                out[b, h, q] = sum(w / weights.sum() * value[b, h, k].double() for w, k in zip(weights, seen, strict=True))
    return out.float(), lse.float()


@torch.no_grad()
def naive_logits(model, context, rows):
    """Every answer position as the last token of a full prompt of its own."""
    found = []
    for row in rows:
        continued = [list(row.query)]
        for token, parent in zip(row.tree.tokens, row.tree.parents, strict=True):
            continued.append([*continued[parent + 1], token])
        for prompt in continued:
            found.append(model(torch.tensor([[*context, *prompt]]), use_cache=False).logits[0, -1])
    return torch.stack(found)


@torch.no_grad()
def packed_logits(packed_model, context, rows):
    return packed_model.logits(pack(rows, len(context)), packed_model.read_context(context))


def test_attention_is_the_softmax_of_the_definition():
    query, key, value = random_tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8))
    out, lse = attention_with_lse(query, key, value, causal=False, scale=0.3)
    expected_out, expected_lse = naive_attention(query, key, value, 0.3)
    assert torch.allclose(out, expected_out, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def test_causal_attention_sees_nothing_later():
    query, key, value = random_tensors((2, 3, 6, 8), (2, 3, 6, 8), (2, 3, 6, 8))
    out, lse = attention_with_lse(query, key, value, causal=True, scale=0.5)
    expected_out, expected_lse = naive_attention(query, key, value, 0.5, torch.ones(2, 6, 6).tril().bool())
    assert torch.allclose(out, expected_out, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


def test_masked_attention_sees_what_the_mask_leaves():
    query, key, value = random_tensors((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), seed=1)
    allowed = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    allowed[..., 0] = True
    mask = torch.zeros(2, 1, 5, 7).masked_fill(~allowed[:, None], -torch.inf)
    out, lse = attention_with_lse(query, key, value, causal=False, scale=0.5, mask=mask)
    expected_out, expected_lse = naive_attention(query, key, value, 0.5, allowed)
    assert torch.allclose(out, expected_out, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2, 6])
def test_grouped_heads_share_their_key_head_in_order(key_heads):
    query, key, value = random_tensors((2, 6, 5, 8), (2, key_heads, 5, 8), (2, key_heads, 5, 8), seed=3)
    out, lse = attention_with_lse(query, key, value, causal=True, scale=0.5)
    repeated = (x.repeat_interleave(6 // key_heads, 1) for x in (key, value))
    expected_out, expected_lse = naive_attention(query, *repeated, 0.5, torch.ones(2, 5, 5).tril().bool())
    assert torch.allclose(out, expected_out, atol=1e-5)
    assert torch.allclose(lse, expected_lse, atol=1e-5)


@pytest.mark.parametrize("largeness", [1.0, 30.0])
@pytest.mark.parametrize("first", [1, 4, 8])
def test_attention_over_two_parts_of_the_keys_merges_to_that_over_all(first, largeness):
    query, key, value = random_tensors((1, 3, 5, 8), (1, 3, 9, 8), (1, 3, 9, 8), seed=4)
    query *= largeness

    def part(keys):
        out, lse = attention_with_lse(query, key[:, :, keys], value[:, :, keys], causal=False, scale=1.0)
        return out[0].transpose(0, 1), lse[0].t()

    merged = merge(part(slice(first, None)), part(slice(first)))
    assert torch.allclose(merged, naive_attention(query, key, value, 1.0)[0][0].transpose(0, 1), atol=1e-4)


@pytest.mark.parametrize("context", [[], CONTEXT], ids=["bare", "context"])
@pytest.mark.parametrize(
    ("architecture", "answers_only"), [(name, only) for name in SEVERAL for only in (True, False) if (name, only) not in RESHAPING]
)
def test_packed_logits_are_those_of_full_prompts(tiny_model, architecture, context, answers_only):
    expected = naive_logits(tiny_model(architecture), context, ROWS)
    found = packed_logits(PackedModel(tiny_model(architecture), answers_only=answers_only), context, ROWS)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_last_layer_that_does_not_run_on_answer_positions_alone_fails_and_gives_no_numbers(tiny_model):
    with pytest.raises(RuntimeError, match="shape"):
        packed_logits(PackedModel(tiny_model("gpt2"), answers_only=True), CONTEXT, ROWS)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_any_number_of_key_heads_gives_the_numbers_of_full_prompts(tiny_model, key_heads):
    expected = naive_logits(tiny_model("llama", num_key_value_heads=key_heads), CONTEXT, ROWS)
    packed_model = PackedModel(tiny_model("llama", num_key_value_heads=key_heads))
    assert packed_model.read_context(CONTEXT)[0][0].shape == (1, key_heads, len(CONTEXT), 8)
    assert torch.allclose(packed_logits(packed_model, CONTEXT, ROWS), expected, atol=1e-4)


@torch.no_grad()
def test_rows_do_not_see_each_other(tiny_model):
    packed_model = PackedModel(tiny_model("llama"))
    alone = torch.cat([packed_logits(packed_model, CONTEXT, [row]) for row in ROWS])
    assert torch.allclose(packed_logits(packed_model, CONTEXT, ROWS), alone, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 7, 23])
@pytest.mark.parametrize("architecture", ["llama", "opt", "gpt_neox"])
def test_a_context_read_in_chunks_gives_the_numbers_of_full_prompts(tiny_model, monkeypatch, architecture, chunk):
    monkeypatch.setattr(packed, "CHUNK", chunk)
    expected = naive_logits(tiny_model(architecture), CONTEXT, ROWS)
    assert torch.allclose(packed_logits(PackedModel(tiny_model(architecture)), CONTEXT, ROWS), expected, atol=1e-4)


def test_an_empty_context_has_no_keys(tiny_model):
    assert PackedModel(tiny_model("llama")).read_context([]) == []


def test_a_detached_model_answers_as_before(tiny_model):
    model = tiny_model("llama")
    expected = naive_logits(model, CONTEXT, ROWS)
    packed_model = PackedModel(model)
    packed_logits(packed_model, CONTEXT, ROWS)
    packed_model.detach()
    assert torch.equal(naive_logits(model, CONTEXT, ROWS), expected)


def test_a_window_as_long_as_the_prompt_fits(tiny_model):
    longest = len(CONTEXT) + 14 + 3
    expected = naive_logits(tiny_model("mistral"), CONTEXT, ROWS)
    packed_model = PackedModel(tiny_model("mistral", sliding_window=longest))
    assert torch.allclose(packed_logits(packed_model, CONTEXT, ROWS), expected, atol=1e-4)


def test_a_window_shorter_than_the_prompt_is_refused(tiny_model):
    packed_model = PackedModel(tiny_model("mistral", sliding_window=len(CONTEXT) + 16))
    with pytest.raises(UnsupportedModelError, match="a sliding window of 39 tokens, shorter than the prompt of 40"):
        packed_logits(packed_model, CONTEXT, ROWS)


def test_a_window_shorter_than_the_context_is_refused_when_it_is_read(tiny_model):
    with pytest.raises(UnsupportedModelError, match="a sliding window of 22 tokens, shorter than the prompt of 23"):
        PackedModel(tiny_model("mistral", sliding_window=22)).read_context(CONTEXT)


def test_soft_capped_scores_are_refused(tiny_model):
    with pytest.raises(UnsupportedModelError, match="soft-capped attention scores"):
        PackedModel(tiny_model("gemma2", num_key_value_heads=2, head_dim=8)).read_context(CONTEXT)


def test_attention_dropout_is_refused(tiny_model):
    model = tiny_model("llama", attention_dropout=0.1).train()
    with pytest.raises(UnsupportedModelError, match="attention dropout"):
        PackedModel(model).read_context(CONTEXT)


@pytest.mark.parametrize(("architecture", "changes"), [("falcon", {}), ("mamba", {"state_size": 4})])
@pytest.mark.parametrize("answers_only", [True, False], ids=["answers_only", "all_tokens"])
def test_a_model_whose_attention_is_not_reached_is_refused_and_not_answered(tiny_model, architecture, changes, answers_only):
    with pytest.raises(UnsupportedModelError):
        packed_logits(PackedModel(tiny_model(architecture, **changes), answers_only=answers_only), [], ROWS[:2])


def test_a_config_of_another_depth_has_no_layers(tiny_model):
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no list of 7 layers"):
        decoder_layers(model)
