"""The plan: every query's neighbors as contiguous slices of sorted orders, in both directions.

Sorted by (level, image, cell), the points of every row of a window are contiguous, so a
neighborhood is R slices, one per row. The relation is symmetric: with the queries sorted by the
first cell of their windows, one order per level, the queries whose window holds a point are slices
as well.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._index.cell_keys import CellKeys, longest_axis
from ._index.copies import PointCopies
from ._index.kernel_tables import KernelTables, kernel_tables
from ._index.tiles import GroupedCells, find_tiles
from ._plan.keyed_cells import KeyedCells, Queries
from ._plan.search import find_plan, join_column_ids
from ._plan.statistics import NeighborStatistics, count_neighbors, summarize
from ._utils.checks import (
    LevelShapes,
    as_integer,
    as_tensor,
    check_ids,
    check_rows,
    has_contents,
    refuse,
)
from ._utils.collation import of_a_batch
from ._utils.constants import execution_mode, trainable_tensors
from ._utils.profiling import stage
from .backends import choose_backend
from .backends.reference import list_pairs, search_slices
from .backends.types import (
    Backend,
    FindLists,
    FindPointSlices,
    FindRuns,
    NeighborSlices,
    PlanTensors,
    Tiles,
)
from .placement import check_placement
from .pyramid import FeaturePyramid
from .window_shapes import (
    Window,
    Windows,
    WindowsLike,
    as_windows,
    causal_axes,
    check_windows_fit,
    windows_on_axes,
)
from .windows import as_query_levels

_INT32_MAX = 2**31 - 1
T = TypeVar("T")


@of_a_batch
@dataclass(frozen=True, repr=False, eq=False)
class NeighborhoodPlan:
    """The neighborhoods of N queries among nnz points. `plan_neighborhoods` makes it.

    Layers with the same queries, points and windows share one plan. The shapes of its tensors
    depend on N, nnz, the number of levels and the windows alone, never on tensor contents.

    Attributes:
        neighborhood_sizes: the window of each level: a width, a tuple of one per axis, a `Window`,
            or 0 for none.
        position_dim: number of spatial dimensions, P.
        batch_size: number of images, B.
        level_shapes: the spatial shape of each level.
        periodic_axes: axes along which the map repeats.
        copies: the copies of points beyond the seam of periodic axes. There are none without
            periodic axes. Keys and values have a row for each of them, after those of the points.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, plan_neighborhoods

        points = torch.tensor([[0, 3, 4], [0, 3, 5], [0, 9, 9]])  # image, row, column
        pyramid = FeaturePyramid.from_points(points, torch.ones(3, 8), (16, 16), 1, strides=(1, 2))
        plan = plan_neighborhoods(
            pyramid.positions(), pyramid.batch_offsets(), pyramid, neighborhood_sizes=[3, 3]
        )
        assert plan.counts().tolist() == [3, 3, 2, 3, 2]  # neighbors of each of the five points
        assert plan.pairs().shape == (13, 2)
        ```
    """

    neighborhood_sizes: tuple[int | tuple[int, ...] | Window, ...]
    position_dim: int
    batch_size: int
    level_shapes: LevelShapes
    periodic_axes: tuple[int, ...]
    copies: PointCopies
    _tensors: PlanTensors  # without tiles
    _keyed_cells: KeyedCells
    _created_in: str = "python"  # see `execution_mode`
    _cache: dict[str, Any] = field(default_factory=dict)

    @property
    def n_queries(self) -> int:
        """N, the number of queries."""
        return self._tensors.n_queries()

    @property
    def n_points(self) -> int:
        """nnz, the number of points of all images and levels."""
        return self._tensors.n_points() - self.copies.points.shape[0]

    @property
    def n_keys(self) -> int:
        """The number of points and of their copies, nnz + C."""
        return self._tensors.n_points()

    @property
    def n_levels(self) -> int:
        """L, the number of levels."""
        return len(self.neighborhood_sizes)

    @property
    def window_slots(self) -> int:
        """K, the number of cells in all windows of a query, empty cells included."""
        return self._tensors.window_slots()

    @property
    def query_batch(self) -> Tensor:
        """int32 ``[N]``, the image of every query, -1 for an invalid one without neighbors."""
        return self._tensors.query_batch

    @property
    def query_ids(self) -> Tensor | None:
        """int32 ``[N]``, what dropout counts each query as, see `with_dropout_ids`; None: its
        row.
        """
        return self._tensors.query_ids

    @property
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.query_batch.device

    def counts(self) -> Tensor:
        """Returns the number of neighbors of each query, int64 ``[N]``."""
        return count_neighbors(self._tensors).sum(0)

    def neighbors_per_level(self) -> NeighborStatistics:
        """Returns mean, median, 99th percentile and largest number of neighbors per query, for each
        level.

        Queries without neighbors count, also invalid ones. The tensors are on the plan's device; on
        a GPU, to read them synchronizes.
        """
        return summarize(count_neighbors(self._tensors))

    def pairs(self, queries: Tensor | None = None) -> Tensor:
        """Lists (query, point) rows, int64 ``[M, 2]``, query by query.

        It is for inspection and tests: the attention never builds a tensor of this size.

        Args:
            queries: integer ``[n]``, the queries to list; None (default): all of them.

        Raises:
            ValueError: ``queries`` is not an integer tensor of indices in ``[0, N)``.
        """
        queries = self._check_queries(queries)
        row, key, _ = list_pairs(self._tensors, queries)
        return torch.stack((queries[row], self.points_of_keys(key)), 1)

    def append_copies(self, values: Tensor) -> Tensor:
        """Returns ``values`` ``[nnz, ...]`` with the rows of the copies appended.

        Raises:
            ValueError: ``values`` is not a tensor with a row per point, on the plan's device.
        """
        values = as_tensor("values", values, self.device)
        is_tensor = isinstance(values, Tensor) and values.layout == torch.strided
        if not is_tensor or values.shape[:1] != (self.n_points,) or values.device != self.device:
            expected = f"a tensor with a row for each of {self.n_points} points on {self.device}"
            refuse("values", expected, values)
        if not self.periodic_axes:
            return values
        return torch.cat((values, values.index_select(0, self.copies.points)))

    def points_of_keys(self, keys: Tensor) -> Tensor:
        """Returns the points, int64 ``[m]``, that the rows ``keys`` of the keys belong to.

        Raises:
            ValueError: ``keys`` are not integers ``[m]`` in ``[0, n_keys)``.
        """
        keys = check_rows("keys", keys, self.n_keys, self.device)
        if not self.periodic_axes:
            return keys
        points = torch.arange(self.n_points, device=keys.device)
        return self.append_copies(points)[keys]

    def with_dropout_ids(
        self, query_ids: Tensor, point_ids: Tensor, n_points: int
    ) -> "NeighborhoodPlan":
        """Returns the same plan, but dropout counts queries and points by these ids.

        Whether dropout keeps a weight follows from a seed, the head, and what the query and the
        point count as, by default their rows. A plan of some rows of a larger problem, whose ids
        are their rows there, drops what the plan of the larger problem drops, given the same seed.
        Copies beyond the seam of periodic axes count as the points that they are of. Both plans
        share what else they hold.

        Args:
            query_ids: integer ``[N]``, what each query counts as, in ``[0, 2^31)``.
            point_ids: integer ``[nnz]``, what each point counts as, in ``[0, n_points)``.
            n_points: the number of points of the larger problem, below 2^31. Empty cells, which a
                background fills, count as numbers from ``n_points`` on.

        Raises:
            ValueError: ids are not integer tensors of these shapes on the plan's device,
                ``n_points`` is not an integer in ``[0, 2^31)``, or, on the CPU, an id is outside
                its range.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid, neighborhood_attention, plan_neighborhoods

            coordinates = torch.tensor([[0, 2, 2, 0], [0, 3, 2, 0], [0, 3, 3, 0]])
            pyramid = FeaturePyramid(torch.randn(3, 8), coordinates, [(8, 8)], batch_size=1)
            positions, rows = pyramid.positions(), torch.arange(3)
            q, k, v = torch.randn(3, 3, 2, 4)

            def attend(queries: torch.Tensor) -> torch.Tensor:
                offsets = torch.tensor([0, len(queries)])
                plan = plan_neighborhoods(positions[queries], offsets, pyramid, [3])
                plan = plan.with_dropout_ids(queries, rows, n_points=3)
                torch.manual_seed(0)
                return neighborhood_attention(q[queries], k, v, plan, dropout_p=0.5)

            parts = torch.cat((attend(rows[:1]), attend(rows[1:])))
            torch.testing.assert_close(parts, attend(rows))
            ```
        """
        count = as_integer(n_points)
        if count is None or not 0 <= count <= _INT32_MAX:
            refuse("n_points", "an integer in [0, 2^31)", n_points)
        queries = check_ids("query_ids", query_ids, self.n_queries, 2**31, self.device)
        points = check_ids("point_ids", point_ids, self.n_points, count, self.device)
        columns = torch.nn.functional.pad(points, (0, 1), value=count)
        return self._with_ids(queries.int(), join_column_ids(columns, self.copies))

    def _with_ids(self, query_ids: Tensor, column_ids: Tensor) -> "NeighborhoodPlan":
        """The same plan with these `PlanTensors.query_ids` and `PlanTensors.column_ids`."""
        tensors = self._tensors._replace(query_ids=query_ids, column_ids=column_ids)
        # The cache, which both share, holds nothing that depends on ids.
        return dataclasses.replace(self, _tensors=tensors)

    def to(self, device: torch.device | str) -> "NeighborhoodPlan":
        """Returns the same plan on another device."""
        if torch.device(device) == self.device:
            return self
        tensors = self._tensors
        return dataclasses.replace(
            self,
            _tensors=tensors._replace(
                query_slices=NeighborSlices(*(part.to(device) for part in tensors.query_slices)),
                query_batch=tensors.query_batch.to(device),
                first_columns=tensors.first_columns.to(device),
                point_columns=tensors.point_columns.to(device),
                window_rows=tensors.window_rows.to(device),
                query_ids=_move(tensors.query_ids, device),
                column_ids=_move(tensors.column_ids, device),
            ),
            copies=PointCopies(*(part.to(device) for part in self.copies)),
            _keyed_cells=self._keyed_cells.to(device),
            _created_in=execution_mode(torch.device(device)),
            _cache={},
        )

    def __getstate__(self) -> dict[str, Any]:
        """Plain tensors, tuples and numbers; what can be found again is left out."""
        return {**vars(self), "_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # On the device that the tensors were loaded to.
        mode = execution_mode(state["_keyed_cells"].positions.device)
        vars(self).update(state, _created_in=mode)

    def __repr__(self) -> str:
        if not has_contents(self._tensors.query_batch):
            sizes = f"queries={self.n_queries}, points={self.n_points}"
            return f"NeighborhoodPlan({sizes}, device={self.device})"
        counts = count_neighbors(self._tensors)
        by_level, of_queries = summarize(counts), counts.sum(0)
        largest = int(of_queries.max()) if len(of_queries) else 0
        return (
            f"NeighborhoodPlan(queries={self.n_queries}, points={self.n_points}, "
            f"neighborhood_sizes={list(self.neighborhood_sizes)}, "
            f"position_dim={self.position_dim}, neighbors: mean {float(by_level.mean.sum()):.1f}, "
            f"largest {largest}; by level: {by_level.describe()}; device={self.device})"
        )

    def _check_queries(self, queries: Tensor | None) -> Tensor:
        """``queries`` as int64, or all of them for None; raises ValueError for other indices."""
        return check_rows("queries", queries, self.n_queries, self.device)

    def _point_slices(self) -> NeighborSlices:
        """The queries whose window holds each point: starts and stops ``[nnz, max R[l]]``, order
        ``[L * N]``: one order of the queries per level, level after level.
        """
        return self._cached("point_slices", self._find_point_slices)

    def _query_tiles(self, find_runs: FindRuns, find_lists: FindLists | None = None) -> Tiles:
        """The points of tiles of queries, merged and listed by ops of a back end."""
        return self._cached("query_tiles", lambda: self._find_query_tiles(find_runs, find_lists))

    def _point_tiles(self, find_runs: FindRuns, find_lists: FindLists | None = None) -> Tiles:
        """The queries of tiles of points, merged and listed by ops of a back end."""
        return self._cached("point_tiles", lambda: self._find_point_tiles(find_runs, find_lists))

    def shared_by_layers(self, name: str, find: Callable[[], T]) -> T:
        """The result of ``find``, which follows from the points. Layers that share the plan share
        it on a GPU, where each op costs a launch.
        """
        mode = execution_mode(self.device)
        shared = self.device.type != "cpu" and mode != "compiler" and mode == self._created_in
        return self._cached(name, find) if shared or name in self._cache else find()

    def _cached(self, name: str, find: Callable[[], T]) -> T:
        """The result of ``find``, computed when first asked for."""
        # By hand: compiled graphs do not take the lock of `functools.cached_property`.
        if name not in self._cache:
            mode = execution_mode(self.device)
            if mode != self._created_in:
                return self._find_in_other_mode(name, find, mode)
            with trainable_tensors():
                self._cache[name] = find()
        found: T = self._cache[name]
        return found

    def _find_in_other_mode(self, name: str, find: Callable[[], T], mode: str) -> T:
        """Handles a call in another execution mode than the one that created the plan.

        Tensors captured in a CUDA graph are filled only on replay, and compiled code may be part of
        such a graph, so the plan must not cache them.
        """
        if "compiler" in (mode, self._created_in):
            return find()
        if mode == "graph":
            raise RuntimeError(
                f"the plan lacks what its back end needs ({name}); run one eager step before "
                "CUDA-graph capture"
            )
        raise RuntimeError(
            f"the plan was made in a CUDA graph without what its back end needs ({name}); "
            "use it in that graph"
        )

    def _find_point_slices(self) -> NeighborSlices:
        find = choose_backend(None, self.device).find_point_slices
        tables = self._kernel_tables() if find else None
        if find and tables is not None and tables.fits(self.n_queries, self.n_keys):
            return self._find_point_slices_by(find, tables)
        keys = self._cell_keys()
        query_keys, point_keys, coordinates = (part.long() for part in self._keyed_cells[1:4])
        image, cells, levels = coordinates[:, 0], coordinates[:, 1:-1], coordinates[:, -1]
        sorted_queries, order = torch.sort(query_keys, dim=1, stable=True)
        first, last = keys.rows_around(point_keys, levels)
        # The key of a misplaced point is negative, and so are all keys around it, or unused.
        last = last.masked_fill(point_keys[:, None] < 0, -1)
        starts, stops = search_slices(sorted_queries.flatten(), first, last)
        # Level by level: points of one level share queries, those of different levels rarely do.
        curve = keys.along_curve(cells, levels * self.batch_size + image)
        traversal = torch.argsort(curve, stable=True)
        return NeighborSlices(traversal.int(), starts, stops, order.flatten().int())

    def _find_point_slices_by(self, find: FindPointSlices, tables: KernelTables) -> NeighborSlices:
        query_keys, point_keys = self._keyed_cells[1:3]
        slots = tables.on(self.device, query_keys.dtype)[2]
        cells = self._point_cells()
        return find(query_keys, point_keys, *cells, slots, tables.numbers, self.n_levels)

    @property
    def _windows(self) -> Windows:
        return self._tensors.windows

    def _kernel_tables(self) -> KernelTables | None:
        geometry = self.level_shapes, self._windows, self.batch_size
        return kernel_tables(*geometry, self.periodic_axes)

    def _cell_keys(self) -> CellKeys:
        return CellKeys(self.level_shapes, self._windows, self.batch_size, self.device)

    def _find_query_tiles(self, find_runs: FindRuns, find_lists: FindLists | None) -> Tiles:
        if not self._fits_int32:
            refuse(
                "level_shapes",
                "sizes of at most 2^30 for a back end that takes tiles",
                str(self.level_shapes),
            )
        cells, slices = (self._query_cells(), self._point_cells()), self._tensors.query_slices
        n_slices = self._tensors.slices_per_level()
        return find_tiles(slices, *cells, n_slices, self._windows, find_runs, find_lists)

    def _find_point_tiles(self, find_runs: FindRuns, find_lists: FindLists | None) -> Tiles:
        cells, slices = (self._point_cells(), self._query_cells()), self._point_slices()
        n_slices = [max(self._tensors.slices_per_level())]
        return find_tiles(
            slices, *cells, n_slices, self._windows, find_runs, find_lists, rows_are_queries=False
        )

    def _query_cells(self) -> GroupedCells:
        return self._cached("query_cells", self._find_query_cells)

    def _point_cells(self) -> GroupedCells:
        return self._cached("point_cells", self._find_point_cells)

    def _find_query_cells(self) -> GroupedCells:
        levels = torch.arange(self.n_levels, device=self.device)[:, None]
        groups = torch.where(self.query_batch < 0, -1, self.query_batch * self.n_levels + levels)
        cells = self._keyed_cells.first_cells.transpose(1, 2)
        return GroupedCells(groups.int(), cells.int().contiguous())

    def _find_point_cells(self) -> GroupedCells:
        coordinates = self._keyed_cells.coordinates
        groups = coordinates[:, 0] * self.n_levels + coordinates[:, -1]
        groups = torch.where(self._keyed_cells.point_keys < 0, -2, groups)
        cells = coordinates[:, 1:-1].long()
        if not all(window.is_plain() for window in self._windows):
            cells = self._cell_keys().key_cells(cells, coordinates[:, -1].long())
        return GroupedCells(groups.int()[None], cells.t().int().contiguous()[None])

    @property
    def _fits_int32(self) -> bool:
        """Whether int32 holds all cells, in key coordinates, and the differences between them."""
        longest = longest_axis(self.level_shapes, self._windows)
        return longest < 2**31 and max(map(max, self.level_shapes)) <= 2**30


def plan_neighborhoods(
    query_spatial_positions: Tensor,
    query_batch_offsets: Tensor,
    pyramid: FeaturePyramid,
    neighborhood_sizes: WindowsLike,
    query_level_indices: Tensor | None = None,
    *,
    check_contents: bool | None = None,
) -> NeighborhoodPlan:
    """Finds every query's neighbors once, for all layers that share queries, points and windows.

    The number of images is that of the pyramid or that of the offsets, whichever is larger. Images
    that are missing at the end of the other hold nothing.

    Args:
        query_spatial_positions: floating ``[N, P]``, in cells of the full shape.
        query_batch_offsets: integer ``[B + 1]``: image ``b`` owns the queries
            ``offsets[b]:offsets[b + 1]``.
        pyramid: the points.
        neighborhood_sizes: the window of each level, in cells of that level: an odd width, a tuple
            of one per axis, a `Window`, or 0 for none. Integers ``[L]`` may be a tensor or an
            array.
        query_level_indices: integer ``[N]``, the level of each query, on which windows depend along
            causal axes. None (default): the level that is largest along the axis.
        check_contents: whether to validate offsets, positions and levels. On a GPU that
            synchronizes. None (default): on the CPU only. Without validation, a query that belongs
            to no image or has a position that is not finite has no neighbors.

    Returns:
        the plan, on the device of the positions.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a window is even along an axis that is
            not causal, negative, or wider than its level or causal along a periodic axis, all
            windows are 0, level sizes do not divide each other along a causal axis, positions have
            a dtype that cannot hold the map's cell centers, offsets, positions or levels fail the
            validation, windows have 2^31 rows or more, or the cells are too many for 64-bit keys.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, neighborhood_attention, plan_neighborhoods

        coordinates = torch.randint(0, 32, (200, 2))
        points = torch.nn.functional.pad(coordinates, (1, 0))  # all in image 0
        pyramid = FeaturePyramid.from_points(points, torch.randn(200, 16), (32, 32), batch_size=1)
        positions = torch.tensor([[4.5, 8.0], [20.2, 17.9]])  # two object queries
        plan = plan_neighborhoods(positions, torch.tensor([0, 2]), pyramid, [3, 5, 7, 9])
        k = v = pyramid.values.unflatten(1, (2, 8))  # two heads
        out = neighborhood_attention(torch.randn(2, 2, 8), k, v, plan)
        assert out.shape == (2, 2, 8)
        ```
    """
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    positions, offsets, pyramid = check_placement(
        query_spatial_positions, query_batch_offsets, pyramid, check_contents
    )
    sizes = as_windows(neighborhood_sizes, pyramid.n_levels, pyramid.position_dim)
    windows = windows_on_axes(sizes, pyramid.position_dim)
    check_windows_fit(windows, pyramid.level_shapes, pyramid.periodic_axes)
    levels = as_query_levels(query_level_indices, positions, pyramid.n_levels, check_contents)
    n_queries, n_keys = positions.shape[0], pyramid.values.shape[0] << len(pyramid.periodic_axes)
    largest = _INT32_MAX // pyramid.n_levels
    if n_keys > _INT32_MAX or n_queries > largest or pyramid.batch_size > largest:
        expected = "at most 2^31 points, queries x levels, and images x levels"
        refuse("query_spatial_positions", expected, positions)
    backend = choose_backend(None, positions.device)
    needs_grad = torch.is_grad_enabled()
    with stage("plan_neighborhoods"), trainable_tensors():
        queries = Queries(positions, offsets, levels if causal_axes(windows) else None)
        plan = _plan(queries, pyramid, sizes, windows, backend)
        # Else another back end may still take the plan.
        if backend.find_runs is not None and plan._fits_int32:
            # A plan that a CUDA graph makes cannot be completed later.
            in_graph = plan._created_in == "graph"
            tensors_for(plan, backend, points_need_grad=needs_grad or in_graph)
    return plan


def _move(x: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if x is None else x.to(device)


def tensors_for(plan: NeighborhoodPlan, backend: Backend, *, points_need_grad: bool) -> PlanTensors:
    """What ``backend`` takes of the plan; the tiles of points only if keys or values need
    gradients, since a backward pass cannot complete the plan.
    """
    if backend.find_runs is None:
        return plan._tensors
    find = backend.find_runs, backend.find_lists
    return plan._tensors._replace(
        query_tiles=plan._query_tiles(*find),
        point_tiles=plan._point_tiles(*find) if points_need_grad else None,
    )


def _plan(
    queries: Queries,
    pyramid: FeaturePyramid,
    neighborhood_sizes: tuple[int | tuple[int, ...] | Window, ...],
    windows: Windows,
    backend: Backend,
) -> NeighborhoodPlan:
    copies, tensors, cells, cache = find_plan(queries, pyramid, windows, backend)
    return NeighborhoodPlan(
        neighborhood_sizes=neighborhood_sizes,
        position_dim=pyramid.position_dim,
        batch_size=pyramid.batch_size,
        level_shapes=pyramid.level_shapes,
        periodic_axes=pyramid.periodic_axes,
        copies=copies,
        _tensors=tensors,
        _keyed_cells=cells,
        _created_in=execution_mode(queries.positions.device),
        _cache=cache,
    )
