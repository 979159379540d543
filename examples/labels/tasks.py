"""What can be learned: scenes, classes, and the network for each kind of data."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.canvas import load_digits
from examples.digits.scenes import CLASSES, SIZE, Scenes, split_digits
from examples.formats import events, hdf5, kitti, las, muscima, nuscenes
from examples.formats.raw import IGNORED
from examples.labels import hits
from examples.labels.files import (
    Format,
    HeldOutFiles,
    Reader,
    Split,
    TrainingFiles,
    split_sources,
)
from examples.labels.scenes import FRAGMENT, Batches, LabeledCanvases, LabeledPoints, Panel

TEST_SEED = 2**62  # test scenes are the same in all runs


class Options(NamedTuple):
    """What the command line says of the data.

    Attributes:
        seed: of the scenes for training.
        n_hits: hits of the largest simulated event.
        folder: of files; None for scenes that are generated.
        cell_size: of files; None for scenes that are generated.
    """

    seed: int
    n_hits: int = 60_000
    folder: Path | None = None
    cell_size: float | None = None


class Task(NamedTuple):
    """Data to train on.

    Attributes:
        scenes: what a scene is called, in the plural.
        classes: their names.
        other: the class of what is neither digit nor track, drawn in gray; -1 for none.
        channels: number of raw values of a point.
        spatial_shape: of the grid, unless batches have their own.
        periodic_axes: of the grid.
        net: arguments of `PointUNet`.
        steps, batch, learning_rate: of training, unless the command says otherwise.
        n_tests: number of test scenes; of files, the most.
        n_drawn: number of scenes in the picture.
        open: from the task and the options to what generates or reads scenes.
        draw: what the picture shows of a scene.
        directions: whether heads of neighborhood attention measure positions along directions of
            their own, one around the circle each.
        cell_size: of files, unless the command says otherwise; None where scenes are generated.
        unit: of ``cell_size``.
        files: which are for training and for the test; None where scenes are generated.
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
    open: Callable[[Task, Options], Data]
    draw: Callable[[LabeledPoints, Tensor, int], Panel]
    directions: bool = False
    cell_size: float | None = None
    unit: str = "meters"
    files: Split | None = None


class Data(NamedTuple):
    """Scenes of a task.

    Attributes:
        task: with what only the files say: the classes, channels, number of test scenes, and which
            files are for the test.
        for_training, for_test: generate or read the scenes with given numbers.
    """

    task: Task
    for_training: Batches
    for_test: Batches


def _canvases(task: Task, options: Options) -> Data:
    for_training, for_test = split_digits(load_digits())
    return Data(
        task,
        LabeledCanvases(Scenes(for_training, options.seed)).batch,
        LabeledCanvases(Scenes(for_test, TEST_SEED)).batch,
    )


def _events(task: Task, options: Options) -> Data:
    for_test = hits.Events(options.n_hits, TEST_SEED, same_size=True)
    return Data(task, hits.Events(options.n_hits, options.seed).batch, for_test.batch)


def _files(of: Format) -> Callable[[Task, Options], Data]:
    """What opens a folder of files."""

    def open_folder(task: Task, options: Options) -> Data:
        assert options.folder is not None
        assert options.cell_size is not None
        sources = of.find(options.folder)
        split = split_sources(sources, of, options.folder)
        # Training and test each remember files of their own.
        held_out = HeldOutFiles.of(split.test, Reader(of, options.cell_size), task.n_tests)
        files = TrainingFiles(split.training, Reader(of, options.cell_size), options.seed)
        n_tests = len(held_out.places)
        task = task._replace(
            classes=task.classes or hdf5.classes_of_files([path for path, *_ in sources]),
            channels=files.batch([0]).values.shape[1],
            n_tests=n_tests,
            n_drawn=min(task.n_drawn, n_tests),
            files=split,
        )
        return Data(task, files.batch, held_out.batch)

    return open_folder


def _panel(
    noun: str, rows_go_down: bool, batch: LabeledPoints, predicted: Tensor, scene: int
) -> Panel:
    """The first two axes of a scene: the points whose label is known."""
    own = (batch.coordinates[:, 0] == scene) & (batch.labels != IGNORED)
    x, y = batch.coordinates[own, 1:3].unbind(1)
    if rows_go_down:
        x, y = y, -x
    return Panel(x, y, batch.labels[own], predicted[own], f"{noun} {scene}")


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


STROKES: dict[str, Any] = {
    # The finest level has most points, so it has no layers.
    **{"embed_dims": (64, 96, 128, 128), "n_heads": (4, 6, 8, 8), "depths": (0, 2, 2, 1)},
    # Pieces of handwriting are so far apart that no cell of stride 2 holds two.
    **{"strides": (2, 4, 8, 16), "neighborhood_sizes": (5, 7, 7, 7)},
}
CLOUDS: dict[str, Any] = {
    **{"embed_dims": (32, 64, 96, 128), "n_heads": (2, 4, 6, 8), "depths": (0, 1, 2, 1)},
    **{"strides": (1, 2, 4, 8), "neighborhood_sizes": (3, 5, 5, 5), "position_dim": 3},
    **{"stem_window_sizes": (3, 3), "stem_window_strides": (1, 2)},
}


def _own_group(path: Path, folder: Path) -> str:
    """The group of a file that belongs to no other: two suffixes are two forms of one content."""
    return str(path.with_suffix(""))


def _of_files(
    scenes: str,
    classes: tuple[str, ...],
    files: Format,
    cell_size: float,
    **options: Any,
) -> Task:
    """A task whose scenes are files: clouds of points, unless ``options`` say otherwise."""
    defaults: dict[str, Any] = {
        **{"scenes": scenes, "classes": classes, "open": _files(files), "cell_size": cell_size},
        **{"other": IGNORED, "channels": 0, "spatial_shape": (), "periodic_axes": ()},
        **{"net": CLOUDS, "steps": 2000, "batch": 1, "learning_rate": 2e-3},
        **{"n_tests": 100, "n_drawn": 2, "draw": partial(_panel, "scene", False)},
    }
    return Task(**defaults | options)


TASKS = {
    "digits": Task(
        scenes="canvases",
        classes=(*map(str, range(CLASSES)), "fragment"),
        other=FRAGMENT,
        channels=1,
        spatial_shape=(SIZE, SIZE),
        periodic_axes=(),
        net=STROKES,
        directions=True,
        steps=500,
        batch=4,
        learning_rate=1e-3,
        n_tests=100,
        n_drawn=4,
        open=_canvases,
        draw=partial(_panel, "canvas", True),
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
        open=_events,
        draw=_event_panel,
    ),
    "kitti": _of_files(
        "scans",
        kitti.CLASSES,
        Format(
            kitti.find_kitti,
            lambda source, _: [kitti.read_kitti(*source)],
            group=lambda scan, _: scan.parents[1].name,
            test_groups=(kitti.VALIDATION,),
        ),
        cell_size=0.2,
    ),
    "nuscenes": _of_files(
        "sweeps",
        nuscenes.CLASSES,
        Format(
            nuscenes.find_nuscenes,
            lambda source, _: [nuscenes.read_nuscenes(*source)],
            group=lambda sweep, _: nuscenes.log_of(sweep),
        ),
        cell_size=0.2,
    ),
    "las": _of_files(
        "pieces",
        las.CLASSES,
        Format(las.find_las, lambda source, size: [las.read_las(source[0], size)], _own_group),
        cell_size=0.5,
        unit="the unit of the files",
    ),
    "hdf5": _of_files(
        "events",
        (),  # the files name them
        Format(hdf5.find_hits, lambda source, size: hdf5.read_hits(source[0], size), _own_group),
        cell_size=10.0,
        unit="the unit of the files",
    ),
    "events": _of_files(
        "recordings",
        events.CLASSES,
        Format(
            events.find_events,
            lambda source, size: [events.read_events(source[0], size)],
            group=events.part_of,
            test_groups=events.PARTS[1:],
        ),
        cell_size=10.0,
        unit="milliseconds",
        batch=16,
        draw=partial(_panel, "recording", True),
    ),
    "muscima": _of_files(
        "pieces",
        muscima.CLASSES,
        Format(
            muscima.find_muscima,
            lambda source, _: [muscima.read_muscima(*source)],
            group=lambda page, _: muscima.writer_of(page),
            most_points=50_000,
        ),
        cell_size=1.0,
        unit="pixels",
        other=muscima.CLASSES.index("other symbol"),
        net=STROKES,
        directions=True,
        draw=partial(_panel, "piece", True),
    ),
}
