"""Hits of a particle detector, or other points of many small events, in HDF5.

A group ``hits`` has a data set ``[n]`` for each column: the coordinates, ``event`` with the number
of each hit's event, and ``label`` with its class, or -1 where it has none. The attribute
``classes`` of the labels has the names of the classes. All other columns are values, which should
be about 1 in size. h5py reads the file, and `vicinal.interop.from_hdf5` finds the cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
from vicinal.interop import from_hdf5

GROUP, EVENT, LABEL = "hits", "event", "label"
SUFFIXES = (".h5", ".hdf5")


def read_hits(
    path: Path, cell_size: float | Sequence[float], *, fields: Sequence[str] = ("x", "y", "z")
) -> list[RawScene]:
    """Reads the events of a file.

    Args:
        path: the file.
        cell_size: in the unit of the coordinates, one number or one per axis.
        fields: the names of the coordinates. Default: ``("x", "y", "z")``.

    Returns:
        for each event the cells of its hits, int64 ``[n, P]``, the means of the values in the cell
        of each hit ``[n, channels]``, or ones where there are no columns for them, and labels.

    Raises:
        FormatError: the file is missing or not HDF5, a column is missing, not of numbers or of
            another length, or a label is not one of a class.
    """
    columns, names = _read_columns(path)
    features = sorted(columns.keys() - {EVENT, LABEL, *fields})
    numbers = {number: number for number in range(len(names))} | {IGNORED: IGNORED}
    label = columns[LABEL]
    if label.size and int(label.max()) >= 2**63:  # as int64 it would be another label
        refuse(path, f"labels from {IGNORED} to {len(names) - 1}", int(label.max()))
    labels = classes_of(path, torch.from_numpy(label.astype("int64")), numbers)
    with naming(path):
        options: dict[str, Any] = {"event": EVENT, "cell_size": cell_size, "strides": (1,)}
        pyramid = from_hdf5(columns, tuple(fields), tuple(features), **options)
    return scenes_of_pyramid(path, pyramid, labels)


def classes_of_files(paths: Sequence[Path]) -> tuple[str, ...]:
    """The names of the classes of files, which are to have the same ones, and the same columns.

    Raises:
        FormatError: a file differs from the first, or is wrong as for `read_hits`.
    """
    first = None
    for path in paths:
        columns, names = _read_columns(path, with_contents=False)
        kind = sorted(columns), names
        if first is not None and kind != first:
            expected = f"the columns and classes {first} of {paths[0]}"
            refuse(path, expected, str(kind))
        first = kind
    assert first is not None
    return first[1]


def _read_columns(path: Path, with_contents: bool = True) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The columns of a file, None each without contents, and the names of its classes."""
    import h5py  # type: ignore[import-untyped, unused-ignore]

    expected = f"a group {GROUP!r} of columns in HDF5, with {EVENT!r} and {LABEL!r}"
    with reading(path, expected, Exception), h5py.File(path) as file:
        group = file[GROUP]
        missing = [name for name in (EVENT, LABEL) if name not in group]
        if missing:
            refuse(path, expected, f"the columns {sorted(group)}")
        label = group[LABEL]
        if label.ndim != 1 or label.dtype.kind not in "iu":
            came = f"{label.dtype} of shape {list(label.shape)}"
            refuse(path, f"a column of integers in {LABEL!r}", came)
        names = _names_of_classes(path, label.attrs.get("classes"))
        columns = {name: group[name][()] if with_contents else None for name in group}
    return columns, names


def _names_of_classes(path: Path, found: Any) -> tuple[str, ...]:
    """The value of the attribute, an array of one of the two kinds of text that HDF5 has."""
    listed = found.tolist() if getattr(found, "ndim", 0) == 1 else []
    names = [name.decode() if isinstance(name, bytes) else name for name in listed]
    if not names or not all(isinstance(name, str) for name in names):
        refuse(path, f"an attribute 'classes' of {LABEL!r}, a list of their names", repr(found))
    return tuple(names)


def find_hits(folder: Path) -> list[tuple[Path, ...]]:
    """The files in and below a folder.

    Raises:
        FormatError: there are none.
    """
    expected = "hits in *.h5 or *.hdf5"
    files = find_files(folder, expected, lambda path: path.suffix.lower() in SUFFIXES)
    return [(path,) for path in files]
