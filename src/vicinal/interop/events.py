"""Events of event cameras."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import as_integer, as_list, check_tensor, is_real, refuse
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._common import (
    as_images,
    as_names,
    cat_images,
    pyramid_of_points,
    read_columns,
    stack_positions,
)


def from_events(
    events: Any | Sequence[Any],
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    sensor_size: Sequence[int] | None = None,
    fields: Sequence[str] = ("y", "x", "t"),
    polarity: str | None = "p",
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid of row, column and time from events.

    Args:
        events: what has columns ``[n]`` by name: a structured array, such as those of tonic, a dict
            of arrays or tensors, or a data frame. A list or tuple of these is a batch, an image
            each.
        cell_size: one number: how long a cell is, in the unit of the time stamps, of one pixel.
            Three numbers: the size of a cell along row, column and time.
        bounds: ``(low, high)`` or None for row, column and time, as for `voxelize`. A batch has one
            grid, so subtract the start of each recording, or slice, where clocks differ. None
            (default): the sensor, and the time of all events.
        sensor_size: width and height in pixels; what follows is ignored, so that tonic's
            ``(width, height, polarities)`` fits. Events outside have no cell. None (default): from
            the events.
        fields: the names of row, column and time. Default: ``("y", "x", "t")``.
        polarity: the name of the polarity. Above 0 it is on, else off, so 0 and 1, -1 and 1, and
            booleans fit. Default: ``"p"``. None: events have none.
        strides: the size of each level's cells, in cells: one int or 3 ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"sum"`` counts events; ``"mean"`` (default) is the share of a polarity, and
            ``"max"`` whether there is an event of it.
        periodic_axes: axes along which space repeats. Default: none.

    Returns:
        a pyramid with float32 values ``[n, 2]``: off, on; ``[n, 1]`` without polarity. Counts are
        exact up to 2^24 per cell. Time stamps that are integers are exact, also in nanoseconds.
        ``values_of_points`` of it has the order of the events, one image after another.

    Raises:
        ValueError: there is no such field, ``sensor_size`` is not of two sizes, or as for
            `voxelize` and `FeaturePyramid.from_points`.

    Example:
        ```python
        import numpy as np
        from vicinal.interop import from_events

        dtype = [("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")]  # microseconds
        events = np.array([(3, 5, 100, 1), (3, 5, 900, 0), (3, 5, 950, 0)], dtype)
        pyramid = from_events(events, cell_size=1000, sensor_size=(34, 34), pooling="sum")
        assert pyramid.coordinates[0].tolist() == [0, 5, 3, 0, 0]  # image, row, column, time, level
        assert pyramid.values[0].tolist() == [2, 1]  # off, on
        ```
    """
    if len(as_names("fields", fields)) != 3:
        refuse("fields", "the names of row, column and time", fields)
    tables = as_images("events", events).values()
    points = [stack_positions("fields", read_columns("fields", table, fields)) for table in tables]
    rows, offsets = cat_images("events", points)
    features = None
    if polarity is not None:
        if not isinstance(polarity, str):
            refuse("polarity", "a name, or None", polarity)
        signs = [read_columns("polarity", table, polarity)[0] for table in tables]
        features = torch.cat([_off_and_on(*each) for each in zip(signs, points, strict=True)])
    cell_sizes: Any = as_list("cell_size", cell_size, "a finite number, or one for each of 3 axes")
    if is_real(cell_sizes):
        cell_sizes = (1, 1, cell_sizes)
    return pyramid_of_points(
        rows,
        features,
        offsets=offsets,
        cell_size=cell_sizes,
        bounds=_bounds_of_sensor(bounds, sensor_size),
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _off_and_on(signs: Tensor, points: Tensor) -> Tensor:
    """float32 ``[n, 2]``, a one in the channel of the polarity ``[n]`` of ``points`` ``[n, 3]``."""
    on = check_tensor("polarity", signs, (len(points),), kind="number") > 0
    return torch.stack((~on, on), 1).float()


def _bounds_of_sensor(bounds: Any, sensor_size: Sequence[int] | None) -> Any:
    """``bounds`` with those of the sensor for rows and columns that have none."""
    if sensor_size is None:
        return bounds
    sizes = as_list("sensor_size", sensor_size, "width and height in pixels")
    sizes = [as_integer(size) or 0 for size in sizes[:2]] if isinstance(sizes, Sequence) else []
    if len(sizes) != 2 or min(sizes) < 1:
        refuse("sensor_size", "width and height in pixels", sensor_size)
    width, height = sizes
    given = as_list("bounds", bounds, "(low, high) or None for row, column and time")
    if given is None:
        given = [None, None, None]
    if not isinstance(given, Sequence) or len(given) != 3:
        refuse("bounds", "(low, high) or None for row, column and time", bounds)
    sensor = [(0, height), (0, width), None]
    return [low_high if of is None else of for of, low_high in zip(given, sensor, strict=True)]
