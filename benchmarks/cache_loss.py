"""Time and memory of a step of the loss on cached distributions: whole logits, chunks computed twice, the fused loss.

Run as `python -m benchmarks.cache_loss HOW POSITIONS LOGITS_AT_ONCE`, a process of its own so that its peak memory is its own; the last
line is JSON. A step is the head's product, the loss and the gradients in hidden states and head, of the real head's shape.
"""

import json
import sys
import time

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.student_rows import peak_rss
from pipeline.cache.distributions import Distributions, decode
from pipeline.cache.encodings import columns_of, encode
from pipeline.models.machine import use_machine
from pipeline.params import CacheParams
from pipeline.students.vocabulary_losses import divergence_nats, fused_divergence

VOCABULARY, WIDTH = 49_152, 576
REPEATS = 3


def step(how: str, cached: Distributions, hidden: Tensor, head: Tensor, logits_at_once: int) -> Tensor:
    """The mean KL of all positions, differentiable."""
    if how == "fused":
        return fused_divergence("kl", cached, hidden, head, None, logits_at_once=logits_at_once) / len(hidden)
    if how == "whole":
        return divergence_nats("kl", cached, hidden @ head.t()).mean()
    if how == "log_softmax":  # as losses are mostly written: all logits, all log-probabilities, the entries gathered
        log_q = (hidden @ head.t()).log_softmax(-1)
        log_p, drawn_log_p = (x.masked_fill(x == -torch.inf, 0.0) for x in (cached.log_probabilities, cached.sampled_log_probabilities))
        kept = (cached.log_probabilities.exp() * (log_p - log_q.gather(-1, cached.ids))).sum(-1)
        return (kept + (cached.sampled_weights * (drawn_log_p - log_q.gather(-1, cached.sampled_ids))).sum(-1)).mean()
    size = max(1, logits_at_once // VOCABULARY)
    parts = [slice(start, start + size) for start in range(0, len(hidden), size)]

    def of_part(rows: Tensor, head: Tensor, part: slice) -> Tensor:
        return divergence_nats("kl", cached.take(part), rows @ head.t()).sum()

    sums = [checkpoint(of_part, hidden[part], head, part, use_reentrant=False) for part in parts]
    return torch.stack(sums).sum() / len(hidden)  # type: ignore[arg-type]


def main(how: str, positions: int, logits_at_once: int) -> None:
    """Print seconds of a step, the best of a few, and how far memory rose."""
    use_machine(None)
    generator = torch.Generator().manual_seed(0)
    params = CacheParams()
    small = [encode(torch.randn(64, VOCABULARY, generator=generator) * 3, params, torch.rand(64, generator=generator).double())]
    table = pa.table(columns_of(small[0], np.ones(64, dtype=int)))
    cached = decode(table, params).take(torch.arange(positions) % 64)
    hidden = torch.randn(positions, WIDTH, generator=generator).requires_grad_()
    head = (torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    seconds, loss = [], torch.zeros(())
    with peak_rss() as peak:
        for _ in range(REPEATS):
            hidden.grad = head.grad = None
            started = time.perf_counter()
            loss = step(how, cached, hidden, head, logits_at_once)
            loss.backward()
            seconds.append(time.perf_counter() - started)
    figures = {"seconds": min(seconds), "added_bytes": peak["bytes"], "gradient_bytes": 4 * head.numel(), "loss_nats": float(loss.detach())}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
