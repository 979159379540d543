"""Nothing of the future reaches a query with causal windows: through pooling, stem and encoder.

A change is planted at and after a time. A query whose own cell ends before it must not notice.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from detr_scenes import stir
from torch import Tensor

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, Window
from vicinal._utils.types import BackendName, Pooling
from vicinal.detr import Encoder, EncoderLayer, FeedForward, PointStem

CHANNELS, EMBED, HEADS, LAYERS, IMAGES = 2, 8, 2, 3, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
Strides = tuple[tuple[int, ...], ...]
Pipeline = Callable[["Points"], FeaturePyramid]


@dataclass(frozen=True)
class Case:
    """A grid with a time axis, and windows that are causal along it."""

    shape: tuple[int, ...]
    time: int  # axis
    strides: Strides
    windows: tuple[Any, ...]
    stem_windows: tuple[Any, ...]
    stem_strides: Any = (1, 2)
    periodic: tuple[int, ...] = ()  # axes

    @property
    def dim(self) -> int:
        return len(self.shape)

    def instants(self) -> range:
        """Times to plant a change at, within coarse cells and at their borders."""
        return range(3, self.shape[self.time] + 1, max(3, self.shape[self.time] // 4))

    def ends(self, pyramid: FeaturePyramid) -> Tensor:
        """``[nnz]``, the time at which the own cell of every point ends, in raw cells."""
        strides = torch.tensor([stride[self.time] for stride in self.strides])
        return (pyramid.cells[:, self.time] + 1) * strides[pyramid.levels]


def past(size: Any, time: int, dim: int, **options: Any) -> Window:
    """A window that is causal along the time axis alone."""
    return Window(size, causal=tuple(axis == time for axis in range(dim)), **options)


def every(strides: Sequence[int], dim: int) -> Strides:
    return tuple((stride,) * dim for stride in strides)


CASES = {
    "1-D": Case(
        (37,), 0, every((1, 3, 6), 1), (Window(4, causal=True),) * 3, (Window(6, causal=True),) * 2
    ),
    "1-D, coarse first": Case(
        (40,),
        0,
        every((8, 1, 2), 1),
        (Window(3, causal=True), Window(2, causal=True, dilation=3), Window(1, causal=True)),
        (Window(1, causal=True), Window(2, causal=True)),
        stem_strides=(1, 8),
    ),
    "time first": Case(
        (18, 12),
        0,
        every((1, 2, 4), 2),
        tuple(past((n, 5), 0, 2) for n in (4, 3, 2)),
        (past((3, 3), 0, 2), past((2, 3), 0, 2)),
    ),
    "time last, strides per axis": Case(
        (11, 26),
        1,
        ((4, 6), (2, 3), (2, 1)),
        (past((3, 2), 1, 2), past(5, 1, 2, shape="ball"), past((3, 4), 1, 2, dilation=(1, 2))),
        (past((3, 5), 1, 2, shape="ball"), past((1, 2), 1, 2)),
        stem_strides=(1, (2, 3)),
    ),
    "strides above 1, a level off": Case(
        (24, 20),
        0,
        ((2, 2), (4, 3), (8, 6)),
        (past((2, 3), 0, 2), 0, past((2, 3), 0, 2)),
        (past((4, 3), 0, 2, dilation=(2, 1)), 0),
        stem_strides=((1, 1), (2, 3)),
    ),
    "3-D, time in the middle": Case(
        (7, 20, 6),
        1,
        ((3, 6, 2), (1, 1, 1), (3, 3, 1)),
        (past((1, 2, 3), 1, 3), past((3, 5, 3), 1, 3), past((3, 3, 3), 1, 3, shape="ball")),
        (past((3, 4, 3), 1, 3), past((1, 2, 3), 1, 3)),
        stem_strides=(1, (2, 4, 1)),
    ),
    "around a periodic axis": Case(
        (24, 16),
        0,
        every((1, 2, 4), 2),
        (past((3, 5), 0, 2), past((2, 3), 0, 2, dilation=(1, 2)), past((2, 3), 0, 2)),
        (past((2, 5), 0, 2), past((2, 3), 0, 2)),
        periodic=(1,),
    ),
    "3-D, causal along all axes": Case(
        (20, 7, 6),
        0,
        every((1, 2, 4), 3),
        (Window((5, 2, 3), causal=True), Window(2, causal=True), Window(2, causal=True)),
        (Window((4, 2, 2), causal=True), Window(2, causal=True)),
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@dataclass(frozen=True)
class Points:
    """Raw points ``[n]`` of a grid: image and cell, and values."""

    coordinates: Tensor
    values: Tensor

    @classmethod
    def random(cls, case: Case, n: int, seed: int, dtype: torch.dtype = torch.float64) -> "Points":
        generator = torch.Generator().manual_seed(seed)
        sizes = (IMAGES, *case.shape)
        axes = [torch.randint(size, (n,), generator=generator) for size in sizes]
        values = torch.randn(n, CHANNELS, generator=generator, dtype=torch.float64)
        return cls(torch.stack(axes, 1), values.to(dtype))

    def later(self, case: Case, instant: int) -> Tensor:
        """Bool ``[n]``: the points at ``instant`` and after it."""
        return self.coordinates[:, 1 + case.time] >= instant

    def take(self, rows: Tensor) -> "Points":
        return Points(self.coordinates[rows], self.values[rows])

    def with_added(self, others: "Points") -> "Points":
        pairs = (self.coordinates, others.coordinates), (self.values, others.values)
        return Points(*(torch.cat(pair) for pair in pairs))


def redraw(points: Points, case: Case, instant: int) -> Points:
    """Other values at and after ``instant``."""
    other = Points.random(case, len(points.values), 91, points.values.dtype).values
    return dataclasses.replace(
        points, values=torch.where(points.later(case, instant)[:, None], other, points.values)
    )


def spoil(points: Points, case: Case, instant: int) -> Points:
    """Values that no weight of zero hides: infinite at ``instant``, else not a number."""
    later = points.later(case, instant)
    values = points.values.masked_fill(later[:, None], torch.nan)
    values[points.coordinates[:, 1 + case.time] == instant] = torch.inf
    return dataclasses.replace(points, values=values)


def add(points: Points, case: Case, instant: int) -> Points:
    """As many points again at and after ``instant``, in front of the others."""
    more = Points.random(case, 4 * len(points.values), 92, points.values.dtype)
    return more.take(more.later(case, instant)).with_added(points)


def remove_some(points: Points, case: Case, instant: int) -> Points:
    generator = torch.Generator().manual_seed(93)
    kept = torch.rand(len(points.values), generator=generator) < 0.5
    return points.take(kept | ~points.later(case, instant))


def remove_all(points: Points, case: Case, instant: int) -> Points:
    return points.take(~points.later(case, instant))


EQUAL_BITS = [redraw, spoil]
OTHER_POINTS = [add, remove_some, remove_all]


def rows_before(case: Case, pyramid: FeaturePyramid, instant: int) -> dict[tuple[int, ...], int]:
    """The rows of the points whose own cell ends at ``instant`` or before, by coordinates."""
    rows = (case.ends(pyramid) <= instant).nonzero().flatten()
    found = {tuple(pyramid.coordinates[row].tolist()): int(row) for row in rows}
    assert len(found) == len(rows)
    return found


def assert_unchanged(
    case: Case, before: FeaturePyramid, after: FeaturePyramid, instant: int, tolerance: float | None
) -> None:
    """Equal values of all points whose own cell ends at ``instant`` or before; None: equal bits."""
    expected, found = (rows_before(case, pyramid, instant) for pyramid in (before, after))
    assert expected.keys() == found.keys()
    left = before.values[list(expected.values())]
    right = after.values[[found[point] for point in expected]]
    if tolerance is None:
        assert torch.equal(left, right)
    else:
        torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


def differ_before(
    case: Case, before: FeaturePyramid, after: FeaturePyramid, instant: int
) -> Tensor:
    """Bool: which points whose own cell ends before ``instant`` differ, of the same points."""
    changed = (before.values - after.values).abs().amax(1) > 1e-6
    return changed[case.ends(before) <= instant]


def check(case: Case, pipeline: Pipeline, dtype: torch.dtype = torch.float64) -> None:
    """Plants every kind of change at several times."""
    points = Points.random(case, 90, 0, dtype)
    before = pipeline(points)
    n_checked = 0
    for instant in case.instants():
        n_checked += len(rows_before(case, before, instant))
        for change in (*EQUAL_BITS, *OTHER_POINTS):
            after = pipeline(change(points, case, instant))
            tolerance = None if change in EQUAL_BITS else TOLERANCE[dtype]
            assert_unchanged(case, before, after, instant, tolerance)
    assert n_checked > 100


def make_stem(case: Case, windows: tuple[Any, ...] | None = None) -> PointStem:
    windows = case.stem_windows if windows is None else windows
    strides = case.stem_strides
    stem = PointStem(CHANNELS, EMBED, case.strides, windows, strides, case.dim).double()
    stir(stem)
    return stem


def make_block(case: Case, windows: tuple[Any, ...] | None = None, **options: Any) -> Any:
    windows = case.windows if windows is None else windows
    # Dropout must not act in evaluation.
    options = {"dropout": 0.3} | options
    block = SparseNeighborhoodAttentionBlock(EMBED, HEADS, 3, windows, case.dim, **options).double()
    stir(block)
    return block.eval()


def make_encoder(case: Case, windows: tuple[Any, ...] | None = None, **options: Any) -> Encoder:
    layers = [
        EncoderLayer(make_block(case, windows, **options), FeedForward(EMBED, dropout=0.3))
        for _ in range(LAYERS)
    ]
    return Encoder(layers, EMBED).double().eval()


def stem_of(case: Case, stem: PointStem) -> Pipeline:
    def run(points: Points) -> FeaturePyramid:
        pyramid: FeaturePyramid = stem(
            points.coordinates, points.values, case.shape, IMAGES, periodic_axes=case.periodic
        )
        return pyramid

    return run


def without_causal_axes(windows: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same windows around the query's cell, an even size enlarged by one."""
    return tuple(
        Window(odd(window.size), window.dilation, shape=window.shape) if window else 0
        for window in windows
    )


def odd(size: Any) -> Any:
    return tuple(map(odd, size)) if isinstance(size, tuple) else size | 1


@each_case
@pytest.mark.parametrize("pooling", ["mean", "sum", "max"])
def test_pooled_values(case: Case, pooling: Pooling) -> None:
    def pool(points: Points) -> FeaturePyramid:
        return FeaturePyramid.from_points(
            points.coordinates,
            points.values,
            case.shape,
            IMAGES,
            strides=case.strides,
            pooling=pooling,
            periodic_axes=case.periodic,
        )

    check(case, pool)


@each_case
@torch.no_grad()
def test_the_stem(case: Case) -> None:
    check(case, stem_of(case, make_stem(case)))


@each_case
@torch.no_grad()
def test_stem_and_encoder(case: Case, backend: BackendName) -> None:
    stem, encoder = stem_of(case, make_stem(case)), make_encoder(case, backend=backend)
    check(case, lambda points: encoder(stem(points)))


@each_case
@torch.no_grad()
def test_stem_and_encoder_in_float32(case: Case, backend: BackendName) -> None:
    stem, encoder = make_stem(case).float(), make_encoder(case, backend=backend).float()
    embed = stem_of(case, stem)
    check(case, lambda points: encoder(embed(points)), torch.float32)


@each_case
@torch.no_grad()
def test_blocks_with_a_background_and_a_learned_bias(case: Case, backend: BackendName) -> None:
    stem = stem_of(case, make_stem(case))
    options: dict[str, Any] = {"backend": backend, "bias": True, "relative_bias": True}
    blocks = [make_block(case, **options) for _ in range(LAYERS)]
    background = torch.randn(IMAGES, 3, EMBED, dtype=torch.float64)

    def encode(points: Points) -> FeaturePyramid:
        pyramid = stem(points)
        plan = blocks[0].make_encoder_plan(pyramid)
        for block in blocks:
            pyramid = block.encode(pyramid, plan, background)
        return pyramid

    check(case, encode)


@each_case
def test_no_gradient_reaches_the_future(case: Case, backend: BackendName) -> None:
    stem, encoder = stem_of(case, make_stem(case)), make_encoder(case, backend=backend)
    points = Points.random(case, 90, 0)
    points.values.requires_grad_()
    encoded = encoder(stem(points))
    for instant in case.instants():
        before = encoded.values[case.ends(encoded) <= instant]
        weights = torch.randn_like(before)
        (grad,) = torch.autograd.grad((before * weights).sum(), points.values, retain_graph=True)
        later = points.later(case, instant)
        assert not grad[later].any()
        assert not later.any() or len(before) < len(encoded)
    assert grad[~later].any(1).float().mean() > 0.9


@each_case
@torch.no_grad()
def test_windows_that_are_not_causal_see_the_future(case: Case) -> None:
    points = Points.random(case, 90, 0)
    around = without_causal_axes(case.windows)
    stem = stem_of(case, make_stem(case))
    stem_around = stem_of(case, make_stem(case, without_causal_axes(case.stem_windows)))
    encoder = make_encoder(case, around)
    for pipeline in (stem_around, lambda points: encoder(stem(points))):
        before = pipeline(points)
        changed = [
            differ_before(case, before, pipeline(redraw(points, case, instant)), instant).any()
            for instant in case.instants()
        ]
        assert sum(changed) > len(changed) / 2


@each_case
@torch.no_grad()
def test_windows_of_other_query_levels_see_the_future(case: Case) -> None:
    """A plan for queries of coarser levels looks until coarser cells end."""
    points = Points.random(case, 90, 0)
    stem, block = stem_of(case, make_stem(case)), make_block(case)
    coarsest = max(range(3), key=lambda level: case.strides[level][case.time])

    def attend(points: Points) -> FeaturePyramid:
        pyramid = stem(points)
        levels = torch.full_like(pyramid.levels, coarsest)
        where = pyramid.positions(torch.float64), pyramid.batch_offsets()
        out = block(pyramid.values, *where, pyramid, query_level_indices=levels)
        return pyramid.with_values(out)

    before = attend(points)
    changed = [
        differ_before(case, before, attend(redraw(points, case, instant)), instant).any()
        for instant in case.instants()
    ]
    assert any(changed)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.periodic])
@torch.no_grad()
def test_windows_reach_to_the_end_of_the_own_cell(name: str, backend: BackendName) -> None:
    """A query attends to the cells of all levels that end with its own cell."""
    case = CASES[name]
    sizes = tuple(9 if axis == case.time else 17 for axis in range(case.dim))
    windows = (past(sizes, case.time, case.dim),) * 3
    block = make_block(case, windows, backend=backend)
    pyramid = stem_of(case, make_stem(case))(Points.random(case, 90, 0))
    ends = case.ends(pyramid)
    where = pyramid.positions(torch.float64), pyramid.batch_offsets()
    rest: dict[str, Any] = {"query_level_indices": pyramid.levels}
    out = block(pyramid.values, *where, pyramid, **rest)
    strides = torch.tensor([stride[case.time] for stride in case.strides])
    for point in range(0, len(pyramid), 7):
        values = pyramid.values.clone()
        values[point] += 1
        moved = block(pyramid.values, *where, pyramid.with_values(values), **rest) - out
        level = pyramid.levels[point]
        same = (pyramid.batch == pyramid.batch[point]) & _near(case, pyramid, point, 8)
        distance = ends.div(strides[level], rounding_mode="floor") * strides[level] - ends[point]
        seen = same & (distance >= 0) & (distance <= 8 * strides[level])
        assert torch.equal(moved.abs().amax(1) > 1e-9, seen)


def _near(case: Case, pyramid: FeaturePyramid, point: int, radius: int) -> Tensor:
    """Which queries have ``point`` within ``radius`` cells along all axes but time."""
    level = int(pyramid.levels[point])
    scale = torch.tensor(pyramid.level_shapes[level]) / torch.tensor(
        [max(sizes) for sizes in zip(*pyramid.level_shapes, strict=True)]
    )
    centers = (pyramid.positions(torch.float64) * scale).floor()
    distance = (centers - pyramid.cells[point]).abs()
    distance[:, case.time] = 0
    return (distance <= radius).all(1)


@torch.no_grad()
def test_the_plan_of_an_encoder_is_what_its_layers_would_make() -> None:
    case = CASES["time first"]
    encoder, stem = make_encoder(case), stem_of(case, make_stem(case))
    pyramid = stem(Points.random(case, 90, 0))
    values, where = pyramid.values, (pyramid.positions(torch.float64), pyramid.batch_offsets())
    for layer in encoder.layers:
        values = layer(values, pyramid, *where)
    torch.testing.assert_close(encoder(pyramid).values, encoder.norm(values), rtol=0, atol=1e-12)
