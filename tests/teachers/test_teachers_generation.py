"""Answers in free text against plain step-by-step decoding: one full prompt a token, nothing shared, nothing batched."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from transformers import GenerationConfig

from pipeline.files import sha256_ids, sha256_json
from pipeline.params import CompletionParams
from pipeline.schema import Prompt
from pipeline.teachers.generation import Generator

NEVER = ("\x00never\x00",)
OTHERS = {
    "mamba": {"state_size": 4},
    "bloom": {"n_head": 4, "n_layer": 4},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
}


def random_ids(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 300, (count,), generator=generator).tolist()


def prompts_of(context, queries):
    return [Prompt((*context, *query)) for query in queries]


def write(generator, context, queries):
    """Answers to `queries` behind `context`, which they share."""
    return generator.answers(prompts_of(context, queries), context)


QUERIES = [random_ids(length, 100 + number) for number, length in enumerate((7, 3, 7, 5, 3, 7))]


def completion(**changes):
    return CompletionParams(**({"max_tokens": 10, "stop": NEVER} | changes))


@torch.no_grad()
def plain_answer(model, tokenizer, prompt, params, end_ids=(0,)):
    """Decoding from the definition; sampling adds the noise of the prompt's hash."""
    written: list[int] = []
    noise = np.random.default_rng(int(sha256_json([params.seed, sha256_ids(prompt)])[:16], 16))
    while len(written) < params.max_tokens:
        logits = model(torch.tensor([[*prompt, *written]]), use_cache=False).logits[0, -1].float()
        if params.temperature > 0:
            logits = logits / params.temperature + torch.from_numpy(noise.gumbel(size=len(logits))).float()
        written.append(int(logits.argmax()))
        if written[-1] in end_ids or any(stop in tokenizer.decode(written) for stop in params.stop):
            break
    return written


@pytest.mark.parametrize("context_tokens", [0, 1, 40])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *OTHERS])
@pytest.mark.slow
def test_greedy_answers_are_the_step_by_step_argmax(tiny_model, tokenizer, architecture, context_tokens):
    model = tiny_model(architecture, **OTHERS.get(architecture, {}))
    context, params = random_ids(context_tokens, 1), completion()
    answers = write(Generator(model, tokenizer, params), context, QUERIES)
    assert answers == [plain_answer(model, tokenizer, [*context, *query], params) for query in QUERIES]
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.slow
def test_a_window_shorter_than_the_prompt_is_kept_to(tiny_model, tokenizer):
    model, context, params = tiny_model("mistral", sliding_window=8), random_ids(40, 1), completion()
    answers = write(Generator(model, tokenizer, params), context, QUERIES)
    assert answers == [plain_answer(model, tokenizer, [*context, *query], params) for query in QUERIES]


@pytest.mark.slow
def test_a_model_s_own_sampling_habits_play_no_part(tiny_model, tokenizer):
    """Chat models come with a generation config that samples and penalises; the cache holds their plain distributions."""
    model, params = tiny_model("llama"), completion(max_tokens=24)
    expected = write(Generator(model, tokenizer, params), random_ids(9, 1), QUERIES)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=5, top_p=0.5, repetition_penalty=1.8, no_repeat_ngram_size=2, min_new_tokens=20,
        eos_token_id=0, pad_token_id=0, bad_words_ids=[[expected[0][0]]], suppress_tokens=[expected[1][0]], num_beams=3,
    )  # fmt: skip
    assert write(Generator(model, tokenizer, params), random_ids(9, 1), QUERIES) == expected
    model.generation_config = GenerationConfig(forced_eos_token_id=0, forced_bos_token_id=3, eos_token_id=0, max_length=7, max_time=0.0)
    assert write(Generator(model, tokenizer, params), random_ids(9, 1), QUERIES) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.slow
def test_an_answer_does_not_depend_on_the_others_of_its_batch(tiny_model, tokenizer, temperature):
    model, context, params = tiny_model("qwen2"), random_ids(20, 1), completion(temperature=temperature)
    together = write(Generator(model, tokenizer, params), context, QUERIES)
    alone = [write(Generator(model, tokenizer, params), context, [query])[0] for query in QUERIES]
    turned = write(Generator(model, tokenizer, params), context, QUERIES[::-1])[::-1]
    assert together == alone == turned


def test_batches_of_two_give_the_same(tiny_model, tokenizer, monkeypatch):
    model, context, params = tiny_model("llama"), random_ids(20, 1), completion()
    expected = write(Generator(model, tokenizer, params), context, QUERIES)
    monkeypatch.setattr("pipeline.teachers.generation.LARGEST_BATCH", 2)
    assert write(Generator(model, tokenizer, params), context, QUERIES) == expected


def test_an_answer_ends_with_the_token_that_completes_a_stop_text(tiny_model, tokenizer):
    model, context = tiny_model("llama"), random_ids(20, 1)
    free = write(Generator(model, tokenizer, completion()), context, QUERIES)
    stop = tokenizer.decode(free[0][:4])[-1:]
    params = completion(stop=(stop, "\x00"))
    generator = Generator(model, tokenizer, params)
    cut = write(generator, context, QUERIES)
    assert cut == [plain_answer(model, tokenizer, [*context, *query], params) for query in QUERIES]
    for whole, answer in zip(free, cut, strict=True):
        assert answer == whole[: len(answer)]
        assert stop not in tokenizer.decode(answer[:-1])
        assert len(answer) == len(whole) or stop in tokenizer.decode(answer)
    assert len(cut[0]) <= 4
    assert any(len(answer) != len(cut[0]) for answer in cut)


def test_a_stop_text_may_lie_over_several_tokens(tiny_model, tokenizer):
    model = tiny_model("llama")
    free = write(Generator(model, tokenizer, completion()), [], QUERIES)[2]
    stop = tokenizer.decode(free[2:5])
    answer = write(Generator(model, tokenizer, completion(stop=(stop,))), [], QUERIES)[2]
    assert answer == free[: len(answer)]
    assert len(answer) <= 5
    assert stop in tokenizer.decode(answer)


def test_an_answer_ends_with_any_of_the_tokens_that_end_the_model_s_text(tiny_model, tokenizer):
    model, params = tiny_model("llama"), completion()
    free = write(Generator(model, tokenizer, params), [], QUERIES)
    ends = [0, free[0][2], free[1][0]]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    generator = Generator(model, tokenizer, params)
    answers = write(generator, [], QUERIES)
    assert answers == [plain_answer(model, tokenizer, query, params, ends) for query in QUERIES]
    assert answers[1] == [ends[2]]
    assert len(answers[0]) <= 3


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_no_answer_is_longer_than_max_tokens(tiny_model, tokenizer, max_tokens):
    model = tiny_model("llama")
    answers = write(Generator(model, tokenizer, completion(max_tokens=max_tokens)), random_ids(5, 2), QUERIES)
    assert max(map(len, answers)) == max_tokens
    assert all(answers)


def test_no_query_has_no_answer(tiny_model, tokenizer):
    assert write(Generator(tiny_model("llama"), tokenizer, completion()), random_ids(5, 2), []) == []


@pytest.mark.parametrize("context_tokens", [0, 30])
def test_samples_are_those_of_the_prompt_s_own_noise(tiny_model, tokenizer, context_tokens):
    model, context, params = tiny_model("llama"), random_ids(context_tokens, 1), completion(temperature=0.7, seed=3)
    answers = write(Generator(model, tokenizer, params), context, QUERIES)
    assert answers == [plain_answer(model, tokenizer, [*context, *query], params) for query in QUERIES]


def test_a_seed_repeats_and_another_one_differs(tiny_model, tokenizer):
    model = tiny_model("llama")

    def answers(seed):
        return write(Generator(model, tokenizer, completion(temperature=2.0, seed=seed)), [], QUERIES)

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)


@pytest.mark.slow
def test_samples_follow_the_tempered_distribution(tiny_model, tokenizer):
    model, temperature, draws = tiny_model("llama"), 2.0, 400
    prompt = QUERIES[1]
    with torch.no_grad():
        p = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(-1)
    counts: Counter[int] = Counter()
    for seed in range(draws):
        counts[write(Generator(model, tokenizer, completion(temperature=temperature, seed=seed, max_tokens=1)), [], [prompt])[0][0]] += 1
    for token in p.topk(5).indices.tolist():
        sigma = math.sqrt(draws * float(p[token]) * (1 - float(p[token])))
        assert abs(counts[token] - draws * float(p[token])) < 4.5 * sigma


def test_a_context_is_read_once_where_the_model_can_share_it(tiny_model, tokenizer):
    generator = Generator(tiny_model("llama"), tokenizer, completion())
    assert generator.shares_prefix is None
    write(generator, random_ids(20, 1), QUERIES)
    assert generator.shares_prefix
    other = Generator(tiny_model("mamba", state_size=4), tokenizer, completion())
    write(other, random_ids(20, 1), QUERIES)
    assert other.shares_prefix is False


@pytest.mark.slow
def test_the_context_s_keys_are_not_written_to(tiny_model, tokenizer):
    model, params, first, second = tiny_model("llama"), completion(), random_ids(20, 1), random_ids(15, 2)
    generator = Generator(model, tokenizer, params)
    for context in (first, second, first):
        assert write(generator, context, QUERIES) == [plain_answer(model, tokenizer, [*context, *query], params) for query in QUERIES]


def test_attention_is_given_back_as_it_was(tiny_model, tokenizer):
    model = tiny_model("llama")
    before = model.config._attn_implementation
    write(Generator(model, tokenizer, completion()), random_ids(5, 2), QUERIES)
    assert model.config._attn_implementation == before
