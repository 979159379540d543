"""Scans of KITTI and the labels of SemanticKITTI.

A scan ``velodyne/000000.bin`` has four little-endian float32 per point: x (forward), y (left) and z
(up) in meters from the sensor, and the remission. Its labels ``labels/000000.label`` have a uint32
per point: the class in the lower 16 bits, the number of the object in the upper ones.

The benchmark joins the classes of the files to 19. What moves has codes of its own, from 252 on; a
single scan does not show motion, so that moving objects have the class of those at rest unless
``moving`` asks for six more. Codes 0, 1, 52 and 99 (unlabeled, outlier, other structure, other
object) are not labels. See Behley et al., "SemanticKITTI: A Dataset for Semantic Scene
Understanding of LiDAR Sequences", 2019.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from examples.formats.raw import (
    IGNORED,
    RawScene,
    check_scene,
    classes_of,
    find_files,
    read_records,
    reading,
    refuse,
)

CODES = {
    **{"car": (10,), "bicycle": (11,), "motorcycle": (15,), "truck": (18,)},
    **{"other vehicle": (13, 16, 20), "person": (30,), "bicyclist": (31,), "motorcyclist": (32,)},
    **{"road": (40, 60), "parking": (44,), "sidewalk": (48,), "other ground": (49,)},
    **{"building": (50,), "fence": (51,), "vegetation": (70,), "trunk": (71,), "terrain": (72,)},
    **{"pole": (80,), "traffic sign": (81,)},
}
MOVING_CODES = {
    **{"car": (252,), "bicyclist": (253,), "person": (254,), "motorcyclist": (255,)},
    **{"other vehicle": (256, 257, 259), "truck": (258,)},
}
NO_LABELS = (0, 1, 52, 99)
CLASSES = tuple(CODES)
MOVING_CLASSES = (*CLASSES, *(f"moving {name}" for name in MOVING_CODES))
VALIDATION = "08"  # the sequence that the benchmark validates on


def read_kitti(scan: Path, labels: Path | None = None, *, moving: bool = False) -> RawScene:
    """Reads a scan.

    Args:
        scan: the ``.bin`` file.
        labels: the ``.label`` file; None (default): no point has a label.
        moving: labels are in `MOVING_CLASSES` instead of `CLASSES`.

    Returns:
        points in meters, float32 ``[n, 3]``; height and distance from the sensor, in tens of
        meters, and the remission, ``[n, 3]``; labels.

    Raises:
        FormatError: a file is missing or truncated, or a label is unknown.
    """
    points, remission = read_records(scan, torch.float32, 4).split((3, 1), 1)
    classes = torch.full((len(points),), IGNORED)
    if labels is not None:
        codes = read_records(labels, torch.int32, 1)[:, 0] & 0xFFFF
        classes = classes_of(labels, codes, _classes_of_codes(moving))
    values = torch.cat((lidar_values(points), remission), 1)
    return check_scene(scan, RawScene(points, values, classes), labels)


def lidar_values(points: Tensor) -> Tensor:
    """Height and distance of points ``[n, 3]`` from the sensor, in tens of meters, ``[n, 2]``."""
    return torch.stack((points[:, 2], points.norm(dim=1)), 1) / 10


def _classes_of_codes(moving: bool) -> dict[int, int]:
    numbers = dict.fromkeys(NO_LABELS, IGNORED)
    for number, codes in enumerate(CODES.values()):
        numbers |= dict.fromkeys(codes, number)
    for number, (name, codes) in enumerate(MOVING_CODES.items(), len(CLASSES)):
        numbers |= dict.fromkeys(codes, number if moving else CLASSES.index(name))
    return numbers


def find_kitti(folder: Path) -> list[tuple[Path, ...]]:
    """The scans in and below a folder and their labels, without sequences that have no labels.

    Raises:
        FormatError: there are none, or the labels of a scan are missing in a sequence that has
            some.
    """
    expected = "scans velodyne/*.bin beside a folder labels"
    scans = find_files(folder, expected, _is_labeled_scan)
    sequences = {scan.parents[1] for scan in scans}
    labels = {sequence: _labels_in(sequence / "labels") for sequence in sequences}
    for scan in scans:
        if scan.stem not in labels[scan.parents[1]]:
            missing = scan.parents[1] / "labels" / f"{scan.stem}.label"
            refuse(missing, f"the labels of {scan}", "no such file")
    return [(scan, labels[scan.parents[1]][scan.stem]) for scan in scans]


def _is_labeled_scan(path: Path) -> bool:
    is_scan = path.parent.name == "velodyne" and path.suffix.lower() == ".bin"
    return is_scan and (path.parents[1] / "labels").is_dir()


def _labels_in(folder: Path) -> dict[str, Path]:
    """The files of labels in a folder, by the names of their scans."""
    with reading(folder, "labels *.label"):
        files = sorted(folder.iterdir())
    return {file.stem: file for file in files if file.suffix.lower() == ".label"}
