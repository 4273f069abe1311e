"""The same arithmetic with fewer passes over memory, and in training with less kept for the way back.

Outside its matrix products a gated decoder layer spends its time writing and reading intermediate results: an activation and a product of
the inner size, a norm in five steps. For inference the gate is activated and multiplied in place. In training autograd would keep each
step's result; here it keeps what went in (`pipeline.models.recomputed`). Modules are known by their parts, not by their class; the
engine's and the training's probes compare the result with the plain forward before it is used, and `restore` gives the model back.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from pipeline.models.recomputed import gated, rms_norm


def fuse(model: nn.Module) -> Callable[[], None]:
    """Replace the forward of gated MLPs and of norms, in place; the result undoes it.

    Where neither inference mode is on nor a gradient asked for, the model's own forward runs.
    """
    replaced = []
    for module in model.modules():
        if _is_gated_mlp(module):
            module.forward = _by_mode(module.forward, _training_mlp(module), _gated_mlp(module))
        elif _is_rms_norm(module):
            module.forward = _by_mode(module.forward, _training_norm(module))
        else:
            continue
        replaced.append(module)

    def restore() -> None:
        for module in replaced:
            del module.forward

    return restore


def _is_gated_mlp(module: nn.Module) -> bool:
    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    return all(_is_linear(part) for part in parts) and isinstance(getattr(module, "act_fn", None), (nn.SiLU, SiLUActivation))


def _is_linear(part: Any) -> bool:
    return isinstance(part, nn.Linear) or isinstance(getattr(part, "base_layer", None), nn.Linear)  # the second: with an adapter


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    """Whether a module is weight · x / √(mean x² + ε), tried on numbers: some add one to the weight, or have more to them."""
    weight, named = getattr(module, "weight", None), dict(module.named_parameters())
    if not hasattr(module, "variance_epsilon") or list(named) != ["weight"] or weight is None or weight.dim() != 1:
        return False
    x = torch.linspace(-2.0, 3.0, len(weight), dtype=weight.dtype, device=weight.device)[None]
    return torch.allclose(module(x), rms_norm(x, weight, module.variance_epsilon), rtol=1e-5, atol=1e-6)


def _gated_mlp(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return module.down_proj(F.silu(module.gate_proj(x), inplace=True).mul_(module.up_proj(x)))

    return forward


def _training_mlp(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))

    return forward


def _training_norm(module: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return rms_norm(x, module.weight, module.variance_epsilon)

    return forward


def _by_mode(
    plain: Callable[[Tensor], Tensor], training: Callable[[Tensor], Tensor], inference: Callable[[Tensor], Tensor] | None = None
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            return (inference or plain)(x)
        return training(x) if torch.is_grad_enabled() and x.dtype == torch.float32 else plain(x)

    return forward
