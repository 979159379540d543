"""The gradient of the learned bias in Triton: sums over pairs by their slots, without atomics.

A program takes a part of the tiles of queries, one after another, and adds the gradients of their
logits to sums of its own. Those of all programs are added in a fixed order.
"""

import triton
import triton.language as tl

from .bias import sum_by_slot
from .gradients import logit_gradients
from .parts import (
    LOG2_E,
    load_points,
    load_rows,
    load_stats,
)
from .tile_walk import (
    SEARCH_BLOCK,
    SIZES,
    Walk,
    load_list,
    load_listed,
    load_runs,
    load_tile_rows,
    member_bits,
    member_mask,
    search_columns,
    split_part,
)


@triton.jit
def bias_gradients_list(walk, dropout, bias, q, k_rows, v_rows, grad_out, row, bit, head, scale,
                        lse, delta, sums_ptr, start, n_entries,
                        LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
                        VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                        HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                        ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Adds a tile's gradients from its list."""
    for first in tl.range(0, n_entries, BLOCK, num_stages=1):
        point, members = load_listed(walk, start + first + tl.arange(0, BLOCK))  # [BLOCK] each
        pair_mask = member_mask(bit, members)  # [ROWS, BLOCK]
        k, v, _ = load_points(
            k_rows, v_rows, point, point >= 0, head,
            WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, False,
        )  # [BLOCK, PADDED], [BLOCK, VALUE_PADDED]  # fmt: skip
        grad_logits = logit_gradients(
            walk, dropout, bias, q, k, v, grad_out, row, point, pair_mask, head, scale, lse, delta,
            LEVELS, HAS_DROPOUT, True, PRECISION, False,
        )  # [ROWS, BLOCK]  # fmt: skip
        sum_by_slot(walk, bias, sums_ptr, row, point, pair_mask, grad_logits, LEVELS, ROWS, BLOCK)


@triton.jit
def bias_gradients_runs(walk, dropout, bias, q, k_rows, v_rows, grad_out, tile, row, row_active,
                        head, scale, lse, delta, sums_ptr,
                        DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                        WIDTH: tl.constexpr, PADDED: tl.constexpr,
                        VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                        HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                        ROWS: tl.constexpr, TILE_ROWS: tl.constexpr):  # fmt: skip
    """The same from the tile's runs."""
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
            grad_logits = logit_gradients(
                walk, dropout, bias, q, k, v, grad_out, row, point, pair_mask, head, scale,
                lse, delta, LEVELS, HAS_DROPOUT, True, PRECISION, True,
            )  # [ROWS, SEARCH_BLOCK]  # fmt: skip
            sum_by_slot(
                walk, bias, sums_ptr, row, point, pair_mask, grad_logits, LEVELS, ROWS, SEARCH_BLOCK
            )


@triton.jit(do_not_specialize=(*SIZES, "n_tiles", "n_parts"))
def bias_gradients(tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads,
                   row_mask, dropout, bias, q_rows, k_rows, v_rows, stats_ptr, grad_out_rows,
                   sums_ptr, scale, n_tiles, n_parts,
                   DIM: tl.constexpr, LEVELS: tl.constexpr, BALL_ROWS: tl.constexpr,
                   WIDTH: tl.constexpr, PADDED: tl.constexpr,
                   VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                   HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
                   ROWS: tl.constexpr, TILE_ROWS: tl.constexpr,
                   BLOCK: tl.constexpr, LIST_BLOCK: tl.constexpr):  # fmt: skip
    """The gradient of the bias from pairs of queries and points, in ``n_parts`` sums for each row
    of a tile. A program takes a head and every ``n_parts``-th tile of queries.

    Args, in addition to those of `attention.attend` and `gradients.query_gradients`:
        sums_ptr: float32 ``[n_parts, H, ROWS, K]``, zeros, the result.
        n_tiles, n_parts: the numbers of tiles, of ``ROWS`` rows here, and of sums.
    """
    walk = Walk(
        tiles, windows, n_rows, n_columns, n_items, n_runs, n_blocks, n_groups, n_heads, row_mask
    )
    program = tl.program_id(0)
    head, part = program % n_heads, program // n_heads
    sums_ptr += program.to(tl.int64) * ROWS * bias.n_slots
    for index in range(part, n_tiles, n_parts):
        part_of_tile = tl.full([], 0, tl.int64) + index
        tile, first_row = split_part(part_of_tile, ROWS, TILE_ROWS)
        row, row_valid = load_tile_rows(walk, part_of_tile, ROWS)  # [ROWS] each
        q = load_rows(q_rows, row, row_valid, head, WIDTH, PADDED)  # [ROWS, PADDED]
        grad_out = load_rows(
            grad_out_rows, row, row_valid, head, VALUE_WIDTH, VALUE_PADDED
        )  # [ROWS, VALUE_PADDED]
        lse, delta = load_stats(stats_ptr, row, row_valid, head, n_rows)  # [ROWS] each
        row_active = row_valid & (lse != float("inf"))  # [ROWS]
        bit = tl.where(row_active, member_bits(walk, first_row, row, row_valid, ROWS), 0)  # [ROWS]
        start, n_entries = load_list(walk, tile, LIST_BLOCK)
        if n_entries >= 0:
            bias_gradients_list(
                walk, dropout, bias, q, k_rows, v_rows, grad_out, row, bit, head, scale * LOG2_E,
                lse, delta, sums_ptr, start, n_entries,
                LEVELS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT, PRECISION,
                ROWS, BLOCK,
            )  # fmt: skip
        else:
            bias_gradients_runs(
                walk, dropout, bias, q, k_rows, v_rows, grad_out, tile, row, row_active, head,
                scale * LOG2_E, lse, delta, sums_ptr,
                DIM, LEVELS, BALL_ROWS, WIDTH, PADDED, VALUE_WIDTH, VALUE_PADDED, HAS_DROPOUT,
                PRECISION, ROWS, TILE_ROWS,
            )  # fmt: skip
