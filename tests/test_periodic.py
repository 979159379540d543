"""Periodic axes: windows, plans and attention across the seam of a map."""

import itertools
from typing import Any

import pytest
import torch
from problems import Scene, assert_close, make_inputs, plan_by_triton
from torch import Tensor

from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    get_multilevel_neighborhoods,
    neighborhood_attention,
    neighborhood_attention_weights,
    plan_neighborhoods,
)
from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend

SHAPE, STRIDES, SIZES = (12, 9), ((1, 1), (2, 3)), [5, 3]
EPSILON = torch.finfo(torch.float64).eps


def random_pyramid(axes: tuple[int, ...], batch_size: int = 2) -> FeaturePyramid:
    cells = torch.stack([torch.randint(0, size, (90,)) for size in SHAPE], 1)
    points = torch.cat((torch.randint(0, batch_size, (90, 1)), cells), 1)
    return FeaturePyramid.from_points(
        points, torch.randn(90, 4), SHAPE, batch_size, strides=STRIDES, periodic_axes=axes
    )


def random_plan(axes: tuple[int, ...]) -> tuple[Tensor, FeaturePyramid, NeighborhoodPlan]:
    pyramid = random_pyramid(axes)
    positions = torch.rand(30, 2, dtype=torch.float64) * 40 - 14  # also far outside
    plan = plan_neighborhoods(positions, torch.tensor([0, 17, 30]), pyramid, SIZES)
    return positions, pyramid, plan


def expected_pairs(
    positions: Tensor, pyramid: FeaturePyramid, axes: tuple[int, ...]
) -> set[tuple[int, int]]:
    """All (query, point) pairs, from the distance of their cells along each axis."""
    pairs = set()
    full = pyramid.level_shapes[0]
    for query, point in itertools.product(range(len(positions)), range(len(pyramid))):
        image, *cell, level = pyramid.coordinates[point].tolist()
        shape, radius = pyramid.level_shapes[level], SIZES[level] // 2
        if image != int(query >= 17):
            continue
        near = True
        for axis, size in enumerate(shape):
            position = positions[query, axis].item()
            if axis in axes:
                position %= full[axis]
            distance = abs(int(position * size // full[axis]) - cell[axis])
            if axis in axes:
                distance = min(distance, size - distance)
            near &= distance <= radius
        if near:
            pairs.add((query, point))
    return pairs


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
def test_a_plan_finds_points_across_the_seam(axes: tuple[int, ...]) -> None:
    positions, pyramid, plan = random_plan(axes)
    if not axes:
        positions = positions.clamp(-0.9)
        plan = plan_neighborhoods(positions, torch.tensor([0, 17, 30]), pyramid, SIZES)
    wanted = expected_pairs(positions.floor().clamp(-1) if not axes else positions, pyramid, axes)
    pairs = list(map(tuple, plan.pairs().tolist()))
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == wanted
    assert (len(plan.copies.points) > 0) == bool(axes)


@pytest.mark.parametrize("axes", [(0,), (0, 1)])
def test_neighborhoods_are_wrapped_and_never_outside(axes: tuple[int, ...]) -> None:
    positions = torch.tensor([[0.2, 8.9], [-1e-20, 4.0], [24.5, -9.5]])
    shapes = [(12, 9), (6, 3)]
    cells, outside, levels = get_multilevel_neighborhoods(
        positions, shapes, SIZES, periodic_axes=axes
    )
    assert cells[0, :5, 0].tolist() == [10] * 5
    assert cells[1, 12].tolist() == [0, 4]  # the remainder of -1e-20 is rounded to F
    assert cells[2, 12, 0] == 0
    for axis in axes:
        sizes = torch.tensor(shapes)[levels, axis]
        assert ((cells[..., axis] >= 0) & (cells[..., axis] < sizes)).all()
    assert outside.any() == (axes == (0,))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("axes", [(0,), (0, 1)])
@pytest.mark.parametrize("background", [False, True])
def test_attention_across_the_seam_equals_that_of_a_rotated_map(
    background: bool, axes: tuple[int, ...], backend: BackendName
) -> None:
    positions, pyramid, _ = random_plan(axes)
    shift = torch.tensor([6, 6 if 1 in axes else 0])
    strides = torch.tensor(STRIDES)[pyramid.levels]
    sizes = torch.tensor(pyramid.level_shapes)[pyramid.levels]
    moved = pyramid.coordinates.clone()
    moved[:, 1:-1] = (moved[:, 1:-1] + shift // strides) % sizes
    turned = FeaturePyramid(
        pyramid.values, moved, pyramid.level_shapes, 2, strides=STRIDES, periodic_axes=axes
    )
    answers = []
    for where, points in ((positions, pyramid), (positions + shift, turned)):
        plan = plan_neighborhoods(where, torch.tensor([0, 17, 30]), points, SIZES)
        inputs = make_inputs(plan, heads=2, background=background)
        leaves = [leaf.requires_grad_() for leaf in inputs.leaves()]
        keys, values, cells = (
            plan.append_copies(inputs.k),
            plan.append_copies(inputs.v),
            inputs.background,
        )
        out = neighborhood_attention(
            inputs.q, keys, values, plan, background=cells, backend=backend
        )
        offsets, rows, factors, _ = neighborhood_attention_weights(
            inputs.q, keys, plan, background=cells
        )
        weights = torch.zeros(30, len(pyramid), 2, dtype=torch.float64)
        weights[torch.repeat_interleave(offsets.diff()), rows] = factors.detach()
        grads = torch.autograd.grad(out.square().sum(), leaves)
        answers.append([out, weights, *grads])
    for ours, theirs in zip(*answers, strict=True):
        assert theirs.any()
        # Sums of at most 90 terms in another order.
        assert_close(ours, theirs, 100 * EPSILON * max(1.0, float(theirs.detach().abs().max())))


def test_a_plan_with_copies_moves_between_devices() -> None:
    _, _, plan = random_plan((0,))
    moved = plan.to("meta")
    assert moved.copies.points.device.type == "meta"
    assert moved.n_keys == plan.n_keys > plan.n_points


@pytest.mark.parametrize("axes", [(2,), (-1,), (0, 0), 0, "0", (0.5,)])
def test_wrong_axes_are_refused(axes: Any) -> None:
    with pytest.raises(ValueError, match="periodic_axes"):
        FeaturePyramid.from_points(
            torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 2), SHAPE, 1, strides=(1,),
            periodic_axes=axes,
        )  # fmt: skip


def test_a_periodic_axis_is_not_padded() -> None:
    points = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="multiple"):
        FeaturePyramid.from_points(points, torch.ones(1, 2), (11, 9), 1, periodic_axes=(0,))
    pyramid = FeaturePyramid.from_points(
        points, torch.ones(1, 2), (16, 9), 1, strides=(1, 2), periodic_axes=(0,)
    )
    assert pyramid.level_shapes == ((16, 10), (8, 5))


def test_a_window_wider_than_a_periodic_axis_is_refused() -> None:
    pyramid = random_pyramid((1,))
    positions, offsets = pyramid.positions(), pyramid.batch_offsets()
    with pytest.raises(ValueError, match="neighborhood_sizes"):
        plan_neighborhoods(positions, offsets, pyramid, [5, 5])
    with pytest.raises(ValueError, match="neighborhood_sizes"):
        get_multilevel_neighborhoods(positions, [(12, 9), (6, 3)], [5, 5], periodic_axes=(1,))


def test_the_cpu_back_end_is_what_the_tests_above_use() -> None:
    assert choose_backend("cpu", torch.device("cpu")) is not choose_backend(
        "reference", torch.device("cpu")
    )


@pytest.mark.parametrize("axes", [(), (0,)])
def test_copies_are_appended_to_a_row_per_point_alone(axes: tuple[int, ...]) -> None:
    _, pyramid, plan = random_plan(axes)
    values = torch.randn(len(pyramid), 3)
    appended = plan.append_copies(values)
    assert torch.equal(appended, values[plan.points_of_keys(torch.arange(plan.n_keys))])
    wrong: Any
    for wrong in (values[1:], torch.cat((values, values)), values[0, 0], values.to("meta"), None):
        with pytest.raises(ValueError, match="values: expected"):
            plan.append_copies(wrong)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("size", [31, 32, 33])
def test_a_query_that_is_nowhere_sees_no_copy(size: int, value: str) -> None:
    points = torch.nn.functional.pad(torch.arange(size)[:, None], (1, 1))
    pyramid = FeaturePyramid(torch.ones(size, 1), points, ((size,),), 1, periodic_axes=(0,))
    positions = torch.tensor([[float(value)], [0.5]])
    scene = Scene(positions, torch.tensor([0, 2]), pyramid, (3,))
    plans = [
        scene.plan(check_contents=False),
        plan_by_triton(scene, torch.device("cpu"), check_contents=False),
    ]
    for plan in plans:
        assert sorted(plan.pairs().tolist()) == [[1, 0], [1, 1], [1, size - 1]]
        assert plan.counts().tolist() == [0, 3]
