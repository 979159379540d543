"""Attention over tiles in Triton: the forward pass.

A program takes one tile and one head, and goes through the tile's list a block at a time. The
softmax is streamed (Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with
IO-Awareness", 2022), and names follow FlashAttention-2.

Products also cover the masked pairs of a block, with weight zero. Zero times infinity would be
NaN, in rows that have nothing to do with the infinity. So a result that is not finite is computed a
second time, *carefully*: in products of weights, numbers that are not finite are replaced by zero,
and NaN reaches the rows it belongs to in another way. The careful loop takes columns from the
tile's runs, so it serves tiles without a list as well.
"""

import triton
import triton.language as tl

from .background import (
    attend_cells,
)
from .bias import (
    load_pair_bias,
)
from .parts import (
    LOG2_E,
    all_finite,
    dot,
    dropout_factors,
    dropout_ids,
    finite_flag,
    load_points,
    load_rows,
    softmax_step,
    store_rows,
)
from .tile_walk import (
    SEARCH_BLOCK,
    SIZES,
    Walk,
    load_list,
    load_listed,
    load_runs,
    member_bits,
    member_mask,
    program_tile,
    search_columns,
)

# The smallest normal number, in place of a smaller scale: zero times -inf is NaN.
SMALLEST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def attend_block(walk, dropout, bias, q, k, v, flag, row, item, pair_mask, head, scale,
                 row_max, row_sum, acc, LEVELS: tl.constexpr,
                 HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                 PRECISION: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """One block of the forward pass.

    Args:
        walk, dropout, bias, head: as in `attend`.
        q, k, v: ``[ROWS, PADDED]``, ``[BLOCK, PADDED]`` and ``[BLOCK, VALUE_PADDED]``.
        flag: ``[BLOCK]``, see `load_points`, or any number.
        row, item, pair_mask: ``[ROWS]``, ``[BLOCK]`` and ``[ROWS, BLOCK]``.
        scale, row_max, row_sum: see `softmax_step`; with a bias, the maximum is scaled.
        acc: ``[ROWS, VALUE_PADDED]``, sums of weighted values.
        LEVELS: number of levels.
        HAS_DROPOUT, HAS_BIAS: whether ``dropout`` and ``bias`` are given.
        PRECISION: see `dot`.
        CAREFUL: whether ``flag`` is given.

    Returns:
        The new ``row_max``, ``row_sum`` and ``acc``.
    """
    logits = dot(q, tl.trans(k), PRECISION)  # [ROWS, BLOCK]
    logits += logits * 0.0  # NaN instead of infinity
    if CAREFUL:
        logits += flag[None, :]
    if HAS_BIAS:
        logits = logits * scale + LOG2_E * load_pair_bias(
            walk, bias, row, item, pair_mask, head, LEVELS, True
        )
        scale = 1.0
    logits = tl.where(pair_mask, logits, -float("inf"))
    weights, rescale, row_max, row_sum = softmax_step(
        logits, scale, row_max, row_sum
    )  # [ROWS, BLOCK], then [ROWS] each
    if HAS_DROPOUT:
        query = dropout_ids(dropout.query_ids, row, walk.n_rows)  # [ROWS]
        column = dropout_ids(dropout.column_ids, item, walk.n_items)  # [BLOCK]
        weights *= dropout_factors(dropout, head, query[:, None], column[None, :])
    return row_max, row_sum, acc * rescale[:, None] + dot(weights.to(v.dtype), v, PRECISION)


@triton.jit
def attend_list(walk, dropout, bias, q, k_rows, v_rows, row, bit, head, scale, start, n_entries,
                LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
                ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``row_max``, ``row_sum`` and ``acc`` of `attend`, from the tile's list."""
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    # Dropout leaves registers for fewer blocks under way.
    stages: tl.constexpr = 1 if CAREFUL else 2 if HAS_DROPOUT else 3
    for first in tl.range(0, n_entries, BLOCK, num_stages=stages):
        point, members = load_listed(walk, start + first + tl.arange(0, BLOCK))  # [BLOCK] each
        k, v, flag = load_points(
            k_rows, v_rows, point, point >= 0, head,
            WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, CAREFUL,
        )  # [BLOCK, PADDED], [BLOCK, VALUE_PADDED], [BLOCK]  # fmt: skip
        row_max, row_sum, acc = attend_block(
            walk, dropout, bias, q, k, v, flag, row, point, member_mask(bit, members), head, scale,
            row_max, row_sum, acc, LEVELS, HAS_DROPOUT, HAS_BIAS, PRECISION, CAREFUL,
        )  # fmt: skip
    return row_max, row_sum, acc


@triton.jit
def attend_runs(walk, dropout, bias, q, k_rows, v_rows, tile, row, row_valid, head, scale,
                DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                WIDTH: tl.constexpr, PADDED: tl.constexpr,
                VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                PRECISION: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):  # fmt: skip
    """The same from the tile's runs."""
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    for level in range(LEVELS):
        runs = load_runs(walk, tile, level, TILE_ROWS, LEVELS)
        for first in tl.range(0, runs[2], SEARCH_BLOCK, num_stages=1):
            point, valid, pair_mask = search_columns(
                walk, row, row_valid, level, first, runs, DIM, LEVELS, BALL_ROWS, True
            )  # [SEARCH_BLOCK], [SEARCH_BLOCK], [ROWS, SEARCH_BLOCK]
            k, v, flag = load_points(
                k_rows, v_rows, point, valid, head,
                WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, True,
            )  # [SEARCH_BLOCK, PADDED], [SEARCH_BLOCK, VALUE_PADDED], [SEARCH_BLOCK]  # fmt: skip
            row_max, row_sum, acc = attend_block(
                walk, dropout, bias, q, k, v, flag, row, point, pair_mask, head, scale,
                row_max, row_sum, acc, LEVELS, HAS_DROPOUT, HAS_BIAS, PRECISION, True,
            )  # fmt: skip
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=SIZES)
def attend(tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads,
           row_mask, cells, dropout, bias, q_rows, k_rows, v_rows, out_rows, lse_ptr, scale,
           DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
           WIDTH: tl.constexpr, PADDED: tl.constexpr,
           VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
           HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
           HAS_BACKGROUND: tl.constexpr,
           ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr,
           LIST_BLOCK: tl.constexpr):  # fmt: skip
    """The forward pass; rows are queries, columns points.

    Args:
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask:
            see `Walk`.
        cells: the `EmptyCells`, or None.
        dropout: the `Dropout`, or None.
        bias: the `Bias`, or None.
        q_rows, k_rows, v_rows: Rows ``[N, H, d]``, ``[nnz, H, d]`` and ``[nnz, H, dv]``.
        out_rows: Rows ``[N, H, dv]``, the result.
        lse_ptr: float32 ``[N, H]``, the log-sum-exp, a result as well.
        scale: of the logits; if it is negative, ``q_rows`` has the opposite of the queries.
        DIM, LEVELS, BALL_ROWS: see `window_mask`.
        WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED: see `launch.widths`.
        HAS_DROPOUT, HAS_BIAS, HAS_BACKGROUND: whether ``dropout``, ``bias``, ``cells`` are given.
        PRECISION: see `dot`.
        ROWS, TILE_ROWS: rows of a program, and of a tile, of which it takes all or a part.
        BLOCK, CELLS: points and cells of a block.
        LIST_BLOCK: entries of a block of a list, a multiple of ``BLOCK``.
    """
    walk = Walk(
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )
    tile, head, first_row, row, row_valid = program_tile(walk, ROWS, TILE_ROWS)
    q = load_rows(q_rows, row, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
    is_small = tl.abs(scale) < SMALLEST_SCALE  # not the maximum, which would lose NaN
    positive_scale = tl.where(is_small, SMALLEST_SCALE, tl.abs(scale)) * LOG2_E
    bit = member_bits(walk, first_row, row, row_valid, ROWS)  # [ROWS]
    start, n_entries = load_list(walk, tile, LIST_BLOCK)
    if n_entries >= 0:
        row_max, row_sum, acc = attend_list(
            walk, dropout, bias, q, k_rows, v_rows, row, bit, head, positive_scale,
            start, n_entries,
            LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
            False, ROWS, BLOCK,
        )  # [ROWS], [ROWS], [ROWS, VALUE_PADDED]  # fmt: skip
        if not all_finite(finite_flag(acc)):
            row_max, row_sum, acc = attend_list(
                walk, dropout, bias, q, k_rows, v_rows, row, bit, head, positive_scale,
                start, n_entries,
                LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
                True, ROWS, BLOCK,
            )  # fmt: skip
    else:
        row_max, row_sum, acc = attend_runs(
            walk, dropout, bias, q, k_rows, v_rows, tile, row, row_valid, head, positive_scale,
            DIM, LEVELS, BALL_ROWS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS,
            PRECISION, ROWS, TILE_ROWS,
        )  # fmt: skip
    if not HAS_BIAS:
        row_max *= positive_scale
    if HAS_BACKGROUND:
        for level in range(LEVELS):
            row_max, row_sum, acc = attend_cells(
                walk, cells, dropout, bias, row, row_valid, level, head, scale * LOG2_E,
                row_max, row_sum, acc,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS,
                PRECISION, ROWS, CELLS,
            )  # fmt: skip
    # A sum of zero means that all pairs are masked. A sum that is NaN stays NaN.
    acc = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)[:, None] * acc
    store_rows(out_rows, row, row_valid, head, acc, VALUE_WIDTH, VALUE_PADDED)
    nonzero_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # [ROWS]
    lse = (row_max + tl.log2(nonzero_sum)) / LOG2_E  # [ROWS]
    lse = tl.where(row_sum == 0.0, -float("inf"), lse)
    tl.store(lse_ptr + row * n_heads + head, lse, mask=row_valid)
