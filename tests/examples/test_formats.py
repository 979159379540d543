"""Readers of published formats, on small files in them, and what they say of wrong files."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from format_files import (
    write,
    write_hits,
    write_las,
    write_nmnist,
    write_page,
    write_scan,
    write_sweeps,
)

from examples.formats import events, hdf5, kitti, las, muscima, nuscenes
from examples.formats.raw import IGNORED, FormatError, RawScene


def refused(path: Path, read: Callable[[], object]) -> str:
    """What a reader says of a wrong file, which it names."""
    with pytest.raises(FormatError, match=re.escape(str(path))) as error:
        read()
    message = str(error.value)
    assert re.search(": expected .*, got ", message)
    return message


# KITTI


def scan_of(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    return rng.normal(size=(n, 4)).astype(np.float32), np.full(n, 40)


def test_kitti_scan(tmp_path: Path) -> None:
    records = np.array([[3, 4, 0, 0.25], [0, 0, -2, 0.5], [1, 0, 0, 0], [6, 8, 0, 1]])
    codes = np.array([10, 252, 1, 259]) + (7 << 16)  # the upper bits are the object
    paths = write_scan(tmp_path, "000000", records, codes)
    scene = kitti.read_kitti(*paths)
    assert scene.points.tolist() == records[:, :3].tolist()
    assert scene.values[0].tolist() == pytest.approx([0, 0.5, 0.25])
    assert scene.values[1].tolist() == pytest.approx([-0.2, 0.2, 0.5])
    car, other = kitti.CLASSES.index("car"), kitti.CLASSES.index("other vehicle")
    assert scene.labels.tolist() == [car, car, IGNORED, other]
    moving = kitti.read_kitti(*paths, moving=True).labels.tolist()
    names = [kitti.MOVING_CLASSES[number] for number in moving if number != IGNORED]
    assert names == ["car", "moving car", "moving other vehicle"]
    assert kitti.read_kitti(paths[0]).labels.tolist() == [IGNORED] * 4


def test_kitti_has_the_classes_of_the_benchmark() -> None:
    assert len(kitti.CLASSES) == 19
    assert len(kitti.MOVING_CLASSES) == 25
    codes = [
        code for group in (kitti.CODES, kitti.MOVING_CODES) for c in group.values() for code in c
    ]
    assert len({*codes, *kitti.NO_LABELS}) == len(codes) + len(kitti.NO_LABELS) == 34


def test_kitti_refusals(tmp_path: Path) -> None:
    scan, labels = write_scan(tmp_path, "000000", *scan_of(6))
    read = kitti.read_kitti
    missing = tmp_path / "none.bin"
    assert "no such file" in refused(missing, lambda: read(missing))
    assert "no such file" in refused(missing, lambda: read(scan, missing))
    short = write(tmp_path / "short.bin", scan.read_bytes()[:-3])
    assert "93 bytes" in refused(short, lambda: read(short))
    empty = write(tmp_path / "empty.bin", b"")
    assert "0 bytes" in refused(empty, lambda: read(empty))
    of_16_bits = write(tmp_path / "16.label", np.full(6, 40, "<u2").tobytes())
    assert "6 labels, as many as points, got 3" in refused(
        of_16_bits, lambda: read(scan, of_16_bits)
    )
    unknown = write(tmp_path / "unknown.label", np.array([40] * 5 + [77], "<u4").tobytes())
    assert "[77]" in refused(unknown, lambda: read(scan, unknown))
    infinite = write(tmp_path / "inf.bin", np.full((6, 4), np.inf, "<f4").tobytes())
    message = "finite coordinates, got inf in column 0 of point 0"
    assert message in refused(infinite, lambda: read(infinite, labels))
    records = scan_of(6)[0]
    records[4, 3] = np.nan
    no_remission = write(tmp_path / "nan.bin", records.tobytes())
    message = "finite values, got nan in column 2 of point 4"
    assert message in refused(no_remission, lambda: read(no_remission, labels))


def test_kitti_folder(tmp_path: Path) -> None:
    first = write_scan(tmp_path / "sequences/00", "000001", *scan_of(3))
    second = write_scan(tmp_path / "sequences/08", "000000", *scan_of(3))
    write(tmp_path / "sequences/11/velodyne/000000.bin", b"")  # of the test, without labels
    assert kitti.find_kitti(tmp_path) == [first, second]
    assert kitti.find_kitti(tmp_path / "sequences/00") == [first]
    nothing = tmp_path / "nothing"
    refused(nothing, lambda: kitti.find_kitti(nothing))
    first[1].unlink()
    assert "no such file" in refused(first[1], lambda: kitti.find_kitti(tmp_path))


# nuScenes


def test_nuscenes_sweep_and_folder(tmp_path: Path) -> None:
    records = np.array([[3, 4, 10, 255, 31], [0, 0, -2, 0, 0], [1, 1, 1, 51, 3]], np.float32)
    write_sweeps(tmp_path, {"b": (records, np.array([17, 31, 15])), "a": (records, np.zeros(3))})
    a, b = nuscenes.find_nuscenes(tmp_path)
    assert (a[0].name, b[0].name) == ("a.pcd.bin", "b.pcd.bin")
    scene = nuscenes.read_nuscenes(*b)
    assert scene.points.tolist() == records[:, :3].tolist()
    assert scene.values[0].tolist() == pytest.approx([1, 1.25**0.5, 1, 1])
    assert scene.values[2, 2].item() == pytest.approx(0.2)
    bus = nuscenes.CLASSES.index("bus")
    assert scene.labels.tolist() == [nuscenes.CLASSES.index("car"), IGNORED, bus]
    assert nuscenes.read_nuscenes(*a).labels.tolist() == [IGNORED] * 3
    assert nuscenes.read_nuscenes(a[0]).labels.tolist() == [IGNORED] * 3
    assert nuscenes.log_of(Path("n015-2018-07__LIDAR_TOP__15.pcd.bin")) == "n015-2018-07"
    assert len(nuscenes.CLASSES) == 16


def test_nuscenes_refusals(tmp_path: Path) -> None:
    read, records = nuscenes.read_nuscenes, np.zeros((4, 5), np.float32)
    write_sweeps(tmp_path, {"a": (records, np.array([1, 2, 3, 40]))})
    [(sweep, labels)] = nuscenes.find_nuscenes(tmp_path)
    assert "[40]" in refused(labels, lambda: read(sweep, labels))
    of_kitti = write(tmp_path / "kitti.bin", records[:, :4].tobytes())
    assert "64 bytes" in refused(of_kitti, lambda: read(of_kitti))
    for laser in (0.5, 32, -1, np.nan):
        records[2, 4] = laser
        other = write(tmp_path / "laser.bin", records.tobytes())
        assert f"lasers from 0 to 31, got {laser:g}" in refused(other, lambda: read(other))  # noqa: B023
    longer = write(tmp_path / "longer.bin", bytes(16))
    assert "4 labels, as many as points, got 16" in refused(longer, lambda: read(sweep, longer))
    table = tmp_path / "v1.0-mini/sample_data.json"
    for wrong in (b"[", b'[{"token": "0"}]', b"7", b"[7]", b"[" * 100_000):
        write(table, wrong)
        refused(table, lambda: nuscenes.find_nuscenes(tmp_path))
    write(table, b"[]")
    lidarseg = table.with_name("lidarseg.json")
    assert "unknown one 0" in refused(lidarseg, lambda: nuscenes.find_nuscenes(tmp_path))
    refused(sweep, lambda: nuscenes.find_nuscenes(sweep))
    rows = json.dumps([{"token": "0", "filename": "a\0b"}])
    write(table, rows.encode())
    rows = json.dumps([{"sample_data_token": "0", "filename": "b"}])
    write(lidarseg, rows.encode())
    [(no_name, _)] = nuscenes.find_nuscenes(tmp_path)
    refused(no_name, lambda: read(no_name))


# Event cameras


def test_nmnist_recording(tmp_path: Path) -> None:
    first, second = (3, 5, 0, 100), (4, 5, 1, 19_000)
    path = write_nmnist(
        tmp_path / "7/00001.bin",
        # 8192 microseconds pass; then 5000 is the time 13192.
        [first, first, second, (0, 240, 0, 0), (3, 6, 1, 5000), (33, 5, 1, 2**22)],
    )
    scene = events.read_nmnist(path, cell_size=10)
    last = (2**22 + 8192 - 100) // 10_000
    cells = [[0, 0, 0], [0, 0, 0], [0, 1, 1], [1, 0, 1], [0, 30, last]]  # row, column, time
    assert scene.points.tolist() == cells
    assert scene.values.tolist() == [[2, 0], [2, 0], [0, 1], [0, 1], [0, 1]]
    assert scene.labels.tolist() == [7] * 5


def test_tonic_recording_is_the_same(tmp_path: Path) -> None:
    recorded = [(3, 5, 0, 100), (4, 6, 1, 19_000), (4, 6, 1, 19_500)]
    dtype = [("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")]
    array = np.array([(x, y, t, p) for x, y, p, t in recorded], dtype)
    path = tmp_path / "3/a.npy"
    path.parent.mkdir()
    np.save(path, array)
    same = events.read_events(write_nmnist(tmp_path / "3/a.bin", recorded))
    for ours, theirs in zip(events.read_events(path), same, strict=True):
        assert torch.equal(ours, theirs)
    assert events.find_events(tmp_path) == [(tmp_path / "3/a.bin",), (path,)]


def test_event_refusals(tmp_path: Path) -> None:
    read = events.read_events
    outside = write_nmnist(tmp_path / "1/outside.bin", [(40, 5, 0, 100)])
    assert "34 x 34 pixels, got one at column 40, row 5" in refused(outside, lambda: read(outside))
    assert events.read_nmnist(outside, sensor_size=(64, 64)).labels.tolist() == [1]
    short = write(tmp_path / "1/short.bin", bytes(7))
    assert "7 bytes" in refused(short, lambda: read(short))
    no_digit = write_nmnist(tmp_path / "one/a.bin", [(1, 1, 0, 0)])
    assert "named by a digit" in refused(no_digit, lambda: read(no_digit))
    nothing = write_nmnist(tmp_path / "1/nothing.bin", [(0, 240, 0, 0)])
    assert "none" in refused(nothing, lambda: read(nothing))
    for name, array in {
        "plain": np.zeros((4, 4)),
        "fields": np.zeros(4, [("x", "i4"), ("y", "i4"), ("t", "i8")]),
        "text": np.zeros(4, [("x", "i4"), ("y", "i4"), ("t", "U3"), ("p", "i4")]),
        "objects": np.array([None]),
        "empty": np.zeros(0, [("x", "i4"), ("y", "i4"), ("t", "i8"), ("p", "?")]),
    }.items():
        path = tmp_path / f"1/{name}.npy"
        np.save(path, array)
        refused(path, lambda: read(path))  # noqa: B023
    truncated = write(tmp_path / "1/truncated.npy", path.read_bytes()[:20])
    refused(truncated, lambda: read(truncated))
    missing = tmp_path / "1/missing.npy"
    refused(missing, lambda: read(missing))
    refused(tmp_path / "one", lambda: events.find_events(tmp_path / "one"))


def test_parts_of_nmnist() -> None:
    for folder, part in (
        *[("Train/3", "Train"), ("Test/3", "Test"), ("TEST/3", "Test"), ("train/day/3", "Train")],
        *[("test/mine/train/3", "Train"), ("mine/3", "00001"), ("testing/3", "00001")],
    ):
        path = Path("N-MNIST", folder, "00001.bin")
        assert events.part_of(path, Path("N-MNIST")) == part
    assert events.part_of(Path("test/mine/3/00001.bin"), Path("test/mine")) == "00001"


# MUSCIMA++

STEM = {"ClassName": "stem", "Top": 2, "Left": 4, "Width": 1, "Height": 3}
HEAD = {"ClassName": "noteheadFull", "Top": 3, "Left": 2, "Width": 3, "Height": 2}


def test_muscima_page(tmp_path: Path) -> None:
    """The head lies on the stem, which is smaller: that pixel is of the stem."""
    staff = {"ClassName": "staff", "Top": 0, "Left": 0, "Width": 9, "Height": 9, "Mask": "1:81"}
    head = HEAD | {"Mask": "0:1 1:4 0:1"}
    page = write_page(tmp_path / "page.xml", [staff, STEM | {"Mask": "1:3"}, head])
    nodes = muscima.read_nodes(page)
    assert [node.name for node in nodes] == ["staff", "stem", "noteheadFull"]
    assert nodes[2].mask.tolist() == [[False, True, True], [True, True, False]]
    scene = muscima.read_muscima(page)
    head_class, stem_class = map(muscima.CLASSES.index, ("notehead", "stem"))
    found = {
        (row - 0.5, column - 0.5): label
        for (row, column), label in zip(scene.points.tolist(), scene.labels.tolist(), strict=True)
    }
    stem = dict.fromkeys([(2, 4), (3, 4), (4, 4)], stem_class)
    assert found == dict.fromkeys([(3, 3), (4, 2), (4, 3)], head_class) | stem
    assert scene.values.tolist() == [[1]] * 6


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[("noteheadFullSmall", "notehead"), ("notehead-empty", "notehead"), ("beam", "beam")],
        *[("flag8thUp", "flag"), ("8th_flag", "flag"), ("restQuarter", "rest")],
        *[("8th_rest", "rest"), ("accidentalSharp", "accidental"), ("natural", "accidental")],
        *[
            ("gClef", "clef"),
            ("g-clef", "clef"),
            ("augmentationDot", "dot"),
            ("tie", "slur or tie"),
        ],
        *[("duration-dot", "dot"), ("barlineHeavy", "barline"), ("thin_barline", "barline")],
        *[("staffLine", "staff or ledger line"), ("ledger_line", "staff or ledger line")],
        *[("legerLine", "staff or ledger line"), ("repeatDot", "dot"), ("other-dot", "dot")],
        *[("articulationStaccato", "other symbol"), ("staccato-dot", "other symbol")],
    ],
)
def test_classes_of_both_versions_of_muscima(tmp_path: Path, name: str, expected: str) -> None:
    tag = "CropObject" if "_" in name or "-" in name else "Node"
    page = write_page(tmp_path / "page.xml", [HEAD | {"ClassName": name}], tag)
    labels = muscima.read_muscima(page).labels.tolist()
    assert labels == [muscima.CLASSES.index(expected)] * 6  # without a mask, the whole box


def test_muscima_refusals(tmp_path: Path) -> None:
    path, read = tmp_path / "page.xml", muscima.read_muscima
    assert "no such file" in refused(path, lambda: read(path))
    for symbols, message in (
        ([], "at least one symbol"),
        ([HEAD | {"ClassName": "staffSpace"}], "at least one symbol"),
        ([HEAD | {"Mask": "0:1 1:4"}], "3 x 2 pixels of 'noteheadFull', got runs of 5 pixels"),
        ([HEAD | {"Mask": "0:1 2:5"}], "runs such as"),
        ([HEAD | {"Top": "1.5"}], "ClassName, Top"),
        ([HEAD | {"Top": 5000 * "1"}], "ClassName, Top"),
        ([HEAD | {"Mask": f"0:{5000 * '1'}"}], "runs such as"),
        ([HEAD | {"Left": 10**9}], "a page of at most"),
        ([HEAD | {"Height": 10**9}], "a page of at most"),
        ([{"Top": 1, "Left": 1, "Width": 1, "Height": 1}], "ClassName, Top"),
    ):
        write_page(path, symbols)
        assert message in refused(path, lambda: read(path))
    write(path, path.read_bytes()[:-9])
    assert "XML" in refused(path, lambda: read(path))
    for encoding in ("foo", "utf-7"):
        write(path, f'<?xml version="1.0" encoding="{encoding}"?><Nodes/>'.encode())
        assert "XML" in refused(path, lambda: read(path))
    write(path, b"<Node>" * 20_000 + b"</Node>" * 20_000)
    assert "ClassName" in refused(path, lambda: read(path))
    refused(tmp_path, lambda: muscima.find_muscima(tmp_path))


def test_muscima_folder(tmp_path: Path) -> None:
    page = write_page(tmp_path / "a/CVC-MUSCIMA_W-07_N-10_D-ideal.xml", [HEAD])
    write_page(tmp_path / "classes.xml", [])
    assert muscima.find_muscima(tmp_path) == [(page,)]
    assert muscima.writer_of(page) == "W-07"


# LAS


@pytest.mark.parametrize("name", ["cloud.las", "cloud.laz"])
def test_las_cloud(tmp_path: Path, name: str) -> None:
    points = np.array([[0.1, 0.1, 0.1], [0.2, 0.2, 0.3], [1.2, 0.1, 10.1]])
    path = write_las(
        tmp_path / name,
        points + np.array([500_000, 4_000_000, 120]),
        np.array([2, 1, 6]),
        intensity=np.array([0, 65_534, 65_535]),
        return_number=np.array([1, 1, 2]),
        number_of_returns=np.array([1, 1, 5]),
    )
    scene = las.read_las(path, 0.5)
    assert scene.points.tolist() == [[0, 0, 0], [0, 0, 0], [2, 0, 20]]
    assert scene.values[0].tolist() == pytest.approx([0, 32_767 / 65_535, 0.2, 0.2])
    assert torch.equal(scene.values[0], scene.values[1])  # the means of their cell
    assert scene.values[2].tolist() == pytest.approx([0.99, 1, 0.4, 1], abs=1e-4)
    building = las.CLASSES.index("building")
    assert scene.labels.tolist() == [las.CLASSES.index("ground"), IGNORED, building]
    assert las.find_las(tmp_path) == [(path,)]


def test_las_refusals(tmp_path: Path) -> None:
    points = np.random.default_rng(0).random((50, 3))
    path = write_las(tmp_path / "a.las", points, np.full(50, 2))
    whole = path.read_bytes()
    own = write_las(tmp_path / "own.laz", points, np.full(50, 77))
    assert "[77]" in refused(own, lambda: las.read_las(own))
    assert las.read_las(own, classes={77: 3}).labels.tolist() == [3] * 50
    assert "no such file" in refused(tmp_path / "no.las", lambda: las.read_las(tmp_path / "no.las"))
    for wrong in (b"not of LAS", whole[:100], whole[:500], whole[:-300], own.read_bytes()[:-100]):
        write(path, wrong)
        refused(path, lambda: las.read_las(path))
    write_las(path, np.zeros((1, 3)), np.zeros(1))
    nothing = tmp_path / "nothing"
    refused(nothing, lambda: las.find_las(nothing))


# HDF5


def test_hits_of_several_events(tmp_path: Path) -> None:
    path = write_hits(
        tmp_path / "hits.h5",
        ("noise", "track"),
        x=np.array([0.0, 12, 5, 5]),
        y=np.array([0.0, 0, 25, 25]),
        z=np.array([0.0, 0, 0, 1]),
        event=np.array([8, 3, 8, 3]),
        label=np.array([0, 1, -1, 1]),
        energy=np.array([1.0, 2, 3, 4]),
        charge=np.array([1, 0, 1, 1]),
    )
    first, second = hdf5.read_hits(path, 10)
    assert first.points.tolist() == [[1, 0, 0], [0, 2, 0]]  # of event 3
    assert first.values.tolist() == [[0, 2], [1, 4]]  # charge, energy
    assert first.labels.tolist() == [1, 1]
    assert second.labels.tolist() == [0, IGNORED]
    assert hdf5.classes_of_files([path]) == ("noise", "track")
    assert hdf5.find_hits(tmp_path) == [(path,)]
    rows = hdf5.read_hits(path, (10, 5), fields=("x", "y"))[1]
    assert rows.points.tolist() == [[0, 0], [0, 5]]
    assert rows.values.shape == (2, 3)


def test_hits_without_values_have_ones(tmp_path: Path) -> None:
    columns = {name: np.arange(3.0) for name in "xyz"}
    zeros = np.zeros(3, np.int64)
    path = write_hits(tmp_path / "a.h5", ("a",), **columns, event=zeros, label=zeros)
    [scene] = hdf5.read_hits(path, 1)
    assert scene.values.tolist() == [[1]] * 3


def test_files_of_hits_are_alike(tmp_path: Path) -> None:
    columns = {name: np.arange(3) for name in ("x", "y", "z", "event", "label")}
    names = ("noise", "track", "other")
    alike = [write_hits(tmp_path / f"{i}.h5", names, **columns) for i in range(2)]
    assert hdf5.classes_of_files(alike) == names
    as_bytes = write_hits(tmp_path / "bytes.h5", np.array(names, "S"), **columns)
    assert hdf5.classes_of_files([*alike, as_bytes]) == names
    for wrong in (
        write_hits(tmp_path / "classes.h5", names[:2], **columns),
        write_hits(tmp_path / "columns.h5", names, **columns, charge=np.arange(3)),
    ):
        refused(wrong, lambda: hdf5.classes_of_files([*alike, wrong]))  # noqa: B023


def test_hits_refusals(tmp_path: Path) -> None:
    good = {name: np.arange(4.0) for name in "xyz"}
    good |= {"event": np.zeros(4, np.int64), "label": np.array([0, 1, 1, -1])}
    path, names = tmp_path / "hits.h5", ("noise", "track")

    def message(**changes: np.ndarray | None) -> str:
        columns = {name: column for name, column in (good | changes).items() if column is not None}
        write_hits(path, names if "label" in columns else None, **columns)
        return refused(path, lambda: hdf5.read_hits(path, 1.0))

    assert "no such file" in refused(path, lambda: hdf5.read_hits(path, 1.0))
    assert "column" in message(z=None)
    assert "'label'" in message(label=None)
    assert "'event'" in message(event=None)
    assert "4" in message(y=np.arange(3.0))
    assert "3" in message(label=np.array([0, 1, 1]))
    assert "[2, 5]" in message(label=np.array([0, 1, 2, 5]))
    largest = np.array([0, 1, 1, 2**64 - 1], np.uint64)
    assert f"labels from -1 to 1, got {2**64 - 1}" in message(label=largest)
    assert "float64" in message(label=np.zeros(4))
    assert "[4, 1]" in message(label=np.zeros((4, 1), np.int64))
    assert "[]" in message(label=np.array(1))
    message(event=np.zeros(4))
    message(x=np.full(4, np.nan))
    message(x=np.array([b"a"] * 4))
    write_hits(path, None, **good)
    assert "'classes'" in refused(path, lambda: hdf5.read_hits(path, 1.0))
    for wrong in ("noise", [3, 4], [], [["noise", "track"]]):
        write_hits(path, wrong, **good)
        assert "'classes'" in refused(path, lambda: hdf5.classes_of_files([path]))
    write(path, b"not of HDF5")
    assert "HDF5" in refused(path, lambda: hdf5.read_hits(path, 1.0))
    nothing = tmp_path / "nothing"
    refused(nothing, lambda: hdf5.find_hits(nothing))


def test_points_of_a_scene_are_taken_by_row() -> None:
    scene = RawScene(torch.eye(3), torch.arange(3.0)[:, None], torch.arange(3))
    assert scene.take(torch.tensor([2, 0])).labels.tolist() == [2, 0]
