"""Sparse and nested tensors of PyTorch."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._pyramid.coo import check_map_size, coalesce
from .._utils.checks import as_signed, has_contents, refuse
from .._utils.ragged import offsets_from_counts
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._common import (
    as_images,
    cat_images,
    points_of_level,
    pyramid_of_cells,
    pyramid_of_points,
    rows_of_entries,
    values_by_image,
)


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
        tensor: sparse COO ``[B, *spatial_shape, E]``, coalesced or not: values of one cell are
            added, as PyTorch does. With one dense dimension every entry is a point. Without one,
            the entries of a cell become one point, whose missing channels are zero. On a GPU,
            coalescing synchronizes.
        strides: the size of each level's cells, in cells of the grid: one int or P ints per level.
            Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which the grid repeats. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the coalesced tensor's cells.
        Gradients reach the tensor's values.

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
    is_coo = isinstance(tensor, Tensor) and tensor.layout == torch.sparse_coo
    if not is_coo or tensor.dim() < 3 or tensor.dense_dim() > 1 or not _is_real(tensor):
        expected = "a sparse COO tensor [B, *spatial_shape, E] with at most one dense dimension"
        refuse("tensor", f"{expected}, floating or integer", tensor)
    if not has_contents(tensor):
        refuse("tensor", "a tensor with contents", tensor)
    coo = coalesce(as_signed("tensor", tensor))
    cells, values = coo.indices().t(), coo.values()
    if not coo.dense_dim():
        shape, width = coo.shape[1:-1], coo.shape[-1]
        cells, values, _ = rows_of_entries(cells[:, :-1], cells[:, -1], values, shape, width)
    return pyramid_of_cells(
        cells,
        values,
        coo.shape[1:-1],
        coo.shape[0],
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _is_real(tensor: Tensor) -> bool:
    return not tensor.is_complex() and tensor.dtype != torch.bool


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
    check_map_size(size)
    indices = points.coordinates.t()
    return coalesce(torch.sparse_coo_tensor(indices, points.values, size, check_invariants=False))


def from_torch_csr(
    matrices: Tensor | Sequence[Tensor],
    *,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid of two spatial dimensions, row and column, from sparse CSR tensors.

    Args:
        matrices: sparse CSR ``[rows, columns]``, or ``[rows, columns, E]`` with one dense
            dimension, is one image. A batched one, ``[B, rows, columns]`` or
            ``[B, rows, columns, E]``, is B images. A list or tuple of these has the images of all,
            which may differ in size: the largest is taken.
        strides: the size of each level's cells, in cells of the grid: one int or two ints per
            level. Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which the grid repeats. Default: none.

    Returns:
        a pyramid with values ``[n, E]``, E = 1 without a dense dimension. A stored zero is a point.
        ``values_of_points`` of it has the order of ``matrix.values()``, one matrix after another.
        Gradients reach the matrices' values.

    Raises:
        ValueError: a tensor is not as described, they differ in width, dtype or device, or as for
            `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from vicinal.interop import from_torch_csr, to_torch_csr

        matrix = torch.eye(6).to_sparse_csr()
        pyramid = from_torch_csr(matrix, strides=(1, 2), pooling="sum")
        assert pyramid.level_shapes == ((6, 6), (3, 3))
        [coarse] = to_torch_csr(pyramid, level=1)
        assert torch.equal(coarse.to_dense(), 2 * torch.eye(3))
        ```
    """
    given = as_images("matrices", matrices)
    entries = [_entries_of_csr(label, matrix) for label, matrix in given.items()]
    values, offsets = cat_images("matrices", [values for _, values in entries])
    n_images = torch.tensor(
        [math.prod(matrix.crow_indices().shape[:-1]) for matrix in given.values()]
    )
    first_images = offsets_from_counts(n_images).tolist()
    cells = torch.cat([cells for cells, _ in entries])
    cells[:, 0] += torch.repeat_interleave(
        torch.tensor(first_images[:-1], device=cells.device), offsets.diff(), output_size=len(cells)
    )
    sizes = [matrix.shape[matrix.crow_indices().dim() - 1 :][:2] for matrix in given.values()]
    return pyramid_of_cells(
        cells,
        values,
        tuple(map(max, zip(*sizes, strict=True))),
        first_images[-1],
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _entries_of_csr(argument: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Image, row and column ``[n, 3]`` of what is stored, and its values ``[n, E]``."""
    is_csr = isinstance(matrix, Tensor) and matrix.layout == torch.sparse_csr
    is_csr = is_csr and matrix.dense_dim() <= 1 and matrix.dim() - matrix.dense_dim() <= 3
    if not is_csr or not _is_real(matrix):
        expected = "a sparse CSR tensor [rows, columns], [B, rows, columns], or one of these with E"
        refuse(argument, f"{expected}, floating or integer", matrix)
    columns, per_row = matrix.col_indices().flatten(), matrix.crow_indices().diff(dim=-1)
    rows = torch.arange(per_row.numel(), device=columns.device)
    rows = torch.repeat_interleave(rows, per_row.flatten(), output_size=len(columns))
    cells = (rows // per_row.shape[-1], rows % per_row.shape[-1], columns.long())
    width = matrix.shape[-1] if matrix.dense_dim() else 1
    return torch.stack(cells, 1), matrix.values().reshape(-1, width)


def to_torch_csr(
    pyramid: FeaturePyramid, level: int = 0, *, spatial_shape: Sequence[int] | None = None
) -> list[Tensor]:
    """Returns one level as sparse CSR tensors, one for each image.

    They are not one tensor, since PyTorch's batched CSR tensors have equally many values in all
    images.

    Args:
        pyramid: one of two spatial dimensions.
        level: the level, from 0. Default: 0.
        spatial_shape: of the results. None (default): that of the level, which strides may have
            padded.

    Returns:
        sparse CSR ``[rows, columns]`` if E = 1, else ``[rows, columns, E]`` with one dense
        dimension, for each image. Points that share a cell are added. Gradients reach the pyramid's
        values.

    Raises:
        ValueError: the pyramid does not have two spatial dimensions, there is no such level, or
            points lie outside ``spatial_shape``.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_torch_csr

        cells = torch.tensor([[0, 2, 3], [1, 3, 3], [1, 0, 0]])  # image, row, column
        pyramid = FeaturePyramid.from_points(cells, torch.ones(3, 1), (4, 4), 2, strides=1)
        assert [matrix.values().tolist() for matrix in to_torch_csr(pyramid)] == [[1], [1, 1]]
        ```
    """
    coo = to_torch_coo(pyramid, level, spatial_shape=spatial_shape)
    if pyramid.position_dim != 2:
        refuse("pyramid", "two spatial dimensions", f"{pyramid.position_dim}")
    n_rows, n_columns, width = coo.shape[1:]
    values = coo.values() if width > 1 else coo.values()[:, 0]
    size = (n_rows, n_columns, width)[: values.dim() + 1]
    counts = torch.bincount(coo.indices()[0], minlength=coo.shape[0]).tolist()
    parts = zip(coo.indices()[1:].split(counts, 1), values.split(counts), strict=True)
    return [
        torch.sparse_csr_tensor(
            offsets_from_counts(torch.bincount(rows, minlength=n_rows)),
            columns,
            image_values,
            size,
            check_invariants=False,
        )
        for (rows, columns), image_values in parts
    ]


def from_torch_nested(
    points: Tensor,
    features: Tensor | None = None,
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from nested tensors of raw points, an image each.

    Where one nested tensor holds both coordinates and features, slice it: ``nested[..., :3]`` and
    ``nested[..., 3:]``.

    Args:
        points: nested ``[B, n_b, P]``, jagged or strided, floating or integer, in any unit.
        features: nested ``[B, n_b, E]`` with as many points in each image. None (default): a one
            per point.
        cell_size: size of a cell in raw units, one number or one per axis.
        bounds: ``(low, high)`` in raw units for each axis, as for `voxelize`. None (default): from
            the points of all images.
        strides: the size of each level's cells, in cells: one int or P ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a cell.
        periodic_axes: axes along which space repeats, such as an azimuth. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the points, one image after another.
        Gradients reach ``features``.

    Raises:
        ValueError: a tensor is not as described, their images differ in length, or as for
            `voxelize` and `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from vicinal.interop import from_torch_nested, to_torch_nested

        scans = [torch.rand(n, 3 + 16) for n in (50, 0, 80)]  # x, y, z, 16 features
        nested = torch.nested.nested_tensor(scans, layout=torch.jagged)
        pyramid = from_torch_nested(nested[..., :3], nested[..., 3:], cell_size=0.1)
        assert pyramid.batch_size == 3
        per_point = to_torch_nested(pyramid)
        assert [len(image) for image in per_point.unbind()] == [50, 0, 80]
        ```
    """
    rows, offsets = _rows_of_nested("points", points)
    if features is not None:
        features, of_features = _rows_of_nested("features", features)
        if not torch.equal(offsets, of_features):
            counts, came = offsets.diff().tolist(), of_features.diff().tolist()
            refuse("features", f"images of {counts} points", f"images of {came}")
    return pyramid_of_points(
        rows,
        features,
        offsets=offsets,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _rows_of_nested(argument: str, nested: Tensor) -> tuple[Tensor, Tensor]:
    """The rows ``[n, C]`` of all images of a nested tensor ``[B, n_b, C]``, and their offsets."""
    if not isinstance(nested, Tensor) or not nested.is_nested or nested.dim() != 3:
        is_nested = isinstance(nested, Tensor) and nested.is_nested
        came = f"one of {nested.dim()} dimensions" if is_nested else nested
        refuse(argument, "a nested tensor [B, n_b, columns]", came)
    if nested.layout == torch.jagged and nested.is_contiguous():
        jagged: Any = nested  # of a class without a public name, which has offsets
        return jagged.values(), jagged.offsets()
    return cat_images(argument, nested.unbind())


def to_torch_nested(pyramid: FeaturePyramid, level: int = 0) -> Tensor:
    """Returns the values of raw points as a nested tensor, an image each.

    Args:
        pyramid: one that knows the rows of its raw points, as `from_torch_nested` makes.
        level: the level whose cells the values are taken from, from 0. Default: 0.

    Returns:
        nested ``[B, n_b, E]`` of the jagged layout: for each raw point the values of its cell, zero
        outside the bounds. Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, or the pyramid does not know the rows of its raw points.

    Example:
        ```python
        import torch
        from vicinal import voxelize
        from vicinal.interop import to_torch_nested

        points, offsets = torch.rand(9, 2), torch.tensor([0, 4, 9])
        pyramid = voxelize(points, offsets=offsets, cell_size=0.1).pyramid(torch.randn(9, 16))
        first, second = to_torch_nested(pyramid, level=1).unbind()
        assert first.shape == (4, 16) and second.shape == (5, 16)
        ```
    """
    values, counts = values_by_image(pyramid, level)
    return torch.nested.nested_tensor_from_jagged(values, offsets_from_counts(counts))
