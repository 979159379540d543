"""Canvases of real handwriting: digits to find, and fragments of strokes that are none.

A canvas is determined by the digits it may use, the seed of the run and its number in the run, so
several processes that share a run's canvases see the same ones as a single process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.canvas import Digits, free_place

SIZE = 512  # cells a side
DIGITS = (4, 10)  # on a canvas, at least and at most, as below
DIGIT_SIDES = (28, 56)  # cells a side that a digit's image of 28 x 28 pixels is enlarged to
FRAGMENTS = (10, 20)
FRAGMENT_SIDES = (6, 16)  # cells a side of the piece that is cut out
CUT_SIDES = (44, 56)  # cells a side of the image it is cut from: no piece is most of a digit
FAINTEST = 0.15  # ink from here on is a point
CLASSES = 10
TEST_SHARE = 0.2


class Scene(NamedTuple):
    """The points of one canvas and its digits.

    ``cells`` int64 ``[n, 2]`` (row, column), no two the same, with ``ink`` ``[n]`` in (0, 1].
    ``boxes`` ``[m, 4]``: centre row, centre column, height and width in cells, tight around the
    ink, where the cell ``r`` covers ``[r, r + 1)``; ``labels`` int64 ``[m]``: which digit.
    """

    cells: Tensor
    ink: Tensor
    boxes: Tensor
    labels: Tensor


class Batch(NamedTuple):
    """The points and digits of several canvases, one canvas after another.

    ``coordinates`` int64 ``[n, 3]`` (image, row, column), ``ink`` ``[n]``, ``boxes`` ``[m, 4]`` and
    ``labels`` int64 ``[m]`` as in `Scene`. Image ``b`` owns the boxes
    ``box_offsets[b]:box_offsets[b + 1]``, int64 ``[B + 1]``.
    """

    coordinates: Tensor
    ink: Tensor
    boxes: Tensor
    labels: Tensor
    box_offsets: Tensor

    def drawn(self, image: int) -> Tensor:
        """The ink of an image as ``[SIZE, SIZE]``."""
        rows = self.coordinates[:, 0] == image
        ink = torch.zeros(SIZE, SIZE)
        ink[tuple(self.coordinates[rows, 1:].cpu().t())] = self.ink[rows].cpu().float()
        return ink

    @property
    def batch_size(self) -> int:
        return len(self.box_offsets) - 1

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Batch:
        """On ``device``, ink and boxes as ``dtype``."""
        return Batch(
            self.coordinates.to(device),
            self.ink.to(device, dtype),
            self.boxes.to(device, dtype),
            self.labels.to(device),
            self.box_offsets.to(device),
        )


class Scenes(NamedTuple):
    """The canvases of a run, composed anew from ``digits`` whenever they are asked for."""

    digits: Digits
    seed: int

    def batch(self, numbers: Iterable[int]) -> Batch:
        """The canvases of these numbers."""
        return collate([self.scene(number) for number in numbers])

    def scene(self, number: int) -> Scene:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, number))
        return compose(self.digits, generator)


def mixed_seed(*numbers: int) -> int:
    """One seed from several: torch.Generator looks at 32 bits alone, and likes them well mixed."""
    key = hashlib.blake2b(" ".join(map(str, numbers)).encode(), digest_size=4)
    return int.from_bytes(key.digest(), "little")


class _Pieces(NamedTuple):
    """Cut-out handwriting: ``extents`` ``[k, 2]`` of the boxes around it, in cells.

    ``cells`` ``[n, 2]`` count from the first corner of the box of the piece ``number`` ``[n]``.
    """

    extents: Tensor
    number: Tensor
    cells: Tensor
    ink: Tensor


def split_digits(digits: Digits) -> tuple[Digits, Digits]:
    """For training and for testing: no image in both, the same share of every kind, always alike.

    Of a kind's images, in the order of ``digits``, the last go to the test.
    """
    test = torch.zeros(len(digits.labels), dtype=torch.bool)
    for label in range(CLASSES):
        of_label = (digits.labels == label).nonzero().squeeze(1)
        test[of_label[len(of_label) - int(TEST_SHARE * len(of_label)) :]] = True
    return digits.take(~test), digits.take(test)


def compose(digits: Digits, generator: torch.Generator) -> Scene:
    """Puts digits, none twice, and fragments of strokes on a canvas; no two of them touch."""
    n_digits = _draw(DIGITS, 1, generator).item()
    chosen = digits.take(torch.randperm(len(digits.images), generator=generator)[:n_digits])
    pieces = (_enlarged(chosen.images, generator), _fragments(digits.images, generator))
    extents = torch.cat([piece.extents for piece in pieces])
    corners = torch.stack((torch.zeros_like(extents), extents), 1).float()
    for i, extent in enumerate(extents):
        corner = free_place(extent, corners[:i], SIZE, generator)
        if corner is None:
            raise ValueError(f"no place left on the canvas after {i} pieces")
        corners[i] += corner
    first, last = corners[:, 0], corners[:, 1]
    number = torch.cat((pieces[0].number, pieces[1].number + len(chosen.labels)))
    cells = torch.cat([piece.cells for piece in pieces]) + first.long()[number]
    boxes = torch.cat(((first + last) / 2, last - first), 1)[: len(chosen.labels)]
    return Scene(cells, torch.cat([piece.ink for piece in pieces]), boxes, chosen.labels)


def collate(scenes: list[Scene]) -> Batch:
    """Image ``b`` of the batch is ``scenes[b]``."""
    image = torch.arange(len(scenes)).repeat_interleave(torch.tensor([len(s.ink) for s in scenes]))
    n_boxes = torch.tensor([0, *(len(scene.labels) for scene in scenes)])
    cells, ink, boxes, labels = (torch.cat(parts) for parts in zip(*scenes, strict=True))
    return Batch(torch.cat((image[:, None], cells), 1), ink, boxes, labels, n_boxes.cumsum(0))


def _enlarged(images: Tensor, generator: torch.Generator) -> _Pieces:
    sides = _draw(DIGIT_SIDES, len(images), generator)
    return _cut(_window(images, sides, torch.zeros(len(images), 2), DIGIT_SIDES[1]))


def _fragments(images: Tensor, generator: torch.Generator) -> _Pieces:
    """Squares around pixels with ink, of any images, enlarged."""
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
    """What squares of ``width`` cells from ``first`` ``[n, 2]`` on hold: ``[n, width, width]``.

    The ``images`` ``[n, 28, 28]`` are enlarged bilinearly to ``sides`` ``[n]`` cells a side, and
    blank around. Enlarging needs no filter against aliasing.
    """
    cells = first[:, :, None] + torch.arange(width) + 0.5  # [n, 2, width]: centres
    rows, columns = (2 * cells / sides[:, None, None] - 1).unbind(1)  # the image is [-1, 1]
    shape = (len(images), width, width)
    grid = torch.stack((columns[:, None].expand(shape), rows[:, :, None].expand(shape)), -1)
    return F.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _cut(ink: Tensor) -> _Pieces:
    """The points of ``ink`` ``[k, width, width]`` and the boxes around them."""
    points = ink >= FAINTEST
    filled = torch.stack((points.any(2), points.any(1)))  # [2, k, width]: rows, columns
    first = filled.byte().argmax(2).t()
    last = ink.shape[1] - filled.flip(2).byte().argmax(2).t()
    number, *cells = points.nonzero().unbind(1)
    return _Pieces(last - first, number, torch.stack(cells, 1) - first[number], ink[points])


def _draw(bounds: tuple[int, int], n: int, generator: torch.Generator) -> Tensor:
    """int64 ``[n]``, uniform, both bounds included."""
    return torch.randint(bounds[0], bounds[1] + 1, (n,), generator=generator)
