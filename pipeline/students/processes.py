"""Training on several processes, as `torchrun` starts them: each takes its share of every batch, and gradients are summed.

What a step learns does not depend on the number of processes. Batches are planned as for one, losses are divided by the whole batch's size,
and gradients are added up before the update. All processes make the same update, so none is sent weights; the first one writes.
DistributedDataParallel does not fit: a step has several backward passes, and some processes have fewer of them than others.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pipeline.errors import ShotlessError
from pipeline.models.process import cores

Item = TypeVar("Item")
PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: the first one writes models and checkpoints meanwhile."""


@dataclass(frozen=True)
class Processes:
    """All processes that train a student, which one this is, and how many of them are `here`, on this machine."""

    rank: int = 0
    count: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def threads(self, asked: int | None) -> int:
        """Threads of each: those asked for, or this machine's cores divided among those that share it."""
        return asked or max(1, cores() // self.here)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every n-th item. All processes' shares together are all items."""
        return list(items[self.rank :: self.count])

    def total(self, value: float) -> float:
        """The sum of a number over all processes, the same bits on each."""
        if self.count == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(held)
        return float(held)

    @torch.no_grad()
    def add_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Sum gradients over all processes, in place. A process without a row in a step gives zeros."""
        for weight in weights if self.count > 1 else ():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)

    def check_same(self, what: str, value: float) -> None:
        """Raise ShotlessError if processes do not have the same `value`: they would train different models."""
        found: list[float | None] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(found, value)
        if len(set(found)) > 1:
            raise ShotlessError(f"{what}: processes differ {found}. They need the same params and work folder ($SHOTLESS_WORK).")


ALONE = Processes()


@contextmanager
def joined() -> Iterator[Processes]:
    """All processes that `torchrun` or `accelerate launch` started with this one, or this one alone.

    Raises ShotlessError if they do not find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    except (ValueError, RuntimeError, dist.DistError) as error:
        raise ShotlessError(f"$WORLD_SIZE is {count}, and the processes do not find each other: {error}") from error
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    finally:
        dist.destroy_process_group()
