"""Raw points, which a pyramid was pooled from: their images, and the values of their cells."""

import math

import torch
from torch import Tensor

from .._utils.checks import as_integer, is_real, refuse
from .data import PyramidData


def values_of_points(pyramid: PyramidData, level: int | None, fill: float) -> Tensor:
    """See `FeaturePyramid.values_of_points`."""
    rows = pyramid.point_rows
    if rows is None:
        refuse("point_rows", "rows of points, as from_points(keep_point_rows=True) keeps", None)
    if level is not None:
        index = as_integer(level)
        if index is None or not 0 <= index < pyramid.n_levels:
            refuse("level", f"a level in [0, {pyramid.n_levels}), or None", level)
        rows = rows[:, index]
    if not is_real(fill):
        refuse("fill", "a number", fill)
    fill_value = float(fill)
    if not (pyramid.values.is_floating_point() or fill_value.is_integer()):
        refuse("fill", "a whole number for values that are integers", fill)
    width = pyramid.embed_dim
    dtype = pyramid.values.dtype
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    if math.isfinite(fill_value) and not limits.min <= fill_value <= limits.max:
        refuse("fill", f"a number that {dtype} holds", fill)
    padded = torch.cat((pyramid.values, pyramid.values.new_full((1, width), fill_value)))
    rows = in_range(rows, pyramid.values.shape[0])
    return padded.index_select(0, rows.flatten()).view(*rows.shape, width)


def in_range(indices: Tensor, stop: int) -> Tensor:
    """``indices``, with ``stop`` for those outside [0, stop)."""
    return indices.masked_fill((indices < 0) | (indices >= stop), stop)


def images_of_points(pyramid: PyramidData, point_rows: Tensor) -> Tensor:
    """int64 ``[n]``, the image of every raw point, B for none."""
    n_images = pyramid.batch_size
    if pyramid.point_batch is not None:
        return in_range(pyramid.point_batch, n_images)
    images = torch.nn.functional.pad(in_range(pyramid.batch, n_images), (0, 1), value=n_images)
    return images[in_range(point_rows.amax(1), pyramid.values.shape[0])]
