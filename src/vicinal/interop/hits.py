"""Hits of events in detectors: awkward arrays, and columns of HDF5 and Zarr files."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import check_tensor, refuse
from .._utils.ragged import offsets_from_counts
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._common import (
    as_names,
    as_numpy,
    import_library,
    pyramid_of_points,
    read_columns,
    stack_features,
    stack_positions,
    values_by_image,
)


def from_awkward(
    events: Any,
    fields: str | Sequence[str] = ("x", "y", "z"),
    features: str | Sequence[str] = (),
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from the hits of events in an awkward array, an image per event.

    Args:
        events: ``awkward.Array`` of ``B * var * {x: ..., y: ..., ...}``, records of hits, or of
            ``B * {x: var * ..., y: var * ..., ...}``, records of columns, as uproot reads them.
        fields: the names of the coordinates. Default: ``("x", "y", "z")``.
        features: the names of what becomes the values. Default: none, but a one per hit.
        cell_size: size of a cell in raw units, one number or one per axis.
        bounds: ``(low, high)`` in raw units for each axis, as for `voxelize`. None (default): from
            the hits of all events.
        strides: the size of each level's cells, in cells: one int or P ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the hits of a cell.
        periodic_axes: axes along which space repeats, such as an azimuth. Default: none.

    Returns:
        a pyramid, whose values have the dtype that PyTorch promotes the features to: float32 for
        integers beside half precisions, and PyTorch's default dtype for the mean of integers.
        ``values_of_points`` of it has the order of the hits, one event after another.

    Raises:
        ValueError: there is no such field, a field is not a list of numbers per event, fields
            differ in length, or as for `voxelize` and `FeaturePyramid.from_points`.
        ImportError: awkward is not installed.

    Example:
        ```python
        import awkward as ak
        from vicinal.interop import from_awkward, to_awkward

        events = ak.Array([
            [{"x": 0.1, "y": 0.2, "e": 3.0}, {"x": 0.1, "y": 0.3, "e": 5.0}],
            [],
            [{"x": 0.9, "y": 0.9, "e": 1.0}],
        ])
        pyramid = from_awkward(events, ("x", "y"), "e", cell_size=0.5, strides=1)
        assert pyramid.batch_size == 3
        assert to_awkward(pyramid).tolist() == [[[4], [4]], [], [[1]]]
        ```
    """
    names, others = as_names("fields", fields), as_names("features", features)
    if not names:
        refuse("fields", "at least one name", fields)
    counts: Tensor | None = None
    columns: list[Tensor] = []
    for name in names + others:
        argument = "fields" if len(columns) < len(names) else "features"
        column, of_column = _column_of_awkward(argument, events, name)
        counts = of_column if counts is None else counts
        if not torch.equal(of_column, counts):
            refuse(argument, f"as many {name!r} as {names[0]!r} in every event", "other numbers")
        columns.append(column)
    assert counts is not None
    return pyramid_of_points(
        stack_positions("fields", columns[: len(names)]),
        stack_features(columns[len(names) :]),
        offsets=offsets_from_counts(counts),
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _column_of_awkward(argument: str, events: Any, name: str) -> tuple[Tensor, Tensor]:
    """The field ``[n]`` of all hits, and the number of hits of each event, int64 ``[B]``."""
    awkward = import_library("awkward")
    if not isinstance(events, awkward.Array):
        refuse("events", "an awkward.Array", events)
    if name not in events.fields:
        refuse(argument, f"one of the fields {events.fields}", name)
    column = events[name]
    expected = f"a list of numbers per event in {name!r}, none of them missing"
    if column.ndim != 2:
        refuse(argument, expected, str(column.type))
    try:
        flat = awkward.to_numpy(awkward.flatten(column, axis=1), allow_missing=False)
        counts = awkward.to_numpy(awkward.num(column, axis=1), allow_missing=False)
    except (ValueError, TypeError):  # a missing number, or numbers among others
        refuse(argument, expected, str(column.type))
    values = read_columns(argument, {name: flat}, name)[0]
    return values, check_tensor(argument, counts, ("B",), kind="integer").long()


def to_awkward(pyramid: FeaturePyramid, level: int = 0) -> Any:
    """Returns the values at the hits as an awkward array.

    Args:
        pyramid: one that knows the rows of its hits, as `from_awkward` makes.
        level: the level whose cells the values are taken from, from 0. Default: 0.

    Returns:
        ``awkward.Array`` of ``B * var * E``: for each hit of each event the values of its cell,
        zero outside the bounds. bfloat16 becomes float32. ``ak.with_field(events, result[..., 0],
        "score")`` adds a channel to the events.

    Raises:
        ValueError: there is no such level, or the pyramid does not know the rows of its raw points.
        ImportError: awkward is not installed.

    Example:
        ```python
        import torch
        from vicinal import voxelize
        from vicinal.interop import to_awkward

        voxels = voxelize(torch.rand(3, 2), offsets=torch.tensor([0, 1, 3]), cell_size=0.1)
        hits = to_awkward(voxels.pyramid(torch.ones(3, 1), pooling="max"))
        assert hits.tolist() == [[[1]], [[1], [1]]]
        ```
    """
    values, counts = values_by_image(pyramid, level)
    return import_library("awkward").unflatten(as_numpy(values), as_numpy(counts))


def from_hdf5(
    group: Any,
    fields: str | Sequence[str] = ("x", "y", "z"),
    features: str | Sequence[str] = (),
    *,
    event: str | None = None,
    offsets: str | None = None,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from the columns of hits in an HDF5 file, an image per event.

    Args:
        group: ``h5py.Group`` of data sets ``[n]``, or ``h5py.Dataset`` of a compound type. A dict
            of arrays or tensors is taken as well, for example of slices: ``{name: group[name][a:b]
            for name in group}``.
        fields: the names of the coordinates. Default: ``("x", "y", "z")``.
        features: the names of what becomes the values. Default: none, but a one per hit.
        event: the name of the column with the event of each hit, integers in any order. Images are
            the events that have hits, by rising number. None (default): see ``offsets``.
        offsets: the name of the column ``[B + 1]``: event ``b`` has the hits
            ``offsets[b]:offsets[b + 1]``. None (default): all hits are of one event, unless
            ``event`` is given.
        cell_size: size of a cell in raw units, one number or one per axis.
        bounds: ``(low, high)`` in raw units for each axis, as for `voxelize`. None (default): from
            the hits of all events.
        strides: the size of each level's cells, in cells: one int or P ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the hits of a cell.
        periodic_axes: axes along which space repeats, such as an azimuth. Default: none.

    Returns:
        a pyramid, whose values have the dtype that PyTorch promotes the features to: float32 for
        integers beside half precisions, and PyTorch's default dtype for the mean of integers.
        ``values_of_points`` of it has the order of the hits in the file.

    Raises:
        ValueError: there is no such column, columns differ in length, both ``event`` and
            ``offsets`` are given, or as for `voxelize` and `FeaturePyramid.from_points`.

    Example:
        ```python
        import h5py
        import numpy as np
        from vicinal.interop import from_hdf5

        rng = np.random.default_rng(0)
        with h5py.File("hits.h5", "w") as file:
            for name in ("x", "y", "z", "energy"):
                file[f"hits/{name}"] = rng.random(100)
            file["hits/event"] = np.repeat([7, 3], 50)
        with h5py.File("hits.h5") as file:
            pyramid = from_hdf5(file["hits"], features="energy", event="event", cell_size=0.1)
        assert pyramid.batch_size == 2
        assert pyramid.values_of_points(level=0).shape == (100, 1)
        ```
    """
    return _pyramid_of_table(
        group,
        fields,
        features,
        event,
        offsets,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def from_zarr(
    group: Any,
    fields: str | Sequence[str] = ("x", "y", "z"),
    features: str | Sequence[str] = (),
    *,
    event: str | None = None,
    offsets: str | None = None,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from the columns of hits in a Zarr group, an image per event.

    Args:
        group: ``zarr.Group`` of arrays ``[n]``. A dict of arrays or tensors is taken as well, for
            example of slices: ``{name: group[name][a:b] for name in group}``.
        fields: the names of the coordinates. Default: ``("x", "y", "z")``.
        features: the names of what becomes the values. Default: none, but a one per hit.
        event: the name of the column with the event of each hit, integers in any order. Images are
            the events that have hits, by rising number. None (default): see ``offsets``.
        offsets: the name of the column ``[B + 1]``: event ``b`` has the hits
            ``offsets[b]:offsets[b + 1]``. None (default): all hits are of one event, unless
            ``event`` is given.
        cell_size: size of a cell in raw units, one number or one per axis.
        bounds: ``(low, high)`` in raw units for each axis, as for `voxelize`. None (default): from
            the hits of all events.
        strides: the size of each level's cells, in cells: one int or P ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the hits of a cell.
        periodic_axes: axes along which space repeats, such as an azimuth. Default: none.

    Returns:
        a pyramid, whose values have the dtype that PyTorch promotes the features to: float32 for
        integers beside half precisions, and PyTorch's default dtype for the mean of integers.
        ``values_of_points`` of it has the order of the hits in the group.

    Raises:
        ValueError: there is no such column, columns differ in length, both ``event`` and
            ``offsets`` are given, or as for `voxelize` and `FeaturePyramid.from_points`.

    Example:
        ```python
        import numpy as np
        import zarr
        from vicinal.interop import from_zarr

        rng, group = np.random.default_rng(0), zarr.open_group("hits.zarr", mode="w")
        for name in ("x", "y", "z"):
            group[name] = rng.random(100)
        group["starts"] = np.array([0, 40, 40, 100])
        pyramid = from_zarr(group, offsets="starts", cell_size=0.1, pooling="sum")
        assert pyramid.batch_size == 3
        ```
    """
    return _pyramid_of_table(
        group,
        fields,
        features,
        event,
        offsets,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _pyramid_of_table(
    table: Any,
    fields: str | Sequence[str],
    features: str | Sequence[str],
    event: str | None,
    offsets: str | None,
    **options: Any,
) -> FeaturePyramid:
    """A pyramid of the columns ``[n]`` of hits, whose events are told by a column of them, or by
    their offsets.
    """
    for argument, name in (("event", event), ("offsets", offsets)):
        if name is not None and not isinstance(name, str):
            refuse(argument, "the name of one column, or None", name)
    if event is not None and offsets is not None:
        refuse("offsets", "None where event is given", offsets)
    points = stack_positions("fields", read_columns("fields", table, fields))
    values = stack_features(read_columns("features", table, features))
    if offsets is not None:
        options["offsets"] = read_columns("offsets", table, offsets)[0]
    if event is not None:
        column = read_columns("event", table, event)[0]
        ids = check_tensor("event", column, (len(points),), kind="integer")
        numbers, options["batch"] = ids.unique(return_inverse=True)
        options["batch_size"] = len(numbers)
    return pyramid_of_points(points, values, **options)
