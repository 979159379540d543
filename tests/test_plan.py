"""Neighborhood plans: both directions against brute force, and unchecked invalid contents."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from problems import (
    Inputs,
    LargestTensor,
    Scene,
    assert_close,
    crowded_scene,
    full_window_scene,
    make_inputs,
    make_scene,
    scene_2d,
    scenes,
)
from torch import Tensor

from vicinal import FeaturePyramid, NeighborhoodPlan, Window, plan_neighborhoods
from vicinal._utils.types import BackendName
from vicinal.backends.reference import list_pairs, slot_levels
from vicinal.backends.types import NeighborSlices


def listed(slices: NeighborSlices) -> list[tuple[int, int]]:
    """All (row, neighbor) that ``slices`` hold."""
    order = slices.order.tolist()
    return [
        (row, neighbor)
        for row, edges in enumerate(zip(slices.starts.tolist(), slices.stops.tolist(), strict=True))
        for start, stop in zip(*edges, strict=True)
        for neighbor in order[start:stop]
    ]


def assert_matches_brute_force(plan: NeighborhoodPlan, scene: Scene) -> None:
    """The plan lists just the scene's pairs, each once, both ways."""
    expected = sorted(scene.pairs())
    pairs = plan.pairs()
    assert (pairs.dtype, pairs.shape) == (torch.int64, (len(expected), 2))
    queries = pairs[:, 0].tolist()
    assert queries == sorted(queries)
    assert sorted(map(tuple, pairs.tolist())) == expected
    assert sorted(listed(plan._tensors.query_slices)) == expected
    assert sorted((query, point) for point, query in listed(plan._point_slices())) == expected
    n = plan.n_queries
    counts = [sum(query == i for query, _ in expected) for i in range(n)]
    assert plan.counts().tolist() == counts
    for slices, rows in ((plan._tensors.query_slices, n), (plan._point_slices(), plan.n_points)):
        assert sorted(slices.traversal.tolist()) == list(range(rows))
        assert all(part.dtype == torch.int32 for part in slices)


@given(scenes(max_dim=4))
def test_pairs_equal_brute_force(scene: Scene) -> None:
    assert_matches_brute_force(scene.plan(), scene)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_many_pairs(dtype: torch.dtype) -> None:
    scene = make_scene(
        ((30, 11), (7, 19), (40, 5)), (5, 3, 9), (70, 0, 50), 400, dtype=dtype, seed=3
    )
    assert len(scene.pairs()) > 1000
    assert_matches_brute_force(scene.plan(), scene)


@pytest.mark.parametrize(
    "scene",
    [
        make_scene(((4, 4),), (3,), (), 0),
        make_scene(((4, 4),), (3,), (0, 0), 0),
        make_scene(((4, 4),), (3,), (0, 0), 9),
        make_scene(((4, 4),), (3,), (0, 7, 0), 0),
        make_scene(((1, 1),), (1,), (1,), 1),
        make_scene(((1,), (1,)), (9, 1), (3, 2), 5),
        make_scene(((2, 3, 2), (1, 1, 1)), (11, 15), (2, 3), 20),
        make_scene(((2, 2, 2, 2),), (7,), (4,), 12),
    ],
    ids=["nothing", "empty images", "no queries", "no points", "one point", "one cell", "3-D wide",
         "4-D wide"],
)  # fmt: skip
def test_small_scenes(scene: Scene) -> None:
    assert_matches_brute_force(scene.plan(), scene)


def test_queries_at_equal_positions() -> None:
    scene = scene_2d(n_queries=30)
    scene.positions[:] = torch.tensor([4.0, 4.0])
    assert len(scene.pairs()) >= 30
    assert_matches_brute_force(scene.plan(), scene)


@pytest.mark.parametrize("far", [1e9, -1e9, 1e30, -1e30])
def test_far_queries_have_no_neighbors(far: float) -> None:
    scene = scene_2d()
    scene.positions[3], scene.positions[7, 1] = far, far
    plan = scene.plan()
    assert plan.counts()[[3, 7]].tolist() == [0, 0]
    assert_matches_brute_force(plan, scene)


def test_windows_reach_over_the_edge_and_no_further() -> None:
    # A window around a cell outside the map holds what of the map it overlaps, row by row: the
    # end of one row and the start of the next are neighbors in memory, not in space.
    all_cells = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    coordinates = torch.nn.functional.pad(torch.nn.functional.pad(all_cells, (0, 1)), (1, 0))
    pyramid = FeaturePyramid(torch.rand(16, 1), coordinates, ((4, 4),), 1)
    steps = torch.arange(-4, 8, dtype=torch.float32)
    positions = torch.cartesian_prod(steps, steps)
    scene = Scene(positions, torch.tensor([0, len(positions)]), pyramid, (5,))
    assert_matches_brute_force(scene.plan(), scene)


def test_pairs_of_some_queries() -> None:
    scene = scene_2d()
    chosen = torch.tensor([5, 0, 5, 11])
    pairs = scene.plan().pairs(chosen)
    expected = [
        pair for query in chosen.tolist() for pair in sorted(scene.pairs()) if pair[0] == query
    ]
    assert sorted(map(tuple, pairs.tolist())) == sorted(expected)
    assert list(dict.fromkeys(pairs[:, 0].tolist())) == [5, 0, 11]
    assert scene.plan().pairs(chosen[:0]).shape == (0, 2)


def test_slots_are_the_cells_of_the_windows() -> None:
    scene = scene_2d(n_queries=30)
    plan = scene.plan()
    query, point, slot = list_pairs(plan._tensors, torch.arange(30))
    windows = scene.windows()
    for i, p, s in zip(query.tolist(), point.tolist(), slot.tolist(), strict=True):
        assert p in windows[i][s][1]
    levels = [cell.level for cell, _ in windows[0]]
    assert plan.window_slots == len(levels)
    assert slot_levels(plan._tensors).tolist() == levels


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a plan, but for those that are computed on first use."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return (
        [x for part in value for x in tensors_of(part)] if isinstance(value, list | tuple) else []
    )


def test_shapes_depend_on_sizes_alone() -> None:
    plans = [scene_2d(n_queries=20, n_points=33, seed=seed).plan() for seed in range(3)]
    beyond = scene_2d(n_queries=20, n_points=33)
    beyond.positions += 1e6
    plans.append(beyond.plan())
    assert plans[0].counts().sum() > 0
    assert plans[-1].counts().sum() == 0
    shapes = [
        [(x.shape, x.dtype, x.stride()) for x in (*tensors_of(plan), *plan._point_slices())]
        for plan in plans
    ]
    assert all(shape == shapes[0] for shape in shapes)
    assert len(shapes[0]) >= 11


def test_sizes_of_a_plan() -> None:
    plan = scene_2d(n_queries=20, n_points=33).plan()
    assert (plan.n_queries, plan.n_points, plan.n_levels, plan.batch_size) == (20, 33, 3, 3)
    assert (plan.position_dim, plan.neighborhood_sizes) == (2, (3, 5, 3))
    assert plan.window_slots == 9 + 25 + 9
    assert plan.device == torch.device("cpu")
    assert (
        plan._tensors.query_slices.starts.shape
        == plan._tensors.query_slices.stops.shape
        == (20, 3 + 5 + 3)
    )
    assert plan._point_slices().starts.shape == plan._point_slices().stops.shape == (33, 5)
    assert plan._tensors.query_slices.order.shape == (33,)
    assert plan._point_slices().order.shape == (3 * 20,)
    assert plan.query_batch.tolist() == [0] * 10 + [2] * 10


@pytest.mark.parametrize(
    ("shape", "window"),
    [((100_000,), 200_001), ((1000, 1000), 601), ((60, 60, 60), 41)],
)
def test_memory_is_that_of_the_slices(shape: tuple[int, ...], window: int) -> None:
    n_queries, n_points = 60, 300
    scene = make_scene((shape,), (window,), (n_queries,), n_points, dtype=torch.float32)
    n_rows = window ** (len(shape) - 1)
    with LargestTensor() as largest:
        plan = scene.plan()
        assert len(plan._point_slices().order) == n_queries
    # Edges of all slices of queries or points as int64, and the curve's keys.
    assert 0 < largest.nbytes <= 8 * max(n_queries, n_points) * max(n_rows, 8)
    assert largest.nbytes < n_queries * plan.window_slots
    assert len(plan.pairs()) > 0


def test_repr_holds_the_counts() -> None:
    plan = full_window_scene(7, 30).plan()
    text = repr(plan)
    for part in ("queries=7", "points=30", "[17]", "position_dim=2", "mean 30.0", "largest 30"):
        assert part in text
    assert "queries=0" in repr(make_scene(((4,),), (3,), (), 0).plan())


def neighbors_by_level(plan: NeighborhoodPlan, levels: Tensor) -> list[list[int]]:
    """The numbers of neighbors of all queries on each level, in ascending order."""
    counts = torch.zeros(plan.n_levels, plan.n_queries, dtype=torch.int64)
    for query, point in plan.pairs().tolist():
        counts[levels[point], query] += 1
    return [sorted(row) for row in counts.tolist()]


@pytest.mark.parametrize("n_queries", [1, 2, 30, 301])
def test_neighbors_per_level(n_queries: int) -> None:
    scene = make_scene(((12, 9), (5, 6), (3, 3)), (3, 5, 3), (n_queries,), 150, seed=n_queries)
    plan = scene.plan()
    statistics = plan.neighbors_per_level()
    for level, counts in enumerate(neighbors_by_level(plan, scene.pyramid.levels)):
        assert statistics.mean[level] == pytest.approx(sum(counts) / n_queries, rel=1e-12)
        assert statistics.largest[level] == counts[-1]
        for quantile, found in ((50, statistics.median), (99, statistics.percentile_99)):
            # The least number that so many percent of the queries do not exceed.
            at_most = [
                n for n in counts if 100 * sum(x <= n for x in counts) >= quantile * n_queries
            ]
            assert found[level] == min(at_most)
    assert statistics.mean.dtype == torch.float64
    assert all(part.dtype == torch.int64 for part in statistics[1:])
    assert statistics.mean.sum() == pytest.approx(float(plan.counts().double().mean()), rel=1e-12)


def test_neighbors_per_level_without_queries() -> None:
    statistics = make_scene(((4, 4), (2, 2)), (3, 3), (), 6).plan().neighbors_per_level()
    assert [part.tolist() for part in statistics] == [[0, 0]] * 4


def test_neighbors_of_windows_of_many_shapes() -> None:
    scene = make_scene(((8, 8), (4, 4), (2, 2)), (3, 3, 3), (20,), 80)
    windows = [Window((3, 4), causal=(False, True)), 0, Window(3, shape="ball")]
    plan = plan_neighborhoods(scene.positions, scene.offsets, scene.pyramid, windows)
    statistics = plan.neighbors_per_level()
    expected = neighbors_by_level(plan, scene.pyramid.levels)
    assert statistics.largest.tolist() == [counts[-1] for counts in expected]
    assert statistics.largest[1] == 0


def test_copies_beyond_the_seam_count_as_neighbors() -> None:
    cells = torch.tensor([[0, 0, 0], [0, 7, 0]])  # image, cell on a circle, level
    circle = FeaturePyramid(torch.ones(2, 1), cells, ((8,),), 1, periodic_axes=(0,))
    plan = plan_neighborhoods(circle.positions(), torch.tensor([0, 2]), circle, [3])
    assert plan.neighbors_per_level().mean.tolist() == [2]


def test_repr_shows_neighbors_by_level_in_a_line() -> None:
    coordinates = torch.tensor([[0, 1, 0], [0, 2, 0], [0, 0, 1]])
    pyramid = FeaturePyramid(torch.ones(3, 1), coordinates, ((8,), (4,)), 1)
    positions = torch.tensor([[1.5], [2.5], [6.5]])
    text = repr(plan_neighborhoods(positions, torch.tensor([0, 3]), pyramid, [3, 3]))
    for part in ("mean 1.3, 0.7", "median 2, 1", "99 % 2, 1", "largest 2, 1"):
        assert part in text
    assert "\n" not in text


def test_to() -> None:
    plan = scene_2d().plan()
    moved = plan.to("cpu")
    for left, right in zip(tensors_of(plan), tensors_of(moved), strict=True):
        assert torch.equal(left, right)
    assert (moved.neighborhood_sizes, moved.batch_size) == (plan.neighborhood_sizes, 3)
    on_meta = plan.to("meta")
    assert {x.device.type for x in tensors_of(on_meta)} == {"meta"}
    assert on_meta.device.type == "meta"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate: Callable[[NeighborhoodPlan], NeighborhoodPlan]) -> None:
    # As a data loader's workers make them.
    scene = scene_2d()
    plan = duplicate(scene.plan())
    assert_matches_brute_force(plan, scene)
    assert repr(plan) == repr(scene.plan())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_offsets_of_any_integer_type(dtype: torch.dtype) -> None:
    scene = scene_2d()
    narrow = dataclasses.replace(scene, offsets=scene.offsets.to(dtype))
    assert_matches_brute_force(narrow.plan(), scene)


def test_positions_get_no_gradient_from_the_plan() -> None:
    scene = scene_2d()
    scene.positions.requires_grad_()
    plan = scene.plan()
    assert not any(x.requires_grad for x in tensors_of(plan))


# -------------------------------------------------------------------------- contents unchecked


def attend_unchecked(
    scene: Scene, backend: BackendName, *, background: bool = False
) -> tuple[Tensor, Inputs]:
    """The attention over a plan of unchecked contents, forward and backward without a crash."""
    plan = scene.plan(check_contents=False)
    inputs = make_inputs(plan, background=background).fresh()
    out, _ = inputs.attend(plan, backend)
    out.sum().backward()
    assert out.isfinite().all()
    return out.detach(), inputs


def assert_excluded(bad: list[int], scene: Scene, good: Scene, backend: BackendName) -> None:
    """Queries ``bad`` of ``scene`` get zero, all others what they get in ``good``."""
    (out, inputs), (expected, _) = attend_unchecked(scene, backend), attend_unchecked(good, backend)
    rest = [query for query in range(len(out)) if query not in bad]
    assert_close(out[rest], expected[rest], 1e-13)
    assert expected[rest].any()
    assert expected[bad].any(), "they have neighbors where nothing is wrong"
    assert not out[bad].any()
    assert inputs.q.grad is not None
    assert not inputs.q.grad[bad].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_positions_that_are_not_finite(value: float, backend: BackendName) -> None:
    good = scene_2d(n_queries=16)
    positions = good.positions.clone()
    positions[2], positions[9, 1] = value, value
    bad = dataclasses.replace(good, positions=positions)
    assert_excluded([2, 9], bad, good, backend)


@pytest.mark.parametrize(
    ("offsets", "excluded"),
    [([0, 10, 10, 15], [15, 16, 17, 18, 19]), ([0, 0, 0, 0], list(range(20)))],
)
def test_queries_of_no_image(offsets: list[int], excluded: list[int], backend: BackendName) -> None:
    good = make_scene(((5, 5),), (17,), (10, 0, 10), 30)
    bad = dataclasses.replace(good, offsets=torch.tensor(offsets))
    if excluded == list(range(20)):
        assert not attend_unchecked(bad, backend)[0].any()
    else:
        assert_excluded(excluded, bad, good, backend)


@pytest.mark.parametrize(
    "offsets",
    [[0, 15, 5, 20], [20, 10, 10, 0], [-5, 10, 12, 20], [0, 10, 10, 99], [-9, -5, -3, -1],
     [2**62, -(2**62), 0, 2**63 - 1]],
)  # fmt: skip
def test_offsets_that_do_not_rise(offsets: list[int], backend: BackendName) -> None:
    good = make_scene(((5, 5),), (17,), (10, 0, 10), 30)
    bad = dataclasses.replace(good, offsets=torch.tensor(offsets))
    out, _ = attend_unchecked(bad, backend)
    assert out.shape == (20, 2, 4)
    # Whatever image a query is assigned to, its neighbors are of one image only.
    batch, plan = bad.pyramid.batch, bad.plan(check_contents=False)
    for query in range(20):
        points = plan.pairs(torch.tensor([query]))[:, 1]
        assert len(batch[points].unique()) <= 1


@pytest.mark.parametrize(
    "row",
    [[-1, 2, 2, 0], [3, 2, 2, 0], [0, -1, 2, 0], [0, 2, 9, 2], [0, 6, 1, 0], [0, 2, 2, -1],
     [0, 2, 2, 3], [2**40, 2, 2, 0], [0, 2**62, 2, 0], [0, 2, -(2**63), 0], [0, 2, 2, 2**62]],
)  # fmt: skip
def test_points_outside_their_level_or_batch(row: list[int], backend: BackendName) -> None:
    good = scene_2d(n_queries=20)
    coordinates = good.pyramid.coordinates.clone()
    victims = [4, 5, 40]
    coordinates[victims] = torch.tensor(row)
    unchecked = FeaturePyramid(
        good.pyramid.values, coordinates, good.pyramid.level_shapes, 3, check_contents=False
    )
    assert unchecked.misplaced().nonzero()[:, 0].tolist() == victims
    bad = dataclasses.replace(good, pyramid=unchecked)
    plan = bad.plan(check_contents=False)
    expected = sorted(pair for pair in good.pairs() if pair[1] not in victims)
    assert sorted(map(tuple, plan.pairs().tolist())) == expected
    assert sorted((query, point) for point, query in listed(plan._point_slices())) == expected
    _, inputs = attend_unchecked(bad, backend)
    assert inputs.k.grad is not None
    assert inputs.v.grad is not None
    assert not inputs.k.grad[victims].any()
    assert not inputs.v.grad[victims].any()
    assert inputs.v.grad.any()


@pytest.mark.parametrize("background", [False, True])
def test_no_image_for_any_query(background: bool, backend: BackendName) -> None:
    empty = Scene(
        torch.rand(5, 1),
        torch.tensor([0]),
        FeaturePyramid(torch.rand(0, 1), torch.empty(0, 3, dtype=torch.int64), ((4,),), 0),
        (3,),
    )
    out, _ = attend_unchecked(empty, backend, background=background)
    assert not out.any()


def test_queries_before_the_first_offset_are_excluded(backend: BackendName) -> None:
    good = make_scene(((5, 5),), (17,), (10, 0, 10), 30)
    bad = dataclasses.replace(good, offsets=torch.tensor([3, 10, 10, 20]))
    assert_excluded([0, 1, 2], bad, good, backend)


@pytest.mark.parametrize("flaw", ["nan", "excluded"])
def test_invalid_queries_do_not_attend_to_the_background(flaw: str, backend: BackendName) -> None:
    good = scene_2d(n_queries=16)
    bad = dataclasses.replace(good, positions=good.positions.clone(), offsets=good.offsets.clone())
    if flaw == "nan":
        bad.positions[15] = torch.nan
    else:
        bad.offsets[-1] = 15
    out, _ = attend_unchecked(bad, backend, background=True)
    assert out[:15].any(-1).all()
    assert not out[15].any()


def test_unchecked_good_contents_give_the_same_plan() -> None:
    scene = crowded_scene()
    checked, unchecked = scene.plan(check_contents=True), scene.plan(check_contents=False)
    for left, right in zip(tensors_of(checked), tensors_of(unchecked), strict=True):
        assert torch.equal(left, right)


# ----------------------------------------------------------------------------------- refusals

PYRAMID = scene_2d().pyramid


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("query_spatial_positions", torch.rand(8), "[8]"),
        ("query_spatial_positions", torch.rand(8, 3), "[8, 3]"),
        ("query_spatial_positions", torch.ones(8, 2, dtype=torch.int32), "int32"),
        ("query_spatial_positions", torch.rand(8, 2, device="meta"), "meta"),
        ("query_spatial_positions", torch.tensor([[1, 2], [torch.nan, 1]] * 4), "row 1"),
        ("query_spatial_positions", torch.tensor([[1, 2], [1, -torch.inf]] * 4), "row 1"),
        ("query_batch_offsets", torch.tensor([[0, 4, 4, 8]]), "[1, 4]"),
        ("query_batch_offsets", torch.tensor([0.0, 4, 4, 8]), "float32"),
        ("query_batch_offsets", torch.tensor([0, 4, 4, 8], device="meta"), "meta"),
        ("query_batch_offsets", torch.tensor([0, 5, 4, 8]), "4 after 5"),
        ("query_batch_offsets", torch.tensor([1, 4, 4, 8]), "from 1"),
        ("query_batch_offsets", torch.tensor([0, 4, 4, 7]), "to 7"),
        ("query_batch_offsets", torch.tensor([0, 4, 9, 8]), "8 after 9"),
        ("neighborhood_sizes", [3, 5], "[3, 5]"),
        ("odd neighborhood_sizes", [3, 5, 4], "[3, 5, 4]"),
        ("odd neighborhood_sizes", [3, 5, -3], "[3, 5, -3]"),
    ],
)
def test_refusals(argument: str, value: object, came: str) -> None:
    arguments: dict[str, Any] = {
        "query_spatial_positions": torch.rand(8, 2),
        "query_batch_offsets": torch.tensor([0, 4, 4, 8]),
        "pyramid": PYRAMID,
        "neighborhood_sizes": [3, 5, 3],
    }
    arguments[argument.removeprefix("odd ")] = value
    with pytest.raises(ValueError, match="expected") as refusal:
        plan_neighborhoods(**arguments)
    message = str(refusal.value)
    assert argument in message
    assert came in message.split("got")[-1]


def test_large_maps() -> None:
    # Long axes, far corners: keys of up to 61 bits, and positions beyond float32's whole numbers.
    side = 2**20
    corners = [[0, 0, 0], [side - 1, side - 1, side - 1], [side - 1, 0, side - 2]]
    coordinates = torch.tensor([[0, *corner, 0] for corner in corners])
    pyramid = FeaturePyramid(torch.rand(3, 1), coordinates, ((side,) * 3,), 1)
    positions = torch.tensor(corners, dtype=torch.float64) + 0.5
    scene = Scene(positions, torch.tensor([0, 3]), pyramid, (3,))
    assert len(scene.pairs()) == 3
    assert_matches_brute_force(scene.plan(), scene)
