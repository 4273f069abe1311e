"""Head-only training without the model below the head.

Where nothing but the head is learnt, what it is given for an example never changes. So the body runs once over all examples that the steps
will take, and each step multiplies a few stored vectors by the head. The order and the batches of that one pass follow from the rows
alone, so that an interrupted run computes the same vectors again.

The trade-off: the vectors stay in memory, one of the model's width for each answer position: 2 MB for 800 examples of SmolLM2-135M.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.rows import Completions
from pipeline.students.forward import TOLERANCE_NATS, Forward, Rows
from pipeline.students.objectives import label_log_probabilities, positions_per_row

TOKENS_A_PASS = 2048
Item = TypeVar("Item")


def on_stored_vectors(model: PreTrainedModel, forward: Forward, completions: Completions, rows: Rows, expected: Tensor) -> Forward:
    """The packed forward over `rows` and no others, with the body run once for each.

    `expected` are the plain forward's numbers for the first of `rows`. Where the model does something between head and logits, and so the
    head alone gives other numbers, or where the forward is not packed, `forward` itself is returned.
    """
    if forward.name != "packed":
        return forward
    vectors = _vectors(model, forward, rows, positions_per_row(completions))
    head: Any = model.get_output_embeddings()

    def run(wanted: Rows) -> Tensor:
        logits = head(torch.cat([vectors[tuple(row)] for row in wanted]))
        return label_log_probabilities(logits, completions)

    with torch.no_grad():
        difference = float((run(rows[: len(expected)]) - expected).abs().max())
    if difference > TOLERANCE_NATS:
        return forward
    return Forward(forward.name, f"{forward.why}; the body once for each example, then the head alone", run, forward.detach)


@torch.no_grad()
def _vectors(model: PreTrainedModel, forward: Forward, rows: Rows, positions: int) -> dict[tuple[int, ...], Tensor]:
    """Row → what the head is given at its answer positions, [positions, width]."""
    vectors: dict[tuple[int, ...], Tensor] = {}
    given: list[Tensor] = []
    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    try:
        for batch in token_batches(sorted({tuple(row) for row in rows}, key=lambda row: (len(row), row)), len):
            given.clear()
            forward.run(batch)
            vectors |= zip(batch, given[0].flatten(0, -2).reshape(len(batch), positions, -1).clone(), strict=True)
    finally:
        hook.remove()
    return vectors


def token_batches(rows: Sequence[Item], length: Callable[[Item], int]) -> list[list[Item]]:
    """Rows in runs of at most `TOKENS_A_PASS` tokens, or one row where it is longer."""
    batches: list[list[Item]] = []
    tokens = 0
    for row in rows:
        if not batches or tokens + length(row) > TOKENS_A_PASS:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += length(row)
    return batches
