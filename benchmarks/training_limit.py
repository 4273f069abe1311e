"""How fast training can be at most: its matrix products, at the rate at which this machine multiplies matrices of the model's shapes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.models.folders import load_model
from pipeline.models.packed import decoder_layers
from pipeline.params import TuningParams
from pipeline.students.tuning import apply_tuning

TRAINED, FROZEN = 6, 4
"""Operations for a weight and a token: 2 forward, 2 for the gradient of what came in, 2 for that of the weight."""
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """What the matrix products allow."""

    operations_per_s: float
    parameters: int
    """Of the layers' matrices."""
    tokens_per_s: dict[str, float]
    """`limit_full`, `limit_lora`, `limit_bitfit`."""


def limits(folder: Path, tokens: int) -> Limits:
    """For steps of `tokens` tokens."""
    model = load_model(folder)
    matrices = [p for p in decoder_layers(model).parameters() if p.dim() == 2]
    parameters = sum(p.numel() for p in matrices)
    rate = product_rate(_counts(matrices), tokens)
    adapters = apply_tuning(model, TuningParams(steps=1, learning_rate=1e-5, tuning="lora")).trained_parameters
    operations = {
        "limit_full": TRAINED * parameters,
        "limit_lora": FROZEN * parameters + TRAINED * adapters,
        "limit_bitfit": FROZEN * parameters,
    }
    return Limits(rate, parameters, {name: rate / value for name, value in operations.items()})


def _counts(matrices: list[torch.nn.Parameter]) -> dict[tuple[int, ...], int]:
    counts: dict[tuple[int, ...], int] = {}
    for matrix in matrices:
        counts[tuple(matrix.shape)] = counts.get(tuple(matrix.shape), 0) + 1
    return counts


def product_rate(counts: dict[tuple[int, ...], int], tokens: int) -> float:
    """Operations a second over the three products of every matrix, [out, in] → how many there are; each at its best of `REPEATS`."""
    operations = seconds = 0.0
    for (out, into), count in counts.items():
        weight, x, gradient = torch.randn(out, into), torch.randn(tokens, into), torch.randn(tokens, out)
        for product in (lambda w=weight, x=x: x @ w.T, lambda w=weight, g=gradient: g @ w, lambda x=x, g=gradient: g.T @ x):
            operations += count * 2.0 * tokens * out * into
            seconds += count * _best(product)
    return operations / seconds


def _best(product: Callable[[], torch.Tensor]) -> float:
    times = []
    for _ in range(REPEATS + 1):  # the first is for warming up
        started = time.perf_counter()
        product()
        times.append(time.perf_counter() - started)
    return min(times[1:])
