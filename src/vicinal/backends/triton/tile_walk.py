"""Walking a tile: its rows, the columns that any of them sees, and who sees which.

Kernels are handed the tensors of `tiles.Tiles` and sizes, and make a `Walk` of them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Walk(NamedTuple):
    """What kernels of tiles take first, in this order.

    Sizes stand by themselves: Triton would compile a kernel for multiples of 16, for all else and
    for one, of each number in a tuple, and cannot be told not to.
    """

    tiles: Any  # see `tiles.Tiles`
    levels: Any  # per level: a window's radius, slices, slices before, cells before
    n_rows: int
    n_columns: int
    n_others: int
    n_runs: int
    n_groups: int  # images x levels, where a background has a value for each
    n_heads: int


SIZES = Walk._fields[2:]


@triton.jit
def tile_and_head(n_heads):
    """Heads of one tile run side by side and share its rows in the cache. The last tiles come
    first: those of coarse levels see most, and nothing should wait for them in the end.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    return program // n_heads, program % n_heads


@triton.jit
def rows_of(walk, tile, ROWS: tl.constexpr):
    """int64 ``[ROWS]``, the tile's rows, and which of them exist."""
    place = tl.full([ROWS], 0, tl.int64) + tile * ROWS + tl.arange(0, ROWS)
    exists = place < walk.n_rows
    row = tl.load(walk.tiles.traversal + place, mask=exists, other=0).to(tl.int64)
    return row, exists & (row >= 0) & (row < walk.n_rows)


@triton.jit
def runs_of(walk, tile, level, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """Where a tile's runs at a level begin, how many there are, and how many entries they have."""
    begin = tile.to(tl.int64) * walk.n_runs
    capacity = walk.n_runs
    if LEVELS > 1:
        begin += ROWS * tl.load(walk.levels + 4 * level + 2)
        capacity = ROWS * tl.load(walk.levels + 4 * level + 1)
    counts = walk.tiles.counts + (tile.to(tl.int64) * LEVELS + level) * 2
    return (
        begin,
        tl.minimum(tl.load(counts), capacity),
        tl.minimum(tl.load(counts + 1), walk.n_columns),
    )


@triton.jit
def columns_at(walk, entry, begin, n_runs, n_entries, LEVELS: tl.constexpr):
    """The columns of some entries: int64 index among all others, which exist, and the place of
    each in `Places`: ``level * n_others + index``.
    """
    low = tl.zeros_like(entry)
    high = tl.zeros_like(entry) + n_runs
    span = n_runs
    while span > 1:
        middle = (low + high) // 2
        reached = tl.load(walk.tiles.firsts + begin + middle) <= entry
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
        span = (span + 1) // 2
    exists = entry < n_entries
    column = entry + tl.load(walk.tiles.shifts + begin + low, mask=exists, other=0)
    exists = exists & (column >= 0) & (column < walk.n_columns)
    index = tl.load(walk.tiles.order + column, mask=exists, other=-1).to(tl.int64)
    exists = exists & (index >= 0) & (index < walk.n_others)
    index = tl.where(exists, index, 0)
    level = tl.zeros_like(index)
    if LEVELS > 1:
        level = tl.where(exists, column // walk.n_others, 0).to(tl.int64)
    return index, exists, level


@triton.jit
def group_at(walk, row, level, exists):
    """The group of rows at a level, -1 for those that do not exist."""
    place = (tl.zeros_like(row) + walk.n_rows) * level + row
    return tl.load(walk.tiles.row_groups + place, mask=exists, other=-1)


@triton.jit
def cell_at(walk, row, level, axis, exists, DIM: tl.constexpr):
    """A coordinate of the cells that rows fall into at a level."""
    place = (tl.zeros_like(row) + walk.n_rows) * (level * DIM + axis) + row
    return tl.load(walk.tiles.row_cells + place, mask=exists, other=0)


@triton.jit
def seen(
    walk, row, row_level, row_exists, column, column_level, column_exists,
    DIM: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Bool ``[ROWS, BLOCK]``: which rows see which columns, each at a level."""
    group = group_at(walk, row, row_level, row_exists)
    n_others = tl.zeros_like(column) + walk.n_others  # of 64 bits, as all places are
    place = column_level * n_others + column
    other = tl.load(walk.tiles.column_groups + place, mask=column_exists, other=-1)
    takes_part = group >= 0
    radius = tl.load(walk.levels + 4 * (group % LEVELS), mask=takes_part, other=0)
    sees = takes_part[:, None] & (group[:, None] == other[None, :])
    for axis in tl.static_range(DIM):
        cell = cell_at(walk, row, row_level, axis, row_exists, DIM)
        place = (column_level * DIM + axis) * n_others + column
        other_cell = tl.load(walk.tiles.column_cells + place, mask=column_exists, other=0)
        # One comparison for both sides: what lies below is huge as an unsigned number.
        above = (other_cell[None, :] - (cell - radius)[:, None]).to(tl.uint32, bitcast=True)
        sees = sees & (above <= (2 * radius).to(tl.uint32, bitcast=True)[:, None])
    return sees
