"""Schemas, fakes and gradients of the ops of dense projections, which only the CPU back end has."""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import DifferentiableOp, on_one_device, refuse_tangents

_PROJECT = "vicinal::project"
_PROJECT_BACKWARD = "vicinal::project_backward"

torch.library.define(
    _PROJECT,
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm, float eps, Tensor? residual) "
    "-> Tensor[]",
)
torch.library.define(
    _PROJECT_BACKWARD,
    "(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] norm, float eps, "
    "bool needs_x, bool needs_weights, bool needs_biases) "
    "-> (Tensor, Tensor[], Tensor[], Tensor[])",
)


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``residual + norm(x) @ weight.t() + bias`` for each of the weights; see `reference`."""
    refuse_tangents(x, *weights, *biases, *norm, residual)
    lists = (list(group) for group in (weights, biases, norm))
    return tuple(_differentiable(x, *lists, eps, residual))


@torch.library.register_fake(_PROJECT)
@on_one_device
def _(x: Tensor, weights: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@torch.library.register_fake(_PROJECT_BACKWARD)
@on_one_device
def _(
    grads: list[Tensor], x: Tensor, weights: list[Tensor], norm: list[Tensor], eps: float,
    needs_x: bool, needs_weights: bool, needs_biases: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    widths = [grad.shape[1] for grad in grads]
    return (
        x.new_empty(x.shape[0] if needs_x else 0, x.shape[1]),
        [x.new_empty(width, x.shape[1]) for width in widths if needs_weights],
        [x.new_empty(width) for width in widths if needs_biases],
        [x.new_empty(x.shape[1]) for _ in norm if needs_x],
    )


def _setup_project(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weights, biases, norm, ctx.eps, _ = inputs
    ctx.lengths = len(weights), len(biases), len(norm)
    # Only the gradient of x needs the weights. Where it is not needed they may change in place.
    ctx.needs_x = any(part.requires_grad for part in (x, *norm))
    ctx.save_for_backward(x, *norm, *(weights if ctx.needs_x else ()))


def _backward_project(
    op: Any, ctx: Any, needs: tuple[Any, ...], grads: list[Tensor]
) -> tuple[Any, ...]:
    _, needs_weights, needs_biases, _, _, needs_residual = needs
    x, *parameters = ctx.saved_tensors
    norm, weights = parameters[: ctx.lengths[2]], parameters[ctx.lengths[2] :]
    grad_x, *lists = op(
        grads, x, weights, norm, ctx.eps, ctx.needs_x, any(needs_weights), any(needs_biases)
    )
    lists = [part or [None] * n for part, n in zip(lists, ctx.lengths, strict=True)]
    grad_residual = functools.reduce(operator.add, grads) if needs_residual else None
    return grad_x if ctx.needs_x else None, *lists, None, grad_residual


_differentiable = DifferentiableOp("vicinal", "project", _setup_project, _backward_project)
