"""Sparse arrays and matrices of SciPy."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import as_tensor, refuse
from .._utils.types import Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._common import (
    as_images,
    as_numpy,
    cat_images,
    import_library,
    pyramid_of_entries,
    stored_values,
)
from .torch_sparse import to_torch_coo


def from_scipy(
    arrays: Any | Sequence[Any],
    *,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid with one value per point from sparse arrays or matrices of SciPy.

    Args:
        arrays: a sparse array or matrix of any format is one image. 2-D ones are images of rows and
            columns; a ``coo_array`` may have any number of dimensions. A list or tuple of them is a
            batch, whose images may differ in size: the largest is taken. Booleans count as 0 and 1.
        strides: the size of each level's cells, in cells of the grid: one int or P ints per level.
            Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which the grid repeats. Default: none.

    Returns:
        a pyramid with values ``[n, 1]`` of the arrays' dtype, integers as int64; but the mean of
        integers has PyTorch's default dtype, also that of one number. A stored zero is a point, and
        entries of one cell are added, as SciPy does. ``values_of_points`` of it has the order of
        ``array.tocoo().data``, which is that of ``data`` for COO, CSR and CSC, one array after
        another.

    Raises:
        ValueError: an array is not as described, they differ in dtype or number of dimensions, or
            as for `FeaturePyramid.from_points`.
        ImportError: SciPy is not installed.

    Example:
        ```python
        import numpy as np
        from scipy import sparse
        from vicinal.interop import from_scipy, to_scipy

        counts = sparse.csr_array(np.array([[0, 3, 0, 0], [0, 4, 0, 5]]))
        pyramid = from_scipy(counts, strides=(1, 2), pooling="sum")
        [coarse] = to_scipy(pyramid, level=1)
        assert coarse.toarray().tolist() == [[7, 5]]
        ```
    """
    given = as_images("arrays", arrays)
    images = [_entries(label, array) for label, array in given.items()]
    shapes = [array.shape for array, _, _ in images]
    if len({len(shape) for shape in shapes}) > 1:
        refuse("arrays", "the same number of dimensions in all images", f"the shapes {shapes}")
    cells, offsets = cat_images("arrays", [cells for _, cells, _ in images])
    values, _ = cat_images("arrays", [values[:, None] for _, _, values in images])
    image = torch.repeat_interleave(offsets.diff(), output_size=len(cells))
    return pyramid_of_entries(
        torch.cat((image[:, None], cells), 1),
        values[:, 0],
        tuple(map(max, zip(*shapes, strict=True))),
        len(images),
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _entries(argument: str, array: Any) -> tuple[Any, Tensor, Tensor]:
    """The array in COO format, the cells int64 ``[n, P]`` of what it stores, and these ``[n]``."""
    if not import_library("scipy.sparse", "scipy").issparse(array):
        refuse(argument, "a sparse array or matrix of SciPy", array)
    coo = array.tocoo(copy=False)
    indices = getattr(coo, "coords", None) or (coo.row, coo.col)  # before SciPy 1.13
    cells = torch.stack([as_tensor(argument, index).long() for index in indices], 1)
    return coo, cells, stored_values(argument, coo.data)


def to_scipy(
    pyramid: FeaturePyramid, level: int = 0, *, spatial_shape: Sequence[int] | None = None
) -> list[Any]:
    """Returns one level with one value per point as sparse arrays of SciPy.

    Args:
        pyramid: one with values ``[n, 1]``. ``pyramid.with_values(values[:, :1])`` selects a
            channel.
        level: the level, from 0. Default: 0.
        spatial_shape: of the results. None (default): that of the level, which strides may have
            padded.

    Returns:
        a ``coo_array`` of ``spatial_shape`` for each image, on the CPU and without gradients.
        Points that share a cell are added, and zeros are stored. bfloat16 becomes float32. SciPy
        before 1.15 has 2-D arrays only.

    Raises:
        ValueError: the pyramid has more than one value per point, there is no such level, or points
            lie outside ``spatial_shape``.
        ImportError: SciPy is not installed.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_scipy

        cells = torch.tensor([[0, 2, 3], [1, 3, 3]])  # image, row, column
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 1), (8, 8), 2, strides=(1, 2))
        first, second = to_scipy(pyramid, level=1)
        assert first.toarray()[1, 1] == second.toarray()[1, 1] == 1
        ```
    """
    coo = to_torch_coo(pyramid, level, spatial_shape=spatial_shape)
    if pyramid.embed_dim != 1:
        refuse("pyramid", "one value per point", f"values of {pyramid.embed_dim} channels")
    sparse = import_library("scipy.sparse", "scipy")
    counts = torch.bincount(coo.indices()[0], minlength=coo.shape[0]).tolist()
    values = coo.values()[:, 0]
    values = values.float() if values.dtype == torch.float16 else values  # which SciPy lacks
    cells = as_numpy(coo.indices()[1:]), as_numpy(values)
    parts, start = [], 0
    for count in counts:
        rows = slice(start, start + count)
        entries = cells[1][rows], tuple(cells[0][:, rows])
        parts.append(sparse.coo_array(entries, shape=tuple(coo.shape[1:-1])))
        start += count
    return parts
