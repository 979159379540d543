"""Sparse tensors of torchsparse and of TRELLIS."""

from collections.abc import Sequence
from typing import Any

import torch

from .._utils.checks import check_tensor, check_type, refuse
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._cells import (
    as_stride,
    attributes,
    pyramid_of_strided_cells,
    strided_cells_of_level,
)
from ._common import import_library


def from_torchsparse(
    tensor: Any,
    *,
    bounds: BoundsLike | None = None,
    batch_size: int | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a `SparseTensor` of torchsparse.

    Both forms of coordinates are read. From torchsparse 2.1 on, tensors have a ``spatial_range``;
    the image comes first and cells are numbered one by one. Before, the image comes last and
    coordinates are multiples of the stride. Raw coordinates of the pyramid are in cells of stride
    1.

    Args:
        tensor: ``feats`` ``[n, E]``, ``coords`` integer ``[n, 4]``, image and cell, and ``stride``.
        bounds: ``(low, high)`` in cells of stride 1 for each axis; points outside have no row. None
            (default), or None for an axis: from 0, or from the first multiple of all strides below
            negative cells, to the last cell.
        batch_size: number of images, empty images at the end included. None (default): that of
            ``spatial_range`` if the tensor has one, otherwise as many as ``coords`` names.
        strides: the size of each level's cells, in cells of the tensor: one int or P ints per
            level. Default: 1, 2, 4, 8.
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
        import torch
        from torchsparse import SparseTensor
        from vicinal.interop import from_torchsparse, to_torchsparse

        coords = torch.tensor([[0, 1, 1, 3], [0, 5, 7, 1]], dtype=torch.int32)  # image, x, y, z
        tensor = SparseTensor(torch.randn(2, 16), coords)
        pyramid = from_torchsparse(tensor, strides=(1, 2))
        assert torch.equal(pyramid.values_of_points(level=0), tensor.feats)
        assert torch.equal(to_torchsparse(pyramid).coords, coords)
        ```
    """
    kind = "a SparseTensor of torchsparse"
    feats, coords, stride = attributes("tensor", tensor, kind, "feats", "coords", "stride")
    feats = check_tensor("tensor.feats", feats, ("n", "E"), kind="number")
    shape = (len(feats), 4)
    coords = check_tensor("tensor.coords", coords, shape, kind="integer", device=feats.device)
    stride = as_stride("tensor.stride", stride, 3)
    spatial_range = getattr(tensor, "spatial_range", None)
    if _is_image_first(tensor):
        cells = coords[:, 1:].long()
        images, raw = coords[:, 0], cells * cells.new_tensor(stride)
    else:
        images, raw = coords[:, 3], coords[:, :3]
    if spatial_range is not None:
        spatial_range = as_stride("tensor.spatial_range", spatial_range, 4)
        batch_size = spatial_range[0] if batch_size is None else batch_size
    return pyramid_of_strided_cells(
        "tensor.coords",
        raw,
        images,
        feats,
        stride=stride,
        batch_size=batch_size,
        spatial_shape=None if spatial_range is None else spatial_range[1:],
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_torchsparse(pyramid: FeaturePyramid, level: int = 0) -> Any:
    """Returns one level as a `SparseTensor` of torchsparse.

    Its coordinates have the form of the installed version, see `from_torchsparse`. Its ``stride``
    is the size of the level's cells: in raw units where the pyramid's ``cell_size`` is whole;
    otherwise, such as in meters, in raw cells.

    Args:
        pyramid: a pyramid of three dimensions that knows its strides, and whose corner is a whole
            number of the level's cells away from raw coordinate 0, as `from_torchsparse` makes it.
        level: the level, from 0. Default: 0.

    Returns:
        a `SparseTensor` with int32 coordinates, sorted by image and cell, and, where the version
        has it and no cell is negative, a ``spatial_range``. Points that share a cell are added.
        Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, or the pyramid is not as described.
        ImportError: torchsparse is not installed.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_torchsparse

        cells = torch.tensor([[0, 2, 3, 1], [0, 3, 3, 1]])  # image, x, y, z
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 1), (8, 8, 8), 1, strides=(1, 2))
        tensor = to_torchsparse(pyramid, level=1)
        assert tensor.coords.tolist() == [[0, 1, 1, 0]]
        assert tensor.stride == (2, 2, 2)
        ```
    """
    cells = strided_cells_of_level(pyramid, level)
    _check_three_dimensions(pyramid)
    tensor = import_library("torchsparse").SparseTensor(
        cells.values, cells.coordinates, cells.stride
    )
    if not _is_image_first(tensor):
        tensor.coords = torch.cat((cells.corners(), cells.coordinates[:, :1]), 1)
    elif not (cells.coordinates < 0).any():
        tensor.spatial_range = (cells.batch_size, *cells.spatial_shape)
    return tensor


def _is_image_first(tensor: Any) -> bool:
    """Whether the image is the first column of ``coords``, as from torchsparse 2.1 on."""
    return hasattr(tensor, "spatial_range")


def _check_three_dimensions(pyramid: FeaturePyramid) -> None:
    if pyramid.position_dim != 3:
        refuse("pyramid", "a pyramid of three dimensions", pyramid)


def from_trellis(
    tensor: Any,
    *,
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a `SparseTensor` of TRELLIS or TRELLIS.2.

    Args:
        tensor: ``feats`` ``[n, E]``, ``coords`` integer ``[n, 4]``, image and cell, and ``shape``,
            which begins with the number of images.
        bounds: ``(low, high)`` in cells for each axis; points outside have no row. None (default),
            or None for an axis: from 0, or from the first multiple of all strides below negative
            cells, to the last cell.
        strides: the size of each level's cells, in cells of the tensor: one int or P ints per
            level. Default: 1, 2, 4, 8.
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
        import torch
        from trellis.modules.sparse import SparseTensor
        from vicinal.interop import from_trellis, to_trellis

        coords = torch.tensor([[0, 1, 1, 3], [0, 5, 7, 1]], dtype=torch.int32)  # image, x, y, z
        tensor = SparseTensor(torch.randn(2, 16), coords)
        pyramid = from_trellis(tensor, strides=(1, 2))
        same = tensor.replace(pyramid.values_of_points(level=0))
        assert torch.equal(same.feats, tensor.feats)
        assert torch.equal(to_trellis(pyramid).coords, coords)
        ```
    """
    kind = "a SparseTensor of TRELLIS"
    feats, coords, sizes = attributes("tensor", tensor, kind, "feats", "coords", "shape")
    feats = check_tensor("tensor.feats", feats, ("n", "E"), kind="number")
    shape = (len(feats), 4)
    coords = check_tensor("tensor.coords", coords, shape, kind="integer", device=feats.device)
    if not isinstance(sizes, Sequence) or not sizes:
        refuse("tensor.shape", "sizes that begin with the number of images", sizes)
    return pyramid_of_strided_cells(
        "tensor.coords",
        coords[:, 1:],
        coords[:, 0],
        feats,
        stride=(1, 1, 1),
        batch_size=sizes[0],
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_trellis(
    pyramid: FeaturePyramid, level: int = 0, *, library: str = "trellis.modules.sparse"
) -> Any:
    """Returns one level as a `SparseTensor` of TRELLIS or TRELLIS.2.

    Args:
        pyramid: a pyramid of three dimensions that knows its strides, and whose corner is a whole,
            non-negative number of the level's cells away from raw coordinate 0, as `from_trellis`
            makes it.
        level: the level, from 0. Default: 0.
        library: the module that has the class. Default: that of TRELLIS; for TRELLIS.2,
            ``"trellis2.modules.sparse"``.

    Returns:
        a `SparseTensor` with int32 coordinates, sorted by image and cell. Points that share a cell
        are added. Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, it has no points, or the pyramid is not as described.
        ImportError: ``library`` is not installed.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_trellis

        cells = torch.tensor([[0, 2, 3, 1], [2, 3, 3, 1]])  # image, x, y, z
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 8), (8, 8, 8), 3, strides=(1, 2))
        tensor = to_trellis(pyramid, level=1)
        assert tensor.coords.tolist() == [[0, 1, 1, 0], [2, 1, 1, 0]]
        assert tensor.shape == (3, 8)
        ```
    """
    check_type("library", library, str)
    cells = strided_cells_of_level(pyramid, level)
    _check_three_dimensions(pyramid)
    if not len(cells.values):
        refuse("pyramid", "a pyramid with points, which TRELLIS asks for", pyramid)
    if (cells.coordinates < 0).any():
        refuse("pyramid", "cells from raw coordinate 0 on, which TRELLIS asks for", pyramid)
    return import_library(library, "TRELLIS").SparseTensor(
        feats=cells.values,
        coords=cells.coordinates,
        shape=torch.Size([cells.batch_size, cells.values.shape[1]]),
    )
