"""Sparse maps as dense tensors: conversion both ways, pooling, and what is refused."""

import contextlib
import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import Scene, assert_close, make_scene, scene_2d, scenes, sparse_coo
from torch import Tensor

from vicinal import FeaturePyramid, get_multilevel_neighborhoods
from vicinal._utils.types import Pooling

SHAPES = ((6, 4), (5, 5), (9, 8))  # full shape 9 x 8


def sparse_map(n_points: int = 40, *, duplicates: int = 0, batch_size: int = 3) -> Tensor:
    """A map of SHAPES with ``duplicates`` cells stored twice, not coalesced if there are any."""
    scene = make_scene(SHAPES, (1, 1, 1), [1] * batch_size, n_points, distinct=True)
    coordinates, values = scene.pyramid.coordinates, scene.pyramid.values
    again = slice(0, duplicates)
    indices = torch.cat((coordinates, coordinates[again])).t()
    stacked = torch.cat((values, values[again] + 1))
    size = (batch_size, 9, 8, len(SHAPES), 3)
    coo = sparse_coo(indices, stacked, size)
    return coo if duplicates else coo.coalesce()


@pytest.mark.parametrize("duplicates", [0, 11])
def test_coo_round_trip(duplicates: int) -> None:
    coo = sparse_map(duplicates=duplicates)
    assert coo.is_coalesced() == (duplicates == 0)
    pyramid = FeaturePyramid.from_coo(coo, SHAPES)
    back = pyramid.to_coo()
    assert back.is_coalesced()
    assert back.shape == coo.shape
    assert torch.equal(back.indices(), coo.coalesce().indices())
    assert torch.equal(back.values(), coo.coalesce().values())
    assert len(pyramid) == back.indices().shape[1]
    assert torch.equal(back.to_dense(), coo.to_dense())


@pytest.mark.parametrize("duplicates", [0, 11])
def test_gradient_of_a_sparse_map_is_sparse_on_the_same_cells(duplicates: int) -> None:
    coo = sparse_map(duplicates=duplicates).requires_grad_()
    pyramid = FeaturePyramid.from_coo(coo, torch.tensor(SHAPES))
    weights = torch.randn_like(pyramid.values)
    (pyramid.values * weights).sum().backward()
    grad = coo.grad
    assert grad is not None
    assert grad.layout == torch.sparse_coo
    assert torch.equal(grad.coalesce().indices(), coo.detach().coalesce().indices())
    assert torch.equal(grad.coalesce().values(), weights)


def test_gradient_passes_through_to_coo() -> None:
    pyramid = scene_2d().pyramid
    values = pyramid.values.clone().requires_grad_()
    dense = pyramid.with_values(values).to_coo().to_dense()
    weights = torch.randn_like(dense)
    (dense * weights).sum().backward()
    batch, x, y, level = pyramid.coordinates.t()
    assert values.grad is not None
    assert torch.equal(values.grad, weights[batch, x, y, level])


def test_stored_zeros_are_points() -> None:
    indices = torch.tensor([[0, 0], [1, 3], [2, 0], [0, 1]])
    coo = sparse_coo(indices, torch.zeros(2, 5), (1, 4, 4, 2, 5)).coalesce()
    pyramid = FeaturePyramid.from_coo(coo, [(4, 4), (4, 2)])
    assert pyramid.coordinates.tolist() == [[0, 1, 2, 0], [0, 3, 0, 1]]
    assert pyramid.to_coo().indices().tolist() == indices.tolist()


def test_views_of_the_coordinates() -> None:
    coordinates = torch.tensor([[1, 2, 3, 0], [0, 4, 1, 1]])
    shapes: Any = torch.tensor([[6, 4], [5, 2]])
    pyramid = FeaturePyramid(torch.rand(2, 5), coordinates, shapes, 2)
    assert pyramid.level_shapes == ((6, 4), (5, 2))
    assert pyramid.batch.tolist() == [1, 0]
    assert pyramid.cells.tolist() == [[2, 3], [4, 1]]
    assert pyramid.levels.tolist() == [0, 1]
    assert (len(pyramid), pyramid.n_levels, pyramid.position_dim, pyramid.embed_dim) == (2, 2, 2, 5)


def test_positions_are_cell_centers_in_full_shape_units() -> None:
    pyramid = scene_2d().pyramid
    expected = [
        [(x + 0.5) * full / size for x, full, size in zip(cell, (9, 8), SHAPES[level], strict=True)]
        for _, *cell, level in pyramid.coordinates.tolist()
    ]
    positions = pyramid.positions(torch.float64)
    assert_close(positions, torch.tensor(expected, dtype=torch.float64), 1e-14)
    assert pyramid.positions(torch.float32).dtype == torch.float32


def test_batch_offsets() -> None:
    coordinates = torch.tensor([[1, 0, 0], [1, 3, 0], [1, 2, 1], [3, 0, 0]])
    pyramid = FeaturePyramid(torch.rand(4, 2), coordinates, ((4,), (3,)), 5)
    assert pyramid.batch_offsets().tolist() == [0, 0, 3, 3, 4, 4]
    none = FeaturePyramid(torch.rand(0, 2), coordinates[:0], ((4,), (3,)), 0)
    assert none.batch_offsets().tolist() == [0]
    mixed = FeaturePyramid(torch.rand(4, 2), coordinates.flip(0), ((4,), (3,)), 5)
    with pytest.raises(ValueError, match=r"coordinates: expected points sorted by image"):
        mixed.batch_offsets()


def test_points_of_a_pyramid_are_queries_by_batch_offsets() -> None:
    pyramid = FeaturePyramid.from_coo(sparse_map(), SHAPES)
    positions = pyramid.positions(torch.float64)
    scene = Scene(positions, pyramid.batch_offsets(), pyramid, (3, 3, 3))
    assert scene.images() == pyramid.batch.tolist()
    counts = scene.plan().counts()
    assert (counts >= 1).all(), "every point is its own neighbor"


def test_with_values_and_to() -> None:
    pyramid = scene_2d().pyramid
    other = pyramid.with_values(torch.ones(len(pyramid), 7))
    assert other.embed_dim == 7
    assert other.coordinates is pyramid.coordinates
    assert pyramid.embed_dim == 3
    moved = pyramid.to("cpu")
    assert torch.equal(moved.values, pyramid.values)
    assert torch.equal(moved.coordinates, pyramid.coordinates)
    assert (moved.level_shapes, moved.batch_size) == (pyramid.level_shapes, pyramid.batch_size)
    on_meta = pyramid.to("meta")
    assert on_meta.values.device.type == on_meta.coordinates.device.type == "meta"
    with pytest.raises(ValueError, match="values"):
        pyramid.with_values(torch.ones(len(pyramid)))


def test_repr_counts() -> None:
    pyramid = FeaturePyramid(torch.rand(1, 5), torch.tensor([[0, 2, 3, 1]]), ((6, 4), (5, 12)), 8)
    text = repr(pyramid)
    assert all(part in text for part in ("points=1", "batch_size=8", "6x4", "5x12", "[1, 5]"))


def test_no_points_and_no_images() -> None:
    empty = FeaturePyramid(torch.rand(0, 5), torch.empty(0, 4, dtype=torch.int64), SHAPES, 0)
    back = FeaturePyramid.from_coo(empty.to_coo(), SHAPES)
    assert (len(back), back.batch_size, back.embed_dim) == (0, 0, 5)
    assert back.coordinates.shape == (0, 4)
    assert back.positions(torch.float32).shape == (0, 2)
    assert "points=0" in repr(back)
    pooled = FeaturePyramid.from_points(
        torch.empty(0, 3, dtype=torch.int64), empty.values, (9, 8), 0
    )
    assert (len(pooled), pooled.n_levels, pooled.batch_size) == (0, 4, 0)


# -------------------------------------------------------------------------------- from_levels


def level_maps(batch_size: int = 2) -> list[Tensor]:
    """Three maps, of which the first is not coalesced and the last holds nothing."""
    twice = torch.tensor([[1, 0, 1], [2, 3, 2], [1, 0, 1]])
    once = torch.tensor([[0, 1], [8, 0], [7, 2]])
    return [
        sparse_coo(twice, torch.randn(3, 5), (batch_size, 6, 4, 5)),
        sparse_coo(once, torch.randn(2, 5), (batch_size, 9, 8, 5)),
        sparse_coo(once[:, :0], torch.randn(0, 5), (batch_size, 1, 3, 5)),
    ]


def test_from_levels() -> None:
    maps = level_maps()
    pyramid = FeaturePyramid.from_levels(maps)
    assert pyramid.level_shapes == ((6, 4), (9, 8), (1, 3))
    assert pyramid.batch_size == 2
    assert len(pyramid) == 4
    assert pyramid.batch.tolist() == sorted(pyramid.batch.tolist())
    for level, single in enumerate(maps):
        at_level = pyramid.levels == level
        cells = pyramid.coordinates[at_level, :-1].t()
        rebuilt = sparse_coo(cells, pyramid.values[at_level], single.shape)
        assert_close(rebuilt.to_dense(), single.to_dense(), 1e-6, f"level {level}")


def test_gradients_of_from_levels() -> None:
    maps = [level.requires_grad_() for level in level_maps()]
    pyramid = FeaturePyramid.from_levels(maps)
    (pyramid.values * pyramid.levels[:, None]).sum().backward()
    grads = [level.grad for level in maps]
    for index, grad in enumerate(grads[:2]):
        assert grad is not None
        assert grad.layout == torch.sparse_coo
        assert (grad.coalesce().values() == index).all()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda maps: [], "levels"),
        (lambda maps: [maps[0].to_dense()], "levels[0]"),
        (lambda maps: [maps[0], maps[1].to_dense()], "levels[1]"),
        (lambda maps: [maps[0], maps[1].double()], "levels[1]"),
        (lambda maps: [maps[0], level_maps(batch_size=3)[1]], "levels[1]"),
        (lambda maps: [maps[0], torch.rand(2, 4, 5).to_sparse(2)], "levels[1]"),
        (lambda maps: [maps[0], torch.rand(2, 3, 3, 7).to_sparse(3)], "levels[1]"),
        (lambda maps: [maps[0], torch.rand(2, 3, 5).to_sparse(2)], "levels[1]"),
        (lambda maps: [torch.rand(2, 3, 3, 5).to_sparse(2)], "levels[0]"),
        (lambda maps: [maps[0], maps[1].to("meta")], "levels[1]"),
    ],
)
def test_from_levels_refusals(change: Any, argument: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        FeaturePyramid.from_levels(change(level_maps()))
    assert str(refusal.value).startswith(f"{argument}:")


# -------------------------------------------------------------------------------- from_points


@st.composite
def clouds(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], int, list[int]]:
    """Coordinates ``[n, P + 1]``, many of them equal, and the grid, batch and strides they fit."""
    dim = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dim))
    batch_size = draw(st.integers(1, 3))
    row = st.tuples(st.integers(0, batch_size - 1), *[st.integers(0, s - 1) for s in shape])
    rows = draw(st.lists(row, max_size=25))
    strides = draw(st.lists(st.integers(1, 11), min_size=1, max_size=3))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, dim + 1), shape, batch_size, strides


def pool_by_hand(
    coordinates: Tensor, values: Tensor, strides: list[int], pooling: Pooling
) -> dict[tuple[int, ...], Tensor]:
    """(image, *cell, level) -> pooled values, differentiable."""
    cells: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
    for (image, *cell), value in zip(coordinates.tolist(), values, strict=True):
        for level, stride in enumerate(strides):
            cells[(image, *[x // stride for x in cell], level)].append(value)
    return {
        key: torch.stack(rows).mean(0) if pooling == "mean" else torch.stack(rows).amax(0)
        for key, rows in cells.items()
    }


@pytest.mark.parametrize("pooling", ["mean", "max"])
@given(cloud=clouds())
def test_pooling(pooling: Pooling, cloud: tuple[Tensor, tuple[int, ...], int, list[int]]) -> None:
    coordinates, shape, batch_size, strides = cloud
    torch.manual_seed(0)
    values = torch.randn(len(coordinates), 2, dtype=torch.float64, requires_grad=True)
    pyramid = FeaturePyramid.from_points(
        coordinates, values, shape, batch_size, strides=strides, pooling=pooling
    )
    multiple = math.lcm(*strides)
    assert pyramid.level_shapes == tuple(
        tuple(-(-size // multiple) * multiple // stride for size in shape) for stride in strides
    )
    assert pyramid.batch_size == batch_size
    by_hand = pool_by_hand(coordinates, values, strides, pooling)
    keys = [tuple(row) for row in pyramid.coordinates.tolist()]
    # Sorted by image, then level, then cell.
    assert keys == sorted(by_hand, key=lambda key: (key[0], key[-1], key[1:-1]))
    expected = torch.stack([by_hand[key] for key in keys]) if keys else values[:0]
    assert_close(pyramid.values.detach(), expected.detach(), 1e-14)
    if keys:
        weights = torch.randn_like(expected)
        (actual_grad,) = torch.autograd.grad((pyramid.values * weights).sum(), values)
        (expected_grad,) = torch.autograd.grad((expected * weights).sum(), values)
        assert_close(actual_grad, expected_grad, 1e-13)


def test_default_strides() -> None:
    coordinates = torch.tensor([[0, 0, 0], [0, 9, 4]])
    pyramid = FeaturePyramid.from_points(coordinates, torch.rand(2, 3), (10, 7), 1)
    assert pyramid.level_shapes == ((16, 8), (8, 4), (4, 2), (2, 1))
    assert pyramid.cells.tolist()[1::2] == [[9, 4], [4, 2], [2, 1], [1, 0]]


POINTS: dict[str, Any] = {
    "coordinates": torch.tensor([[0, 0, 0], [1, 5, 3]]),
    "values": torch.rand(2, 3),
    "spatial_shape": (6, 4),
    "batch_size": 2,
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("pooling", "median"),
        ("strides", ()),
        ("strides", (1, 0)),
        ("strides", (1, 2.0)),
        ("spatial_shape", (6, 0)),
        ("spatial_shape", ()),
        ("spatial_shape", (6.0, 4.0)),
        ("coordinates", torch.tensor([[0, 0], [1, 5]])),
        ("coordinates", torch.tensor([0, 0, 0])),
        ("coordinates", torch.zeros(2, 3)),
        ("coordinates", torch.tensor([[0, 0, 0], [2, 5, 3]])),
        ("coordinates", torch.tensor([[0, 0, 0], [-1, 5, 3]])),
        ("coordinates", torch.tensor([[0, 0, 0], [1, 6, 3]])),
        ("coordinates", torch.tensor([[0, 0, -1], [1, 5, 3]])),
        ("coordinates", POINTS["coordinates"].to("meta")),
        ("values", torch.rand(2)),
        ("values", torch.ones(2, 3, dtype=torch.bool)),
        ("batch_size", -1),
        ("batch_size", 2.0),
    ],
)
def test_from_points_refusals(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        FeaturePyramid.from_points(**POINTS | {argument: value})
    assert argument in str(refusal.value).split(":")[0]


# ----------------------------------------------------------------------------------- refusals

PYRAMID: dict[str, Any] = {
    "values": torch.rand(2, 3),
    "coordinates": torch.tensor([[0, 0, 0, 0], [1, 5, 3, 1]]),
    "level_shapes": [(3, 2), (6, 4)],
    "batch_size": 2,
}


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("values", torch.rand(2), "[2]"),
        ("values", torch.ones(2, 3, dtype=torch.bool), "bool"),
        ("values", torch.rand(2, 3).to_sparse(), "sparse_coo"),
        ("coordinates", torch.zeros(2, 4), "float32"),
        ("coordinates", torch.zeros(3, 4, dtype=torch.int64), "[3, 4]"),
        ("coordinates", torch.zeros(2, 3, dtype=torch.int64), "[2, 3]"),
        ("coordinates", torch.zeros(2, 4, dtype=torch.bool), "bool"),
        ("coordinates", PYRAMID["coordinates"].to("meta"), "meta"),
        ("coordinates", torch.tensor([[0, 0, 0, 0], [2, 5, 3, 1]]), "2"),
        ("coordinates", torch.tensor([[0, 0, 0, 0], [-1, 5, 3, 1]]), "-1"),
        ("coordinates", torch.tensor([[0, 0, 0, 0], [1, 5, 3, 2]]), "2"),
        ("coordinates", torch.tensor([[0, 0, 0, 0], [1, 5, 3, -1]]), "-1"),
        ("coordinates", torch.tensor([[0, 0, 0, 0], [1, 6, 3, 1]]), "cell [6, 3] at level 1"),
        ("coordinates", torch.tensor([[0, 0, 0, 0], [1, 5, -2, 1]]), "cell [5, -2] at level 1"),
        # Inside the full shape, outside its own level's.
        ("coordinates", torch.tensor([[0, 5, 3, 0], [1, 5, 3, 1]]), "cell [5, 3] at level 0"),
        ("level_shapes", [(3, 2), (6,)], "(6,)"),
        ("level_shapes", [(3, 2), (6, 0)], "0"),
        ("level_shapes", [], "[]"),
        ("level_shapes", torch.tensor([3, 2]), "[2]"),
        ("batch_size", -1, "-1"),
        ("batch_size", 2.5, "2.5"),
    ],
)
def test_pyramid_refusals(argument: str, value: object, came: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        FeaturePyramid(**PYRAMID | {argument: value})
    message = str(refusal.value)
    assert message.startswith(argument)
    assert came in message.split("got")[-1]


def test_contents_are_unchecked_only_on_request() -> None:
    beyond = torch.tensor([[0, 0, 0, 0], [1, 99, 3, 1]])
    with pytest.raises(ValueError, match="coordinates"):
        FeaturePyramid(**PYRAMID | {"coordinates": beyond}, check_contents=True)
    pyramid = FeaturePyramid(**PYRAMID | {"coordinates": beyond}, check_contents=False)
    assert pyramid.misplaced().tolist() == [False, True]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (lambda coo: coo.to_dense(), "stacked_feature_maps"),
        (lambda coo: coo.to_dense().to_sparse(), "stacked_feature_maps"),
        (lambda coo: coo.to_dense().to_sparse(3), "stacked_feature_maps"),
        (lambda coo: coo.to_dense()[..., 0].to_sparse(3), "stacked_feature_maps"),
        (lambda coo: torch.cat((coo.to_dense(),) * 2, 1).to_sparse(4), "stacked_feature_maps"),
        (lambda coo: torch.cat((coo.to_dense(),) * 2, 3).to_sparse(4), "stacked_feature_maps"),
        (lambda coo: coo.to_dense().flatten(1, 2).to_sparse(3), "stacked_feature_maps"),
    ],
)
def test_from_coo_refusals(change: Any, argument: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        FeaturePyramid.from_coo(change(sparse_map()), SHAPES)
    assert str(refusal.value).startswith(argument)


def test_a_map_of_another_size_is_taken_if_its_points_are_inside() -> None:
    coo = sparse_map()
    expected = FeaturePyramid.from_coo(coo, SHAPES)
    parts = coo.indices(), coo.values()
    largest = torch.sparse_coo_tensor(*parts, (3, 20, 9, 4, 3), check_invariants=True)
    inferred = torch.sparse_coo_tensor(*parts, check_invariants=True)
    for other in (largest, inferred):
        pyramid = FeaturePyramid.from_coo(other, SHAPES)
        assert torch.equal(pyramid.coordinates, expected.coordinates)
        assert torch.equal(pyramid.values, expected.values)


# ------------------------------------------------------------------------------------ strides


@pytest.mark.parametrize(
    "strides", [(1, 2, 4, 8), (2, 4, 8), [(1, 3), (2, 6), (5, 1)], (3, 4), [(2, 3, 1)], 8]
)
def test_points_lie_in_the_window_centers_of_what_they_were_pooled_into(strides: Any) -> None:
    dim = 3 if strides == [(2, 3, 1)] else 2
    for sizes in [(500, 513, 7)[:dim], (1, 30, 2)[:dim]]:
        cells = torch.stack([torch.randint(0, size, (200,)) for size in sizes], 1)
        points = torch.nn.functional.pad(cells, (1, 0))
        pyramid = FeaturePyramid.from_points(
            points, torch.rand(200, 1), sizes, 1, strides=strides, keep_point_rows=True
        )
        assert pyramid.strides is not None
        assert pyramid.point_rows is not None
        least = torch.tensor(pyramid.strides).amin(0)
        for level, stride in enumerate(torch.tensor(pyramid.strides)):
            rows = pyramid.point_rows[:, level]
            assert (pyramid.levels[rows] == level).all()
            assert torch.equal(pyramid.cells[rows], cells // stride)
            centers = (pyramid.cells[rows] + 0.5) * stride / least
            torch.testing.assert_close(pyramid.positions()[rows].double(), centers.double())
            extent = torch.tensor(pyramid.level_shapes[level]) * stride
            assert torch.equal(
                extent, torch.tensor(pyramid.level_shapes[0]) * torch.tensor(pyramid.strides[0])
            )


def test_a_scene_does_not_depend_on_the_size_of_its_grid() -> None:
    points = torch.nn.functional.pad(torch.randint(0, 500, (300, 2)), (1, 0))
    values = torch.rand(300, 2)
    first, *others = (
        FeaturePyramid.from_points(points, values, (size, size), 1, strides=(1, 2, [4, 8]))
        for size in (500, 504, 512, 704)
    )
    for other in others:
        assert torch.equal(first.coordinates, other.coordinates)
        assert torch.equal(first.values, other.values)
        assert torch.equal(first.positions(), other.positions())


def test_strides_of_maps_of_padded_convolutions() -> None:
    # 500 raw cells, of which convolutions with padding make 251, 126 and 64.
    sides, strides = (500, 251, 126, 64), (1, 2, 4, 8)
    levels = []
    for side in sides:
        indices = torch.tensor([[0, side - 1, 3]]).t()
        size = (1, side, side, 2)
        level = torch.sparse_coo_tensor(indices, torch.rand(1, 2), size, check_invariants=True)
        levels.append(level)
    pyramid = FeaturePyramid.from_levels(levels, strides=strides)
    assert pyramid.level_shapes == tuple((512 // stride,) * 2 for stride in strides)
    expected = [(side - 0.5) * stride for side, stride in zip(sides, strides, strict=True)]
    assert pyramid.positions()[:, 0].tolist() == expected
    stacked = torch.sparse_coo_tensor(
        pyramid.coordinates.t(), pyramid.values, (1, 500, 500, 4, 2), check_invariants=False
    )
    for shapes in (None, [(side, side) for side in sides]):
        same = FeaturePyramid.from_coo(stacked, shapes, strides=strides)
        assert sorted(same.positions().tolist()) == sorted(pyramid.positions().tolist())


@pytest.mark.parametrize("strides", [(1, 3), (1, 3, 6, 12), (1, 7), (1, 11)])
def test_windows_of_large_maps_are_centered_on_what_points_were_pooled_into(strides: Any) -> None:
    side = 8_388_000
    cells = torch.arange(side - 3000, side)[:, None]
    points = torch.nn.functional.pad(cells, (1, 0))
    pyramid = FeaturePyramid.from_points(
        points, torch.ones(3000, 1), (side,), 1, strides=strides, keep_point_rows=True
    )
    assert pyramid.point_rows is not None
    positions = pyramid.positions(torch.float32)[pyramid.point_rows[:, 0]]
    centers, *_ = get_multilevel_neighborhoods(positions, pyramid.level_shapes, [1] * len(strides))
    for level, stride in enumerate(strides):
        assert torch.equal(centers[:, level, 0], cells[:, 0] // stride)


def test_a_periodic_axis_is_not_padded_by_strides() -> None:
    def make_map(side: int) -> Tensor:
        size = (1, side, 2)
        return torch.sparse_coo_tensor(
            torch.tensor([[0], [side - 1]]), torch.rand(1, 2), size, check_invariants=True
        )

    with pytest.raises(ValueError, match="levels: expected"):
        FeaturePyramid.from_levels([make_map(40), make_map(21)], strides=(1, 2), periodic_axes=(0,))
    pyramid = FeaturePyramid.from_levels(
        [make_map(40), make_map(20)], strides=(1, 2), periodic_axes=(0,)
    )
    assert pyramid.level_shapes == ((40,), (20,))
    padded = torch.sparse_coo_tensor(
        pyramid.coordinates.t(), pyramid.values, (1, 48, 2, 2), check_invariants=True
    )
    same = FeaturePyramid.from_coo(padded, [(40,), (20,)], strides=(1, 2), periodic_axes=(0,))
    assert same.level_shapes == ((40,), (20,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_counts_do_not_overflow(dtype: torch.dtype) -> None:
    points = torch.zeros(40_000, 3, dtype=torch.int64)
    ones = torch.ones(40_000, 1, dtype=dtype)
    pyramid = FeaturePyramid.from_points(points, ones, (4, 4), 1, strides=1, pooling="sum")
    assert pyramid.values.tolist() == [[40_000]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_half_precisions_are_pooled_in_float32(dtype: torch.dtype, pooling: Pooling) -> None:
    points, values = torch.zeros(6_000, 3, dtype=torch.int64), torch.rand(6_000, 2)
    made = {
        kind: FeaturePyramid.from_points(
            points, values.to(dtype).to(kind), (4, 4), 1, strides=1, pooling=pooling
        ).values
        for kind in (dtype, torch.float32)
    }
    assert torch.equal(made[dtype], made[torch.float32].to(dtype))


def test_sums_beyond_the_range_of_their_dtype_are_infinite() -> None:
    for n, total in ((65_519, 65_504), (65_520, math.inf)):
        points, ones = torch.zeros(n, 3, dtype=torch.int64), torch.ones(n, 1).half()
        pyramid = FeaturePyramid.from_points(points, ones, (4, 4), 1, strides=1, pooling="sum")
        assert pyramid.values.item() == total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions_that_share_a_cell_are_added_in_float32(dtype: torch.dtype) -> None:
    n = 3_000
    indices, ones = torch.zeros(4, n, dtype=torch.int64), torch.ones(n, 1, dtype=dtype)
    ones.requires_grad_()
    expected = torch.tensor(float(n)).to(dtype)
    coo = sparse_coo(indices, ones, (1, 4, 4, 1, 1))
    level = sparse_coo(indices[:3], ones, (1, 4, 4, 1))
    points = FeaturePyramid(ones, indices.t(), ((4, 4),), 1)
    for values in (
        FeaturePyramid.from_coo(coo, [(4, 4)]).values,
        FeaturePyramid.from_levels([level]).values,
        points.to_coo().values(),
    ):
        assert values.dtype == dtype
        assert values.item() == expected
        (gradient,) = torch.autograd.grad(values.sum(), ones)
        assert torch.equal(gradient, torch.ones_like(ones))
    assert points.to_coo().is_coalesced()


def test_sums_and_means_of_integers() -> None:
    points = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 5, 5]])
    counts = torch.tensor([[3], [4], [2**40 + 1]])
    made = {
        pooling: FeaturePyramid.from_points(
            points, counts, (6, 6), 1, strides=2, pooling=pooling
        ).values
        for pooling in ("sum", "mean", "max")
    }
    assert made["sum"].tolist() == [[7], [2**40 + 1]]
    assert made["max"].tolist() == [[4], [2**40 + 1]]
    assert made["mean"][0].item() == 3.5


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.float8_e4m3fn])
def test_points_of_the_rarer_dtypes(dtype: torch.dtype) -> None:
    cells = torch.tensor([[0, 1], [0, 1], [0, 2]])
    values = torch.tensor([[1.0], [2.0], [4.0]]).to(dtype)
    pyramid = FeaturePyramid.from_points(cells, values, (4,), 1, strides=1, pooling="sum")
    assert pyramid.values.float().tolist() == [[3], [4]]
    if not dtype.is_floating_point:
        size = (1, 4, 1)
        coo = torch.sparse_coo_tensor(cells.t(), values, size, check_invariants=True)
        assert FeaturePyramid.from_levels([coo]).values.tolist() == [[3], [4]]


def test_strides_that_do_not_belong_to_the_level_shapes_are_refused() -> None:
    wrong: Any
    for wrong in [(1, 3), (1,), (1, 2, 4), (0, 1)]:
        with pytest.raises(ValueError, match=r"^strides: expected"):
            FeaturePyramid(**PYRAMID | {"level_shapes": [(6, 4), (3, 2)]}, strides=wrong)


def test_positions_of_large_maps_lie_in_their_own_cells() -> None:
    for power in (22, 23, 24, 30, 40):
        side = 2**power
        cells = torch.tensor([[0, 0, 0, 0], [0, side - 1, side - 2, 0], [0, side // 2 - 1, 0, 1]])
        shapes = ((side, side), (side // 2, side // 2))
        pyramid = FeaturePyramid(torch.rand(3, 1), cells, shapes, 1)
        positions = pyramid.positions(torch.float16)
        scales = torch.tensor([[1.0], [1.0], [0.5]])
        assert torch.equal((positions * scales).floor().long(), pyramid.cells)
        assert positions.dtype == (torch.float32 if power <= 23 else torch.float64)


@given(scenes(max_dim=4))
def test_random_round_trip(scene: Scene) -> None:
    pyramid = scene.pyramid
    back = FeaturePyramid.from_coo(pyramid.to_coo(), pyramid.level_shapes)
    assert (back.level_shapes, back.batch_size) == (pyramid.level_shapes, pyramid.batch_size)
    sums: dict[tuple[int, ...], Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    for key, value in zip(pyramid.coordinates.tolist(), pyramid.values, strict=True):
        sums[tuple(key)] = sums[tuple(key)] + value
    keys = [tuple(row) for row in back.coordinates.tolist()]
    assert keys == sorted(sums)
    for key, value in zip(keys, back.values, strict=True):
        assert_close(value, sums[key], 1e-13)


# --------------------------------------------------------------------------- more integers


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_coordinates_of_any_integer_type(dtype: torch.dtype) -> None:
    scene = scene_2d()
    narrow = FeaturePyramid(scene.pyramid.values, scene.pyramid.coordinates.to(dtype), SHAPES, 3)
    assert_close(narrow.positions(torch.float64), scene.pyramid.positions(torch.float64), 1e-14)
    assert torch.equal(narrow.to_coo().to_dense(), scene.pyramid.to_coo().to_dense())
    assert Scene(scene.positions, scene.offsets, narrow, scene.sizes).plan().pairs().tolist() == (
        scene.plan().pairs().tolist()
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_points_of_any_integer_type(dtype: torch.dtype) -> None:
    coordinates = torch.tensor([[0, 0, 0], [1, 99, 49], [1, 98, 48], [0, 17, 31]])
    values = torch.rand(4, 3)
    wide = FeaturePyramid.from_points(coordinates, values, (100, 50), 2)
    narrow = FeaturePyramid.from_points(coordinates.to(dtype), values, (100, 50), 2)
    assert narrow.coordinates.tolist() == wide.coordinates.tolist()
    assert torch.equal(narrow.values, wide.values)


def test_cells_of_a_grid_of_more_than_2_to_the_32_stay_apart() -> None:
    # Row-major numbers of these two cells are equal modulo 2^32.
    coordinates = torch.tensor([[0, 0, 0], [0, 61356, 47296]], dtype=torch.int32)
    pyramid = FeaturePyramid.from_points(
        coordinates, torch.rand(2, 3), (70000, 70000), 1, strides=(1,)
    )
    assert pyramid.cells.tolist() == [[0, 0], [61356, 47296]]


def test_cells_of_a_grid_of_more_than_2_to_the_64_stay_apart() -> None:
    # Such a grid may be refused, but its cells must not be taken for one another.
    side = 2**22
    coordinates = torch.tensor([[0, 0, 0, 0], [0, 2**20, 0, 0]])
    with contextlib.suppress(ValueError):
        pyramid = FeaturePyramid.from_points(
            coordinates, torch.rand(2, 3), (side, side, side), 1, strides=(1,)
        )
        assert pyramid.cells.tolist() == coordinates[:, 1:].tolist()


def test_from_coo_names_the_map_that_holds_a_point_outside_its_level() -> None:
    indices = torch.tensor([[0], [8], [7], [0]])  # level 0 is 6 x 4
    coo = sparse_coo(indices, torch.rand(1, 3), (1, 9, 8, 3, 3)).coalesce()
    with pytest.raises(ValueError, match=r"stacked_feature_maps: .*\[8, 7\] at level 0"):
        FeaturePyramid.from_coo(coo, SHAPES)
    unchecked = FeaturePyramid.from_coo(coo, SHAPES, check_contents=False)
    assert unchecked.misplaced().all()


def test_arrays_and_their_numbers_are_taken() -> None:
    points: Any = np.array([[0, 2, 3], [0, 5, 5], [1, 5, 4]], dtype=np.int16)
    values: Any = np.arange(6, dtype=np.float32).reshape(3, 2)
    arguments: dict[str, Any] = {
        "spatial_shape": np.array([8, 8]),
        "batch_size": np.int64(2),
        "strides": np.array([1, 2]),
        "origin": np.array([0.5, 1.0]),
        "cell_size": np.float32(0.25),
        "periodic_axes": np.array([1]),
    }
    pyramid = FeaturePyramid.from_points(points, values, **arguments)
    same = FeaturePyramid.from_points(
        torch.tensor(points),
        torch.tensor(values),
        torch.Size([8, 8]),
        2,
        strides=(1, 2),
        periodic_axes=(1,),
    )
    assert torch.equal(pyramid.values, same.values)
    assert torch.equal(pyramid.coordinates, same.coordinates)
    assert (pyramid.origin, pyramid.cell_size) == ((0.5, 1.0), (0.25, 0.25))
    assert (pyramid.periodic_axes, pyramid.strides) == (same.periodic_axes, same.strides)
    stored: list[Any] = [pyramid.values.numpy(), pyramid.coordinates.numpy()]
    shapes: Any = np.array(pyramid.level_shapes)
    n_images: Any = np.int32(2)
    again = FeaturePyramid(stored[0], stored[1], shapes, n_images)
    assert torch.equal(again.positions(), same.positions())
    assert torch.equal(again.with_values(stored[0]).values, same.values)


@pytest.mark.parametrize("n_values", [1, 4])
def test_values_for_other_points_are_named(n_values: int) -> None:
    wrong = torch.ones(n_values, 2)
    with pytest.raises(ValueError, match="values"):
        FeaturePyramid.from_points(torch.tensor([[0, 1, 1], [0, 2, 2]]), wrong, (4, 4), 1)
    pyramid = FeaturePyramid(torch.ones(2, 2), torch.tensor([[0, 1, 0], [0, 2, 0]]), ((4,),), 1)
    with pytest.raises(ValueError, match="values"):
        pyramid.with_values(wrong)


@pytest.mark.parametrize("levels", [None, torch.ones(1, 4, 4, 3), np.ones((1, 4, 4, 3)), 3])
def test_levels_that_are_no_sequence_are_refused(levels: Any) -> None:
    with pytest.raises(ValueError, match="levels"):
        FeaturePyramid.from_levels(levels)


@pytest.mark.parametrize("dtype", ["float32", torch.int64, None])
def test_positions_of_no_floating_dtype_are_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="dtype"):
        scene_2d().pyramid.positions(dtype)


@pytest.mark.parametrize("rows", [(0, 1), (1, 0)])
def test_unchecked_points_outside_the_grid_affect_no_other(rows: tuple[int, int]) -> None:
    """As on a GPU by default."""
    coordinates, values = torch.tensor([[0, 16, 1], [1, 0, 1]]), torch.tensor([[100.0], [1.0]])
    pyramid = FeaturePyramid.from_points(
        coordinates[list(rows)], values[list(rows)], (16, 16), 2, strides=(1, 2),
        keep_point_rows=True, check_contents=False,
    )  # fmt: skip
    assert pyramid.coordinates.tolist() == [[1, 0, 1, 0], [1, 0, 0, 1]]
    assert pyramid.values.tolist() == [[1], [1]]
    assert pyramid.point_rows is not None
    assert pyramid.point_rows[rows.index(0)].tolist() == [-1, -1]
    assert pyramid.point_rows[rows.index(1)].tolist() == [0, 1]
    assert pyramid.values_of_points(0).flatten().tolist() == [[0, 1], [1, 0]][rows[0]]


def test_unchecked_points_outside_the_map_are_left_out_of_it() -> None:
    coordinates = torch.tensor([[0, 4, 0, 0], [1, 0, 0, 0], [0, 4_000_000, 0, 0]])
    values = torch.tensor([[100.0], [1.0], [10.0]])
    pyramid = FeaturePyramid(values, coordinates, ((4, 4),), 2, check_contents=False)
    coo = pyramid.to_coo()
    assert coo.indices().t().tolist() == [[1, 0, 0, 0]]
    assert coo.values().tolist() == [[1]]
    assert coo.to_dense().sum() == 1


def test_misplaced_points_stay_misplaced_in_a_batch() -> None:
    row = torch.tensor([[0, 1, 1, 0]])
    good = FeaturePyramid(torch.ones(1, 2), row, ((8, 8),), 1, strides=((1, 1),))
    rows = torch.tensor([[0, 1, 1, 0], [1, 1, 2, 0], [0, 5, 5, 0]])
    bad = FeaturePyramid(torch.ones(3, 2), rows, ((4, 4),), 1, False, strides=((1, 1),))
    joined = FeaturePyramid.cat([bad, good])
    assert joined.misplaced().tolist() == [False, True, True, False]


def test_batch_offsets_leave_out_images_that_are_none() -> None:
    rows = torch.tensor([[-1, 0, 0], [0, 1, 0], [0, 2, 0], [9, 3, 0]])
    pyramid = FeaturePyramid(torch.ones(4, 2), rows, ((4,),), 2, check_contents=False)
    assert pyramid.batch_offsets().tolist() == [1, 3, 3]


def test_a_number_to_fill_that_the_values_do_not_hold() -> None:
    cells = torch.zeros(1, 2, dtype=torch.int64)
    values = torch.ones(1, 1, dtype=torch.uint8)
    pyramid = FeaturePyramid.from_points(
        cells, values, (4,), 1, strides=1, pooling="max", keep_point_rows=True
    )
    with pytest.raises(ValueError, match=r"fill: expected a number that torch.uint8 holds, got"):
        pyramid.values_of_points(fill=300)
