"""Images of a batch: one or several of them, out of a pyramid."""

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from .._utils.checks import as_integer, refuse
from .._utils.ragged import take_rows
from .data import PyramidData
from .raw_points import images_of_points, in_range

PyramidT = TypeVar("PyramidT", bound=PyramidData)


def select_images(pyramid: PyramidT, images: int | slice) -> PyramidT:
    """See `FeaturePyramid.__getitem__`."""
    index = as_integer(images)
    if index is not None and -pyramid.batch_size <= index < pyramid.batch_size:
        chosen = [index % pyramid.batch_size]
    elif isinstance(images, slice):
        chosen = list(range(pyramid.batch_size)[images])
    else:
        refuse("images", f"a slice, or the index of one of {pyramid.batch_size} images", images)
    n_images, device = pyramid.batch_size, pyramid.values.device
    # The last entry is for what belongs to no image.
    new_image = torch.full((n_images + 1,), len(chosen), device=device)
    new_image[torch.tensor(chosen, dtype=torch.int64, device=device)] = torch.arange(
        len(chosen), device=device
    )
    new_images = new_image[in_range(pyramid.batch, n_images)]
    rows, images_of_rows = _rows_of_images(new_images, len(chosen))
    coordinates = torch.cat((images_of_rows[:, None], pyramid.coordinates[rows, 1:]), 1)
    point_rows, point_batch = pyramid.point_rows, None
    if point_rows is not None:
        of_points = new_image[images_of_points(pyramid, point_rows)]
        points = (of_points < len(chosen)).nonzero().flatten()
        point_batch = of_points[points]
        new_row = torch.full((len(pyramid) + 1,), -1, device=device)
        new_row[rows] = torch.arange(len(rows), device=device)
        point_rows = new_row[in_range(point_rows[points], len(pyramid))]
    return dataclasses.replace(
        pyramid,
        values=take_rows(pyramid.values, rows),
        coordinates=coordinates,
        batch_size=len(chosen),
        point_rows=point_rows,
        point_batch=point_batch,
        check_contents=False,
    )


def _rows_of_images(images: Tensor, n_images: int) -> tuple[Tensor, Tensor]:
    """The rows whose ``images`` ``[n]`` are below ``n_images``, sorted by image, and their images.
    Rows of an image keep their order.
    """
    sorted_images, order = images.sort(stable=True)
    kept = sorted_images < n_images
    return order[kept], sorted_images[kept]
