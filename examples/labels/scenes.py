"""Scenes of labeled points, and the handwriting among them: every pixel of a stroke has a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from examples.digits.scenes import CLASSES, Scene, Scenes
from vicinal.detr import boxes_to_corners

FRAGMENT = CLASSES  # the label of fragments; digits have their own numbers


class LabeledPoints(NamedTuple):
    """The points of several scenes, one scene after another.

    Attributes:
        coordinates: int64 ``[n, P + 1]``, the scene, then the cell along each axis.
        values: floating ``[n, channels]``.
        labels: int64 ``[n]``, a class, or `IGNORED` where it is not known.
        batch_size: number of scenes.
        spatial_shape: of the grid; None (default) for that of the task.
    """

    coordinates: Tensor
    values: Tensor
    labels: Tensor
    batch_size: int
    spatial_shape: tuple[int, ...] | None = None

    @property
    def n_points(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> LabeledPoints:
        """Copies the points to ``device``, their values in ``dtype``."""
        return self._replace(
            coordinates=self.coordinates.to(device),
            values=self.values.to(device, dtype),
            labels=self.labels.to(device),
        )


class Panel(NamedTuple):
    """The points of a scene that are drawn.

    Attributes:
        x, y: ``[n]``, where.
        labels, predicted: int64 ``[n]``.
        title: of the scene.
    """

    x: Tensor
    y: Tensor
    labels: Tensor
    predicted: Tensor
    title: str


Batches = Callable[[Iterable[int]], LabeledPoints]


def collate(
    scenes: Iterable[tuple[Tensor, Tensor, Tensor]], spatial_shape: tuple[int, ...] | None = None
) -> LabeledPoints:
    """One batch of the cells ``[n, P]``, values and labels of each scene."""
    parts = list(scenes)
    coordinates = [
        torch.nn.functional.pad(cells, (1, 0), value=number)
        for number, (cells, _, _) in enumerate(parts)
    ]
    _, values, labels = zip(*parts, strict=True)
    points = torch.cat(coordinates), torch.cat(values), torch.cat(labels)
    return LabeledPoints(*points, len(parts), spatial_shape)


class LabeledCanvases(NamedTuple):
    """The canvases of a run, whose pixels have the label of their digit, or `FRAGMENT`."""

    scenes: Scenes

    def batch(self, numbers: Iterable[int]) -> LabeledPoints:
        """Generates the canvases with these numbers."""
        canvases = map(self.scenes.scene, numbers)
        return collate((scene.cells, scene.ink[:, None], pixel_labels(scene)) for scene in canvases)


def pixel_labels(scene: Scene) -> Tensor:
    """int64 ``[n]``. A pixel belongs to the digit in whose box it lies: no fragment is in one."""
    low, high = boxes_to_corners(scene.boxes)
    cells = scene.cells[:, None] + 0.5
    inside = ((cells > low) & (cells < high)).all(2)  # [n, digits]
    labels = torch.cat((scene.labels, torch.tensor([FRAGMENT])))
    return labels[torch.where(inside.any(1), inside.byte().argmax(1), len(scene.labels))]
