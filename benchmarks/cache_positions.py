"""Real positions for the cache's benchmark: what the model says next in real reviews, with and without demonstrations in front.

The teacher reads a context of 16 demonstrations before each review, the student the review alone; positions are paired by the review's own
tokens. A few of each review's positions are kept, spread over its tokens, and its answer position, where the label follows.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models.folders import load_model, load_tokenizer
from pipeline.models.packed import PackedModel, Row, pack, tree_of
from pipeline.params import load_params
from pipeline.schema import NO_CONTEXT, read_contexts, read_examples
from pipeline.task import Task, TaskTokens

MODEL = Path("artifacts/models/smollm2")
EXAMPLES = Path("artifacts/data/transfer.parquet")
CONTEXTS = Path("artifacts/data/contexts/orders.parquet")
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
    task = Task(load_params().task)
    tokens = TaskTokens(task, load_tokenizer(MODEL))
    examples = read_examples(EXAMPLES, task.fields)[:reviews]
    model = PackedModel(load_model(MODEL), answers_only=False)
    queries = [list(prompt.ids) for prompt in tokens.prompts(NO_CONTEXT, examples)]
    whole = [list(prompt.ids) for prompt in tokens.prompts(read_contexts(CONTEXTS)[0], examples)]
    start = len(whole[0]) - len(queries[0])  # no token reaches over the seam of this template
    return Positions(_logits(model, whole[0][:start], queries, each), _logits(model, [], queries, each), each)


def _logits(model: PackedModel, context: list[int], queries: list[list[int]], each: int) -> Tensor:
    prefix, parts = model.read_context(context), []
    for start in range(0, len(queries), REVIEWS_A_PASS):
        batch = queries[start : start + REVIEWS_A_PASS]
        packed = pack([Row(query[:1], tree_of([[*query[1:], 0]])) for query in batch], len(context))  # every node gives logits
        logits = model.logits(packed, prefix)
        first = 0
        for query in batch:
            wanted = torch.linspace(LEAD, len(query) - 1 - TRAIL, each - 1).round().long().tolist()
            parts.append(logits[[first + place for place in [*wanted, len(query) - 1]]].float())
            first += len(query)
    return torch.cat(parts)
