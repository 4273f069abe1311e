"""Rows laid end to end: the token ids, positions and places of a forward pass without padding.

A row is a query with branches that continue it, each blind to the others: one pass then reads what several multi-token completions need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Completions = Sequence[Sequence[int]]
"""Token ids of each label's verbaliser, or of each row's own answer."""


@dataclass(frozen=True)
class Row:
    """One row of a pass: a query, and branches that each continue it."""

    query: Sequence[int]
    branches: tuple[Sequence[int], ...] = ()
    """Token ids that follow the query, each branch blind to the others: all but the last token of multi-token completions."""

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.query) + sum(map(len, self.branches))


def rows_of(queries: Sequence[Sequence[int]], completions: Completions) -> list[Row]:
    """Queries with the branches that multi-token completions need; a completion's last token is never read."""
    branches = tuple(ids[:-1] for ids in completions if len(ids) > 1)
    return [Row(query, branches) for query in queries]


@dataclass(frozen=True)
class Packed:
    """Rows laid end to end: T tokens in all, B rows of at most L tokens, N outputs."""

    input_ids: Tensor  # [1, T]
    position_ids: Tensor  # [1, T]
    gather: Tensor  # [B, L] token of each row's place; padding repeats the row's first token
    scatter: Tensor  # [T] place in B·L of each token
    outputs: Tensor  # [N] tokens whose logits are asked for: for each row the query's last, then every branch token
    output_rows: Tensor  # [N] row of each output
    mask: Tensor | None  # [B, 1, L, L] added to scores if rows branch; None: causal
    visible: Tensor  # [N, L] whether an output sees its row's place


def pack(rows: Sequence[Row], start: int, device: torch.device | str = "cpu") -> Packed:
    """Lay rows end to end; `start` is the number of context tokens before each."""
    width = max(row.length for row in rows)
    ids: list[int] = []
    positions: list[int] = []
    gather, scatter, outputs, output_rows, visible = [], [], [], [], []
    branched = any(row.branches for row in rows)
    mask = torch.full((len(rows), 1, width, width), -torch.inf) if branched else None
    for number, row in enumerate(rows):
        first = len(ids)
        ids += row.query
        positions += range(start, start + len(row.query))
        seen = torch.ones(row.length, row.length, dtype=torch.bool).tril()
        outputs.append(len(ids) - 1)
        for branch in row.branches:
            begin = len(ids) - first
            ids += branch
            positions += range(start + len(row.query), start + len(row.query) + len(branch))
            seen[begin:, len(row.query) : begin] = False
            outputs += range(first + begin, len(ids))
        for output in outputs[len(output_rows) :]:
            output_rows.append(number)
            visible.append(F.pad(seen[output - first], (0, width - row.length)))
        if mask is not None:
            block = mask[number, 0]
            block[: row.length, : row.length].masked_fill_(seen, 0.0)
            block[row.length :, 0] = 0.0  # a padding place must see something, or it would be NaN
        gather.append(list(range(first, len(ids))) + [first] * (width - row.length))
        scatter += range(number * width, number * width + row.length)

    def long(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Packed(
        input_ids=long([ids]),
        position_ids=long([positions]),
        gather=long(gather),
        scatter=long(scatter),
        outputs=long(outputs),
        output_rows=long(output_rows),
        mask=None if mask is None else mask.to(device),
        visible=torch.stack(visible).to(device),
    )
