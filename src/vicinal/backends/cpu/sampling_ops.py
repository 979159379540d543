"""Schemas, fakes and gradients of deformable sampling, which only the CPU back end has."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import DifferentiableOp, on_one_device, refuse_tangents

_ARGUMENTS = (
    "Tensor table, Tensor locations, Tensor weights, Tensor images, Tensor[] index, int[] sizes, "
    "int[] periodic, bool has_background"
)
_SCHEMAS = {
    "sample": f"({_ARGUMENTS}) -> Tensor",
    "sample_backward": f"(Tensor grad_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
}


def make_sample() -> Callable[..., Tensor]:
    """Returns the differentiable op, see below. Its kernels and schemas are those of the compiled
    kernel, which has to be loaded before; without it, only meta and fake tensors can be sampled.
    """
    for name, fake in (("sample", _fake_sample), ("sample_backward", _fake_sample_backward)):
        if not hasattr(torch.ops.vicinal, name):
            torch.library.define(f"vicinal::{name}", _SCHEMAS[name])
        torch.library.register_fake(f"vicinal::{name}", on_one_device(fake))
    differentiable = DifferentiableOp("vicinal", "sample", _setup, _backward)

    def sample(
        table: Tensor, locations: Tensor, weights: Tensor, images: Tensor, index: Sequence[Tensor],
        sizes: Sequence[int], periodic: Sequence[int], has_background: bool,
    ) -> Tensor:  # fmt: skip
        """See `_index.sampling.sample`.

        Args:
            table, weights: float32 or float64.
            locations: floating.
            images: int64.
            index, sizes, periodic: of `CellIndex.lookup_arguments`.
            has_background: whether the table has values of empty cells.
        """
        refuse_tangents(table, locations, weights)
        locations = locations.to(torch.promote_types(locations.dtype, torch.float32))
        sampled: Tensor = differentiable(
            table, locations, weights, images.contiguous(), list(index), list(sizes),
            list(periodic), has_background,
        )  # fmt: skip
        return sampled

    return sample


def _fake_sample(table: Tensor, locations: Tensor, *_: Any) -> Tensor:
    return table.new_empty(locations.shape[0], *table.shape[1:])


def _fake_sample_backward(
    grad_out: Tensor, table: Tensor, locations: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (table, locations, weights))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, index, sizes, periodic, has_background = inputs
    ctx.settings = sizes, periodic, has_background
    ctx.save_for_backward(*tensors, *index)


def _backward(op: Any, ctx: Any, needs: tuple[Any, ...], grad_out: Tensor) -> tuple[Any, ...]:
    table, locations, weights, images, *index = ctx.saved_tensors
    grads = op(grad_out, table, locations, weights, images, index, *ctx.settings)
    return *grads, None, [None] * len(index), None, None, None
