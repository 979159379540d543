"""What all readers return, and how they refuse a wrong file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
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


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of the file to a ValueError that says what was expected and what came."""
    try:
        yield
    except ValueError as error:
        raise FormatError(f"{path}: {error}") from error


def read_records(path: Path, dtype: torch.dtype, width: int) -> Tensor:
    """Rows ``[n, width]`` of a file that holds little-endian numbers alone.

    Raises:
        FormatError: there is no such file, or it does not hold whole rows.
    """
    size = width * dtype.itemsize
    with reading(path, f"a file of {size} bytes per point"):
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
    if not (scene.points.isfinite().all() and scene.values.isfinite().all()):
        refuse(path, "finite coordinates and values", "others")
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
