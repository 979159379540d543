"""Suggested windows: the numbers of neighbors that they give, and what limits them."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems import LargestTensor
from torch import Tensor

from benchmarks.scenes import Scene, lidar_scan, moving_edges, particle_tracks, tracks_in_volume
from vicinal import (
    FeaturePyramid,
    QueryPlacement,
    Window,
    get_multilevel_neighborhoods,
    plan_neighborhoods,
    suggest_windows,
)

Windows = tuple[int | tuple[int, ...] | Window, ...]


def pyramid_of(scene: Scene) -> FeaturePyramid:
    values = torch.zeros(len(scene.coordinates), 1)
    return FeaturePyramid(values, scene.coordinates, scene.level_shapes, 1)


def from_cells(
    cells: Tensor, shape: Sequence[int], strides: Sequence[Any] = (1, 2, 4), **options: Any
) -> FeaturePyramid:
    """A pyramid of cells ``[n, P]``, all in image 0."""
    points = torch.nn.functional.pad(cells, (1, 0))
    return FeaturePyramid.from_points(
        points, torch.ones(len(cells), 1), shape, 1, strides=strides, **options
    )


def mean_neighbors(pyramid: FeaturePyramid, windows: Windows) -> Tensor:
    """Of all points as queries, float64 [L]."""
    positions, offsets, levels = QueryPlacement.of_points(pyramid)
    plan = plan_neighborhoods(positions, offsets, pyramid, windows, levels)
    return plan.neighbors_per_level().mean


def sizes_of(windows: Windows, dim: int) -> list[tuple[int, ...]]:
    found = []
    for window in windows:
        size = window.size if isinstance(window, Window) else window
        found.append(size if isinstance(size, tuple) else (size,) * dim)
    return found


@pytest.mark.parametrize("target", [40, 80, 160])
def test_levels_of_a_lidar_scan_share_the_neighbors(target: float) -> None:
    pyramid = pyramid_of(lidar_scan())
    assert 76_000 < len(pyramid) < 84_000
    mean = mean_neighbors(pyramid, suggest_windows(pyramid, target))
    assert mean.max() <= 2 * mean.min()
    assert float(mean.sum()) == pytest.approx(target, rel=0.1)


def test_suggested_windows_are_those_of_the_benchmarks() -> None:
    for scene, axes in ((lidar_scan(), ()), (moving_edges(), (2,))):
        assert suggest_windows(pyramid_of(scene), causal_axes=axes) == scene.windows


@pytest.mark.parametrize("make", [particle_tracks, tracks_in_volume])
@pytest.mark.parametrize("target", [80, 200])
def test_levels_of_tracks_share_the_neighbors(make: Any, target: float) -> None:
    pyramid = pyramid_of(make(60, size=100))
    mean = mean_neighbors(pyramid, suggest_windows(pyramid, target))
    assert mean.max() <= 2 * mean.min()
    assert float(mean.sum()) == pytest.approx(target, rel=0.15)


def test_causal_windows_of_events() -> None:
    pyramid = pyramid_of(moving_edges())
    windows = suggest_windows(pyramid, 80, causal_axes=[2])
    for window in windows:
        assert isinstance(window, Window)
        assert window.causal == (False, False, True)
    mean = mean_neighbors(pyramid, windows)
    assert mean.max() <= 2 * mean.min()
    assert float(mean.sum()) == pytest.approx(80, rel=0.1)


def test_windows_are_flat_where_the_data_is() -> None:
    row, column = torch.arange(64), torch.arange(64)
    for axis in range(3):
        cells = torch.cartesian_prod(row, column).tolist()
        flat = torch.tensor([[*cell[:axis], 5, *cell[axis:]] for cell in cells])
        pyramid = from_cells(flat, [64 if a != axis else 16 for a in range(3)])
        plane = tuple(5 if a != axis else 1 for a in range(3))
        target = float(mean_neighbors(pyramid, (plane,) * 3).sum())
        assert suggest_windows(pyramid, target) == (plane,) * 3


def test_windows_are_cubes_where_all_axes_are_alike() -> None:
    for dim, side in ((1, 400), (2, 60), (3, 24), (4, 10)):
        cells = torch.cartesian_prod(*[torch.arange(side)] * dim).view(-1, dim)
        pyramid = from_cells(cells, [side] * dim, (1, 2))
        target = float(mean_neighbors(pyramid, (3, 3)).sum())
        assert suggest_windows(pyramid, target) == (3, 3), dim


def test_thick_sections() -> None:
    # Straight lines in sections ten times as thick as pixels, so that a section is ten pixels away.
    generator = torch.Generator().manual_seed(0)
    start = 400 * torch.rand(60, 1, 3, generator=generator)
    heading = torch.nn.functional.normalize(torch.randn(60, 1, 3, generator=generator), dim=-1)
    places = start + heading * torch.arange(150)[:, None]
    cells = (places / torch.tensor([1, 1, 10])).floor().long().view(-1, 3)
    inside = ((cells >= 0) & (cells < torch.tensor([400, 400, 40]))).all(1)
    pyramid = from_cells(cells[inside], (400, 400, 40), ((1, 1, 1), (2, 2, 1)))
    for size in sizes_of(suggest_windows(pyramid, 40), 3):
        assert size[2] < size[0]
        assert size[2] < size[1]


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_sizes_are_odd_and_at_most_those_of_the_level(dim: int) -> None:
    shape = (9, 4, 6, 3)[:dim]
    cells = torch.cartesian_prod(*map(torch.arange, shape)).view(-1, dim)
    pyramid = from_cells(cells, shape, (1, 2))
    for target, axes in itertools.product((0.5, 3, 60, 1e6), ((), (0,))):
        windows = suggest_windows(pyramid, target, causal_axes=axes)
        mean_neighbors(pyramid, windows)  # which a plan takes
        for size, level in zip(sizes_of(windows, dim), pyramid.level_shapes, strict=True):
            assert all(1 <= width <= most for width, most in zip(size, level, strict=True))
            assert all(width % 2 for width in size[len(axes) :])


def test_windows_hold_all_points_where_the_target_asks_for_it() -> None:
    cells = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    assert suggest_windows(from_cells(cells, (15, 15), (1,)), 25 - 1e-3) == (9,)


def test_what_a_level_of_few_points_leaves_goes_to_the_others() -> None:
    line = torch.arange(600)[:, None]
    pyramid = from_cells(line, (600,), (1, 2, 300))  # two cells on the coarsest level
    mean = mean_neighbors(pyramid, suggest_windows(pyramid, 61))
    assert mean[2] <= 2
    assert mean[:2].tolist() == pytest.approx([29.5, 29.5], rel=0.1)


def test_periodic_axes() -> None:
    # Half of a circle's points lie on either side of the seam.
    angle = torch.cat((torch.arange(4), torch.arange(60, 64)))
    cells = torch.cartesian_prod(angle, torch.arange(15))
    pyramid = from_cells(cells, (64, 16), (1, 2), periodic_axes=(0,))
    windows = suggest_windows(pyramid, 30)
    mean = mean_neighbors(pyramid, windows)
    assert mean.max() <= 2 * mean.min()
    assert float(mean.sum()) == pytest.approx(30, rel=0.25)
    # No window is wider than the circle.
    wide = sizes_of(suggest_windows(pyramid, 1e6), 2)
    assert all(size[0] < shape[0] for size, shape in zip(wide, pyramid.level_shapes, strict=True))


def test_images_do_not_share_points() -> None:
    cells = torch.cartesian_prod(torch.arange(30), torch.arange(30))
    one = from_cells(cells, (30, 30), (1, 2))
    empty = one[0:0]
    several = FeaturePyramid.cat([one, one, one])
    assert suggest_windows(several, 40) == suggest_windows(one, 40)
    assert empty.batch_size == 0
    assert suggest_windows(empty, 40) == (1, 1)


def test_order_of_the_points_is_free() -> None:
    pyramid = FeaturePyramid.cat([pyramid_of(particle_tracks(20, size=100))] * 2)
    order = torch.randperm(len(pyramid), generator=torch.Generator().manual_seed(1))
    mixed = FeaturePyramid(
        pyramid.values, pyramid.coordinates[order], pyramid.level_shapes, pyramid.batch_size
    )
    mean = mean_neighbors(pyramid, suggest_windows(mixed, 60))
    assert mean.max() <= 2 * mean.min()
    assert float(mean.sum()) == pytest.approx(60, rel=0.15)


@pytest.mark.parametrize(
    ("coordinates", "expected"),
    [
        (torch.empty(0, 4, dtype=torch.int64), (1, 1)),
        (torch.tensor([[0, 5, 5, 0]]), (1, 1)),
        (torch.tensor([[0, 5, 5, 0]] * 50), (1, 1)),  # all in one cell
        (torch.tensor([[0, 0, 0, 0]] * 50), (1, 1)),
        (torch.tensor([[0, 3, 3, 1], [2, 3, 3, 1]]), (1, 1)),  # an empty level, an empty image
    ],
    ids=["nothing", "one point", "one cell", "cell 0", "one level"],
)
def test_few_points(coordinates: Tensor, expected: Windows) -> None:
    values = torch.zeros(len(coordinates), 1)
    pyramid = FeaturePyramid(values, coordinates, ((1000, 1000), (10, 10)), 3)
    assert suggest_windows(pyramid, 80) == expected
    causal = suggest_windows(pyramid, 80, causal_axes=(1,))
    assert sizes_of(causal, 2) == [(1, 1), (1, 1)]


def test_points_along_a_diagonal() -> None:
    # No window of one row or one column holds two of the points.
    cells = torch.arange(0, 300, 5)[:, None].expand(-1, 3)
    pyramid = from_cells(cells, (300, 300, 300), (1,))
    windows = suggest_windows(pyramid, 5)
    assert float(mean_neighbors(pyramid, windows)) == pytest.approx(5, rel=0.1)
    ((low, *_, high),) = map(sorted, sizes_of(windows, 3))
    assert 21 <= low <= high <= 25


def test_scattered_points_take_wide_windows_within_limits() -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 500, (300, 3), generator=generator)
    pyramid = from_cells(cells, (500, 500, 500), (1,))
    (size,) = sizes_of(suggest_windows(pyramid, 20), 3)
    assert math.prod(size) <= 512 * max(size)
    assert math.prod(size) > 1000


def test_many_points_in_a_cell() -> None:
    # Their pairs with the queries, 2^24 in the smallest window, are not all listed.
    coordinates = torch.zeros(2**14, 3, dtype=torch.int64)
    pyramid = FeaturePyramid(torch.zeros(2**14, 1), coordinates, ((8,),), 1)
    with LargestTensor() as largest:
        assert suggest_windows(pyramid, 2**15) == (1,)
    assert largest.nbytes < 8 * 2**23


def test_in_inference_mode() -> None:
    pyramid = pyramid_of(tracks_in_volume(20, size=60))
    with torch.inference_mode():
        windows = suggest_windows(pyramid, 50)
    assert windows == suggest_windows(pyramid, 50)


def test_the_same_windows_twice_and_nothing_changes() -> None:
    pyramid = pyramid_of(tracks_in_volume(20, size=60))
    state, values = torch.get_rng_state(), pyramid.values.clone()
    first = suggest_windows(pyramid, 50)
    torch.rand(3)
    torch.set_rng_state(state)
    assert suggest_windows(pyramid, 50) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(pyramid.values, values)


def test_what_levels_without_points_get_is_attended_to() -> None:
    pyramid = FeaturePyramid(torch.zeros(1, 1), torch.tensor([[0, 5, 0]]), ((8,), (4,)), 1)
    windows = suggest_windows(pyramid)
    _, _, levels = get_multilevel_neighborhoods(pyramid.positions(), ((8,), (4,)), windows)
    assert levels.tolist() == [0, 1]


PYRAMID = from_cells(torch.randint(0, 12, (40, 2)), (12, 12), periodic_axes=(0,))


@pytest.mark.parametrize(
    ("argument", "arguments"),
    [
        ("pyramid", {"pyramid": torch.rand(3, 2)}),
        ("target", {"target": 0}),
        ("target", {"target": -3}),
        ("target", {"target": math.inf}),
        ("target", {"target": math.nan}),
        ("target", {"target": "80"}),
        ("target", {"target": None}),
        ("target", {"target": True}),
        ("causal_axes", {"causal_axes": (2,)}),
        ("causal_axes", {"causal_axes": (-1,)}),
        ("causal_axes", {"causal_axes": (1, 1)}),
        ("causal_axes", {"causal_axes": 1}),
        ("causal_axes", {"causal_axes": (0,)}),  # which is periodic
        (
            "causal_axes",
            {
                "pyramid": FeaturePyramid(
                    torch.zeros(0, 1), torch.zeros(0, 3, dtype=torch.int64), ((5,), (3,)), 1
                ),
                "causal_axes": (0,),
            },
        ),
    ],
)
def test_refusals(argument: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected") as refusal:
        suggest_windows(**{"pyramid": PYRAMID, **arguments})
    assert "got" in str(refusal.value)
