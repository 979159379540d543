"""The ops of `backends.ops` in Triton: their outputs, and the launches that fill them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import list_space, new_bias_gradient, new_coordinate_gradient, new_gradients
from ..types import LIST_BLOCK, Tiles, WindowTables
from . import attention as attention_kernels
from . import background as background_kernels
from . import bias as bias_kernels
from . import bias_gradients as bias_gradient_kernels
from . import gradients as gradient_kernels
from . import lists as list_kernels
from . import plan_ops
from . import rotary as rotary_kernels
from .background import CellGradients, CellKeyGradients
from .bias import Bias
from .checks import check_plan, check_runs
from .launch import (
    INTERPRETS,
    AttentionArguments,
    cdiv,
    heads,
    launch,
    new_for_tuple,
    on_device_of,
    power_of_2,
    walk_of,
    window_arguments,
    window_constants,
)
from .parts import Dropout, Rows
from .sampling import ops as sampling_ops
from .sampling.ops import sum_by_image

__all__ = ["INTERPRETS", "KERNELS"]

_PARTS = 64  # into which a sum over all queries is split
_PART_ROWS = 16  # queries of such a part at a time
_BIAS_PARTS = 512  # into which the sums of the bias' gradient are split at most
_BIAS_SUMS = 2**24  # numbers of all parts of these, unless one part has more
_NUMBERED = 256  # queries and points of a program of `bias.number_cells`
_CELLS = 16  # of a window in a block: bits of a word, and the minimum size of `tl.dot`


def attend(
    q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, seed: Tensor | None,
    background: list[Tensor], bias: Tensor | None, plan: list[Tensor], slices: list[int],
    scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `backends.ops`; `triton.attend` makes the list ``plan``."""
    check_plan(plan, slices, q, k)
    plain = seed is None and bias is None
    q = q if scale >= 0 else -q
    args = AttentionArguments(q, k, v, query_mask, background, plan, slices, plain)
    out = q.new_empty(*q.shape[:2], v.shape[2])
    lse = q.new_empty(q.shape[:2], dtype=torch.float32)
    with on_device_of(q):
        launch(
            attention_kernels.attend, args.query_grid.n_programs, *args.query_walk, args.cells,
            _dropout(seed, dropout_p, args), _bias(bias, args), *args.heads, heads(out), lse,
            scale, **args.constants, HAS_DROPOUT=seed is not None, HAS_BIAS=bias is not None,
            HAS_BACKGROUND=bool(background), **args.query_grid.constants(), CELLS=_CELLS,
            LIST_BLOCK=LIST_BLOCK,
        )  # fmt: skip
    return out, lse


def attend_backward(
    grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    query_mask: Tensor | None, seed: Tensor | None, background: list[Tensor], bias: Tensor | None,
    plan: list[Tensor], slices: list[int], scale: float, dropout_p: float,
    needs_queries: bool, needs_points: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    """See `backends.ops`; the gradients of q, k, v, the background and the bias."""
    check_plan(plan, slices, q, k)
    plain = seed is None and bias is None
    args = AttentionArguments(q, k, v, query_mask, background, plan, slices, plain)
    grad_q, grad_k, grad_v = new_gradients(q, k, v, needs_queries, needs_points)
    grad_background = [x.new_empty(x.shape) for x in background if needs_queries]
    with on_device_of(q):
        backward = _Backward(
            args, heads(grad_out), lse.new_empty(args.n_heads, len(lse), 2),
            _dropout(seed, dropout_p, args), _bias(bias, args), scale,
        )  # fmt: skip
        grad_lse_rows, cell_gradients = heads(grad_lse.unsqueeze(2)), None
        if grad_background:
            weight_sums = lse.new_empty(len(lse), args.n_levels, args.n_heads)
            of_queries = new_for_tuple(q, len(lse) * args.n_levels, *q.shape[1:])
            cell_gradients = CellGradients(heads(of_queries), weight_sums)
        if needs_queries:
            launch(
                gradient_kernels.query_gradients, args.query_grid.n_programs, *args.query_walk,
                args.cells, *backward.options(), *args.heads, lse, heads(out), backward.grad_out,
                grad_lse_rows, backward.stats, heads(grad_q), cell_gradients, scale,
                **backward.constants(), **args.query_grid.constants(),
                HAS_BACKGROUND=bool(background), CELLS=_CELLS, LIST_BLOCK=LIST_BLOCK,
            )  # fmt: skip
        else:
            _find_stats(
                heads(out), backward.grad_out, lse, grad_lse_rows, backward.stats, v.shape[2]
            )
        if needs_points:
            launch(
                gradient_kernels.point_gradients, args.point_grid.n_programs, *args.point_walk,
                *backward.options(), *args.heads, backward.stats, backward.grad_out,
                heads(grad_k), heads(grad_v), scale,
                **backward.constants(), **args.point_grid.constants(), LIST_BLOCK=LIST_BLOCK,
            )  # fmt: skip
        bias_sums = []
        if bias is not None and needs_queries:
            bias_sums.append(_bias_gradient_of_pairs(backward))
        if cell_gradients is not None:
            grad_background[0] = of_queries.reshape(background[0].shape).contiguous()
            grad_background[1], bias_of_cells = _key_gradients_of_cells(backward)
            grad_background[2] = _value_gradients_of_cells(
                args, cell_gradients.weights, backward.grad_out
            )
            bias_sums += bias_of_cells
    if not bias_sums:
        return grad_q, grad_k, grad_v, grad_background, new_bias_gradient(q, bias, needs_queries)
    grad_bias = sum(bias_sums[1:], start=bias_sums[0]).to(q.dtype)
    return grad_q, grad_k, grad_v, grad_background, grad_bias


class _Backward(NamedTuple):
    """What the kernels of backward passes have in common."""

    args: AttentionArguments
    grad_out: Rows  # [N, H, dv]
    stats: Tensor  # float32 [H, N, 2], see `parts.stats_ptrs`
    dropout: Dropout | None
    bias: Bias | None
    scale: float

    def options(self) -> tuple[Dropout | None, Bias | None]:
        return self.dropout, self.bias

    def constants(self) -> dict[str, Any]:
        given = {"HAS_DROPOUT": self.dropout is not None, "HAS_BIAS": self.bias is not None}
        return {**self.args.constants, **given}


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


def _key_gradients_of_cells(backward: _Backward) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the background's keys, and that of the bias ``[K, H]`` from empty cells, if
    there is a bias. Sums of parts of the queries are added in order.
    """
    args, stats, key = backward.args, backward.stats, backward.args.background[1]
    n_parts = min(_PARTS, cdiv(stats.shape[1], _PART_ROWS))
    parts, bias_parts = new_for_tuple(stats, n_parts * len(key), *key.shape[1:]), None
    if backward.bias is not None:
        bias_parts = stats.new_empty(n_parts, *key.shape[:2])
    constants = backward.constants()
    del constants["BLOCK"], constants["BALL_ROWS"]
    launch(
        background_kernels.cell_key_gradients, sum(args.slices) * n_parts * args.n_heads,
        *args.query_walk, args.cells, *backward.options(), stats, backward.grad_out,
        CellKeyGradients(heads(parts), bias_parts), backward.scale, n_parts,
        **constants, ROWS=_PART_ROWS, CELLS=_CELLS, num_warps=args.n_warps(_PART_ROWS),
    )  # fmt: skip
    bias_sums = [] if bias_parts is None else [bias_parts.sum(0)]
    return parts.unflatten(0, (n_parts, len(key))).sum(0).to(key.dtype), bias_sums


def _bias_gradient_of_pairs(backward: _Backward) -> Tensor:
    """The gradient of the bias ``[K, H]`` from pairs of queries and points, float32."""
    args, bias, grid = backward.args, backward.bias, backward.args.query_grid
    assert bias is not None
    own = args.n_heads * grid.rows * bias.n_slots  # sums of a part
    n_parts = max(1, min(grid.n_parts, _BIAS_PARTS, _BIAS_SUMS // max(own, 1)))
    sums = backward.stats.new_zeros(n_parts, args.n_heads, grid.rows, bias.n_slots)
    constants = backward.constants()
    del constants["HAS_BIAS"]
    launch(
        bias_gradient_kernels.bias_gradients, n_parts * args.n_heads, *args.query_walk,
        *backward.options(), *args.heads, backward.stats, backward.grad_out, sums, backward.scale,
        grid.n_parts, n_parts, **constants, **grid.constants(), LIST_BLOCK=LIST_BLOCK,
    )  # fmt: skip
    return sums.sum((0, 2)).t()


def _value_gradients_of_cells(
    args: AttentionArguments, weight_sums: Tensor, grad_out: Rows
) -> Tensor:
    """The gradient of the background's values, from the queries of each image, also in order."""
    value, tiles = args.background[2], args.query_tiles
    # The traversal lists queries of no image first, then the images one after another.
    traversal = tiles.traversal.clamp(0, len(weight_sums) - 1)  # it may have been tampered with
    groups = tiles.row_groups[0][traversal.long()]
    images = groups.div(args.n_levels, rounding_mode="floor")
    bounds = torch.searchsorted(images, torch.arange(len(value) + 1, device=value.device))
    found = sum_by_image(traversal, bounds, weight_sums, grad_out, value.shape[3])
    return found.to(value.dtype)


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
            frequencies, heads(out), n, n_heads, COORDINATES=coordinates.shape[1],
            PAIRS=width // 2, PADDED=power_of_2(width // 2), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out


def rotate_backward(
    grad_out: Tensor, out: Tensor, coordinates: Tensor, frequencies: Tensor,
    needs_coordinates: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `backends.ops`; the gradients of x, of coordinates and of frequencies."""
    n, n_heads, width = out.shape
    block, n_coordinates = _tokens(width), coordinates.shape[1]
    grad_x = out.new_empty(out.shape)
    grad_coordinates = new_coordinate_gradient(coordinates, needs_coordinates)
    parts = frequencies.new_empty(cdiv(n, block), *frequencies.shape, dtype=torch.float64)
    with on_device_of(out):
        launch(
            rotary_kernels.rotate_backward, len(parts), heads(grad_out), heads(out),
            coordinates, frequencies, heads(grad_x), grad_coordinates, parts,
            n, n_heads, COORDINATES=n_coordinates, PAIRS=width // 2, PADDED=power_of_2(width // 2),
            AXES=power_of_2(n_coordinates), NEEDS_COORDINATES=needs_coordinates, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
    return grad_x, grad_coordinates, parts.sum(0).to(frequencies.dtype)


def find_lists(
    tiles: list[Tensor], windows: list[Tensor], slices: list[int], n_cells: int, rows: int,
    rows_are_queries: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `backends.ops`."""
    check_runs(tiles, windows, slices, rows, rows_are_queries)
    counts, row_groups, column_groups = tiles[4], tiles[5], tiles[7]
    n_tiles, row_levels = counts.shape[:2]
    space = list_space(n_tiles, rows, n_cells)
    lists = counts.new_empty(n_tiles, 2)
    items, members = (counts.new_empty(space * LIST_BLOCK) for _ in range(2))
    tables = WindowTables(*windows)
    walk = walk_of(
        Tiles(*[*tiles, lists, items, members]), window_arguments(tables, slices),
        row_groups.shape[1], column_groups.shape[1], n_heads=1,
    )  # fmt: skip
    with on_device_of(counts):
        launch(
            list_kernels.place_lists, min(n_tiles, 1), counts, lists, n_tiles, walk.n_columns,
            space, ROW_LEVELS=row_levels, BLOCK=LIST_BLOCK, CHUNK=4096, num_warps=16,
        )  # fmt: skip
        launch(
            list_kernels.write_lists, n_tiles, *walk, lists, items, members,
            **window_constants(tables, slices), ROWS_ARE_QUERIES=rows_are_queries,
            ROWS=rows, BLOCK=LIST_BLOCK, num_warps=1,
        )  # fmt: skip
    return lists, items, members


def _dropout(seed: Tensor | None, rate: float, args: AttentionArguments) -> Dropout | None:
    if seed is None:
        return None
    return Dropout(seed, int(rate * 2**32), 1 / (1 - rate), args.query_ids, args.column_ids)


def _bias(bias: Tensor | None, args: AttentionArguments) -> Bias | None:
    """``bias`` ``[K, H]`` with what tells the slots of pairs."""
    if bias is None:
        return None
    tiles, slots = args.query_tiles, args.tables.box_slots
    (n_levels, dim, n_queries), n_points = tiles.row_cells.shape, tiles.column_groups.shape[1]
    query_numbers, point_numbers = (
        tiles.order.new_empty(shape) for shape in ((n_levels, n_queries), (n_points,))
    )
    launch(
        bias_kernels.number_cells, cdiv(max(n_queries, n_points), _NUMBERED), tiles.row_cells,
        tiles.column_groups, tiles.column_cells, args.tables.levels, query_numbers, point_numbers,
        n_queries, n_points, DIM=dim, LEVELS=n_levels, BLOCK=_NUMBERED, num_warps=4,
    )  # fmt: skip
    return Bias(
        bias.contiguous(), query_numbers, point_numbers, slots if len(slots) else None,
        len(bias), len(slots),
    )  # fmt: skip


KERNELS: dict[str, Callable[..., Any]] = {
    "neighborhood_attention": attend,
    "neighborhood_attention_backward": attend_backward,
    "rotate": rotate,
    "rotate_backward": rotate_backward,
    "find_query_slices": plan_ops.find_query_slices,
    "find_point_slices": plan_ops.find_point_slices,
    "find_runs": plan_ops.find_runs,
    "find_lists": find_lists,
    **sampling_ops.KERNELS,
}
