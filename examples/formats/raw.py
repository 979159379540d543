"""What all readers return, and how they refuse a wrong file."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from vicinal import FeaturePyramid

IGNORED = -1  # the label of points without one: neither the loss nor the quality counts them


class RawScene(NamedTuple):
    """The points of a scan, a page, a recording or an event.

    Attributes:
        points: ``[n, P]``: floating, in the unit of the file, or int64, the cell of each point.
        values: float32 ``[n, channels]``.
        labels: int64 ``[n]``, a class or `IGNORED`.
    """

    points: Tensor
    values: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> RawScene:
        """The points of these rows."""
        return RawScene(self.points[rows], self.values[rows], self.labels[rows])


class FormatError(ValueError):
    """A file is not as its format says; the message names it."""


def refuse(path: Path, expected: str, came: object) -> NoReturn:
    """Raises the `FormatError` of a wrong file."""
    raise FormatError(f"{path}: expected {expected}, got {came}")


@contextlib.contextmanager
def reading(path: Path, expected: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns an OSError, and what else a library raises on a wrong file, into a `FormatError`.

    Some libraries raise errors of any type, depending on which bytes are wrong.
    """
    try:
        yield
    except FormatError:
        raise
    except FileNotFoundError:
        refuse(path, expected, "no such file")
    except Exception as error:
        if not isinstance(error, (OSError, *errors)):
            raise
        refuse(path, expected, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


OF_CELLS = ("cell_size: ", "spatial_shape: ")  # how errors begin that larger cells may avoid


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to a ValueError that says what was expected and what came."""
    try:
        yield
    except FormatError:
        raise
    except ValueError as error:
        hint = "; --cell-size sets the size of a cell" if str(error).startswith(OF_CELLS) else ""
        raise FormatError(f"{path}: {error}{hint}") from error


def find_files(folder: Path, expected: str, fits: Callable[[Path], bool]) -> list[Path]:
    """The files in and below a folder that ``fits`` accepts, sorted.

    Links are followed. A file that has several paths is found once, by the first of them.

    Args:
        folder: where to look.
        expected: what the folder should have, for the error.
        fits: whether a path is that of a wanted file.

    Raises:
        FormatError: there is no such file, or a folder cannot be read.
    """
    with reading(folder, expected):
        found = sorted((path, real) for path, real in _files_below(folder) if fits(path))
    if not found:
        refuse(folder, expected, "none")
    paths: dict[str, Path] = {}
    for path, real in found:
        paths.setdefault(real, path)
    return [*paths.values()]


def _files_below(folder: Path, above: tuple[str, ...] = ()) -> Iterator[tuple[Path, str]]:
    """The files in and below a folder with their real paths; ``above`` has those of the folders
    that it was reached through, which a link must not lead back to.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = folder / entry.name
            if os.path.isdir(path) if entry.is_symlink() else entry.is_dir():
                yield from _files_below(path, (*above, real))
            elif entry.is_symlink():
                yield path, os.path.realpath(path)
            else:
                yield path, os.path.join(real, entry.name)


def read_records(path: Path, dtype: torch.dtype, width: int) -> Tensor:
    """Rows ``[n, width]`` of a file that holds little-endian numbers alone.

    Raises:
        FormatError: there is no such file, or it does not hold whole rows.
    """
    size = width * dtype.itemsize
    with reading(path, f"a file of {size} bytes per point", ValueError):
        content = path.read_bytes()
    if not content or len(content) % size:
        name = str(dtype).removeprefix("torch.")
        expected = f"a whole number of points of {size} bytes, {width} x {name}"
        refuse(path, expected, f"{len(content)} bytes")
    assert sys.byteorder == "little"
    return torch.frombuffer(bytearray(content), dtype=dtype).view(-1, width)


def classes_of(path: Path, codes: Tensor, classes: Mapping[int, int]) -> Tensor:
    """The class of each code ``[n]`` of a file, int64 ``[n]``.

    Raises:
        FormatError: ``classes`` does not have a code.
    """
    distinct, rows = codes.unique(return_inverse=True)
    unknown = [code for code in distinct.tolist() if code not in classes]
    if unknown:
        refuse(path, f"labels among {sorted(classes)}", f"the unknown ones {unknown[:8]}")
    return torch.tensor([classes[code] for code in distinct.tolist()])[rows]


def check_scene(path: Path, scene: RawScene, labels: Path | None = None) -> RawScene:
    """Returns ``scene``; ``labels`` is the file of its labels, None for ``path``.

    Raises:
        FormatError: there are no points, not as many labels, or numbers that are not finite.
    """
    n = len(scene.points)
    if not n:
        refuse(path, "at least one point", "none")
    if len(scene.labels) != n:
        refuse(labels or path, f"{n} labels, as many as points", len(scene.labels))
    for name, numbers in (("coordinates", scene.points), ("values", scene.values)):
        wrong = (~numbers.isfinite()).nonzero()
        if len(wrong):
            row, column = wrong[0].tolist()
            came = f"{numbers[row, column].item()} in column {column} of point {row}"
            refuse(path, f"finite {name}", came)
    return scene


def scenes_of_pyramid(path: Path, pyramid: FeaturePyramid, labels: Tensor) -> list[RawScene]:
    """The scenes of a pyramid that `vicinal.interop` made of a file, one per image.

    Args:
        path: the file.
        pyramid: whose finest level has the cells of all points.
        labels: int64 ``[n]``, of the points in the order of the file.

    Returns:
        scenes with the cell of each point, and the values of that cell.
    """
    assert pyramid.point_rows is not None
    assert pyramid.point_batch is not None
    cells = pyramid.coordinates[pyramid.point_rows[:, 0], 1:-1]
    whole = RawScene(cells, pyramid.values_of_points(level=0).float(), labels)
    check_scene(path, whole)
    counts = torch.bincount(pyramid.point_batch, minlength=pyramid.batch_size).tolist()
    rows = pyramid.point_batch.argsort(stable=True).split(counts)
    return [whole.take(own) for own in rows]
