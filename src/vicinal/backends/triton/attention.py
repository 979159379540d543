"""Attention over tiles in Triton: the forward pass and two backward passes, without atomics.

A program takes one tile and one head, and goes through the columns of the tile's runs a block at
a time. The softmax is streamed (Dao et al., "FlashAttention: Fast and Memory-Efficient Exact
Attention with IO-Awareness", 2022), and names follow FlashAttention-2. The gradient of q comes
from a second pass of query tiles over points, those of k and v from a pass of point tiles over
queries.

Products also cover the masked pairs of a block, with weight zero. Zero times infinity would be
NaN, so in products a column with a number that is not finite is replaced by zeros. Its ``flag``,
NaN in place of zero, is added to its logits and reaches the rows whose window holds it.
"""

import triton
import triton.language as tl

from .background import attend_cells, query_gradients_of_cells
from .parts import (
    LOG2_E,
    block_and_head,
    dot,
    dropout_factors,
    load_lse_and_delta,
    load_rows,
    point_columns,
    softmax_step,
    store_rows,
)
from .tile_walk import SIZES, Walk, load_columns, load_runs, program_tile, window_mask


@triton.jit(do_not_specialize=("n_points", "n_heads"))
def find_flags(k_rows, v_rows, flags_ptr, n_points, n_heads,
               WIDTH: tl.constexpr, PADDED: tl.constexpr,
               VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """The flag of every point and head: NaN if its key or value is not finite, else zero.

    Args:
        k_rows, v_rows: Rows ``[nnz, H, d]`` and ``[nnz, H, dv]``.
        flags_ptr: float32 ``[nnz, H]``, the result.
        n_points, n_heads: nnz and H.
        WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED: see `launch.widths`.
        BLOCK: points of a program.
    """
    point, valid, head = block_and_head(n_points, n_heads, BLOCK)  # [BLOCK], [BLOCK], scalar
    k = load_rows(k_rows, point, valid, head, WIDTH, PADDED).to(tl.float32)  # [BLOCK, PADDED]
    v = load_rows(
        v_rows, point, valid, head, VALUE_WIDTH, VALUE_PADDED
    ).to(tl.float32)  # [BLOCK, VALUE_PADDED]  # fmt: skip
    flag = tl.sum(k * 0.0, 1) + tl.sum(v * 0.0, 1)  # [BLOCK]
    tl.store(flags_ptr + point * n_heads + head, flag, mask=valid)


@triton.jit
def load_points(walk, k_rows, v_rows, flags_ptr, q, row, row_valid, level, head, entry, runs,
                scale,
                DIM: tl.constexpr, LEVELS: tl.constexpr,
                WIDTH: tl.constexpr, PADDED: tl.constexpr,
                VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr):  # fmt: skip
    """A block of the points near a tile of queries, at one level.

    Args:
        walk: the `Walk` of a query tile.
        k_rows, v_rows: Rows ``[nnz, H, d]`` and ``[nnz, H, dv]``.
        flags_ptr: float32 ``[nnz, H]``.
        q: ``[ROWS, PADDED]``.
        row, row_valid: ``[ROWS]``.
        level, head: scalars.
        entry: int32 ``[BLOCK]``, entries of the tile's runs.
        runs: what `load_runs` returns.
        scale: of the logits.
        DIM, LEVELS: numbers of dimensions and levels.
        WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED: see `launch.widths`.

    Returns:
        The points ``[BLOCK]``, the pair mask ``[ROWS, BLOCK]``, keys ``[BLOCK, PADDED]``, values
        ``[BLOCK, VALUE_PADDED]``, and logits to base 2 ``[ROWS, BLOCK]``, not masked.
    """
    point, point_valid, point_level = load_columns(walk, entry, runs, 1)  # [BLOCK] each
    pair_mask = window_mask(
        walk, row, level, row_valid, point, point_level, point_valid, DIM, LEVELS
    )  # [ROWS, BLOCK]
    flag = tl.load(flags_ptr + point * walk.n_heads + head, mask=point_valid, other=0.0)  # [BLOCK]
    finite = point_valid & (flag == 0.0)  # [BLOCK]
    k = load_rows(k_rows, point, finite, head, WIDTH, PADDED)  # [BLOCK, PADDED]
    v = load_rows(v_rows, point, finite, head, VALUE_WIDTH, VALUE_PADDED)  # [BLOCK, VALUE_PADDED]
    logits = dot(q, tl.trans(k)) * (scale * LOG2_E) + flag[None, :]  # [ROWS, BLOCK]
    return point, pair_mask, k, v, logits


@triton.jit(do_not_specialize=SIZES)
def attend(tiles, levels, n_rows, n_columns, n_items, n_runs, n_groups, n_heads,
           cells, dropout, q_rows, k_rows, v_rows, flags_ptr, out_rows, lse_ptr, scale,
           DIM: tl.constexpr, LEVELS: tl.constexpr,
           WIDTH: tl.constexpr, PADDED: tl.constexpr,
           VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
           HAS_DROPOUT: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """The forward pass; rows are queries, columns points.

    Args:
        tiles, levels, n_rows, n_columns, n_items, n_runs, n_groups, n_heads: see `Walk`.
        cells: the `EmptyCells`, or None.
        dropout: the `Dropout`, or None.
        q_rows, k_rows, v_rows: Rows ``[N, H, d]``, ``[nnz, H, d]`` and ``[nnz, H, dv]``.
        flags_ptr: float32 ``[nnz, H]``, see `find_flags`.
        out_rows: Rows ``[N, H, dv]``, the result.
        lse_ptr: float32 ``[N, H]``, the log-sum-exp, a result as well.
        scale: of the logits.
        DIM, LEVELS: numbers of dimensions and levels.
        WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED: see `launch.widths`.
        HAS_DROPOUT, HAS_BACKGROUND: whether ``dropout`` and ``cells`` are given.
        ROWS, BLOCK, CELLS: rows of a tile, and points and cells of a block.
    """
    walk = Walk(tiles, levels, n_rows, n_columns, n_items, n_runs, n_groups, n_heads)
    tile, head, row, row_valid = program_tile(walk, ROWS)  # scalar, scalar, [ROWS], [ROWS]
    q = load_rows(q_rows, row, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    for level in range(LEVELS):
        runs = load_runs(walk, tile, level, ROWS, LEVELS)
        for first in range(0, runs[2], BLOCK):
            point, pair_mask, _, v, logits = load_points(
                walk, k_rows, v_rows, flags_ptr, q, row, row_valid, level, head,
                first + tl.arange(0, BLOCK), runs, scale,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED,
            )  # shapes: see `load_points`  # fmt: skip
            logits = tl.where(pair_mask, logits, -float("inf"))
            weights, rescale, row_max, row_sum = softmax_step(
                logits, row_max, row_sum
            )  # [ROWS, BLOCK], then [ROWS] each
            if HAS_DROPOUT:
                column = point_columns(dropout, point, walk.n_items)  # [BLOCK]
                weights *= dropout_factors(dropout, head, row[:, None], column[None, :])
            acc = acc * rescale[:, None] + dot(weights.to(v.dtype), v)
        if HAS_BACKGROUND:
            row_max, row_sum, acc = attend_cells(
                walk, cells, dropout, row, row_valid, level, head, scale * LOG2_E,
                row_max, row_sum, acc,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, ROWS, CELLS,
            )  # fmt: skip
    # A sum of zero means that all pairs are masked. A sum that is NaN stays NaN.
    acc = tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum)[:, None] * acc
    store_rows(out_rows, row, row_valid, head, acc, VALUE_WIDTH, VALUE_PADDED)
    nonzero_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # [ROWS]
    lse = (row_max + tl.log2(nonzero_sum)) / LOG2_E  # [ROWS]
    lse = tl.where(row_sum == 0.0, -float("inf"), lse)
    tl.store(lse_ptr + row * n_heads + head, lse, mask=row_valid)


@triton.jit
def compute_delta(grad_out, out_rows, grad_lse_ptr, row, row_valid, head, n_heads,
                  VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr):  # fmt: skip
    """``delta = rowsum(grad_out * out) - grad_lse``, ``[ROWS]``; see `query_gradients`."""
    out = load_rows(
        out_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS, VALUE_PADDED]
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), 1)  # [ROWS]
    return delta - tl.load(grad_lse_ptr + row * n_heads + head, mask=row_valid, other=0.0)


@triton.jit(do_not_specialize=("n_queries", "n_heads"))
def find_deltas(out_rows, grad_out_rows, grad_lse_ptr, delta_ptr, n_queries, n_heads,
                VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Computes ``delta`` alone, for backward passes that need no gradient of q.

    Args:
        out_rows, grad_out_rows: Rows ``[N, H, dv]``.
        grad_lse_ptr: float32 ``[N, H]``.
        delta_ptr: float32 ``[N, H]``, the result.
        n_queries, n_heads: N and H.
        VALUE_WIDTH, VALUE_PADDED: see `launch.widths`.
        BLOCK: queries of a program.
    """
    row, valid, head = block_and_head(n_queries, n_heads, BLOCK)  # [BLOCK], [BLOCK], scalar
    grad_out = load_rows(
        grad_out_rows, row, valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [BLOCK, VALUE_PADDED]
    delta = compute_delta(
        grad_out, out_rows, grad_lse_ptr, row, valid, head, n_heads, VALUE_WIDTH, VALUE_PADDED
    )  # [BLOCK]
    tl.store(delta_ptr + row * n_heads + head, delta, mask=valid)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(tiles, levels, n_rows, n_columns, n_items, n_runs, n_groups, n_heads,
                    cells, dropout, q_rows, k_rows, v_rows, flags_ptr, lse_ptr, out_rows,
                    grad_out_rows, grad_lse_ptr, delta_ptr, grad_q_rows, cell_gradients, scale,
                    DIM: tl.constexpr, LEVELS: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr,
                    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                    HAS_DROPOUT: tl.constexpr, HAS_BACKGROUND: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """The gradient of q, and ``delta`` for the other gradients; rows are queries, columns points.

    With ``grad_weights = grad_out @ v.T``, the gradient of the logits is
    ``weights * (grad_weights - delta)``. Here ``delta = rowsum(weights * grad_weights)``, which
    equals ``rowsum(grad_out * out)``. The gradient of the log-sum-exp adds ``weights * grad_lse``
    to that of the logits, so ``grad_lse`` is subtracted from ``delta``.

    Args, in addition to those of `attend`:
        out_rows, grad_out_rows: Rows ``[N, H, dv]``.
        lse_ptr, grad_lse_ptr: float32 ``[N, H]``.
        delta_ptr: float32 ``[N, H]``, a result.
        grad_q_rows: Rows ``[N, H, d]``, a result as well.
        cell_gradients: the `CellGradients` to write, or None.
    """
    walk = Walk(tiles, levels, n_rows, n_columns, n_items, n_runs, n_groups, n_heads)
    tile, head, row, row_valid = program_tile(walk, ROWS)  # scalar, scalar, [ROWS], [ROWS]
    q = load_rows(q_rows, row, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
    grad_out = load_rows(
        grad_out_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS, VALUE_PADDED]
    lse = tl.load(lse_ptr + row * n_heads + head, mask=row_valid, other=-float("inf"))  # [ROWS]
    # Without any neighbor, and for masked queries, the log-sum-exp is -inf.
    row_active = row_valid & (lse != -float("inf"))  # [ROWS]
    delta = compute_delta(
        grad_out, out_rows, grad_lse_ptr, row, row_valid, head, n_heads, VALUE_WIDTH, VALUE_PADDED
    )  # [ROWS]
    tl.store(delta_ptr + row * n_heads + head, delta, mask=row_valid)
    lse *= LOG2_E
    grad_q = tl.zeros([ROWS, PADDED], tl.float32)
    for level in range(LEVELS):
        runs = load_runs(walk, tile, level, ROWS, LEVELS)
        for first in range(0, runs[2], BLOCK):
            point, pair_mask, k, v, logits = load_points(
                walk, k_rows, v_rows, flags_ptr, q, row, row_active, level, head,
                first + tl.arange(0, BLOCK), runs, scale,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED,
            )  # shapes: see `load_points`  # fmt: skip
            weights = tl.exp2(logits - lse[:, None])  # [ROWS, BLOCK]
            grad_weights = dot(grad_out, tl.trans(v))  # [ROWS, BLOCK]
            if HAS_DROPOUT:
                column = point_columns(dropout, point, walk.n_items)  # [BLOCK]
                grad_weights *= dropout_factors(dropout, head, row[:, None], column[None, :])
            grad_logits = weights * (grad_weights - delta[:, None])  # [ROWS, BLOCK]
            grad_logits = tl.where(pair_mask, grad_logits, 0.0)
            grad_q += dot(grad_logits.to(k.dtype), k)
        if HAS_BACKGROUND:
            query_gradients_of_cells(
                walk, cells, dropout, cell_gradients, row, row_valid, row_active, level, head,
                scale, grad_out, lse, delta,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, ROWS, CELLS,
            )  # fmt: skip
    store_rows(grad_q_rows, row, row_valid, head, grad_q * scale, WIDTH, PADDED)


@triton.jit(do_not_specialize=SIZES)
def point_gradients(tiles, levels, n_rows, n_columns, n_items, n_runs, n_groups, n_heads,
                    dropout, q_rows, k_rows, v_rows, lse_ptr, delta_ptr, grad_out_rows,
                    grad_k_rows, grad_v_rows, scale,
                    DIM: tl.constexpr, LEVELS: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr,
                    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                    HAS_DROPOUT: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The gradients of k and v; rows are points, columns the queries, once for each level.

    Args, in addition to those of `attend` and `query_gradients`:
        grad_k_rows, grad_v_rows: Rows ``[nnz, H, d]`` and ``[nnz, H, dv]``, the results.
        BLOCK: queries of a block.
    """
    walk = Walk(tiles, levels, n_rows, n_columns, n_items, n_runs, n_groups, n_heads)
    tile, head, row, row_valid = program_tile(walk, ROWS)  # scalar, scalar, [ROWS], [ROWS]
    k = load_rows(k_rows, row, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
    v = load_rows(v_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED)  # [ROWS, VALUE_PADDED]
    grad_k = tl.zeros([ROWS, PADDED], tl.float32)
    grad_v = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    runs = load_runs(walk, tile, 0, ROWS, 1)
    for first in range(0, runs[2], BLOCK):
        entry = first + tl.arange(0, BLOCK)  # [BLOCK]
        query, query_valid, query_level = load_columns(walk, entry, runs, LEVELS)  # [BLOCK] each
        lse, delta, query_active = load_lse_and_delta(
            lse_ptr, delta_ptr, query, query_valid, head, n_heads
        )  # [BLOCK] each
        pair_mask = window_mask(
            walk, row, 0, row_valid, query, query_level, query_active, DIM, LEVELS
        )  # [ROWS, BLOCK]
        # If q is not finite, neither is lse; if grad_out is not, neither is delta.
        flag = tl.where(query_active, lse * 0.0 + delta * 0.0, 0.0)  # [BLOCK]
        finite = query_active & (flag == 0.0)  # [BLOCK]
        q = load_rows(q_rows, query, finite, head, WIDTH, PADDED)  # [BLOCK, PADDED]
        grad_out = load_rows(
            grad_out_rows, query, finite, head, VALUE_WIDTH, VALUE_PADDED
        )  # [BLOCK, VALUE_PADDED]
        logits = dot(k, tl.trans(q)) * (scale * LOG2_E) + flag[None, :]  # [ROWS, BLOCK]
        weights = tl.exp2(logits - (lse * LOG2_E)[None, :])  # [ROWS, BLOCK]
        weights = tl.where(pair_mask, weights, 0.0)
        grad_weights = dot(v, tl.trans(grad_out))  # [ROWS, BLOCK]
        dropped_weights = weights  # [ROWS, BLOCK]
        if HAS_DROPOUT:
            column = point_columns(dropout, row, walk.n_rows)  # [ROWS]
            dropout_factor = dropout_factors(
                dropout, head, query[None, :], column[:, None]
            )  # [ROWS, BLOCK]
            dropped_weights = weights * dropout_factor
            grad_weights *= dropout_factor
        grad_logits = weights * (grad_weights - delta[None, :])  # [ROWS, BLOCK]
        grad_logits = tl.where(pair_mask, grad_logits, 0.0)
        grad_v += dot(dropped_weights.to(grad_out.dtype), grad_out)
        grad_k += dot(grad_logits.to(q.dtype), q)
    store_rows(grad_k_rows, row, row_valid, head, grad_k * scale, WIDTH, PADDED)
    store_rows(grad_v_rows, row, row_valid, head, grad_v, VALUE_WIDTH, VALUE_PADDED)
