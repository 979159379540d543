"""Raw points to cells, and values, positions and boxes back to raw points."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vicinal import (
    FeaturePyramid,
    SparseNeighborhoodAttentionBlock,
    Voxels,
    collate_pyramids,
    voxelize,
)

UTM = torch.tensor([[500_000.3, 5_000_000.7], [500_012.9, 5_000_003.1]], dtype=torch.float64)
CLOCK = 1_700_000_000_000_000  # microseconds


def assert_near(values: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-8)


def cloud(n: int = 60, dim: int = 2, scale: float = 20.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.rand(n, dim, generator=generator, dtype=torch.float64)


# ------------------------------------------------------------------------------------ cells


@given(
    st.lists(st.integers(-3200, 3200).map(lambda k: k / 64), min_size=1, max_size=20),
    st.sampled_from([0.25, 0.5, 1.0, 3.0]),
    st.sampled_from([(-10.0, 5.0), (0.0, 12.0), (-3.5, 40.5), None]),
)
def test_cells_are_those_of_exact_arithmetic(
    raw: list[float], size: float, span: tuple[float, float] | None
) -> None:
    points = torch.tensor(raw)[:, None]
    voxels = voxelize(points, cell_size=size, bounds=None if span is None else [span])
    low, high = (min(raw), math.inf) if span is None else span
    cells = [math.floor((Fraction(x) - Fraction(low)) / Fraction(size)) for x in raw]
    inside = [low <= x < high for x in raw]
    expected = list(itertools.compress(cells, inside))
    assert voxels.coordinates.tolist() == [[0, cell] for cell in expected]
    rows = itertools.count()
    assert voxels.rows.tolist() == [next(rows) if kept else -1 for kept in inside]
    n_cells = max(cells) + 1 if span is None else math.ceil((high - low) / size)
    assert voxels.spatial_shape == (n_cells,)
    assert voxels.origin == (low,)


def test_found_bounds_hold_all_points() -> None:
    points = cloud(200, 3)
    voxels = voxelize(points, cell_size=(0.1, 0.7, 3.0))
    assert (voxels.rows == torch.arange(200)).all()
    assert voxels.origin == tuple(points.amin(0).tolist())
    cells = voxels.coordinates[:, 1:]
    assert (cells.amin(0) == 0).all()
    assert voxels.spatial_shape == tuple((cells.amax(0) + 1).tolist())


def test_a_point_at_the_upper_bound_is_outside_and_one_at_the_lower_inside() -> None:
    points = torch.tensor([[1.0], [math.nextafter(3.0, 0.0)], [3.0]], dtype=torch.float64)
    voxels = voxelize(points, cell_size=0.1, bounds=[(1, 3)])
    assert voxels.spatial_shape == (20,)
    assert voxels.coordinates.tolist() == [[0, 0], [0, 19]]
    assert voxels.rows.tolist() == [0, 1, -1]


def test_rounding_adds_no_cell_to_given_bounds() -> None:
    point = torch.tensor([[0.05]], dtype=torch.float64)
    for n, size in itertools.product(range(1, 200), (0.1, 0.3, 0.7, 1 / 3)):
        voxels = voxelize(point * size, cell_size=size, bounds=[(0.0, n * size)])
        assert voxels.spatial_shape == (n,)
    assert voxelize(point, cell_size=0.1, bounds=[(0, 1.05)]).spatial_shape == (11,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_microsecond_clocks_are_exact(dtype: torch.dtype) -> None:
    ticks = torch.tensor([0, 9, 10, 11, 4_999, 12_345_678])
    points = (ticks + CLOCK).to(dtype)[:, None]
    voxels = voxelize(points, cell_size=10)
    assert voxels.coordinates[:, 1].tolist() == (ticks // 10).tolist()
    assert voxels.origin == (float(CLOCK),)
    pyramid = voxels.pyramid(torch.randn(6, 2), strides=1)
    back = pyramid.positions_from_raw(points).floor().long().flatten()
    assert torch.equal(back, ticks // 10)


def test_nanosecond_clocks_are_exact_as_integers() -> None:
    ticks = torch.tensor([3, 4, 5, 1_003, 1_000_003])
    start = 1_700_000_000_000_000_123  # no float64
    voxels = voxelize((ticks + start)[:, None], cell_size=1)
    steps = voxels.coordinates[:, 1].diff()
    assert steps.tolist() == ticks.diff().tolist()


NEAR = 2**62 + 3  # no float64
TICKS = [0, 1, 9, 10, 999, 1_000, 12_345_678_901, 2**53 + 1]


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize("size", [1, 10, 1_000, 2**20])
def test_clocks_near_the_end_of_int64_are_exact(dtype: Any, size: int) -> None:
    ticks = TICKS if size > 1 else TICKS[:-1]
    points: Any = np.array([[NEAR + tick] for tick in ticks], dtype=dtype)
    stop = NEAR + ticks[-1]
    bounds = [None, [(NEAR, stop + 1)], np.array([[NEAR, stop + 1]], dtype=dtype)]
    for span in bounds:
        voxels = voxelize(points, cell_size=size, bounds=span)
        assert voxels.coordinates[:, 1].tolist() == [tick // size for tick in ticks]
        assert voxels.spatial_shape == (ticks[-1] // size + 1,)
        assert voxels.origin == (NEAR,)
    voxels = voxelize(points, cell_size=size, bounds=[(NEAR + 1, stop)])
    assert voxels.rows.tolist() == [-1, *range(len(ticks) - 2), -1]
    assert voxels.spatial_shape == (-(-(ticks[-1] - 1) // size),)


@pytest.mark.parametrize("size", [10, 1_000])
def test_positions_of_clocks_lie_in_the_cells_of_the_clocks(size: int) -> None:
    ticks = [tick * size + rest for tick in (0, 2**50 - 3, 2**51 - 1) for rest in (0, 1, size - 1)]
    points = torch.tensor([[NEAR + tick] for tick in ticks])
    voxels = voxelize(points, cell_size=size)
    pyramid = voxels.pyramid(torch.ones(len(ticks), 1), strides=1)
    cells = pyramid.positions_from_raw(points).floor().long()
    assert cells.flatten().tolist() == [tick // size for tick in ticks]
    assert torch.equal(cells, voxels.coordinates[:, 1:])


def test_integers_are_compared_exactly_with_bounds_of_any_kind() -> None:
    points = torch.tensor([[-(2**63)], [-1], [0], [5], [2**53], [2**53 + 1], [2**63 - 1]])

    def rows(low: float, high: float) -> list[int]:
        return voxelize(points, cell_size=2.0**20, bounds=[(low, high)]).rows.tolist()

    assert rows(-0.5, 4.5) == [-1, -1, 0, -1, -1, -1, -1]
    assert rows(0, 2**53 + 1) == [-1, -1, 0, 1, 2, -1, -1]
    assert rows(-(2**70), 2**70) == list(range(7))
    assert rows(2**64, 2**65) == [-1] * 7
    assert rows(-(2.0**63), 2**63 - 1) == [0, 1, 2, 3, 4, 5, -1]


def test_bounds_beyond_floats_are_refused() -> None:
    for axes in ([], [0]):
        with pytest.raises(ValueError, match="cell_size"):
            voxelize(cloud(3, 1), cell_size=1, bounds=[(-1.7e308, 1.7e308)], periodic_axes=axes)


def test_distances_beyond_int64_do_not_overflow() -> None:
    points = torch.tensor([[-(2**63)], [0], [2**63 - 1]])
    for size in (2**20, 1_234_567.5):
        cells = voxelize(points, cell_size=size).coordinates[:, 1].tolist()
        exact = [int(x * 2**63 // Fraction(size)) for x in (0, 1)]
        exact.append(int((2**64 - 1) // Fraction(size)))
        assert cells == exact


def test_floating_points_are_compared_exactly_with_integer_bounds() -> None:
    points = torch.tensor([[2.0**62], [2.0**62 + 1024]], dtype=torch.float64)
    assert voxelize(points, cell_size=1024, bounds=[(0, 2**62 + 1)]).rows.tolist() == [0, -1]
    assert voxelize(points, cell_size=1024, bounds=[(2**62 + 1, 2**63)]).rows.tolist() == [-1, 0]


@pytest.mark.parametrize(
    ("low", "high", "size", "n_cells"),
    [
        (0.0, 1_700_000_000.05, 0.1, 17_000_000_001),
        (0.0, 1_700_000_000.0, 0.1, 17_000_000_000),
        (1_700_000_000.1, 1_700_000_100.1, 0.1, 1_000),
        (500_000.3, 500_100.3, 0.1, 1_000),
        (5_000_000.7, 5_000_001.0, 0.3, 1),
        (5_000_000.7, 5_000_001.01, 0.3, 2),
        (0, 2**50 + 1, 2, 2**49 + 1),
        (NEAR, NEAR + 21, 10, 3),
        (NEAR, NEAR + 20, 10, 2),
    ],
)
def test_the_number_of_cells_between_bounds(
    low: float, high: float, size: float, n_cells: int
) -> None:
    dtype = torch.int64 if isinstance(high, int) else torch.float64
    last = math.nextafter(high, 0.0) if dtype == torch.float64 else high - 1
    points = torch.tensor([[low], [last], [high]], dtype=dtype)
    voxels = voxelize(points, cell_size=size, bounds=[(low, high)])
    assert voxels.spatial_shape == (n_cells,)
    assert voxels.coordinates[:, 1].tolist() == [0, n_cells - 1]
    assert voxels.rows.tolist() == [0, 1, -1]


def test_raw_coordinates_of_positions_on_a_map_far_away() -> None:
    points = torch.tensor([[NEAR], [NEAR + 4096]])
    pyramid = voxelize(points, cell_size=1024).pyramid(torch.ones(2, 1), strides=(1, 2))
    back = pyramid.raw_from_positions(pyramid.positions_from_raw(points))
    assert back.tolist() == [[float(NEAR)], [float(NEAR + 4096)]]


def test_utm_coordinates_and_narrow_integers() -> None:
    voxels = voxelize(UTM, cell_size=0.5)
    assert voxels.coordinates.tolist() == [[0, 0, 0], [0, 25, 4]]
    small = torch.tensor([[250, 3], [255, 0]], dtype=torch.uint8)
    voxels = voxelize(small, cell_size=1, bounds=[(0, 256), (-5, 10)])
    assert voxels.coordinates.tolist() == [[0, 250, 8], [0, 255, 5]]


def test_images_by_batch_and_by_offsets() -> None:
    points = cloud(7)
    by_offsets = voxelize(points, offsets=torch.tensor([0, 3, 3, 7]), cell_size=1.0)
    by_batch = voxelize(points, torch.tensor([0, 0, 0, 2, 2, 2, 2]), cell_size=1.0)
    assert torch.equal(by_offsets.coordinates, by_batch.coordinates)
    assert by_offsets.batch_size == by_batch.batch_size == 3
    unsorted = voxelize(points, torch.tensor([2, 0, 1, 0, 0, 0, 0]), cell_size=1, batch_size=5)
    assert unsorted.coordinates[:, 0].tolist() == [2, 0, 1, 0, 0, 0, 0]
    assert unsorted.batch_size == 5
    assert voxelize(points, cell_size=1.0).batch_size == 1


def test_no_points() -> None:
    voxels = voxelize(torch.empty(0, 2), offsets=torch.tensor([0, 0, 0]), cell_size=1.0)
    assert (voxels.coordinates.shape, voxels.batch_size) == ((0, 3), 2)
    assert voxels.spatial_shape == (1, 1)
    outside = voxelize(torch.full((3, 2), 9.0), cell_size=1.0, bounds=[(0, 4), (0, 4)])
    pyramid = outside.pyramid(torch.ones(3, 5))
    assert len(pyramid) == 0
    assert pyramid.values_of_points(0).tolist() == [[0.0] * 5] * 3


def test_arrays_and_their_numbers() -> None:
    points = cloud(9)
    array: Any = points.numpy()
    arguments: dict[str, Any] = {
        "batch": np.zeros(9, dtype=np.int32),
        "cell_size": np.array([0.5, 2.0], dtype=np.float32),
        "bounds": np.array([[0, 20], [0, 20]]),
        "periodic_axes": np.array([1]),
        "batch_size": np.int64(2),
    }
    voxels = voxelize(array, **arguments)
    expected = voxelize(points, cell_size=(0.5, 2), bounds=[(0, 20), (0, 20)])
    assert torch.equal(voxels.coordinates, expected.coordinates)
    assert voxels.periodic_axes == (1,)
    features: Any = np.ones((9, 3), dtype=np.float32)
    pyramid = voxels.pyramid(features, strides=np.array([[1, 2], [2, 2]]))
    assert torch.equal(pyramid.positions_from_raw(array), pyramid.positions_from_raw(points))
    boxes = torch.cat((points, points), 1)
    raw: Any = boxes.numpy()
    cells = pyramid.boxes_from_raw(raw, torch.float64)
    assert_near(pyramid.raw_from_boxes(cells), boxes)


# ---------------------------------------------------------------------------- periodic axes


def test_periodic_points_are_wrapped() -> None:
    turn = torch.tensor([-2, -1, 0, 1, 5])
    angle = torch.tensor([-170.5, -0.5, 0.0, 12.25, 179.5], dtype=torch.float64)
    points = torch.stack((angle + 360 * turn, torch.zeros(5)), 1)
    bounds = [(-180, 180), None]
    voxels = voxelize(points, cell_size=(0.5, 1), bounds=bounds, periodic_axes=[0])
    assert voxels.spatial_shape == (720, 1)
    assert voxels.coordinates[:, 1].tolist() == [19, 359, 360, 384, 719]
    assert (voxels.rows >= 0).all()
    pyramid = voxels.pyramid(torch.ones(5, 1), strides=(1, 2, 4))
    assert pyramid.periodic_axes == (0,)
    assert pyramid.level_shapes[2][0] == 180


def test_what_is_just_below_a_period_is_in_its_first_cell() -> None:
    voxels = voxelize(
        torch.tensor([[-1e-30], [6.0]]), cell_size=0.25, bounds=[(0, 8)], periodic_axes=[0]
    )
    assert voxels.coordinates.tolist() == [[0, 0], [0, 24]]


def test_the_cells_of_a_period_fill_it_exactly() -> None:
    full = 2 * math.pi
    points = torch.tensor([[0.0], [full - 1e-9]], dtype=torch.float64)
    for size in (full / 360, float(np.float32(full / 360))):
        voxels = voxelize(points, cell_size=size, bounds=[(0, full)], periodic_axes=[0])
        assert voxels.spatial_shape == (360,)
        assert voxels.cell_size[0] * 360 == pytest.approx(full, rel=1e-15)
        assert voxels.coordinates[:, 1].tolist() == [0, 359]
    with pytest.raises(ValueError, match="cell_size") as error:
        voxelize(points, cell_size=0.1, bounds=[(0, full)], periodic_axes=[0])
    assert all(str(full / n) in str(error.value) for n in (62, 63))


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
@pytest.mark.parametrize(("period", "n_cells"), [(86_400_000_000_000, 86_400), (10**15 + 1, 7)])
@pytest.mark.parametrize("low", [5, 2**60 - 86_400_000_000_000, 2**60 + 1])
def test_clocks_in_nanoseconds_are_wrapped_exactly(
    dtype: Any, low: int, period: int, n_cells: int
) -> None:
    size = Fraction(period, n_cells)
    ticks = [0, 1, period - 1, period // 2, *(math.ceil(size * cell) for cell in (1, 3, 6))]
    stamps = [low + turn * period + tick for turn in (0, 4_000) for tick in ticks]
    stamps += [stamp + 9_000 * period for stamp in stamps if stamp + 9_000 * period < 2**63]
    points: Any = np.array([[stamp] for stamp in stamps], dtype=dtype)
    voxels = voxelize(
        points, cell_size=float(size), bounds=[(low, low + period)], periodic_axes=[0]
    )
    assert voxels.spatial_shape == (n_cells,)
    expected = [(stamp - low) % period // size for stamp in stamps]
    assert voxels.coordinates[:, 1].tolist() == expected


# -------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "argument", "came"),
    [
        ({"points": torch.tensor([[0.0, 1.0], [math.nan, 2.0]])}, "points", "row 1"),
        ({"points": torch.tensor([[math.inf, 1.0], [0.0, 2.0]])}, "points", "row 0"),
        ({"points": torch.zeros(3)}, "points", "[3]"),
        ({"points": torch.zeros(3, 0)}, "points", "[3, 0]"),
        ({"points": [[0.0, 1.0]]}, "points", "list"),
        ({"cell_size": 0.0}, "cell_size", "0"),
        ({"cell_size": (1.0, -1.0)}, "cell_size", "-1"),
        ({"cell_size": (1.0, 1.0, 1.0)}, "cell_size", "1.0, 1.0, 1.0"),
        ({"cell_size": "fine"}, "cell_size", "fine"),
        ({"cell_size": 1e-17}, "cell_size", "e+"),
        ({"bounds": (0, 4)}, "bounds", "(0, 4)"),
        ({"bounds": [(0, 4)]}, "bounds", "(0, 4)"),
        ({"bounds": [(0, 4), (4, 4)]}, "bounds[1]", "(4, 4)"),
        ({"bounds": [(0, 4), (0, math.inf)]}, "bounds[1]", "inf"),
        ({"bounds": [(0, 4), (0, 1, 2)]}, "bounds[1]", "(0, 1, 2)"),
        ({"bounds": [(0, 4), (0, 10**400)]}, "bounds[1]", "(0, 1000"),
        ({"cell_size": 10**400}, "cell_size", "int 1000"),
        ({"points": torch.rand(2, 2, device="meta")}, "points", "meta"),
        ({"batch": torch.tensor([0, -1])}, "batch", "-1"),
        ({"batch": torch.tensor([0])}, "batch", "[1]"),
        ({"batch": torch.tensor([0, 3]), "batch_size": 3}, "batch_size", "3"),
        ({"batch": torch.tensor([0, 1]), "offsets": torch.tensor([0, 2])}, "offsets", "[2]"),
        ({"offsets": torch.tensor([0, 3])}, "offsets", "3"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "offsets", "[0]"),
        ({"batch_size": -1}, "batch_size", "-1"),
        ({"periodic_axes": [0]}, "bounds", "None"),
        ({"periodic_axes": [2]}, "periodic_axes", "2"),
    ],
)
def test_refusals(change: dict[str, Any], argument: str, came: str) -> None:
    arguments = {"points": torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "cell_size": 1.0, **change}
    with pytest.raises(ValueError, match=f"^{argument.split('[')[0]}") as error:
        voxelize(**arguments)
    assert came in str(error.value)


def test_messages_of_bounds_say_what_bounds_are() -> None:
    span: Any
    for span in ((0, math.nan), (0, "far"), (1,)):
        with pytest.raises(ValueError, match=r"^bounds\[0\]: expected .*low, high.*, got "):
            voxelize(cloud(3), cell_size=1, bounds=[span, None])


def test_features_of_other_points_are_refused() -> None:
    voxels = voxelize(cloud(5), cell_size=1.0)
    with pytest.raises(ValueError, match="features"):
        voxels.pyramid(torch.ones(4, 3))


# ----------------------------------------------------------------------------- values back


def test_raw_points_to_per_point_output() -> None:
    points, features = 5 * torch.rand(300, 2), torch.randn(300, 16)
    block = SparseNeighborhoodAttentionBlock(16, 2)

    voxels = voxelize(points, cell_size=0.1)
    pyramid = voxels.pyramid(features, strides=(1, 2, 4, 8))
    placement = pyramid.positions(), pyramid.batch_offsets()
    out = block(pyramid.values, *placement, pyramid, query_level_indices=pyramid.levels)
    per_point = pyramid.with_values(out).values_of_points(level=0)

    assert per_point.shape == (300, 16)
    cells = ((points.double() - points.double().amin(0)) / 0.1).floor()
    for row in range(0, 300, 37):
        same = (pyramid.levels == 0) & (pyramid.cells == cells[row].long()).all(1)
        assert torch.equal(per_point[row], out[same][0])


def test_values_of_points_are_those_of_the_cell_on_each_level() -> None:
    points = cloud(80, 2)
    batch = torch.arange(80) % 3
    bounds = [(0, 15), (2, 20)]
    voxels = voxelize(points, batch, cell_size=(0.5, 1.5), bounds=bounds)
    pyramid = voxels.pyramid(torch.randn(80, 4, dtype=torch.float64), strides=[(1, 2), (3, 2)])
    everything = pyramid.values_of_points(fill=-7.0)
    assert everything.shape == (80, 2, 4)
    table = {
        tuple(row): value
        for row, value in zip(pyramid.coordinates.tolist(), pyramid.values, strict=True)
    }
    n_outside = 0
    for point, image, values in zip(points.tolist(), batch.tolist(), everything, strict=True):
        inside = all(low <= x < high for x, (low, high) in zip(point, bounds, strict=True))
        n_outside += not inside
        for level, strides in enumerate([(1, 2), (3, 2)]):
            cell = [
                int((x - low) // size // stride)
                for x, (low, _), size, stride in zip(
                    point, bounds, (0.5, 1.5), strides, strict=True
                )
            ]
            expected = table[(image, *cell, level)] if inside else torch.full((4,), -7.0).double()
            assert torch.equal(values[level], expected)
    assert 0 < n_outside < 80
    for level in (0, 1):
        assert torch.equal(pyramid.values_of_points(level, fill=-7.0), everything[:, level])


def test_gradients_flow_to_features_through_both_maps() -> None:
    features = torch.randn(40, 3, dtype=torch.float64, requires_grad=True)
    voxels = voxelize(cloud(40), cell_size=3.0, bounds=[(0, 15), (0, 20)])

    def there_and_back(values: Tensor) -> Tensor:
        return voxels.pyramid(values, strides=(1, 2)).values_of_points()

    assert torch.autograd.gradcheck(there_and_back, (features,))
    there_and_back(features).sum().backward()
    assert features.grad is not None
    assert torch.equal(features.grad.any(1), voxels.rows >= 0)


def test_counts_of_events_are_integers() -> None:
    voxels = voxelize(torch.tensor([[0.2], [0.3], [1.2], [9.0]]), cell_size=1, bounds=[(0, 4)])
    pyramid = voxels.pyramid(torch.ones(4, 1, dtype=torch.int32), strides=(1, 2), pooling="sum")
    counts = pyramid.values_of_points(fill=-1)
    assert counts.dtype == torch.int64
    assert counts.flatten(1).tolist() == [[2, 3], [2, 3], [1, 3], [-1, -1]]
    with pytest.raises(ValueError, match="fill"):
        pyramid.values_of_points(fill=0.5)


def test_refusals_of_values_of_points() -> None:
    pyramid = voxelize(cloud(5), cell_size=1.0).pyramid(torch.ones(5, 2), strides=(1, 2))
    for level in (2, -1, True, 0.0, "fine"):
        with pytest.raises(ValueError, match="level"):
            pyramid.values_of_points(level)  # type: ignore[arg-type]
    forgetful = FeaturePyramid.from_points(pyramid.coordinates[:, :-1], pyramid.values, (20, 20), 1)
    with pytest.raises(ValueError, match="point_rows"):
        forgetful.values_of_points(0)
    for rows in (torch.tensor([[99, 0]]), torch.tensor([[-2, 0]]), torch.tensor([[0]])):
        with pytest.raises(ValueError, match="point_rows"):
            FeaturePyramid(*_stored(pyramid), point_rows=rows)
    with pytest.raises(ValueError, match="point_batch"):
        FeaturePyramid(*_stored(pyramid), point_batch=torch.tensor([0]))


def _stored(pyramid: FeaturePyramid) -> tuple[Any, ...]:
    return pyramid.values, pyramid.coordinates, pyramid.level_shapes, pyramid.batch_size


# ------------------------------------------------------------------- raw units and back


@pytest.mark.parametrize("strides", [(1, 2, 4), (2, 4), (3, 6), [(2, 1), (2, 5), (6, 2)]])
def test_positions_of_raw_points_lie_in_their_cells(strides: Any) -> None:
    points = cloud(200, 2)
    voxels = voxelize(points, cell_size=(0.3, 0.7))
    pyramid = voxels.pyramid(torch.ones(200, 1), strides=strides)
    least = torch.tensor([min(axis) for axis in zip(*pyramid.strides or (), strict=True)])
    positions = pyramid.positions_from_raw(points, torch.float64)
    raw_cells = (points - torch.tensor(voxels.origin, dtype=torch.float64)) / torch.tensor(
        [0.3, 0.7], dtype=torch.float64
    )
    assert_near(positions, raw_cells / least)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        cells = pyramid.positions_from_raw(points, dtype).floor().long()
        assert torch.equal(cells, voxels.coordinates[:, 1:] // least)
    assert_near(pyramid.raw_from_positions(positions), points)


def test_boxes_there_and_back() -> None:
    boxes = torch.cat((cloud(30), cloud(30, seed=1)), 1)
    pyramid = FeaturePyramid(
        torch.ones(1, 1),
        torch.tensor([[0, 0, 0, 0]]),
        ((20, 20), (10, 4)),
        1,
        strides=((2, 2), (4, 10)),
        origin=(-3.0, 5e6),
        cell_size=(0.25, 0.5),
    )
    cells = pyramid.boxes_from_raw(boxes, torch.float64)
    steps = torch.tensor([0.5, 1.0]).double()
    assert_near(cells[:, 2:], boxes[:, 2:] / steps)
    assert_near(cells[:, :2], (boxes[:, :2] - torch.tensor([-3, 5e6]).double()) / steps)
    assert_near(pyramid.raw_from_boxes(cells), boxes)
    assert pyramid.boxes_from_raw(boxes).dtype == torch.float32
    assert pyramid.raw_from_boxes(cells.float()).dtype == torch.float64


def test_without_origin_cell_size_or_strides_raw_units_are_cells() -> None:
    stored = torch.ones(1, 1), torch.tensor([[0, 0, 0, 0]]), ((8, 8), (3, 4)), 1
    points = cloud(10, scale=8.0)
    plain = FeaturePyramid(*stored)
    assert torch.equal(plain.positions_from_raw(points, torch.float64), points)
    assert torch.equal(plain.raw_from_positions(points), points)
    strided = FeaturePyramid(*stored[:2], ((8, 8), (4, 4)), 1, strides=((2, 2), (4, 4)))
    assert torch.equal(strided.positions_from_raw(points, torch.float64), points / 2)


def test_positions_of_large_maps_are_float64() -> None:
    points = torch.tensor([[CLOCK], [CLOCK + 2**25]])
    pyramid = voxelize(points, cell_size=1).pyramid(torch.ones(2, 1))
    assert pyramid.positions_from_raw(points).dtype == torch.float64
    assert pyramid.positions_from_raw(points).tolist() == [[0], [2**25]]


def test_rounding_to_float32_moves_no_position_to_another_cell() -> None:
    size = 1000
    below = torch.tensor([[float(x)] for x in range(1, size)], dtype=torch.float64) - 1e-9
    pyramid = FeaturePyramid(torch.ones(1, 1), torch.tensor([[0, 0, 0]]), ((size,),), 1)
    assert pyramid.positions_from_raw(below).floor().flatten().tolist() == list(range(size - 1))


def test_gradients_of_conversions() -> None:
    pyramid = voxelize(cloud(5), cell_size=0.5).pyramid(torch.ones(5, 1), strides=(2, 4))
    points = cloud(5).requires_grad_()
    boxes = torch.cat((cloud(5), cloud(5)), 1).requires_grad_()
    for function, argument in (
        (lambda raw: pyramid.positions_from_raw(raw, torch.float64), points),
        (pyramid.raw_from_positions, points),
        (lambda raw: pyramid.boxes_from_raw(raw, torch.float64), boxes),
        (pyramid.raw_from_boxes, boxes),
    ):
        assert torch.autograd.gradcheck(function, (argument,))


def test_refusals_of_conversions() -> None:
    pyramid = voxelize(cloud(5), cell_size=0.5).pyramid(torch.ones(5, 1))
    calls: list[tuple[Any, str]] = [
        (pyramid.positions_from_raw, "points"),
        (pyramid.raw_from_positions, "positions"),
        (pyramid.boxes_from_raw, "boxes"),
        (pyramid.raw_from_boxes, "boxes"),
    ]
    for call, argument in calls:
        for wrong in (torch.ones(3, 3), torch.ones(2), [[0.0, 1.0]]):
            with pytest.raises(ValueError, match=argument):
                call(wrong)
    for wrong_dtype in (torch.int64, "float32"):
        with pytest.raises(ValueError, match="dtype"):
            pyramid.positions_from_raw(cloud(5), wrong_dtype)  # type: ignore[arg-type]


def test_voxels_are_a_tuple() -> None:
    voxels = voxelize(cloud(5), cell_size=0.5)
    assert isinstance(voxels, Voxels)
    assert isinstance(voxels, tuple)


def test_points_on_borders_of_a_periodic_axis_have_the_cells_of_their_positions() -> None:
    azimuth = torch.arange(1800, dtype=torch.float64)[:, None] * 0.2
    voxels = voxelize(azimuth, cell_size=0.2, bounds=[(-180, 180)], periodic_axes=[0])
    pyramid = voxels.pyramid(torch.ones(1800, 1), strides=1)
    cells = pyramid.positions_from_raw(azimuth, torch.float64).floor().long() % 1800
    assert torch.equal(cells, voxels.coordinates[:, 1:])


def test_voxels_of_several_samples_make_one_batch() -> None:
    bounds = [(0, 4), None]
    points = [torch.tensor([[0.5, 3.0], [9.0, 0.0]]), torch.tensor([[3.5, 7.0]])]
    samples = [
        voxelize(part, cell_size=1.0, bounds=[bounds[0], (0, high)])
        for part, high in zip(points, (5, 8), strict=True)
    ]
    batch = collate_pyramids(samples)
    assert isinstance(batch, Voxels)
    assert batch.coordinates.tolist() == [[0, 0, 3], [1, 3, 7]]
    assert batch.rows.tolist() == [0, -1, 1]
    assert batch.batch.tolist() == [0, 0, 1]
    assert batch.spatial_shape == (4, 8)
    assert batch.batch_size == 2
    assert samples[1].coordinates.tolist() == [[0, 3, 7]]
    pyramid = batch.pyramid(torch.arange(3.0)[:, None], strides=1)
    assert pyramid.values_of_points(level=0).flatten().tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        ({"cell_size": 0.5}, "cell_size"),
        ({"bounds": [(1, 5), (0, 4)]}, "origin"),
        ({"bounds": [(0, 5), (0, 4)]}, "spatial_shape along periodic axes"),
        ({"periodic_axes": ()}, "periodic_axes"),
    ],
)
def test_voxels_of_other_grids_do_not_make_one_batch(other: dict[str, Any], name: str) -> None:
    grid: dict[str, Any] = {"cell_size": 1.0, "bounds": [(0, 4), (0, 4)], "periodic_axes": (0,)}
    parts = [voxelize(torch.rand(3, 2), **arguments) for arguments in (grid, grid | other)]
    with pytest.raises(ValueError, match=rf"parts\[1\]\.{name}"):
        Voxels.cat(parts)


@pytest.mark.parametrize("parts", [[], None, [torch.zeros(3)]])
def test_cat_of_what_are_no_voxels_is_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match="parts"):
        Voxels.cat(parts)


def test_points_beyond_float32_have_infinite_positions() -> None:
    pyramid = voxelize(torch.rand(3, 2), cell_size=0.1).pyramid(torch.ones(3, 1))
    far = torch.tensor([[1e300, 0.05]], dtype=torch.float64)
    assert pyramid.positions_from_raw(far)[0, 0] == torch.inf
