"""What can be learned: scenes, classes, and the network for each kind of data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.canvas import load_digits
from examples.digits.scenes import CLASSES, SIZE, Scenes, split_digits
from examples.labels import hits
from examples.labels.scenes import FRAGMENT, Batches, LabeledCanvases, LabeledPoints, Panel

TEST_SEED = 2**62  # test scenes are the same in all runs


class Task(NamedTuple):
    """Data to train on.

    Attributes:
        scenes: what a scene is called, in the plural.
        classes: their names.
        other: the class of what is neither digit nor track, drawn in gray.
        channels: number of raw values of a point.
        spatial_shape: of the grid.
        periodic_axes: of the grid.
        net: arguments of `PointUNet`.
        steps, batch, learning_rate: of training, unless the command says otherwise.
        n_tests: number of test scenes.
        n_drawn: number of scenes in the picture.
        make_scenes: from the arguments of the command line to what generates scenes, for training
            and for the test.
        draw: what the picture shows of a scene.
    """

    scenes: str
    classes: tuple[str, ...]
    other: int
    channels: int
    spatial_shape: tuple[int, ...]
    periodic_axes: tuple[int, ...]
    net: dict[str, Any]
    steps: int
    batch: int
    learning_rate: float
    n_tests: int
    n_drawn: int
    make_scenes: Callable[[int, int], tuple[Batches, Batches]]
    draw: Callable[[LabeledPoints, Tensor, int], Panel]


def _canvases(seed: int, n_hits: int) -> tuple[Batches, Batches]:
    for_training, for_test = split_digits(load_digits())
    return (
        LabeledCanvases(Scenes(for_training, seed)).batch,
        LabeledCanvases(Scenes(for_test, TEST_SEED)).batch,
    )


def _events(seed: int, n_hits: int) -> tuple[Batches, Batches]:
    return hits.Events(n_hits, seed).batch, hits.Events(n_hits, TEST_SEED, same_size=True).batch


def _canvas_panel(batch: LabeledPoints, predicted: Tensor, scene: int) -> Panel:
    own = batch.coordinates[:, 0] == scene
    rows, columns = batch.coordinates[own, 1:].unbind(1)
    return Panel(columns, -rows, batch.labels[own], predicted[own], f"canvas {scene}")


SHOWN_RAPIDITY = 0.25  # hits of smaller pseudorapidity are drawn: all would hide the tracks


def _event_panel(batch: LabeledPoints, predicted: Tensor, scene: int) -> Panel:
    """A thin wedge of an event, seen along the cylinder."""
    _, n_azimuths, n_rapidities = hits.SHAPE
    rapidity = ((batch.coordinates[:, 3] + 0.5) / n_rapidities * 2 - 1) * hits.MAX_RAPIDITY
    own = (batch.coordinates[:, 0] == scene) & (rapidity.abs() < SHOWN_RAPIDITY)
    radius = batch.values[own, 0]
    angle = (batch.coordinates[own, 2] + batch.values[own, 1] + 0.5) / n_azimuths * 2 * torch.pi
    title = f"event {scene}, pseudorapidity within {SHOWN_RAPIDITY}"
    x, y = radius * angle.cos(), radius * angle.sin()
    return Panel(x, y, batch.labels[own], predicted[own], title)


TASKS = {
    "digits": Task(
        scenes="canvases",
        classes=(*map(str, range(CLASSES)), "fragment"),
        other=FRAGMENT,
        channels=1,
        spatial_shape=(SIZE, SIZE),
        periodic_axes=(),
        net={
            **{"embed_dims": (64, 96, 128, 128), "n_heads": (4, 6, 8, 8), "depths": (1, 2, 2, 1)},
            # Pieces of handwriting are so far apart that no cell of stride 2 holds two.
            **{"strides": (2, 4, 8, 16), "neighborhood_sizes": (5, 7, 7, 7)},
        },
        steps=500,
        batch=4,
        learning_rate=2e-3,
        n_tests=100,
        n_drawn=4,
        make_scenes=_canvases,
        draw=_canvas_panel,
    ),
    "hits": Task(
        scenes="events",
        classes=hits.CLASSES,
        other=hits.NOISE,
        channels=hits.CHANNELS,
        spatial_shape=hits.SHAPE,
        periodic_axes=(1,),
        net={
            **{"embed_dims": (32, 64, 96), "n_heads": (2, 4, 6), "depths": (2, 1, 1)},
            **{"strides": (1, (1, 4, 2), (2, 16, 4)), "position_dim": 3},
            "neighborhood_sizes": ((5, 33, 5), (5, 17, 5), (5, 7, 3)),
            **{"stem_window_sizes": ((3, 5, 3), 3), "stem_window_strides": (1, (1, 4, 2))},
        },
        steps=200,
        batch=1,
        learning_rate=2e-3,
        n_tests=10,
        n_drawn=1,
        make_scenes=_events,
        draw=_event_panel,
    ),
}
