"""LAS and LAZ: clouds of airborne and mobile laser scanners.

laspy reads them, and `vicinal.interop.from_las` finds the cells. A point has a code of the list in
the LAS specification 1.4 (ASPRS, revision 15). Codes 0 (never classified), 1 (unclassified), 8 and
12 (reserved; key points and overlap in older versions) and 20 to 22 (ignored ground, snow, temporal
exclusion) are not labels. Codes from 64 on mean what their producer says, so their classes are to
be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from examples.formats.raw import (
    IGNORED,
    RawScene,
    classes_of,
    find_files,
    naming,
    reading,
    refuse,
    scenes_of_pyramid,
)
from vicinal.interop import from_las

CODES = {
    **{"ground": (2,), "low vegetation": (3,), "medium vegetation": (4,), "high vegetation": (5,)},
    **{"building": (6,), "noise": (7, 18), "water": (9,), "rail": (10,), "road": (11,)},
    **{"wire": (13, 14), "tower": (15,), "connector": (16,), "bridge": (17,), "overhead": (19,)},
}
CLASSES = tuple(CODES)
CLASSES_OF_CODES = dict.fromkeys((0, 1, 8, 12, 20, 21, 22), IGNORED) | {
    code: number for number, codes in enumerate(CODES.values()) for code in codes
}
INTENSITIES, MOST_RETURNS = 65_535, 5  # returns: of the older point formats
SUFFIXES = (".las", ".laz")
FEATURES = ("z", "intensity", "return_number", "number_of_returns")


def read_las(
    path: Path, cell_size: float = 0.5, *, classes: Mapping[int, int] = CLASSES_OF_CODES
) -> RawScene:
    """Reads a cloud.

    Args:
        path: the ``.las`` or ``.laz`` file.
        cell_size: in the unit of the file, mostly meters. Default: 0.5.
        classes: the number of each code's class, or `IGNORED`. Default: those of `CLASSES`.

    Returns:
        the cell of each point, int64 ``[n, 3]``; means over its cell: height above the lowest cell
        in tens of units, intensity from 0 to 1, return number and number of returns over 5,
        ``[n, 4]``; labels.

    Raises:
        FormatError: the file is missing, truncated or none of LAS, or a class is unknown.
    """
    import laspy  # type: ignore[import-untyped, unused-ignore]
    import numpy as np

    with reading(path, "a cloud in LAS or LAZ", Exception), laspy.open(path) as file:
        n_points = file.header.point_count  # which reading changes where points are missing
        cloud = file.read()
    if len(cloud.points) != n_points or not n_points:
        refuse(path, f"{n_points or 'some'} points", len(cloud.points))
    codes = torch.from_numpy(np.array(cloud.classification))
    labels = classes_of(path, codes, classes)
    with naming(path):
        pyramid = from_las(cloud, FEATURES, cell_size=cell_size, strides=(1,))
    values = pyramid.values.clone()
    values[:, 0] -= values[:, 0].min()
    scale = torch.tensor([10, INTENSITIES, MOST_RETURNS, MOST_RETURNS])
    pyramid = pyramid.with_values((values / scale).float())
    return scenes_of_pyramid(path, pyramid, labels)[0]


def find_las(folder: Path) -> list[tuple[Path, ...]]:
    """The clouds in and below a folder.

    Raises:
        FormatError: there are none.
    """
    expected = "clouds *.las or *.laz"
    clouds = find_files(folder, expected, lambda path: path.suffix.lower() in SUFFIXES)
    return [(path,) for path in clouds]
