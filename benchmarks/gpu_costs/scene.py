"""What the tiles of a scene contain, counted on the CPU: entries, blocks and sectors."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.scenes import Scene
from vicinal import FeaturePyramid, plan_neighborhoods
from vicinal.backends import reference
from vicinal.backends.types import LIST_BLOCK, Tiles

_STATS_PER_SECTOR = 4  # a sector has 32 bytes, the statistics of a query and head 8


class TileCounts(NamedTuple):
    """One direction: tiles of queries and their points, or the reverse. Means over the tiles."""

    tiles: int
    entries: float  # columns of a tile
    blocks: float  # blocks of a tile's list
    level_blocks: float  # the same if levels did not share blocks
    row_stats: float  # sectors with statistics of a tile's rows, as if these were queries
    column_stats: float  # the same for its columns
    rows: int  # of a tile


class SceneCounts(NamedTuple):
    """All points of the scene are queries."""

    points: int
    slices: int  # of a query, over all levels
    widest: int  # cells of the longest slice
    queries: TileCounts  # tiles of queries
    columns: TileCounts  # tiles of points


def count(scene: Scene) -> SceneCounts:
    """Counts what the plan of a scene contains, its points being the queries."""
    n = len(scene.coordinates)
    pyramid = FeaturePyramid(torch.zeros(n, 1), scene.coordinates, scene.level_shapes, 1)
    plan = plan_neighborhoods(
        pyramid.positions(), torch.tensor([0, n]), pyramid, list(scene.windows)
    )
    slices = [size ** (plan.position_dim - 1) for size in scene.windows]
    tiles = plan._query_tiles(reference.find_runs), plan._point_tiles(reference.find_runs)
    counts = (_count_tiles(*x) for x in zip(tiles, (slices, [max(slices)]), strict=True))
    return SceneCounts(n, sum(slices), max(scene.windows), *counts)


def _count_tiles(tiles: Tiles, slices: list[int]) -> TileCounts:
    entries = tiles.counts[..., 1].sum(1)
    blocks = (entries + LIST_BLOCK - 1) // LIST_BLOCK
    level_blocks = ((tiles.counts[..., 1] + LIST_BLOCK - 1) // LIST_BLOCK).sum(1)
    mean_entries, mean_blocks, mean_level_blocks = (
        float(x.double().mean()) for x in (entries, blocks, level_blocks)
    )
    rows = tiles.firsts.shape[1] // sum(slices)
    tile_of_row = torch.arange(len(tiles.traversal)) // rows
    tile, column = _columns(tiles, slices)
    return TileCounts(
        len(entries), mean_entries, mean_blocks, mean_level_blocks,
        _stats_sectors(tile_of_row, tiles.traversal) / len(entries),
        _stats_sectors(tile, tiles.order[column]) / len(entries), rows,
    )  # fmt: skip


def _stats_sectors(tile: Tensor, query: Tensor) -> int:
    """How many different sectors hold the statistics of each tile's queries, added up."""
    return len(torch.unique(tile * 2**32 + query.long() // _STATS_PER_SECTOR))


def _columns(tiles: Tiles, slices: list[int]) -> tuple[Tensor, Tensor]:
    """The tile and the column of every entry of the runs; rows have ``slices`` at each level."""
    rows, first, found = tiles.firsts.shape[1] // sum(slices), 0, []
    for level, own in enumerate(slices):
        space = slice(first, first := first + rows * own)
        n_runs, n_entries = tiles.counts[:, level].long().unbind(1)
        firsts, shifts = (part[:, space].long() for part in (tiles.firsts, tiles.shifts))
        run = torch.arange(firsts.shape[1])
        stops = torch.cat((firsts[:, 1:], firsts[:, :1]), 1)
        stops = torch.where(run == n_runs[:, None] - 1, n_entries[:, None], stops)
        tile, index = (run < n_runs[:, None]).nonzero(as_tuple=True)
        found.append((tile, (firsts + shifts)[tile, index], (stops - firsts)[tile, index]))
    tile, start, length = (torch.cat(parts) for parts in zip(*found, strict=True))
    step = torch.arange(int(length.sum()))
    step -= torch.repeat_interleave(length.cumsum(0) - length, length)
    return torch.repeat_interleave(tile, length), torch.repeat_interleave(start, length) + step
