"""Grids of fVDB, and voxels and points of WarpConvNet."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import as_numbers, check_tensor, refuse
from .._utils.ragged import offsets_from_ids
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._cells import (
    as_int32,
    as_stride,
    attributes,
    centers_of_points,
    distinct_points_of_level,
    images_of_offsets,
    pyramid_of_raw_points,
    pyramid_of_strided_cells,
    raw_sizes,
    strided_cells_of_level,
    whole_cells,
)
from ._common import import_library


def from_fvdb(
    grid: Any,
    data: Any,
    *,
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a `GridBatch` of fVDB and its data.

    Raw coordinates of the pyramid are world coordinates.

    Args:
        grid: a `GridBatch`, an image per grid, with ``ijk``, ``voxel_sizes`` and ``origins``, which
            are the same for all grids.
        data: a `JaggedTensor` of ``[n, E]``, a row per voxel.
        bounds: ``(low, high)`` in voxels, as ``ijk``, for each axis; points outside have no row.
            None (default), or None for an axis: from 0, or from the first multiple of all strides
            below negative cells, to the last cell.
        strides: the size of each level's cells, in cells of the grid: one int or P ints per level.
            Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which space repeats, whose bounds are one period and must be
            given. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of ``data``. Gradients reach the data.

    Raises:
        ValueError: the grid or the data are not as described, or as for `voxelize` and
            `FeaturePyramid.from_points`.

    Example:
        ```python
        import fvdb
        import torch
        from vicinal.interop import from_fvdb, to_fvdb

        ijk = fvdb.JaggedTensor([torch.tensor([[-3, 1, 3], [5, 7, 1]]), torch.tensor([[2, 2, 2]])])
        grid = fvdb.GridBatch.from_ijk(ijk, voxel_sizes=0.5, origins=[1.0, 0.0, 0.0])
        pyramid = from_fvdb(grid, grid.jagged_like(torch.randn(3, 16)), strides=(1, 2))
        data = grid.jagged_like(pyramid.values_of_points(level=0))
        same, same_data = to_fvdb(pyramid, origin=[1.0, 0.0, 0.0])
        assert torch.equal(same.ijk.jdata, grid.ijk.jdata)
        assert torch.equal(same_data.jdata, data.jdata)
        ```
    """
    names = "ijk", "grid_count", "voxel_sizes", "origins"
    ijk, grid_count, voxel_sizes, origins = attributes("grid", grid, "a GridBatch of fVDB", *names)
    (values,) = attributes("data", data, "a JaggedTensor of fVDB", "jdata")
    cells, offsets = attributes("grid.ijk", ijk, "a JaggedTensor", "jdata", "joffsets")
    values = check_tensor("data.jdata", values, (len(cells), "E"), kind="number")
    device = values.device
    cells = check_tensor("grid.ijk", cells, (len(values), 3), kind="integer", device=device)
    pyramid = pyramid_of_strided_cells(
        "grid.ijk",
        cells,
        images_of_offsets("grid.ijk.joffsets", offsets, len(cells), device)
        if grid_count
        else cells.new_zeros(0),
        values,
        stride=(1, 1, 1),
        batch_size=grid_count,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )
    if not grid_count:
        return pyramid
    size = _of_all_grids("grid.voxel_sizes", voxel_sizes, grid_count)
    first = _of_all_grids("grid.origins", origins, grid_count)
    lows = pyramid.origin or (0.0,) * 3
    # Voxels are centered at their ijk.
    origin = [at + (low - 0.5) * step for at, low, step in zip(first, lows, size, strict=True)]
    return dataclasses.replace(
        pyramid, origin=tuple(origin), cell_size=tuple(size), check_contents=False
    )


def _of_all_grids(argument: str, rows: Tensor, n_grids: int) -> list[float]:
    """The row of ``[B, 3]`` that all grids have."""
    rows = check_tensor(argument, rows, (n_grids, 3), kind="number")
    if (rows != rows[0]).any():
        refuse(argument, "the same for all grids", f"{rows.tolist()}")
    return [float(number) for number in rows[0].tolist()]


def to_fvdb(
    pyramid: FeaturePyramid, level: int = 0, *, origin: Sequence[float] | None = None
) -> tuple[Any, Any]:
    """Returns one level as a `GridBatch` of fVDB and its data.

    Args:
        pyramid: a pyramid of three dimensions that knows its strides.
        level: the level, from 0. Default: 0.
        origin: world coordinates of the center of voxel 0, as ``origins`` of the grid. None
            (default): the center of the level's first cell.

    Returns:
        a `GridBatch`, a grid per image, and a `JaggedTensor`, its data, in the grid's order. Points
        that share a cell are added. Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, the pyramid is not as described or has no images, or
            ``origin`` is not a whole number of the level's cells away from their centers.
        ImportError: fvdb is not installed.

    Example:
        ```python
        import torch
        from vicinal import voxelize
        from vicinal.interop import to_fvdb

        points = torch.tensor([[0.2, 3.4, 1.0], [1.9, 0.6, 1.0]])  # meters
        voxels = voxelize(points, cell_size=0.5, bounds=[(0, 4), (0, 4), (0, 4)])
        grid, data = to_fvdb(voxels.pyramid(torch.randn(2, 16), strides=(1, 2)), level=1)
        assert grid.ijk.jdata.tolist() == [[0, 3, 1], [1, 0, 1]]
        assert grid.voxel_sizes.tolist() == [[1.0, 1.0, 1.0]]
        assert grid.origins.tolist() == [[0.5, 0.5, 0.5]]
        ```
    """
    points = distinct_points_of_level(pyramid, level)
    if pyramid.position_dim != 3 or not pyramid.batch_size:
        refuse("pyramid", "a pyramid of three dimensions with at least one image", pyramid)
    sizes = raw_sizes(pyramid, level)
    corner = pyramid.origin or (0.0,) * 3
    centers = [at + size / 2 for at, size in zip(corner, sizes, strict=True)]
    zero = centers if origin is None else as_numbers("origin", origin, 3)
    shift = whole_cells([a - b for a, b in zip(centers, zero, strict=True)], sizes)
    if shift is None:
        expected = f"a whole number of cells of {list(sizes)} from the centers, as {centers}"
        refuse("origin", expected, origin)
    cells = as_int32(points.coordinates[:, 1:] + points.coordinates.new_tensor(shift))
    fvdb = import_library("fvdb")
    offsets = offsets_from_ids(points.coordinates[:, 0], pyramid.batch_size)
    ijk = fvdb.JaggedTensor.from_data_and_offsets(cells, offsets)
    grid = fvdb.GridBatch.from_ijk(ijk, voxel_sizes=list(sizes), origins=list(zero))
    rows = grid.ijk_to_index(ijk, cumulative=True).jdata.long()
    values = torch.zeros_like(points.values).index_copy(0, rows, points.values)
    return grid, grid.jagged_like(values)


def from_warpconvnet(
    voxels: Any,
    *,
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from `Voxels` of WarpConvNet.

    Raw coordinates of the pyramid are in cells of stride 1.

    Args:
        voxels: ``coordinate_tensor`` integer ``[n, P]``, cells, which may be negative;
            ``feature_tensor`` ``[n, E]``; ``offsets`` ``[B + 1]``, on any device; and
            ``tensor_stride``, None for 1.
        bounds: ``(low, high)`` in cells of stride 1 for each axis; points outside have no row. None
            (default), or None for an axis: from 0, or from the first multiple of all strides below
            negative cells, to the last cell.
        strides: the size of each level's cells, in cells of the voxels: one int or P ints per
            level. Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which space repeats, whose bounds are one period and must be
            given. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the voxels. Gradients reach the
        features.

    Raises:
        ValueError: the voxels are not as described, or as for `voxelize` and
            `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from vicinal.interop import from_warpconvnet, to_warpconvnet
        from warpconvnet.geometry.types.voxels import Voxels

        cells = torch.tensor([[-3, 1, 3], [5, 7, 1]], dtype=torch.int32)
        voxels = Voxels(cells, torch.randn(2, 16), offsets=torch.tensor([0, 1, 2]))
        pyramid = from_warpconvnet(voxels, strides=(1, 2))
        same = voxels.replace(batched_features=pyramid.values_of_points(level=0))
        assert torch.equal(same.feature_tensor, voxels.feature_tensor)
        assert torch.equal(to_warpconvnet(pyramid).coordinate_tensor, cells)
        ```
    """
    names = "coordinate_tensor", "feature_tensor", "offsets", "tensor_stride"
    cells, features, offsets, stride = attributes("voxels", voxels, "Voxels of WarpConvNet", *names)
    features = check_tensor("voxels.feature_tensor", features, ("n", "E"), kind="number")
    n, device = len(features), features.device
    name = "voxels.coordinate_tensor"
    cells = check_tensor(name, cells, (n, "P"), kind="integer", device=device)
    cells = cells.long()
    steps = as_stride("voxels.tensor_stride", 1 if stride is None else stride, cells.shape[1])
    images = images_of_offsets("voxels.offsets", offsets, n, device)
    return pyramid_of_strided_cells(
        name,
        cells * cells.new_tensor(steps),
        images,
        features,
        stride=steps,
        batch_size=len(offsets) - 1,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_warpconvnet(
    pyramid: FeaturePyramid, level: int = 0, *, voxel_size: float | None = None
) -> Any:
    """Returns one level as `Voxels` of WarpConvNet.

    Their ``tensor_stride`` is the size of the level's cells: in raw units where the pyramid's
    ``cell_size`` is whole; otherwise, such as in meters, in raw cells.

    Args:
        pyramid: a pyramid that knows its strides, and whose corner is a whole number of the level's
            cells away from raw coordinate 0, as `from_warpconvnet` makes it.
        level: the level, from 0. Default: 0.
        voxel_size: that of the result. None (default): not known.

    Returns:
        `Voxels` with int32 coordinates, sorted by image and cell. Points that share a cell are
        added. Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, or the pyramid is not as described.
        ImportError: WarpConvNet is not installed.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_warpconvnet

        cells = torch.tensor([[0, 2, 3, 1], [2, 3, 3, 1]])  # image, x, y, z
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 8), (8, 8, 8), 3, strides=(1, 2))
        voxels = to_warpconvnet(pyramid, level=1)
        assert voxels.offsets.tolist() == [0, 1, 1, 2]
        assert voxels.tensor_stride == (2, 2, 2)
        ```
    """
    cells = strided_cells_of_level(pyramid, level)
    return import_library("warpconvnet.geometry.types.voxels", "warpconvnet").Voxels(
        cells.coordinates[:, 1:].contiguous(),
        cells.values,
        offsets=offsets_from_ids(cells.coordinates[:, 0], cells.batch_size).cpu(),
        tensor_stride=cells.stride,
        voxel_size=voxel_size,
    )


def from_warpconvnet_points(
    points: Any,
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from `Points` of WarpConvNet.

    Args:
        points: ``coordinate_tensor`` ``[n, P]``, in any unit; ``feature_tensor`` ``[n, E]``; and
            ``offsets`` ``[B + 1]``, on any device.
        cell_size: size of a cell in the unit of the points, one number or one per axis.
        bounds: ``(low, high)`` in that unit for each axis; points outside have no row. None
            (default), or None for an axis: those of the points.
        strides: the size of each level's cells, in cells of ``cell_size``: one int or P ints per
            level. Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which space repeats, whose bounds are one period and must be
            given. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the points. Gradients reach the
        features.

    Raises:
        ValueError: the points are not as described, or as for `voxelize` and
            `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from vicinal.interop import from_warpconvnet_points
        from warpconvnet.geometry.types.points import Points

        points = Points(torch.rand(9, 3), torch.randn(9, 16), offsets=torch.tensor([0, 4, 9]))
        pyramid = from_warpconvnet_points(points, cell_size=0.05, strides=(1, 2))
        same = points.replace(batched_features=pyramid.values_of_points(level=1))
        assert same.feature_tensor.shape == (9, 16)
        ```
    """
    names = "coordinate_tensor", "feature_tensor", "offsets"
    positions, features, offsets = attributes("points", points, "Points of WarpConvNet", *names)
    features = check_tensor("points.feature_tensor", features, ("n", "E"), kind="number")
    n, device = len(features), features.device
    positions = check_tensor(
        "points.coordinate_tensor", positions, (n, "P"), kind="number", device=device
    )
    images = images_of_offsets("points.offsets", offsets, n, device)
    return pyramid_of_raw_points(
        "points.coordinate_tensor",
        positions,
        images,
        features,
        batch_size=len(offsets) - 1,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_warpconvnet_points(
    pyramid: FeaturePyramid, level: int = 0, *, dtype: torch.dtype = torch.float32
) -> Any:
    """Returns one level as `Points` of WarpConvNet, at the centers of its cells in raw units.

    Args:
        pyramid: any pyramid. Where origin or cell size are not known, raw units are cells.
        level: the level, from 0. Default: 0.
        dtype: of the coordinates. Default: float32.

    Returns:
        `Points`, sorted by image and cell. Points that share a cell are added. Gradients reach the
        pyramid's values.

    Raises:
        ValueError: there is no such level, or ``dtype`` is not floating.
        ImportError: WarpConvNet is not installed.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_warpconvnet_points

        cells = torch.tensor([[0, 2, 3, 1], [0, 3, 3, 1]])  # image, x, y, z
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 8), (8, 8, 8), 1, strides=(1, 2))
        points = to_warpconvnet_points(pyramid, level=1)
        assert points.coordinate_tensor.tolist() == [[3.0, 3.0, 1.0]]
        ```
    """
    points = distinct_points_of_level(pyramid, level)
    return import_library("warpconvnet.geometry.types.points", "warpconvnet").Points(
        centers_of_points(pyramid, level, points, dtype),
        points.values,
        offsets=offsets_from_ids(points.coordinates[:, 0], points.batch_size).cpu(),
    )
