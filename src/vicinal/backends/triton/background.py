"""Empty cells in Triton: what a background adds to attention over tiles.

A slice of points covers one line of cells along the last axis of a window. The cells of the line
that hold none of these points are empty. Kernels process a line in blocks of `CELLS` cells and keep
a word of occupancy bits per query. The logits of empty cells are products of the background's
query and its keys. All empty cells of a level have the same value, so their weights are summed
first and multiplied with it once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .parts import (
    LOG2_E,
    dot,
    dropout_factors,
    finite_or_zero,
    load_rows,
    load_stats,
    softmax_step,
    store_rows,
)
from .tile_walk import (
    FIRST_SLICE,
    FIRST_SLOT,
    N_SLICES,
    RADIUS,
    SIZES,
    Walk,
    level_ptr,
    load_cell,
    load_group,
    load_tile_rows,
)


class EmptyCells(NamedTuple):
    """The `Background`, and the slices, which tell empty cells from occupied ones."""

    query: Any  # Rows [N * L, H, d]
    key: Any  # Rows [K, H, d]
    value: Any  # Rows [B * L, H, dv]
    starts: Any  # int32 [N, R]
    stops: Any  # int32 [N, R]
    point_columns: Any  # int32 [nnz], the last coordinate of the points, in sorted order
    n_slices: int  # R


class CellGradients(NamedTuple):
    """What `gradients.query_gradients` writes for the background."""

    query: Any  # Rows [N * L, H, d]
    weights: Any  # float32 [N, L, H], the sum of the weights of a level's empty cells


@triton.jit
def level_width(walk, level):
    """The window width of a level."""
    return 2 * tl.load(level_ptr(walk, level, RADIUS)) + 1


@triton.jit
def count_blocks(walk, level, CELLS: tl.constexpr):
    """The number of blocks of cells in a window of a level."""
    blocks_per_slice = tl.cdiv(level_width(walk, level), CELLS)
    return blocks_per_slice * tl.load(level_ptr(walk, level, N_SLICES))


@triton.jit
def locate_block(walk, level, block, CELLS: tl.constexpr):
    """A block of cells in the windows of a level; blocks do not cross the ends of slices.

    Returns:
        Which of the level's slices the block is in; its first cell, counted from the slice's
        beginning; the slots ``[CELLS]`` of its cells; which cells are valid, ``[CELLS]``.
    """
    width = level_width(walk, level)
    blocks_per_slice = tl.cdiv(width, CELLS)
    slice_index, first = block // blocks_per_slice, block % blocks_per_slice * CELLS
    cell = first + tl.arange(0, CELLS)  # [CELLS]
    slot = tl.load(level_ptr(walk, level, FIRST_SLOT)) + slice_index * width + cell  # [CELLS]
    return slice_index, first, slot, cell < width


@triton.jit
def empty_mask(
    walk, cells, row, row_active, level, slice_index, first, cell_valid,
    DIM: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Bool ``[ROWS, CELLS]``: which cells of the block at ``first`` of a slice are empty."""
    radius = tl.load(level_ptr(walk, level, RADIUS))
    first_slice = tl.load(level_ptr(walk, level, FIRST_SLICE))
    offset = row * cells.n_slices + first_slice + slice_index  # [ROWS]
    start = tl.maximum(tl.load(cells.starts + offset, mask=row_active, other=0), 0)  # [ROWS]
    stop = tl.load(cells.stops + offset, mask=row_active, other=0)  # [ROWS]
    stop = tl.minimum(stop, walk.n_items)
    center = load_cell(walk, row, level, DIM - 1, row_active, DIM)  # [ROWS]
    occupied = tl.zeros_like(start)  # [ROWS], a bit per cell
    for step in range(0, tl.max(stop - start, 0)):  # until the longest slice ends
        column = start + step  # [ROWS]
        valid = column < stop  # [ROWS]
        coordinate = tl.load(cells.point_columns + column, mask=valid, other=0)  # [ROWS]
        cell = coordinate - (center - radius + first)  # [ROWS], counted from the block's first
        in_block = valid & (cell >= 0) & (cell < CELLS)  # [ROWS]
        occupied |= tl.where(in_block, 1 << tl.where(in_block, cell, 0), 0)
    group = load_group(walk, row, level, row_active)  # [ROWS]
    empty = (occupied[:, None] >> tl.arange(0, CELLS)[None, :] & 1) == 0  # [ROWS, CELLS]
    return empty & (row_active & (group >= 0))[:, None] & cell_valid[None, :]


@triton.jit
def load_cell_values(
    walk, cells, row, row_active, level, head, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """``[ROWS, PADDED]``: for each query, the value of all empty cells of a level."""
    group = load_group(walk, row, level, row_active)  # [ROWS]
    valid = (group >= 0) & (group < walk.n_groups)  # [ROWS]
    return load_rows(cells.value, group, valid, head, WIDTH, PADDED)


@triton.jit
def attend_cells(
    walk, cells, dropout, row, row_valid, level, head, scale, row_max, row_sum, acc,
    DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Continues the streaming softmax of `attention.attend` over a level's empty cells.

    Args, in addition to those of `attention.attend`:
        row, row_valid: ``[ROWS]``.
        level, head: scalars.
        scale: of logits to base 2.
        row_max, row_sum: ``[ROWS]``.
        acc: ``[ROWS, VALUE_PADDED]``.

    Returns:
        The new ``row_max``, ``row_sum`` and ``acc``.
    """
    offset = row * LEVELS + level  # [ROWS]
    q = load_rows(cells.query, offset, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
    weight_sum = tl.zeros([ROWS], tl.float32)
    for block in range(0, count_blocks(walk, level, CELLS)):
        slice_index, first, slot, cell_valid = locate_block(
            walk, level, block, CELLS
        )  # scalar, scalar, [CELLS], [CELLS]
        empty = empty_mask(
            walk, cells, row, row_valid, level, slice_index, first, cell_valid, DIM, CELLS
        )  # [ROWS, CELLS]
        k = load_rows(cells.key, slot, cell_valid, head, WIDTH, PADDED)  # [CELLS, PADDED]
        logits = tl.where(
            empty, dot(q, tl.trans(k), PRECISION) * scale, -float("inf")
        )  # [ROWS, CELLS]
        weights, rescale, row_max, row_sum = softmax_step(
            logits, 1.0, row_max, row_sum
        )  # [ROWS, CELLS], then [ROWS] each
        if HAS_DROPOUT:
            column = walk.n_items - dropout.n_copies + slot  # [CELLS]
            weights *= dropout_factors(dropout, head, row[:, None], column[None, :])
        acc *= rescale[:, None]
        weight_sum = weight_sum * rescale + tl.sum(weights, 1)
    v = load_cell_values(
        walk, cells, row, row_valid, level, head, VALUE_WIDTH, VALUE_PADDED
    ).to(tl.float32)  # [ROWS, VALUE_PADDED]  # fmt: skip
    # Zero times a value that is not finite would be NaN.
    v = tl.where((weight_sum == 0.0)[:, None], 0.0, v)
    acc += tl.where(weight_sum == 0.0, 0.0, weight_sum)[:, None] * v
    return row_max, row_sum, acc


@triton.jit
def compute_grad_weight(
    walk, cells, grad_out, row, row_active, level, head,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
):  # fmt: skip
    """The gradient of the weights of a level's empty cells, ``[ROWS]``.

    It is one number for all of these cells, since they have the same value.
    """
    v = load_cell_values(
        walk, cells, row, row_active, level, head, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS, VALUE_PADDED]
    return tl.sum(grad_out.to(tl.float32) * v.to(tl.float32), 1)


@triton.jit
def cell_logit_gradients(
    walk, dropout, head, row, slot, empty, q, k, grad_weight, lse, delta, scale,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights of empty cells after dropout, and the gradients of their logits.

    Args:
        walk, dropout, head: as in `attention.attend`.
        row, grad_weight, lse, delta: ``[ROWS]``; the log-sum-exp is to base 2.
        slot: ``[CELLS]``.
        empty: ``[ROWS, CELLS]``.
        q, k: ``[ROWS, PADDED]`` and ``[CELLS, PADDED]``.
        scale: of logits to base 2.
        HAS_DROPOUT: whether ``dropout`` is given.
        PRECISION: see `dot`.

    Returns:
        Two blocks ``[ROWS, CELLS]``.
    """
    weights = tl.exp2(dot(q, tl.trans(k), PRECISION) * scale - lse[:, None])  # [ROWS, CELLS]
    weights = tl.where(empty, weights, 0.0)
    grad_weights = grad_weight[:, None]  # [ROWS, 1], [ROWS, CELLS] with dropout
    dropped_weights = weights  # [ROWS, CELLS]
    if HAS_DROPOUT:
        column = walk.n_items - dropout.n_copies + slot  # [CELLS]
        dropout_factor = dropout_factors(
            dropout, head, row[:, None], column[None, :]
        )  # [ROWS, CELLS]
        grad_weights = grad_weights * dropout_factor
        dropped_weights = weights * dropout_factor
    return dropped_weights, tl.where(empty, weights * (grad_weights - delta[:, None]), 0.0)


@triton.jit
def query_gradients_of_cells(
    walk, cells, dropout, gradients, row, row_valid, row_active, level, head, scale,
    grad_out, lse, delta,
    DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The gradient of the background's query at a level, and the weights of its empty cells.

    Args, in addition to those of `gradients.query_gradients`:
        gradients: the `CellGradients` to write.
        row, row_valid, row_active, lse, delta: ``[ROWS]``; the log-sum-exp is to base 2.
        level, head: scalars.
        grad_out: ``[ROWS, VALUE_PADDED]``.
    """
    offset = row * LEVELS + level  # [ROWS]
    q = load_rows(cells.query, offset, row_active, head, WIDTH, PADDED)  # [ROWS, PADDED]
    grad_weight = compute_grad_weight(
        walk, cells, grad_out, row, row_active, level, head, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS]
    grad_q = tl.zeros([ROWS, PADDED], tl.float32)
    weight_sum = tl.zeros([ROWS], tl.float32)
    for block in range(0, count_blocks(walk, level, CELLS)):
        slice_index, first, slot, cell_valid = locate_block(
            walk, level, block, CELLS
        )  # scalar, scalar, [CELLS], [CELLS]
        empty = empty_mask(
            walk, cells, row, row_active, level, slice_index, first, cell_valid, DIM, CELLS
        )  # [ROWS, CELLS]
        k = load_rows(cells.key, slot, cell_valid, head, WIDTH, PADDED)  # [CELLS, PADDED]
        dropped_weights, grad_logits = cell_logit_gradients(
            walk, dropout, head, row, slot, empty, q, k, grad_weight, lse, delta,
            scale * LOG2_E, HAS_DROPOUT, PRECISION,
        )  # [ROWS, CELLS] each  # fmt: skip
        weight_sum += tl.sum(dropped_weights, 1)
        grad_q += dot(grad_logits.to(k.dtype), finite_or_zero(k), PRECISION)
    store_rows(gradients.query, offset, row_valid, head, grad_q * scale, WIDTH, PADDED)
    tl.store(gradients.weights + offset * walk.n_heads + head, weight_sum, mask=row_valid)


@triton.jit(do_not_specialize=(*SIZES, "n_parts", "n_slots"))
def cell_key_gradients(tiles, levels, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups,
                       n_heads, row_mask, cells, dropout, stats_ptr, grad_out_rows,
                       partial_rows, scale, n_parts, n_slots,
                       DIM: tl.constexpr, LEVELS: tl.constexpr,
                       WIDTH: tl.constexpr, PADDED: tl.constexpr,
                       VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                       HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                       ROWS: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """The gradient of the background's keys, in ``n_parts`` sums.

    A program takes a block of cells and a head, and every ``n_parts``-th tile of queries.

    Args, in addition to those of `gradients.query_gradients`:
        partial_rows: Rows ``[n_parts * K, H, d]``, the result.
        n_parts: the number of sums.
        n_slots: K.
    """
    walk = Walk(
        tiles, levels, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )
    program = tl.program_id(0)
    head, part = program % n_heads, program // n_heads % n_parts
    # Blocks are numbered through all levels.
    block = program // (n_heads * n_parts)
    level = 0
    while block >= count_blocks(walk, level, CELLS):
        block -= count_blocks(walk, level, CELLS)
        level += 1
    slice_index, first, slot, cell_valid = locate_block(
        walk, level, block, CELLS
    )  # scalar, scalar, [CELLS], [CELLS]
    grad_k = tl.zeros([CELLS, PADDED], tl.float32)
    k = load_rows(cells.key, slot, cell_valid, head, WIDTH, PADDED)  # [CELLS, PADDED]
    for tile in range(part, tl.cdiv(n_rows, ROWS), n_parts):
        row, row_valid = load_tile_rows(walk, tile, ROWS)  # [ROWS] each
        lse, delta = load_stats(stats_ptr, row, row_valid, head, n_rows)  # [ROWS] each
        row_active = row_valid & (lse != float("inf"))  # [ROWS]
        empty = empty_mask(
            walk, cells, row, row_active, level, slice_index, first, cell_valid, DIM, CELLS
        )  # [ROWS, CELLS]
        offset = row * LEVELS + level  # [ROWS]
        q = load_rows(cells.query, offset, row_active, head, WIDTH, PADDED)  # [ROWS, PADDED]
        grad_out = load_rows(
            grad_out_rows, row, row_active, head, VALUE_WIDTH, VALUE_PADDED
        )  # [ROWS, VALUE_PADDED]
        grad_weight = compute_grad_weight(
            walk, cells, grad_out, row, row_active, level, head, VALUE_WIDTH, VALUE_PADDED
        )  # [ROWS]
        _, grad_logits = cell_logit_gradients(
            walk, dropout, head, row, slot, empty, q, k, grad_weight, lse, delta,
            scale * LOG2_E, HAS_DROPOUT, PRECISION,
        )  # [ROWS, CELLS] each  # fmt: skip
        grad_k += dot(tl.trans(grad_logits).to(q.dtype), finite_or_zero(q), PRECISION)
    store_rows(partial_rows, part * n_slots + slot, cell_valid, head, grad_k * scale, WIDTH, PADDED)


@triton.jit(do_not_specialize=("n_parts",))
def cell_value_gradients(traversal_ptr, bounds_ptr, weights_ptr, grad_out_rows, partial_rows,
                         n_levels, n_heads, n_parts,
                         WIDTH: tl.constexpr, PADDED: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of the background's values, in ``n_parts`` sums.

    A program takes an image, a level and a head, and every ``n_parts``-th block of the image's
    queries.

    Args:
        traversal_ptr: int32 ``[N]``, the queries, image by image.
        bounds_ptr: int64 ``[B + 1]``, where each image's queries begin in the traversal.
        weights_ptr: float32 ``[N, L, H]``, see `CellGradients`.
        grad_out_rows: Rows ``[N, H, dv]``.
        partial_rows: Rows ``[B * L * n_parts, H, dv]``, the result.
        n_levels, n_heads, n_parts: L, H and the number of sums.
        WIDTH, PADDED: dv, and a power of two that is no less.
        BLOCK: queries of a block.
    """
    program = tl.program_id(0)
    head, part = program % n_heads, program // n_heads % n_parts
    group = program // (n_heads * n_parts)
    image, level = group // n_levels, group % n_levels
    stop = tl.load(bounds_ptr + image + 1)
    grad_v = tl.zeros([PADDED], tl.float32)
    for first in range(tl.load(bounds_ptr + image) + part * BLOCK, stop, n_parts * BLOCK):
        offset = first + tl.arange(0, BLOCK)  # [BLOCK]
        valid = offset < stop  # [BLOCK]
        row = tl.load(traversal_ptr + offset, mask=valid, other=0).to(tl.int64)  # [BLOCK]
        weight_offset = (row * n_levels + level) * n_heads + head  # [BLOCK]
        weight_sum = tl.load(weights_ptr + weight_offset, mask=valid, other=0.0)  # [BLOCK]
        grad_out = load_rows(
            grad_out_rows, row, weight_sum != 0.0, head, WIDTH, PADDED
        ).to(tl.float32)  # [BLOCK, PADDED]  # fmt: skip
        grad_v += tl.sum(weight_sum[:, None] * grad_out, 0)
    index = tl.full([1], 0, tl.int64) + group * n_parts + part  # [1]
    store_rows(partial_rows, index, index >= 0, head, grad_v[None, :], WIDTH, PADDED)
