"""Gradients of weight matrices, multiplied straight into where they are kept.

Autograd hands over a matrix' gradient in a tensor of its own and adds it to what is there: a fill with zeros, a product and an addition,
which together read and write four times the bytes of all weights in every step. Here a linear layer's way back writes the first product of
a step over the old gradient, and adds later ones in the product itself. The trade-off: hooks on these weights' gradients are not called.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class MatrixGradients:
    """The trained float32 matrices of plain linear layers, but for the head. `detach` gives the layers back as they were."""

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()  # often the embeddings themselves, whose gradient autograd adds up
        self._modules = [
            module for module in model.modules() if isinstance(module, nn.Linear) and _is_trained(module) and module is not head
        ]
        self._old: set[Tensor] = set()
        """Those whose gradient is still that of the step before."""
        self._hooks = []
        for module in self._modules:
            module.forward = self._forward_of(module)
            self._hooks.append(module.weight.register_hook(self._met_by_autograd(module.weight)))

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Begin a step: what the gradients hold now is of the step before. Those of other `parameters` become zero."""
        self._old = {module.weight for module in self._modules if module.weight.grad is not None}
        for parameter in parameters:
            if parameter.grad is not None and parameter not in self._old:
                parameter.grad.zero_()

    def settle(self) -> None:
        """End a step: a matrix that no pass of it came by has a gradient of zero."""
        for weight in self._old:
            assert weight.grad is not None
            weight.grad.zero_()
        self._old = set()

    def add(self, weight: nn.Parameter, of_output: Tensor, x: Tensor) -> None:
        """Add of_outputᵀ · x to a weight's gradient; of_output [T, out], x [T, in]."""
        if weight.grad is None:
            weight.grad = of_output.T @ x
        elif weight in self._old:
            torch.mm(of_output.T, x, out=weight.grad)
            self._old.discard(weight)
        else:
            weight.grad.addmm_(of_output.T, x)

    def detach(self) -> None:
        """Give the model its own forwards back."""
        for module, hook in zip(self._modules, self._hooks, strict=True):
            del module.forward
            hook.remove()

    def _met_by_autograd(self, weight: Tensor) -> Callable[[Tensor], None]:
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
    plain = type(module) is nn.Linear and "forward" not in vars(module)
    return plain and module.weight.requires_grad and module.weight.dtype == torch.float32


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
