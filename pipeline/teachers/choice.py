"""Which engine a model gets: the fast one if it gives the same numbers, the generic one otherwise, and why.

A few rows under the longest context are scored by the plain forward and by the fast path. Nothing is assumed from the architecture's
name: a model that the packed pass does not reproduce disagrees here, or refuses, and takes the generic path.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from pipeline.teachers.generic import GenericEngine
from pipeline.teachers.scores import Engine, Reading, Scores
from pipeline.teachers.shared_prefix import SharedPrefixEngine
from pipeline.models.packed import PackedModel, UnsupportedModelError
from pipeline.models.rows import Completions

TOLERANCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest difference of a log-probability at which two paths agree, by dtype: what their rounding explains."""


@dataclass(frozen=True)
class EngineChoice:
    """The engine that will run, and the reason in a sentence for the manifest."""

    engine: Engine
    reason: str


def choose_engine(
    model: PreTrainedModel,
    reading: Reading,
    token_budget: int,
    context: Sequence[int],
    queries: Sequence[Sequence[int]],
    answers: Completions | None = None,
) -> EngineChoice:
    """Probe with `queries` (a few, with their own `answers` where they have some) behind `context` (the longest there is) and choose."""
    # What is compared hangs on no threshold: neither rounded to the cache's resolution, whose steps may be larger than the tolerance, nor
    # kept or drawn as a probability falls on one side of a number or the other.
    exact = replace(reading, cache=reading.cache.model_copy(update={"encoding": "top_k_tail", "resolution_nats": None}))
    expected = GenericEngine(model, exact, token_budget).score(context, queries, answers)
    plain_attention = model.config._attn_implementation or "eager"
    tolerance = TOLERANCE_NATS.get(model.dtype, 1e-4)
    refusals = []
    for answers_only in (True, False):
        what = "the last layer on answer positions alone" if answers_only else "every layer on all tokens"
        packed = None
        try:
            packed = PackedModel(model, answers_only=answers_only)
            probed = SharedPrefixEngine(packed, exact, token_budget)
            difference = largest_difference(expected, probed.score(context, queries, answers))
        except (UnsupportedModelError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            # A foreign architecture may fail anywhere inside its own code; the reason is kept, and the generic path still works.
            refusals.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        else:
            if difference <= tolerance:
                probe = f"{len(queries)} rows under {len(context)} context tokens differ by at most {difference:.1e} nats"
                fast = SharedPrefixEngine(packed, reading, token_budget)
                return EngineChoice(fast, f"{what}; {probe} from the plain forward (allowed {tolerance:.0e})")
            refusals.append(f"{what}: differs by {difference:.1e} nats from the plain forward (allowed {tolerance:.0e})")
        if packed is not None:
            packed.detach()
        model.set_attn_implementation(plain_attention)
    return EngineChoice(GenericEngine(model, reading, token_budget), "the shared-prefix path was refused: " + "; ".join(refusals))


def largest_difference(one: Scores, other: Scores) -> float:
    """Largest absolute difference of the log-probabilities of labels, answers and most probable tokens, and of log Z, in nats."""
    pairs = [(one.label_logprobs, other.label_logprobs), (one.completion_logprobs, other.completion_logprobs)]
    pairs += [(getattr(one.encoded, name), getattr(other.encoded, name)) for name in ("topk_logprobs", "log_z")]
    return max(float((a - b).abs().max()) for a, b in pairs if a.numel())
