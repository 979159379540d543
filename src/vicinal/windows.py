"""The geometry of windows: scales, centers, and the cells around a position on each level."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._utils.checks import (
    LevelShapes,
    as_level_shapes,
    check_finite,
    check_neighborhood_sizes,
    check_tensor,
    reads_contents,
)
from ._utils.constants import constant


def full_shape(level_shapes: LevelShapes) -> tuple[int, ...]:
    """The largest size of each axis over the levels."""
    return tuple(map(max, zip(*level_shapes, strict=True)))


def finest_level(level_shapes: LevelShapes) -> int:
    """The level with the most cells; the first one of several."""
    cells = [math.prod(shape) for shape in level_shapes]
    return cells.index(max(cells))


def coordinate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for coordinates, float32 or wider: bfloat16 cannot tell cell 300 from 301."""
    return torch.promote_types(dtype, torch.float32)


def level_scales(level_shapes: LevelShapes, like: Tensor) -> Tensor:
    """``[L, P]``: each level's size over the full shape, with the dtype and device of ``like``."""
    # Divided in float64 and rounded: compiled float32 division need not round to nearest, and a
    # cell's border may lie between the two results.
    shapes, full = (
        constant(sizes, like.device, torch.float64)
        for sizes in (level_shapes, full_shape(level_shapes))
    )
    return (shapes / full).to(like.dtype)


def window_centers(positions: Tensor, level_shapes: LevelShapes) -> Tensor:
    """``[L, N, P]``: the cell, as floats, that contains each of ``positions`` ``[N, P]``."""
    positions = positions.detach().to(coordinate_dtype(positions.dtype))
    return torch.floor(positions * level_scales(level_shapes, positions)[:, None])


def window_offsets(neighborhood_size: int, position_dim: int) -> list[tuple[int, ...]]:
    """The ``w ** P`` offsets from a window's center to its cells, row-major.

    With ``position_dim=P - 1`` they are the offsets to the window's rows.
    """
    radius = neighborhood_size // 2
    return list(itertools.product(range(-radius, radius + 1), repeat=position_dim))


def get_multilevel_neighborhoods(
    query_fullscale_spatial_positions: Tensor,
    level_spatial_shapes: Tensor | Sequence[Sequence[int]],
    neighborhood_sizes: Sequence[int] = (3, 5, 7, 9),
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the cells of every query's windows, for inspection and tests.

    There are ``K = sum(w[l] ** P)`` per query. The attention never builds these ``[N, K, ...]``
    tensors.

    Args:
        query_fullscale_spatial_positions: floating ``[N, P]``, in cells of the full shape (the
            largest size of each axis over the levels).
        level_spatial_shapes: integer ``[L, P]``, the size of each level in its own cells.
        neighborhood_sizes: odd window width of each level, in cells of that level.

    Returns:
        the cells, int64 ``[N, K, P]``, levels in order and each window row-major, cells beyond
        the map as computed; a bool mask ``[N, K]``, True where a cell lies outside its level;
        the level of every slot, int64 ``[K]``.

    Raises:
        ValueError: positions or shapes are not 2-D or do not agree on P, positions are integers
            or not finite, or a size is even or not positive.

    Example:
        ```python
        import torch
        from vicinal import get_multilevel_neighborhoods

        positions = torch.tensor([[0.5, 5.5]])  # one query on a map of 8 x 8 cells
        cells, outside, levels = get_multilevel_neighborhoods(positions, [[8, 8], [4, 4]], [3, 1])
        assert cells.shape == (1, 3 * 3 + 1, 2)
        assert cells[0, 4].tolist() == [0, 5]  # the center of the window on level 0
        assert cells[0, 9].tolist() == [0, 2]  # the window of one cell on level 1
        assert outside[0, :3].all()  # the row above the map
        ```
    """
    positions = query_fullscale_spatial_positions
    shapes = as_level_shapes(level_spatial_shapes)
    dim = len(shapes[0])
    check_tensor("query_fullscale_spatial_positions", positions, ("N", dim), kind="floating")
    sizes = check_neighborhood_sizes(neighborhood_sizes, len(shapes))
    if reads_contents(None, positions.device):
        check_finite("query_fullscale_spatial_positions", positions)

    device = positions.device
    offsets = [constant(window_offsets(size, dim), device) for size in sizes]
    # Clamped, since the conversion of very large positions to integers would overflow.
    centers = window_centers(positions, shapes).clamp(-(2.0**62), 2.0**62).long()
    cells = torch.cat(
        [center[:, None] + window for center, window in zip(centers, offsets, strict=True)],
        1,
    )
    slot_levels = torch.repeat_interleave(
        torch.arange(len(sizes), device=device),
        constant([len(window) for window in offsets], device),
    )
    slot_shapes = constant(shapes, device)[slot_levels]
    outside = ((cells < 0) | (cells >= slot_shapes)).any(-1)
    return cells, outside, slot_levels
