"""Events of event cameras, as pyramids."""

import io
from typing import Any

import numpy as np
import pytest
import torch

from vicinal.interop import from_events

TONIC = np.dtype([("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")])


def recording(n: int = 200, width: int = 34, height: int = 20, end: int = 9000) -> Any:
    events = np.zeros(n, TONIC)
    for name, high in (("x", width), ("y", height), ("t", end), ("p", 2)):
        events[name] = torch.randint(high, (n,)).numpy()
    return events[np.argsort(events["t"], kind="stable")]


def test_events_are_counted_by_polarity() -> None:
    events = recording()
    pyramid = from_events(
        events, cell_size=1000, sensor_size=(34, 20, 2), strides=(1, 2), pooling="sum"
    )
    assert pyramid.level_shapes[0] == (20, 34, 10)  # the next multiple of two
    counts = np.zeros((20, 34, 10, 2))
    time = (events["t"] - events["t"].min()) // 1000
    np.add.at(counts, (events["y"], events["x"], time, events["p"].astype(int)), 1)
    finest = pyramid.levels == 0
    dense = torch.zeros(20, 34, 10, 2)
    dense[tuple(pyramid.cells[finest].t())] = pyramid.values[finest]
    np.testing.assert_array_equal(dense.numpy(), counts)


def test_values_of_points_have_the_order_of_the_events() -> None:
    events = np.concatenate([recording(50), recording(50)])
    pyramid = from_events(events, cell_size=1, sensor_size=(34, 20), pooling="max", strides=1)
    on = pyramid.values_of_points(0)[np.arange(100), events["p"].astype(int)]
    assert on.tolist() == [1.0] * 100


@pytest.mark.parametrize("number", [np.float32, np.array, torch.tensor])
def test_one_number_is_the_length_of_a_cell(number: Any) -> None:
    events = {"x": [3, 40], "y": [5, 6], "t": [100, 5000], "p": [1, 0]}
    pyramid = from_events(events, cell_size=number(1000), strides=1)
    assert pyramid.cell_size == (1, 1, 1000)
    assert pyramid.cells.tolist() == [[0, 0, 0], [1, 37, 4]]


def test_recordings_may_differ_in_the_dtypes_of_integers() -> None:
    first = {name: np.array([3], np.int32) for name in "xytp"}
    second = {**first, "t": np.array([4])}
    assert from_events([first, second], cell_size=1, strides=1).cells[:, 2].tolist() == [0, 1]


@pytest.mark.parametrize("signs", [[True, False], [1, 0], [1, -1], [1.0, -1.0]])
def test_polarities_of_all_kinds(signs: list[float]) -> None:
    events = {"x": [0, 0], "y": [0, 0], "t": [0, 0], "p": np.array(signs)}
    pyramid = from_events(events, cell_size=1, strides=1)
    assert pyramid.values.tolist() == [[0.5, 0.5]]
    events["p"] = np.array(signs[:1] * 2)
    assert from_events(events, cell_size=1, strides=1).values.tolist() == [[0, 1]]


def test_nanoseconds_since_1970_are_exact() -> None:
    start = 1_790_000_000_000_000_001
    events = {name: np.zeros(3, np.uint16) for name in "xy"}
    events["t"] = np.array([start, start + 1, start + 2], np.uint64)
    pyramid = from_events(events, cell_size=2, polarity=None, pooling="sum", strides=1)
    assert pyramid.values.tolist() == [[2], [1]]
    assert pyramid.origin == (0, 0, start)


def test_large_clocks_beside_floating_pixels_are_refused() -> None:
    events = {"x": np.zeros(1), "y": np.zeros(1), "t": np.array([2**60 + 1])}
    with pytest.raises(ValueError, match="fields"):
        from_events(events, cell_size=2, polarity=None)
    events["t"] -= 2**60
    assert len(from_events(events, cell_size=2, polarity=None, strides=1)) == 1


def test_batches_have_one_grid() -> None:
    recordings = [recording(100), recording(0), recording(30)]
    pyramid = from_events(
        recordings, cell_size=(2, 2, 500), sensor_size=(34, 20), bounds=[None, None, (0, 5000)]
    )
    assert pyramid.batch_size == 3
    assert pyramid.level_shapes[0] == (16, 24, 16)
    times = np.concatenate([events["t"] for events in recordings])
    assert pyramid.point_rows is not None
    assert torch.equal(pyramid.point_rows[:, 0] < 0, torch.from_numpy(times >= 5000))


def test_bounds_come_before_the_sensor() -> None:
    events = recording()
    bounds = [(10, 20), None, None]
    pyramid = from_events(events, cell_size=1000, sensor_size=(34, 20), bounds=bounds, strides=1)
    assert pyramid.level_shapes[0][:2] == (10, 34)
    assert pyramid.origin is not None
    assert pyramid.origin[:2] == (10, 0)


def test_events_outside_the_sensor_have_no_cell() -> None:
    events = recording()
    pyramid = from_events(events, cell_size=1000, sensor_size=(10, 20))
    assert pyramid.point_rows is not None
    assert torch.equal(pyramid.point_rows[:, 0] < 0, torch.from_numpy(events["x"] >= 10))


def test_columns_of_other_names_and_of_a_csv_file() -> None:
    text = "time,col,row,sign\n10,1,2,1\n20,3,4,-1\n"
    events = np.genfromtxt(io.StringIO(text), delimiter=",", names=True, dtype=None)
    pyramid = from_events(
        events, cell_size=5, fields=("row", "col", "time"), polarity="sign", strides=1
    )
    assert pyramid.cells.tolist() == [[0, 0, 0], [2, 2, 2]]
    assert pyramid.values.tolist() == [[0, 1], [1, 0]]


def test_columns_of_tensors() -> None:
    events = recording()
    columns = {name: torch.from_numpy(events[name].copy()) for name in TONIC.names or ()}
    one, other = (from_events(given, cell_size=100) for given in (events, columns))
    assert torch.equal(one.coordinates, other.coordinates)
    assert torch.equal(one.values, other.values)


def test_no_events() -> None:
    pyramid = from_events(recording(0), cell_size=100, sensor_size=(34, 20))
    assert (len(pyramid), pyramid.embed_dim, pyramid.batch_size) == (0, 2, 1)
    assert pyramid.values_of_points(0).shape == (0, 2)


def test_one_event() -> None:
    """Its columns, of 13 bytes between entries, count as contiguous."""
    event = np.array([(3, 5, 100, 1)], TONIC)
    pyramid = from_events(event, cell_size=100, sensor_size=(34, 20), strides=(1,))
    assert pyramid.coordinates.tolist() == [[0, 5, 3, 0, 0]]
    assert pyramid.values.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("fields", ("y", "x", "time")),
        ("fields", ("y", "x")),
        ("fields", "yxt"),
        ("fields", 3),
        ("polarity", "sign"),
        ("polarity", ("p", "p")),
        ("sensor_size", (34,)),
        ("sensor_size", 34),
        ("sensor_size", (0, 3)),
        ("cell_size", (1, 1000)),
        ("cell_size", 0),
        ("bounds", [(0, 10)]),
        ("bounds", 5),
    ],
)
def test_other_arguments_are_refused(argument: str, value: Any) -> None:
    arguments = {"cell_size": 1000, "sensor_size": (34, 20), argument: value}
    with pytest.raises(ValueError, match=argument):
        from_events(recording(), **arguments)


@pytest.mark.parametrize("events", [np.zeros((4, 4)), None, [], {"x": np.zeros(3)}])
def test_other_events_are_refused(events: Any) -> None:
    with pytest.raises(ValueError, match=r"events|fields"):
        from_events(events, cell_size=1)


def test_columns_of_other_lengths_are_refused() -> None:
    events = {"x": np.zeros(3), "y": np.zeros(3), "t": np.zeros(2), "p": np.zeros(3)}
    with pytest.raises(ValueError, match="fields 't'"):
        from_events(events, cell_size=1)
    events.update(t=np.zeros(3), p=np.zeros(2))
    with pytest.raises(ValueError, match="polarity"):
        from_events(events, cell_size=1)
