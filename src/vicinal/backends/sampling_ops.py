"""Schemas, fakes and gradients of deformable sampling, for back ends with a kernel of their own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import DifferentiableOp, on_one_device, refuse_tangents

NAMES = ("sample", "sample_backward")
_ARGUMENTS = (
    "Tensor table, Tensor locations, Tensor weights, Tensor images, Tensor[] index, int[] sizes, "
    "int[] periodic, bool has_background"
)
_SCHEMAS = {
    "sample": f"({_ARGUMENTS}) -> Tensor",
    "sample_backward": f"(Tensor grad_out, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
}


def make_sample(namespace: str) -> Callable[..., Tensor]:
    """Returns the differentiable op of a back end, see below.

    A compiled kernel, which has to be loaded before, defines ops of its own. Without kernels, only
    meta and fake tensors can be sampled.
    """
    for name in NAMES:
        if not hasattr(getattr(torch.ops, namespace), name):
            torch.library.define(f"{namespace}::{name}", _SCHEMAS[name])
        torch.library.register_fake(f"{namespace}::{name}", on_one_device(_FAKES[name]))
    differentiable = DifferentiableOp(namespace, "sample", _setup, _backward)

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


_FAKES: dict[str, Callable[..., Any]] = {
    "sample": _fake_sample,
    "sample_backward": _fake_sample_backward,
}


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, index, sizes, periodic, has_background = inputs
    ctx.settings = sizes, periodic, has_background
    ctx.save_for_backward(*tensors, *index)


def _backward(op: Any, ctx: Any, needs: tuple[Any, ...], grad_out: Tensor) -> tuple[Any, ...]:
    table, locations, weights, images, *index = ctx.saved_tensors
    grads = op(grad_out, table, locations, weights, images, index, *ctx.settings)
    return *grads, None, [None] * len(index), None, None, None
