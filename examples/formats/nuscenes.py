"""LiDAR sweeps of nuScenes and their labels of nuScenes-lidarseg.

A sweep ``samples/LIDAR_TOP/*.pcd.bin`` has five little-endian float32 per point: x (right), y
(forward) and z (up) in meters from the sensor, the intensity from 0 to 255, and the number of the
laser, from 0 to 31. Labels ``lidarseg/*/*_lidarseg.bin`` have a uint8 per point, the index of its
category. Which belong together is told by the tables ``lidarseg.json`` and ``sample_data.json``.

The challenge joins the 32 categories to 16 and leaves out the rest. See Caesar et al., "nuScenes: A
Multimodal Dataset for Autonomous Driving", 2020, and Fong et al., "Panoptic nuScenes", 2022.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from examples.formats.kitti import lidar_values
from examples.formats.raw import (
    IGNORED,
    RawScene,
    check_scene,
    classes_of,
    read_records,
    reading,
    refuse,
)

CATEGORIES = {
    **{"barrier": (9,), "bicycle": (14,), "bus": (15, 16), "car": (17,)},
    **{"construction vehicle": (18,), "motorcycle": (21,), "pedestrian": (2, 3, 4, 6)},
    **{"traffic cone": (12,), "trailer": (22,), "truck": (23,), "driveable surface": (24,)},
    **{"other flat": (25,), "sidewalk": (26,), "terrain": (27,), "manmade": (28,)},
    **{"vegetation": (30,)},
}
CLASSES = tuple(CATEGORIES)
N_CATEGORIES = 32
INTENSITIES, LASERS = 255, 32


def read_nuscenes(sweep: Path, labels: Path | None = None) -> RawScene:
    """Reads a sweep.

    Args:
        sweep: the ``.pcd.bin`` file.
        labels: the ``_lidarseg.bin`` file; None (default): no point has a label.

    Returns:
        points in meters, float32 ``[n, 3]``; height and distance from the sensor, in tens of
        meters, the intensity and the laser, both from 0 to 1, ``[n, 4]``; labels.

    Raises:
        FormatError: a file is missing or truncated, or a laser or label is unknown.
    """
    points, measured = read_records(sweep, torch.float32, 5).split((3, 2), 1)
    lasers = measured[:, 1]
    known = torch.isin(lasers, torch.arange(LASERS, dtype=lasers.dtype))
    if not known.all():
        refuse(sweep, f"lasers from 0 to {LASERS - 1}", lasers[~known][0].item())
    classes = torch.full((len(points),), IGNORED)
    if labels is not None:
        numbers = dict.fromkeys(range(N_CATEGORIES), IGNORED)
        for number, categories in enumerate(CATEGORIES.values()):
            numbers |= dict.fromkeys(categories, number)
        classes = classes_of(labels, read_records(labels, torch.uint8, 1)[:, 0], numbers)
    scaled = measured / torch.tensor([INTENSITIES, LASERS - 1])
    values = torch.cat((lidar_values(points), scaled), 1)
    return check_scene(sweep, RawScene(points, values, classes), labels)


def find_nuscenes(folder: Path) -> list[tuple[Path, ...]]:
    """The sweeps of a data set that have labels, each with its labels.

    Raises:
        FormatError: there are none, or a table is not as described.
    """
    pairs: list[tuple[Path, ...]] = []
    for table in sorted(folder.glob("v1.0-*/lidarseg.json")):
        labels = _columns(table, "sample_data_token", "filename")
        sweeps = _columns(table.with_name("sample_data.json"), "token", "filename")
        missing = sorted(labels.keys() - sweeps.keys())
        if missing:
            refuse(table, "tokens of sample_data.json", f"the unknown one {missing[0]}")
        pairs += [(folder / sweeps[token], folder / labels[token]) for token in labels]
    if not pairs:
        refuse(folder, "a table v1.0-*/lidarseg.json with rows", "none")
    return sorted(set(pairs))


def _columns(table: Path, key: str, value: str) -> dict[str, str]:
    """Two columns of a table, which is a list of rows."""
    expected = f"a list of objects with {key} and {value} in JSON"
    with reading(table, expected, ValueError, TypeError, KeyError, RecursionError):
        rows: list[dict[str, Any]] = json.loads(table.read_bytes())
        return {str(row[key]): str(row[value]) for row in rows}


def log_of(sweep: Path) -> str:
    """The drive that a sweep is of, which its name begins with."""
    return sweep.name.partition("__")[0]
