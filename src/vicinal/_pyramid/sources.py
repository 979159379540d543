"""Pyramids from points of one grid, and from sparse COO maps."""

import itertools
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .._utils.checks import (
    as_level_shapes,
    as_numbers,
    as_signed,
    as_spatial_shape,
    check_tensor,
    reads_contents,
    refuse,
)
from .._utils.ragged import take_rows
from .._utils.strides import as_strides, least_strides, shapes_from_strides
from .._utils.types import Pooling, StridesLike
from ..pooling import PooledLevel, check_pooling, pool_levels
from ..windows import as_periodic_axes
from .coo import check_coo, coalesce, dim_of_coo
from .data import PyramidData, check_points, rows_on_map
from .extents import extent_of_levels, extent_of_points

PyramidT = TypeVar("PyramidT", bound=PyramidData)


def from_coo(
    cls: type[PyramidT],
    stacked_feature_maps: Tensor,
    level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None,
    strides: StridesLike | None,
    periodic_axes: Sequence[int],
    check_contents: bool | None,
) -> PyramidT:
    """See `FeaturePyramid.from_coo`."""
    name = "stacked_feature_maps"
    shapes = None if level_spatial_shapes is None else as_level_shapes(level_spatial_shapes)
    if shapes is None and strides is None:
        refuse("level_spatial_shapes", "[L, P] sizes, or strides", None)
    dim = dim_of_coo(stacked_feature_maps) if shapes is None else len(shapes[0])
    check_coo(name, stacked_feature_maps, ["B", *[f"S{axis}" for axis in range(dim)], "L", "E"])
    axes = as_periodic_axes(periodic_axes, dim)
    coo = coalesce(as_signed(name, stacked_feature_maps))
    # Copies: graphs of torch.compile do not take views of a sparse tensor.
    values = coo.values().clone()
    coordinates = coo.indices().t().contiguous()
    if strides is not None:
        strides = as_strides(strides, dim, None if shapes is None else len(shapes))
        given = (tuple(coo.shape[1:-2]),) if shapes is None else shapes
        steps = (least_strides(strides),) if shapes is None else strides
        extent = extent_of_levels(name, given, steps, axes)
        extent = extent_of_points(coordinates, extent, strides, axes)
        shapes = shapes_from_strides(extent, strides, axes, name)
    assert shapes is not None
    pyramid = cls(
        values, coordinates, shapes, coo.shape[0], False, strides=strides, periodic_axes=axes
    )
    if reads_contents(check_contents, coo.device):
        check_points(name, pyramid)
    return pyramid


def from_levels(
    cls: type[PyramidT],
    levels: Sequence[Tensor],
    strides: StridesLike | None,
    periodic_axes: Sequence[int],
    check_contents: bool | None,
) -> PyramidT:
    """See `FeaturePyramid.from_levels`."""
    if not isinstance(levels, Sequence) or not levels:
        refuse("levels", "a sequence of at least one map", levels)
    first = levels[0]
    for index, level in enumerate(levels):
        if not isinstance(level, Tensor) or not isinstance(first, Tensor):
            refuse(f"levels[{index}]", "a sparse COO tensor [B, *S, E]", level)
        sizes: list[int | str] = ["B", *[f"S{axis}" for axis in range(first.dim() - 2)], "E"]
        if index:
            sizes[0], sizes[-1] = first.shape[0], first.shape[-1]
        check_coo(f"levels[{index}]", level, sizes)
        if (level.dtype, level.device) != (first.dtype, first.device):
            refuse(f"levels[{index}]", f"{first.dtype} on {first.device}", level)
    shapes = tuple(tuple(level.shape[1:-1]) for level in levels)
    axes = as_periodic_axes(periodic_axes, len(shapes[0]))
    if strides is not None:
        strides = as_strides(strides, len(shapes[0]), len(levels))
        extent = extent_of_levels("levels", shapes, strides, axes)
        shapes = shapes_from_strides(extent, strides, axes, "levels")
    maps = [coalesce(as_signed(f"levels[{index}]", level)) for index, level in enumerate(levels)]
    cells = [
        torch.nn.functional.pad(level.indices().t(), (0, 1), value=index)
        for index, level in enumerate(maps)
    ]
    coordinates, order = _sort_by_image(torch.cat(cells))
    values = take_rows(torch.cat([level.values() for level in maps]), order)
    return cls(
        values,
        coordinates,
        shapes,
        first.shape[0],
        check_contents,
        strides=strides,
        periodic_axes=axes,
    )


def from_points(
    cls: type[PyramidT],
    coordinates: Tensor,
    values: Tensor,
    spatial_shape: Sequence[int],
    batch_size: int,
    *,
    strides: StridesLike,
    pooling: Pooling,
    periodic_axes: Sequence[int],
    origin: Sequence[float] | None,
    cell_size: Sequence[float] | None,
    keep_point_rows: bool,
    check_contents: bool | None,
) -> PyramidT:
    """See `FeaturePyramid.from_points`."""
    shape = as_spatial_shape(spatial_shape)
    strides = as_strides(strides, len(shape))
    axes = as_periodic_axes(periodic_axes, len(shape))
    level_shapes = shapes_from_strides(shape, strides, axes, "spatial_shape")
    pool = check_pooling(pooling)
    coordinates = check_tensor("coordinates", coordinates, ("n", len(shape) + 1), kind="integer")
    values = check_tensor("values", values, (len(coordinates), "E"), kind="number")
    grid = cls(
        values,
        torch.nn.functional.pad(coordinates, (0, 1)),
        (shape,),
        batch_size,
        check_contents,
    )
    if math.prod(map(max, zip(*level_shapes, strict=True))) * grid.batch_size >= 2**62:
        came = f"{tuple(spatial_shape)} in {grid.batch_size} images"
        refuse("spatial_shape", "fewer than 2^62 cells in all images", came)
    on_map = None if reads_contents(check_contents, values.device) else rows_on_map(grid)
    values, points = grid.values, grid.coordinates[:, :-1]
    if on_map is not None:  # others would be added to points in other cells
        values, points = take_rows(values, on_map), take_rows(points, on_map)
    levels = pool_levels(values, points, strides, level_shapes, pool)
    cells = [
        torch.nn.functional.pad(level.cells, (0, 1), value=index)
        for index, level in enumerate(levels)
    ]
    sorted_cells, order = _sort_by_image(torch.cat(cells))
    return cls(
        take_rows(torch.cat([level.values for level in levels]), order),
        sorted_cells,
        level_shapes,
        grid.batch_size,
        False,
        strides=strides,
        periodic_axes=axes,
        origin=None if origin is None else as_numbers("origin", origin, len(shape)),
        cell_size=None if cell_size is None else as_numbers("cell_size", cell_size, len(shape)),
        **(_of_points(grid, on_map, _rows_of_points(levels, order)) if keep_point_rows else {}),
    )


def _of_points(grid: PyramidData, on_map: Tensor | None, rows: Tensor) -> dict[str, Tensor]:
    """What a pyramid keeps of the points of a grid, whose points ``on_map`` have these rows."""
    if on_map is None:
        return {"point_rows": rows, "point_batch": grid.batch}
    none = torch.full((len(grid), rows.shape[1]), -1, device=rows.device)
    return {
        "point_rows": none.index_copy(0, on_map, rows),
        "point_batch": none[:, 0].index_copy(0, on_map, grid.batch[on_map]),
    }


def _rows_of_points(levels: Sequence[PooledLevel], order: Tensor) -> Tensor:
    """``[n, L]``: the row of each point on every level, after all levels were sorted by
    ``order``.
    """
    row_after = torch.argsort(order)
    first_rows = itertools.accumulate((len(level.cells) for level in levels), initial=0)
    rows = [row_after[level.row + first] for level, first in zip(levels, first_rows, strict=False)]
    return torch.stack(rows, 1)


def _sort_by_image(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """``coordinates`` sorted by image, and their order before that."""
    order = torch.argsort(coordinates[:, 0], stable=True)
    return take_rows(coordinates, order), order
