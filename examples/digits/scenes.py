"""Canvases of handwritten digits, with fragments of strokes as distractors.

A canvas is determined by the available digits, the seed of the run and its number in the run, so
a run has the same canvases on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.canvas import Digits, place_boxes
from examples.training.seeds import derive_seed

SIZE = 512  # width and height of a canvas in cells
DIGITS = (4, 10)  # digits per canvas; this and the following are bounds, both included
DIGIT_SIDES = (28, 56)  # width in cells that an image of 28 x 28 pixels is enlarged to
FRAGMENTS = (10, 20)  # fragments per canvas
FRAGMENT_SIDES = (6, 16)  # width of a fragment in cells
CUT_SIDES = (44, 56)  # width of the image it is cut from, so no fragment is most of a digit
MIN_INK = 0.15  # cells with at least this much ink are points
CLASSES = 10
TEST_SHARE = 0.2


class Scene(NamedTuple):
    """The points of one canvas and its digits.

    Attributes:
        cells: int64 ``[n, 2]``, distinct (row, column).
        ink: ``[n]``, in (0, 1].
        boxes: ``[m, 4]``, center row, center column, height and width in cells, tight around the
            ink of a digit; cell ``r`` covers ``[r, r + 1)``.
        labels: int64 ``[m]``, the digits.
    """

    cells: Tensor
    ink: Tensor
    boxes: Tensor
    labels: Tensor


class Batch(NamedTuple):
    """The points and digits of several canvases, concatenated.

    Attributes:
        coordinates: int64 ``[n, 3]``, (image, row, column).
        ink: ``[n]``, as in `Scene`.
        boxes: ``[m, 4]``, as in `Scene`.
        labels: int64 ``[m]``, as in `Scene`.
        box_offsets: int64 ``[B + 1]``: image ``b`` owns the boxes
            ``box_offsets[b]:box_offsets[b + 1]``.
    """

    coordinates: Tensor
    ink: Tensor
    boxes: Tensor
    labels: Tensor
    box_offsets: Tensor

    def dense_ink(self, image: int) -> Tensor:
        """The ink of an image, dense ``[SIZE, SIZE]``."""
        rows = self.coordinates[:, 0] == image
        ink = torch.zeros(SIZE, SIZE)
        ink[tuple(self.coordinates[rows, 1:].cpu().t())] = self.ink[rows].cpu().float()
        return ink

    @property
    def batch_size(self) -> int:
        return len(self.box_offsets) - 1

    @property
    def n_points(self) -> int:
        return len(self.ink)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Batch:
        """Copies the batch to ``device``, ink and boxes in ``dtype``."""
        return Batch(
            self.coordinates.to(device),
            self.ink.to(device, dtype),
            self.boxes.to(device, dtype),
            self.labels.to(device),
            self.box_offsets.to(device),
        )


class Scenes(NamedTuple):
    """The canvases of a run, generated from ``digits`` on demand."""

    digits: Digits
    seed: int

    def batch(self, numbers: Iterable[int]) -> Batch:
        """Generates the canvases with these numbers."""
        return collate([self.scene(number) for number in numbers])

    def scene(self, number: int) -> Scene:
        """Generates the canvas with this number."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
        return compose(self.digits, generator)


class _Pieces(NamedTuple):
    """Pieces of handwriting, k of them, cropped to their ink.

    Attributes:
        extents: ``[k, 2]``, height and width in cells.
        number: ``[n]``, the piece of each point.
        cells: ``[n, 2]``, (row, column) relative to the lower corner of the piece.
        ink: ``[n]``.
    """

    extents: Tensor
    number: Tensor
    cells: Tensor
    ink: Tensor


def split_digits(digits: Digits) -> tuple[Digits, Digits]:
    """Splits digits into disjoint sets for training and test, stratified by class.

    The split is deterministic: the last images of each class are for the test.
    """
    test = torch.zeros(len(digits.labels), dtype=torch.bool)
    for label in range(CLASSES):
        of_label = (digits.labels == label).nonzero().squeeze(1)
        test[of_label[len(of_label) - int(TEST_SHARE * len(of_label)) :]] = True
    return digits.take(~test), digits.take(test)


def compose(digits: Digits, generator: torch.Generator) -> Scene:
    """Places distinct digits and fragments of strokes on a canvas, without contact."""
    n_digits = _draw(DIGITS, 1, generator).item()
    chosen = digits.take(torch.randperm(len(digits.images), generator=generator)[:n_digits])
    pieces = (_enlarged(chosen.images, generator), _fragments(digits.images, generator))
    extents = torch.cat([piece.extents for piece in pieces])
    first, last = place_boxes(extents, SIZE, generator).unbind(1)
    number = torch.cat((pieces[0].number, pieces[1].number + len(chosen.labels)))
    cells = torch.cat([piece.cells for piece in pieces]) + first.long()[number]
    boxes = torch.cat(((first + last) / 2, last - first), 1)[: len(chosen.labels)]
    return Scene(cells, torch.cat([piece.ink for piece in pieces]), boxes, chosen.labels)


def collate(scenes: list[Scene]) -> Batch:
    """Concatenates scenes: image ``b`` of the batch is ``scenes[b]``."""
    image = torch.arange(len(scenes)).repeat_interleave(torch.tensor([len(s.ink) for s in scenes]))
    n_boxes = torch.tensor([0, *(len(scene.labels) for scene in scenes)])
    cells, ink, boxes, labels = (torch.cat(parts) for parts in zip(*scenes, strict=True))
    return Batch(torch.cat((image[:, None], cells), 1), ink, boxes, labels, n_boxes.cumsum(0))


def _enlarged(images: Tensor, generator: torch.Generator) -> _Pieces:
    sides = _draw(DIGIT_SIDES, len(images), generator)
    return _cut(_window(images, sides, torch.zeros(len(images), 2), DIGIT_SIDES[1]))


def _fragments(images: Tensor, generator: torch.Generator) -> _Pieces:
    """Squares around random pixels with ink, cut out of enlarged images."""
    n = int(_draw(FRAGMENTS, 1, generator))
    images = images[torch.randint(len(images), (n,), generator=generator)]
    pixel = torch.multinomial(images.flatten(1), 1, generator=generator)  # [n, 1]
    pixel = torch.cat((pixel // images.shape[2], pixel % images.shape[2]), 1)
    sides = _draw(CUT_SIDES, n, generator)
    widths = _draw(FRAGMENT_SIDES, n, generator)[:, None]
    center = (pixel + 0.5) * sides[:, None] / images.shape[1]
    ink = _window(images, sides, (center - widths / 2).floor(), FRAGMENT_SIDES[1])
    within = torch.arange(FRAGMENT_SIDES[1]) < widths
    return _cut(ink * (within[:, :, None] & within[:, None]))


def _window(images: Tensor, sides: Tensor, first: Tensor, width: int) -> Tensor:
    """Crops squares of ``width`` cells from enlarged images: ``[n, width, width]``.

    The ``images`` ``[n, 28, 28]`` are enlarged bilinearly to a width of ``sides`` ``[n]`` cells and
    padded with zeros; ``first`` ``[n, 2]`` is the lower corner of each square.
    """
    cells = first[:, :, None] + torch.arange(width) + 0.5  # [n, 2, width]: centers
    rows, columns = (2 * cells / sides[:, None, None] - 1).unbind(1)  # the image spans [-1, 1]
    shape = (len(images), width, width)
    grid = torch.stack((columns[:, None].expand(shape), rows[:, :, None].expand(shape)), -1)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _cut(ink: Tensor) -> _Pieces:
    """Crops ``ink`` ``[k, width, width]`` to the cells that are points."""
    points = ink >= MIN_INK
    filled = torch.stack((points.any(2), points.any(1)))  # [2, k, width]: rows, columns
    first = filled.byte().argmax(2).t()
    last = ink.shape[1] - filled.flip(2).byte().argmax(2).t()
    number, *cells = points.nonzero().unbind(1)
    return _Pieces(last - first, number, torch.stack(cells, 1) - first[number], ink[points])


def _draw(bounds: tuple[int, int], n: int, generator: torch.Generator) -> Tensor:
    """Uniform random integers, int64 ``[n]``, both bounds included."""
    return torch.randint(bounds[0], bounds[1] + 1, (n,), generator=generator)
