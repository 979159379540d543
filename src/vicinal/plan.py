"""The plan: every query's neighbors as contiguous slices of sorted orders, in both directions.

Sorted by (level, image, cell), the points of every window row are contiguous, so a neighborhood is
``R = sum(w[l] ** (P - 1))`` slices. The relation is symmetric: with the queries sorted by the cell
they fall into, one order per level, the queries whose window holds a point are slices as well.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._index.cell_keys import CellKeys
from ._index.copies import PointCopies
from ._index.kernel_tables import KernelTables, kernel_tables
from ._index.plan_checks import check_plan_facts, check_plan_points, refuse_plan
from ._index.tiles import GroupedCells, find_tiles
from ._plan.keyed_cells import KeyedCells, in_equal_cells, query_cells
from ._plan.search import find_plan
from ._utils.checks import (
    LevelShapes,
    as_tensor,
    check_neighborhood_sizes,
    check_rows,
    reads_contents,
    refuse,
)
from ._utils.constants import execution_mode, trainable_tensors
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
from .placement import check_placement, query_images
from .pyramid import FeaturePyramid
from .windows import (
    check_windows_fit,
)

_INT32_MAX = 2**31 - 1
T = TypeVar("T")


@dataclass(frozen=True, repr=False, eq=False)
class NeighborhoodPlan:
    """The neighborhoods of N queries among nnz points. `plan_neighborhoods` makes it.

    Layers with the same queries, points and windows share one plan. The shapes of its tensors
    depend on N, nnz, the number of levels and the windows alone, never on tensor contents.

    Attributes:
        neighborhood_sizes: window width of each level.
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

    neighborhood_sizes: tuple[int, ...]
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
    def device(self) -> torch.device:
        """The device of all its tensors."""
        return self.query_batch.device

    def counts(self) -> Tensor:
        """Returns the number of neighbors of each query, int64 ``[N]``."""
        slices = self._tensors.query_slices
        return (slices.stops - slices.starts).sum(1)

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
        """Returns the points, int64 ``[m]``, that the rows ``keys`` of the keys belong to."""
        if not self.periodic_axes:
            return keys
        points = torch.arange(self.n_points, device=keys.device)
        return self.append_copies(points)[keys]

    def to(self, device: torch.device | str) -> "NeighborhoodPlan":
        """Returns the same plan on another device."""
        if torch.device(device) == self.device:
            return self
        tensors = self._tensors
        copies = PointCopies(*(part.to(device) for part in self.copies))
        return dataclasses.replace(
            self,
            _tensors=tensors._replace(
                query_slices=NeighborSlices(*(part.to(device) for part in tensors.query_slices)),
                query_batch=tensors.query_batch.to(device),
                center_columns=tensors.center_columns.to(device),
                point_columns=tensors.point_columns.to(device),
                copy_points=copies.points.int() if self.periodic_axes else None,
            ),
            copies=copies,
            _keyed_cells=KeyedCells(*(part.to(device) for part in self._keyed_cells)),
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
        counts = self.counts()
        mean, largest = (
            (float(counts.double().mean()), int(counts.max())) if len(counts) else (0, 0)
        )
        return (
            f"NeighborhoodPlan(queries={self.n_queries}, points={self.n_points}, "
            f"neighborhood_sizes={list(self.neighborhood_sizes)}, "
            f"position_dim={self.position_dim}, neighbors: mean {mean:.1f}, largest {largest}; "
            f"device={self.device})"
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
        backend = choose_backend(None, self.device)
        tables = self._kernel_tables()
        fits = tables.fits(self.n_queries, self.n_keys)
        if backend.find_point_slices is not None and fits:
            return self._find_point_slices_by(backend.find_point_slices, tables)
        keys = self._cell_keys()
        _, *others, _ = self._keyed_cells
        query_keys, point_keys, coordinates = (part.long() for part in others)
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
        _, query_keys, point_keys, _, _ = self._keyed_cells
        slots = tables.on(self.device, query_keys.dtype)[2]
        cells = self._point_cells()
        return find(query_keys, point_keys, *cells, slots, tables.numbers, self.n_levels)

    def _kernel_tables(self) -> KernelTables:
        return kernel_tables(
            self.level_shapes, self.neighborhood_sizes, self.batch_size, self.periodic_axes
        )

    def _cell_keys(self) -> CellKeys:
        geometry = self.level_shapes, self.neighborhood_sizes, self.batch_size
        return CellKeys(*geometry, self.device)

    def _find_query_tiles(self, find_runs: FindRuns, find_lists: FindLists | None) -> Tiles:
        if not self._fits_int32:
            refuse(
                "level_shapes",
                "sizes of at most 2^30 for a back end that takes tiles",
                str(self.level_shapes),
            )
        windows = self.neighborhood_sizes, self.position_dim
        cells = self._query_cells(), self._point_cells()
        lists = find_lists, self.neighborhood_sizes
        return find_tiles(self._tensors.query_slices, *cells, *windows, find_runs, *lists)

    def _find_point_tiles(self, find_runs: FindRuns, find_lists: FindLists | None) -> Tiles:
        windows = [max(self.neighborhood_sizes)], self.position_dim
        cells = self._point_cells(), self._query_cells()
        lists = find_lists, self.neighborhood_sizes
        return find_tiles(self._point_slices(), *cells, *windows, find_runs, *lists)

    def _query_cells(self) -> GroupedCells:
        return self._cached("query_cells", self._find_query_cells)

    def _point_cells(self) -> GroupedCells:
        return self._cached("point_cells", self._find_point_cells)

    def _find_query_cells(self) -> GroupedCells:
        levels = torch.arange(self.n_levels, device=self.device)[:, None]
        groups = torch.where(self.query_batch < 0, -1, self.query_batch * self.n_levels + levels)
        cells = self._keyed_cells.centers.transpose(1, 2)
        return GroupedCells(groups.int(), cells.int().contiguous())

    def _find_point_cells(self) -> GroupedCells:
        coordinates = self._keyed_cells.coordinates
        groups = coordinates[:, 0] * self.n_levels + coordinates[:, -1]
        groups = torch.where(self._keyed_cells.point_keys < 0, -2, groups)
        return GroupedCells(groups.int()[None], coordinates[:, 1:-1].t().int().contiguous()[None])

    @property
    def _fits_int32(self) -> bool:
        """Whether int32 holds all cells and the differences between them."""
        return max(map(max, self.level_shapes)) <= 2**30


def plan_neighborhoods(
    query_spatial_positions: Tensor,
    query_batch_offsets: Tensor,
    pyramid: FeaturePyramid,
    neighborhood_sizes: Tensor | Sequence[int],
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
        neighborhood_sizes: odd window width of each level, in cells of that level.
        check_contents: whether to validate offsets and positions. On a GPU that synchronizes. None
            (default): on the CPU only. Without validation, a query that belongs to no image or has
            a position that is not finite has no neighbors.

    Returns:
        the plan, on the device of the positions.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a window is even or not positive, or
            wider than its level along a periodic axis, positions have a dtype that cannot hold the
            map's cell centers, offsets or positions fail the validation, or the cells are too many
            for 64-bit keys.

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
    sizes = check_neighborhood_sizes(neighborhood_sizes, pyramid.n_levels)
    check_windows_fit(sizes, pyramid.level_shapes, pyramid.periodic_axes)
    n_queries, n_keys = positions.shape[0], pyramid.values.shape[0] << len(pyramid.periodic_axes)
    largest = _INT32_MAX // pyramid.n_levels
    if n_keys > _INT32_MAX or n_queries > largest or pyramid.batch_size > largest:
        expected = "at most 2^31 points, queries x levels, and images x levels"
        refuse("query_spatial_positions", expected, positions)
    backend = choose_backend(None, positions.device)
    needs_grad = torch.is_grad_enabled()
    with trainable_tensors():
        plan = _plan(positions, offsets, pyramid, sizes, backend)
        if plan._fits_int32:  # else another back end may still take the plan
            # A plan that a CUDA graph makes cannot be completed later.
            in_graph = execution_mode(plan.device) == "graph"
            tensors_for(plan, backend, points_need_grad=needs_grad or in_graph)
    return plan


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


def check_plan(
    plan: NeighborhoodPlan,
    positions: Tensor,
    offsets: Tensor,
    pyramid: FeaturePyramid,
    neighborhood_sizes: tuple[int, ...],
    check_contents: bool | None = None,
) -> None:
    """Raises ValueError unless ``plan`` was made for these queries, points and windows.

    Queries may have moved within their cells. On a GPU only what needs no synchronization is
    compared, unless ``check_contents`` is True.

    Args:
        plan: the plan to check.
        positions, offsets, pyramid: of the queries and points, as `check_placement` returns them.
        neighborhood_sizes: window width of each level.
        check_contents: whether to compare tensor contents. None: on the CPU only.
    """
    facts = {
        "neighborhood_sizes": (plan.neighborhood_sizes, neighborhood_sizes),
        "level_spatial_shapes": (plan.level_shapes, pyramid.level_shapes),
        "periodic_axes": (plan.periodic_axes, pyramid.periodic_axes),
        "number of images": (plan.batch_size, pyramid.batch_size),
        "number of queries": (plan.n_queries, positions.shape[0]),
        "device": (plan.device, positions.device),
    }
    check_plan_facts(plan, facts)
    planned_points = plan._keyed_cells.coordinates[: plan.n_points]
    check_plan_points(plan, planned_points, pyramid, check_contents)
    if not reads_contents(check_contents, plan.device):
        return
    if not torch.equal(query_images(positions, offsets, plan.batch_size).int(), plan.query_batch):
        refuse_plan(plan, "images", "query_batch_offsets")
    planned = plan._keyed_cells.positions
    if planned.dtype == positions.dtype and in_equal_cells(planned, positions, pyramid):
        return
    _, centers = query_cells(positions, offsets, pyramid, plan._cell_keys())
    if not torch.equal(centers, plan._keyed_cells.centers.long()):
        refuse_plan(plan, "query cells", "query_spatial_positions")


def _plan(
    positions: Tensor,
    offsets: Tensor,
    pyramid: FeaturePyramid,
    sizes: tuple[int, ...],
    backend: Backend,
) -> NeighborhoodPlan:
    copies, tensors, cells, cache = find_plan(positions, offsets, pyramid, sizes, backend)
    return NeighborhoodPlan(
        neighborhood_sizes=sizes,
        position_dim=pyramid.position_dim,
        batch_size=pyramid.batch_size,
        level_shapes=pyramid.level_shapes,
        periodic_axes=pyramid.periodic_axes,
        copies=copies,
        _tensors=tensors,
        _keyed_cells=cells,
        _created_in=execution_mode(positions.device),
        _cache=cache,
    )
