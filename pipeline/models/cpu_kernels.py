"""The same arithmetic with fewer passes over memory: gated MLPs, RMS norms, and gradients of weight matrices.

Outside its matrix products a decoder layer spends its time writing and reading intermediate results. For inference the gate of an MLP is
activated and multiplied in place. In training, autograd would keep each step's result; here a norm and a gated MLP keep what went in and
compute the rest again on the way back. Gradients of matrices are multiplied straight into where they are kept.

Nothing here is needed for right results: `SHOTLESS_KERNELS=0` leaves every model with its own code. Modules are recognised by their parts,
not by their class, and the probes of engines and training compare the result with the plain forward before it is used.
"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation


def use_kernels() -> bool:
    """The switch: yes, unless `$SHOTLESS_KERNELS` is 0."""
    return os.environ.get("SHOTLESS_KERNELS") != "0"


def fuse(model: nn.Module) -> Callable[[], None]:
    """Replace the forward of gated MLPs and RMS norms, in place; the result undoes it.

    The model's own forward still runs if neither inference mode is on nor a gradient enabled.
    """
    replaced = []
    for module in model.modules() if use_kernels() else ():
        if _is_gated_mlp(module):
            module.forward = _by_mode(module.forward, _training_mlp(module), _inference_mlp(module))
        elif _is_rms_norm(module):
            module.forward = _by_mode(module.forward, _training_norm(module), module.forward)
        else:
            continue
        replaced.append(module)

    def restore() -> None:
        for module in replaced:
            del module.forward

    return restore


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, which keeps only the two for the way back; any shape, the same for both. It has no second derivative."""
    return _Gated.apply(gate, up)  # type: ignore[return-value]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm (1910.07467), weight · x / √(mean x² + ε) over the last dimension, x [..., D], weight [D]; keeps x and the roots."""
    return _RmsNorm.apply(x, weight, epsilon)  # type: ignore[return-value]


def _is_gated_mlp(module: nn.Module) -> bool:
    def linear(part: Any) -> bool:
        return isinstance(part, nn.Linear) or isinstance(getattr(part, "base_layer", None), nn.Linear)  # the second: with an adapter

    parts = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    return all(map(linear, parts)) and isinstance(getattr(module, "act_fn", None), (nn.SiLU, SiLUActivation))


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    """Whether a module is weight · x / √(mean x² + ε), tried on numbers: some add one to the weight, or do more."""
    weight, named = getattr(module, "weight", None), dict(module.named_parameters())
    if not hasattr(module, "variance_epsilon") or list(named) != ["weight"] or weight is None or weight.dim() != 1:
        return False
    if weight.dtype != torch.float32:  # which is what training has
        return False
    x = torch.linspace(-2.0, 3.0, len(weight), device=weight.device)[None]
    return torch.allclose(module(x), rms_norm(x, weight, module.variance_epsilon), rtol=1e-5, atol=1e-6)


def _inference_mlp(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module.down_proj(F.silu(module.gate_proj(x), inplace=True).mul_(module.up_proj(x)))


def _training_mlp(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))


def _training_norm(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: rms_norm(x, module.weight, module.variance_epsilon)


def _by_mode(
    plain: Callable[[Tensor], Tensor], training: Callable[[Tensor], Tensor], inference: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled():
            return inference(x)
        return training(x) if torch.is_grad_enabled() and x.dtype == torch.float32 else plain(x)

    return forward


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        root = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        return (x * root).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, root = ctx.saved_tensors
        normed = x * root
        product = gradient * normed
        of_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        share = (product @ weight).unsqueeze_(-1).div_(-x.shape[-1])  # of each vector's gradient along itself
        return torch.addcmul(gradient * weight, normed, share).mul_(root), of_weight, None


class MatrixGradients:
    """Gradients of a model's trained float32 matrices, except the head's, multiplied straight into `weight.grad`.

    Autograd makes a matrix' gradient in a tensor of its own and adds it to what is there: a fill with zeros, a product and an addition,
    which together read and write four times the bytes of all weights in every step. Here a linear layer's backward writes the first product
    of a step over the old gradient, and adds later ones in the product itself. The trade-off: hooks on these gradients are not called.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()  # often the embeddings themselves, whose gradient autograd adds up
        modules = model.modules() if use_kernels() else ()
        self._modules = [module for module in modules if type(module) is nn.Linear and module is not head and _is_trained(module)]
        self._old: set[Tensor] = set()
        """Those whose gradient is still that of the step before."""
        self._hooks = []
        for module in self._modules:
            module.forward = self._forward_of(module)
            self._hooks.append(module.weight.register_hook(self._added_by_autograd(module.weight)))

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin a step: what the gradients hold now is of the step before. Those of other `parameters` become zero."""
        self._old = {module.weight for module in self._modules if module.weight.grad is not None}
        for parameter in parameters:
            if parameter.grad is not None and parameter not in self._old:
                parameter.grad.zero_()

    def settle(self) -> None:
        """End a step: a matrix that no pass of it used has a gradient of zero."""
        for weight in self._old:
            assert weight.grad is not None
            weight.grad.zero_()
        self._old = set()

    def detach(self) -> None:
        """Give the model its own forwards back."""
        for module, hook in zip(self._modules, self._hooks, strict=True):
            del module.forward
            hook.remove()

    def add(self, weight: nn.Parameter, of_output: Tensor, x: Tensor) -> None:
        """Add of_outputᵀ · x to a weight's gradient; of_output [T, out], x [T, in]."""
        if weight.grad is None:
            weight.grad = of_output.T @ x
        elif weight in self._old:
            torch.mm(of_output.T, x, out=weight.grad)
            self._old.discard(weight)
        else:
            weight.grad.addmm_(of_output.T, x)

    def _added_by_autograd(self, weight: Tensor) -> Callable[[Tensor], None]:
        """For a weight that a model also uses outside its layer's forward: autograd is about to add to its gradient."""

        def hook(_: Tensor) -> None:
            if weight in self._old:
                assert weight.grad is not None
                weight.grad.zero_()
                self._old.discard(weight)

        return hook

    def _forward_of(self, module: nn.Linear) -> Any:
        def forward(x: Tensor) -> Tensor:
            if not torch.is_grad_enabled() or x.dtype != torch.float32:
                return F.linear(x, module.weight, module.bias)
            return _Linear.apply(x, module.weight, module.bias, self)  # type: ignore[return-value]

        return forward


def _is_trained(module: nn.Linear) -> bool:
    return "forward" not in vars(module) and module.weight.requires_grad and module.weight.dtype == torch.float32


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: Tensor | None, gradients: MatrixGradients) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.gradients, ctx.has_bias = weight, gradients, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        ctx.gradients.add(ctx.weight, rows, x.reshape(-1, x.shape[-1]))
        of_x = gradient @ ctx.weight if ctx.needs_input_grad[0] else None
        return of_x, None, rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None, None
