"""Training on several processes, as `torchrun` starts them: each takes its share of every batch, and gradients are summed.

What a step learns does not depend on how many processes there are: batches are planned as for one, a process takes every n-th example of
each, losses are divided by the whole batch's size, and gradients and losses are added up before the update. All processes make the same
update, so that none has to be sent weights. The first one writes. With one process nothing here does anything.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import ShotlessError
from pipeline.models.machine import cores

Item = TypeVar("Item")
PATIENCE = timedelta(hours=2)
"""How long processes wait for each other: the first one writes models and checkpoints meanwhile."""


@dataclass(frozen=True)
class Processes:
    """One process among all that train a student: this one."""

    rank: int = 0
    count: int = 1
    here: int = 1
    """How many of them run on this machine."""

    @property
    def first(self) -> bool:
        """Whether it is this one that writes."""
        return self.rank == 0

    def threads(self, asked: int | None) -> int:
        """Threads of each: those `asked` for, or this machine's cores divided among those that share it."""
        return asked or max(1, cores() // self.here)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Every n-th of some items; all processes' shares together are all of them."""
        return list(items[self.rank :: self.count])

    def total(self, value: float) -> float:
        """The sum of a number over all processes, the same bits on each."""
        if self.count == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=_device())
        dist.all_reduce(held)
        return float(held)

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum gradients over all processes, in place; a process without an example in a step gives zeros."""
        if self.count == 1:
            return
        gradients: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
            assert work is not None
            work.wait()

    def agree(self, what: str, value: float) -> None:
        """Raise ShotlessError where processes do not have the same `value`: they would train different models."""
        if self.count == 1:
            return
        found: list[float | None] = [None] * self.count
        dist.all_gather_object(found, value)
        if len(set(found)) > 1:
            raise ShotlessError(
                f"{what}: processes differ ({', '.join(map(str, found))}); they need the same params and the same work folder "
                "($SHOTLESS_WORK)."
            )


@contextmanager
def joined() -> Iterator[Processes]:
    """All processes that `torchrun` or `accelerate launch` started with this one; one alone where neither did.

    Raises ShotlessError where they do not find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
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


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
