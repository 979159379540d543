"""The cells near a position, against the specification spelled out in numpy scalars."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Shapes, is_outside, scenes, window_slots
from torch import Tensor

from vicinal import get_multilevel_neighborhoods

# Ratios that are no powers of two and differ per axis; the finest level is last, or there is none:
# the full shape of the third is 12 x 10 and no level's.
LEVELS: list[tuple[Shapes, tuple[int, ...]]] = [
    (((5,), (40,), (17,)), (3, 9, 5)),
    (((3, 2), (7, 5), (13, 11)), (5, 1, 3)),
    (((12, 3), (4, 10)), (3, 5)),
    (((4, 3, 2), (7, 9, 5)), (3, 5)),
    (((2, 3, 2, 3), (3, 5, 4, 3)), (3, 1)),
]


def assert_matches_brute_force(positions: Tensor, shapes: Shapes, sizes: Sequence[int]) -> None:
    cells, outside, levels = get_multilevel_neighborhoods(positions, shapes, sizes)
    expected = [window_slots(position, shapes, sizes) for position in positions]
    n_slots = sum(size ** len(shapes[0]) for size in sizes)
    assert (cells.shape, cells.dtype) == ((len(positions), n_slots, len(shapes[0])), torch.int64)
    assert (outside.shape, outside.dtype) == ((len(positions), n_slots), torch.bool)
    assert (levels.shape, levels.dtype) == ((n_slots,), torch.int64)
    assert cells.tolist() == [[list(slot.cell) for slot in window] for window in expected]
    assert outside.tolist() == [[is_outside(slot, shapes) for slot in row] for row in expected]
    for window in expected:
        assert levels.tolist() == [slot.level for slot in window]


@pytest.mark.parametrize(("shapes", "sizes"), LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_masks_and_levels(shapes: Shapes, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    full = torch.tensor([max(axis) for axis in zip(*shapes, strict=True)], dtype=dtype)
    inside = torch.rand(10, len(full), dtype=dtype) * full
    borders = (inside + 1).floor()
    beyond = torch.stack((-full, -full / 3, full, full * 2.5))
    # Where the cells of one level meet, a position is the product of a ratio with rounding.
    corners = torch.stack([full / torch.tensor(shape, dtype=dtype) for shape in shapes])
    positions = torch.cat((inside, borders, beyond, corners, 2 * corners, -0.0 * inside[:1]))
    assert_matches_brute_force(positions, shapes, sizes)


@given(scenes(max_dim=4))
def test_random_levels_and_positions(scene: Any) -> None:
    assert_matches_brute_force(scene.positions, scene.pyramid.level_shapes, scene.sizes)


@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=1, max_size=8))
def test_cells_beyond_the_map_are_returned_as_computed(positions: list[float]) -> None:
    column = torch.tensor(positions, dtype=torch.float32)[:, None]
    assert_matches_brute_force(column, ((9,), (4,)), (3, 5))


def test_default_windows() -> None:
    positions = torch.tensor([[20.2, 3.9]])
    cells, _, levels = get_multilevel_neighborhoods(positions, [(32, 8), (16, 4), (8, 2), (4, 1)])
    assert levels.bincount().tolist() == [9, 25, 49, 81]
    # The first window starts at its lowest corner and moves along the last axis first.
    assert cells[0, :4].tolist() == [[19, 2], [19, 3], [19, 4], [20, 2]]
    assert cells[0, [9, 34, 83]].tolist() == [[8, -1], [2, -3], [-2, -4]]


@pytest.mark.parametrize("far", [1e30, -1e30, 3e38])
def test_windows_of_very_far_positions_are_outside_the_map(far: float) -> None:
    positions = torch.tensor([[far, 1.0], [1.0, far], [far, -far]])
    cells, outside, _ = get_multilevel_neighborhoods(positions, [(4, 4), (2, 2)], [3, 5])
    assert outside.all()
    near = cells[0, :9, 1].tolist(), cells[1, :9, 0].tolist()
    assert near == ([0, 1, 2] * 3, [0, 0, 0, 1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_positions_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    shapes: Shapes = ((127, 100), (97, 77))  # bfloat16 holds the centers of 128 cells
    positions = (torch.rand(200, 2) * 100).to(dtype)
    assert_matches_brute_force(positions, shapes, (1, 3))
    narrow = positions * (torch.tensor(shapes[1]) / torch.tensor(shapes[0])).to(dtype)
    wide = get_multilevel_neighborhoods(positions, shapes, [1, 1])[0][:, 1]
    assert (narrow.floor() != wide).any(), "in half precision some would fall into other cells"


def test_no_queries() -> None:
    cells, outside, levels = get_multilevel_neighborhoods(torch.empty(0, 2), [(4, 4)], [3])
    assert cells.shape == (0, 9, 2)
    assert outside.shape == (0, 9)
    assert levels.tolist() == [0] * 9


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_level_shapes_of_any_integer_type(dtype: torch.dtype) -> None:
    positions, shapes = torch.rand(5, 2) * 9, ((9, 4), (3, 2))
    expected = get_multilevel_neighborhoods(positions, shapes, [3, 5])
    actual = get_multilevel_neighborhoods(positions, torch.tensor(shapes, dtype=dtype), [3, 5])
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)


def test_positions_get_no_gradient_from_the_cells() -> None:
    positions = torch.rand(3, 2, requires_grad=True)
    cells, _, _ = get_multilevel_neighborhoods(positions, [(4, 4)], [3])
    assert not cells.requires_grad
    assert torch.equal(positions, positions.detach())


ACCEPTED: dict[str, Any] = {
    "query_fullscale_spatial_positions": torch.rand(3, 2),
    "level_spatial_shapes": torch.tensor([[4, 4], [2, 2]]),
    "neighborhood_sizes": [3, 5],
}


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("query_fullscale_spatial_positions", torch.rand(6), "[6]"),
        ("query_fullscale_spatial_positions", torch.rand(3, 2, 1), "[3, 2, 1]"),
        ("query_fullscale_spatial_positions", torch.rand(3, 3), "[3, 3]"),
        ("query_fullscale_spatial_positions", torch.ones(3, 2, dtype=torch.int64), "int64"),
        ("query_fullscale_spatial_positions", torch.tensor([[1.0, torch.nan]]), "nan"),
        ("query_fullscale_spatial_positions", torch.tensor([[0, 1.0], [torch.inf, 1]]), "inf"),
        ("query_fullscale_spatial_positions", [[1.0, 2.0]], "list"),
        ("level_spatial_shapes", torch.tensor([4, 4]), "[2]"),
        ("level_spatial_shapes", torch.ones(1, 2, 2, dtype=torch.int64), "[1, 2, 2]"),
        ("level_spatial_shapes", torch.tensor([[4.0, 4.0], [2.0, 2.0]]), "float32"),
        ("level_spatial_shapes", torch.tensor([[4, 4], [0, 2]]), "0"),
        ("level_spatial_shapes", torch.empty(0, 2, dtype=torch.int64), "[0, 2]"),
        ("level_spatial_shapes", [(4, 4), (2,)], "(2,)"),
        ("level_spatial_shapes", [], "[]"),
        ("neighborhood_sizes", [3], "[3]"),
        ("neighborhood_sizes", [3, 5, 7], "[3, 5, 7]"),
        ("odd neighborhood_sizes", [3, 4], "[3, 4]"),
        ("odd neighborhood_sizes", [(0, 1), 3], "[(0, 1), 3]"),
        ("neighborhood_sizes", [0, 0], "[0, 0]"),
        ("odd neighborhood_sizes", [3, -1], "[3, -1]"),
        ("odd neighborhood_sizes", [3, 5.0], "5.0"),
        ("odd neighborhood_sizes", [3, 10**30 + 1], "1]"),
    ],
)
def test_refusals(argument: str, value: object, came: str) -> None:
    arguments = ACCEPTED | {argument.removeprefix("odd "): value}
    with pytest.raises(ValueError, match="expected") as refusal:
        get_multilevel_neighborhoods(**arguments)
    message = str(refusal.value)
    assert argument in message
    assert came in message.split("got")[-1]
