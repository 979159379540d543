"""Attention of tiles in Triton: forward, and two backward passes that need no atomics.

A program takes a tile and a head and walks what the tile sees, a block of columns at a time. The
softmax runs as a stream (Dao et al., "FlashAttention", 2022). Queries get their gradient from a
second walk over points, keys and values from a walk of points over the queries that see them.

Products also cover pairs that do not see each other, with weight zero. Zero times infinity would
be NaN, so columns that hold a number that is not finite are taken as zeros in products, and their
``flag``, NaN instead of zero, reaches the logits of those that do see them.
"""

import triton
import triton.language as tl

from .background import attend_cells, query_gradients_of_cells
from .parts import LOG2_E, dot, kept, load_rows, softmax_step, store_rows
from .tile_walk import SIZES, Walk, columns_at, rows_of, runs_of, seen, tile_and_head


@triton.jit(do_not_specialize=("n_points", "n_heads"))
def find_flags(k, v, flags, n_points, n_heads,
               WIDTH: tl.constexpr, PADDED: tl.constexpr,
               VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """``flags`` float32 ``[nnz, H]``: zero, or NaN where a key or value is not finite."""
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    point = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = point < n_points
    keys = load_rows(k, point, exists, head, WIDTH, PADDED).to(tl.float32)
    values = load_rows(v, point, exists, head, VALUE_WIDTH, VALUE_PADDED).to(tl.float32)
    flag = tl.sum(keys * 0.0, 1) + tl.sum(values * 0.0, 1)
    tl.store(flags + point * n_heads + head, flag, mask=exists)


@triton.jit
def points_of(walk, k, v, flags, queries, row, exists, level, head, entry, runs, scale,
              DIM: tl.constexpr, LEVELS: tl.constexpr,
              WIDTH: tl.constexpr, PADDED: tl.constexpr,
              VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr):  # fmt: skip
    """Some entries of what a tile of queries sees at a level: the points, which of them the
    queries see, keys and values, and logits to base 2, where seen.
    """
    begin, n_runs, n_entries = runs
    point, there, place = columns_at(walk, entry, begin, n_runs, n_entries, 1)
    sees = seen(walk, row, level, exists, point, place, there, DIM, LEVELS)
    flag = tl.load(flags + point * walk.n_heads + head, mask=there, other=0.0)
    finite = there & (flag == 0.0)
    keys = load_rows(k, point, finite, head, WIDTH, PADDED)
    values = load_rows(v, point, finite, head, VALUE_WIDTH, VALUE_PADDED)
    logits = dot(queries, tl.trans(keys)) * (scale * LOG2_E) + flag[None, :]
    return point, sees, keys, values, logits


@triton.jit(do_not_specialize=SIZES)
def attend(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads,
           cells, dropout, q, k, v, flags, out, lse, scale,
           DIM: tl.constexpr, LEVELS: tl.constexpr,
           WIDTH: tl.constexpr, PADDED: tl.constexpr,
           VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
           DROPS: tl.constexpr, BACKGROUND: tl.constexpr,
           ROWS: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """Rows are queries, columns points: ``out`` and ``lse`` of every query that exists."""
    walk = Walk(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads)
    tile, head = tile_and_head(n_heads)
    row, exists = rows_of(walk, tile, ROWS)
    queries = load_rows(q, row, exists, head, WIDTH, PADDED)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    attended = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    for level in range(LEVELS):
        runs = runs_of(walk, tile, level, ROWS, LEVELS)
        for first in range(0, runs[2], BLOCK):
            point, sees, _, values, logits = points_of(
                walk, k, v, flags, queries, row, exists, level, head,
                first + tl.arange(0, BLOCK), runs, scale,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED,
            )  # fmt: skip
            logits = tl.where(sees, logits, -float("inf"))
            weights, rescale, top, total = softmax_step(logits, top, total)
            if DROPS:
                weights *= kept(dropout, head, row[:, None], point[None, :])
            attended = attended * rescale[:, None] + dot(weights.to(values.dtype), values)
        if BACKGROUND:
            top, total, attended = attend_cells(
                walk, cells, dropout, row, exists, level, head, scale * LOG2_E,
                top, total, attended,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, DROPS, ROWS, CELLS,
            )  # fmt: skip
    # A total that is NaN stays so; one that is zero saw nothing.
    attended = tl.where(total == 0.0, 0.0, 1.0 / total)[:, None] * attended
    store_rows(out, row, exists, head, attended, VALUE_WIDTH, VALUE_PADDED)
    seen_any = tl.where(total == 0.0, 1.0, total)
    result = tl.where(total == 0.0, -float("inf"), (top + tl.log2(seen_any)) / LOG2_E)
    tl.store(lse + row * n_heads + head, result, mask=exists)


@triton.jit
def delta_of(upstream, out, grad_lse, row, exists, head, n_heads,
             VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr):  # fmt: skip
    """What the gradients of all weights of some queries are less by."""
    result = load_rows(out, row, exists, head, VALUE_WIDTH, VALUE_PADDED)
    delta = tl.sum(upstream.to(tl.float32) * result.to(tl.float32), 1)
    return delta - tl.load(grad_lse + row * n_heads + head, mask=exists, other=0.0)


@triton.jit(do_not_specialize=("n_queries", "n_heads"))
def find_deltas(out, grad_out, grad_lse, delta, n_queries, n_heads,
                VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """``delta`` alone, where no query needs a gradient."""
    block, head = tl.program_id(0) // n_heads, tl.program_id(0) % n_heads
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < n_queries
    upstream = load_rows(grad_out, row, exists, head, VALUE_WIDTH, VALUE_PADDED)
    less = delta_of(upstream, out, grad_lse, row, exists, head, n_heads, VALUE_WIDTH, VALUE_PADDED)
    tl.store(delta + row * n_heads + head, less, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads,
                    cells, dropout, q, k, v, flags, lse, out, grad_out, grad_lse, delta, grad_q,
                    cell_gradients, scale,
                    DIM: tl.constexpr, LEVELS: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr,
                    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                    DROPS: tl.constexpr, BACKGROUND: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """Rows are queries, columns points: ``grad_q``, and ``delta`` ``[N, H]``."""
    walk = Walk(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads)
    tile, head = tile_and_head(n_heads)
    row, exists = rows_of(walk, tile, ROWS)
    queries = load_rows(q, row, exists, head, WIDTH, PADDED)
    upstream = load_rows(grad_out, row, exists, head, VALUE_WIDTH, VALUE_PADDED)
    base = tl.load(lse + row * n_heads + head, mask=exists, other=-float("inf"))
    takes_part = base != -float("inf")
    less = delta_of(upstream, out, grad_lse, row, exists, head, n_heads, VALUE_WIDTH, VALUE_PADDED)
    tl.store(delta + row * n_heads + head, less, mask=exists)
    base *= LOG2_E
    gradient = tl.zeros([ROWS, PADDED], tl.float32)
    for level in range(LEVELS):
        runs = runs_of(walk, tile, level, ROWS, LEVELS)
        for first in range(0, runs[2], BLOCK):
            point, sees, keys, values, logits = points_of(
                walk, k, v, flags, queries, row, exists & takes_part, level, head,
                first + tl.arange(0, BLOCK), runs, scale,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED,
            )  # fmt: skip
            weights = tl.exp2(logits - base[:, None])
            slopes = dot(upstream, tl.trans(values))
            if DROPS:
                slopes *= kept(dropout, head, row[:, None], point[None, :])
            slopes = tl.where(sees, weights * (slopes - less[:, None]), 0.0)
            gradient += dot(slopes.to(keys.dtype), keys)
        if BACKGROUND:
            query_gradients_of_cells(
                walk, cells, dropout, cell_gradients, row, exists, exists & takes_part, level,
                head, scale, upstream, base, less,
                DIM, LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, DROPS, ROWS, CELLS,
            )  # fmt: skip
    store_rows(grad_q, row, exists, head, gradient * scale, WIDTH, PADDED)


@triton.jit(do_not_specialize=SIZES)
def point_gradients(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads,
                    dropout, q, k, v, lse, delta, grad_out, grad_k, grad_v, scale,
                    DIM: tl.constexpr, LEVELS: tl.constexpr,
                    WIDTH: tl.constexpr, PADDED: tl.constexpr,
                    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                    DROPS: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Rows are points, columns the queries of all ``LEVELS``: ``grad_k`` and ``grad_v``."""
    walk = Walk(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads)
    tile, head = tile_and_head(n_heads)
    row, exists = rows_of(walk, tile, ROWS)
    keys = load_rows(k, row, exists, head, WIDTH, PADDED)
    values = load_rows(v, row, exists, head, VALUE_WIDTH, VALUE_PADDED)
    key_gradient = tl.zeros([ROWS, PADDED], tl.float32)
    value_gradient = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    begin, n_runs, n_entries = runs_of(walk, tile, 0, ROWS, 1)
    for first in range(0, n_entries, BLOCK):
        entry = first + tl.arange(0, BLOCK)
        query, there, level = columns_at(walk, entry, begin, n_runs, n_entries, LEVELS)
        base = tl.load(lse + query * n_heads + head, mask=there, other=-float("inf"))
        less = tl.load(delta + query * n_heads + head, mask=there, other=0.0)
        there = there & (base != -float("inf"))
        sees = seen(walk, row, 0, exists, query, level, there, DIM, LEVELS)
        # A query that is not finite has a log-sum-exp that is not, and its gradient a delta.
        flag = tl.where(there, base * 0.0 + less * 0.0, 0.0)
        finite = there & (flag == 0.0)
        queries = load_rows(q, query, finite, head, WIDTH, PADDED)
        upstream = load_rows(grad_out, query, finite, head, VALUE_WIDTH, VALUE_PADDED)
        logits = dot(keys, tl.trans(queries)) * (scale * LOG2_E) + flag[None, :]
        weights = tl.exp2(logits - (base * LOG2_E)[None, :])
        weights = tl.where(sees, weights, 0.0)
        slopes = dot(values, tl.trans(upstream))
        dropped = weights
        if DROPS:
            factor = kept(dropout, head, query[None, :], row[:, None])
            dropped = weights * factor
            slopes *= factor
        slopes = tl.where(sees, weights * (slopes - less[None, :]), 0.0)
        value_gradient += dot(dropped.to(upstream.dtype), upstream)
        key_gradient += dot(slopes.to(queries.dtype), queries)
    store_rows(grad_k, row, exists, head, key_gradient * scale, WIDTH, PADDED)
    store_rows(grad_v, row, exists, head, value_gradient, VALUE_WIDTH, VALUE_PADDED)
