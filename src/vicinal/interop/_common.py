"""What all conversions share: cells or raw points in, the points of one level out."""

import functools
import importlib
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._pyramid.raw_points import images_of_points
from .._utils.checks import (
    as_integer,
    as_spatial_shape,
    as_tensor,
    check_finite,
    check_tensor,
    has_contents,
    refuse,
)
from .._utils.ragged import offsets_from_counts, take_rows
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pooling import check_pooling, pool_points
from ..pyramid import FeaturePyramid
from ..voxels import voxelize


class LevelPoints(NamedTuple):
    """The points of one level, sorted by image and cell.

    Attributes:
        coordinates: int64 ``[m, P + 1]``, image and cell of each point.
        values: ``[m, E]``.
        spatial_shape: number of cells along each axis.
        batch_size: number of images.
    """

    coordinates: Tensor
    values: Tensor
    spatial_shape: tuple[int, ...]
    batch_size: int


def pyramid_of_cells(
    coordinates: Tensor,
    values: Tensor,
    spatial_shape: Sequence[int],
    batch_size: int,
    *,
    strides: StridesLike,
    pooling: Pooling,
    periodic_axes: Sequence[int],
) -> FeaturePyramid:
    """A pyramid of points ``[n, P + 1]`` (image, cell) on a grid that the container has.

    It keeps the row of each point, so `FeaturePyramid.values_of_points` has the container's order.
    """
    if not has_contents(coordinates):
        refuse("coordinates", "a tensor with contents", coordinates)
    return FeaturePyramid.from_points(
        coordinates,
        values,
        spatial_shape,
        batch_size,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
        keep_point_rows=True,
    )


def points_of_level(
    pyramid: Any, level: int, spatial_shape: Sequence[int] | None = None
) -> LevelPoints:
    """The points of one level; ``spatial_shape`` is that of the result, None for the level's.

    Raises:
        ValueError: ``pyramid`` is no pyramid, it has no such level, or points lie outside
            ``spatial_shape``.
    """
    index = check_level(pyramid, level)
    shape = pyramid.level_shapes[index]
    rows = ((pyramid.levels == index) & ~pyramid.misplaced()).nonzero()[:, 0]
    coordinates = pyramid.coordinates[rows, :-1]
    if spatial_shape is not None:
        shape = _shape_that_holds(coordinates[:, 1:], spatial_shape)
    return LevelPoints(coordinates, take_rows(pyramid.values, rows), shape, pyramid.batch_size)


def check_level(pyramid: Any, level: int) -> int:
    """``level`` as an int.

    Raises:
        ValueError: ``pyramid`` is no pyramid, or it has no such level.
    """
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    index = as_integer(level)
    if index is None or not 0 <= index < pyramid.n_levels:
        refuse("level", f"a level in [0, {pyramid.n_levels})", level)
    return index


def _shape_that_holds(cells: Tensor, spatial_shape: Sequence[int]) -> tuple[int, ...]:
    shape = as_spatial_shape(spatial_shape, cells.shape[1])
    if (cells >= torch.tensor(shape, device=cells.device)).any():
        refuse("spatial_shape", f"a shape that holds cells up to {cells.amax(0).tolist()}", shape)
    return shape


def import_library(name: str, package: str | None = None) -> ModuleType:
    """Imports a library on first use.

    Raises:
        ImportError: it is not installed; the message names the package that has it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:  # what is missing is something that it needs
            raise
        raise ImportError(
            f"this conversion needs {package or name}, which is not installed"
        ) from error


def as_names(argument: str, names: str | Sequence[str]) -> list[str]:
    """A list of names; one name is a list of one."""
    given = [names] if isinstance(names, str) else names
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given):
        refuse(argument, "a name, or a sequence of names", names)
    return list(given)


def as_images(argument: str, value: Any) -> dict[str, Any]:
    """The images of a batch, by what they are called in messages: a list or tuple has one each,
    anything else is the only one.
    """
    if not isinstance(value, list | tuple):
        return {argument: value}
    if not value:
        refuse(argument, "at least one image", value)
    return {f"{argument}[{index}]": image for index, image in enumerate(value)}


def cat_images(argument: str, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The rows ``[n, C]`` of all images, one image after another, and their offsets ``[B + 1]``.

    The rows of a single image are not copied.

    Raises:
        ValueError: images differ in width, dtype or device.
    """
    first = next((image for image in images if len(image)), images[0])
    # An empty list has no dtype of its own.
    images = [image if len(image) else image.to(first.dtype) for image in images]
    for index, image in enumerate(images):
        kind = image.shape[1], image.dtype, image.device
        if kind != (first.shape[1], first.dtype, first.device):
            width, dtype, device = first.shape[1], first.dtype, first.device
            expected = f"{width} columns of {dtype} on {device}, as of the first image with rows"
            refuse(f"{argument}[{index}]", expected, image)
    counts = torch.tensor([len(image) for image in images], device=first.device)
    return first if len(images) == 1 else torch.cat(list(images)), offsets_from_counts(counts)


def read_columns(argument: str, table: Any, names: str | Sequence[str]) -> list[Tensor]:
    """Columns ``[n]`` of a table, which has them by name: a structured array, a mapping, a group.

    Arrays share memory with the tensors where they can. Booleans become 0 and 1.

    Args:
        argument: the name of the argument that ``names`` came as.
        table: what holds the columns.
        names: one name, or one per column.

    Raises:
        ValueError: the table has no such column, or it is not a column of numbers as long as the
            first.
    """
    numpy = import_library("numpy")
    columns: list[Tensor] = []
    for name in as_names(argument, names):
        try:
            column = table[name]
        except (LookupError, ValueError, TypeError, AttributeError):
            refuse(argument, f"the name of a column of the {type(table).__name__}", name)
        label = f"{argument} {name!r}"
        if not isinstance(column, Tensor):
            try:
                column = numpy.asanyarray(column)  # as_tensor refuses masked entries
            except ValueError:  # lists of lists that differ in length
                refuse(label, "a column of numbers", column)
        column = as_tensor(label, column)
        if isinstance(column, Tensor) and column.dtype == torch.bool:
            column = column.to(torch.uint8)
        size = len(columns[0]) if columns else "n"
        columns.append(check_tensor(label, column, (size,), kind="number"))
    return columns


def stack_positions(argument: str, columns: Sequence[Tensor]) -> Tensor:
    """Raw coordinates ``[n, P]`` of columns ``[n]``, none of them rounded: integers become int64,
    and where dtypes differ and one is floating, all become float64.

    Raises:
        ValueError: there is no column, a number is not finite, or an integer beside floating
            columns is not exact in float64.
    """
    if not columns:
        refuse(argument, "at least one column", columns)
    for axis, column in enumerate(columns):
        if column.is_floating_point() and has_contents(column):
            check_finite(f"{argument}[{axis}]", column[:, None])
    if not any(column.is_floating_point() for column in columns):
        return torch.stack([column.long() for column in columns], 1)
    if len({column.dtype for column in columns}) == 1:
        return torch.stack(list(columns), 1)
    for axis, column in enumerate(columns):
        if not column.is_floating_point() and (column.double().abs() >= 2**53).any():
            expected = "integers below 2^53 beside floating columns; subtract their first one"
            refuse(f"{argument}[{axis}]", expected, "larger ones")
    return torch.stack([column.double() for column in columns], 1)


def stack_features(columns: Sequence[Tensor]) -> Tensor | None:
    """Features ``[n, E]`` of columns ``[n]``, in the dtype that PyTorch promotes them to, but of
    integers beside half precisions float32; None for no column.
    """
    if not columns:
        return None
    dtypes = {column.dtype for column in columns}
    if len({dtype.is_floating_point for dtype in dtypes}) > 1:
        dtypes.add(torch.float32)
    dtype = functools.reduce(torch.promote_types, dtypes)
    return torch.stack([column.to(dtype) for column in columns], 1)


def pyramid_of_points(
    points: Tensor,
    features: Tensor | None,
    *,
    batch: Tensor | None = None,
    offsets: Tensor | None = None,
    batch_size: int | None = None,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None,
    strides: StridesLike,
    pooling: Pooling,
    periodic_axes: Sequence[int],
) -> FeaturePyramid:
    """A pyramid of raw points ``[n, P]`` of a container that has no grid, see `voxelize`.

    ``features`` are ``[n, E]``; None is a one per point, float32.
    """
    voxels = voxelize(
        points,
        batch,
        offsets,
        cell_size=cell_size,
        bounds=bounds,
        periodic_axes=periodic_axes,
        batch_size=batch_size,
    )
    if features is None:
        features = torch.ones(len(voxels.rows), 1, device=voxels.rows.device)
    return voxels.pyramid(features, strides=strides, pooling=pooling)


def stored_values(argument: str, data: Any) -> Tensor:
    """The numbers ``[n]`` that a sparse array stores; booleans as 0 and 1, int64."""
    values = as_tensor(argument, data)
    is_mask = isinstance(values, Tensor) and values.dtype == torch.bool
    return check_tensor(argument, values.long() if is_mask else values, ("n",), kind="number")


def rows_of_entries(
    cells: Tensor,
    channels: Tensor | None,
    values: Tensor,
    spatial_shape: Sequence[int],
    width: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of every cell as one row; those of one cell and channel are added.

    Args:
        cells: int64 ``[n, P + 1]``, image and cell of each entry.
        channels: int64 ``[n]``, the channel of each entry; None: all have the only one.
        values: ``[n]``.
        spatial_shape: number of cells along each axis.
        width: the number of channels E.

    Returns:
        cells ``[m, P + 1]``, sorted; their rows ``[m, E]``, zero where a cell has no entry; and the
        row of each entry, int64 ``[n]``. Without channels, sums of integers are int64.
    """
    finest, add = (1,) * len(spatial_shape), check_pooling("sum")
    sums, distinct, row = pool_points(values[:, None], cells, finest, spatial_shape, add)
    if channels is None:
        return distinct, sums, row
    rows = values.new_zeros(len(distinct), width)
    return distinct, rows.index_put((row, channels), values, accumulate=True), row


def pyramid_of_entries(
    cells: Tensor,
    values: Tensor,
    spatial_shape: Sequence[int],
    batch_size: int,
    *,
    strides: StridesLike,
    pooling: Pooling,
    periodic_axes: Sequence[int],
) -> FeaturePyramid:
    """A pyramid of the stored numbers ``[n]`` of sparse arrays, in ``cells`` ``[n, P + 1]``.

    Those of one cell are added first. `FeaturePyramid.values_of_points` has a row for each of them,
    in their order.
    """
    distinct, rows, inverse = rows_of_entries(cells, None, values, spatial_shape)
    pyramid = pyramid_of_cells(
        distinct,
        rows,
        spatial_shape,
        batch_size,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )
    assert pyramid.point_rows is not None
    return replace(
        pyramid,
        point_rows=pyramid.point_rows[inverse],
        point_batch=cells[:, 0],
        check_contents=False,
    )


def rows_by_image(rows: Tensor, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """``rows`` ``[n, ...]`` sorted by image, in their order within one, and the number of rows of
    each image, int64 ``[B]``. Rows of the image B, of none, are left out.
    """
    counts = torch.bincount(images, minlength=batch_size + 1)[:batch_size]
    if (images[1:] < images[:-1]).any() or int(counts.sum()) < len(rows):
        rows = rows[images.argsort(stable=True)[: int(counts.sum())]]
    return rows, counts


def values_by_image(pyramid: Any, level: int) -> tuple[Tensor, Tensor]:
    """The values ``[n, E]`` of raw points, see `FeaturePyramid.values_of_points`, sorted by image,
    and the number of points of each image, int64 ``[B]``.

    Raises:
        ValueError: ``pyramid`` is no pyramid, it has no such level, or it does not know the rows of
            raw points.
    """
    index = check_level(pyramid, level)
    values = pyramid.values_of_points(index)
    images = images_of_points(pyramid, pyramid.point_rows)
    return rows_by_image(values, images, pyramid.batch_size)


def clouds_of_level(pyramid: Any, level: int) -> list[tuple[Tensor, Tensor]]:
    """For each image, the centers float64 ``[m, P]`` of the cells of one level, in raw units, and
    their values ``[m, E]``.

    Raises:
        ValueError: ``pyramid`` is no pyramid, or it has no such level.
    """
    points = points_of_level(pyramid, level)
    centers = pyramid.positions(torch.float64)[pyramid.levels == as_integer(level)]
    images, size = points.coordinates[:, 0], points.batch_size
    values, counts = rows_by_image(points.values, images, size)
    centers, _ = rows_by_image(pyramid.raw_from_positions(centers), images, size)
    lengths = counts.tolist()
    return list(zip(centers.split(lengths), values.split(lengths), strict=True))


def as_numpy(tensor: Tensor) -> Any:
    """A tensor as an array of NumPy, without gradients; bfloat16 becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
