"""Answers in free text, written by a model: transformers' own `generate`, on prompts of one length at a time, so that nothing is padded.

The keys and values of what all prompts begin with are computed once and copied for the rows of a batch; a model that does not give the same
answer that way (probed on the first prompt) reads whole prompts. Sampling is by the Gumbel-max trick with noise from each prompt's hash: an
answer depends neither on its batch nor on a generator's state.
"""

import copy
from collections.abc import Collection, Sequence
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList

from pipeline.files import sha256_json
from pipeline.params import CompletionParams
from pipeline.schema import Prompt

LARGEST_BATCH = 32
CACHE_BYTES = 512 << 20  # keys and values of all rows of a batch, with their copies of the prefix


class Generator:
    """Writes answers with one model; its attention implementation is set to a plain one for the time of a call."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, params: CompletionParams, end_ids: Sequence[int] = ()) -> None:
        """`end_ids` end an answer beside the tokens that end the model's text."""
        self.model = model
        self.tokenizer = tokenizer
        self.params = params
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.end_ids: list[int] = [*([] if ends is None else [ends] if isinstance(ends, int) else ends), *end_ids]
        self.shares_prefix: bool | None = None  # whether a prefix's keys and values serve the prompts behind it; None before the first one
        self._held: tuple[tuple[int, ...], DynamicCache] | None = None

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Prompt], shared: Sequence[int] = ()) -> list[list[int]]:
        """Token ids of the answer to each prompt, in order, 1 to `max_tokens` each. All prompts begin with `shared` and have more."""
        found: list[list[int]] = [[] for _ in prompts]
        attention, habits = self.model.config._attn_implementation or "eager", self.model.generation_config
        self.model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
        self.model.generation_config = GenerationConfig()  # what `_write` leaves open is filled from here: a chat model's penalties, beams
        try:
            prefix = self._prefix(tuple(shared), prompts[0]) if shared and prompts else None
            order = sorted(range(len(prompts)), key=lambda number: (len(prompts[number].ids), prompts[number].ids))
            for length, numbers in groupby(order, key=lambda number: len(prompts[number].ids)):
                size = self._batch_size(length + self.params.max_tokens)
                while batch := list(islice(numbers, size)):
                    for number, answer in zip(batch, self._write([prompts[number] for number in batch], prefix), strict=True):
                        found[number] = answer
        finally:
            self.model.generation_config = habits
            self.model.set_attn_implementation(attention)
        return found

    def _prefix(self, shared: tuple[int, ...], prompt: Prompt) -> DynamicCache | None:
        """The shared tokens' keys and values, if the model answers the same behind them as behind the whole prompt."""
        if self.shares_prefix is False:
            return None
        if self._held is None or self._held[0] != shared:
            self._held = None  # frees the old one before the new one is made
            tokens = torch.tensor([shared], device=self.model.device)
            cache = self.model(input_ids=tokens, use_cache=True, logits_to_keep=1).get("past_key_values")
            if not isinstance(cache, DynamicCache):
                self.shares_prefix = False
                return None
            if self.shares_prefix is None:
                self.shares_prefix = self._write([prompt], cache) == self._write([prompt], None)
            self._held = (shared, cache)
        return self._held[1] if self.shares_prefix else None

    def _batch_size(self, tokens: int) -> int:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row = 2 * config.num_hidden_layers * heads * size * self.model.dtype.itemsize * tokens
        return max(1, min(LARGEST_BATCH, CACHE_BYTES // row))

    def _write(self, prompts: Sequence[Prompt], prefix: DynamicCache | None) -> list[list[int]]:
        """Answers to prompts of one length, which begin with the tokens of `prefix`."""
        tokens = torch.tensor([prompt.ids for prompt in prompts], device=self.model.device)
        settings = GenerationConfig(
            max_new_tokens=self.params.max_tokens,
            do_sample=False,
            eos_token_id=self.end_ids or None,
            pad_token_id=self.end_ids[0] if self.end_ids else 0,
            use_cache=True,
        )
        cache = copy.deepcopy(prefix)
        if cache is not None:
            cache.batch_repeat_interleave(len(prompts))
        processors = LogitsProcessorList([_Gumbel(prompts, self.params)] if self.params.temperature > 0 else [])
        model: Any = self.model
        out = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=settings,
            past_key_values=cache,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Ended(self, tokens.shape[1])]),
        )
        return [self._cut(row) for row in out[:, tokens.shape[1] :].tolist()]

    def _cut(self, written: list[int]) -> list[int]:
        """What was written up to its end: a row that ended before others of its batch was padded."""
        return next((written[:count] for count in range(1, len(written)) if self.has_ended(written[:count])), written)

    def has_ended(self, written: Sequence[int]) -> bool:
        """Whether the last token ends the model's text or completes a stop text."""
        return has_ended(written, self.end_ids, self.params.stop, self.tokenizer)


def has_ended(written: Sequence[int], end_ids: Collection[int], stops: Sequence[str], tokenizer: Any) -> bool:
    """Whether the last token of an answer is one of `end_ids` or completes a stop text."""
    return written[-1] in end_ids or any(stop in tokenizer.decode(list(written)) for stop in stops)


class _Ended(StoppingCriteria):
    def __init__(self, generator: Generator, start: int) -> None:
        self.generator, self.start = generator, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        rows = input_ids[:, self.start :].tolist()
        return torch.tensor([self.generator.has_ended(row) for row in rows], device=input_ids.device)


class _Gumbel(LogitsProcessor):
    """Logits over the temperature plus Gumbel noise: the largest is a draw from the tempered distribution."""

    def __init__(self, prompts: Sequence[Prompt], params: CompletionParams) -> None:
        seeds = [sha256_json([params.seed, prompt.prompt_sha]) for prompt in prompts]
        self.generators = [np.random.default_rng(int(seed[:16], 16)) for seed in seeds]
        self.temperature = params.temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]  # noqa: ARG002
        noise = np.stack([generator.gumbel(size=scores.shape[-1]) for generator in self.generators])
        return scores.float() / self.temperature + torch.from_numpy(noise).to(scores.device, torch.float32)
