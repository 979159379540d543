"""Lists in Triton: the columns of every tile, and which of its rows have them as neighbors.

A kernel that works on a tile could search its runs for each block of columns, and compare cells to
find the pairs. All heads and layers would repeat that, so it is done once per plan, and the result
is kept for tiles whose list fits the space; `Tiles` says how.
"""

import triton
import triton.language as tl

from .tile_walk import (
    SIZES,
    Walk,
    load_columns,
    load_row_windows,
    load_runs,
    load_tile_rows,
    window_mask,
)


@triton.jit(do_not_specialize=("n_tiles", "n_columns", "n_blocks"))
def place_lists(counts_ptr, lists_ptr, n_tiles, n_columns, n_blocks,
                ROW_LEVELS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Gives every tile as many blocks as its entries need, while there are some left.

    A single program goes through the tiles in order.

    Args:
        counts_ptr: int32 ``[T, ROW_LEVELS, 2]``, see `Tiles.counts`.
        lists_ptr: int32 ``[T, 2]``, the result, see `Tiles.lists`.
        n_tiles: T.
        n_columns: the length of `Tiles.order`.
        n_blocks: the space.
        ROW_LEVELS: levels of a row.
        BLOCK: entries of a block.
        CHUNK: tiles handled at once.
    """
    used = tl.full([], 0, tl.int64)  # blocks
    for first in range(0, n_tiles, CHUNK):
        tile = tl.full([CHUNK], 0, tl.int64) + first + tl.arange(0, CHUNK)  # [CHUNK]
        valid = tile < n_tiles  # [CHUNK]
        n_entries = tl.zeros([CHUNK], tl.int64)
        for level in tl.static_range(ROW_LEVELS):
            offset = (tile * ROW_LEVELS + level) * 2 + 1  # [CHUNK]
            count = tl.load(counts_ptr + offset, mask=valid, other=0)  # [CHUNK]
            n_entries += tl.minimum(tl.maximum(count, 0), n_columns)
        blocks = (n_entries + (BLOCK - 1)) // BLOCK  # [CHUNK]
        stop = used + tl.cumsum(blocks, 0)  # [CHUNK]
        fits = stop <= n_blocks  # [CHUNK]
        tl.store(lists_ptr + 2 * tile, tl.where(fits, stop - blocks, 0).to(tl.int32), mask=valid)
        tl.store(lists_ptr + 2 * tile + 1, tl.where(fits, blocks, -1).to(tl.int32), mask=valid)
        used += tl.sum(blocks, 0)


@triton.jit(do_not_specialize=SIZES)
def write_lists(tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups,
                n_heads, row_mask, lists_ptr, items_ptr, members_ptr,
                DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                ROWS_ARE_QUERIES: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes the list of a tile: the columns of its runs, level after level, and their members.

    Args:
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask:
            see `Walk`.
        lists_ptr: int32 ``[T, 2]``, what `place_lists` found.
        items_ptr, members_ptr: int32 ``[S]``, the results.
        DIM, LEVELS, BALL_ROWS, ROWS_ARE_QUERIES: see `load_row_windows` and `window_mask`.
        ROWS: rows of a tile.
        BLOCK: entries of a block.
    """
    walk = Walk(
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )
    row_levels: tl.constexpr = LEVELS if ROWS_ARE_QUERIES else 1
    column_levels: tl.constexpr = 1 if ROWS_ARE_QUERIES else LEVELS
    tile = tl.program_id(0)
    row, row_valid = load_tile_rows(walk, tile, ROWS)  # [ROWS] each
    bit = tl.full([ROWS], 1, tl.int32) << tl.arange(0, ROWS)  # [ROWS]
    position = tl.load(lists_ptr + 2 * tile.to(tl.int64)).to(tl.int64) * BLOCK
    stop = position + tl.load(lists_ptr + 2 * tile.to(tl.int64) + 1).to(tl.int64) * BLOCK
    entry = tl.arange(0, BLOCK)  # [BLOCK]
    # Pads the last block, for kernels that load without a mask: it is in the cache already.
    spare = tl.full([], 0, tl.int64)
    for level in range(row_levels):
        runs = load_runs(walk, tile, level, ROWS, row_levels)
        # As `place_lists` counts them, also if the counts were tampered with.
        n_entries = tl.where(stop > position, tl.maximum(runs[2], 0), 0)
        rows = load_row_windows(walk, row, level, row_valid, DIM, LEVELS, ROWS_ARE_QUERIES)
        for first in range(0, n_entries, BLOCK):
            item, item_valid, item_level = load_columns(
                walk, first + entry, runs, column_levels
            )  # [BLOCK] each
            pair_mask = window_mask(
                walk, rows, item, item_level, item_valid, DIM, BALL_ROWS, ROWS_ARE_QUERIES
            )  # [ROWS, BLOCK]
            members = tl.sum(tl.where(pair_mask, bit[:, None], 0), 0)  # [BLOCK]
            offset = position + first + entry  # [BLOCK]
            mask = (first + entry < n_entries) & (offset < stop)  # [BLOCK]
            spare = tl.maximum(spare, tl.max(tl.where(item_valid, item, 0), 0))
            item = tl.where(item_valid, item, spare).to(tl.int32)  # [BLOCK]
            tl.store(items_ptr + offset, item, mask=mask)
            tl.store(members_ptr + offset, members, mask=mask)
        position += n_entries
    padding = position + entry  # [BLOCK]
    tl.store(
        items_ptr + padding, tl.zeros([BLOCK], tl.int32) + spare.to(tl.int32), mask=padding < stop
    )
    tl.store(members_ptr + padding, tl.zeros([BLOCK], tl.int32), mask=padding < stop)
