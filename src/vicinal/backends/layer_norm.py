"""Layer norm whose gradients have the same bits for any number of CPU threads.

Torch sums the gradients of weight and bias thread by thread. The op here sums them chunk by chunk
and keeps what torch keeps for the backward pass: x, the moments of its rows, and the weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunks import add_terms, rounded, row_chunks
from .op_checks import checked
from .ops import has_tangent, on_one_device, register_gradient
from .transforms import refuse_double_backward, transforms_active

_LAYER_NORM = "vicinal::layer_norm"
_LAYER_NORM_BACKWARD = "vicinal::layer_norm_backward"

torch.library.define(
    _LAYER_NORM, "(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(
    _LAYER_NORM_BACKWARD,
    "(Tensor grad_out, Tensor x, Tensor mean, Tensor inverse_std, Tensor weight, "
    "bool needs_x, bool needs_affine) -> (Tensor, Tensor, Tensor)",
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`F.layer_norm` of the rows of ``x`` ``[n, E]``; ``weight`` and ``bias`` are ``[E]``.

    It is differentiable any number of times, and in forward mode.
    """
    if x.device.type != "cpu":
        return F.layer_norm(x, x.shape[1:], weight, bias, eps)
    if transforms_active() or has_tangent(x, weight, bias):
        return plain_layer_norm(x, weight, bias, eps)
    out: Tensor = torch.ops.vicinal.layer_norm(x, weight, bias, eps)[0]
    return out


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The same of torch's ops alone. Autograd sums the gradients of weight and bias by
    `Tensor.sum`, but keeps the standardized rows beside x.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    standardized = F.layer_norm(exact, x.shape[1:], eps=eps)
    if bias is None:
        return (standardized * weight).to(x.dtype)
    return torch.addcmul(bias, standardized, weight).to(x.dtype)


def grad_input(
    grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor
) -> Tensor:
    """The gradient of rows ``x``, whose moments are ``mean`` and ``inverse_std``."""
    grad_x: Tensor = torch.ops.aten.native_layer_norm_backward(
        grad, x, x.shape[1:], mean, inverse_std, weight, None, [True, False, False]
    )[0]
    return grad_x


def affine_terms(grad: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor) -> list[Tensor]:
    """What a chunk of rows adds to the gradients of weight and bias, in float32 or float64."""
    dtype = torch.promote_types(mean.dtype, torch.float32)
    grad, x, mean, inverse_std = (part.to(dtype) for part in (grad, x, mean, inverse_std))
    standardized = (x - mean).mul_(inverse_std)
    return [standardized.mul_(grad).sum(0), grad.sum(0)]


def _layer_norm_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    parts: tuple[Tensor, Tensor, Tensor] = torch.native_layer_norm(
        x, x.shape[1:], weight, bias, eps
    )
    return parts


def _layer_norm_backward_on_cpu(
    grad_out: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor,
    needs_x: bool, needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_x = x.new_empty(0, x.shape[1])
    if needs_x:
        grad_x = grad_input(grad_out, x, mean, inverse_std, weight)
    sums: list[Tensor] = []
    for rows in row_chunks(x) if needs_affine else ():
        add_terms(sums, affine_terms(grad_out[rows], x[rows], mean[rows], inverse_std[rows]))
    affine = rounded(sums, weight.dtype) or [weight.new_empty(0), weight.new_empty(0)]
    return grad_x, affine[0], affine[1]


@torch.library.register_fake(_LAYER_NORM)
@on_one_device
def _(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    moments = [x.new_empty(x.shape[0], 1, dtype=_moment_dtype(x, weight)) for _ in range(2)]
    return x.new_empty(x.shape), moments[0], moments[1]


@torch.library.register_fake(_LAYER_NORM_BACKWARD)
@on_one_device
def _(
    grad_out: Tensor, x: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor,
    needs_x: bool, needs_affine: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    affine = [weight.new_empty(x.shape[1] if needs_affine else 0) for _ in range(2)]
    return x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]), affine[0], affine[1]


def _moment_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """As in torch: that of the weight, which may be wider than half-precision rows."""
    return torch.promote_types(x.dtype, weight.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, _, ctx.eps = inputs
    _, mean, inverse_std = output
    ctx.mark_non_differentiable(mean, inverse_std)
    ctx.save_for_backward(x, mean, inverse_std, weight)


def _backward(ctx: Any, grad_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, mean, inverse_std, weight = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    if torch.is_grad_enabled():  # for a second derivative
        return *_differentiable_gradients(ctx, x, weight, grad_out), None
    needs_affine = needs_weight or needs_bias
    grad_x, grad_weight, grad_bias = torch.ops.vicinal.layer_norm_backward(
        grad_out, x, mean, inverse_std, weight, needs_x, needs_affine
    )
    return (
        grad_x if needs_x else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        None,
    )


def _differentiable_gradients(
    ctx: Any, x: Tensor, weight: Tensor, grad_out: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
    out = plain_layer_norm(x, weight, None, ctx.eps)

    def by(part: Tensor) -> Tensor:
        return torch.autograd.grad(out, part, grad_out, create_graph=True)[0]

    return (
        by(x) if needs_x else None,
        by(weight) if needs_weight else None,
        grad_out.sum(0) if needs_bias else None,
    )


register_gradient(_LAYER_NORM, _backward, _setup)
register_gradient(_LAYER_NORM_BACKWARD, refuse_double_backward)
for _name, _kernel in (
    ("layer_norm", _layer_norm_on_cpu),
    ("layer_norm_backward", _layer_norm_backward_on_cpu),
):
    torch.library.impl(f"vicinal::{_name}", "CPU", checked(_name, _kernel))
