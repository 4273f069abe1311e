"""What a training has reached, and a checkpoint of it in one safetensors file under the work folder.

A resumed training ends with the same bytes as an unbroken one, so checkpoints may be taken by the clock. A file is three times the size of
the learnt weights, or four with the best ones. One of other params, data or weights is not used.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.files import replacing
from pipeline.students.tuning import trained_weights

SECONDS_BETWEEN = 120.0
"""Work that a kill costs at most. Writing the 1.3 GB of a 135M model took 3 to 5 s on a busy machine."""


@dataclass
class Reached:
    """The losses of each step (nats, before its update), the validations (steps done, KL in nats), and the weights of the best one."""

    losses: list[float] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    @property
    def best(self) -> tuple[int, float]:
        """The best validation. Of equal ones the first, which moved the model least."""
        return min(self.validations, key=lambda validation: validation[1])

    def add(self, model: nn.Module, kl_nats: float) -> None:
        """A validation of the present weights, which are copied if they are the best."""
        self.validations.append((len(self.losses), kl_nats))
        if self.best == self.validations[-1]:
            self.best_weights = {name: weight.detach().clone() for name, weight in trained_weights(model).items()}

    def is_over(self, patience: int | None) -> bool:
        """Whether the last `patience` validations brought no improvement."""
        return patience is not None and len(self.validations) - 1 - self.validations.index(self.best) >= patience

    @torch.no_grad()
    def restore_best(self, model: nn.Module) -> None:
        """Put the best weights, if there are any, into the model."""
        for name, best in self.best_weights.items():
            model.get_parameter(name).copy_(best)


@dataclass
class Checkpoint:
    """The checkpoint of one training: `folder`/`name`-FINGERPRINT.safetensors; the fingerprint is of all that the training depends on."""

    folder: Path
    name: str
    fingerprint: str
    keeps_end: bool = False  # save the state after the last step too: other trainings follow before the folder is safe
    _taken: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / f"{self.name}-{self.fingerprint[:16]}.safetensors"

    def due(self) -> bool:
        """Whether `SECONDS_BETWEEN` have passed since the last one."""
        return time.monotonic() - self._taken >= SECONDS_BETWEEN

    @torch.no_grad()
    def save(self, model: nn.Module, optimizer: Optimizer, reached: Reached) -> None:
        """Write the state after the last step of `reached`, then remove what other params or data left of this student."""
        tensors = {name: torch.tensor(getattr(reached, name), dtype=torch.float64) for name in ("losses", "validations")}
        tensors |= {f"best.{name}": tensor for name, tensor in reached.best_weights.items()}
        for name, weight in trained_weights(model).items():
            state = optimizer.state.get(weight, {})  # empty for a weight that no step has reached
            tensors |= {f"{key}.{name}": tensor.detach().contiguous() for key, tensor in {"weight": weight, **state}.items()}
        with replacing(self.path) as temporary:
            save_file(tensors, temporary)
        self.remove(but=self.path)
        self._taken = time.monotonic()

    @torch.no_grad()
    def load(self, model: nn.Module, optimizer: Optimizer) -> Reached:
        """Put a saved state into model and optimizer. Without one that can be read, the training starts at its beginning."""
        if not self.path.is_file():
            return Reached()
        try:
            tensors = load_file(self.path)
        except (SafetensorError, OSError) as error:
            print(f"{self.path}: cannot be read ({error}). Training starts at its beginning.", file=sys.stderr)
            return Reached()
        for name, weight in trained_weights(model).items():
            weight.copy_(tensors[f"weight.{name}"])
            if f"step.{name}" in tensors:
                optimizer.state[weight] = {key: tensors[f"{key}.{name}"].to(weight.device) for key in ("step", "exp_avg", "exp_avg_sq")}
                weight.grad = torch.zeros_like(weight)  # it had a gradient, so a step that does not reach it moves it all the same
        best = {name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")}
        return Reached(tensors["losses"].tolist(), [(int(step), kl) for step, kl in tensors["validations"].tolist()], best)

    def remove(self, but: Path | None = None) -> None:
        """Remove this student's checkpoints, all or `but` one, and what a killed run left of this one."""
        for pattern in (f"{self.name}-{'[0-9a-f]' * 16}.safetensors", f".{self.path.name}.*.tmp"):
            for path in self.folder.glob(pattern):
                if path != but:
                    path.unlink(missing_ok=True)
