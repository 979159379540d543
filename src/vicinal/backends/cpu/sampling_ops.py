"""Schemas, fakes and gradients of the ops of deformable sampling, which the kernel defines."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import DifferentiableOp, on_one_device, refuse_tangents

_SAMPLE = "vicinal::sample"
_SAMPLE_BACKWARD = "vicinal::sample_backward"
_ARGUMENTS = (
    "Tensor table, Tensor locations, Tensor weights, Tensor images, Tensor[] index, int[] sizes, "
    "int[] periodic, bool has_background"
)
torch.library.define(_SAMPLE, f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    _SAMPLE_BACKWARD, f"(Tensor grad_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
)


def sample(
    table: Tensor, locations: Tensor, weights: Tensor, images: Tensor, index: Sequence[Tensor],
    sizes: Sequence[int], periodic: Sequence[int], has_background: bool,
) -> Tensor:  # fmt: skip
    """See `_index.sampling.sample`.

    Args:
        table, locations, weights, images: float32 or float64; int64.
        index: ``_origins``, ``_steps``, ``_starts``, ``_keys`` and ``_corners`` of a `CellIndex`.
        sizes: of all levels, ``L * P`` numbers.
        periodic: for every axis 1 if the map repeats along it, else 0.
        has_background: whether the table has values of empty cells.
    """
    refuse_tangents(table, locations, weights)
    locations = locations.to(torch.promote_types(locations.dtype, torch.float32))
    sampled: Tensor = _differentiable(
        table, locations, weights, images.contiguous(), list(index), list(sizes), list(periodic),
        has_background,
    )  # fmt: skip
    return sampled


@torch.library.register_fake(_SAMPLE)
@on_one_device
def _(table: Tensor, locations: Tensor, *_: Any) -> Tensor:
    return table.new_empty(locations.shape[0], *table.shape[1:])


@torch.library.register_fake(_SAMPLE_BACKWARD)
@on_one_device
def _(
    grad_out: Tensor, table: Tensor, locations: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (table, locations, weights))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, index, sizes, periodic, has_background = inputs
    ctx.settings = sizes, periodic, has_background
    ctx.save_for_backward(*tensors, *index)


def _backward(op: Any, ctx: Any, needs: tuple[Any, ...], grad_out: Tensor) -> tuple[Any, ...]:
    *tensors, origins, steps, starts, keys, corners = ctx.saved_tensors
    index = [origins, steps, starts, keys, corners]
    grads = op(grad_out, *tensors, index, *ctx.settings)
    return *grads, None, [None] * len(index), None, None, None


_differentiable = DifferentiableOp("vicinal", "sample", _setup, _backward)
