"""Point clouds of Pointcept."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import as_numbers, as_tensor, check_tensor, refuse
from .._utils.ragged import offsets_from_ids
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._cells import (
    as_int32,
    centers_of_points,
    distinct_points_of_level,
    images_of_offsets,
    pyramid_of_raw_points,
    pyramid_of_strided_cells,
    raw_sizes,
)


def from_pointcept(
    point: Mapping[str, Any],
    *,
    cell_size: float | Sequence[float] | None = None,
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from a `Point` of Pointcept, or a dictionary with its keys.

    Args:
        point: ``feat`` ``[n, E]``; ``offset`` ``[B]``, the number of points of all images up to
            each one, without a leading zero, or else ``batch`` ``[n]``, the image of each point;
            and ``grid_coord`` integer ``[n, P]``, or else ``coord`` ``[n, P]``.
        cell_size: size of a cell in the unit of ``coord``, one number or one per axis. None
            (default): the cells are ``grid_coord``, and the pyramid's raw units are these cells;
            without it, cells of ``coord`` have the size ``grid_size``.
        bounds: ``(low, high)`` for each axis, in cells if the cells are ``grid_coord``, otherwise
            in the unit of ``coord``; points outside have no row. None (default), or None for an
            axis: those of the points; of cells, from 0 on.
        strides: the size of each level's cells, in cells of these sizes: one int or P ints per
            level. Default: 1, 2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a coarser cell.
        periodic_axes: axes along which space repeats, whose bounds are one period and must be
            given. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the points. Gradients reach ``feat``.

    Raises:
        ValueError: the point is not as described, or as for `voxelize` and
            `FeaturePyramid.from_points`.

    Example:
        ```python
        import torch
        from vicinal.interop import from_pointcept, to_pointcept

        coord = torch.rand(9, 3)
        point = {
            "coord": coord,
            "grid_coord": (coord / 0.05).int(),
            "feat": torch.randn(9, 16),
            "offset": torch.tensor([4, 9]),
        }
        pyramid = from_pointcept(point, strides=(1, 2))
        point["feat"] = pyramid.values_of_points(level=1)
        assert to_pointcept(pyramid, level=1)["offset"].shape == (2,)
        ```
    """
    if not isinstance(point, Mapping):
        refuse("point", "a Point of Pointcept, or a dictionary with its keys", point)
    has_cells = cell_size is None and "grid_coord" in point
    key = "grid_coord" if has_cells else "coord"
    for name in ("feat", key):
        if name not in point:
            refuse("point", f"the key {name!r}", f"the keys {list(point)}")
    features = check_tensor("point['feat']", point["feat"], ("n", "E"), kind="number")
    name, kind = f"point[{key!r}]", "integer" if has_cells else "number"
    shape, device = (len(features), "P"), features.device
    places = check_tensor(name, point[key], shape, kind=kind, device=device)
    images, batch_size = _images(point, features)
    if has_cells:
        return pyramid_of_strided_cells(
            name,
            places,
            images,
            features,
            stride=(1,) * places.shape[1],
            batch_size=batch_size,
            bounds=bounds,
            strides=strides,
            pooling=pooling,
            periodic_axes=periodic_axes,
        )
    return pyramid_of_raw_points(
        name,
        places,
        images,
        features,
        batch_size=batch_size,
        cell_size=_grid_size(point) if cell_size is None else cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _images(point: Mapping[str, Any], features: Tensor) -> tuple[Tensor, int | None]:
    """The image of each point, int64 ``[n]``, and the number of images; None: not known."""
    n, device = len(features), features.device
    if point.get("offset") is not None:
        offset = check_tensor("point['offset']", point["offset"], ("B",), kind="integer")
        offsets = torch.nn.functional.pad(offset, (1, 0))
        return images_of_offsets("point['offset']", offsets, n, device), len(offset)
    if point.get("batch") is not None:
        images = check_tensor("point['batch']", point["batch"], (n,), kind="integer", device=device)
        return images, None
    return torch.zeros(n, dtype=torch.int64, device=device), 1


def _grid_size(point: Mapping[str, Any]) -> float:
    """``grid_size``: a number, or one per image, all the same."""
    expected = "a number, the same for all images"
    size = point.get("grid_size")
    if size is None:
        refuse("cell_size", "a size, since the point has no grid_coord and no grid_size", None)
    size = as_tensor("point['grid_size']", size)
    count = size.numel() if isinstance(size, Tensor) else 1
    flat = size.flatten() if isinstance(size, Tensor) else size
    sizes = set(as_numbers("point['grid_size']", flat, count, expected))
    if len(sizes) != 1:
        refuse("point['grid_size']", expected, size)
    return sizes.pop()


def to_pointcept(
    pyramid: FeaturePyramid, level: int = 0, *, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Returns one level as a dictionary that `Point` of Pointcept, and its models, take.

    Args:
        pyramid: a pyramid that knows its strides. Where origin or cell size are not known, raw
            units are cells.
        level: the level, from 0. Default: 0.
        dtype: of ``coord``. Default: float32.

    Returns:
        a dictionary of a point per cell, sorted by image and cell: ``feat``; ``coord``, the centers
        of the cells in raw units; ``grid_coord`` int32, cells of the level; ``offset`` ``[B]`` and
        ``batch``; and ``grid_size``, where cells have one size along all axes. Points that share a
        cell are added. Gradients reach the pyramid's values.

    Raises:
        ValueError: there is no such level, the pyramid does not know its strides, or ``dtype`` is
            not floating.

    Example:
        ```python
        import torch
        from vicinal import voxelize
        from vicinal.interop import to_pointcept

        points = torch.tensor([[0.2, 3.4, 1.0], [1.9, 0.6, 1.0]])  # meters
        voxels = voxelize(points, cell_size=0.5, bounds=[(0, 4), (0, 4), (0, 4)])
        point = to_pointcept(voxels.pyramid(torch.randn(2, 16), strides=(1, 2)), level=1)
        assert point["grid_coord"].tolist() == [[0, 3, 1], [1, 0, 1]]
        assert point["grid_size"] == 1.0
        assert point["offset"].tolist() == [2]
        ```
    """
    points = distinct_points_of_level(pyramid, level)
    sizes = raw_sizes(pyramid, level)
    images = points.coordinates[:, 0]
    point = {
        "coord": centers_of_points(pyramid, level, points, dtype),
        "grid_coord": as_int32(points.coordinates[:, 1:]),
        "feat": points.values,
        "offset": offsets_from_ids(images, points.batch_size)[1:],
        "batch": images,
    }
    return point if len(set(sizes)) > 1 else {**point, "grid_size": float(sizes[0])}
