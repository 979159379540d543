"""Windows for a wanted number of neighbors."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._plan.keyed_cells import Queries
from ._plan.search import find_plan
from ._utils.checks import is_real, refuse
from ._utils.ragged import offsets_from_ids
from .backends import choose_backend
from .backends.reference import list_pairs
from .pyramid import FeaturePyramid
from .window_shapes import AxisWindows, Window, as_windows, check_windows_fit
from .windows import as_axes

_SAMPLE = 1024  # queries whose neighbors are counted
_MOST_ROWS, _MOST_CELLS = 512, 2**17  # of a window: what a query of a plan costs, and a count here
_MOST_PAIRS = 2**22  # of queries and neighbors in a count; there are more where points share cells
# An axis is as good as the best one if it adds this share of the best one's points per cell.
_AS_GOOD = 0.5
_CLOSE = 1.25  # a window of this factor more or fewer neighbors than wanted is close enough


def suggest_windows(
    pyramid: FeaturePyramid, target: float = 80, *, causal_axes: Sequence[int] = ()
) -> tuple[int | tuple[int, ...] | Window, ...]:
    """Proposes a window per level for a mean number of neighbors, which levels share evenly.

    Every point is a query. A level gets ``target / L`` neighbors; what a level with too few points
    leaves, the others share. The window of a level starts as one cell. It grows along the narrowest
    axis among those that add points, per cell added, at least half as well as the best axis. So
    windows are cubes where the data is alike along all axes, and flat where it is flat. The counts
    come from up to 1,024 queries, spread over all points. The result is the same on every call.

    Use it once, on typical data, and write the windows into the model: a model needs the same
    windows for all its inputs.

    Args:
        pyramid: the points, for example a batch of typical images.
        target: wanted mean number of neighbors per query, over all levels, above 0. Default: 80.
        causal_axes: axes along which windows are causal, such as the time of events. Default: none.

    Returns:
        the window of each level, as ``neighborhood_sizes`` takes them: an odd width, a tuple of
        one per axis, or a causal `Window`. Sizes are at most those of the level. A window has at
        most 512 rows of cells along its longest axis, since plans store each of them. A level
        without points gets one cell.

    Raises:
        ValueError: ``pyramid`` is not a `FeaturePyramid`, ``target`` is not a number above 0,
            ``causal_axes`` are not axes of space, or one of them is periodic, or along one of them
            the sizes of two levels do not divide each other.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, QueryPlacement, plan_neighborhoods, suggest_windows

        ground = torch.cartesian_prod(torch.arange(40), torch.arange(40), torch.tensor([3]))
        points = torch.nn.functional.pad(ground, (1, 0))  # image, x, y, z
        pyramid = FeaturePyramid.from_points(
            points, torch.ones(1600, 1), (40, 40, 8), 1, strides=(1, 2)
        )
        windows = suggest_windows(pyramid, target=50)
        assert windows == ((5, 5, 1), (5, 5, 1))
        placement = QueryPlacement.of_points(pyramid)
        plan = plan_neighborhoods(placement.positions, placement.offsets, pyramid, windows)
        assert 40 < plan.counts().double().mean() < 60
        ```
    """
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    if not is_real(target) or not 0 < target < math.inf:
        refuse("target", "a number of neighbors above 0", target)
    dim, n_levels = pyramid.position_dim, pyramid.n_levels
    axes = as_axes("causal_axes", causal_axes, dim)
    causal = tuple(axis in axes for axis in range(dim))
    smallest = (_box((1,) * dim, causal),) * n_levels
    shapes, periodic = pyramid.level_shapes, pyramid.periodic_axes
    check_windows_fit(smallest, shapes, periodic, "causal_axes")
    sizes = [window.sizes for window in smallest]
    with torch.no_grad():
        levels = _sampled_levels(pyramid, causal)
        _share(levels, float(target), sizes)
    return as_windows([_as_entry(size, causal) for size in sizes], n_levels, dim)


class _Path(NamedTuple):
    """A window on the way from one cell to many."""

    sizes: tuple[int, ...]
    mean: float  # neighbors per query
    is_even: bool  # whether all axes that grow together have grown


def _share(levels: Sequence["_Level"], target: float, sizes: list[tuple[int, ...]]) -> None:
    """Sets the ``sizes`` of the levels' windows such that they share ``target`` neighbors."""
    unshared = missing = target
    # Levels of few points first: the others can make up for them.
    ordered = sorted(levels, key=lambda level: level.most_neighbors)
    for left, level in zip(range(len(levels), 0, -1), ordered, strict=True):
        fair = unshared / left
        # A little more or less than the fair share, to make up for the levels before.
        wanted = min(max(missing / left, fair / _CLOSE), fair * _CLOSE)
        path = list(_growing_windows(level, wanted))
        chosen = _closest(path, wanted)
        sizes[level.index] = chosen.sizes
        unshared, missing = unshared - min(fair, path[-1].mean), missing - chosen.mean


def _closest(path: Sequence[_Path], wanted: float) -> _Path:
    """The window with the number of neighbors closest to ``wanted``, preferably an even one."""

    def factor(window: _Path) -> float:
        low, high = sorted((window.mean, wanted))
        return high / low if low > 0 else math.inf

    even = min((window for window in path if window.is_even), key=factor)
    return even if factor(even) <= _CLOSE else min(path, key=factor)


def _growing_windows(level: "_Level", wanted: float) -> Iterator[_Path]:
    """Windows of a level from one cell on, up to the first with ``wanted`` neighbors."""
    radii = [0] * len(level.shape)
    mean = level.mean(radii)
    yield _Path(level.sizes(radii), mean, is_even=True)
    while mean < wanted and level.reaches_beyond(radii):
        axes = _axes_to_grow(level, radii)
        if not axes:
            return
        for axis in axes:
            radii[axis] = level.next_radius(radii, axis)
            mean = level.mean(radii)
            yield _Path(level.sizes(radii), mean, is_even=axis == axes[-1])


def _axes_to_grow(level: "_Level", radii: Sequence[int]) -> list[int]:
    """The narrowest axes among those that add the most points per cell, the best one first.

    All are equally good if only a window that grows along several axes reaches another point.
    """
    sizes, gains = level.sizes(radii), {}
    for axis in range(len(radii)):
        if level.can_grow(radii, axis):
            grown = [*radii[:axis], level.next_radius(radii, axis), *radii[axis + 1 :]]
            cells = math.prod(level.sizes(grown)) - math.prod(sizes)
            gains[axis] = (level.mean(grown) - level.mean(radii)) / cells
    good = [axis for axis, gain in gains.items() if gain >= _AS_GOOD * max(gains.values())]
    narrowest = [axis for axis in good if sizes[axis] == min(sizes[axis] for axis in good)]
    return sorted(narrowest, key=lambda axis: -gains[axis])


class _Level:
    """The mean numbers of neighbors that sampled queries have on a level, in windows of all sizes
    up to some radius along each axis. A window has ``2 * radius + 1`` cells along an axis, or
    ``radius + 1`` along a causal one.
    """

    def __init__(
        self, index: int, points: FeaturePyramid, queries: Queries, causal: tuple[bool, ...]
    ) -> None:
        self.index, self.points, self.queries, self.causal = index, points, queries, causal
        self.shape = points.level_shapes[index]
        self.limits = [
            size - 1 if causal else (size - 1) // 2
            for size, causal in zip(self.shape, causal, strict=True)
        ]
        per_image = torch.bincount(points.batch, minlength=points.batch_size)
        queries_per_image = queries.offsets.diff()
        self.most_neighbors = float((per_image * queries_per_image).sum()) / self.n_queries
        self.radii = [0] * len(self.shape)
        self.means = self._count_neighbors()
        self.count_farther(range(len(self.shape)))

    @property
    def n_queries(self) -> int:
        return self.queries.positions.shape[0]

    def sizes(self, radii: Sequence[int]) -> tuple[int, ...]:
        """The sizes of a window of these radii."""
        return tuple(
            radius + 1 if causal else 2 * radius + 1
            for radius, causal in zip(radii, self.causal, strict=True)
        )

    def mean(self, radii: Sequence[int]) -> float:
        """The mean number of neighbors in a window of these radii."""
        return float(self.means[tuple(radii)])

    def reaches_beyond(self, radii: Sequence[int]) -> bool:
        """Whether a window may miss points of the queries' images."""
        return self.mean(radii) < self.most_neighbors * (1 - 1e-9)

    def can_grow(self, radii: Sequence[int], axis: int) -> bool:
        """Whether a window of these radii may grow along an axis."""
        return radii[axis] < self.radii[axis] or self.count_farther([axis])

    def next_radius(self, radii: Sequence[int], axis: int) -> int:
        """The least radius along an axis that adds a neighbor; a quarter more if none is known."""
        radius, most = radii[axis], self.radii[axis]
        place: tuple[int | slice, ...] = (*radii[:axis], slice(None), *radii[axis + 1 :])
        along = self.means[place]
        more = (along > along[radius]).nonzero()
        return int(more[0]) if len(more) else min(radius + 1 + radius // 4, most)

    def count_farther(self, axes: Sequence[int]) -> bool:
        """Counts neighbors up to about twice the radius; False where limits do not allow that."""
        before = list(self.radii)
        for axis in axes:
            radius = self.radii[axis]
            for farther in (max(2 * radius, 2), radius + 1):
                grown = [*self.radii]
                grown[axis] = min(farther, self.limits[axis])
                sizes = self.sizes(grown)
                n_cells = math.prod(sizes)
                if n_cells <= _MOST_CELLS and n_cells // max(sizes) <= _MOST_ROWS:
                    self.radii = grown
                    break
        if self.radii == before:
            return False
        self.means = self._count_neighbors()
        return True

    def _count_neighbors(self) -> Tensor:
        """float64 ``[radius + 1, ...]``, the mean number of neighbors for each size."""
        sizes, dim = self.sizes(self.radii), len(self.shape)
        windows = [_box((0,) * dim, (False,) * dim)] * self.points.n_levels
        windows[self.index] = window = _box(sizes, self.causal)
        device = self.queries.positions.device
        _, plan, _, _ = find_plan(
            self.queries, self.points, tuple(windows), choose_backend(None, device)
        )
        n_pairs = int((plan.query_slices.stops - plan.query_slices.starts).sum())
        queries = torch.arange(0, self.n_queries, 1 + n_pairs // _MOST_PAIRS, device=device)
        slots = list_pairs(plan, queries)[2]
        counts = torch.bincount(slots.cpu(), minlength=math.prod(sizes))
        counts = counts.view(window.in_key_order().sizes)  # which is the order of pairs
        counts = counts.permute([window.key_axes().index(axis) for axis in range(dim)])
        for axis, first in enumerate(window.first_steps()):
            distances = (torch.arange(sizes[axis]) + first).abs()
            folded = [*counts.shape]
            folded[axis] = self.radii[axis] + 1
            counts = counts.new_zeros(folded).index_add(axis, distances, counts).cumsum(axis)
        return counts.double() / len(queries)


def _sampled_levels(pyramid: FeaturePyramid, causal: tuple[bool, ...]) -> list[_Level]:
    """The levels that have points, with some of the points of all levels as queries."""
    rows = (~pyramid.misplaced()).nonzero()[:, 0]
    rows = rows[torch.argsort(pyramid.batch[rows], stable=True)]
    n, n_sampled = len(rows), min(len(rows), _SAMPLE)
    # One of each n / n_sampled rows, at random, so that no pattern of rows is met in step.
    within = torch.rand(n_sampled, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampled = ((torch.arange(n_sampled) + within) * n / max(n_sampled, 1)).long().clamp(max=n - 1)
    chosen = rows[sampled.to(rows.device)]
    queries = Queries(
        pyramid.positions()[chosen],
        offsets_from_ids(pyramid.batch[chosen], pyramid.batch_size),
        pyramid.levels[chosen] if any(causal) else None,
    )
    levels = []
    for level in range(pyramid.n_levels):
        coordinates = pyramid.coordinates[rows[pyramid.levels[rows] == level]]
        if len(coordinates):
            points = FeaturePyramid(
                coordinates.new_zeros(len(coordinates), 1),
                coordinates,
                pyramid.level_shapes,
                pyramid.batch_size,
                check_contents=False,
                periodic_axes=pyramid.periodic_axes,
            )
            levels.append(_Level(level, points, queries, causal))
    return levels


def _box(sizes: tuple[int, ...], causal: tuple[bool, ...]) -> AxisWindows:
    return AxisWindows(sizes, (1,) * len(sizes), causal, is_ball=False)


def _as_entry(sizes: tuple[int, ...], causal: tuple[bool, ...]) -> tuple[int, ...] | Window:
    return Window(sizes, causal=causal) if any(causal) else sizes
