"""Parts of space: which rank owns which cells."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._utils.checks import (
    as_integer,
    as_integers,
    as_list,
    as_spatial_shape,
    as_tensor,
    check_offsets,
    check_tensor,
    check_type,
    has_contents,
    refuse,
)
from .._utils.constants import constant, widest_dtype
from .._utils.ragged import batch_ids, offsets_from_ids, take_rows
from .._utils.strides import least_strides
from ..placement import QueryPlacement, check_placement
from ..pyramid import FeaturePyramid
from ..windows import full_shape
from .bisection import bisect
from .exchange import AllRows
from .groups import (
    Group,
    GroupHandle,
    agree,
    as_group,
    exchange_counts,
    exchange_facts,
    map_facts,
    ranks_of,
)
from .numbering import order_of_points
from .plan import with_points
from .route import Route

_MOST_BLOCKS = 2**28  # layers of which the weight is counted, along all axes


class _Queries(NamedTuple):
    """Queries that travel: where they are, and to which rank."""

    positions: Tensor
    levels: Tensor | None
    images: Tensor
    owners: Tensor
    batch_size: int


class SpacePartition:
    """The part of space that each rank owns: boxes of raw cells, the same for all images.

    `partition_space` makes one of about equal parts. With boxes of your own, results are the same;
    if cuts lie at multiples of all strides, pooling is local too.

    Args:
        boxes: integer ``[n_ranks, 2, P]``: for each rank the first cell along each axis, and the
            one after the last. Boxes may be empty. Together they cover the grid without overlaps.
        group: the ranks, a process group or a device mesh of one dimension. None (default): all
            ranks.

    Raises:
        ValueError: there is not one box per rank, or two boxes overlap, or ranks were given
            different ones. All ranks raise it.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal import FeaturePyramid
        from vicinal.distributed import SpacePartition

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        part = SpacePartition(torch.tensor([[[0, 0], [16, 16]]]))
        cells, values = torch.tensor([[0, 9, 9], [0, 3, 4]]), torch.randn(2, 8)
        cells, values = part.scatter(cells, values)
        pyramid = FeaturePyramid.from_points(cells, values, (16, 16), batch_size=1)
        everything = part.gather(pyramid)
        dist.destroy_process_group()
        ```
    """

    def __init__(self, boxes: Tensor | Sequence[Any], group: Group = None) -> None:
        ranks = as_group(group)
        self._handle = GroupHandle(ranks)

        def check() -> tuple[Tensor, dict[str, Any]]:
            checked = _check_boxes(boxes, ranks_of(ranks)[1])
            return checked, {"boxes": checked.tolist()}

        self.boxes = agree(ranks, "SpacePartition", check)

    @property
    def group(self) -> ProcessGroup:
        """The ranks."""
        return self._handle.group

    @property
    def own_box(self) -> Tensor:
        """int64 ``[2, P]``, the box of this rank."""
        return self.boxes[ranks_of(self.group)[0]]

    def __repr__(self) -> str:
        rank, n_ranks = ranks_of(self.group)
        low, high = self.own_box.tolist()
        ranges = " x ".join(f"{a}..{b}" for a, b in zip(low, high, strict=True))
        return f"SpacePartition(ranks={n_ranks}, own part of rank {rank}: {ranges})"

    def owners(self, cells: Tensor) -> Tensor:
        """Returns int64 ``[n]``, the rank that owns each of the raw ``cells`` ``[n, P]``.

        Cells beyond the grid belong to the owner of the nearest cell of it.

        Raises:
            ValueError: ``cells`` are no integers ``[n, P]``, or lie in a gap between boxes.
        """
        shape = ("n", self.boxes.shape[2])
        cells = check_tensor("cells", cells, shape, kind="integer")
        boxes = self.boxes.to(cells.device)
        filled = boxes[(boxes[:, 1] > boxes[:, 0]).all(1)]
        inside = cells.long()
        if len(filled):
            inside = inside.clamp(filled[:, 0].amin(0), filled[:, 1].amax(0) - 1)
        owner = torch.full((len(cells),), -1, device=cells.device)
        for rank, (low, high) in enumerate(boxes):
            owner.masked_fill_(((inside >= low) & (inside < high)).all(1), rank)
        if (owner < 0).any():
            lost = cells[int((owner < 0).nonzero()[0])].tolist()
            refuse("boxes", "boxes that cover all cells", f"none that holds {lost}")
        return owner

    def scatter(self, coordinates: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Sends every point to the rank that owns its cell.

        All ranks call it together, each with its own share of the points, in any division. A rank
        that has the rows of rank 0 first, then those of rank 1 and so on, each in the order given,
        pools them as one process pools all of them.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then raw cell along each axis.
            *rows: tensors ``[n, ...]`` that travel along, with gradients.

        Returns:
            the coordinates, int64, and the other rows of the points that this rank owns.

        Raises:
            ValueError: tensors differ in their number of rows or device, or between ranks in dtype,
                width or ``requires_grad``, or a cell is in no box. All ranks raise it.
        """
        route = self.route(coordinates, *rows)
        return tuple(map(route.scatter, (as_tensor("coordinates", coordinates).long(), *rows)))

    def route(self, coordinates: Tensor, *rows: Tensor) -> Route:
        """Returns the way of every point to the rank that owns its cell; arguments and errors are
        those of `scatter`.
        """

        def find() -> tuple[Tensor, dict[str, Any]]:
            shape = ("n", self.boxes.shape[2] + 1)
            points = check_tensor("coordinates", coordinates, shape, kind="integer")
            _check_contents("coordinates", points)
            facts: dict[str, Any] = {"device": points.device.type, "number of rows": len(rows)}
            for index, x in enumerate(rows):
                others = [f"size{axis}" for axis in range(1, getattr(x, "ndim", 1))]
                name, device = f"rows[{index}]", points.device
                checked = check_tensor(name, x, (len(points), *others), device=device)
                facts |= exchange_facts(name, checked)
            return self.owners(points[:, 1:]), facts

        owners = agree(self.group, "SpacePartition.scatter", find)
        return self._route(owners)

    def route_queries(self, placement: QueryPlacement, pyramid: FeaturePyramid) -> Route:
        """Returns the way of queries to the ranks that own the cells in which they lie.

        The queries of a decoder lie anywhere, on any rank. There they are sorted by image, then
        rank. `Route.placement` is where those are that this rank owns, `Route.scatter` moves their
        rows, and `Route.gather` returns results to where the queries came from.

        Args:
            placement: of this rank's queries.
            pyramid: on whose map they lie; any rank's.

        Raises:
            ValueError: the placement does not fit the pyramid, or those of the ranks do not fit
                each other. All ranks raise it.

        Example:
            ```python
            import torch
            import torch.distributed as dist
            from vicinal import FeaturePyramid, QueryPlacement, SparseNeighborhoodAttentionBlock
            from vicinal.distributed import partition_space, shard_attention

            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            cells = torch.tensor([[0, 9, 9], [0, 3, 4]])  # image, row, column
            part = partition_space(cells, (16, 16))
            pyramid = FeaturePyramid.from_points(cells, torch.randn(2, 8), (16, 16), 1)
            block = shard_attention(SparseNeighborhoodAttentionBlock(8, 2))
            positions = torch.tensor([[2.5, 3.0], [9.0, 8.0], [12.0, 1.0]])
            placement = QueryPlacement(positions, torch.tensor([0, 3]))
            route = part.route_queries(placement, pyramid)
            own, query = route.placement, route.scatter(torch.randn(3, 8))
            out = block(query, **own.arguments(), stacked_feature_maps=pyramid)
            assert route.gather(out).shape == (3, 8)
            dist.destroy_process_group()
            ```
        """

        def find() -> tuple[_Queries, dict[str, Any]]:
            check_type("placement", placement, QueryPlacement)
            check_type("pyramid", pyramid, FeaturePyramid)
            given, offsets, levels = placement
            positions, offsets, points = check_placement(given, offsets, pyramid)
            check_offsets("placement.offsets", offsets, len(positions))
            facts = {
                **map_facts(points),
                "placement.levels": levels is None,
                **exchange_facts("placement.positions", positions),
            }
            if levels is not None:
                kind: dict[str, Any] = {"kind": "integer", "device": positions.device}
                levels = check_tensor("placement.levels", levels, (len(positions),), **kind).long()
            images = batch_ids(offsets, len(positions))
            owners = self.owners(raw_cells(positions, points))
            return _Queries(positions, levels, images, owners, points.batch_size), facts

        positions, levels, images, owners, batch_size = agree(
            self.group, "SpacePartition.route_queries", find
        )
        route = self._route(owners)
        arrived = route.scatter(images)
        route = dataclasses.replace(route, sorting=torch.argsort(arrived, stable=True))
        local = QueryPlacement(
            route.scatter(positions),
            offsets_from_ids(arrived[route.sorting], batch_size),
            None if levels is None else route.scatter(levels),
        )
        return dataclasses.replace(route, placement=local)

    def gather(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """Returns the points of all ranks on every rank, sorted by image, level and cell: the
        pyramid of one process, as `FeaturePyramid.from_points` orders it.

        All ranks call it together, and all of them the backward pass, also one whose loss is zero.
        The gradient of a value is the sum of those of all ranks.

        Raises:
            ValueError: the pyramids of the ranks are on different maps, or their values differ in
                width, dtype or ``requires_grad``. All ranks raise it.
        """

        def check() -> tuple[None, dict[str, Any]]:
            check_type("pyramid", pyramid, FeaturePyramid)
            _check_contents("pyramid.coordinates", pyramid.coordinates)
            facts = exchange_facts("pyramid.values", pyramid.values)
            return None, {**map_facts(pyramid), **facts}

        agree(self.group, "SpacePartition.gather", check)
        device = pyramid.coordinates.device
        n_ranks = ranks_of(self.group)[1]
        counts = tuple(exchange_counts([len(pyramid)] * n_ranks, self.group, device))
        coordinates: Tensor = AllRows.apply(pyramid.coordinates.long(), counts, self.group)
        values: Tensor = AllRows.apply(pyramid.values, counts, self.group)
        everything = with_points(pyramid, coordinates, values)
        order = torch.argsort(order_of_points(everything), stable=True)
        return with_points(pyramid, coordinates[order], take_rows(values, order))

    def _route(self, owners: Tensor) -> Route:
        n_ranks = ranks_of(self.group)[1]
        send = tuple(owners.bincount(minlength=n_ranks).tolist())
        receive = tuple(exchange_counts(send, self.group, owners.device))
        sorting = torch.arange(sum(receive), device=owners.device)
        return Route(owners.argsort(stable=True), send, receive, sorting, self.group)


def partition_space(
    coordinates: Tensor,
    spatial_shape: Sequence[int],
    group: Group = None,
    *,
    align: int | Sequence[int] = 8,
    weights: Tensor | None = None,
) -> SpacePartition:
    """Divides space into a part per rank, with about as many points each.

    Space is cut in two, recursively, each time along the axis where the fewest points lie next to
    the cut (recursive bisection; Berger and Bokhari, "A partitioning strategy for nonuniform
    problems on multiprocessors", 1987). All ranks of the group call it together, each with any
    share of the points; no rank needs all of them. Images are cut alike.

    Args:
        coordinates: integer ``[n, P + 1]``: image, then raw cell along each axis, of the points
            that this rank has.
        spatial_shape: the ``P`` sizes of the grid.
        group: the ranks that share the scene, a process group or a device mesh of one dimension.
            None (default): all ranks.
        align: cuts lie at multiples of it, in raw cells; one number or one per axis. Multiples of
            all strides make pooling local. Default: 8, the largest of the default strides.
        weights: ``[n]``, non-negative, what a point costs, such as its number of neighbors. None
            (default): all points cost the same.

    Raises:
        ValueError: shapes or dtypes do not match, a point lies outside the grid, ``align`` is below
            1, a weight is negative or not finite, or ranks differ in shape, ``align`` or in whether
            there are weights. All ranks raise it.

    Example:
        ```python
        import torch
        import torch.distributed as dist
        from vicinal.distributed import partition_space

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        cells = torch.tensor([[0, 9, 9], [0, 3, 4]])  # image, row, column
        part = partition_space(cells, (16, 16))
        assert part.own_box.tolist() == [[0, 0], [16, 16]]
        dist.destroy_process_group()
        ```
    """
    ranks = as_group(group)

    def check() -> tuple[tuple[Tensor, Tensor | None, list[int], Tensor], dict[str, Any]]:
        shape = as_spatial_shape(spatial_shape)
        steps = _check_align(align, len(shape))
        sizes = [-(-size // step) for size, step in zip(shape, steps, strict=True)]
        if sum(sizes) > _MOST_BLOCKS:
            expected = f"at most {_MOST_BLOCKS} blocks of {list(steps)} cells along its axes"
            refuse("spatial_shape", f"{expected} (a larger align makes fewer)", shape)
        points = check_tensor("coordinates", coordinates, ("n", len(shape) + 1), kind="integer")
        _check_contents("coordinates", points)
        outside = ((points[:, 1:] < 0) | (points[:, 1:] >= constant(shape, points.device))).any(1)
        if outside.any():
            row = int(outside.nonzero()[0])
            came = f"{points[row, 1:].tolist()} (point {row})"
            refuse("coordinates", f"cells inside the grid {list(shape)}", came)
        facts = {
            "spatial_shape": shape,
            "align": steps,
            "weights": weights is None,
            "device": points.device.type,
        }
        blocks = points[:, 1:].long() // constant(steps, points.device)
        return (blocks, _check_weights(weights, blocks), sizes, torch.tensor([steps, shape])), facts

    blocks, weights, sizes, grid = agree(ranks, "partition_space", check)
    boxes = bisect(blocks, weights, sizes, ranks_of(ranks)[1], ranks)
    edges = torch.tensor(boxes) * grid[0]
    return SpacePartition(edges.minimum(grid[1]), group)


def raw_cells(positions: Tensor, pyramid: FeaturePyramid) -> Tensor:
    """int64 ``[n, P]``: the raw cells in which ``positions`` lie, in cells of the full shape.

    Positions wrap along periodic axes. Those that are not finite are taken for zero.
    """
    exact = positions.detach().double().nan_to_num(0.0, 2.0**52, -(2.0**52)).clamp(-(2**52), 2**52)
    for axis in pyramid.periodic_axes:
        exact[:, axis] %= full_shape(pyramid.level_shapes)[axis]
    if pyramid.strides is not None:
        exact = exact * constant(least_strides(pyramid.strides), exact.device)
    return exact.floor().long()


def _check_boxes(boxes: Any, n_ranks: int) -> Tensor:
    """``boxes`` as int64 ``[n_ranks, 2, P]`` on the CPU."""
    expected = f"a box per rank, integers [{n_ranks}, 2, P] with P at least 1"
    try:
        checked = torch.as_tensor(as_list("boxes", boxes, expected))
    except (TypeError, ValueError, RuntimeError):
        refuse("boxes", expected, boxes)
    if not checked.numel():
        refuse("boxes", expected, boxes)
    checked = check_tensor("boxes", checked, (n_ranks, 2, "P"), kind="integer").long()
    filled = checked[(checked[:, 1] > checked[:, 0]).all(1)]
    if not len(filled):
        refuse("boxes", "a box with cells", "empty ones")
    for index, (low, high) in enumerate(filled):
        others = filled[index + 1 :]
        if ((others[:, 0] < high) & (low < others[:, 1])).all(1).any():
            refuse("boxes", "boxes that do not overlap", f"{[low.tolist(), high.tolist()]}")
    return checked


def _check_align(align: Any, dim: int) -> tuple[int, ...]:
    one = as_integer(align)
    steps = as_integers(as_list("align", align, "integers")) if one is None else (one,) * dim
    if steps is None or len(steps) != dim or min(steps) < 1 or max(steps) >= 2**62:
        refuse("align", f"an integer of at least 1, or one for each of {dim} axes", align)
    return steps


def _check_contents(argument: str, value: Tensor) -> None:
    if not has_contents(value):
        refuse(argument, "a tensor with contents", value)


def _check_weights(weights: Any, blocks: Tensor) -> Tensor | None:
    if weights is None:
        return None
    checked = check_tensor("weights", weights, (len(blocks),), kind="number", device=blocks.device)
    checked = checked.to(widest_dtype(checked.device))
    if not (checked.isfinite() & (checked >= 0)).all():
        refuse("weights", "finite numbers of at least 0", "others")
    return checked
