"""Folders of files as scenes to train on: what is held out, what is read, and the command."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_lines import call, refused
from format_files import (
    Array,
    write,
    write_hits,
    write_las,
    write_nmnist,
    write_page,
    write_scan,
    write_sweeps,
)
from test_labels import small

from examples import label_points
from examples.formats.kitti import CLASSES
from examples.formats.raw import IGNORED, FormatError, RawScene, find_files
from examples.labels.evaluation import confusion, quality
from examples.labels.files import (
    Format,
    HeldOutFiles,
    Reader,
    Source,
    TrainingFiles,
    cut,
    split_sources,
    to_cells,
)
from examples.labels.model import PointLabeler
from examples.labels.picture import COLORS
from examples.labels.scenes import LabeledPoints
from examples.labels.tasks import TASKS, Data, Options, Task
from examples.training.checkpoints import STATE, read_metadata
from examples.training.command import FIGURES


def sources_of(*names: str) -> list[Source]:
    return [(Path(name),) for name in sorted(names)]


def names_of(sources: list[Source]) -> list[str]:
    return [str(source[0]) for source in sources]


def numbered(source: Source, cell_size: float) -> list[RawScene]:
    """As many scenes as the name says, whose values are that number."""
    n = int(source[0].name)
    points = torch.arange(8.0)[:, None].expand(8, 2) * cell_size
    return [RawScene(points, torch.full((8, 1), float(n)), torch.full((8,), i)) for i in range(n)]


def of_group(*test_groups: str) -> Format:
    """Files that belong to their folder."""
    return Format(lambda _: [], numbered, lambda path, _: path.parent.name, test_groups)


def split(sources: list[Source], of: Format) -> tuple[list[str], list[str]]:
    """The names of the files for training and for the test."""
    for_training, for_test = split_sources(sources, of, Path())
    return names_of(for_training), names_of(for_test)


def test_the_groups_for_the_test_are_those_of_the_data_set() -> None:
    sources = sources_of("07/a", "07/b", "08/a", "09/a")
    assert split(sources, of_group("08")) == (["07/a", "07/b", "09/a"], ["08/a"])
    last = split(sources_of("07/a", "09/a", "09/b"), of_group("08"))[1]
    assert last == ["09/a", "09/b"]  # the last group
    # Of a single group, the last fifth of its files, even if it is a group for the test.
    files = [f"08/{number}" for number in range(9)]
    assert split(sources_of(*files), of_group("08"))[1] == ["08/8"]
    digits = sources_of("Train/1/1", "Train/1/2", "Train/2/1", "Train/2/3", "Train/2/4")
    one_part = of_group()._replace(group=lambda path, _: path.parts[0])
    assert split(digits, one_part)[1] == ["Train/2/4"]
    many = sources_of(*(f"{group:02}/a" for group in range(11)))
    assert split(many, of_group())[1] == ["09/a", "10/a"]
    with pytest.raises(FormatError, match="08/a: expected at least two files"):
        split(sources_of("08/a"), of_group())
    pairs = [f"08/{name}.{suffix}" for name in "abc" for suffix in ("las", "laz")]
    assert split(sources_of(*pairs), of_group())[1] == pairs[-2:]
    with pytest.raises(FormatError, match="got files that differ in suffix alone"):
        split(sources_of(*pairs[:2]), of_group())


def test_every_epoch_has_all_files_in_another_order() -> None:
    sources = sources_of("1", "2", "3", "4", "5")
    files = TrainingFiles(sources, Reader(of_group(), 1.0), seed=3)
    values = [int(files.place(number)[0][0].name) for number in range(15)]
    epochs = [values[:5], values[5:10], values[10:]]
    assert all(sorted(epoch) == [1, 2, 3, 4, 5] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    again = TrainingFiles(sources, Reader(of_group(), 1.0), seed=3)
    assert again.place(11) == files.place(11)
    places = map(files.place, range(100))
    assert len({number for source, number in places if source[0].name == "5"}) > 2
    assert set(files.batch([11]).labels.tolist()) == {files.place(11)[1]}


def test_the_test_takes_files_and_scenes_evenly() -> None:
    sources, reader = sources_of("1", "2", "3", "4", "5"), Reader(of_group(), 1.0)
    every = HeldOutFiles.of(sources, reader, most=99)
    assert len(every.places) == len(set(every.places)) == 15
    some = HeldOutFiles.of(sources, reader, most=3).places
    assert [(source[0].name, place) for source, place in some] == [("1", 0), ("2", 0), ("4", 0)]
    batch = every.batch([1, 2])
    assert batch.values[:, 0].tolist() == [2] * 16
    assert batch.labels.tolist() == [0] * 8 + [1] * 8


def test_files_are_read_once_while_they_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Source] = []

    def counted(source: Source, cell_size: float) -> list[RawScene]:
        read.append(source)
        return numbered(source, cell_size)

    reader = Reader(of_group()._replace(read=counted), 1.0)
    two, three, nine = sources_of("2", "3", "9")
    for source in (two, three, two, three):
        assert len(reader(source)) == int(source[0].name)
    assert names_of(read) == ["2", "3"]
    monkeypatch.setattr("examples.labels.files.REMEMBERED", 8 * (2 + 9))
    reader(two)  # the last one used stays
    reader(nine)
    for source in (two, nine, three):
        reader(source)
    assert names_of(read) == ["2", "3", "9", "3"]


def test_large_scenes_are_cut_across_their_longest_axis() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(100, 2, generator=generator) * torch.tensor([1.0, 9.0])
    scene = RawScene(points, torch.arange(100.0)[:, None], torch.arange(100))
    assert cut(scene, 100) == [scene]
    pieces = cut(scene, 30)
    assert [len(piece.labels) for piece in pieces] == [25] * 4
    assert torch.cat([piece.labels for piece in pieces]).sort().values.tolist() == list(range(100))
    ends = [piece.points[:, 1].max() for piece in pieces[:-1]]
    starts = [piece.points[:, 1].min() for piece in pieces[1:]]
    assert all(end <= start for end, start in zip(ends, starts, strict=True))


def test_cells_of_raw_points_and_where_in_them_a_point_is() -> None:
    points = torch.tensor([[10.0, 5.0], [10.5, 5.25], [11.0, 5.5]])
    scene = RawScene(points, torch.ones(3, 1), torch.zeros(3, dtype=torch.int64))
    cells, values, _ = to_cells(scene, 0.5)
    assert cells.tolist() == [[0, 0], [1, 0], [2, 1]]
    assert values.tolist() == [[1, -0.5, -0.5], [1, -0.5, 0], [1, -0.5, -0.5]]
    far = scene._replace(points=points.double() + 5_000_000.25)  # float32 knows only halves there
    assert torch.equal(to_cells(far, 0.5)[1], values)
    cells, values, _ = to_cells(scene._replace(points=torch.tensor([[7, 7], [5, 9], [6, 8]])), 0.5)
    assert cells.tolist() == [[2, 0], [0, 2], [1, 1]]
    assert values.shape == (3, 1)


def reader_of(*last_cells: list[int]) -> tuple[Reader, list[tuple[Source, int]]]:
    """A reader of scenes of two cells, the second given, and their places."""
    sources = sources_of(*map(str, range(len(last_cells))))
    scenes = {
        source: [RawScene(torch.tensor([[0, 0], cell]), torch.ones(2, 1), torch.zeros(2).long())]
        for source, cell in zip(sources, last_cells, strict=True)
    }
    reader = Reader(of_group()._replace(read=lambda source, _: scenes[source]), 1.0)
    return reader, [(source, 0) for source in sources]


def test_grids_hold_all_scenes_of_a_batch_in_whole_coarse_cells() -> None:
    reader, places = reader_of([3, 40], [31, 32])
    batch = reader.batch(places)
    assert batch.spatial_shape == (32, 64)
    assert batch.batch_size == 2
    assert batch.to("cpu").spatial_shape == (32, 64)
    for name, task in TASKS.items():
        strides = task.net["strides"]
        assert all(32 % s == 0 for stride in strides for s in np.atleast_1d(stride)), name


def test_a_grid_that_is_too_large_is_refused_with_the_file() -> None:
    reader, places = reader_of([7, 2**59], [7, 2**50], [2**51, 7], [3, 3])
    with pytest.raises(FormatError, match=r"^0: expected points .* --cell-size sets, got 32 x "):
        reader(places[0][0])
    assert reader.batch([places[1], places[3]]).batch_size == 2
    with pytest.raises(FormatError, match=r"^2: expected .* for each of 2 scenes$"):
        reader.batch(places[1:3])


def test_points_without_a_label_count_for_neither_loss_nor_quality() -> None:
    torch.manual_seed(0)
    cells = torch.nn.functional.pad(torch.randint(0, 32, (40, 2)), (1, 0))
    labels = torch.randint(0, 11, (40,))
    labels[::2] = IGNORED
    batch = LabeledPoints(cells, torch.rand(40, 1), labels, 1, (32, 32))
    model = PointLabeler(small("digits")).eval()
    logits = model.logits(batch)
    known = labels != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[known], labels[known])
    torch.testing.assert_close(model(batch)["labels"], expected)
    counts = confusion(labels, logits.argmax(1), 11)
    assert counts.sum() == 20
    assert quality(counts).accuracy == pytest.approx(
        float((logits.argmax(1) == labels)[known].double().mean())
    )
    (loss,) = model(batch._replace(labels=torch.full((40,), IGNORED))).values()
    assert loss == 0


# Folders in each format


def write_kitti(folder: Path) -> None:
    """Scans whose ground is road and has boxes on it; every fifth point has no label."""
    for sequence in ("00", "08"):
        for name in range(2):
            rng = np.random.default_rng(name)
            records = rng.random((300, 4)) * [8, 8, 0.1, 1]
            cars = records[:, 0] % 4 < 2
            records[cars, 2] += 1.5
            codes = np.where(cars, 10, 40)
            codes[::5] = 0
            write_scan(folder / "sequences" / sequence, f"{name:06}", records, codes)


def write_drives(folder: Path) -> None:
    rng = np.random.default_rng(0)
    drives = [f"n0{drive}__LIDAR_TOP__{time}" for drive in (1, 2) for time in (1, 2)]
    lasers = np.arange(100)[:, None] % 32
    sweeps = {
        name: (np.hstack((9 * rng.random((100, 4)), lasers)), rng.integers(0, 31, 100))
        for name in drives
    }
    write_sweeps(folder, sweeps)


def write_recordings(folder: Path) -> None:
    for part in ("Train", "Test"):
        for digit in (3, 7):
            events = [(digit + t % 5, 2 * digit, t % 2, 900 * t) for t in range(60)]
            write_nmnist(folder / part / str(digit) / "00001.bin", events)


def write_pages(folder: Path) -> None:
    box = {"Top": 3, "Width": 20, "Height": 5}
    for writer in (1, 2):
        symbols = [
            {"ClassName": "beam", "Left": 0, **box},
            {"ClassName": "gClef", "Left": 30, **box},
        ]
        write_page(folder / f"CVC-MUSCIMA_W-0{writer}_N-01_D-ideal.xml", symbols)


def write_clouds(folder: Path) -> None:
    for name in ("a.las", "b.laz"):
        points = np.random.default_rng(0).random((200, 3)) * 9
        write_las(folder / name, points, np.where(points[:, 2] > 4, 6, 2))


def write_events_of_hits(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.h5", "b.hdf5"):
        columns: dict[str, Array] = {axis: rng.random(200) * 300 for axis in "xyz"}
        event, label = rng.integers(0, 3, 200), (columns["x"] > 150).astype(np.int64)
        columns["energy"] = label + 0.1
        write_hits(folder / name, ("noise", "track"), **columns, event=event, label=label)


WRITERS = {
    "kitti": write_kitti,
    "nuscenes": write_drives,
    "las": write_clouds,
    "hdf5": write_events_of_hits,
    "events": write_recordings,
    "muscima": write_pages,
}


def opened(data: str, folder: Path, cell_size: float | None = None) -> Data:
    task: Task = small(data)
    return task.open(task, Options(seed=0, folder=folder, cell_size=cell_size or task.cell_size))


def parts_of(data: str, folder: Path) -> dict[str, str]:
    """What is said of the files for training and for the test."""
    files = opened(data, folder).task.files
    assert files is not None
    return files.describe(folder)


@pytest.mark.parametrize(
    ("data", "n_tests", "n_channels"),
    [
        *[("kitti", 2, 6), ("nuscenes", 2, 7), ("las", 1, 4)],
        *[("hdf5", 3, 1), ("events", 2, 2), ("muscima", 1, 3)],
    ],
)
def test_a_folder_becomes_scenes_that_a_net_labels(
    tmp_path: Path, data: str, n_tests: int, n_channels: int
) -> None:
    WRITERS[data](tmp_path)
    task, for_training, for_test = opened(data, tmp_path)
    assert (task.n_tests, task.channels) == (n_tests, n_channels)
    if data == "hdf5":
        assert task.classes == ("noise", "track")
    model = PointLabeler(task)
    (loss,) = model(for_training(range(1)).to("cpu")).values()
    loss.backward()
    assert loss.isfinite()
    batch = for_test(range(task.n_drawn))
    predicted = model.predict(batch)
    assert predicted.shape == batch.labels.shape
    panel = task.draw(batch, predicted, 0)
    assert len(panel.x) == int((batch.labels[batch.coordinates[:, 0] == 0] != IGNORED).sum())


@pytest.mark.parametrize("data", WRITERS)
def test_links_are_followed(tmp_path: Path, data: str) -> None:
    disk, folder = tmp_path / "disk", tmp_path / "data"
    WRITERS[data](disk)
    folder.mkdir()
    for path in disk.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "zz").symlink_to(folder)
    assert parts_of(data, folder) == parts_of(data, disk)


def test_loops_of_links_end_and_every_file_is_found_once(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a/1.x", b""), write(tmp_path / "b/2.x", b"")
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    (tmp_path / "a/again.x").symlink_to(first)
    (tmp_path / "a/itself").symlink_to(tmp_path / "a/itself")
    found = find_files(tmp_path, "files *.x", lambda path: path.suffix == ".x")
    assert found == [first, tmp_path / "a/to_b/2.x"]
    assert found[1].samefile(second)
    (tmp_path / "broken.x").symlink_to(tmp_path / "none")
    assert tmp_path / "broken.x" in find_files(tmp_path, "files", lambda path: True)


@pytest.mark.parametrize("data", WRITERS)
def test_suffixes_in_upper_case_are_found(tmp_path: Path, data: str) -> None:
    WRITERS[data](tmp_path)
    before = parts_of(data, tmp_path)
    for path in [path for path in tmp_path.rglob("*.*") if path.is_file()]:
        if data != "nuscenes":  # whose tables name the files
            path.rename(path.with_suffix(path.suffix.upper()))
    after = parts_of(data, tmp_path)
    assert [text.split()[0] for text in after.values()] == [
        text.split()[0] for text in before.values()
    ]


def test_the_parts_of_nmnist_in_lower_case(tmp_path: Path) -> None:
    write_recordings(tmp_path / "test")  # this folder says nothing
    for part in ("Train", "Test"):
        below = tmp_path / "test" / part.lower() / "session"
        below.mkdir(parents=True)
        shutil.move(tmp_path / "test" / part / "3", below)
        shutil.rmtree(tmp_path / "test" / part)
    files = opened("events", tmp_path / "test").task.files
    assert files is not None
    (training,), (test,) = files
    assert (training[0].parts[-4], test[0].parts[-4]) == ("train", "test")


def test_a_tile_in_both_forms_is_not_in_both_parts(tmp_path: Path) -> None:
    write_clouds(tmp_path)
    write_las(tmp_path / "b.las", np.ones((9, 3)), np.full(9, 2))
    files = opened("las", tmp_path).task.files
    assert files is not None
    assert [names_of(part) for part in files] == [
        [str(tmp_path / "a.las")],
        [str(tmp_path / "b.las"), str(tmp_path / "b.laz")],
    ]


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        *[(data, (1e-8, 1e-20)) for data in WRITERS if data != "events"],
        ("events", (2.5e-14, 1e-20)),  # along time alone
    ],
)
def test_cells_that_are_too_small_are_refused(
    tmp_path: Path, data: str, sizes: tuple[float, ...]
) -> None:
    WRITERS[data](tmp_path)
    for size in sizes:
        expected = rf"^{re.escape(str(tmp_path))}/.*: expected .*cells.*--cell-size"
        with pytest.raises(FormatError, match=expected):
            opened(data, tmp_path, size)


def test_training_on_scans_learns_to_label_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(TASKS, "kitti", small("kitti"))
    folder, out = tmp_path / "data", tmp_path / "out"
    write_kitti(folder)
    options = ("--data", "kitti", folder, "--out", out, "--cell-size", 0.5)
    assert call(monkeypatch, label_points, *options, "--steps", 12) == 0
    figures = json.loads((out / FIGURES).read_text())
    assert figures["accuracy"] > 0.9  # nearly half of the points are cars
    names = [name for name, iou in zip(CLASSES, figures["ious"], strict=True) if iou]
    assert names == ["car", "road"]
    assert None in figures["ious"]  # of classes that occur nowhere
    assert (figures["folder"], figures["cell_size"]) == (str(folder), 0.5)
    assert "hits" not in figures
    assert read_metadata(out)["cell_size"] == "0.5"
    printed = capsys.readouterr().out
    assert "On 2 test scans" in printed
    assert "Files: 2 for training, 2 for the test." in printed
    again = ("--steps", 12, "--resume")
    message = refused(monkeypatch, capsys, label_points, *options, *again, "--cell-size", 0.25)
    assert "argument --cell-size: expected 0.5" in message
    other = ("--data", "kitti", tmp_path, *options[3:])
    message = refused(monkeypatch, capsys, label_points, *other, *again)
    expected = f"argument FOLDER: expected {folder}, as the run in {out}, got {tmp_path}"
    assert expected in " ".join(message.split())


def test_a_run_resumes_with_the_same_files_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(TASKS, "kitti", small("kitti"))
    folder = tmp_path / "data"
    write_kitti(folder)
    options = ("--data", "kitti", folder, "--out", tmp_path / "out", "--steps", 1)
    assert call(monkeypatch, label_points, *options) == 0
    assert call(monkeypatch, label_points, *options, "--resume") == 0
    scan = folder / "sequences/00/velodyne/000001.bin"
    shutil.move(scan, scan.with_name("000002.bin"))
    labels = folder / "sequences/00/labels/000001.label"
    shutil.move(labels, labels.with_name("000002.label"))
    capsys.readouterr()
    assert call(monkeypatch, label_points, *options, "--resume") == 1
    printed = capsys.readouterr().out
    assert "Stopped: training_files: expected 2 files whose" in printed
    assert "test_files" not in printed


@pytest.mark.parametrize("sequence", ["00", "08"])  # for training, for the test
def test_a_stray_point_stops_the_command_before_training(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    sequence: str,
) -> None:
    monkeypatch.setitem(TASKS, "kitti", small("kitti"))
    folder = tmp_path / "data"
    write_kitti(folder)
    for name in range(2):
        records = np.vstack((np.ones((20, 4)), np.full((1, 4), 1e7)))
        scan, _ = write_scan(
            folder / "sequences" / sequence, f"{name:06}", records, np.full(21, 40)
        )
    options = ("--data", "kitti", folder, "--out", tmp_path / "out", "--steps", 2)
    assert call(monkeypatch, label_points, *options) == 1
    printed = capsys.readouterr().out
    assert re.search(rf"Stopped: {scan.parent}/00000[01].bin: expected .* 2\^60 cells", printed)
    assert "--cell-size" in printed
    assert not (tmp_path / "out" / STATE).exists()


def test_an_error_in_the_test_stops_the_command_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("values: expected numbers, got none")

    monkeypatch.setitem(TASKS, "kitti", small("kitti"))
    monkeypatch.setattr(PointLabeler, "predict", fail)
    write_kitti(tmp_path / "data")
    options = ("--data", "kitti", tmp_path / "data", "--out", tmp_path / "out", "--steps", 1)
    assert call(monkeypatch, label_points, *options) == 1
    assert "Stopped: test scans 1 to 1: values: expected numbers" in capsys.readouterr().out


def test_scenes_without_labels_for_the_test_are_said_to_have_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(TASKS, "kitti", small("kitti"))
    folder = tmp_path / "data"
    write_kitti(folder)
    for labels in (folder / "sequences/08/labels").iterdir():
        write(labels, bytes(labels.stat().st_size))  # class 0, unlabeled
    options = ("--data", "kitti", folder, "--out", tmp_path / "out", "--cell-size", 0.5)
    assert call(monkeypatch, label_points, *options, "--steps", 2) == 0
    printed = capsys.readouterr().out
    assert "None of the points of 2 test scans has a label." in printed
    assert "0 of 0 labeled points of one scene" in printed
    assert "nan" not in printed


def test_the_command_stops_at_a_wrong_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(TASKS, "kitti", small("kitti"))
    options = ("--data", "kitti", tmp_path / "data", "--out", tmp_path / "out")
    assert call(monkeypatch, label_points, *options) == 1
    assert f"Stopped: {tmp_path / 'data'}: expected scans" in capsys.readouterr().out
    write_kitti(tmp_path / "data")
    for sequence in ("00", "08"):  # for training, for the test
        wrong = tmp_path / "data/sequences" / sequence / "labels/000001.label"
        before = wrong.read_bytes()
        write(wrong, b"1234")
        assert call(monkeypatch, label_points, *options, "--steps", 2) == 1
        assert f"Stopped: {wrong}: expected labels among" in capsys.readouterr().out
        write(wrong, before)


def test_every_class_has_a_color_of_its_own() -> None:
    assert len(set(COLORS)) >= max(len(task.classes) for task in TASKS.values())


def test_packages_of_a_format_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "laspy" or None)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, label_points, "--data", "las", tmp_path)
    assert stopped.value.code == 1
    assert "needs laspy: pip install vicinal[demo,interop]" in capsys.readouterr().err


def test_arguments_of_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for message, options in (
        ("FOLDER", ("--data", "kitti")),
        ("argument --cell-size", ("--data", "kitti", tmp_path, "--cell-size", "0")),
        ("argument --cell-size", ("--data", "kitti", tmp_path, "--cell-size", "nan")),
        ("argument --cell-size", ("--data", "kitti", tmp_path, "--cell-size", "small")),
        ("unrecognized arguments", ("--data", "digits", tmp_path)),
        ("unrecognized arguments", ("--data", "hits", "--cell-size", "1")),
        ("unrecognized arguments", ("--data", "kitti", tmp_path, "--hits", "9")),
    ):
        assert message in refused(monkeypatch, capsys, label_points, *options)
