"""Batch plans: which rows share a forward pass. They follow from content alone, so that a resumed run scores what an unbroken one would."""

from collections.abc import Sequence
from itertools import accumulate, takewhile

from transformers import PreTrainedModel

LARGEST_BUDGET = 1024
"""Tokens a pass on a CPU: enough for products to run at full rate; with more, results leave the caches (measured on SmolLM2-135M)."""
LARGEST_GPU_BUDGET = 4096
"""Tokens a pass on a GPU, whose products need far more rows to run at full rate. Not measured."""
ACTIVATIONS, GPU_ACTIVATIONS = 512 << 20, 4 << 30
"""Bytes that a pass may take for what it computes, at most."""


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Row numbers of each batch: rows in rising order of length, as many as fit `token_budget` tokens and at least one.

    Rows of like length stand together, so that the small padded part of the attention has next to no padding. The last two batches share
    their rows evenly: a last one of a few tokens would read all weights for little.
    """
    batches: list[list[int]] = []
    tokens = 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], row)):
        if not batches or tokens + lengths[row] > token_budget:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += lengths[row]
    if len(batches) < 2:
        return batches
    rows = batches[-2] + batches[-1]
    ends = list(accumulate(lengths[row] for row in rows))
    cut = min(range(1, len(rows)), key=lambda place: max(ends[place - 1], ends[-1] - ends[place - 1]))
    return [*batches[:-2], rows[:cut], rows[cut:]]


def shared_head(queries: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all queries begin with; each keeps one of its own, for its answer position."""
    first, last = min(map(tuple, queries)), max(map(tuple, queries))  # what the first and the last in order share, all share
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return min(sum(1 for _ in alike), min(map(len, queries)) - 1)


def token_budget(model: PreTrainedModel, memory_bytes: int) -> int:
    """Tokens a pass may have for its activations to stay within an eighth of `memory_bytes`, half of what the weights leave, and under
    512 MB (4 GB on a GPU). It follows from the device and the model alone, not from what else runs there: batches, and so a row's last
    bits, follow from it.

    Counted for each token: about ten vectors of the hidden size and four of the inner size, and the logits of one answer position in 16
    tokens, twice.
    """
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden)
    per_token = (10 * hidden + 4 * inner) * model.dtype.itemsize + 2 * 4 * int(config.vocab_size) // 16
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    largest, most = (LARGEST_BUDGET, ACTIVATIONS) if model.device.type == "cpu" else (LARGEST_GPU_BUDGET, GPU_ACTIVATIONS)
    return max(64, min(largest, min(memory_bytes // 8, max(0, memory_bytes - weights) // 2, most) // per_token))
