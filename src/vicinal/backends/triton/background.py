"""Empty cells in Triton: what a background adds to attention over tiles.

A slice of points covers a row of a window, cells along the last axis. Those that hold none of these
points are empty. Kernels process a row in blocks of `CELLS` cells and keep a word of occupancy bits
per query. The logits of empty cells are products of the background's
query and its keys. All empty cells of a level have the same value, so their weights are summed
first and multiplied with it once.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bias import (
    load_bias,
)
from .parts import (
    LOG2_E,
    cell_columns,
    dot,
    dropout_factors,
    dropout_ids,
    finite_or_zero,
    load_rows,
    load_stats,
    softmax_step,
    store_rows,
)
from .tile_walk import (
    SIZES,
    Walk,
    load_cell,
    load_group,
    load_slices,
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
    n_slots: int  # K


class CellGradients(NamedTuple):
    """What `gradients.query_gradients` writes for the background."""

    query: Any  # Rows [N * L, H, d]
    weights: Any  # float32 [N, L, H], the sum of the weights of a level's empty cells


class CellKeyGradients(NamedTuple):
    """What `cell_key_gradients` writes: sums of parts of the queries."""

    key: Any  # Rows [n_parts * K, H, d]
    bias: Any  # float32 [n_parts, K, H], or None without a bias


@triton.jit
def load_window_row(walk, cells, window_row):
    """A row of the windows: its first cell, from that of the window, how many cells it has, and the
    slot of the first.
    """
    row_ptr = walk.windows.rows + 3 * window_row
    return tl.load(row_ptr), tl.minimum(tl.load(row_ptr + 1), cells.n_slots), tl.load(row_ptr + 2)


@triton.jit
def locate_block(cells, first, width, first_slot, CELLS: tl.constexpr):
    """The slots ``[CELLS]`` of a block of cells from ``first`` on in a row of the windows, and
    which of them are valid, bool ``[CELLS]``; the others are those of `load_window_row`.
    """
    cell = first + tl.arange(0, CELLS)  # [CELLS]
    slot = first_slot + cell  # [CELLS]
    return slot, (cell < width) & (slot >= 0) & (slot < cells.n_slots)


@triton.jit
def empty_mask(
    walk, cells, row, row_active, level, window_row, first, cell_valid,
    DIM: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Bool ``[ROWS, CELLS]``: which cells of a block of a row of the windows are empty; ``first``
    is the block's first cell, from that of the window.
    """
    offset = row * cells.n_slices + window_row  # [ROWS]
    start = tl.maximum(tl.load(cells.starts + offset, mask=row_active, other=0), 0)  # [ROWS]
    stop = tl.load(cells.stops + offset, mask=row_active, other=0)  # [ROWS]
    stop = tl.minimum(stop, walk.n_items)
    first_cell = load_cell(walk, row, level, DIM - 1, row_active, DIM) + first  # [ROWS]
    occupied = tl.zeros_like(start)  # [ROWS], a bit per cell
    for step in range(0, tl.max(stop - start, 0)):  # until the longest slice ends
        column = start + step  # [ROWS]
        valid = column < stop  # [ROWS]
        coordinate = tl.load(cells.point_columns + column, mask=valid, other=0)  # [ROWS]
        cell = coordinate - first_cell  # [ROWS], counted from the block's first
        in_block = valid & (cell >= 0) & (cell < CELLS)  # [ROWS]
        occupied |= tl.where(in_block, 1 << tl.where(in_block, cell, 0), 0)
    group = load_group(walk, row, level, row_active)  # [ROWS]
    empty = (occupied[:, None] >> tl.arange(0, CELLS)[None, :] & 1) == 0  # [ROWS, CELLS]
    return empty & (row_active & (group >= 0))[:, None] & cell_valid[None, :]


@triton.jit
def cell_logits(
    walk, bias, q, k, slot, head, scale, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr
):
    """The logits of empty cells to base 2, ``[ROWS, CELLS]``, from ``scale`` to that base."""
    logits = dot(q, tl.trans(k), PRECISION) * scale  # [ROWS, CELLS]
    if HAS_BIAS:
        cell_bias = load_bias(walk, bias, slot, head)  # [CELLS]
        logits += LOG2_E * cell_bias[None, :]
    return logits


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
    walk, cells, dropout, bias, row, row_valid, level, head, scale, row_max, row_sum, acc,
    DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
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
    n_rows, first_row = load_slices(walk, level)
    for window_row in range(first_row, first_row + n_rows):
        start, width, first_slot = load_window_row(walk, cells, window_row)
        for first in range(0, width, CELLS):
            slot, cell_valid = locate_block(cells, first, width, first_slot, CELLS)  # [CELLS] each
            empty = empty_mask(
                walk, cells, row, row_valid, level, window_row, start + first, cell_valid,
                DIM, CELLS,
            )  # [ROWS, CELLS]  # fmt: skip
            k = load_rows(cells.key, slot, cell_valid, head, WIDTH, PADDED)  # [CELLS, PADDED]
            logits = cell_logits(walk, bias, q, k, slot, head, scale, HAS_BIAS, PRECISION)
            weights, rescale, row_max, row_sum = softmax_step(
                tl.where(empty, logits, -float("inf")), 1.0, row_max, row_sum
            )  # [ROWS, CELLS], then [ROWS] each
            if HAS_DROPOUT:
                query = dropout_ids(dropout.query_ids, row, walk.n_rows)  # [ROWS]
                column = cell_columns(dropout, slot, walk.n_items)  # [CELLS]
                weights *= dropout_factors(dropout, head, query[:, None], column[None, :])
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
    walk, dropout, bias, head, row, slot, empty, q, k, grad_weight, lse, delta, scale,
    HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights of empty cells after dropout, and the gradients of their logits.

    Args:
        walk, dropout, bias, head: as in `attention.attend`.
        row, grad_weight, lse, delta: ``[ROWS]``; the log-sum-exp is to base 2.
        slot: ``[CELLS]``.
        empty: ``[ROWS, CELLS]``.
        q, k: ``[ROWS, PADDED]`` and ``[CELLS, PADDED]``.
        scale: of logits to base 2.
        HAS_DROPOUT, HAS_BIAS: whether ``dropout`` and ``bias`` are given.
        PRECISION: see `dot`.

    Returns:
        Two blocks ``[ROWS, CELLS]``.
    """
    logits = cell_logits(walk, bias, q, k, slot, head, scale, HAS_BIAS, PRECISION)
    weights = tl.exp2(logits - lse[:, None])  # [ROWS, CELLS]
    weights = tl.where(empty, weights, 0.0)
    grad_weights = grad_weight[:, None]  # [ROWS, 1], [ROWS, CELLS] with dropout
    dropped_weights = weights  # [ROWS, CELLS]
    if HAS_DROPOUT:
        query = dropout_ids(dropout.query_ids, row, walk.n_rows)  # [ROWS]
        column = cell_columns(dropout, slot, walk.n_items)  # [CELLS]
        dropout_factor = dropout_factors(
            dropout, head, query[:, None], column[None, :]
        )  # [ROWS, CELLS]
        grad_weights = grad_weights * dropout_factor
        dropped_weights = weights * dropout_factor
    return dropped_weights, tl.where(empty, weights * (grad_weights - delta[:, None]), 0.0)


@triton.jit
def query_gradients_of_cells(
    walk, cells, dropout, bias, gradients, row, row_valid, row_active, level, head, scale,
    grad_out, lse, delta,
    DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
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
    n_rows, first_row = load_slices(walk, level)
    for window_row in range(first_row, first_row + n_rows):
        start, width, first_slot = load_window_row(walk, cells, window_row)
        for first in range(0, width, CELLS):
            slot, cell_valid = locate_block(cells, first, width, first_slot, CELLS)  # [CELLS] each
            empty = empty_mask(
                walk, cells, row, row_active, level, window_row, start + first, cell_valid,
                DIM, CELLS,
            )  # [ROWS, CELLS]  # fmt: skip
            k = load_rows(cells.key, slot, cell_valid, head, WIDTH, PADDED)  # [CELLS, PADDED]
            dropped_weights, grad_logits = cell_logit_gradients(
                walk, dropout, bias, head, row, slot, empty, q, k, grad_weight, lse, delta,
                scale * LOG2_E, HAS_DROPOUT, HAS_BIAS, PRECISION,
            )  # [ROWS, CELLS] each  # fmt: skip
            weight_sum += tl.sum(dropped_weights, 1)
            grad_q += dot(grad_logits.to(k.dtype), finite_or_zero(k), PRECISION)
    store_rows(gradients.query, offset, row_valid, head, grad_q * scale, WIDTH, PADDED)
    tl.store(gradients.weights + offset * walk.n_heads + head, weight_sum, mask=row_valid)


@triton.jit
def cell_key_gradients_block(
    walk, cells, dropout, bias, stats_ptr, grad_out_rows, gradients, scale, part, n_parts, head,
    level, window_row, start, first, slot, cell_valid,
    DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """What `cell_key_gradients` writes for one block of cells, see `locate_block`."""
    grad_k = tl.zeros([CELLS, PADDED], tl.float32)
    grad_bias = tl.zeros([CELLS], tl.float32)
    k = load_rows(cells.key, slot, cell_valid, head, WIDTH, PADDED)  # [CELLS, PADDED]
    for tile in range(part, tl.cdiv(walk.n_rows, ROWS), n_parts):
        row, row_valid = load_tile_rows(walk, tile, ROWS)  # [ROWS] each
        lse, delta = load_stats(stats_ptr, row, row_valid, head, walk.n_rows)  # [ROWS] each
        row_active = row_valid & (lse != float("inf"))  # [ROWS]
        empty = empty_mask(
            walk, cells, row, row_active, level, window_row, start + first, cell_valid, DIM, CELLS
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
            walk, dropout, bias, head, row, slot, empty, q, k, grad_weight, lse, delta,
            scale * LOG2_E, HAS_DROPOUT, HAS_BIAS, PRECISION,
        )  # [ROWS, CELLS] each  # fmt: skip
        grad_k += dot(tl.trans(grad_logits).to(q.dtype), finite_or_zero(q), PRECISION)
        if HAS_BIAS:
            grad_bias += tl.sum(grad_logits, 0)
    index = part.to(tl.int64) * cells.n_slots + slot  # [CELLS]
    store_rows(gradients.key, index, cell_valid, head, grad_k * scale, WIDTH, PADDED)
    if HAS_BIAS:
        tl.store(gradients.bias + index * walk.n_heads + head, grad_bias, mask=cell_valid)


@triton.jit(do_not_specialize=(*SIZES, "n_parts"))
def cell_key_gradients(tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups,
                       n_heads, row_mask, cells, dropout, bias, stats_ptr, grad_out_rows,
                       gradients, scale, n_parts,
                       DIM: tl.constexpr, LEVELS: tl.constexpr,
                       WIDTH: tl.constexpr, PADDED: tl.constexpr,
                       VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                       HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                       PRECISION: tl.constexpr,
                       ROWS: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """The gradients of the background's keys, and of the bias of empty cells, in ``n_parts`` sums.

    A program takes a row of the windows and a head, and every ``n_parts``-th tile of queries.

    Args, in addition to those of `gradients.query_gradients`:
        gradients: the `CellKeyGradients`.
        n_parts: the number of sums.
    """
    walk = Walk(
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )
    program = tl.program_id(0)
    head, part = program % n_heads, program // n_heads % n_parts
    window_row = program // (n_heads * n_parts)
    level = 0
    for other in tl.static_range(1, LEVELS):
        _, first_row = load_slices(walk, other)
        level = tl.where(window_row >= first_row, other, level)
    start, width, first_slot = load_window_row(walk, cells, window_row)
    for first in range(0, width, CELLS):
        slot, cell_valid = locate_block(cells, first, width, first_slot, CELLS)  # [CELLS] each
        cell_key_gradients_block(
            walk, cells, dropout, bias, stats_ptr, grad_out_rows, gradients, scale, part, n_parts,
            head, level, window_row, start, first, slot, cell_valid,
            DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
            ROWS, CELLS,
        )  # fmt: skip


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
        weights_ptr: ``[N, L, H]``, see `CellGradients`; sums are in its dtype.
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
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    grad_v = tl.zeros([PADDED], dtype)
    for first in range(tl.load(bounds_ptr + image) + part * BLOCK, stop, n_parts * BLOCK):
        offset = first + tl.arange(0, BLOCK)  # [BLOCK]
        valid = offset < stop  # [BLOCK]
        row = tl.load(traversal_ptr + offset, mask=valid, other=0).to(tl.int64)  # [BLOCK]
        weight_offset = (row * n_levels + level) * n_heads + head  # [BLOCK]
        weight_sum = tl.load(weights_ptr + weight_offset, mask=valid, other=0.0)  # [BLOCK]
        grad_out = load_rows(
            grad_out_rows, row, weight_sum != 0.0, head, WIDTH, PADDED
        ).to(dtype)  # [BLOCK, PADDED]  # fmt: skip
        grad_v += tl.sum(weight_sum[:, None] * grad_out, 0)
    index = tl.full([1], 0, tl.int64) + group * n_parts + part  # [1]
    store_rows(partial_rows, index, index >= 0, head, grad_v[None, :], WIDTH, PADDED)
