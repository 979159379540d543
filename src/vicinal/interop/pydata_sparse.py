"""Arrays of the package sparse, by the PyData community."""

from collections.abc import Sequence
from typing import Any

import torch

from .._utils.checks import as_tensor, refuse
from .._utils.types import StridesLike
from ..pyramid import FeaturePyramid
from ._common import as_numpy, import_library, pyramid_of_cells, rows_of_entries, stored_values
from .torch_sparse import to_torch_coo


def from_pydata_sparse(
    array: Any,
    *,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: str = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from an array of the package ``sparse``.

    Args:
        array: ``sparse.COO`` ``[B, *spatial_shape, E]`` with the fill value 0. Other formats, such
            as ``GCXS`` and ``DOK``, are converted. ``array[None, ..., None]`` makes it of one image
            of one channel.
        strides: the size of each level's cells, in cells of the grid: one int or P ints per level.
            Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which the grid repeats. Default: none.

    Returns:
        a pyramid. The entries of a cell become one point, whose missing channels are zero.
        ``values_of_points`` of it has the points sorted by image and cell.

    Raises:
        ValueError: the array is not as described, or as for `FeaturePyramid.from_points`.

    Example:
        ```python
        import numpy as np
        import sparse
        from vicinal.interop import from_pydata_sparse, to_pydata_sparse

        dense = np.zeros((2, 8, 8, 3))  # image, row, column, channel
        dense[0, 1, 1] = dense[1, 6, 7] = [1, 0, 2]
        pyramid = from_pydata_sparse(sparse.COO(dense), strides=(1, 2))
        assert pyramid.values_of_points(level=0).tolist() == [[1, 0, 2], [1, 0, 2]]
        assert (to_pydata_sparse(pyramid).todense() == dense).all()
        ```
    """
    if not hasattr(array, "asformat") or not hasattr(array, "fill_value") or array.ndim < 3:
        refuse("array", "an array of the package sparse, [B, *spatial_shape, E]", array)
    if array.fill_value != 0:
        refuse("array", "the fill value 0", f"{array.fill_value}")
    coo = array.asformat("coo")
    indices = as_tensor("array", coo.coords).t().long()
    values = stored_values("array", coo.data)
    batch_size, *shape, width = coo.shape
    cells, rows, _ = rows_of_entries(indices[:, :-1], indices[:, -1], values, shape, width)
    return pyramid_of_cells(
        cells,
        rows,
        shape,
        batch_size,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_pydata_sparse(
    pyramid: FeaturePyramid, level: int = 0, *, spatial_shape: Sequence[int] | None = None
) -> Any:
    """Returns one level as an array of the package ``sparse``.

    Args:
        pyramid: any pyramid.
        level: the level, from 0. Default: 0.
        spatial_shape: of the result. None (default): that of the level, which strides may have
            padded.

    Returns:
        ``sparse.COO`` ``[B, *spatial_shape, E]``, on the CPU and without gradients. Points that
        share a cell are added, and all channels of a point are stored, zeros included. bfloat16
        becomes float32.

    Raises:
        ValueError: there is no such level, or points lie outside ``spatial_shape``.
        ImportError: ``sparse`` is not installed.

    Example:
        ```python
        import sparse
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_pydata_sparse

        cells = torch.tensor([[0, 2, 3], [0, 3, 3]])  # image, row, column
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 16), (8, 8), 1, strides=(1, 2))
        array = to_pydata_sparse(pyramid, level=1)
        assert isinstance(array, sparse.COO) and array.shape == (1, 4, 4, 16)
        ```
    """
    coo = to_torch_coo(pyramid, level, spatial_shape=spatial_shape)
    sparse = import_library("sparse")
    width = coo.shape[-1]
    channels = torch.arange(width, device=coo.device).repeat(coo.indices().shape[1])
    indices = torch.cat((coo.indices().repeat_interleave(width, 1), channels[None]))
    values = as_numpy(coo.values().flatten())
    return sparse.COO(
        as_numpy(indices), values, shape=tuple(coo.shape), has_duplicates=False, sorted=True
    )
