"""Plans that Triton's kernels make are those of plain torch, bit by bit.

On a GPU if there is one, else in Triton's interpreter, so on small problems.
"""

import copy
import importlib.util
import math
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from bounds import Checked
from hypothesis import given, settings
from problems import (
    OwnOps,
    Scene,
    Shapes,
    forged,
    make_scene,
    opcheck,
    plan_by_triton,
    scene_2d,
    scenes,
)
from torch import Tensor

from vicinal import FeaturePyramid, NeighborhoodPlan, Window, backends, plan_neighborhoods
from vicinal._index.kernel_tables import KernelTables, kernel_tables
from vicinal.nn.block import key_coordinates
from vicinal.nn.plan_checks import check_plan
from vicinal.window_shapes import windows_on_axes
from vicinal.windows import coordinate_dtype

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from vicinal.backends import triton as back_end
from vicinal.backends.triton import ops as triton_ops

# The interpreter computes with NumPy, which warns about values that kernels mask.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("runs_by_reference"),
]

DEVICE = torch.device("cpu" if triton_ops.INTERPRETS else "cuda")


def plan_of(scene: Scene, name: str, **options: Any) -> NeighborhoodPlan:
    """The scene's plan on `DEVICE` by a back end: "triton", or "cpu" for plain torch."""
    if name == "triton":
        return plan_by_triton(scene, DEVICE, **options)
    plain = back_end.BACKEND._replace(find_query_slices=None, find_point_slices=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._BACKENDS, "triton", plain)
        return plan_by_triton(scene, DEVICE, **options)


def parts(plan: NeighborhoodPlan) -> Iterator[tuple[str, Tensor]]:
    """All that a plan knows, by name; cells and keys as int64."""
    tensors = plan._tensors
    for side, slices in (("query", tensors.query_slices), ("point", plan._point_slices())):
        yield from ((f"{side} {name}", x) for name, x in zip(slices._fields, slices, strict=True))
    for name in ("query_batch", "first_columns", "point_columns"):
        yield name, getattr(tensors, name)
    for side, cells in (("query", plan._query_cells()), ("point", plan._point_cells())):
        yield from ((f"{side} {name}", x) for name, x in zip(cells._fields, cells, strict=True))
    keyed = plan._keyed_cells
    for name, x in zip(keyed._fields, keyed, strict=True):
        if x is not None:
            yield name, x if x.is_floating_point() else x.long()
    yield from zip(("copies", "shifts"), plan.copies, strict=True)


def tables_of(shapes: Shapes, sizes: Sequence[int | Window], n_images: int = 1) -> KernelTables:
    tables = kernel_tables(shapes, windows_on_axes(sizes, len(shapes[0])), n_images, ())
    assert tables is not None
    return tables


def assert_same_plans(scene: Scene, **options: Any) -> NeighborhoodPlan:
    ours, plain = (plan_of(scene, name, **options) for name in ("triton", "cpu"))
    coordinates = [
        key_coordinates(scene.pyramid.to(DEVICE), plan, coordinate_dtype(scene.positions.dtype))
        for plan in (ours, plain)
    ]
    placed = ours._point_cells().groups[0] >= 0
    assert torch.equal(coordinates[0][placed], coordinates[1][placed])
    assert coordinates[0].isfinite().all()
    for (name, actual), (_, expected) in zip(parts(ours), parts(plain), strict=True):
        assert actual.dtype == expected.dtype, name
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), name
    return ours


@settings(max_examples=40)
@given(scene=scenes(max_dim=4))
def test_any_scene(scene: Scene) -> None:
    assert_same_plans(scene)


PLAIN = {
    "per axis": ((3, 7), (1, 5)),
    "balls": (Window(5, shape="ball"), Window((3, 7), shape="ball")),
    "a ball and a box": (5, Window(7, shape="ball")),
    "without a level": (0, (3, 5)),
    "wider than the map": ((3, 31), (1, 41)),
}


@pytest.mark.parametrize("sizes", PLAIN.values(), ids=PLAIN)
def test_windows_of_other_shapes(sizes: tuple[Any, ...]) -> None:
    scene = make_scene(((9, 7), (5, 4)), sizes, (17, 0, 24), 90)
    called = calls_of(scene)
    assert called.keys() == {"find_query_slices", "find_point_slices"}
    assert assert_same_plans(scene).counts().sum() > 0


@pytest.mark.parametrize(
    "window", [Window(3, dilation=2), Window((3, 4), causal=(False, True)), (5, 1)], ids=repr
)
def test_other_windows_are_planned_in_torch(window: Any) -> None:
    scene = make_scene(((8, 8), (4, 4)), (window, 3), (17, 24), 90)
    assert not calls_of(scene)
    assert_same_plans(scene)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_periodic_axes(axes: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(len(axes))
    cells = torch.stack([torch.randint(0, n, (40,), generator=generator) for n in (12, 9)], 1)
    points = torch.cat((torch.randint(0, 2, (40, 1), generator=generator), cells), 1)
    pyramid = FeaturePyramid.from_points(
        points, torch.zeros(40, 1), (12, 9), 2, strides=((1, 1), (2, 3)), periodic_axes=axes
    )
    positions = torch.rand(30, 2, generator=generator, dtype=dtype) * 40 - 14
    positions[:2] = torch.tensor([[-1e-20, 4.0], [24.5, -9.5]])
    plan = assert_same_plans(Scene(positions, torch.tensor([0, 17, 30]), pyramid, (5, 3)))
    assert len(plan.copies.points)
    assert plan.counts().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_of_positions(dtype: torch.dtype) -> None:
    shapes = ((33, 21), (11, 7), (14, 13))
    assert_same_plans(make_scene(shapes, (5, 3, 1), (40, 0, 23), 90, dtype=dtype))


@pytest.mark.parametrize(
    "scene",
    [
        make_scene(((4, 4),), (3,), (), 0),
        make_scene(((4, 4),), (3,), (0, 0), 9),
        make_scene(((4, 4),), (3,), (0, 7, 0), 0),
        make_scene(((4, 4), (2, 2)), (3, 5), (300,), 3),
        make_scene(((4,), (2,)), (3, 5), (3,), 300),
    ],
)
def test_no_queries_or_points(scene: Scene) -> None:
    assert_same_plans(scene)


def test_images_that_one_side_does_not_name() -> None:
    scene = scene_2d()
    plan = assert_same_plans(
        Scene(scene.positions, torch.tensor([0, 5, 9, 9, 12, 12]), scene.pyramid, scene.sizes)
    )
    assert plan.batch_size == 5
    assert_same_plans(Scene(scene.positions, torch.tensor([0, 12]), scene.pyramid, scene.sizes))


@pytest.mark.parametrize("side", [2**22, 2**29, 2**30])
def test_maps_beyond_int32_keys(side: int) -> None:
    """Centers are computed in float64 there, and keys are int64."""
    scene = make_scene(((side, 50), (side // 2, 25)), (3, 5), (20, 11), 60, dtype=torch.float64)
    assert tables_of(scene.pyramid.level_shapes, scene.sizes, 2).fits(31, 60)
    plan = assert_same_plans(scene)
    assert plan._keyed_cells.query_keys.dtype == torch.int64


def test_small_maps_have_int32_keys() -> None:
    assert plan_of(scene_2d(), "triton")._keyed_cells.query_keys.dtype == torch.int32


def test_maps_beyond_int32_cells_are_planned_in_torch() -> None:
    scene = make_scene(((2**31,),), (3,), (20,), 60)
    assert not tables_of(scene.pyramid.level_shapes, scene.sizes).fits(20, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._BY_DEVICE, DEVICE.type, "triton")
        plan = plan_neighborhoods(
            scene.positions.to(DEVICE), scene.offsets.to(DEVICE), scene.pyramid.to(DEVICE), [3]
        )
    assert sorted(map(tuple, plan.pairs().tolist())) == sorted(scene.pairs())


@pytest.mark.parametrize("n_same", [1, 9, 40])
def test_slices_longer_than_a_window(n_same: int) -> None:
    """Many points in one cell, so that a slice's stop is far from its start."""
    coordinates = torch.tensor([[0, 3, 4, 0], [0, 3, 5, 0], [0, 5, 1, 0]])
    coordinates = torch.cat((coordinates, coordinates[:1].expand(n_same, -1)))
    pyramid = FeaturePyramid(torch.zeros(len(coordinates), 1), coordinates, ((8, 8),), 1)
    positions = torch.tensor([[3.5, 4.5], [3.5, 5.5], [0.5, 0.5], [7.5, 7.5]])
    scene = Scene(positions, torch.tensor([0, 4]), pyramid, (3,))
    assert assert_same_plans(scene).counts().tolist() == [n_same + 2, n_same + 2, 0, 0]


def test_the_same_bits_twice(uninitialized_is_nan: None) -> None:
    scene = make_scene(((9, 7), (5, 4)), (3, 5), (70, 80), 90)
    first, second = (plan_of(scene, "triton") for _ in range(2))
    for (name, left), (_, right) in zip(parts(first), parts(second), strict=True):
        assert torch.equal(left, right), name


def test_strided_positions_and_coordinates() -> None:
    """As the first columns of boxes are."""
    scene = scene_2d(n_queries=20, n_points=30)
    wide = torch.cat((scene.positions, scene.positions.flip(0)), 1)
    plan = plan_of(Scene(wide[:, :2], scene.offsets, scene.pyramid, scene.sizes), "triton")
    transposed = scene.pyramid.coordinates.t().contiguous().t()
    assert not transposed.is_contiguous()
    pyramid = FeaturePyramid(scene.pyramid.values, transposed, scene.pyramid.level_shapes, 3)
    other = plan_of(Scene(scene.positions, scene.offsets, pyramid, scene.sizes), "triton")
    for (name, actual), (_, expected), (_, again) in zip(
        parts(plan), parts(plan_of(scene, "triton")), parts(other), strict=True
    ):
        assert torch.equal(actual, expected), name
        assert torch.equal(again, expected), name


def test_strided_offsets(checked: Checked | None) -> None:
    scene = scene_2d(n_queries=20, n_points=30)
    expected = dict(parts(plan_of(scene, "triton")))
    column = torch.stack((scene.offsets, torch.full_like(scene.offsets, 9)), 1)[:, 0]
    none = torch.zeros(1, dtype=torch.int64).expand(4)
    for offsets in (column, none):
        plan = plan_of(Scene(scene.positions, offsets, scene.pyramid, scene.sizes), "triton",
                       check_contents=False)  # fmt: skip
        if offsets is none:
            assert (plan.query_batch == -1).all()
        else:
            for name, actual in parts(plan):
                assert torch.equal(actual, expected[name]), name


def test_invalid_contents_have_no_neighbors() -> None:
    scene = scene_2d(n_queries=19, n_points=45)
    scene.positions[::5] = math.nan
    scene.positions[1, 1] = math.inf
    scene.positions[2] = -1e30
    scene.positions[3] = 1e30
    coordinates = scene.pyramid.coordinates.clone()
    coordinates[::7, 1] = 10**9
    coordinates[1::7, 2] = -5
    coordinates[2::7, 0] = 77
    coordinates[3::7, -1] = -(2**40)
    shapes = scene.pyramid.level_shapes
    scene.pyramid = FeaturePyramid(
        scene.pyramid.values, coordinates, shapes, 3, check_contents=False
    )
    scene.offsets = torch.tensor([2, 9, 9, 17])
    plan = assert_same_plans(scene, check_contents=False)
    assert plan.query_batch[:4].tolist() == [-1, -1, 0, 0]
    assert plan.query_batch[-2:].tolist() == [-1, -1]
    assert plan.counts()[plan.query_batch < 0].sum() == 0
    misplaced = scene.pyramid.misplaced()
    assert not misplaced[plan.pairs()[:, 1].cpu()].any()


def test_a_plan_moved_between_devices_and_pickled() -> None:
    scene = scene_2d()
    plan = plan_of(scene, "triton")
    expected = dict(parts(plan_of(scene, "cpu")))
    for other in (plan.to("cpu"), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        for name, actual in parts(other):
            assert torch.equal(actual.cpu(), expected[name].cpu()), name


def test_a_plan_of_other_points_or_cells_is_refused() -> None:
    scene = scene_2d()
    plan = plan_of(scene, "triton")
    arguments = scene.positions.to(DEVICE), scene.offsets.to(DEVICE), scene.pyramid.to(DEVICE)
    check_plan(plan, *arguments, scene.sizes, check_contents=True)
    moved = arguments[0].clone()
    moved[3] += 5
    with pytest.raises(ValueError, match="query cells"):
        check_plan(plan, moved, *arguments[1:], scene.sizes, check_contents=True)
    coordinates = scene.pyramid.coordinates.clone()
    coordinates[0, 1] = (coordinates[0, 1] + 1) % 2
    pyramid = FeaturePyramid(scene.pyramid.values, coordinates, scene.pyramid.level_shapes, 3)
    with pytest.raises(ValueError, match="points"):
        check_plan(plan, *arguments[:2], pyramid.to(DEVICE), scene.sizes, check_contents=True)


def calls_of(scene: Scene) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The planning ops and their arguments."""
    with OwnOps("vicinal_triton") as ops:
        plan_of(scene, "triton")
    return {name: call for name, call in ops.calls.items() if name.endswith("slices")}


@pytest.mark.parametrize("seed", range(8))
def test_ops_of_forged_contents_stay_in_their_buffers(seed: int, checked: Checked | None) -> None:
    """Any positions, offsets, coordinates, copies and keys; the tables are the plan's own."""
    generator = torch.Generator().manual_seed(seed)
    scene = scene_2d(n_queries=19, n_points=45)
    scene.pyramid = FeaturePyramid(
        scene.pyramid.values, scene.pyramid.coordinates, scene.pyramid.level_shapes, 3
    )
    for op, arguments in calls_of(scene).values():
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        n_tables = 2 if op._opname == "find_query_slices" else 1
        garbage = [forged(x.cpu(), seed % 4 + 1, generator).to(DEVICE) for x in tensors]
        garbage[-n_tables:] = tensors[-n_tables:]
        if op._opname == "find_query_slices":
            garbage[3] = torch.tensor([0, 44, -1, 45, 2**40], device=DEVICE)
            garbage[4] = torch.full((5, 2), 2**30, device=DEVICE)
        op(*garbage, *arguments[len(tensors) :])
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()  # an error belongs to this test
    assert checked is None or checked.n_checked > 1000


def test_kernels_stay_in_their_buffers(checked: Checked | None, uninitialized_is_nan: None) -> None:
    for counts, n_points in (((19, 30), 45), ((300,), 3), ((3,), 300)):
        assert_same_plans(make_scene(((9, 7), (5, 4)), (3, 5), counts, n_points))
    assert checked is None or checked.n_checked > 1000


def test_opcheck() -> None:
    calls = calls_of(make_scene(((5, 4), (3, 3)), (3, 3), (4, 2), 9))
    assert len(calls) == 2
    for op, arguments in calls.values():
        opcheck(op, arguments)


def test_indices_beyond_int32_are_left_to_torch() -> None:
    tables = tables_of(((8, 8), (4, 4)), (3, 3))
    assert tables.fits(2**29, 2**30)
    assert not tables.fits(2**29 + 1, 2**30)
    assert not tables.fits(2**29, 2**30 + 1)
