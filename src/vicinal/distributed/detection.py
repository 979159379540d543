"""The parts of a detector that own a part of space on every rank, and share object queries."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._utils.ragged import batch_ids, offsets_from_ids
from ..detr.decoder import Decoder, DecoderLayer
from ..detr.denoising import DenoisingQueryGenerator, QueriesWithDenoising
from ..detr.losses import SetCriterion, mean_object_count
from ..detr.selection import QuerySelection
from ..detr.stem import PointStem
from ..detr.structures import ObjectQueries, Predictions, Targets, top_k_per_image
from ..placement import QueryPlacement
from ..plan import NeighborhoodPlan
from ..pyramid import FeaturePyramid
from .deformable import SharedMap
from .exchange import AllRows, Counts
from .groups import GroupHandle, agree, exchange_counts, exchange_facts, map_facts, ranks_of
from .numbering import cell_order
from .plan import ShardedPlan, plan_sharded


class ShardedStem(PointStem):
    """A stem whose windows see the raw points of all ranks, made by `shard_attention`.

    Each rank embeds its own points. Cells of all levels and windows have to lie in one part of
    space each: cuts are to be at multiples of ``strides`` and ``window_strides``.
    """

    _handle: GroupHandle

    def _raw_points(
        self,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        periodic_axes: Sequence[int],
        keep_point_rows: bool,
    ) -> FeaturePyramid:
        given = coordinates, values, spatial_shape, batch_size, periodic_axes, keep_point_rows

        def pool() -> tuple[FeaturePyramid, dict[str, Any]]:
            return super(ShardedStem, self)._raw_points(*given), {}

        return agree(self._handle.group, "PointStem", pool)

    def _neighborhoods(
        self, queries: QueryPlacement, raw: FeaturePyramid
    ) -> tuple[NeighborhoodPlan, Tensor]:
        positions, offsets, levels = queries
        plan = plan_sharded(
            positions, offsets, raw, self.window_sizes, levels, group=self._handle.group
        )
        return plan, plan.halo.extend(raw.values)


class ShardedSelection(QuerySelection):
    """Selects the best points of all ranks, made by `shard_attention`.

    Every rank gets all object queries, those that one process selects. Candidates are at its own
    points, and ``chosen`` is -1 for queries made from points of others. Of equal scores those of
    lower levels and cells are selected, as where `FeaturePyramid.from_points` made the points.
    """

    _handle: GroupHandle

    def _check(self, pyramid: FeaturePyramid) -> None:
        def check() -> tuple[None, dict[str, Any]]:
            super(ShardedSelection, self)._check(pyramid)
            return None, {**map_facts(pyramid), **exchange_facts("pyramid.values", pyramid.values)}

        agree(self._handle.group, "QuerySelection", check)

    def _select(
        self, pyramid: FeaturePyramid, points: Tensor, candidates: Predictions
    ) -> tuple[ObjectQueries, Tensor]:
        """The best of each rank travel; the best of those are the best of all."""
        group = self._handle.group
        rank, n_ranks = ranks_of(group)
        scores = candidates.logits.detach().amax(1)
        coordinates = pyramid.coordinates[points]
        own, _ = self._best(scores, coordinates, pyramid)
        rows = points[own]
        sent = (
            scores[own],
            torch.cat((coordinates[own], own[:, None], torch.full_like(own, rank)[:, None]), 1),
            candidates.boxes.detach()[own],
            self._embed(pyramid.values[rows]),
        )
        counts = tuple(exchange_counts([len(own)] * n_ranks, group, own.device))
        scores, numbers, boxes, embeddings = (AllRows.apply(x, counts, group) for x in sent)
        coordinates, candidate, owner = numbers[:, :-2], numbers[:, -2], numbers[:, -1]
        best, offsets = self._best(scores, coordinates, pyramid)
        queries = ObjectQueries(embeddings[best], boxes[best], coordinates[best, -1], offsets)
        return queries, candidate.masked_fill(owner != rank, -1)[best]

    def _best(
        self, scores: Tensor, coordinates: Tensor, pyramid: FeaturePyramid
    ) -> tuple[Tensor, Tensor]:
        """The rows of the best points of each image, and the offsets of images in them."""
        images, cells, levels = coordinates[:, 0], coordinates[:, 1:-1], coordinates[:, -1]
        order = torch.argsort(cell_order(cells, levels, images, pyramid), stable=True)
        image = images[order]
        best, offsets = top_k_per_image(scores[order], image, pyramid.batch_size, self._count())
        return order[best], offsets


class QueryShare(NamedTuple):
    """The plan of `ShardedDecoderLayer`: from which object queries each rank attends.

    Attributes:
        order: int64 ``[N]``, all queries, those of rank 0 first.
        counts: how many of them each rank has.
        rows: int64 ``[n]``, those of this rank.
        placement: where these are.
        plan: the cross-attention's plan for them.
    """

    order: Tensor
    counts: Counts
    rows: Tensor
    placement: QueryPlacement
    plan: Any


class ShardedDecoderLayer(DecoderLayer):
    """A decoder layer in which the cross-attention is divided, made by `shard_attention`.

    All ranks hold all object queries, and compute self-attention and feed-forward part alike. Each
    attends from the queries that lie among its own points, so that the halo stays small, and the
    results come back to all. All ranks call `make_plan` and `forward` together, with the same
    queries and their own points.
    """

    _handle: GroupHandle

    def _make_plan(self, placement: QueryPlacement, pyramid: FeaturePyramid) -> QueryShare:
        group = self._handle.group
        rank, n_ranks = ranks_of(group)
        positions, offsets, levels = placement
        assert levels is not None
        owners = nearest_ranks(positions, pyramid, group)
        order = owners.argsort(stable=True)
        counts = tuple(owners.bincount(minlength=n_ranks).tolist())
        rows = order.split(counts)[rank]
        images = batch_ids(offsets, len(owners))[rows]
        own_offsets = offsets_from_ids(images, len(offsets) - 1)
        own = QueryPlacement(positions[rows], own_offsets, levels[rows])
        cross_attention: Any = self.cross_attention
        plan = cross_attention.make_plan(*own[:2], pyramid, own.levels)
        if isinstance(plan, ShardedPlan | SharedMap):
            plan = plan.count_queries_as(rows)  # they have the mask of one process
        return QueryShare(order, counts, rows, own, plan)

    def _attend(
        self,
        embeddings: Tensor,
        placement: QueryPlacement,
        pyramid: FeaturePyramid,
        plan: QueryShare | None,
    ) -> Tensor:
        share = self._make_plan(placement, pyramid) if plan is None else plan
        attended = self.cross_attention(
            embeddings[share.rows],
            **share.placement.arguments(),
            stacked_feature_maps=pyramid,
            plan=share.plan,
        )
        everything: Tensor = AllRows.apply(attended, share.counts, self._handle.group)
        return everything[share.order.argsort()]


@torch.no_grad()
def nearest_ranks(positions: Tensor, pyramid: FeaturePyramid, group: ProcessGroup) -> Tensor:
    """int64 ``[N]``: for each of the positions ``[N, P]``, which all ranks have, the rank around
    whose points it lies, or the nearest one.

    Ranks compute the same, but for rounding on unlike devices, so that the first one decides.
    """
    points = pyramid.positions(torch.float64)
    own = points.new_full((2, points.shape[1]), torch.inf)
    own[1] = -torch.inf
    if len(points):
        own[0], own[1] = points.amin(0), points.amax(0)
    boxes = [torch.empty_like(own) for _ in range(ranks_of(group)[1])]
    dist.all_gather(boxes, own, group=group)
    first, last = torch.stack(boxes)[:, :, None].unbind(1)  # [ranks, 1, P]
    distances = torch.maximum(first - positions, positions - last).clamp(min=0).square().sum(2)
    owners = distances.argmin(0)
    dist.broadcast(owners, group=group, group_src=0)
    return owners


class ShardedDecoder(Decoder):
    """A decoder of which all ranks hold the object queries, made by `shard_attention`.

    Its dropout is the same on all ranks, if the cross-attention draws as many random numbers
    whatever its number of queries, as with `RowDropout`.
    """

    _handle: GroupHandle

    def forward(
        self, queries: ObjectQueries, pyramid: FeaturePyramid
    ) -> tuple[list[Predictions], list[ObjectQueries]]:
        """See `Decoder`. The predictions of all queries are the same on all ranks."""
        with _same_random_numbers(self, self._handle.group, pyramid.values.device):
            return super().forward(queries, pyramid)


class ShardedDenoiser(DenoisingQueryGenerator):
    """A generator of the same denoising queries on all ranks, made by `shard_attention`."""

    _handle: GroupHandle

    def forward(
        self, queries: ObjectQueries, targets: Targets, pyramid: FeaturePyramid
    ) -> QueriesWithDenoising:
        """See `DenoisingQueryGenerator`. All ranks call it with the same queries and targets."""
        with _same_random_numbers(None, self._handle.group, pyramid.values.device):
            return super().forward(queries, targets, pyramid)


class ShardedCriterion(SetCriterion):
    """The training loss of a detector whose ranks share scenes, made by `shard_attention`.

    Object queries and targets are the same on all ranks, candidates are those of the own points.
    """

    _handle: GroupHandle

    def _mean_count(self, n: int, device: torch.device) -> Tensor:
        return mean_object_count(n, device, copies=ranks_of(self._handle.group)[1])


@contextmanager
def _same_random_numbers(
    module: nn.Module | None, group: ProcessGroup, device: torch.device
) -> Iterator[None]:
    """Draws the random numbers of the first rank on all ranks; afterwards the others go on with
    their own. Does nothing for a ``module`` that drops nothing.
    """
    if module is not None and not _drops(module):
        yield
        return
    on_gpu = device.type == "cuda"
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]
    dist.broadcast_object_list(states, group=group, group_src=0, device=device)
    is_first = ranks_of(group)[0] == 0
    with torch.random.fork_rng([device] if on_gpu else [], enabled=not is_first):
        torch.set_rng_state(states[0])
        if on_gpu:
            torch.cuda.set_rng_state(states[1], device)
        yield


def _drops(module: nn.Module) -> bool:
    """Whether some part of ``module`` has dropout, in training."""
    return any(
        part.training
        and ((isinstance(part, nn.Dropout) and part.p > 0) or getattr(part, "attn_drop_rate", 0))
        for part in module.modules()
    )
