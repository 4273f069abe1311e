"""Training that survives a kill: learnt weights, moments, step and losses, in one safetensors file under the work folder.

A checkpoint is exact, so when it is taken does not change what comes out; it is taken when enough work stands to be lost, by the clock, not
by steps: its size is three times that of the learnt weights (four where the best ones are kept beside them), and writing it every few
steps of a small model would cost more than it saves. One that belongs to other params, data or weights is not used. A student has at most
one.
"""

import hashlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.files import remove_leftovers, replacing
from pipeline.students.tuning import trained_weights

SECONDS_BETWEEN = 120.0
"""Work that a kill costs at most. Writing the 1.3 GB of a 135M model took 3 to 5 s on a busy machine."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class Checkpoint:
    """The checkpoint of one training: `folder`/NAME-FINGERPRINT.safetensors."""

    def __init__(
        self, folder: Path, name: str, fingerprint: str, seconds_between: float = SECONDS_BETWEEN, keeps_end: bool = False
    ) -> None:
        self.keeps_end = keeps_end
        """Whether the state after the last step is saved too: for a training that others follow before its folder is safe."""
        self.path = folder / f"{name}-{fingerprint[:16]}.safetensors"
        self._name = name
        self._fingerprint = fingerprint
        self._seconds_between = seconds_between
        self._taken = time.monotonic()

    def due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return time.monotonic() - self._taken >= self._seconds_between

    @torch.no_grad()
    def save(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, losses: list[float], others: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write the state after `len(losses)` steps, then remove what other params or data left of this student."""
        tensors = {"losses": torch.tensor(losses, dtype=torch.float64)}
        tensors |= {f"other.{name}": tensor for name, tensor in (others or {}).items()}
        for name, parameter in trained_weights(model).items():
            tensors[f"weight.{name}"] = parameter.detach().contiguous()
            for moment in MOMENTS:
                tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].contiguous()
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={"fingerprint": self._fingerprint, "sha256": _digest(tensors)})
        for stale in self._all():
            if stale != self.path:
                stale.unlink(missing_ok=True)
                remove_leftovers(stale)
        self._taken = time.monotonic()

    @torch.no_grad()
    def load(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> tuple[list[float], dict[str, Tensor]]:
        """Put a saved state into model and optimizer, and return the losses of the steps done and the other tensors that were saved.

        Both are empty where there is no such state.
        """
        if not self.path.is_file():
            return [], {}
        tensors: dict[str, Tensor] = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self._fingerprint:
                    return [], {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a mapping
                written = (file.metadata() or {}).get("sha256")
            fault = None if _digest(tensors) == written else "its tensors are not those that were saved"
        except (SafetensorError, OSError) as error:
            fault = str(error)
        if fault is not None:  # nothing of it has reached the model
            print(f"{self.path}: cannot be used ({fault}); training starts again", file=sys.stderr)
            return [], {}
        losses = tensors["losses"].tolist()
        for name, parameter in trained_weights(model).items():
            parameter.copy_(tensors[f"weight.{name}"])
            state: dict[str, torch.Tensor] = {"step": torch.tensor(float(len(losses)), device=parameter.device)}
            for moment in MOMENTS:
                state[moment] = torch.empty_like(parameter).copy_(tensors[f"{moment}.{name}"])
            optimizer.state[parameter] = state
        return losses, {key.removeprefix("other."): tensor for key, tensor in tensors.items() if key.startswith("other.")}

    def remove(self) -> None:
        """The training is done: no checkpoint of this student stays."""
        for path in {*self._all(), self.path}:
            path.unlink(missing_ok=True)
            remove_leftovers(path)

    def _all(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self._name}-{'[0-9a-f]' * 16}.safetensors"))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the names, shapes, dtypes and bytes of tensors: safetensors files have no checksum."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()
