"""Real positions for the cache's benchmark: what the model says next in real reviews, with and without demonstrations in front.

The teacher reads a context of 16 demonstrations before each review, the student the review alone; positions are paired by the review's own
tokens. A few of each review's positions are kept, spread over its tokens, and its answer position, where the label follows.
"""

from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.packed import PackedModel
from pipeline.models.rows import Row, pack

MODEL = Path("artifacts/models/smollm2")
EXAMPLES = Path("artifacts/data/transfer.parquet")
CONTEXTS = Path("artifacts/data/contexts/orders.parquet")
QUERY = "\n\nReview: {text}\nSentiment:"
LEAD, TRAIL = 4, 4
"""Tokens of the query before and after the review's own, about."""
REVIEWS_A_PASS = 8


@dataclass(frozen=True)
class Positions:
    """Logits of P positions, R reviews with the same number of positions each; the last of each is the answer's."""

    teacher: Tensor  # [P, V] float32
    student: Tensor  # [P, V] float32
    each: int
    """Positions of a review."""


@torch.inference_mode()
def real_positions(reviews: int, each: int) -> Positions:
    """`each` positions of each of the first `reviews` examples of the transfer set."""
    tokenizer = load_tokenizer(MODEL)
    context = tokenizer(pl.read_parquet(CONTEXTS)["text"][0], add_special_tokens=False)["input_ids"]
    texts = pl.read_parquet(EXAMPLES)["text"].head(reviews).to_list()
    queries = [tokenizer(QUERY.format(text=text), add_special_tokens=False)["input_ids"] for text in texts]
    model = PackedModel(load_model(MODEL), answers_only=False)
    return Positions(_logits(model, context, queries, each), _logits(model, [], queries, each), each)


def _logits(model: PackedModel, context: list[int], queries: list[list[int]], each: int) -> Tensor:
    prefix, parts = model.read_context(context), []
    for start in range(0, len(queries), REVIEWS_A_PASS):
        batch = queries[start : start + REVIEWS_A_PASS]
        packed = pack([Row(query[:1], (query[1:],)) for query in batch], len(context))  # a branch gives logits at every token
        logits = model.logits(packed, prefix)
        first = 0
        for query in batch:
            wanted = torch.linspace(LEAD, len(query) - 1 - TRAIL, each - 1).round().long().tolist()
            parts.append(logits[[first + place for place in [*wanted, len(query) - 1]]].float())
            first += len(query)
    return torch.cat(parts)
