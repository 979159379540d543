"""The plan of a rank: its own queries among its own points and those of others that they see."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .._plan.keyed_cells import Queries, query_cells
from .._utils.checks import check_type, reads_contents, refuse
from .._utils.constants import constant
from ..placement import check_placement
from ..plan import NeighborhoodPlan, plan_neighborhoods
from ..pyramid import FeaturePyramid
from ..window_shapes import Windows, WindowsLike, as_windows, check_windows_fit, windows_on_axes
from ..windows import as_query_levels
from .exchange import send_rows
from .groups import Group, agree, as_group, exchange_counts, exchange_facts, map_facts, ranks_of
from .halo import Halo
from .numbering import number_rows, order_of_points, order_of_queries


@dataclass(frozen=True, repr=False, eq=False)
class ShardedPlan(NeighborhoodPlan):
    """The neighborhoods of a rank's own queries among all points. `plan_sharded` makes it.

    It is a plan of the own queries on the points that the rank knows: its own, then those of the
    `halo`. So it counts ``n_points`` own and received points, and `neighborhood_attention` takes it
    with keys and values that `Halo.extend` has completed.

    Attributes:
        halo: which own points other ranks see, and how many of theirs this one does.
        coordinates: int64 ``[n + R, P + 2]``, image, cell and level of own and received points.
        query_levels: integer ``[N]``, the level of each query, or None, as given.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal import FeaturePyramid, neighborhood_attention
        from vicinal.distributed import plan_sharded

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        points = torch.tensor([[0, 3, 4], [0, 3, 5], [0, 9, 9]])  # image, row, column
        pyramid = FeaturePyramid.from_points(points, torch.ones(3, 8), (16, 16), 1, strides=(1, 2))
        plan = plan_sharded(pyramid.positions(), pyramid.batch_offsets(), pyramid, [3, 3])
        q, k, v = torch.randn(3, len(pyramid), 2, 4)
        out = neighborhood_attention(q, plan.halo.extend(k), plan.halo.extend(v), plan)
        dist.destroy_process_group()
        ```
    """

    halo: Halo = field(kw_only=True)
    coordinates: Tensor = field(kw_only=True)
    query_levels: Tensor | None = field(kw_only=True)

    @property
    def n_own_points(self) -> int:
        """The number of points that this rank owns."""
        return self.n_points - sum(self.halo.receive)

    def extend(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """Returns the rank's own ``pyramid`` with the points of the halo, values exchanged.

        All ranks of the group call it together. Gradients reach the values of all ranks.

        Raises:
            ValueError: ``pyramid`` does not have as many points as the plan was made for. Only this
                rank raises it.
        """
        self._check_points(pyramid)
        return self._with_halo(pyramid, self.halo.extend(pyramid.values))

    def with_row_numbers(self, pyramid: FeaturePyramid) -> "ShardedPlan":
        """Returns the same plan, but dropout counts queries and points as one process does.

        All ranks of the group call it together. Points are numbered as `FeaturePyramid.from_points`
        orders them, and queries by image, level and cell, as they are where every point is a query.
        So given the same seed on all ranks, they drop what one process drops. Queries in one cell
        are numbered in the order of ranks.

        Args:
            pyramid: the own points, for which the plan was made.

        Raises:
            ValueError: ``pyramid`` does not have as many points as the plan was made for, on some
                rank, or there are 2^31 points or queries. All ranks raise it.
        """
        cells, group = self._keyed_cells, self.halo.group

        def check() -> tuple[None, dict[str, Any]]:
            self._check_points(pyramid)
            return None, {}

        agree(group, "with_row_numbers", check)
        points, n_points = number_rows(order_of_points(pyramid), group)
        images = self.query_batch.long().clamp(min=0)
        order = order_of_queries(cells.positions, images, self.query_levels, pyramid)
        queries, _ = number_rows(order, group)
        numbered = self.with_dropout_ids(queries, self.halo.extend(points), n_points)
        assert isinstance(numbered, ShardedPlan)
        return numbered

    def count_queries_as(self, query_ids: Tensor) -> "ShardedPlan":
        """The same plan, but dropout counts queries by these ids, integer ``[N]``, where its rows
        are numbered.
        """
        if self._tensors.query_ids is None:
            return self
        tensors = self._tensors._replace(query_ids=query_ids.int())
        return dataclasses.replace(self, _tensors=tensors)

    def to(self, device: torch.device | str) -> "ShardedPlan":
        """Returns the same plan on another device."""
        moved = super().to(device)
        assert isinstance(moved, ShardedPlan)
        levels = self.query_levels
        return dataclasses.replace(
            moved,
            halo=self.halo.to(device),
            coordinates=self.coordinates.to(device),
            query_levels=None if levels is None else levels.to(device),
            _cache={},
        )

    def _check_points(self, pyramid: FeaturePyramid) -> None:
        check_type("pyramid", pyramid, FeaturePyramid)
        expected = f"the {self.n_own_points} points that the plan was made for"
        if len(pyramid) != self.n_own_points or pyramid.level_shapes != self.level_shapes:
            refuse("pyramid", expected, f"{len(pyramid)} points on {pyramid.level_shapes}")
        if reads_contents(None, self.device):
            planned = self.coordinates[: self.n_own_points]
            if not torch.equal(pyramid.coordinates, planned):
                refuse("pyramid", expected, "others")

    def _with_halo(self, pyramid: FeaturePyramid, values: Tensor | None = None) -> FeaturePyramid:
        """``pyramid`` with the received points and ``values`` ``[n + R, E]``, see `with_points`."""
        coordinates = torch.cat((pyramid.coordinates, self.coordinates[self.n_own_points :]))
        return with_points(pyramid, coordinates, values)


def with_points(
    pyramid: FeaturePyramid, coordinates: Tensor, values: Tensor | None = None
) -> FeaturePyramid:
    """A pyramid of other points on the map of ``pyramid``.

    Without ``values`` it has such as take no memory, for what depends on coordinates alone.
    """
    if values is None:
        values = pyramid.values.new_zeros(1, 1).expand(len(coordinates), pyramid.embed_dim)
    return dataclasses.replace(
        pyramid,
        values=values,
        coordinates=coordinates,
        point_rows=None,
        point_batch=None,
        check_contents=False,
    )


class _Checked(NamedTuple):
    """The arguments of `plan_sharded`, validated."""

    queries: Queries
    pyramid: FeaturePyramid
    sizes: Any  # as `as_windows` returns them
    reach: Tensor  # [2, L, B, P], see `find_reach`


def plan_sharded(
    query_spatial_positions: Tensor,
    query_batch_offsets: Tensor,
    pyramid: FeaturePyramid,
    neighborhood_sizes: WindowsLike,
    query_level_indices: Tensor | None = None,
    *,
    group: Group = None,
    check_contents: bool | None = None,
) -> ShardedPlan:
    """Finds the neighbors of this rank's queries among the points of all ranks.

    All ranks of the group call it together, each with its own queries and points. Every rank tells
    the others which cells the windows of its queries may reach: one box per level and image. The
    owners of the points in these boxes send their coordinates, and each rank makes a plan on its
    own. It synchronizes, on a GPU too.

    Args:
        query_spatial_positions: floating ``[N, P]``, of the own queries, anywhere on the map, in
            cells of the full shape.
        query_batch_offsets: integer ``[B + 1]``: image ``b`` holds the own queries
            ``offsets[b]:offsets[b + 1]``.
        pyramid: the own points. Level shapes, number of images and periodic axes are those of the
            whole map, on every rank.
        neighborhood_sizes: the window of each level, see `plan_neighborhoods`.
        query_level_indices: integer ``[N]``, the level of each query. None (default): as for
            `plan_neighborhoods`.
        group: the ranks that share the map, a process group or a device mesh of one dimension. None
            (default): all ranks.
        check_contents: as for `plan_neighborhoods`.

    Raises:
        ValueError: an argument is refused on some rank, as by `plan_neighborhoods`, or maps and
            windows, or the width, dtype or ``requires_grad`` of the pyramid's values differ between
            ranks. All ranks raise it.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal import FeaturePyramid
        from vicinal.distributed import plan_sharded

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        points = torch.tensor([[0, 3, 4], [0, 3, 5], [0, 9, 9]])  # image, row, column
        pyramid = FeaturePyramid.from_points(points, torch.ones(3, 8), (16, 16), 1, strides=(1, 2))
        plan = plan_sharded(pyramid.positions(), pyramid.batch_offsets(), pyramid, [3, 3])
        assert plan.counts().tolist() == [3, 3, 2, 3, 2]
        dist.destroy_process_group()
        ```
    """
    ranks = as_group(group)

    def check() -> tuple[_Checked, dict[str, Any]]:
        check_type("pyramid", pyramid, FeaturePyramid)
        placed = query_spatial_positions, query_batch_offsets
        positions, offsets, points = check_placement(*placed, pyramid, check_contents)
        sizes = as_windows(neighborhood_sizes, points.n_levels, points.position_dim)
        windows = windows_on_axes(sizes, points.position_dim)
        check_windows_fit(windows, points.level_shapes, points.periodic_axes)
        levels = as_query_levels(query_level_indices, positions, points.n_levels, check_contents)
        queries = Queries(positions, offsets, levels)
        facts = {
            **map_facts(points),
            "neighborhood_sizes": sizes,
            **exchange_facts("pyramid.values", points.values),
        }
        reach = find_reach(queries, points, windows)
        return _Checked(queries, points, sizes, reach), facts

    checked = agree(ranks, "plan_sharded", check)
    halo, coordinates = find_halo(checked.reach, checked.pyramid, ranks)
    extended = with_points(checked.pyramid, coordinates)
    positions, offsets, levels = checked.queries

    def plan() -> tuple[NeighborhoodPlan, dict[str, Any]]:
        _check_divided_cells(extended, len(checked.pyramid))
        own = positions, offsets, extended, checked.sizes, levels
        return plan_neighborhoods(*own, check_contents=False), {}

    local = agree(ranks, "plan_sharded", plan)
    return ShardedPlan(**vars(local), halo=halo, coordinates=coordinates, query_levels=levels)


def _check_divided_cells(extended: FeaturePyramid, n_own: int) -> None:
    """Raises ValueError if a rank received points in cells of own ones, in a pyramid that was
    pooled: then each rank pooled a part of the cell.
    """
    if extended.strides is None:
        return
    order = order_of_points(extended)
    divided = torch.isin(order[n_own:], order[:n_own])
    if divided.any():
        row = n_own + int(divided.nonzero()[0])
        cell, level = extended.cells[row].tolist(), int(extended.levels[row])
        expected = f"cells of one rank each (cuts at multiples of the strides {extended.strides})"
        refuse("pyramid", expected, f"cell {cell} at level {level} on two ranks")


def find_reach(queries: Queries, pyramid: FeaturePyramid, windows: Windows) -> Tensor:
    """int64 ``[2, L, B, P]``: the first and the last cell, by level and image, that the windows of
    the queries may reach. The last is before the first where there are none.
    """
    image, anchors = query_cells(queries, pyramid, windows)
    device = anchors.device
    first, last = boxes_around(image, anchors, anchors, pyramid.batch_size)
    steps = constant([window.first_steps() for window in windows], device)
    sizes = constant([window.sizes for window in windows], device)
    dilations = constant([window.dilations for window in windows], device)
    first += (steps * dilations)[:, None]
    last += ((steps + sizes - 1) * dilations)[:, None]
    without = (sizes == 0).all(1).nonzero().flatten()
    first[without], last[without] = 2**60, -(2**60)
    return torch.stack((first, last))


def boxes_around(image: Tensor, first: Tensor, last: Tensor, batch_size: int) -> Tensor:
    """int64 ``[2, L, B, P]``: the first and the last cell, by level and image, of boxes
    ``first`` to ``last``, int64 ``[L, N, P]`` each. Those whose ``image`` ``[N]`` is -1 do not
    count. The last is before the first where there are none.
    """
    n_levels, _, dim = first.shape
    valid = (image >= 0).nonzero().flatten()
    index = image[valid][None, :, None].expand(n_levels, -1, dim)
    low = first.new_full((n_levels, batch_size, dim), 2**60)
    high = first.new_full((n_levels, batch_size, dim), -(2**60))
    low.scatter_reduce_(1, index, first[:, valid], "amin")
    high.scatter_reduce_(1, index, last[:, valid], "amax")
    return torch.stack((low, high))


def find_halo(reach: Tensor, pyramid: FeaturePyramid, group: ProcessGroup) -> tuple[Halo, Tensor]:
    """The halo of cells that ranks may reach, and the coordinates of own and received points.

    Args:
        reach: ``[2, L, B, P]``, of this rank, as `find_reach` returns it.
        pyramid: the own points.
        group: all ranks of which call this.
    """
    own, n_ranks = ranks_of(group)
    reaches = [torch.empty_like(reach) for _ in range(n_ranks)]
    dist.all_gather(reaches, reach.contiguous(), group=group)
    placed = ~pyramid.misplaced()
    meets = _boxes_meet(torch.stack(reaches), pyramid, placed)
    none = placed.new_zeros(0, dtype=torch.int64)
    rows = [
        (placed & _within(boxes, pyramid)).nonzero().flatten()
        if rank != own and meets[rank]
        else none
        for rank, boxes in enumerate(reaches)
    ]
    send = tuple(map(len, rows))
    receive = tuple(exchange_counts(send, group, reach.device))
    halo = Halo(torch.cat(rows), send, receive, group)
    coordinates = pyramid.coordinates.long()
    received = send_rows(coordinates[halo.rows], send, receive, group)
    return halo, torch.cat((coordinates, received))


def _boxes_meet(reaches: Tensor, pyramid: FeaturePyramid, placed: Tensor) -> list[bool]:
    """Which of the boxes ``[ranks, 2, L, B, P]`` may hold own points: so most ranks of many need
    not be compared with every point. All may along periodic axes.
    """
    levels = torch.arange(pyramid.n_levels, device=placed.device)[:, None]
    of_level = (placed & (pyramid.levels == levels))[..., None]  # [L, nnz, 1]
    low, high = (torch.where(of_level, pyramid.cells, beyond) for beyond in (2**60, -(2**60)))
    image = pyramid.batch.masked_fill(~placed, -1)
    low, high = boxes_around(image, low, high, pyramid.batch_size)
    meets = (reaches[:, 0] <= high) & (low <= reaches[:, 1])
    meets[..., list(pyramid.periodic_axes)] = True
    found: list[bool] = meets.all(-1).flatten(1).any(1).tolist()
    return found


def _within(reach: Tensor, pyramid: FeaturePyramid) -> Tensor:
    """Bool ``[nnz]``: whether each point lies in the box ``[2, L, B, P]`` of its level and
    image.
    """
    levels = pyramid.levels.clamp(0, pyramid.n_levels - 1)
    images = pyramid.batch.clamp(0, max(pyramid.batch_size - 1, 0))
    if not len(pyramid):
        return levels.bool()
    first, last = reach[:, levels, images].unbind(0)
    within = (pyramid.cells >= first) & (pyramid.cells <= last)
    for axis in pyramid.periodic_axes:
        sizes = constant([shape[axis] for shape in pyramid.level_shapes], levels.device)[levels]
        for copy in (pyramid.cells[:, axis] + sizes, pyramid.cells[:, axis] - sizes):
            within[:, axis] |= (copy >= first[:, axis]) & (copy <= last[:, axis])
    return within.all(1)
