"""The learned bias in Triton: a number for each cell of the windows and head, and its gradient.

Where windows are boxes, the slot of a pair of a query and a point is a difference of two numbers:
the number of the point's cell, and that of the window's first cell, both counted row-major in a map
whose axes are as long as the windows are. Where some are balls, the difference is looked up in a
table. Numbers are cut to 32 bits, in which their difference is exact.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tile_walk import FIRST_BOX_CELL, SIZES_FIELD, group_level


class Bias(NamedTuple):
    """The bias, and the numbers of cells, see above."""

    table: Any  # [K, H], contiguous
    query_numbers: Any  # int32 [L, N]
    point_numbers: Any  # int32 [nnz]
    box_slots: Any  # int32 [C], see `types.WindowTables`; None if all windows are boxes
    n_slots: int  # K
    n_box_cells: int  # C


@triton.jit
def number_cell(windows_ptr, cells_ptr, axis_stride, valid, DIM: tl.constexpr):
    """The number of a cell, int32 ``[BLOCK]``, from pointers to the fields of its level's windows
    and to its first coordinate.
    """
    number = tl.zeros_like(valid.to(tl.int32))  # [BLOCK]
    for axis in tl.static_range(DIM):
        size = tl.load(windows_ptr + SIZES_FIELD + axis)
        cell = tl.load(cells_ptr + axis * axis_stride, mask=valid, other=0)  # [BLOCK]
        number = number * size + cell
    return number


@triton.jit(do_not_specialize=("n_queries", "n_points"))
def number_cells(query_cells_ptr, point_groups_ptr, point_cells_ptr, levels_ptr,
                 query_numbers_ptr, point_numbers_ptr, n_queries, n_points,
                 DIM: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Numbers the first cells of windows, and the cells of points.

    Args:
        query_cells_ptr: int32 ``[L, P, N]``.
        point_groups_ptr, point_cells_ptr: int32 ``[nnz]`` and ``[P, nnz]``.
        levels_ptr: int32 ``[L, 2 + P]``, see `types.WindowTables`.
        query_numbers_ptr, point_numbers_ptr: int32 ``[L, N]`` and ``[nnz]``, the results.
        n_queries, n_points: N and nnz.
        BLOCK: queries, and points, of a program.
    """
    fields: tl.constexpr = SIZES_FIELD + DIM
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    valid = index < n_queries  # [BLOCK]
    for level in tl.static_range(LEVELS):
        first = level * n_queries.to(tl.int64)
        number = number_cell(
            levels_ptr + level * fields,
            query_cells_ptr + first * DIM + index,
            n_queries,
            valid,
            DIM,
        )  # [BLOCK]
        tl.store(query_numbers_ptr + first + index, number, mask=valid)
    valid = index < n_points  # [BLOCK]
    level = group_level(tl.load(point_groups_ptr + index, mask=valid, other=0), LEVELS)  # [BLOCK]
    window_ptr = levels_ptr + level * fields  # [BLOCK]
    number = number_cell(window_ptr, point_cells_ptr + index, n_points, valid, DIM)  # [BLOCK]
    number += tl.load(window_ptr + FIRST_BOX_CELL)
    tl.store(point_numbers_ptr + index, number, mask=valid)


@triton.jit
def pair_slots(walk, bias, row, item, pair_mask, LEVELS: tl.constexpr,
               ROWS_ARE_QUERIES: tl.constexpr):  # fmt: skip
    """The slots of the pairs that are neighbors, int32 ``[ROWS, BLOCK]``; any of other pairs.

    Args:
        walk, bias: the `Walk` and the `Bias`.
        row, item, pair_mask: ``[ROWS]``, ``[BLOCK]`` and ``[ROWS, BLOCK]``. All items are valid.
        LEVELS: number of levels.
        ROWS_ARE_QUERIES: see `window_mask`.
    """
    if ROWS_ARE_QUERIES:
        level = group_level(tl.load(walk.tiles.column_groups + item), LEVELS)  # [BLOCK]
        first = (level * walk.n_rows)[None, :] + row[:, None].to(tl.int32)  # [ROWS, BLOCK]
        first = tl.load(bias.query_numbers + first, mask=pair_mask, other=0)
        slot = tl.load(bias.point_numbers + item)[None, :] - first  # [ROWS, BLOCK]
    else:
        valid = (row >= 0) & (row < walk.n_rows)  # [ROWS]
        group = tl.load(walk.tiles.row_groups + row, mask=valid, other=0)  # [ROWS]
        number = tl.load(bias.point_numbers + row, mask=valid, other=0)  # [ROWS]
        first = (group_level(group, LEVELS) * walk.n_items)[:, None] + item[None, :].to(tl.int32)
        slot = number[:, None] - tl.load(bias.query_numbers + first)  # [ROWS, BLOCK]
    if bias.box_slots is None:
        return slot
    else:
        valid = (slot >= 0) & (slot < bias.n_box_cells)  # [ROWS, BLOCK]
        return tl.load(bias.box_slots + slot, mask=valid, other=-1)


@triton.jit
def load_bias(walk, bias, slot, head):
    """The bias of slots of any shape, float32, zero beyond the last slot."""
    valid = (slot >= 0) & (slot < bias.n_slots)
    values = tl.load(bias.table + slot * walk.n_heads + head, mask=valid, other=0.0)
    return values.to(tl.float32)


@triton.jit
def load_pair_bias(walk, bias, row, item, pair_mask, head, LEVELS: tl.constexpr,
                   ROWS_ARE_QUERIES: tl.constexpr):  # fmt: skip
    """The bias of pairs, float32 ``[ROWS, BLOCK]``; the arguments are those of `pair_slots`."""
    slot = pair_slots(walk, bias, row, item, pair_mask, LEVELS, ROWS_ARE_QUERIES)
    return load_bias(walk, bias, slot, head)


@triton.jit
def sum_by_slot(walk, bias, sums_ptr, row, item, pair_mask, grad_logits, LEVELS: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Adds the gradients of logits to the sums of their slots, always in the same order.

    Each row has sums of its own. There, entries of a block can have the same slot only if they are
    points that share a cell; these are added in turn.

    Args, in addition to those of `pair_slots`; rows are queries:
        sums_ptr: float32 ``[ROWS, K]``, which no other program uses.
        grad_logits: ``[ROWS, BLOCK]``.
    """
    slot = pair_slots(walk, bias, row, item, pair_mask, LEVELS, True)  # [ROWS, BLOCK]
    valid = pair_mask & (slot >= 0) & (slot < bias.n_slots)  # [ROWS, BLOCK]
    number = tl.load(bias.point_numbers + item)  # [BLOCK]
    entry = tl.arange(0, BLOCK)  # [BLOCK]
    used = tl.max(pair_mask.to(tl.int32), 0)  # [BLOCK]
    is_earlier = (entry[:, None] < entry[None, :]) & (number[:, None] == number[None, :])
    turn = tl.sum(tl.where(is_earlier, used[:, None], 0), 0)  # [BLOCK]
    ptrs = sums_ptr + tl.arange(0, ROWS)[:, None] * bias.n_slots + tl.where(valid, slot, 0)
    for now in range(0, tl.max(tl.where(used != 0, turn, -1), 0) + 1):
        mask = valid & (turn == now)[None, :]  # [ROWS, BLOCK]
        tl.debug_barrier()  # another thread may have written what is loaded next
        sums = tl.load(ptrs, mask=mask, other=0.0)  # [ROWS, BLOCK]
        tl.store(ptrs, sums + grad_logits, mask=mask)
