"""Row numbers of one process for rows that are spread over ranks."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ..pyramid import FeaturePyramid
from ..windows import full_shape, window_centers
from .groups import exchange_counts, ranks_of


def cell_order(cells: Tensor, levels: Tensor, images: Tensor, pyramid: FeaturePyramid) -> Tensor:
    """int64 ``[n]``, numbers that sort ``cells`` ``[n, P]`` by image, level and cell, as
    `FeaturePyramid.from_points` does. Cells beyond the map count as the nearest of it.
    """
    key = images * pyramid.n_levels + levels
    for axis, size in enumerate(full_shape(pyramid.level_shapes)):
        key = key * size + cells[:, axis].clamp(0, size - 1)
    return key


def order_of_points(pyramid: FeaturePyramid) -> Tensor:
    """The `cell_order` of the points, int64 ``[nnz]``."""
    return cell_order(pyramid.cells, pyramid.levels, pyramid.batch, pyramid)


def order_of_queries(
    positions: Tensor, images: Tensor, levels: Tensor | None, pyramid: FeaturePyramid
) -> Tensor:
    """The `cell_order` of the cells in which queries lie on their own levels, int64 ``[N]``."""
    own = images.new_zeros(len(images)) if levels is None else levels.clamp(0, pyramid.n_levels - 1)
    centers = window_centers(positions, pyramid.level_shapes, pyramid.periodic_axes)
    cells = centers.nan_to_num(0.0).clamp(-(2.0**62), 2.0**62).long()
    return cell_order(cells[own, torch.arange(len(own), device=own.device)], own, images, pyramid)


def number_rows(keys: Tensor, group: ProcessGroup) -> tuple[Tensor, int]:
    """The place of each of the own ``keys`` int64 ``[n]`` among the sorted keys of all ranks, int64
    ``[n]``, and how many there are.

    Equal keys are in the order of ranks, and on a rank in the order given. The ranks send their
    keys one after another, so that none holds those of all.
    """
    own, n_ranks = ranks_of(group)
    order = torch.argsort(keys, stable=True)
    ids = torch.empty_like(keys)
    ids[order] = torch.arange(len(keys), device=keys.device)
    counts = exchange_counts([len(keys)] * n_ranks, group, keys.device)
    for rank, count in enumerate(counts):
        others = keys[order] if rank == own else keys.new_empty(count)
        dist.broadcast(others, group=group, group_src=rank)
        if rank != own:
            ids += torch.searchsorted(others, keys, right=rank < own)
    return ids, sum(counts)
