"""The ops of `backends.ops` that make plans, in Triton: their outputs, and their launches."""

import itertools

import torch
from torch import Tensor

from .. import reference
from . import plan as kernels
from .launch import cdiv, launch, on_device_of

LARGEST_SORT = 2048  # slices of a tile at a level; larger sorts take long to compile
_BLOCK = 256  # queries, points or keys of a program
_WARPS = 4
_SLICES = 512  # slices of a program of one warp: each lane waits for 16 loads at once


def find_query_slices(
    positions: Tensor, offsets: Tensor, coordinates: Tensor, copies: Tensor, shifts: Tensor,
    levels: Tensor, slots: Tensor, numbers: list[int], key_dtype: torch.dtype,
    coordinate_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """See `backends.ops`."""
    n_images, n_keys, n_bits, finest, double, width = numbers
    (n_queries, dim), n_levels, n_slots = positions.shape, len(levels), len(slots)
    n_points, n_rows = len(coordinates), len(coordinates) + len(copies)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return positions.new_empty(shape, dtype=dtype)

    images, groups = new(n_queries), new(n_levels, n_queries)
    cells, columns = new(n_levels, dim, n_queries), new(n_queries, n_levels)
    query_keys = new(n_levels, n_queries, dtype=key_dtype)
    placed, point_groups = new(n_rows, dim + 2), new(1, n_rows)
    key_coordinates = new(n_rows, dim + 1, dtype=coordinate_dtype)
    point_cells, sort_keys = new(1, dim, n_rows), new(n_rows + n_queries, dtype=key_dtype)
    sizes = {"DIM": dim, "LEVELS": n_levels, "BLOCK": _BLOCK, "num_warps": _WARPS}
    with on_device_of(positions):
        launch(
            kernels.place_queries, cdiv(n_queries, _BLOCK), positions, offsets, levels, images,
            groups, cells, columns, query_keys, sort_keys, *positions.stride(),
            n_queries, n_rows, len(offsets), n_images, n_keys, n_bits,
            FINEST=finest, DOUBLE=bool(double) or positions.dtype == torch.float64, **sizes,
        )  # fmt: skip
        launch(
            kernels.place_points, cdiv(n_rows, _BLOCK), coordinates, copies, shifts, levels,
            key_coordinates, placed, point_groups, point_cells, sort_keys, *coordinates.stride(),
            n_points, n_rows, n_images, **sizes,
        )  # fmt: skip
        ordered, indices = torch.sort(sort_keys, stable=True)
        order, traversal, point_columns = new(n_rows), new(n_queries), new(n_rows)
        launch(
            kernels.split_order, cdiv(max(n_rows, n_queries), _BLOCK), indices, order, traversal,
            point_cells, point_columns, n_rows, n_queries, max(n_rows, 1),
            DIM=dim, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        starts, stops = new(n_queries, n_slots), new(n_queries, n_slots)
        _search(ordered, query_keys, None, slots, starts, stops, n_rows, width, 1)
    return [
        images, groups, cells, columns, query_keys, key_coordinates, placed,
        point_groups, point_cells, sort_keys, traversal, starts, stops, order, point_columns,
    ]  # fmt: skip


def find_point_slices(
    query_keys: Tensor, point_keys: Tensor, groups: Tensor, cells: Tensor, slots: Tensor,
    numbers: list[int], n_levels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `backends.ops`."""
    n_images, n_keys, n_bits, _, _, width = numbers
    n_rows, n_queries, n_slots = groups.shape[1], query_keys.shape[1], len(slots) // n_levels
    sort_keys = query_keys.new_empty(query_keys.numel() + n_rows)
    traversal, order = groups.new_empty(n_rows), groups.new_empty(query_keys.numel())
    starts, stops = groups.new_empty(n_rows, n_slots), groups.new_empty(n_rows, n_slots)
    n_programs = cdiv(max(len(order), n_rows), _BLOCK)
    with on_device_of(groups):
        launch(
            kernels.place_along_curve, n_programs, query_keys, groups, cells, sort_keys,
            len(order), n_rows, n_images, n_keys, n_bits,
            DIM=cells.shape[1], LEVELS=n_levels, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        ordered, indices = torch.sort(sort_keys, stable=True)
        launch(
            kernels.split_order, n_programs, indices, order, traversal, None, None,
            len(order), n_rows, max(n_queries, 1),
            DIM=0, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
        _search(ordered, point_keys, groups, slots, starts, stops, len(order), width, n_levels)
    return traversal, starts, stops, order


def _search(
    ordered: Tensor, keys: Tensor, groups: Tensor | None, slots: Tensor, starts: Tensor,
    stops: Tensor, n_sorted: int, width: int, n_levels: int,
) -> None:  # fmt: skip
    """Launches `plan.find_slices` among the first ``n_sorted`` keys of ``ordered``."""
    (n_rows, n_slots), n_key_rows = starts.shape, len(keys) if keys.dim() > 1 else 1
    launch(
        kernels.find_slices, cdiv(starts.numel(), _SLICES), ordered, keys, groups, slots,
        starts, stops, n_sorted, n_key_rows, n_rows, starts.numel(), min(width, max(n_sorted, 1)),
        SLOTS=n_slots, LEVELS=n_levels, BLOCK=_SLICES, num_warps=1,
    )  # fmt: skip


def find_runs(
    traversal: Tensor, starts: Tensor, stops: Tensor, n_columns: int, slices: list[int], rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `backends.ops`."""
    if rows * max(slices) > LARGEST_SORT:
        return reference.find_runs(traversal, starts, stops, n_columns, slices, rows)
    bounds = tuple(itertools.accumulate(slices, initial=0))
    row_bits = (rows - 1).bit_length()
    bits = tuple(row_bits + (n - 1).bit_length() for n in slices)
    n_tiles, n_levels = cdiv(len(traversal), rows), len(slices)
    firsts = traversal.new_empty(n_tiles, rows * bounds[-1])
    shifts, counts = torch.empty_like(firsts), traversal.new_empty(n_tiles, n_levels, 2)
    with on_device_of(traversal):
        launch(
            kernels.find_runs, n_tiles * n_levels, traversal, starts, stops, firsts, shifts,
            counts, len(traversal), bounds[-1], SLICES=bounds, BITS=bits, LEVELS=n_levels,
            ROWS=rows, ROW_BITS=row_bits, IS_LONG=n_columns << max(bits) >= 2**31,
            num_warps=max(1, min(8, 2 ** max(bits) // 512)),
        )  # fmt: skip
    return firsts, shifts, counts
