"""Several pyramids as one, with the images of all."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._utils.checks import LevelShapes, refuse
from ..windows import full_shape
from .data import PyramidData
from .raw_points import images_of_points

PyramidT = TypeVar("PyramidT", bound=PyramidData)


def cat_pyramids(cls: type[PyramidT], pyramids: Sequence[PyramidT]) -> PyramidT:
    """See `FeaturePyramid.cat`."""
    pyramids = _check_alike(cls, pyramids)
    first = pyramids[0]
    n_images = list(itertools.accumulate((p.batch_size for p in pyramids), initial=0))
    n_rows = list(itertools.accumulate(map(len, pyramids), initial=0))
    # Misplaced points would be points of other images, or lie on the larger map of all.
    batches = [p.batch.masked_fill(p.misplaced(), -1) for p in pyramids]
    batch = torch.cat([_shifted(*part) for part in zip(batches, n_images, strict=False)])
    others = torch.cat([p.coordinates[:, 1:] for p in pyramids])
    return dataclasses.replace(
        first,
        values=torch.cat([p.values for p in pyramids]),
        coordinates=torch.cat((batch[:, None], others), 1),
        level_shapes=_largest_shapes(pyramids),
        batch_size=n_images[-1],
        point_rows=_cat_shifted([p.point_rows for p in pyramids], n_rows),
        point_batch=_cat_shifted(_point_batches(pyramids), n_images),
        check_contents=False,
    )


def _cat_shifted(parts: Sequence[Tensor | None], shifts: Sequence[int]) -> Tensor | None:
    """The indices of all ``parts``, each raised by its shift where it is not -1; None for none."""
    shifted = [
        _shifted(part, shift)
        for part, shift in zip(parts, shifts, strict=False)
        if part is not None
    ]
    return torch.cat(shifted) if shifted else None


def _shifted(indices: Tensor, shift: int) -> Tensor:
    """``indices`` raised by ``shift`` where they are not -1."""
    return torch.where(indices < 0, -1, indices + shift)


def _point_batches(pyramids: Sequence[PyramidData]) -> list[Tensor | None]:
    """The images of the raw points of each pyramid; if none knows them, None for each.

    Where some know them, those of the others are the images of the points' rows, -1 without rows.
    """
    known = [pyramid.point_batch for pyramid in pyramids]
    if all(batch is None for batch in known):
        return known
    return [_point_batch(pyramid) for pyramid in pyramids]


def _point_batch(pyramid: PyramidData) -> Tensor | None:
    if pyramid.point_batch is not None or pyramid.point_rows is None:
        return pyramid.point_batch
    images = images_of_points(pyramid, pyramid.point_rows)
    return images.masked_fill(images == pyramid.batch_size, -1)


def _check_alike(cls: type[PyramidT], pyramids: Any) -> list[PyramidT]:
    """Raises ValueError unless ``pyramids`` can be one, except for the shapes of levels."""
    if not isinstance(pyramids, Sequence) or not pyramids:
        refuse("pyramids", f"at least one {cls.__name__}", pyramids)
    for index, pyramid in enumerate(pyramids):
        if not isinstance(pyramid, cls):
            refuse(f"pyramids[{index}]", f"a {cls.__name__}", pyramid)
        for name, want, came in zip(_ALIKE, _facts(pyramids[0]), _facts(pyramid), strict=True):
            if want != came:
                refuse(f"pyramids[{index}]", f"{name} {want}, as of the first", f"{came}")
    return list(pyramids)


_ALIKE = (
    *("number of dimensions", "number of levels", "embed_dim", "dtype", "device", "strides"),
    *("periodic_axes", "origin", "cell_size", "point_rows kept:"),
)


def _facts(pyramid: PyramidData) -> tuple[Any, ...]:
    """What `_ALIKE` names."""
    values = pyramid.values
    return (
        *(pyramid.position_dim, pyramid.n_levels, pyramid.embed_dim, values.dtype, values.device),
        *(pyramid.strides, pyramid.periodic_axes, pyramid.origin, pyramid.cell_size),
        pyramid.point_rows is not None,
    )


def _largest_shapes(pyramids: Sequence[PyramidData]) -> LevelShapes:
    """Level shapes that hold all ``pyramids``.

    Raises:
        ValueError: they differ, and positions would change.
    """
    first = pyramids[0]
    for index, pyramid in enumerate(pyramids):
        periodic = [
            tuple(shape[axis] for axis in first.periodic_axes)
            for shape in (full_shape(first.level_shapes), full_shape(pyramid.level_shapes))
        ]
        differs = pyramid.level_shapes != first.level_shapes
        if differs and (first.strides is None or periodic[0] != periodic[1]):
            why = "without strides" if first.strides is None else "along periodic axes"
            expected = f"level shapes {list(first.level_shapes)}, as of the first, {why}"
            refuse(f"pyramids[{index}]", expected, str(list(pyramid.level_shapes)))
    return tuple(
        tuple(map(max, zip(*shapes, strict=True)))
        for shapes in zip(*(pyramid.level_shapes for pyramid in pyramids), strict=True)
    )
