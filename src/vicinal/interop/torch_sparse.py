"""Sparse tensors of PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._pyramid.coo import check_coo, coalesce
from .._utils.types import Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._common import points_of_level, pyramid_of_cells


def from_torch_coo(
    tensor: Tensor,
    *,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a sparse COO tensor of one grid.

    `FeaturePyramid.from_coo` takes the other form, a map that holds all levels.

    Args:
        tensor: sparse COO ``[B, *spatial_shape, E]`` with one dense dimension, coalesced or not:
            values of one cell are added, as PyTorch does. On a GPU, coalescing synchronizes.
        strides: the size of each level's cells, in cells of the grid: one int or P ints per level.
            Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which the grid repeats. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the coalesced tensor. Gradients reach
        the tensor's values.

    Raises:
        ValueError: the tensor is not as described, or as for `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from vicinal.interop import from_torch_coo, to_torch_coo

        indices = torch.tensor([[0, 0], [5, 1], [7, 1]])  # image, row, column
        size, values = (1, 8, 8, 16), torch.randn(2, 16)
        tensor = torch.sparse_coo_tensor(indices, values, size, check_invariants=True)
        pyramid = from_torch_coo(tensor, strides=(1, 2))
        assert pyramid.level_shapes == ((8, 8), (4, 4))
        assert torch.equal(to_torch_coo(pyramid).to_dense(), tensor.to_dense())
        ```
    """
    axes = [f"size {axis}" for axis in range(max(_dim(tensor) - 2, 1))]
    check_coo("tensor", tensor, ["B", *axes, "E"])
    coo = coalesce(tensor)
    return pyramid_of_cells(
        coo.indices().t(),
        coo.values(),
        coo.shape[1:-1],
        coo.shape[0],
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_torch_coo(
    pyramid: FeaturePyramid, level: int = 0, *, spatial_shape: Sequence[int] | None = None
) -> Tensor:
    """Returns one level as a sparse COO tensor.

    `FeaturePyramid.to_coo` returns all levels in one.

    Args:
        pyramid: any pyramid.
        level: the level, from 0. Default: 0.
        spatial_shape: of the result. None (default): that of the level, which strides may have
            padded.

    Returns:
        sparse COO ``[B, *spatial_shape, E]`` with one dense dimension, coalesced. Points that share
        a cell are added. Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, or points lie outside ``spatial_shape``.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_torch_coo

        cells = torch.tensor([[0, 2, 3], [0, 3, 3]])  # image, row, column
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 1), (8, 8), 1, strides=(1, 2))
        assert to_torch_coo(pyramid, level=1).shape == (1, 4, 4, 1)
        ```
    """
    points = points_of_level(pyramid, level, spatial_shape)
    size = (points.batch_size, *points.spatial_shape, points.values.shape[1])
    indices = points.coordinates.t()
    return coalesce(torch.sparse_coo_tensor(indices, points.values, size, check_invariants=False))


def _dim(tensor: Tensor) -> int:
    return tensor.dim() if isinstance(tensor, Tensor) else 0
