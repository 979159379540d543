"""Scenes of labeled points from a folder of files, for training and for the test."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from examples.formats.raw import RawScene, naming, refuse
from examples.labels.scenes import LabeledPoints, collate
from examples.training.seeds import derive_seed
from vicinal import voxelize

Source = tuple[Path, ...]  # a file of points, and that of their labels where it is another
Place = tuple[Source, int]  # of a scene: its source, and its number among those of the source
HELD_OUT = 5  # one part in this many is for the test
REMEMBERED = 5_000_000  # points that a reader keeps in memory, some 60 bytes each
MOST_CELLS = 2**60  # of a grid: with the borders of windows, a pyramid has fewer than 2^62
MULTIPLE = 32  # grids are so many cells large, or a multiple: a multiple of all strides of a task


class Format(NamedTuple):
    """How a folder of files is read.

    Attributes:
        find: the sources in a folder, sorted.
        read: the scenes of a source, for a cell size.
        group: what a file in a folder belongs to, such as a drive, whose files are all for training
            or all for the test.
        test_groups: those for the test, where a folder has them and others.
        most_points: a scene with more is cut into pieces.
    """

    find: Callable[[Path], list[Source]]
    read: Callable[[Source, float], list[RawScene]]
    group: Callable[[Path, Path], str]
    test_groups: tuple[str, ...] = ()
    most_points: int = 150_000


class Split(NamedTuple):
    """The sources for training and those for the test."""

    training: list[Source]
    test: list[Source]

    def describe(self, folder: Path) -> dict[str, str]:
        """How many files each part has, and a hash of their names in the folder."""
        return {f"{part}_files": _describe(getattr(self, part), folder) for part in self._fields}


def _describe(sources: Sequence[Source], folder: Path) -> str:
    names = [os.path.relpath(path, folder) for source in sources for path in source]
    key = hashlib.blake2b(os.fsencode("\n".join(names)), digest_size=4)
    return f"{len(sources)} files whose names hash to {key.hexdigest()}"


def split_sources(sources: Sequence[Source], of: Format, folder: Path) -> Split:
    """Those for training and those for the test, the same ones in every run.

    For the test are the format's own test groups; else the last fifth of the groups, at least one;
    and of a single group, the last fifth of its files by name. Files that differ in their suffix
    alone, such as ``a.las`` and ``a.laz``, count as one.

    Raises:
        FormatError: there is a single file.
    """
    group_of = {source: of.group(source[0], folder) for source in sources}
    groups = sorted({*group_of.values()})
    named = [group for group in groups if group in of.test_groups]
    if not 0 < len(named) < len(groups):
        named = _last(groups)
    if len(groups) == 1:
        # Not by folder, which may be that of a class.
        group_of = {source: str(source[0].with_suffix("")) for source in sources}
        named = _last(sorted({*group_of.values()}, key=lambda stem: (Path(stem).name, stem)))
    held_out = set(named)
    split = Split([], [])
    for source in sources:
        (split.test if group_of[source] in held_out else split.training).append(source)
    if not split.training:
        came = "this one alone" if len(sources) == 1 else "files that differ in suffix alone"
        refuse(sources[0][0], "at least two files, one of them for the test", came)
    return split


T = TypeVar("T")


def _last(items: Sequence[T]) -> list[T]:
    return list(items[-max(len(items) // HELD_OUT, 1) :])


class Reader:
    """Reads the scenes of a source, cut into pieces, and remembers those of the last sources.

    The points of a piece are the cells of a grid, from 0 on. The reader remembers as many sources
    as have at most `REMEMBERED` points, and at least one: a small file of many events is read once,
    not again for every event.
    """

    def __init__(self, of: Format, cell_size: float) -> None:
        self.of, self.cell_size = of, cell_size
        self.remembered: dict[Source, list[RawScene]] = {}  # the last one used at the end

    def __call__(self, source: Source) -> list[RawScene]:
        pieces = self.remembered.pop(source, None)
        if pieces is None:
            pieces = self._read(source)
        self.remembered[source] = pieces
        while len(self.remembered) > 1 and self._n_points() > REMEMBERED:
            del self.remembered[next(iter(self.remembered))]
        return pieces

    def _read(self, source: Source) -> list[RawScene]:
        with naming(source[0]):
            scenes = self.of.read(source, self.cell_size)
            pieces = [piece for scene in scenes for piece in cut(scene, self.of.most_points)]
            pieces = [to_cells(piece, self.cell_size) for piece in pieces]
        for piece in pieces:
            _check_grid(source[0], _grid_of([piece]))
        return pieces

    def _n_points(self) -> int:
        return sum(len(piece.labels) for pieces in self.remembered.values() for piece in pieces)

    def batch(self, places: Iterable[Place]) -> LabeledPoints:
        """One batch of these scenes, on a grid that holds all of them.

        Raises:
            FormatError: the grid has too many cells; it names the file of the largest scene.
        """
        read = [(source[0], self(source)[number]) for source, number in places]
        scenes = [scene for _, scene in read]
        path, _ = max(read, key=lambda one: math.prod(_grid_of([one[1]])))
        shape = _grid_of(scenes)
        _check_grid(path, shape, len(scenes))
        return collate(scenes, shape)


def _grid_of(scenes: Sequence[RawScene]) -> tuple[int, ...]:
    """The size of a grid that holds scenes whose points are cells."""
    sizes = torch.stack([scene.points.amax(0) + 1 for scene in scenes]).amax(0).tolist()
    return tuple(-(-size // MULTIPLE) * MULTIPLE for size in sizes)


def _check_grid(path: Path, shape: tuple[int, ...], n_scenes: int = 1) -> None:
    if math.prod(shape) * n_scenes >= MOST_CELLS:
        expected = "points in fewer than 2^60 cells, whose size --cell-size sets"
        each = f" for each of {n_scenes} scenes" if n_scenes > 1 else ""
        refuse(path, expected, " x ".join(map(str, shape)) + each)


def cut(scene: RawScene, most: int) -> list[RawScene]:
    """Halves a scene across its longest axis until no piece has more than ``most`` points."""
    if len(scene.labels) <= most:
        return [scene]
    extent = scene.points.amax(0) - scene.points.amin(0)
    order = scene.points[:, int(extent.argmax())].argsort(stable=True)
    return [piece for half in order.tensor_split(2) for piece in cut(scene.take(half), most)]


def to_cells(scene: RawScene, cell_size: float) -> RawScene:
    """The scene with cells, int64 ``[n, P]`` from 0 on, as points.

    For raw coordinates, values end with where in its cell a point is, from -1/2 to 1/2.
    """
    if not scene.points.is_floating_point():
        return scene._replace(points=scene.points - scene.points.amin(0))
    points = scene.points.double()
    voxels = voxelize(points, cell_size=cell_size)
    cells = voxels.coordinates[:, 1:]
    places = (points - points.new_tensor(voxels.origin)) / cell_size - cells - 0.5
    return RawScene(cells, torch.cat((scene.values, places.float()), 1), scene.labels)


class TrainingFiles(NamedTuple):
    """The scenes to train on: all files in random order, then all again in another.

    Of a file with several scenes, one is drawn.
    """

    sources: list[Source]
    reader: Reader
    seed: int

    def batch(self, numbers: Iterable[int]) -> LabeledPoints:
        """Reads the scenes with these numbers."""
        return self.reader.batch(map(self.place, numbers))

    def place(self, number: int) -> Place:
        """The scene with this number, which depends on the seed and the files alone."""
        epoch, index = divmod(number, len(self.sources))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(len(self.sources), generator=generator)
        source = self.sources[order[index]]
        return source, derive_seed(self.seed, epoch, index) % len(self.reader(source))


class HeldOutFiles(NamedTuple):
    """The scenes of the test."""

    places: list[Place]
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
        return self.reader.batch(self.places[number] for number in numbers)
