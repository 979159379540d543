"""Small files in the formats that `examples.formats` reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from numpy.typing import NDArray

Array = NDArray[Any]


def write(path: Path, content: bytes) -> Path:
    """Writes a file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_scan(folder: Path, name: str, records: Array, codes: Array) -> tuple[Path, Path]:
    """A scan of KITTI ``[n, 4]`` in a sequence's folder, and its labels ``[n]``."""
    return (
        write(folder / "velodyne" / f"{name}.bin", records.astype("<f4").tobytes()),
        write(folder / "labels" / f"{name}.label", codes.astype("<u4").tobytes()),
    )


def write_sweeps(folder: Path, sweeps: dict[str, tuple[Array, Array]]) -> None:
    """A data set of nuScenes: the records ``[n, 5]`` and categories ``[n]`` of named sweeps."""
    labels, data = [], []
    for token, (name, (records, categories)) in enumerate(sweeps.items()):
        paths = f"samples/LIDAR_TOP/{name}.pcd.bin", f"lidarseg/v1.0-mini/{token}_lidarseg.bin"
        write(folder / paths[0], records.astype("<f4").tobytes())
        write(folder / paths[1], categories.astype("u1").tobytes())
        labels.append({"token": "x", "sample_data_token": str(token), "filename": paths[1]})
        data.append({"token": str(token), "filename": paths[0], "width": 0})
    data.append({"token": "camera", "filename": "samples/CAM_FRONT/0.jpg", "width": 1600})
    for table, rows in (("lidarseg", labels), ("sample_data", data)):
        write(folder / "v1.0-mini" / f"{table}.json", json.dumps(rows).encode())


def write_nmnist(path: Path, events: Sequence[tuple[int, int, int, int]]) -> Path:
    """Events (column, row, polarity, microseconds) in 40 bits each."""
    numbers = [(x << 32) + (y << 24) + (p << 23) + t for x, y, p, t in events]
    return write(path, b"".join(number.to_bytes(5, "big") for number in numbers))


def write_page(path: Path, symbols: Sequence[dict[str, Any]], tag: str = "Node") -> Path:
    """Annotations of MUSCIMA++, of symbols by the names of their elements."""
    root = ElementTree.Element(f"{tag}s")
    for number, symbol in enumerate(symbols):
        node = ElementTree.SubElement(root, tag)
        for name, text in ({"Id": number} | symbol).items():
            ElementTree.SubElement(node, name).text = str(text)
    return write(path, ElementTree.tostring(root))


def write_las(path: Path, points: Array, classification: Array, **columns: Array) -> Path:
    """A cloud ``[n, 3]`` with classes ``[n]``."""
    laspy = pytest.importorskip("laspy")
    cloud = laspy.create(point_format=6, file_version="1.4")
    cloud.header.scales, cloud.header.offsets = [0.001] * 3, points.min(0)
    cloud.xyz = points
    for name, column in ({"classification": classification} | columns).items():
        setattr(cloud, name, column)
    path.parent.mkdir(parents=True, exist_ok=True)
    cloud.write(path)
    return path


def write_hits(path: Path, classes: Any, **columns: Array) -> Path:
    """Columns of hits in HDF5; ``classes`` are the names of the labels, None for none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.importorskip("h5py").File(path, "w") as file:
        for name, column in columns.items():
            file[f"hits/{name}"] = column
        if classes is not None:
            file["hits/label"].attrs["classes"] = classes
    return path
