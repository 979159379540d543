"""Attention over tiles in Triton: two backward passes, without atomics.

The gradient of q comes from a second pass of query tiles over points, those of k and v from a pass
of point tiles over queries. Like the forward pass, they go through lists, and compute a result that
is not finite a second time, carefully; see `attention`.
"""

import triton
import triton.language as tl

from .background import (
    query_gradients_of_cells,
)
from .bias import (
    load_pair_bias,
)
from .parts import (
    LOG2_E,
    all_finite,
    block_and_head,
    dot,
    dropout_factors,
    dropout_ids,
    finite_flag,
    load_all_rows,
    load_points,
    load_rows,
    load_stats,
    stats_ptrs,
    store_rows,
    store_stats,
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


@triton.jit
def compute_delta(grad_out, out_rows, grad_lse_rows, row, row_valid, head,
                  VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr):  # fmt: skip
    """``delta = rowsum(grad_out * out) - grad_lse``, ``[ROWS]``; see `query_gradients`."""
    out = load_rows(
        out_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS, VALUE_PADDED]
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)  # [ROWS]
    grad_lse = load_rows(grad_lse_rows, row, row_valid, head, 1, 1)  # [ROWS, 1]
    return delta - tl.sum(grad_lse, 1)


@triton.jit(do_not_specialize=("n_queries", "n_heads"))
def find_stats(out_rows, grad_out_rows, lse_ptr, grad_lse_rows, stats_ptr, n_queries, n_heads,
                VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """The statistics alone, for backward passes that need no gradient of q.

    Args:
        out_rows, grad_out_rows: Rows ``[N, H, dv]``.
        lse_ptr: float32 ``[N, H]``.
        grad_lse_rows: Rows ``[N, H, 1]``, float32.
        stats_ptr: float32 ``[H, N, 2]``, the result, see `stats_ptrs`.
        n_queries, n_heads: N and H.
        VALUE_WIDTH, VALUE_PADDED: see `launch.widths`.
        BLOCK: queries of a program.
    """
    row, valid, head = block_and_head(n_queries, n_heads, BLOCK)  # [BLOCK], [BLOCK], scalar
    grad_out = load_rows(
        grad_out_rows, row, valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [BLOCK, VALUE_PADDED]
    delta = compute_delta(
        grad_out, out_rows, grad_lse_rows, row, valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [BLOCK]
    lse = tl.load(lse_ptr + row * n_heads + head, mask=valid, other=-float("inf"))  # [BLOCK]
    store_stats(stats_ptr, row, valid, head, n_queries, lse, delta)


@triton.jit
def logit_gradients(walk, dropout, bias, q, k, v, grad_out, row, item, pair_mask, head, scale,
                    lse, delta, LEVELS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
                    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
                    CAREFUL: tl.constexpr):  # fmt: skip
    """The gradients of the scaled logits of one block, ``[ROWS, BLOCK]``; rows are queries.

    Args, in addition to those of `attend_block`:
        grad_out: ``[ROWS, VALUE_PADDED]``.
        lse, delta: ``[ROWS]``; the log-sum-exp is to base 2.
        CAREFUL: whether something may not be finite; else pairs that are masked get zero anyway.
    """
    logits = dot(q, tl.trans(k), PRECISION) * scale  # [ROWS, BLOCK]
    if HAS_BIAS:
        logits += LOG2_E * load_pair_bias(
            walk, bias, row, item, pair_mask, head, LEVELS, True
        )  # [ROWS, BLOCK]
    # A row with a neighbor that is not finite has NaN as its log-sum-exp.
    weights = tl.exp2(logits - lse[:, None])  # [ROWS, BLOCK]
    weights = tl.where(pair_mask, weights, 0.0)
    grad_weights = dot(grad_out, tl.trans(v), PRECISION)  # [ROWS, BLOCK]
    if HAS_DROPOUT:
        query = dropout_ids(dropout.query_ids, row, walk.n_rows)  # [ROWS]
        column = dropout_ids(dropout.column_ids, item, walk.n_items)  # [BLOCK]
        grad_weights *= dropout_factors(dropout, head, query[:, None], column[None, :])
    grad_logits = weights * (grad_weights - delta[:, None])  # [ROWS, BLOCK]
    if CAREFUL:  # zero times a number that is not finite
        grad_logits = tl.where(pair_mask, grad_logits, 0.0)
    return grad_logits


@triton.jit
def query_gradients_block(walk, dropout, bias, q, k, v, grad_out, row, item, pair_mask, head, scale,
                          lse, delta, grad_q, LEVELS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
                          HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
                          CAREFUL: tl.constexpr):  # fmt: skip
    """Adds one block to ``grad_q`` ``[ROWS, PADDED]``, which is not scaled yet."""
    grad_logits = logit_gradients(
        walk, dropout, bias, q, k, v, grad_out, row, item, pair_mask, head, scale, lse, delta,
        LEVELS, HAS_DROPOUT, HAS_BIAS, PRECISION, CAREFUL,
    )  # [ROWS, BLOCK]  # fmt: skip
    return grad_q + dot(grad_logits.to(k.dtype), k, PRECISION)


@triton.jit
def query_gradients_list(walk, dropout, bias, q, k_rows, v_rows, grad_out, row, bit, head, scale,
                         lse, delta, start, n_entries,
                         LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                         VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                         HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                         PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``grad_q`` of `query_gradients`, not scaled yet, from the tile's list."""
    grad_q = tl.zeros([ROWS, PADDED], tl.float32)
    # Dropout leaves registers for fewer blocks under way.
    stages: tl.constexpr = 1 if CAREFUL else 2 if HAS_DROPOUT else 3
    for first in tl.range(0, n_entries, BLOCK, num_stages=stages):
        point, members = load_listed(walk, start + first + tl.arange(0, BLOCK))  # [BLOCK] each
        k, v, _ = load_points(
            k_rows, v_rows, point, point >= 0, head,
            WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, CAREFUL,
        )  # [BLOCK, PADDED], [BLOCK, VALUE_PADDED]  # fmt: skip
        grad_q = query_gradients_block(
            walk, dropout, bias, q, k, v, grad_out, row, point, member_mask(bit, members), head,
            scale, lse, delta, grad_q, LEVELS, HAS_DROPOUT, HAS_BIAS, PRECISION, CAREFUL,
        )  # fmt: skip
    return grad_q


@triton.jit
def query_gradients_runs(walk, dropout, bias, q, k_rows, v_rows, grad_out, tile, row, row_active,
                         head, scale, lse, delta,
                         DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                         WIDTH: tl.constexpr, PADDED: tl.constexpr,
                         VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                         HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                         PRECISION: tl.constexpr,
                         ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):  # fmt: skip
    """The same from the tile's runs."""
    grad_q = tl.zeros([ROWS, PADDED], tl.float32)
    for level in range(LEVELS):
        runs = load_runs(walk, tile, level, TILE_ROWS, LEVELS)
        for first in tl.range(0, runs[2], SEARCH_BLOCK, num_stages=1):
            point, valid, pair_mask = search_columns(
                walk, row, row_active, level, first, runs, DIM, LEVELS, BALL_ROWS, True
            )  # [SEARCH_BLOCK], [SEARCH_BLOCK], [ROWS, SEARCH_BLOCK]
            k, v, _ = load_points(
                k_rows, v_rows, point, valid, head,
                WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, True,
            )  # [SEARCH_BLOCK, PADDED], [SEARCH_BLOCK, VALUE_PADDED]  # fmt: skip
            grad_q = query_gradients_block(
                walk, dropout, bias, q, k, v, grad_out, row, point, pair_mask, head, scale, lse,
                delta, grad_q, LEVELS, HAS_DROPOUT, HAS_BIAS, PRECISION, True,
            )  # fmt: skip
    return grad_q


@triton.jit(do_not_specialize=SIZES)
def query_gradients(tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads,
                    row_mask, cells, dropout, bias, q_rows, k_rows, v_rows, lse_ptr, out_rows,
                    grad_out_rows, grad_lse_rows, stats_ptr, grad_q_rows, cell_gradients, scale,
                    DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr,
                    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                    HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                    PRECISION: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
                    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
                    BLOCK: tl.constexpr, CELLS: tl.constexpr,
                    LIST_BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of q, and statistics for the other gradients; rows are queries, columns points.

    With ``grad_weights = grad_out @ v.T``, the gradient of the logits is
    ``weights * (grad_weights - delta)``. Here ``delta = rowsum(weights * grad_weights)``, which
    equals ``rowsum(grad_out * out)``. The gradient of the log-sum-exp adds ``weights * grad_lse``
    to that of the logits, so ``grad_lse`` is subtracted from ``delta``.

    Args, in addition to those of `attend`:
        out_rows, grad_out_rows: Rows ``[N, H, dv]``.
        lse_ptr: float32 ``[N, H]``.
        grad_lse_rows: Rows ``[N, H, 1]``, float32.
        stats_ptr: float32 ``[H, N, 2]``, a result, see `stats_ptrs`.
        grad_q_rows: Rows ``[N, H, d]``, a result as well.
        cell_gradients: the `CellGradients` to write, or None.
    """
    walk = Walk(
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )
    tile, head, first_row, row, row_valid = program_tile(walk, ROWS, TILE_ROWS)
    q = load_rows(q_rows, row, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
    grad_out = load_rows(
        grad_out_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS, VALUE_PADDED]
    lse = tl.load(lse_ptr + row * n_heads + head, mask=row_valid, other=-float("inf"))  # [ROWS]
    # Without any neighbor, and for masked queries, the log-sum-exp is -inf.
    row_active = row_valid & (lse != -float("inf"))  # [ROWS]
    delta = compute_delta(
        grad_out, out_rows, grad_lse_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS]
    lse, delta = store_stats(stats_ptr, row, row_valid, head, n_rows, lse, delta)  # [ROWS] each
    bit = tl.where(row_active, member_bits(walk, first_row, row, row_valid, ROWS), 0)  # [ROWS]
    start, n_entries = load_list(walk, tile, LIST_BLOCK)
    if n_entries >= 0:
        grad_q = query_gradients_list(
            walk, dropout, bias, q, k_rows, v_rows, grad_out, row, bit, head, scale * LOG2_E,
            lse, delta, start, n_entries,
            LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
            False, ROWS, BLOCK,
        )  # [ROWS, PADDED]  # fmt: skip
        if not all_finite(finite_flag(grad_q)):
            grad_q = query_gradients_list(
                walk, dropout, bias, q, k_rows, v_rows, grad_out, row, bit, head, scale * LOG2_E,
                lse, delta, start, n_entries,
                LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
                True, ROWS, BLOCK,
            )  # fmt: skip
    else:
        grad_q = query_gradients_runs(
            walk, dropout, bias, q, k_rows, v_rows, grad_out, tile, row, row_active, head,
            scale * LOG2_E, lse, delta,
            DIM, LEVELS, BALL_ROWS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS,
            PRECISION, ROWS, TILE_ROWS,
        )  # fmt: skip
    store_rows(grad_q_rows, row, row_valid, head, grad_q * scale, WIDTH, PADDED)
    if HAS_BACKGROUND:
        for level in range(LEVELS):
            query_gradients_of_cells(
                walk, cells, dropout, bias, cell_gradients, row, row_valid, row_active, level,
                head, scale, grad_out, lse, delta,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS,
                PRECISION, ROWS, CELLS,
            )  # fmt: skip


@triton.jit
def point_gradients_block(walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, row, query,
                          valid, pair_mask, head, scale, grad_k, grad_v,
                          LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                          VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                          HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                          PRECISION: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    """Adds one block to ``grad_k``, which is not scaled yet, and to ``grad_v``.

    Args:
        walk, dropout, bias, head: as in `point_gradients`.
        k, v: ``[ROWS, PADDED]`` and ``[ROWS, VALUE_PADDED]``.
        q_rows, grad_out_rows, stats_ptr: as in `point_gradients`.
        row, query, pair_mask: ``[ROWS]``, ``[BLOCK]`` and ``[ROWS, BLOCK]``.
        valid: bool ``[BLOCK]``, whether queries exist; all do, unless careful.
        scale: of logits to base 2.
        grad_k, grad_v: ``[ROWS, PADDED]`` and ``[ROWS, VALUE_PADDED]``.
        LEVELS: number of levels.
        WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED: see `launch.widths`.
        HAS_DROPOUT, HAS_BIAS: whether ``dropout`` and ``bias`` are given.
        PRECISION: see `dot`.
        CAREFUL: whether something may not be finite.

    Returns:
        The new ``grad_k`` and ``grad_v``.
    """
    if CAREFUL:
        lse, delta = load_stats(stats_ptr, query, valid, head, walk.n_items)  # [BLOCK] each
        # If q is not finite, neither is lse; if grad_out is not, neither is delta.
        lse += delta * 0.0
        finite = valid & (lse * 0.0 == 0.0)  # [BLOCK]
        q = load_rows(q_rows, query, finite, head, WIDTH, PADDED)  # [BLOCK, PADDED]
        grad_out = load_rows(
            grad_out_rows, query, finite, head, VALUE_WIDTH, VALUE_PADDED
        )  # [BLOCK, VALUE_PADDED]
    else:
        stats = stats_ptrs(stats_ptr, query, head, walk.n_items)  # [BLOCK]
        lse, delta = tl.load(stats), tl.load(stats + 1)
        q = load_all_rows(q_rows, query, head, WIDTH, PADDED)
        grad_out = load_all_rows(grad_out_rows, query, head, VALUE_WIDTH, VALUE_PADDED)
    logits = dot(k, tl.trans(q), PRECISION) * scale  # [ROWS, BLOCK]
    if HAS_BIAS:
        logits += LOG2_E * load_pair_bias(
            walk, bias, row, query, pair_mask, head, LEVELS, False
        )  # [ROWS, BLOCK]
    weights = tl.exp2(logits - lse[None, :])  # [ROWS, BLOCK]
    weights = tl.where(pair_mask, weights, 0.0)
    grad_weights = dot(v, tl.trans(grad_out), PRECISION)  # [ROWS, BLOCK]
    dropped_weights = weights  # [ROWS, BLOCK]
    if HAS_DROPOUT:
        column = dropout_ids(dropout.column_ids, row, walk.n_rows)  # [ROWS]
        query_id = dropout_ids(dropout.query_ids, query, walk.n_items)  # [BLOCK]
        dropout_factor = dropout_factors(
            dropout, head, query_id[None, :], column[:, None]
        )  # [ROWS, BLOCK]
        dropped_weights = weights * dropout_factor
        grad_weights *= dropout_factor
    grad_logits = weights * (grad_weights - delta[None, :])  # [ROWS, BLOCK]
    if CAREFUL:  # zero times a number that is not finite
        grad_logits = tl.where(pair_mask, grad_logits, 0.0)
    grad_v += dot(dropped_weights.to(grad_out.dtype), grad_out, PRECISION)
    grad_k += dot(grad_logits.to(q.dtype), q, PRECISION)
    return grad_k, grad_v


@triton.jit
def point_gradients_list(walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, row, bit,
                         head, scale, start, n_entries,
                         LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                         VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                         HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                         PRECISION: tl.constexpr, CAREFUL: tl.constexpr,
                         ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """``grad_k``, not scaled yet, and ``grad_v`` of `point_gradients`, from the tile's list."""
    grad_k = tl.zeros([ROWS, PADDED], tl.float32)
    grad_v = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    # Dropout leaves registers for fewer blocks under way.
    stages: tl.constexpr = 1 if CAREFUL else 2 if HAS_DROPOUT else 3
    for first in tl.range(0, n_entries, BLOCK, num_stages=stages):
        query, members = load_listed(walk, start + first + tl.arange(0, BLOCK))  # [BLOCK] each
        grad_k, grad_v = point_gradients_block(
            walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, row, query, query >= 0,
            member_mask(bit, members), head, scale, grad_k, grad_v,
            LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
            CAREFUL,
        )  # fmt: skip
    return grad_k, grad_v


@triton.jit
def point_gradients_runs(walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, tile, row,
                         row_valid, head, scale,
                         DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                         WIDTH: tl.constexpr, PADDED: tl.constexpr,
                         VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                         HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr,
                         PRECISION: tl.constexpr,
                         ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):  # fmt: skip
    """The same from the tile's runs."""
    grad_k = tl.zeros([ROWS, PADDED], tl.float32)
    grad_v = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    runs = load_runs(walk, tile, 0, TILE_ROWS, 1)
    for first in tl.range(0, runs[2], SEARCH_BLOCK, num_stages=1):
        query, valid, pair_mask = search_columns(
            walk, row, row_valid, 0, first, runs, DIM, LEVELS, BALL_ROWS, False
        )  # [SEARCH_BLOCK], [SEARCH_BLOCK], [ROWS, SEARCH_BLOCK]
        grad_k, grad_v = point_gradients_block(
            walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, row, query, valid,
            pair_mask, head, scale, grad_k, grad_v,
            LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
            True,
        )  # fmt: skip
    return grad_k, grad_v


@triton.jit(do_not_specialize=SIZES)
def point_gradients(tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads,
                    row_mask, dropout, bias, q_rows, k_rows, v_rows, stats_ptr, grad_out_rows,
                    grad_k_rows, grad_v_rows, scale,
                    DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr,
                    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                    HAS_DROPOUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
                    ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    LIST_BLOCK: tl.constexpr):  # fmt: skip
    """The gradients of k and v; rows are points, columns the queries, once for each level.

    Args, in addition to those of `attend` and `query_gradients`:
        grad_k_rows, grad_v_rows: Rows ``[nnz, H, d]`` and ``[nnz, H, dv]``, the results.
        BLOCK: queries of a block.
    """
    walk = Walk(
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )
    tile, head, first_row, row, row_valid = program_tile(walk, ROWS, TILE_ROWS)
    k = load_rows(k_rows, row, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
    v = load_rows(v_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED)  # [ROWS, VALUE_PADDED]
    bit = member_bits(walk, first_row, row, row_valid, ROWS)  # [ROWS]
    start, n_entries = load_list(walk, tile, LIST_BLOCK)
    if n_entries >= 0:
        grad_k, grad_v = point_gradients_list(
            walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, row, bit, head,
            scale * LOG2_E, start, n_entries,
            LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
            False, ROWS, BLOCK,
        )  # [ROWS, PADDED], [ROWS, VALUE_PADDED]  # fmt: skip
        if not all_finite(finite_flag(grad_k) + finite_flag(grad_v)):
            grad_k, grad_v = point_gradients_list(
                walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, row, bit, head,
                scale * LOG2_E, start, n_entries,
                LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS, PRECISION,
                True, ROWS, BLOCK,
            )  # fmt: skip
    else:
        grad_k, grad_v = point_gradients_runs(
            walk, dropout, bias, k, v, q_rows, grad_out_rows, stats_ptr, tile, row, row_valid, head,
            scale * LOG2_E,
            DIM, LEVELS, BALL_ROWS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, HAS_BIAS,
            PRECISION, ROWS, TILE_ROWS,
        )  # fmt: skip
    store_rows(grad_k_rows, row, row_valid, head, grad_k * scale, WIDTH, PADDED)
    store_rows(grad_v_rows, row, row_valid, head, grad_v, VALUE_WIDTH, VALUE_PADDED)
