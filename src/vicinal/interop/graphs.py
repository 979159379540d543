"""Graphs of PyTorch Geometric."""

from collections.abc import Sequence
from typing import Any

import torch

from .._utils.checks import check_tensor, refuse
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._cells import (
    attributes,
    centers_of_points,
    distinct_points_of_level,
    images_of_offsets,
    pyramid_of_raw_points,
)
from ._common import import_library


def from_pyg(
    data: Any,
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a `Data` or a `Batch` of PyTorch Geometric. It ignores edges.

    Args:
        data: ``pos`` ``[n, P]``, in any unit; ``x`` ``[n, E]``; and for a batch ``ptr``
            ``[B + 1]``, or else ``batch`` ``[n]``, the image of each node.
        cell_size: size of a cell in the unit of the positions, one number or one per axis.
        bounds: ``(low, high)`` in that unit for each axis; points outside have no row. None
            (default), or None for an axis: those of the points.
        strides: the size of each level's cells, in cells of ``cell_size``: one int or P ints per
            level. Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which space repeats, whose bounds are one period and must be
            given. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the nodes. Gradients reach ``x``.

    Raises:
        ValueError: the data is not as described, or as for `voxelize` and
            `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from torch_geometric.data import Batch, Data
        from vicinal.interop import from_pyg, to_pyg

        graphs = [Data(x=torch.randn(n, 16), pos=torch.rand(n, 3)) for n in (4, 5)]
        batch = Batch.from_data_list(graphs)
        pyramid = from_pyg(batch, cell_size=0.05, strides=(1, 2))
        batch.x = pyramid.values_of_points(level=1)
        assert to_pyg(pyramid, level=1).num_graphs == 2
        ```
    """
    positions, features = attributes("data", data, "a Data of PyTorch Geometric", "pos", "x")
    features = check_tensor("data.x", features, ("n", "E"), kind="number")
    n, device = len(features), features.device
    positions = check_tensor("data.pos", positions, (n, "P"), kind="number", device=device)
    offsets, images = getattr(data, "ptr", None), getattr(data, "batch", None)
    if images is None and offsets is not None:  # subgraphs of a batch keep its ptr
        images = images_of_offsets("data.ptr", offsets, n, device)
    return pyramid_of_raw_points(
        "data.pos",
        positions,
        images,
        features,
        batch_size=None if offsets is None else len(offsets) - 1,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def to_pyg(pyramid: FeaturePyramid, level: int = 0, *, dtype: torch.dtype = torch.float32) -> Any:
    """Returns one level as a `Batch` of PyTorch Geometric, without edges.

    Args:
        pyramid: any pyramid. Where origin or cell size are not known, raw units are cells.
        level: the level, from 0. Default: 0.
        dtype: of the positions. Default: float32.

    Returns:
        a `Batch` with a node per cell, sorted by image and cell: ``x``; ``pos``, the centers of the
        cells in raw units; ``batch`` and ``ptr``. Points that share a cell are added. Gradients
        reach the pyramid's values.

    Raises:
        ValueError: there is no such level, the pyramid has no images, or ``dtype`` is not floating.
        ImportError: torch_geometric is not installed.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.interop import to_pyg

        cells = torch.tensor([[0, 2, 3], [2, 3, 3]])  # image, row, column
        pyramid = FeaturePyramid.from_points(cells, torch.ones(2, 8), (8, 8), 3, strides=(1, 2))
        batch = to_pyg(pyramid, level=1)
        assert batch.pos.tolist() == [[3.0, 3.0], [3.0, 3.0]]
        assert batch.ptr.tolist() == [0, 1, 1, 2]
        ```
    """
    points = distinct_points_of_level(pyramid, level)
    if not points.batch_size:
        refuse("pyramid", "a pyramid with at least one image", pyramid)
    positions = centers_of_points(pyramid, level, points, dtype)
    counts = torch.bincount(points.coordinates[:, 0], minlength=points.batch_size).tolist()
    library = import_library("torch_geometric.data", "torch_geometric")
    images = zip(points.values.split(counts), positions.split(counts), strict=True)
    return library.Batch.from_data_list([library.Data(x=x, pos=pos) for x, pos in images])
