"""Access to tiles: their rows, the columns of their runs, and which pairs lie within a window.

`_index.tiles` explains tiles and runs. A row is a query and a column a point, or the other way
round. A column is an index into ``order``, and its *item* is the point (or query)
``order[column]``. ``order`` lists points once, and queries once per level.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class WindowArguments(NamedTuple):
    """The windows, in key coordinates. Contents of all but ``slices`` may have been tampered with.

    Of `types.WindowTables`, ``levels`` has the fields below.
    """

    slices: Any  # int32 [L, 2], the number of rows of a window, and of those at the levels before
    levels: Any  # int32 [L, 2 + P]
    rows: Any  # int32 [R, 3]
    box_rows: Any  # int32 [B, 2]


class Walk(NamedTuple):
    """The first arguments of every kernel that works on tiles, in this order.

    Kernels take them one by one and put them together again. Triton compiles variants of a kernel
    for sizes that are one or a multiple of 16; ``do_not_specialize`` prevents that for arguments,
    not for the members of a tuple.
    """

    tiles: Any  # `types.Tiles`
    windows: Any  # `WindowArguments`
    n_rows: int
    n_columns: int  # the length of `tiles.order`
    n_items: int
    n_runs: int  # C, the space for runs of a tile
    n_blocks: int  # the space for lists
    n_groups: int  # images x levels of the background, zero without one
    n_heads: int
    row_mask: Any = None  # bool [n_rows], rows without neighbors; None: there are none


SIZES = Walk._fields[2:-1]

# Fields of a row of `WindowTables.levels`. From `SIZES_FIELD` on, there is one for each axis.
FIRST_BOX_ROW, FIRST_BOX_CELL, SIZES_FIELD = (tl.constexpr(field) for field in range(3))

SEARCH_BLOCK = tl.constexpr(16)  # columns; searching takes registers


@triton.jit
def level_ptr(walk, level, FIELD: tl.constexpr, DIM: tl.constexpr):
    """Pointer to a field of a level's windows, or pointers for a block of levels."""
    return walk.windows.levels + (SIZES_FIELD + DIM) * level + FIELD


@triton.jit
def load_slices(walk, level):
    """How many rows the windows of a level have, and how many are at the levels before it."""
    slices_ptr = walk.windows.slices + 2 * level
    return tl.load(slices_ptr), tl.load(slices_ptr + 1)


@triton.jit
def load_tile_rows(walk, tile, ROWS: tl.constexpr):
    """The rows of a tile, or of a part of one if ``ROWS`` is fewer, int64 ``[ROWS]``, and which of
    them are valid, bool ``[ROWS]``.
    """
    offset = tl.full([ROWS], 0, tl.int64) + tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
    valid = offset < walk.n_rows  # [ROWS]
    row = tl.load(walk.tiles.traversal + offset, mask=valid, other=0).to(tl.int64)  # [ROWS]
    return row, valid & (row >= 0) & (row < walk.n_rows)


@triton.jit
def program_tile(walk, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """The tile and the head of a program, the first of the tile's rows that it works on, and these
    ``ROWS`` rows as `load_tile_rows` returns them.

    The heads of a tile are neighboring programs, which share its rows in the cache. Tiles are
    taken from the last to the first: those of coarse levels come last and have the most columns,
    and a long program that starts late would run alone at the end.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    part, head = program // walk.n_heads, program % walk.n_heads
    row, row_valid = load_tile_rows(walk, part, ROWS)
    tile, first_row = split_part(part, ROWS, TILE_ROWS)
    return tile, head, first_row, row, row_valid


@triton.jit
def split_part(part, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):
    """The tile of a part of ``ROWS`` rows, and the part's first row in the tile."""
    parts: tl.constexpr = TILE_ROWS // ROWS
    return part // parts, part % parts * ROWS


@triton.jit
def load_list(walk, tile, BLOCK: tl.constexpr):
    """A tile's list: its first entry, and how many it has; -1 for a tile without a list."""
    list_ptr = walk.tiles.lists + tile.to(tl.int64) * 2
    first = tl.load(list_ptr).to(tl.int64)
    n_blocks = tl.load(list_ptr + 1).to(tl.int64)
    inside = (first >= 0) & (n_blocks >= 0) & (first + n_blocks <= walk.n_blocks)
    inside = inside & (walk.n_items > 0)
    return first * BLOCK, tl.where(inside, n_blocks * BLOCK, -1).to(tl.int32)


@triton.jit
def member_bits(walk, first_row, row, row_valid, ROWS: tl.constexpr):
    """The bit of each row in `Tiles.members`, int32 ``[ROWS]``; zero for rows that are masked."""
    bit = tl.full([ROWS], 1, tl.int32) << (first_row + tl.arange(0, ROWS)).to(tl.int32)  # [ROWS]
    return tl.where(is_masked(walk, row, row_valid), 0, bit)


@triton.jit
def load_listed(walk, entry):
    """Some entries ``[BLOCK]``, int64, inside the space for lists.

    Returns:
        The items, int32 ``[BLOCK]``, all valid; the members, int32 ``[BLOCK]``, see `Tiles`.
    """
    item = tl.load(walk.tiles.items + entry).to(tl.uint32, bitcast=True)  # [BLOCK]
    last = (walk.n_items - 1).to(tl.uint32, bitcast=True)  # for items that were tampered with
    item = tl.minimum(item, last).to(tl.int32, bitcast=True)  # [BLOCK]
    return item, tl.load(walk.tiles.members + entry)


@triton.jit
def member_mask(bit, members):
    """The pair mask, bool ``[ROWS, BLOCK]``, of `member_bits` and members."""
    return (members[None, :] & bit[:, None]) != 0


@triton.jit
def load_runs(walk, tile, level, TILE_ROWS: tl.constexpr, LEVELS: tl.constexpr):
    """The runs of a tile at a level: the offset of the first, and how many runs and entries."""
    offset = tile.to(tl.int64) * walk.n_runs
    capacity = walk.n_runs
    if LEVELS > 1:
        n_slices, first_slice = load_slices(walk, level)
        offset += TILE_ROWS * first_slice
        capacity = TILE_ROWS * n_slices
    counts_ptr = walk.tiles.counts + (tile.to(tl.int64) * LEVELS + level) * 2
    return (
        offset,
        tl.minimum(tl.load(counts_ptr), capacity),
        tl.minimum(tl.load(counts_ptr + 1), walk.n_columns),
    )


@triton.jit
def load_columns(walk, entry, runs, LEVELS: tl.constexpr):
    """The columns of some entries of a tile's runs.

    Args:
        walk: the `Walk`.
        entry: int32 ``[BLOCK]``.
        runs: what `load_runs` returns.
        LEVELS: how many columns an item has, one per level.

    Returns:
        The items, int64 ``[BLOCK]``, zero where not valid; which are valid, bool ``[BLOCK]``; the
        levels of the columns, int64 ``[BLOCK]``.
    """
    offset, n_runs, n_entries = runs
    # Binary search for the last run whose first entry is not beyond this one.
    run = tl.zeros_like(entry)  # [BLOCK]
    span = n_runs
    while span > 1:
        half = span // 2
        reached = tl.load(walk.tiles.firsts + offset + (run + half)) <= entry  # [BLOCK]
        run = tl.where(reached, run + half, run)
        span -= half
    valid = entry < n_entries  # [BLOCK]
    column = entry + tl.load(walk.tiles.shifts + offset + run, mask=valid, other=0)  # [BLOCK]
    valid = valid & (column >= 0) & (column < walk.n_columns)
    item = tl.load(walk.tiles.order + column, mask=valid, other=-1).to(tl.int64)  # [BLOCK]
    valid = valid & (item >= 0) & (item < walk.n_items)
    item = tl.where(valid, item, 0)
    level = tl.zeros_like(item)  # [BLOCK]
    if LEVELS > 1:
        level = tl.where(valid, column // walk.n_items, 0).to(tl.int64)
    return item, valid, level


@triton.jit
def is_masked(walk, row, valid):
    """Which of the rows ``[n]`` that are ``valid`` have no neighbors at all."""
    if walk.row_mask is None:
        return ~valid
    else:
        return tl.load(walk.row_mask + row, mask=valid, other=True)


@triton.jit
def load_group(walk, row, level, valid):
    """The groups of rows at a level, int32 ``[n]``; -1 for rows masked or not ``valid``."""
    offset = (tl.zeros_like(row) + walk.n_rows) * level + row  # [n]
    active = valid & ~is_masked(walk, row, valid)  # [n]
    return tl.load(walk.tiles.row_groups + offset, mask=active, other=-1)


@triton.jit
def load_cell(walk, row, level, axis, valid, DIM: tl.constexpr):
    """One coordinate of the cells of rows at a level, int32 ``[n]``."""
    offset = (tl.zeros_like(row) + walk.n_rows) * (level * DIM + axis) + row  # [n]
    return tl.load(walk.tiles.row_cells + offset, mask=valid, other=0)


@triton.jit
def group_level(group, LEVELS: tl.constexpr):
    """The level of each group; of those that are masked, any."""
    return tl.where(group >= 0, group % LEVELS, 0)


@triton.jit
def is_below(step, size):
    """Whether ``0 <= step < size``, in one comparison: negative numbers are large unsigned ones."""
    return step.to(tl.uint32, bitcast=True) < size.to(tl.uint32, bitcast=True)


@triton.jit
def in_ball(walk, level, box_row, step, pair_mask, DIM: tl.constexpr, BALL_ROWS: tl.constexpr):
    """Which pairs in the boxes of their windows are in the windows, bool ``[ROWS, BLOCK]``.

    Args:
        walk, pair_mask: as in `window_mask`.
        level: a scalar or ``[ROWS, 1]``.
        box_row: ``[ROWS, BLOCK]``, which row of its box a pair is in.
        step: ``[ROWS, BLOCK]``, its cell along the last axis, from the box's first one.
    """
    first = tl.zeros([1, 1], tl.int32) + tl.load(level_ptr(walk, level, FIRST_BOX_ROW, DIM))
    box_row += first
    looked_up = pair_mask & (first >= 0) & is_below(box_row, tl.full([], BALL_ROWS, tl.int32))
    row_ptr = walk.windows.box_rows + 2 * tl.where(looked_up, box_row, 0)  # [ROWS, BLOCK]
    start = tl.load(row_ptr, mask=looked_up, other=0)  # [ROWS, BLOCK]
    width = tl.load(row_ptr + 1, mask=looked_up, other=0)  # [ROWS, BLOCK]
    return (first < 0) | is_below(step - start, width)


@triton.jit
def load_row_windows(walk, row, row_level, row_valid, DIM: tl.constexpr, LEVELS: tl.constexpr,
                     SAME_LEVEL: tl.constexpr):  # fmt: skip
    """What of rows `window_mask` compares with columns, to be loaded once for many columns.

    Args:
        walk: the `Walk`.
        row, row_valid: ``[ROWS]``.
        row_level: the level at which rows are compared, a scalar.
        DIM: number of spatial dimensions.
        LEVELS: number of levels.
        SAME_LEVEL: whether all windows are those of ``row_level``, and sizes scalars; else each
            row's group tells, which takes more instructions and fewer registers.

    Returns:
        The groups, int32 ``[ROWS]``; the levels of windows, a scalar or ``[ROWS, 1]``; the cells
        ``[ROWS]`` and the sizes of windows, a scalar or ``[ROWS, 1]``, a tuple of axes each.
    """
    group = load_group(walk, row, row_level, row_valid)  # [ROWS]
    level = row_level if SAME_LEVEL else group_level(group, LEVELS)[:, None]
    cells, sizes = (), ()  # Triton's tuples grow by addition alone
    for axis in tl.static_range(DIM):
        size_ptr = level_ptr(walk, level, SIZES_FIELD + axis, DIM)  # a scalar or [ROWS, 1]
        cells += (load_cell(walk, row, row_level, axis, row_valid, DIM),)  # type: ignore[assignment]
        sizes += (tl.load(size_ptr),)  # type: ignore[assignment]
    return group, level, cells, sizes


@triton.jit
def window_mask(
    walk, rows, item, item_level, item_valid,
    DIM: tl.constexpr, BALL_ROWS: tl.constexpr, ROWS_ARE_QUERIES: tl.constexpr,
):  # fmt: skip
    """The pair mask, bool ``[ROWS, BLOCK]``: which pairs of a row and a column are neighbors.

    Args:
        walk: the `Walk`.
        rows: what `load_row_windows` returns.
        item, item_level, item_valid: ``[BLOCK]``, what `load_columns` returns.
        DIM: number of spatial dimensions.
        BALL_ROWS: the length of `WindowArguments.box_rows`; 0 where all windows are boxes.
        ROWS_ARE_QUERIES: whether rows are queries and columns points, or the other way round.
    """
    group, level, cells, sizes = rows
    n_items = tl.zeros_like(item) + walk.n_items  # [BLOCK], int64, as are all offsets
    offset = item_level * n_items + item  # [BLOCK]
    item_group = tl.load(walk.tiles.column_groups + offset, mask=item_valid, other=-1)  # [BLOCK]
    pair_mask = (group >= 0)[:, None] & (group[:, None] == item_group[None, :])  # [ROWS, BLOCK]
    box_row = tl.zeros([1, 1], tl.int32)  # [ROWS, BLOCK] from the first axis on
    for axis in tl.static_range(DIM):
        cell, size = cells[axis], sizes[axis]  # [ROWS], and a scalar or [ROWS, 1]
        offset = (item_level * DIM + axis) * n_items + item
        item_cell = tl.load(walk.tiles.column_cells + offset, mask=item_valid, other=0)  # [BLOCK]
        # From the first cell of the query's window to that of the point.
        if ROWS_ARE_QUERIES:
            step = item_cell[None, :] - cell[:, None]  # [ROWS, BLOCK]
        else:
            step = cell[:, None] - item_cell[None, :]
        pair_mask = pair_mask & is_below(step, size)
        if BALL_ROWS > 0:
            if axis < DIM - 1:
                box_row = box_row * size + step
            else:
                pair_mask = pair_mask & in_ball(
                    walk, level, box_row, step, pair_mask, DIM, BALL_ROWS
                )
    return pair_mask


@triton.jit
def search_columns(walk, row, row_valid, level, first, runs,
                   DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                   ROWS_ARE_QUERIES: tl.constexpr):  # fmt: skip
    """The entries of a tile's runs from ``first`` on.

    Args:
        walk, runs: see `load_columns`.
        row, row_valid, level: see `load_row_windows`.
        first: a scalar.
        DIM, LEVELS, BALL_ROWS, ROWS_ARE_QUERIES: see `load_row_windows` and `window_mask`.

    Returns:
        The items, int64 ``[SEARCH_BLOCK]``, zero where not valid; which are valid, bool
        ``[SEARCH_BLOCK]``; the pair mask, bool ``[ROWS, SEARCH_BLOCK]``.
    """
    entry = first + tl.arange(0, SEARCH_BLOCK)  # [SEARCH_BLOCK]
    item, valid, item_level = load_columns(walk, entry, runs, 1 if ROWS_ARE_QUERIES else LEVELS)
    rows = load_row_windows(walk, row, level, row_valid, DIM, LEVELS, False)
    pair_mask = window_mask(walk, rows, item, item_level, valid, DIM, BALL_ROWS, ROWS_ARE_QUERIES)
    return item, valid, pair_mask
