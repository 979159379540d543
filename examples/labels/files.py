"""Scenes of labeled points from a folder of files, for training and for the test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from examples.formats.raw import RawScene, refuse
from examples.labels.scenes import LabeledPoints, collate
from examples.training.seeds import derive_seed
from vicinal import voxelize

Source = tuple[Path, ...]  # a file of points, and that of their labels where it is another
HELD_OUT = 5  # one part in this many is for the test
REMEMBERED = 5_000_000  # points that a reader keeps in memory, some 30 bytes each
MULTIPLE = 32  # grids are so many cells large, or a multiple: a multiple of all strides of a task


class Format(NamedTuple):
    """How a folder of files is read.

    Attributes:
        find: the sources in a folder, sorted.
        read: the scenes of a source, for a cell size.
        group: what a file belongs to, such as a drive, whose files are all for training or all for
            the test.
        test_groups: those for the test, where a folder has them and others.
        most_points: a scene with more is cut into pieces.
    """

    find: Callable[[Path], list[Source]]
    read: Callable[[Source, float], list[RawScene]]
    group: Callable[[Path], str]
    test_groups: tuple[str, ...] = ()
    most_points: int = 150_000


def split_sources(sources: Sequence[Source], of: Format) -> tuple[list[Source], list[Source]]:
    """Those for training and those for the test, the same ones in every run.

    For the test are the format's own test groups; else the last fifth of the groups, at least one;
    and of a single group, the last fifth of its files by name.

    Raises:
        FormatError: there is a single file.
    """
    groups = sorted({of.group(source[0]) for source in sources})
    named = [group for group in groups if group in of.test_groups]
    if not 0 < len(named) < len(groups):
        named = _last(groups)
    test = [source for source in sources if of.group(source[0]) in named]
    if len(groups) == 1:
        # Not by folder, which may be that of a class.
        test = _last(sorted(sources, key=lambda source: (source[0].name, source)))
    if len(test) == len(sources):
        refuse(sources[0][0], "at least two files, one of them for the test", "this one alone")
    held_out = set(test)
    return [source for source in sources if source not in held_out], test


T = TypeVar("T")


def _last(items: Sequence[T]) -> list[T]:
    return list(items[-max(len(items) // HELD_OUT, 1) :])


class Reader:
    """Reads the scenes of a source, cut into pieces, and remembers those of the last sources.

    It remembers as many sources as have at most `REMEMBERED` points, and at least one: a small file
    of many events is read once, not again for every event.
    """

    def __init__(self, of: Format, cell_size: float) -> None:
        self.of, self.cell_size = of, cell_size
        self.remembered: dict[Source, list[RawScene]] = {}  # the last one used at the end

    def __call__(self, source: Source) -> list[RawScene]:
        pieces = self.remembered.pop(source, None)
        if pieces is None:
            scenes = self.of.read(source, self.cell_size)
            pieces = [piece for scene in scenes for piece in cut(scene, self.of.most_points)]
        self.remembered[source] = pieces
        while len(self.remembered) > 1 and self._n_points() > REMEMBERED:
            del self.remembered[next(iter(self.remembered))]
        return pieces

    def _n_points(self) -> int:
        return sum(len(piece.labels) for pieces in self.remembered.values() for piece in pieces)

    def batch(self, pieces: Iterable[RawScene]) -> LabeledPoints:
        """One batch of these scenes, on a grid that holds all of them."""
        scenes = [(*to_cells(piece, self.cell_size), piece.labels) for piece in pieces]
        sizes = torch.stack([cells.amax(0) + 1 for cells, _, _ in scenes]).amax(0).tolist()
        return collate(scenes, tuple(-(-size // MULTIPLE) * MULTIPLE for size in sizes))


def cut(scene: RawScene, most: int) -> list[RawScene]:
    """Halves a scene across its longest axis until no piece has more than ``most`` points."""
    if len(scene.labels) <= most:
        return [scene]
    extent = scene.points.amax(0) - scene.points.amin(0)
    order = scene.points[:, int(extent.argmax())].argsort(stable=True)
    return [piece for half in order.tensor_split(2) for piece in cut(scene.take(half), most)]


def to_cells(scene: RawScene, cell_size: float) -> tuple[Tensor, Tensor]:
    """Cells int64 ``[n, P]`` from 0 on, and values ``[n, channels]``.

    For raw coordinates, values end with where in its cell a point is, from -1/2 to 1/2.
    """
    if not scene.points.is_floating_point():
        return scene.points - scene.points.amin(0), scene.values
    points = scene.points.double()
    voxels = voxelize(points, cell_size=cell_size)
    cells = voxels.coordinates[:, 1:]
    places = (points - points.new_tensor(voxels.origin)) / cell_size - cells - 0.5
    return cells, torch.cat((scene.values, places.float()), 1)


class TrainingFiles(NamedTuple):
    """The scenes to train on: all files in random order, then all again in another.

    Of a file with several scenes, one is drawn.
    """

    sources: list[Source]
    reader: Reader
    seed: int

    def batch(self, numbers: Iterable[int]) -> LabeledPoints:
        """Reads the scenes with these numbers."""
        return self.reader.batch(map(self.scene, numbers))

    def scene(self, number: int) -> RawScene:
        """The scene with this number, which depends on the seed and the files alone."""
        epoch, place = divmod(number, len(self.sources))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(len(self.sources), generator=generator)
        scenes = self.reader(self.sources[order[place]])
        return scenes[derive_seed(self.seed, epoch, place) % len(scenes)]


class HeldOutFiles(NamedTuple):
    """The scenes of the test: a source of each, and its place among the scenes of the source."""

    places: list[tuple[Source, int]]
    reader: Reader

    @classmethod
    def of(cls, sources: list[Source], reader: Reader, most: int) -> HeldOutFiles:
        """All scenes of files that are evenly spread over ``sources``, up to ``most`` scenes."""
        n_files = min(len(sources), most)
        chosen = [sources[index * len(sources) // n_files] for index in range(n_files)]
        n_scenes = [len(reader(source)) for source in chosen]
        places = [
            (source, place)
            for place in range(max(n_scenes))
            for source, n in zip(chosen, n_scenes, strict=True)
            if place < n
        ]
        return cls(sorted(places[:most]), reader)

    def batch(self, numbers: Iterable[int]) -> LabeledPoints:
        """Reads the scenes with these numbers."""
        chosen = (self.places[number] for number in numbers)
        return self.reader.batch(self.reader(source)[place] for source, place in chosen)
