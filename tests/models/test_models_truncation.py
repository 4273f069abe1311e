"""Cut models against a forward in which the other layers are skipped, in memory and read back from disk."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.models.folders import cut_layers, load_model, parse_layers, save_model
from pipeline.models.packed import decoder_layers

IDS = torch.tensor([[5, 9, 3, 7, 11, 5, 260, 41, 8, 120, 77, 31]])
WITH_LISTS = {  # architectures whose layers differ by a list in the config
    "gemma3_text": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1, 0]},
}


@torch.no_grad()
def skipping_logits(model, kept):
    """Straight from the definition: the whole model, in which a layer that is not kept hands on what it was given."""
    hooks = []
    for number, layer in enumerate(decoder_layers(model)):
        if number not in kept:
            skip = lambda _, args, out: (args[0], *out[1:]) if isinstance(out, tuple) else args[0]  # noqa: E731
            hooks.append(layer.register_forward_hook(skip))
    try:
        return model(IDS, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def logits(model):
    return model(IDS, use_cache=False).logits


def test_layers_are_read_as_numbers_and_ranges():
    assert parse_layers("0-19, 26-29", 30) == [*range(20), *range(26, 30)]
    assert parse_layers("3", 4) == [3]
    assert parse_layers(" 0 ,1 - 2,  3 ", 4) == [0, 1, 2, 3]
    assert parse_layers("2-2", 4) == [2]


@given(st.sets(st.integers(0, 29), min_size=1))
def test_any_choice_of_layers_can_be_written(layers):
    assert parse_layers(", ".join(map(str, sorted(layers))), 30) == sorted(layers)


@pytest.mark.parametrize("text", ["", "a", "0,", "0-", "-1", "0--2", "1.5", "0 2", "0-1-2", "0;1"])
def test_what_is_neither_a_layer_nor_a_range_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"is neither a layer nor a range\. Write for example `0-19, 26-29`"):
        parse_layers(text, 4)


@pytest.mark.parametrize("text", ["4", "0-4", "0, 7", "1, 1", "0-2, 2-3", "2, 1", "3-1"])
def test_layers_that_are_not_there_or_repeat_or_go_backwards_are_refused(text):
    with pytest.raises(UsageError, match=rf"'{text}' must name layers between 0 and 3, each once, in rising order"):
        parse_layers(text, 4)


@pytest.mark.parametrize("text", ["0-1, 3-2", "3-2, 3"])
def test_a_range_that_goes_backwards_is_refused_beside_others(text):
    with pytest.raises(UsageError, match="rising order"):
        parse_layers(text, 4)


@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [0, 3], [0, 1, 3], [2]], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_any_layers_may_be_kept(tiny_model, architecture, kept):
    model = tiny_model(architecture)
    expected = skipping_logits(model, kept)
    cut_layers(model, kept)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers == len(kept)
    assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3_text", "smollm3"])
def test_a_cut_model_is_the_whole_one_with_layers_skipped_and_stays_so_on_disk(tiny_model, tokenizer, tmp_path, architecture):
    model = tiny_model(architecture, **WITH_LISTS.get(architecture, {}))
    expected = skipping_logits(model, [0, 2, 3])
    whole = logits(model)
    assert cut_layers(model, [0, 2, 3]) is model
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(logits(model), whole, atol=1e-2)
    save_model(model, tokenizer, tmp_path / "cut")
    loaded = load_model(tmp_path / "cut")
    assert len(decoder_layers(loaded)) == loaded.config.num_hidden_layers == 3
    assert torch.allclose(logits(loaded), expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text"])
def test_a_cut_model_still_goes_on_from_its_cache(tiny_model, architecture):
    model = cut_layers(tiny_model(architecture, **WITH_LISTS.get(architecture, {})), [0, 2, 3])
    cached = model(IDS[:, :-3], use_cache=True).past_key_values
    assert torch.allclose(model(IDS[:, -3:], past_key_values=cached).logits, logits(model)[:, -3:], atol=1e-5)


@pytest.mark.parametrize("architecture", ["gemma3_text", "qwen3"])
def test_lists_for_each_layer_are_cut_with_the_layers(tiny_model, architecture):
    model = tiny_model(architecture, **WITH_LISTS[architecture])
    before = copy.deepcopy(model.config.layer_types)
    cut_layers(model, [0, 1, 3])
    assert model.config.layer_types == [before[0], before[1], before[3]]


def test_lists_that_are_not_for_each_layer_stay(tiny_model):
    model = tiny_model("llama", eos_token_id=[0, 1, 2, 3])
    cut_layers(model, [0, 3])
    assert model.config.eos_token_id == [0, 1, 2, 3]


def test_cutting_twice_is_cutting_once(tiny_model):
    twice = cut_layers(cut_layers(tiny_model("llama"), [0, 1, 3]), [0, 2])
    assert torch.equal(logits(twice), logits(cut_layers(tiny_model("llama"), [0, 3])))


def test_a_layer_that_is_not_there_leaves_the_model_whole(tiny_model):
    model = tiny_model("llama")
    before = logits(model)
    with pytest.raises(IndexError):
        cut_layers(model, [0, 4])
    assert torch.equal(logits(model), before)
