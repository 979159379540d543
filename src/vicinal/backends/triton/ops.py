"""The ops of `backends.ops` in Triton: their outputs, and the launches that fill them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import list_space, new_gradients
from ..types import LIST_BLOCK, TILE, Tiles
from . import attention as attention_kernels
from . import background as background_kernels
from . import gradients as gradient_kernels
from . import lists as list_kernels
from . import plan_ops
from . import rotary as rotary_kernels
from .background import CellGradients
from .checks import check_plan, check_runs
from .launch import (
    INTERPRETS,
    AttentionArguments,
    cdiv,
    heads,
    launch,
    on_device_of,
    power_of_2,
    slices_per_level,
    walk_of,
)
from .parts import Dropout, Rows

__all__ = ["INTERPRETS", "KERNELS"]

_PARTS = 64  # into which a sum over all queries is split
_CELLS = 16  # of a window in a block: bits of a word, and the minimum size of `tl.dot`


def attend(
    q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, seed: Tensor | None,
    background: list[Tensor], plan: list[Tensor], neighborhood_sizes: list[int],
    position_dim: int, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `backends.ops`; `triton.attend` makes the list ``plan``."""
    check_plan(plan, q, k, neighborhood_sizes, position_dim)
    args = AttentionArguments(
        q if scale >= 0 else -q, k, v, query_mask, background, plan, neighborhood_sizes,
        position_dim,
    )  # fmt: skip
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    with on_device_of(q):
        launch(
            attention_kernels.attend, args.query_programs, *args.query_walk, args.cells,
            _dropout(seed, dropout_p, args.copies), *args.heads, heads(out), lse, scale,
            **args.constants, HAS_DROPOUT=seed is not None, HAS_BACKGROUND=bool(background),
            ROWS=args.query_rows, CELLS=_CELLS, LIST_BLOCK=LIST_BLOCK,
        )  # fmt: skip
    return out, lse


def attend_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    query_mask: Tensor | None, seed: Tensor | None, background: list[Tensor], plan: list[Tensor],
    neighborhood_sizes: list[int], position_dim: int, scale: float, dropout_p: float,
    needs_queries: bool, needs_points: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """See `backends.ops`; the gradients of q, k, v and the background."""
    check_plan(plan, q, k, neighborhood_sizes, position_dim)
    args = AttentionArguments(
        q, k, v, query_mask, background, plan, neighborhood_sizes, position_dim
    )
    grad_q, grad_k, grad_v = new_gradients(q, k, v, needs_queries, needs_points)
    grad_background = [x.new_empty(x.shape) for x in background if needs_queries]
    grad_rows, grad_lse_rows = heads(grad_out), heads(grad_lse.unsqueeze(2))
    stats = lse.new_empty(args.n_heads, len(lse), 2)
    cell_gradients = None
    if grad_background:
        weight_sums = lse.new_empty(len(lse), args.n_levels, args.n_heads)
        cell_gradients = CellGradients(heads(grad_background[0].flatten(0, 1)), weight_sums)
    constants = {**args.constants, "HAS_DROPOUT": seed is not None}
    dropout = _dropout(seed, dropout_p, args.copies)
    with on_device_of(q):
        if needs_queries:
            launch(
                gradient_kernels.query_gradients, args.query_programs, *args.query_walk,
                args.cells, dropout, *args.heads, lse, heads(out), grad_rows,
                grad_lse_rows, stats, heads(grad_q), cell_gradients, scale,
                **constants, HAS_BACKGROUND=bool(background), ROWS=args.query_rows, CELLS=_CELLS,
                LIST_BLOCK=LIST_BLOCK,
            )  # fmt: skip
        else:
            _find_stats(heads(out), grad_rows, lse, grad_lse_rows, stats, v.shape[2])
        if needs_points:
            launch(
                gradient_kernels.point_gradients, args.point_programs, *args.point_walk,
                dropout, *args.heads, stats, grad_rows, heads(grad_k), heads(grad_v), scale,
                **constants, ROWS=args.point_rows, LIST_BLOCK=LIST_BLOCK,
            )  # fmt: skip
        if cell_gradients is not None:
            del constants["BLOCK"]
            grad_background[1] = _key_gradients_of_cells(
                args, dropout, stats, grad_rows, scale, constants
            )
            grad_background[2] = _value_gradients_of_cells(args, cell_gradients.weights, grad_rows)
    return grad_q, grad_k, grad_v, grad_background


def _find_stats(
    out: Rows, grad_out: Rows, lse: Tensor, grad_lse: Rows, stats: Tensor, width: int
) -> None:
    (n_queries, n_heads), padded = lse.shape, power_of_2(width)
    block = max(1, min(32, 2048 // padded))  # two such blocks fit in registers
    launch(
        gradient_kernels.find_stats, cdiv(n_queries, block) * n_heads, out, grad_out, lse,
        grad_lse, stats, n_queries, n_heads,
        VALUE_WIDTH=width, VALUE_PADDED=padded, BLOCK=block, num_warps=1,
    )  # fmt: skip


def _key_gradients_of_cells(
    args: AttentionArguments, dropout: Dropout | None, stats: Tensor, grad_out: Rows,
    scale: float, constants: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The gradient of the background's keys. Sums of parts of the queries are added in order."""
    key = args.background[1]
    n_parts = min(_PARTS, cdiv(stats.shape[1], TILE))
    parts = stats.new_empty(n_parts, *key.shape)
    n_slices = slices_per_level(args.sizes, args.dim)
    n_blocks = sum(n * cdiv(size, _CELLS) for n, size in zip(n_slices, args.sizes, strict=True))
    launch(
        background_kernels.cell_key_gradients, n_blocks * n_parts * args.n_heads,
        *args.query_walk, args.cells, dropout,
        stats, grad_out, heads(parts.flatten(0, 1)), scale,
        n_parts, len(key), **constants, ROWS=TILE, CELLS=_CELLS,
    )  # fmt: skip
    return parts.sum(0).to(key.dtype)


def _value_gradients_of_cells(
    args: AttentionArguments, weight_sums: Tensor, grad_out: Rows
) -> Tensor:
    """The gradient of the background's values, from the queries of each image, also in order."""
    value, tiles = args.background[2], args.query_tiles
    # The traversal lists queries of no image first, then the images one after another.
    groups = tiles.row_groups[0][tiles.traversal.long()]
    images = groups.div(args.n_levels, rounding_mode="floor")
    bounds = torch.searchsorted(images, torch.arange(len(value) + 1, device=value.device))
    n_parts = min(cdiv(_PARTS, max(len(value), 1)), cdiv(len(weight_sums), 32))
    parts = weight_sums.new_empty(*value.shape[:2], n_parts, *value.shape[2:])
    launch(
        background_kernels.cell_value_gradients, math.prod(parts.shape[:-1]),
        tiles.traversal, bounds, weight_sums, grad_out, heads(parts.flatten(0, 2)),
        args.n_levels, args.n_heads, n_parts,
        WIDTH=value.shape[3], PADDED=power_of_2(value.shape[3]), BLOCK=32, num_warps=1,
    )  # fmt: skip
    return parts.sum(2).to(value.dtype)


def _tokens(width: int) -> int:
    """How many tokens of this head width a program rotates."""
    return max(8, 2048 // power_of_2(width))


def rotate(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """See `backends.ops`."""
    out = x.new_empty(x.shape)
    n, n_heads, width = x.shape
    block = _tokens(width)
    with on_device_of(x):
        launch(
            rotary_kernels.rotate, cdiv(n, block) * n_heads, heads(x), coordinates,
            frequencies, heads(out), n, coordinates.shape[1], n_heads,
            PAIRS=width // 2, PADDED=power_of_2(width // 2), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def rotate_backward(
    grad_out: Tensor, out: Tensor, coordinates: Tensor, frequencies: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backends.ops`; the gradients of x, of coordinates and of frequencies."""
    n, n_heads, width = out.shape
    block, n_coordinates = _tokens(width), coordinates.shape[1]
    grad_x, grad_coordinates = out.new_empty(out.shape), torch.empty_like(coordinates)
    parts = frequencies.new_empty(cdiv(n, block), *frequencies.shape, dtype=torch.float64)
    with on_device_of(out):
        launch(
            rotary_kernels.rotate_backward, len(parts), heads(grad_out), heads(out),
            coordinates, frequencies, heads(grad_x), grad_coordinates, parts,
            n, n_coordinates, n_heads, PAIRS=width // 2, PADDED=power_of_2(width // 2),
            AXES=power_of_2(n_coordinates), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return grad_x, grad_coordinates, parts.sum(0).to(frequencies.dtype)


def find_lists(
    tiles: list[Tensor], sizes: list[int], position_dim: int, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backends.ops`."""
    check_runs(tiles, sizes, position_dim, rows)
    counts, row_groups, column_groups = tiles[4], tiles[5], tiles[7]
    n_tiles, row_levels = counts.shape[:2]
    slots = sum(size**position_dim for size in sizes)
    space = list_space(n_tiles, rows, slots)
    lists = counts.new_empty(n_tiles, 2)
    items, members = (counts.new_empty(space * LIST_BLOCK) for _ in range(2))
    walk = walk_of(
        Tiles(*[*tiles, lists, items, members]), sizes, position_dim,
        row_groups.shape[1], column_groups.shape[1], n_heads=1,
    )  # fmt: skip
    with on_device_of(counts):
        launch(
            list_kernels.place_lists, min(n_tiles, 1), counts, lists, n_tiles, walk.n_columns,
            space, ROW_LEVELS=row_levels, BLOCK=LIST_BLOCK, CHUNK=1024, num_warps=4,
        )  # fmt: skip
        launch(
            list_kernels.write_lists, n_tiles, *walk, lists, items, members, DIM=position_dim,
            LEVELS=len(sizes), ROW_LEVELS=row_levels, COLUMN_LEVELS=len(column_groups),
            ROWS=rows, BLOCK=LIST_BLOCK, num_warps=1,
        )  # fmt: skip
    return lists, items, members


def _dropout(seed: Tensor | None, rate: float, copies: Tensor) -> Dropout | None:
    if seed is None:
        return None
    return Dropout(seed, int(rate * 2**32), 1 / (1 - rate), copies, len(copies))


KERNELS: dict[str, Callable[..., Any]] = {
    "neighborhood_attention": attend,
    "neighborhood_attention_backward": attend_backward,
    "rotate": rotate,
    "rotate_backward": rotate_backward,
    "find_query_slices": plan_ops.find_query_slices,
    "find_point_slices": plan_ops.find_point_slices,
    "find_runs": plan_ops.find_runs,
    "find_lists": find_lists,
}
