"""Empty cells in Triton: what a background adds to the attention of tiles.

Which cells of a row of a window are empty follows from the slice of points in that row: `CELLS`
of them at a time, as bits of a word per query. Their logits are one product of the query, as
empty cells see it, and a table of keys; their values are all the same, so weights are summed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .parts import LOG2_E, dot, finite_or_zero, kept, load_rows, softmax_step, store_rows
from .tile_walk import SIZES, Walk, cell_at, group_at, rows_of


class Cells(NamedTuple):
    """A `Background` and the slices that tell where there are points."""

    query: Any  # Rows [N * L, H, d]
    key: Any  # Rows [K, H, d]
    value: Any  # Rows [B * L, H, dv]
    starts: Any
    stops: Any
    point_columns: Any
    n_slices: int


class CellGradients(NamedTuple):
    """Where the queries' walk leaves what it finds out about empty cells."""

    query: Any  # Rows [N * L, H, d]
    weights: Any  # float32 [N * L, H], summed over a level's empty cells


@triton.jit
def place_of_cells(walk, level, index, CELLS: tl.constexpr):
    """The ``index``-th block of cells of a level's windows: its slice, and where it begins there;
    the cells' slots, and which of them exist. Blocks never reach over a slice's end.
    """
    width = 2 * tl.load(walk.levels + 4 * level) + 1
    blocks = tl.cdiv(width, CELLS)
    number, first = index // blocks, index % blocks * CELLS
    cell = first + tl.arange(0, CELLS)
    slot = tl.load(walk.levels + 4 * level + 3) + number * width + cell
    return number, first, slot, cell < width


@triton.jit
def blocks_of_cells(walk, level, CELLS: tl.constexpr):
    """How many blocks of cells the windows of a level have."""
    width = 2 * tl.load(walk.levels + 4 * level) + 1
    return tl.cdiv(width, CELLS) * tl.load(walk.levels + 4 * level + 1)


@triton.jit
def empty_cells(
    walk, cells, row, exists, level, number, first, there, DIM: tl.constexpr, CELLS: tl.constexpr
):
    """Bool ``[ROWS, CELLS]``: which cells of a block in a level's slice ``number`` are empty."""
    radius = tl.load(walk.levels + 4 * level)
    slices = row * cells.n_slices + tl.load(walk.levels + 4 * level + 2) + number
    start = tl.maximum(tl.load(cells.starts + slices, mask=exists, other=0), 0)
    stop = tl.minimum(tl.load(cells.stops + slices, mask=exists, other=0), walk.n_others)
    center = cell_at(walk, row, level, DIM - 1, exists, DIM)
    occupied = tl.zeros_like(start)
    for step in range(0, tl.max(stop - start, 0)):
        place = start + step
        column = tl.load(cells.point_columns + place, mask=place < stop, other=0)
        cell = column - (center - radius + first)
        here = (place < stop) & (cell >= 0) & (cell < CELLS)
        occupied |= tl.where(here, 1 << tl.where(here, cell, 0), 0)
    group = group_at(walk, row, level, exists)
    empty = (occupied[:, None] >> tl.arange(0, CELLS)[None, :] & 1) == 0
    return empty & (exists & (group >= 0))[:, None] & there[None, :]


@triton.jit
def values_of_cells(
    walk, cells, row, exists, level, head, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """``[ROWS, PADDED]``: what all empty cells of a level hold for each query."""
    group = group_at(walk, row, level, exists)
    there = (group >= 0) & (group < walk.n_groups)
    return load_rows(cells.value, group, there, head, WIDTH, PADDED)


@triton.jit
def attend_cells(
    walk, cells, dropout, row, exists, level, head, scale, top, total, attended,
    DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, DROPS: tl.constexpr,
    ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The streamed softmax, gone on over the empty cells of a level; ``scale`` is to base 2."""
    queries = load_rows(cells.query, row * LEVELS + level, exists, head, WIDTH, PADDED)
    share = tl.zeros([ROWS], tl.float32)
    for index in range(0, blocks_of_cells(walk, level, CELLS)):
        number, first, slot, there = place_of_cells(walk, level, index, CELLS)
        empty = empty_cells(walk, cells, row, exists, level, number, first, there, DIM, CELLS)
        keys = load_rows(cells.key, slot, there, head, WIDTH, PADDED)
        logits = tl.where(empty, dot(queries, tl.trans(keys)) * scale, -float("inf"))
        weights, rescale, top, total = softmax_step(logits, top, total)
        if DROPS:
            weights *= kept(dropout, head, row[:, None], (walk.n_others + slot)[None, :])
        attended *= rescale[:, None]
        share = share * rescale + tl.sum(weights, 1)
    values = values_of_cells(walk, cells, row, exists, level, head, VALUE_WIDTH, VALUE_PADDED).to(
        tl.float32
    )
    return (
        top,
        total,
        attended
        + tl.where(share == 0.0, 0.0, share)[:, None]
        * tl.where((share == 0.0)[:, None], 0.0, values),
    )


@triton.jit
def slopes_of_cells(
    walk, dropout, head, row, slot, empty, queries, keys, slope, base, less, scale,
    DROPS: tl.constexpr,
):  # fmt: skip
    """The weights of empty cells, dropped ones zero, and the gradients of their logits."""
    weights = tl.exp2(dot(queries, tl.trans(keys)) * scale - base[:, None])
    weights = tl.where(empty, weights, 0.0)
    slopes = slope[:, None]
    dropped = weights
    if DROPS:
        factor = kept(dropout, head, row[:, None], (walk.n_others + slot)[None, :])
        slopes = slopes * factor
        dropped = weights * factor
    return dropped, tl.where(empty, weights * (slopes - less[:, None]), 0.0)


@triton.jit
def query_gradients_of_cells(
    walk, cells, dropout, gradients, row, exists, takes_part, level, head, scale,
    upstream, base, less,
    DIM: tl.constexpr, LEVELS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr, DROPS: tl.constexpr,
    ROWS: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The gradients of the queries as a level's empty cells see them, and these cells' weights."""
    place = row * LEVELS + level
    queries = load_rows(cells.query, place, takes_part, head, WIDTH, PADDED)
    values = values_of_cells(walk, cells, row, takes_part, level, head, VALUE_WIDTH, VALUE_PADDED)
    slope = tl.sum(upstream.to(tl.float32) * values.to(tl.float32), 1)
    gradient = tl.zeros([ROWS, PADDED], tl.float32)
    share = tl.zeros([ROWS], tl.float32)
    for index in range(0, blocks_of_cells(walk, level, CELLS)):
        number, first, slot, there = place_of_cells(walk, level, index, CELLS)
        empty = empty_cells(walk, cells, row, takes_part, level, number, first, there, DIM, CELLS)
        keys = load_rows(cells.key, slot, there, head, WIDTH, PADDED)
        dropped, slopes = slopes_of_cells(
            walk, dropout, head, row, slot, empty, queries, keys,
            slope, base, less, scale * LOG2_E, DROPS,
        )  # fmt: skip
        share += tl.sum(dropped, 1)
        gradient += dot(slopes.to(keys.dtype), finite_or_zero(keys))
    store_rows(gradients.query, place, exists, head, gradient * scale, WIDTH, PADDED)
    tl.store(gradients.weights + place * walk.n_heads + head, share, mask=exists)


@triton.jit(do_not_specialize=(*SIZES, "n_parts", "n_slots"))
def cell_key_gradients(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads,
                       cells, dropout, lse, delta, grad_out, partial, scale, n_parts, n_slots,
                       DIM: tl.constexpr, LEVELS: tl.constexpr,
                       WIDTH: tl.constexpr, PADDED: tl.constexpr,
                       VALUE_WIDTH: tl.constexpr, VALUE_PADDED: tl.constexpr,
                       DROPS: tl.constexpr, ROWS: tl.constexpr, CELLS: tl.constexpr):  # fmt: skip
    """A block of cells over every ``n_parts``-th tile of queries: Rows ``[n_parts * K, H, d]``."""
    walk = Walk(tiles, levels, n_rows, n_columns, n_others, n_runs, n_groups, n_heads)
    program = tl.program_id(0)
    head, part = program % n_heads, program // n_heads % n_parts
    index = program // (n_heads * n_parts)
    level = 0
    while index >= blocks_of_cells(walk, level, CELLS):
        index -= blocks_of_cells(walk, level, CELLS)
        level += 1
    number, first, slot, there = place_of_cells(walk, level, index, CELLS)
    gradient = tl.zeros([CELLS, PADDED], tl.float32)
    keys = load_rows(cells.key, slot, there, head, WIDTH, PADDED)
    for tile in range(part, tl.cdiv(n_rows, ROWS), n_parts):
        row, exists = rows_of(walk, tile, ROWS)
        base = tl.load(lse + row * n_heads + head, mask=exists, other=-float("inf"))
        less = tl.load(delta + row * n_heads + head, mask=exists, other=0.0)
        exists = exists & (base != -float("inf"))
        empty = empty_cells(walk, cells, row, exists, level, number, first, there, DIM, CELLS)
        queries = load_rows(cells.query, row * LEVELS + level, exists, head, WIDTH, PADDED)
        upstream = load_rows(grad_out, row, exists, head, VALUE_WIDTH, VALUE_PADDED)
        values = values_of_cells(walk, cells, row, exists, level, head, VALUE_WIDTH, VALUE_PADDED)
        slope = tl.sum(upstream.to(tl.float32) * values.to(tl.float32), 1)
        _, slopes = slopes_of_cells(
            walk, dropout, head, row, slot, empty, queries, keys,
            slope, base * LOG2_E, less, scale * LOG2_E, DROPS,
        )  # fmt: skip
        gradient += dot(tl.trans(slopes).to(queries.dtype), finite_or_zero(queries))
    store_rows(partial, part * n_slots + slot, there, head, gradient * scale, WIDTH, PADDED)


@triton.jit(do_not_specialize=("n_parts",))
def cell_value_gradients(traversal, bounds, weights, grad_out, partial, n_levels, n_heads, n_parts,
                         WIDTH: tl.constexpr, PADDED: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    """An image's level, over every ``n_parts``-th block of its queries, which stand at ``bounds``
    in ``traversal``: Rows ``[B * L * n_parts, H, dv]``.
    """
    program = tl.program_id(0)
    head, part = program % n_heads, program // n_heads % n_parts
    image_level = program // (n_heads * n_parts)
    image, level = image_level // n_levels, image_level % n_levels
    stop = tl.load(bounds + image + 1)
    gradient = tl.zeros([PADDED], tl.float32)
    for first in range(tl.load(bounds + image) + part * BLOCK, stop, n_parts * BLOCK):
        place = first + tl.arange(0, BLOCK)
        row = tl.load(traversal + place, mask=place < stop, other=0).to(tl.int64)
        share = tl.load(
            weights + (row * n_levels + level) * n_heads + head, mask=place < stop, other=0.0
        )
        upstream = load_rows(grad_out, row, share != 0.0, head, WIDTH, PADDED).to(tl.float32)
        gradient += tl.sum(share[:, None] * upstream, 0)
    index = tl.full([1], 0, tl.int64) + image_level * n_parts + part
    store_rows(partial, index, index >= 0, head, gradient[None, :], WIDTH, PADDED)
