"""The ops of `backends.sampling_ops` in Triton: their outputs, and the launches that fill them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...._utils.constants import constant
from .. import background as background_kernels
from ..launch import cdiv, heads, launch, on_device_of, power_of_2
from ..parts import Rows
from . import kernels
from .kernels import Index

_LANES = 32  # rows of the table that a program takes at once
_CHANNELS = 128  # of a head that it takes at once, at most
_CORNERS = 16  # entries that it takes at once, at most
_BLOCK = 256  # numbers of a program that only moves numbers
_IMAGE_PARTS = 64  # into which a sum over all queries is split


class _Arguments:
    """What the kernels have in common, made of the ops' arguments.

    Attributes:
        index: the hash table.
        tensors: the index, then table, locations, weights and images.
        numbers: of images, cells and entries, then what tells a key's bucket.
        constants: what kernels that look locations up are compiled for.
        n_heads, n_levels, n_axes, n_images, n_entries, n_locations, n_cells: H, L, P, B, E,
            N * H * L * K and M.
    """

    def __init__(
        self, table: Tensor, locations: Tensor, weights: Tensor, images: Tensor,
        index: Sequence[Tensor], sizes: Sequence[int], periodic: Sequence[int],
        has_background: bool,
    ) -> None:  # fmt: skip
        origins, steps, starts, keys, corners = index
        level_sizes = constant(list(sizes), table.device)
        self.index = Index(origins, steps, level_sizes, starts, keys, corners)
        table, locations, weights = (x.contiguous() for x in (table, locations, weights))
        self.tensors = self.index, table, locations, weights, images
        _, self.n_heads, self.n_levels, n_points, self.n_axes = locations.shape
        self.n_images, self.n_entries, self.n_locations = len(origins), len(keys), weights.numel()
        n_empty = self.n_images * self.n_levels if has_background else 0
        self.n_cells = table.shape[0] - n_empty
        shift = 64 - max(len(starts).bit_length() - 1, 1)
        self.numbers = self.n_images, self.n_cells, self.n_entries, len(starts), shift
        self.constants = {
            "HEADS": self.n_heads,
            "LEVELS": self.n_levels,
            "POINTS": n_points,
            "AXES": self.n_axes,
            "PERIODIC": sum(bool(is_periodic) << i for i, is_periodic in enumerate(periodic)),
            "HAS_BACKGROUND": has_background,
        } | _channels(table)


def _channels(table: Tensor) -> dict[str, int]:
    """The width of a head, how much of it a program takes, and its warps."""
    width = table.shape[2]
    channels = min(power_of_2(width), _CHANNELS)
    return {"WIDTH": width, "CHANNELS": channels, "num_warps": max(1, channels // 32)}


def _n_parts(constants: dict[str, int]) -> int:
    """How many programs share the channels of a head."""
    return cdiv(constants["WIDTH"], constants["CHANNELS"])


def sample(
    table: Tensor, locations: Tensor, weights: Tensor, images: Tensor, index: Sequence[Tensor],
    sizes: Sequence[int], periodic: Sequence[int], has_background: bool,
) -> Tensor:  # fmt: skip
    """See `backends.sampling_ops`."""
    out = table.new_empty(len(locations), *table.shape[1:])
    if not weights.numel():
        return out.zero_()
    args = _Arguments(table, locations, weights, images, index, sizes, periodic, has_background)
    n_bags = out.shape[0] * args.n_heads
    terms = min(power_of_2(args.n_locations // n_bags << args.n_axes), _LANES)
    bags = _LANES // terms
    with on_device_of(table):
        launch(
            kernels.sample, cdiv(n_bags, bags) * _n_parts(args.constants), *args.tensors, out,
            n_bags, *args.numbers, **args.constants, BAGS=bags, TERMS=terms,
        )  # fmt: skip
    return out


def sample_backward(
    grad_out: Tensor, table: Tensor, locations: Tensor, weights: Tensor, images: Tensor,
    index: Sequence[Tensor], sizes: Sequence[int], periodic: Sequence[int], has_background: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `backends.sampling_ops`; the gradients of table, locations and weights."""
    grads = [x.new_empty(x.shape) for x in (table, locations, weights)]
    grad_table, grad_locations, grad_weights = grads
    if not weights.numel():
        return grad_table.zero_(), grad_locations, grad_weights
    args = _Arguments(table, locations, weights, images, index, sizes, periodic, has_background)
    grad_out = grad_out.contiguous()
    segment_dtype = _index_dtype(args.n_entries * args.n_heads + 1)
    segments = images.new_empty(args.n_locations, dtype=segment_dtype)
    empty = weights.new_empty(weights.shape) if has_background else None
    corners = min(1 << args.n_axes, _LANES)
    with on_device_of(table):
        launch(
            kernels.location_gradients, cdiv(args.n_locations, _LANES // corners), *args.tensors,
            grad_out, grad_locations, grad_weights, segments, empty, args.n_locations,
            *args.numbers, **args.constants, PADDED_AXES=power_of_2(args.n_axes),
            LOCATIONS=_LANES // corners, CORNERS=corners,
        )  # fmt: skip
        _sum_over_locations(args, grad_out, segments, grad_table)
        if empty is not None:
            grad_table[args.n_cells :] = _sum_over_images(args, grad_out, empty.sum(3), images)
    return grad_table, grad_locations, grad_weights


def _index_dtype(n: int) -> torch.dtype:
    """What holds numbers below ``n``: a sort of int32 takes half as long."""
    return torch.int32 if n < 2**31 else torch.int64


def _sum_over_locations(
    args: _Arguments, grad_out: Tensor, segments: Tensor, grad_table: Tensor
) -> None:
    """Fills the gradient of the table's rows of cells."""
    n_segments, n_corners = args.n_entries * args.n_heads, 1 << args.n_axes
    _, _, locations, weights, _ = args.tensors
    corners: Tensor = args.index.corners
    ordered, order = torch.sort(segments, stable=True)
    dtype = _index_dtype(args.n_locations + 1)
    bounds = [segments.new_zeros(n_segments, dtype=dtype) for _ in range(2)]
    launch(
        kernels.find_bounds, cdiv(args.n_locations, _BLOCK), ordered, *bounds, args.n_locations,
        n_segments, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    entries = corners.new_full((args.n_cells, n_corners), -1)
    launch(
        kernels.find_entries_of_cells, cdiv(corners.numel(), _BLOCK), corners, entries,
        args.n_entries, args.n_cells, CORNERS=n_corners, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    channels = _channels(grad_table)
    launch(
        kernels.table_gradients, args.n_cells * args.n_heads * _n_parts(channels), locations,
        weights, grad_out, order, *bounds, entries, grad_table, args.n_cells,
        HEADS=args.n_heads, PER_BAG=weights[0, 0].numel(), AXES=args.n_axes, **channels,
        CORNERS=min(n_corners, _CORNERS), TERMS=_LANES,
    )  # fmt: skip


def _sum_over_images(
    args: _Arguments, grad_out: Tensor, weight_sums: Tensor, images: Tensor
) -> Tensor:
    """The gradient ``[B * L, H, d]`` of empty cells, of the sums ``[N, H, L]`` of their factors."""
    ordered, traversal = torch.sort(images.clamp(0, args.n_images - 1), stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(args.n_images + 1, device=images.device))
    sums = weight_sums.transpose(1, 2).contiguous()
    found = sum_by_image(traversal.int(), bounds, sums, heads(grad_out), grad_out.shape[2])
    return found.flatten(0, 1)


def sum_by_image(
    traversal: Tensor, bounds: Tensor, weight_sums: Tensor, grad_out: Rows, width: int
) -> Tensor:
    """``[B, L, H, width]``: the sums over each image's queries of weights times ``grad_out``.

    Args:
        traversal: int32 ``[N]``, the queries, image by image.
        bounds: int64 ``[B + 1]``, where each image's queries begin in the traversal.
        weight_sums: ``[N, L, H]``.
        grad_out: Rows ``[N, H, width]``.
        width: of a head.
    """
    (n_queries, n_levels, n_heads), n_images = weight_sums.shape, len(bounds) - 1
    n_parts = min(cdiv(_IMAGE_PARTS, max(n_images, 1)), cdiv(n_queries, 32))
    padded = power_of_2(width)
    parts = weight_sums.new_empty(n_images, n_levels, n_parts, n_heads, width)
    launch(
        background_kernels.cell_value_gradients, n_images * n_levels * n_parts * n_heads,
        traversal, bounds, weight_sums, grad_out, heads(parts.flatten(0, 2)),
        n_levels, n_heads, n_parts,
        WIDTH=width, PADDED=padded, BLOCK=max(1, min(32, 2**12 // padded)), num_warps=1,
    )  # fmt: skip
    return parts.sum(2)


KERNELS: dict[str, Any] = {"sample": sample, "sample_backward": sample_backward}
