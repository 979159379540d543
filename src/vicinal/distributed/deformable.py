"""Deformable attention that samples the points of all ranks."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._index.cell_hash import CellIndex, index_cells
from .._utils.checks import LevelShapes, check_type, refuse
from .._utils.constants import constant
from ..nn._base import Inputs
from ..nn.deformable import Sampling, SparseDeformableAttention
from ..placement import check_placement, query_images
from ..pyramid import FeaturePyramid
from ..windows import as_query_levels
from .groups import GroupHandle, agree, exchange_facts
from .numbering import number_rows, order_of_queries
from .plan import boxes_around, find_halo, with_points

_FARTHEST = 2**40  # cells from the map, which are empty, as are those beyond


@dataclass(frozen=True)
class SharedMap:
    """A map on which the ranks agreed: the plan of `ShardedDeformable`.

    Where queries sample is known only in the forward pass, so that a plan cannot know more.

    Attributes:
        level_shapes: the spatial shape of each level.
        batch_size: number of images.
        periodic_axes: axes along which the map repeats.
        query_ids: integer ``[N]``, what dropout counts each query as; None: its row.
    """

    level_shapes: LevelShapes
    batch_size: int
    periodic_axes: tuple[int, ...]
    query_ids: Tensor | None = None

    @classmethod
    def of(cls, pyramid: FeaturePyramid) -> "SharedMap":
        """The map of a pyramid."""
        return cls(pyramid.level_shapes, pyramid.batch_size, pyramid.periodic_axes)

    def count_queries_as(self, query_ids: Tensor) -> "SharedMap":
        """The same plan, but dropout counts queries by these ids, integer ``[N]``."""
        return dataclasses.replace(self, query_ids=query_ids)


class ShardedDeformable(SparseDeformableAttention):
    """Deformable attention to the points of all ranks, made by `shard_attention`.

    Every forward pass has a halo of its own: one box per level and image holds the cells around all
    sampling locations of the own queries. Weights count the own points, then those of the halo.
    """

    _plan_type: type[Any] = SharedMap
    _handle: GroupHandle

    def make_plan(  # type: ignore[override]
        self,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        pyramid: FeaturePyramid,
        query_level_indices: Tensor | None = None,
        *,
        check_contents: bool | None = None,
    ) -> SharedMap:
        """Makes the ``plan`` of `forward`: the ranks agree on the map. All of them call it
        together. With dropout, queries are numbered as by `ShardedPlan.with_row_numbers`.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device on some rank, or maps
                differ between ranks. All ranks raise it.
        """

        def check() -> tuple[tuple[SharedMap, Tensor], dict[str, Any]]:
            check_type("pyramid", pyramid, FeaturePyramid)
            placed = query_spatial_positions, query_batch_offsets
            positions, offsets, points = check_placement(*placed, pyramid, check_contents)
            given = query_level_indices, positions, points.n_levels, check_contents
            images = query_images(positions, offsets, points.batch_size).clamp(min=0)
            order = order_of_queries(positions, images, as_query_levels(*given), points)
            plan = SharedMap.of(points)
            return (plan, order), {**vars(plan), **exchange_facts("pyramid.values", points.values)}

        plan, order = agree(self._handle.group, "make_plan", check)
        if self._handle.drops:
            return plan.count_queries_as(number_rows(order, self._handle.group)[0])
        return plan

    def _check_plan(self, plan: Any, inputs: Inputs, check_contents: bool | None) -> None:
        own = SharedMap.of(inputs.pyramid)
        if dataclasses.replace(plan, query_ids=None) != own:
            refuse("plan", f"a plan for {own}", str(plan))

    def _known_points(
        self, inputs: Inputs, plan: Any, sampling: Sampling
    ) -> tuple[CellIndex, FeaturePyramid]:
        reach = find_sampled(sampling, inputs.pyramid)
        halo, coordinates = find_halo(reach, inputs.pyramid, self._handle.group)
        known = with_points(inputs.pyramid, coordinates, halo.extend(inputs.pyramid.values))
        return index_cells(known), known


@torch.no_grad()
def find_sampled(sampling: Sampling, pyramid: FeaturePyramid) -> Tensor:
    """int64 ``[2, L, B, P]``: the first and the last cell, by level and image, between which values
    are interpolated. The last is before the first where there are none.

    Along periodic axes the first one is in the map.
    """
    images = sampling.images.masked_fill(sampling.masked, -1)
    corners = (sampling.locations - 0.5).floor()
    first, last = (
        x.double().nan_to_num(0.0).clamp(-_FARTHEST, _FARTHEST).long().transpose(0, 1)
        for x in (corners.amin((1, 3)), corners.amax((1, 3)) + 1)
    )
    reach = boxes_around(images, first, last, pyramid.batch_size)
    for axis in pyramid.periodic_axes:
        sizes = constant([shape[axis] for shape in pyramid.level_shapes], reach.device)[:, None]
        reach[..., axis] -= reach[0, ..., axis].div(sizes, rounding_mode="floor") * sizes
    return reach
