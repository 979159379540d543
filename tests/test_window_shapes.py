"""Windows of every shape: cells by definition, plans, attention and refusals."""

import itertools
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from problems import answer, make_inputs
from torch import Tensor

import vicinal
from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    SparseNeighborhoodAttentionBlock,
    Window,
    get_multilevel_neighborhoods,
    plan_neighborhoods,
)
from vicinal._utils.types import BackendName
from vicinal.detr import PointStem

Cell = tuple[int, ...]
SHAPES = ((12, 8, 16), (6, 8, 4), (24, 4, 8))
WINDOWS: list[Any] = [
    3,
    0,
    (3, 1, 5),
    Window(3, dilation=2),
    Window((3, 5, 3), dilation=(1, 3, 2)),
    Window(2, causal=True),
    Window((3, 1, 4), causal=(False, True, True), dilation=(2, 1, 3)),
    Window(5, shape="ball"),
    Window((3, 5, 7), shape="ball", dilation=(1, 2, 1)),
    Window((4, 3, 5), causal=(True, False, False), shape="ball"),
    Window((3, 3, 6), causal=(False, False, True), shape="ball"),
]


def as_axes(value: Any, dim: int) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value] * dim


def window_cells(position: Sequence[float], level: int, window: Any, own: int | None) -> list[Cell]:
    """The cells of a window, by the definition, over all steps of its box."""
    window = window if isinstance(window, Window) else Window(window)
    dim, sizes = len(position), as_axes(window.size, len(position))
    steps, centers, halves = [], [], []
    for axis, (size, causal) in enumerate(zip(sizes, as_axes(window.causal, dim), strict=True)):
        of_levels = [shape[axis] for shape in SHAPES]
        full = max(of_levels)
        if causal:
            m = own if own is not None else of_levels.index(full)
            y = math.floor(position[axis] * of_levels[m] / full)
            centers.append((y + 1) * of_levels[level] // of_levels[m] - 1)
            steps.append(range(1 - size, 1))
            halves.append(size - 0.5)
        else:
            centers.append(math.floor(position[axis] * of_levels[level] / full))
            steps.append(range(-(size // 2), size // 2 + 1) if size else range(0))
            halves.append(size / 2)
    dilation = as_axes(window.dilation, dim)
    return [
        tuple(c + d * o for c, d, o in zip(centers, dilation, offset, strict=True))
        for offset in itertools.product(*steps)
        if window.shape == "box"
        or sum((o / h) ** 2 for o, h in zip(offset, halves, strict=True)) <= 1
    ]


def random_positions(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    full = torch.tensor([max(axis) for axis in zip(*SHAPES, strict=True)])
    positions = torch.rand(n, 3, generator=generator, dtype=torch.float64) * (full + 8) - 4
    positions[::3] = positions[::3].floor()
    return positions


def random_pyramid(n: int = 400, width: int = 4, seed: int = 0) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(3, (n,), generator=generator)
    cells = torch.rand(n, 3, generator=generator) * torch.tensor(SHAPES)[levels]
    coordinates = torch.cat((torch.zeros(n, 1), cells, levels[:, None]), 1).long()
    values = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return FeaturePyramid(values, coordinates, SHAPES, 1)


def make_plan(windows: Sequence[Any], levels: Tensor | None, n: int = 40) -> NeighborhoodPlan:
    positions = random_positions(n)
    return plan_neighborhoods(positions, torch.tensor([0, n]), random_pyramid(), windows, levels)


@pytest.mark.parametrize("with_levels", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_cells_and_pairs_by_definition(window: Any, with_levels: bool) -> None:
    windows, n = [window, 3, window], 40
    own = torch.arange(n) % 3 if with_levels else None
    positions, pyramid = random_positions(n), random_pyramid()
    cells, outside, levels = get_multilevel_neighborhoods(
        positions, SHAPES, windows, query_level_indices=own
    )
    points: dict[Cell, list[int]] = {}
    for row, (_, *cell, level) in enumerate(pyramid.coordinates.tolist()):
        points.setdefault((level, *cell), []).append(row)
    plan = make_plan(windows, own)
    pairs = set()
    for query, position in enumerate(positions.tolist()):
        m = query % 3 if with_levels else None
        expected = [
            (level, *cell)
            for level, size in enumerate(windows)
            for cell in window_cells(position, level, size, m)
        ]
        found = torch.cat((levels[:, None], cells[query]), 1)
        assert list(map(tuple, found.tolist())) == expected
        pairs |= {(query, point) for cell in expected for point in points.get(cell, [])}
    shapes = torch.tensor(SHAPES)[levels]
    assert torch.equal(outside, ((cells < 0) | (cells >= shapes)).any(-1))
    assert plan.window_slots == len(levels)
    assert len(plan.pairs()) == len(pairs)
    assert set(map(tuple, plan.pairs().tolist())) == pairs


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_cpu_kernel_agrees_with_the_reference(window: Any, background: bool) -> None:
    plan = make_plan([window, 3, 1], torch.arange(40) % 3)
    inputs = make_inputs(plan, heads=3, background=background, mask=True, bias=True)
    for rate in (0.0, 0.3):
        exact, actual = (
            answer(inputs, plan, name, dropout_p=rate) for name in ("reference", "cpu")
        )
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_bias_in_narrow_dtypes(dtype: torch.dtype, heads: int) -> None:
    plan = make_plan([5, (3, 3, 1), 3], None)
    inputs = make_inputs(plan, heads=heads, width=16, background=True, bias=True, dtype=dtype)
    exact = answer(inputs.map(torch.Tensor.double), plan, "reference")
    plain, actual = (answer(inputs, plan, name) for name in ("reference", "cpu"))
    for ours, other, right in zip(
        (*actual.grads, actual.out), (*plain.grads, plain.out), (*exact.grads, exact.out),
        strict=True,
    ):  # fmt: skip
        rounding = right.abs().max() * torch.finfo(dtype).eps / 2
        allowed = 2 * (other.double() - right).abs().max() + rounding
        assert (ours.double() - right).abs().max() <= allowed


def test_the_gradient_of_a_bias_has_the_same_bits_on_every_run() -> None:
    plan = make_plan([5, Window(5, shape="ball"), 3], None)
    inputs = make_inputs(plan, heads=2, background=True, bias=True, dtype=torch.float32)
    first, threads = answer(inputs, plan, "cpu").grads, torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        again = answer(inputs, plan, "cpu").grads
        assert all(map(torch.equal, first, again))
    torch.set_num_threads(threads)


def test_a_level_that_is_not_attended_to_keeps_its_background() -> None:
    block = SparseNeighborhoodAttentionBlock(8, 2, 3, [3, 0, 3], position_dim=3).double()
    pyramid = random_pyramid(width=8)
    background = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    block.encode(pyramid, background_embedding=background).values.sum().backward()
    grad = background.grad
    assert grad is not None
    assert grad[:, 1].eq(0).all()
    assert grad[:, [0, 2]].ne(0).any()


def test_sizes_in_every_form() -> None:
    forms = [[3, (3, 5, 1)], (np.int64(3), np.array([3, 5, 1])), (3, torch.tensor([3, 5, 1]))]
    listed: Any = [3, 5, 1]
    blocks = [
        SparseNeighborhoodAttentionBlock(8, 2, 2, form, position_dim=3).neighborhood_sizes
        for form in (*forms, [Window(3), Window((3, 5, 1))], [(3, 3, 3), Window(listed)])
    ]
    assert all(sizes == (3, (3, 5, 1)) for sizes in blocks)
    table = torch.tensor([[3, 5, 1], [1, 1, 1]])
    block = SparseNeighborhoodAttentionBlock(8, 2, 2, table, position_dim=3)
    assert block.neighborhood_sizes == ((3, 5, 1), 1)


def test_causal_axes_in_every_form() -> None:
    expected = Window((4, 3), causal=(True, False))
    for form in ((np.True_, np.False_), np.array([True, False]), [torch.tensor(True), False]):
        assert Window((4, 3), causal=form) == expected  # type: ignore[arg-type]
    assert Window(4, causal=np.True_) == Window(4, causal=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Window(3, dilation=2), Window((3, 3, 3), dilation=(2, 2, 2))),
        (Window(2, causal=True), Window((2, 2, 2), causal=(True, True, True))),
        (Window(3, causal=(True, False, False)), Window((3, 3, 3), 1, (True, False, False))),
        (Window(5, shape="ball"), Window((5, 5, 5), (1, 1, 1), False, "ball")),
        (Window(5, shape="ball"), Window(5, shape=np.str_("ball"))),  # type: ignore[arg-type]
        ((3, 5, 1), Window((3, 5, 1), (1, 1, 1), (False, False, False))),
        (0, Window(0, 2, True, "ball")),
    ],
    ids=str,
)
def test_equal_windows_share_a_plan(one: Any, other: Any, tmp_path: Any) -> None:
    plan = make_plan([one, 3, 3], None)
    block = SparseNeighborhoodAttentionBlock(8, 2, 3, [other, 3, 3], position_dim=3)
    assert plan.neighborhood_sizes == block.neighborhood_sizes
    torch.save(make_plan([other, 3, 3], None), tmp_path / "plan.pt")
    loaded = torch.load(tmp_path / "plan.pt", weights_only=True)
    assert loaded.neighborhood_sizes == plan.neighborhood_sizes


@pytest.mark.parametrize("long", range(3))
def test_a_window_that_is_long_along_any_axis(long: int) -> None:
    sizes = [1, 1, 1]
    sizes[long] = 2**31 - 1
    plan, short = make_plan([tuple(sizes), 0, 0], None), [1, 1, 1]
    short[long] = 63  # from any query past both edges
    expected = make_plan([tuple(short), 0, 0], None).pairs()
    assert len(expected) > 0
    assert torch.equal(plan.pairs(), expected)
    inputs = make_inputs(plan, heads=1)
    torch.testing.assert_close(answer(inputs, plan, "cpu"), answer(inputs, plan, "reference"))


def test_windows_are_shown_as_they_are_written() -> None:
    for text in ("Window(3)", "Window((3, 5))", "Window(3, dilation=2)",
                 "Window((2, 3), causal=(True, False), shape='ball')"):  # fmt: skip
        window = eval(text, {"Window": Window})
        assert repr(window) == text
        assert pickle.loads(pickle.dumps(window)) == window
    plan = make_plan([3, Window(3, dilation=2), 0], None)
    assert "[3, Window(3, dilation=2), 0]" in repr(plan)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"size": 2}, "size"),
        ({"size": -1}, "size"),
        ({"size": (3, 0)}, "size"),
        ({"size": (3, 4), "causal": (True, False)}, "size"),
        ({"size": 3.0}, "size"),
        ({"size": ()}, "size"),
        ({"size": 2**31 + 1}, "size"),
        ({"size": 3, "dilation": 0}, "dilation"),
        ({"size": 3, "dilation": -2}, "dilation"),
        ({"size": 3, "dilation": (1, 0)}, "dilation"),
        ({"size": 3, "dilation": 2**31}, "dilation"),
        ({"size": 3, "causal": 1}, "causal"),
        ({"size": 3, "shape": "disk"}, "shape"),
        ({"size": 3, "shape": np.array(["ball"])}, "shape"),
        ({"size": 3, "shape": np.array(["ball", "box"])}, "shape"),
        ({"size": 10**5000 + 1}, "size"),
        ({"size": "3"}, "size"),
        ({"size": (x for x in (3, 3))}, "size"),
        ({"size": torch.ones(2, dtype=torch.int64, device="meta")}, "size"),
        ({"size": (3, 3), "causal": ("yes", False)}, "causal"),
        ({"size": (3, 3), "dilation": (1, 1, 1)}, "size, dilation, causal"),
    ],
)
def test_wrong_windows(options: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected .*, got ") as refusal:
        Window(**options)
    if isinstance(options["size"], tuple) and options["size"] and argument == "size":
        assert "axis 1" in str(refusal.value)


@pytest.mark.parametrize(
    ("windows", "words"),
    [
        ([3, 4, 3], ["level 1", "axis 0", "odd neighborhood_sizes", "[3, 4, 3]"]),
        ([3, (3, 3, 2), 3], ["level 1", "axis 2"]),
        ([3, 3, (3, 0, 3)], ["level 2", "axis 1"]),
        ([3, 3, (3, 3)], ["level 2", "3 axes"]),
        ([3, Window((3, 3)), 3], ["level 1", "3 axes"]),
        ([0, 0, 0], ["[0, 0, 0]"]),
        ([3, (), 3], ["level 1"]),
        ([3, 10**5000 + 1, 3], ["level 1", "axis 0"]),
        ([Window(2**31 - 1, shape="ball"), 3, 3], ["rows"]),
        (b"\3\3\3", ["one window per level"]),
        ([3, 3], ["level", "3"]),
        ([3, 3, (2**15 + 1, 2**16 + 1, 2**16 + 1)], ["rows"]),
    ],
)
def test_wrong_windows_of_levels(windows: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^neighborhood_sizes: expected .*, got ") as refusal:
        make_plan(windows, None)
    assert all(word in str(refusal.value) for word in words)


def test_causal_axes_need_sizes_that_divide_each_other() -> None:
    windows = [Window(3, causal=(True, False, False)), 3]
    with pytest.raises(ValueError, match=r"causal axis 0.*8 at level 0, 5 at level 1"):
        get_multilevel_neighborhoods(torch.zeros(1, 3), [(8, 8, 8), (5, 8, 4)], windows)
    get_multilevel_neighborhoods(torch.zeros(1, 3), [(8, 8, 8), (4, 5, 7)], windows)


def test_windows_that_keys_cannot_hold_are_shown() -> None:
    with pytest.raises(ValueError, match=r"fewer than .*1610612736"):
        make_plan([3, Window(3, dilation=2**29), 3], None)


@pytest.mark.parametrize("window", [9, Window(3, dilation=4), Window(2, causal=True)])
def test_windows_that_periodic_axes_cannot_have(window: Any) -> None:
    with pytest.raises(ValueError, match=r"^neighborhood_sizes: .*level 0 along periodic axis 1"):
        get_multilevel_neighborhoods(torch.zeros(1, 2), [(8, 8)], [window], periodic_axes=(1,))


def test_the_stem_names_its_windows() -> None:
    points = torch.tensor([[0, 1, 1]]), torch.ones(1, 1), (48, 48), 1
    for window in (Window(3, dilation=24), Window(2, causal=True)):
        stem = PointStem(1, 4, (1, 2), [window, 3])
        with pytest.raises(ValueError, match=r"^window_sizes: .*level 0 along periodic axis 1"):
            stem(*points, periodic_axes=(1,))


def test_a_plan_for_other_windows_or_levels_is_refused() -> None:
    pyramid = random_pyramid(width=8)
    window = Window((3, 3, 4), causal=(False, False, True))
    block = SparseNeighborhoodAttentionBlock(8, 2, 3, [window] * 3, position_dim=3).double()
    positions, offsets = pyramid.positions(torch.float64), pyramid.batch_offsets()
    own = pyramid.levels
    plan = block.make_plan(positions, offsets, pyramid, own)
    call = pyramid.values, positions, offsets, pyramid
    block(*call, query_level_indices=own, plan=plan)
    for levels in ((own + 1) % 3, None):
        with pytest.raises(ValueError, match=r"^plan: made for other .*query_level_indices"):
            block(*call, query_level_indices=levels, plan=plan)
    other = plan_neighborhoods(positions, offsets, pyramid, [3, 3, window], own)
    with pytest.raises(ValueError, match="neighborhood_sizes"):
        block(*call, query_level_indices=own, plan=other)


def test_plans_of_windows_are_saved_and_loaded(tmp_path: Any) -> None:
    plan = make_plan([Window(3, dilation=2), (3, 1, 5), Window(2, causal=True)], None)
    torch.save(plan, tmp_path / "plan.pt")
    loaded = torch.load(tmp_path / "plan.pt", weights_only=True)
    assert torch.equal(loaded.pairs(), plan.pairs())
    assert loaded.neighborhood_sizes == plan.neighborhood_sizes


def test_a_relative_bias_in_the_block(tmp_path: Any) -> None:
    windows = [3, Window(3, shape="ball"), (1, 3, 1)]
    torch.manual_seed(0)
    block = SparseNeighborhoodAttentionBlock(
        8, 2, 3, windows, position_dim=3, relative_bias=True, bias=True
    ).double()
    names = [name for name, _ in block.named_parameters()]
    assert names[0] == "norm.weight"
    assert names[-1] == "relative_bias"
    parent = torch.nn.ModuleList([block, torch.nn.Linear(1, 1)])
    assert [name for name, _ in parent.named_parameters()][len(names) - 1] == "0.relative_bias"
    bias = block.relative_bias
    assert bias is not None
    n_cells = 27 + 19 + 3
    assert bias.shape == (n_cells, 2)
    assert bias.eq(0).all()
    plain = SparseNeighborhoodAttentionBlock(8, 2, 3, windows, position_dim=3, bias=True).double()
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k != "relative_bias"})
    pyramid, background = random_pyramid(width=8), torch.randn(1, 3, 8, dtype=torch.float64)
    zero = block.encode(pyramid, background_embedding=background).values
    expected = plain.encode(pyramid, background_embedding=background).values
    torch.testing.assert_close(zero, expected, rtol=1e-13, atol=1e-13)

    # Weights are multiplied by exp(bias): checked with those of the block without one.
    with torch.no_grad():
        bias.copy_(torch.randn(n_cells, 2))
    placement = vicinal.QueryPlacement.of_points(pyramid)
    call = {**placement.arguments(), "stacked_feature_maps": pyramid}
    before = plain.attention_weights(pyramid.values, **call)
    after = block.attention_weights(pyramid.values, **call)
    cells, _, levels = get_multilevel_neighborhoods(
        placement.positions, SHAPES, windows, query_level_indices=pyramid.levels
    )
    for query in (0, 7, 100):
        rows = slice(*before.offsets[query : query + 2].tolist())
        places = torch.cat((cells[query], levels[:, None]), 1)
        points = pyramid.coordinates[before.points[rows], 1:]
        slot = (points[:, None] == places).all(-1).int().argmax(1)
        weights = before.weights[rows] * bias[slot].exp()
        torch.testing.assert_close(after.weights[rows], weights / weights.sum(0))
    for parameter in block.parameters():
        parameter.grad = None
    block.encode(pyramid, background_embedding=background).values.square().sum().backward()
    assert bias.grad is not None
    assert bias.grad.ne(0).all()
    block.reset_parameters()
    assert bias.eq(0).all()
    with pytest.raises(ValueError, match="relative_bias"):
        vicinal.export_state_dict(block)


def test_gradients_of_the_bias() -> None:
    windows = [3, Window(3, shape="ball"), (1, 3, 1)]
    positions, pyramid = random_pyramid().positions(torch.float64)[:3], random_pyramid(40)
    plan = plan_neighborhoods(positions, torch.tensor([0, 3]), pyramid, windows)
    inputs = make_inputs(plan, heads=1, width=2, background=True, bias=True)

    def attend(backend: BackendName) -> Any:
        return lambda *leaves: inputs.with_leaves(leaves).attend(plan, backend)[0]

    for backend in ("reference", "cpu"):
        assert torch.autograd.gradcheck(attend(backend), inputs.fresh().leaves())
