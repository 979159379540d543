"""Recordings of event cameras: the binary form of N-MNIST, and the structured arrays of tonic.

N-MNIST has a file per recording, with 40 bits per event: 8 of the column, 8 of the row, one of the
polarity (1 is on) and 23 of the time in microseconds, the highest first. A row of 240 is no event,
but says that 2^13 microseconds have passed that later times do not count. See Orchard et al.,
"Converting Static Image Datasets to Spiking Neuromorphic Datasets Using Saccades", 2015.

tonic has structured arrays with the fields x, y, t (microseconds) and p, which ``numpy.save``
writes. In both, all events of a recording have one label, the digit that their folder is named by.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from examples.formats.raw import (
    RawScene,
    find_files,
    naming,
    read_records,
    reading,
    refuse,
    scenes_of_pyramid,
)
from vicinal.interop import from_events

CLASSES = tuple(map(str, range(10)))
OVERFLOW_ROW, OVERFLOW = 240, 2**13
SENSOR = (34, 34)  # width and height of N-MNIST
FIELDS = ("x", "y", "t", "p")
SUFFIXES = (".bin", ".npy")
PARTS = ("Train", "Test")


def read_nmnist(
    path: Path, cell_size: float = 10.0, *, sensor_size: Sequence[int] = SENSOR
) -> RawScene:
    """Reads a ``.bin`` file of N-MNIST, or of another data set in its form.

    Args:
        path: the file, in a folder named by a digit.
        cell_size: how long a cell is, in milliseconds; it is of one pixel. Default: 10.
        sensor_size: width and height in pixels. Default: 34 by 34.

    Returns:
        the cell of each event along row, column and time, int64 ``[n, 3]``; how many events its
        cell has that are off and on, ``[n, 2]``; labels.

    Raises:
        FormatError: the file is missing or truncated, an event lies outside the sensor, or the
            folder is not named by a digit.
    """
    x, y, high, middle, low = read_records(path, torch.uint8, 5).long().unbind(1)
    overflows = y == OVERFLOW_ROW
    time = ((high & 127) << 16) + (middle << 8) + low + OVERFLOW * overflows.cumsum(0)
    columns = {"x": x, "y": y, "t": time, "p": high >> 7}
    columns = {name: column[~overflows] for name, column in columns.items()}
    width, height = sensor_size
    outside = ((columns["x"] >= width) | (columns["y"] >= height)).nonzero()
    if len(outside):
        column, row = (int(columns[name][outside[0]]) for name in "xy")
        refuse(path, f"events on {width} x {height} pixels", f"one at column {column}, row {row}")
    return _scene(path, columns, cell_size)


def read_tonic(path: Path, cell_size: float = 10.0) -> RawScene:
    """Reads a ``.npy`` file with a structured array, whose field ``t`` is in microseconds.

    Arguments, result and errors are those of `read_nmnist`, without a sensor.
    """
    import numpy as np

    expected = f"a structured array with the fields {', '.join(FIELDS)} in a .npy file"
    with reading(path, expected, Exception):
        events = np.load(path, allow_pickle=False)
    names = getattr(getattr(events, "dtype", None), "names", None)
    if names is None or not set(FIELDS) <= set(names) or events.ndim != 1:
        shape, dtype = getattr(events, "shape", ()), getattr(events, "dtype", type(events))
        refuse(path, expected, f"an array of {dtype} of shape {list(shape)}")
    return _scene(path, events, cell_size)


def _scene(path: Path, columns: Any, cell_size: float) -> RawScene:
    digit = path.parent.name
    if digit not in CLASSES:
        refuse(path, "a folder named by a digit from 0 to 9", digit)
    n_events = len(columns["t"])
    if not n_events:
        refuse(path, "at least one event", "none")
    with naming(path):
        sizes = (1, 1, 1000 * cell_size)
        pyramid = from_events(columns, cell_size=sizes, strides=(1,), pooling="sum")
    return scenes_of_pyramid(path, pyramid, torch.full((n_events,), int(digit)))[0]


def read_events(path: Path, cell_size: float = 10.0) -> RawScene:
    """Reads a file of either kind, which the end of its name tells."""
    return (read_tonic if path.suffix.lower() == ".npy" else read_nmnist)(path, cell_size)


def find_events(folder: Path) -> list[tuple[Path, ...]]:
    """The recordings in and below a folder, those in folders that are named by digits.

    Raises:
        FormatError: there are none.
    """
    expected = "recordings *.bin or *.npy in folders named by digits"
    return [(path,) for path in find_files(folder, expected, _is_recording)]


def _is_recording(path: Path) -> bool:
    return path.parent.name in CLASSES and path.suffix.lower() in SUFFIXES


def part_of(path: Path, folder: Path) -> str:
    """``"Train"`` or ``"Test"``, the folders of N-MNIST, below ``folder``, in any case of letters;
    elsewhere the name of the file, without its suffix.
    """
    names = (name.capitalize() for name in reversed(path.relative_to(folder).parts[:-1]))
    return next((name for name in names if name in PARTS), path.stem)
