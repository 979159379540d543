"""Sparse tensors of spconv and of MinkowskiEngine."""

from collections.abc import Sequence
from typing import Any

import torch

from .._utils.checks import check_tensor
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._cells import (
    as_int32,
    as_stride,
    attributes,
    distinct_points_of_level,
    pyramid_of_strided_cells,
    strided_cells_of_level,
)
from ._common import import_library, pyramid_of_cells


def from_spconv(
    tensor: Any,
    *,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a `SparseConvTensor` of spconv.

    Args:
        tensor: ``features`` ``[n, E]``, ``indices`` integer ``[n, P + 1]``, image and cell,
            ``spatial_shape`` and ``batch_size``.
        strides: the size of each level's cells, in cells of the tensor: one int or P ints per
            level. Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which the grid repeats. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the tensor's order. Gradients reach the features.

    Raises:
        ValueError: the tensor is not as described, or as for `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from spconv.pytorch import SparseConvTensor
        from vicinal.interop import from_spconv, to_spconv

        indices = torch.tensor([[0, 5, 7, 1], [0, 1, 1, 3]], dtype=torch.int32)  # image, z, y, x
        tensor = SparseConvTensor(torch.randn(2, 16), indices, [8, 8, 8], batch_size=1)
        pyramid = from_spconv(tensor, strides=(1, 2))
        assert pyramid.level_shapes == ((8, 8, 8), (4, 4, 4))
        same = tensor.replace_feature(pyramid.values_of_points(level=0))
        assert torch.equal(same.features, tensor.features)
        assert to_spconv(pyramid, level=1).spatial_shape == [4, 4, 4]
        ```
    """
    names = "features", "indices", "spatial_shape", "batch_size"
    parts = attributes("tensor", tensor, "a SparseConvTensor of spconv", *names)
    features, indices, spatial_shape, batch_size = parts
    features = check_tensor("tensor.features", features, ("n", "E"), kind="number")
    shape = (len(features), "P + 1")
    indices = check_tensor("tensor.indices", indices, shape, kind="integer", device=features.device)
    return pyramid_of_cells(
        indices,
        features,
        spatial_shape,
        batch_size,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_spconv(
    pyramid: FeaturePyramid, level: int = 0, *, spatial_shape: Sequence[int] | None = None
) -> Any:
    """Returns one level as a `SparseConvTensor` of spconv.

    Args:
        pyramid: any pyramid.
        level: the level, from 0. Default: 0.
        spatial_shape: of the result. None (default): that of the level, which strides may have
            padded.

    Returns:
        a `SparseConvTensor` with int32 indices, sorted by image and cell. Points that share a cell
        are added. Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, or points lie outside ``spatial_shape``.
        ImportError: spconv is not installed.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_spconv

        cells = torch.tensor([[0, 2, 3, 1], [0, 3, 3, 1]])  # image, z, y, x
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 1), (8, 8, 8), 1, strides=(1, 2))
        assert to_spconv(pyramid, level=1).indices.tolist() == [[0, 1, 1, 0]]
        ```
    """
    points = distinct_points_of_level(pyramid, level, spatial_shape)
    return import_library("spconv.pytorch", "spconv").SparseConvTensor(
        points.values,
        as_int32(points.coordinates).contiguous(),
        list(points.spatial_shape),
        points.batch_size,
    )


def from_minkowski(
    tensor: Any,
    *,
    bounds: BoundsLike | None = None,
    batch_size: int | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a `SparseTensor` of MinkowskiEngine.

    Raw coordinates of the pyramid are coordinates of the tensor, of which a cell of the pyramid
    spans ``tensor_stride``.

    Args:
        tensor: ``F`` ``[n, E]``, ``C`` integer ``[n, P + 1]``, image and coordinates, which may be
            negative, and ``tensor_stride``. Coordinates are multiples of the stride.
        bounds: ``(low, high)`` in coordinates of the tensor for each axis; points outside have no
            row. None (default), or None for an axis: from 0, or from the first multiple of all
            strides below negative cells, to the last cell.
        batch_size: number of images, empty images at the end included. None (default): as many as
            ``C`` names.
        strides: the size of each level's cells, in cells of ``tensor_stride``: one int or P ints
            per level. Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which space repeats, whose bounds are one period and must be
            given. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the tensor's order. Gradients reach the features.

    Raises:
        ValueError: the tensor is not as described, or as for `voxelize` and
            `FeaturePyramid.from_points`.

    Example:
        ```python
        import MinkowskiEngine as ME
        import torch
        from vicinal.interop import from_minkowski, to_minkowski

        coordinates = torch.tensor([[0, -4, 6], [0, 2, 2]], dtype=torch.int32)  # image, x, y
        tensor = ME.SparseTensor(torch.randn(2, 16), coordinates, tensor_stride=2)
        pyramid = from_minkowski(tensor, strides=(1, 2))
        assert torch.equal(pyramid.values_of_points(level=0), tensor.F)
        assert torch.equal(to_minkowski(pyramid).C, coordinates)
        ```
    """
    names = "F", "C", "tensor_stride"
    features, coordinates, tensor_stride = attributes(
        "tensor", tensor, "a SparseTensor of MinkowskiEngine", *names
    )
    features = check_tensor("tensor.F", features, ("n", "E"), kind="number")
    shape = (len(features), "P + 1")
    coordinates = check_tensor(
        "tensor.C", coordinates, shape, kind="integer", device=features.device
    )
    return pyramid_of_strided_cells(
        "tensor.C",
        coordinates[:, 1:],
        coordinates[:, 0],
        features,
        stride=as_stride("tensor.tensor_stride", tensor_stride, coordinates.shape[1] - 1),
        batch_size=batch_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_minkowski(pyramid: FeaturePyramid, level: int = 0, *, coordinate_manager: Any = None) -> Any:
    """Returns one level as a `SparseTensor` of MinkowskiEngine.

    Its coordinates are multiples of its ``tensor_stride``, the size of the level's cells: in raw
    units where the pyramid's ``cell_size`` is whole; otherwise, such as in meters, in raw cells.

    Args:
        pyramid: a pyramid that knows its strides, and whose corner is a whole number of the level's
            cells away from raw coordinate 0, as `from_minkowski` makes it.
        level: the level, from 0. Default: 0.
        coordinate_manager: that of another tensor, with which the result is to be combined. None
            (default): a new one.

    Returns:
        a `SparseTensor` with int32 coordinates. Points that share a cell are added. Gradients reach
        the pyramid's values.

    Raises:
        ValueError: there is no such level, or the pyramid is not as described.
        ImportError: MinkowskiEngine is not installed.

    Example:
        ```python
        import torch
        from vicinal import voxelize
        from vicinal.interop import to_minkowski

        points = torch.tensor([[-0.2, 3.4], [1.9, 0.6]])  # meters
        voxels = voxelize(points, cell_size=0.5, bounds=[(-4, 4), (-4, 4)])
        tensor = to_minkowski(voxels.pyramid(torch.randn(2, 16), strides=(1, 2)), level=1)
        assert tensor.C.tolist() == [[0, -2, 6], [0, 2, 0]]
        assert tensor.tensor_stride == [2, 2]
        ```
    """
    cells = strided_cells_of_level(pyramid, level)
    coordinates = torch.cat((cells.coordinates[:, :1], cells.corners()), 1)
    return import_library("MinkowskiEngine").SparseTensor(
        cells.values,
        coordinates,
        tensor_stride=list(cells.stride),
        coordinate_manager=coordinate_manager,
    )
