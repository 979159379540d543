"""Hits in awkward arrays, ROOT files, HDF5 and Zarr, as pyramids and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vicinal import voxelize
from vicinal.interop import from_awkward, from_hdf5, from_zarr, to_awkward

COUNTS = [4, 0, 7, 1]


def columns() -> dict[str, Any]:
    n = sum(COUNTS)
    names = {name: torch.rand(n, dtype=torch.float64).numpy() for name in "xyze"}
    return {**names, "layer": np.arange(n, dtype=np.int32)}


def jagged(layout: str) -> Any:
    """Records of hits, or records of columns."""
    ak = pytest.importorskip("awkward")
    fields = {name: ak.unflatten(column, COUNTS) for name, column in columns().items()}
    return ak.zip(fields) if layout == "hits" else ak.Array(fields)


@pytest.mark.parametrize("layout", ["hits", "columns"])
def test_events_are_images(layout: str) -> None:
    ak = pytest.importorskip("awkward")
    events = jagged(layout)
    pyramid = from_awkward(events, features=("e", "layer"), cell_size=1e-4)
    assert pyramid.batch_size == 4
    assert pyramid.values.dtype == torch.float64
    back = to_awkward(pyramid)
    assert ak.num(back).tolist() == COUNTS
    assert back[..., 0].tolist() == events["e"].tolist()
    assert back[..., 1].tolist() == events["layer"].tolist()


def test_events_cut_out_of_others() -> None:
    ak = pytest.importorskip("awkward")
    events = jagged("hits")[::-1][:3]
    events = events[events["e"] > 0.2]
    pyramid = from_awkward(events, ("x", "y"), "e", cell_size=1e-4, bounds=[(0, 1), (0, 0.5)])
    expected = ak.where(events["y"] < 0.5, events["e"], 0)
    assert to_awkward(pyramid)[..., 0].tolist() == expected.tolist()


def test_events_without_hits() -> None:
    events = jagged("hits")[1:2]
    pyramid = from_awkward(events, cell_size=0.1)
    assert (pyramid.batch_size, len(pyramid)) == (1, 0)
    assert to_awkward(pyramid).tolist() == [[]]
    assert to_awkward(from_awkward(events[:0], cell_size=0.1)).tolist() == []


def test_clocks_in_nanoseconds_are_exact() -> None:
    ak = pytest.importorskip("awkward")
    start = 2**61 + 1
    events = ak.Array([[{"t": start}, {"t": start + 1}], [{"t": start + 4}]])
    pyramid = from_awkward(events, "t", cell_size=2, strides=1, pooling="sum")
    assert pyramid.coordinates[:, :2].tolist() == [[0, 0], [1, 2]]


def test_other_arrays_are_refused() -> None:
    ak = pytest.importorskip("awkward")
    events = jagged("columns")
    with pytest.raises(ValueError, match="events"):
        from_awkward(columns(), cell_size=1)
    with pytest.raises(ValueError, match="fields"):
        from_awkward(events, ("x", "time"), cell_size=1)
    with pytest.raises(ValueError, match="fields"):
        from_awkward(events, (), cell_size=1)
    with pytest.raises(ValueError, match="features"):
        from_awkward(events, features="charge", cell_size=1)
    with pytest.raises(ValueError, match="fields"):
        from_awkward(ak.Array({"x": np.zeros(3)}), "x", cell_size=1)
    with pytest.raises(ValueError, match="fields"):
        from_awkward(ak.Array({"x": [[1.0, None]]}), "x", cell_size=1)
    with pytest.raises(ValueError, match="fields"):
        from_awkward(ak.Array({"x": [[1.0], None]}), "x", cell_size=1)
    with pytest.raises(ValueError, match="fields"):
        from_awkward(ak.Array({"x": [["a"]]}), "x", cell_size=1)
    with pytest.raises(ValueError, match="fields"):
        from_awkward(ak.Array({"x": [["a", 1.0]]}), "x", cell_size=1)
    other = ak.Array({"x": [[1.0], [2.0, 3.0]], "y": [[1.0, 2.0], [3.0]]})
    with pytest.raises(ValueError, match="'y'"):
        from_awkward(other, ("x", "y"), cell_size=1)


def test_values_of_hits_in_any_order_of_events() -> None:
    pytest.importorskip("awkward")
    images = torch.tensor([1, 0, 1, 0])
    voxels = voxelize(torch.arange(4.0)[:, None], images, cell_size=1)
    pyramid = voxels.pyramid(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    assert to_awkward(pyramid).tolist() == [[[1], [3]], [[0], [2]]]


def test_a_file_of_root(tmp_path: Path) -> None:
    uproot = pytest.importorskip("uproot")
    ak = pytest.importorskip("awkward")
    events = jagged("columns")
    with uproot.recreate(tmp_path / "events.root") as file:
        file["hits"] = {name: events[name] for name in events.fields}
    with uproot.open(tmp_path / "events.root") as file:
        read = file["hits"].arrays(["x", "y", "z", "e"])
    pyramid = from_awkward(read, features="e", cell_size=1e-4)
    assert ak.almost_equal(to_awkward(pyramid)[..., 0], events["e"])


def group_of_hdf5(path: Path) -> Any:
    return pytest.importorskip("h5py").File(path / "hits.h5", "w")


def group_of_zarr(path: Path) -> Any:
    return pytest.importorskip("zarr").open_group(str(path / "hits.zarr"), mode="w")


@pytest.fixture(params=[(group_of_hdf5, from_hdf5), (group_of_zarr, from_zarr)])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Callable[..., Any]]:
    """A group of columns, and the function that reads it."""
    make, read = request.param
    group = make(tmp_path)
    for name, column in columns().items():
        group[name] = column
    group["event"] = np.repeat([90, 11, 50, 7], COUNTS).astype(np.uint64)
    group["starts"] = np.cumsum([0, *COUNTS])
    return group, read


def test_columns_with_offsets(table: tuple[Any, Callable[..., Any]]) -> None:
    group, read = table
    pyramid = read(group, features=("e", "layer"), offsets="starts", cell_size=1e-4)
    assert pyramid.batch_size == 4
    assert torch.bincount(pyramid.batch[pyramid.levels == 0], minlength=4).tolist() == COUNTS
    expected = np.stack((group["e"][:], group["layer"][:]), 1)
    np.testing.assert_array_equal(pyramid.values_of_points(0).numpy(), expected)


def test_columns_with_the_events_of_hits(table: tuple[Any, Callable[..., Any]]) -> None:
    group, read = table
    pyramid = read(group, ("x", "z"), "e", event="event", cell_size=1e-4)
    assert pyramid.batch_size == 3
    assert torch.bincount(pyramid.batch[pyramid.levels == 0]).tolist() == [1, 7, 4]
    np.testing.assert_array_equal(pyramid.values_of_points(0)[:, 0].numpy(), group["e"][:])


def test_columns_of_one_event_and_slices(table: tuple[Any, Callable[..., Any]]) -> None:
    group, read = table
    assert read(group, cell_size=1, strides=1, pooling="sum").values.tolist() == [[12]]
    columns = {name: group[name][2:5] for name in "xyz"}
    assert read(columns, cell_size=1, strides=1, pooling="sum").values.tolist() == [[3]]


def test_other_columns_are_refused(table: tuple[Any, Callable[..., Any]]) -> None:
    group, read = table
    group["short"] = np.zeros(3)
    group["wide"] = np.zeros((12, 2))
    for arguments in (
        {"fields": ("x", "time")},
        {"fields": ()},
        {"fields": 3},
        {"features": "charge"},
        {"features": ("e", 3)},
        {"event": "run"},
        {"offsets": "run"},
    ):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            read(group, cell_size=1, **arguments)
    for fields in (("x", "short"), ("x", "wide"), ("short", "x")):
        with pytest.raises(ValueError, match="fields"):
            read(group, fields, cell_size=1)
    for features in ("short", "wide"):
        with pytest.raises(ValueError, match="features"):
            read(group, features=features, cell_size=1)
    for event in ("short", "x"):
        with pytest.raises(ValueError, match="event"):
            read(group, event=event, cell_size=1)
    with pytest.raises(ValueError, match="offsets"):
        read(group, offsets="short", cell_size=1)
    with pytest.raises(ValueError, match="offsets"):
        read(group, event="event", offsets="starts", cell_size=1)


def test_a_compound_data_set(tmp_path: Path) -> None:
    group = group_of_hdf5(tmp_path)
    rows = np.zeros(5, [("x", "<f4"), ("t", ">i8"), ("event", "<i4")])
    rows["t"], rows["event"] = np.arange(5) + 2**52, [1, 0, 0, 1, 1]
    group["rows"] = rows
    pyramid = from_hdf5(group["rows"], ("x", "t"), event="event", cell_size=1, strides=1)
    assert pyramid.coordinates[:, :3].tolist() == [[0, 0, 1], [0, 0, 2]] + [
        [1, 0, time] for time in (0, 3, 4)
    ]


def test_integers_beside_half_precisions_become_float32() -> None:
    adc, weight = np.array([65535, 3000], np.uint16), np.array([1, 2], np.float16)
    table = {"x": [1, 2], "adc": adc, "w": weight}
    pyramid = from_hdf5(table, "x", ("adc", "w"), cell_size=1, strides=1, pooling="max")
    assert pyramid.values.tolist() == [[65535, 1], [3000, 2]]


def test_gradients_reach_columns_of_tensors() -> None:
    energy = torch.rand(6, requires_grad=True)
    table = {"x": torch.rand(6), "e": energy, "layer": torch.arange(6)}
    pyramid = from_hdf5(table, "x", ("layer", "e"), cell_size=0.5, pooling="sum")
    pyramid.values.sum().backward()
    assert energy.grad is not None
    assert energy.grad.tolist() == [4.0] * 6
