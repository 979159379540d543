"""Checks of the plan that `triton.attend` hands to the attention ops."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._utils.checks import refuse
from ..op_checks import check_dense, check_dims, check_number
from ..types import Tiles

_N_TILES = len(Tiles._fields)
_N_OTHERS = 5  # flags, starts, stops, point_columns, copies


def check_plan(
    plan: Sequence[Tensor], q: Tensor, k: Tensor, neighborhood_sizes: Sequence[int],
    position_dim: int,
) -> None:  # fmt: skip
    """Raises ValueError unless the tensors of ``plan`` fit q, k and the windows."""
    check_number("plan", plan, _N_TILES + _N_OTHERS, 2 * _N_TILES + _N_OTHERS)
    n_slices = [size ** (position_dim - 1) for size in neighborhood_sizes]
    queries, points, n_levels = len(q), len(k), len(neighborhood_sizes)
    sides = (queries, n_levels), (points, 1)
    _check_tiles("plan.query_tiles", plan[:_N_TILES], *sides, sum(n_slices), position_dim, q)
    flags, starts, stops, point_columns, copies, *point_tiles = plan[_N_TILES:]
    check_dense("plan.flags", flags, k.shape[:2], torch.float32, q.device)
    check_dims("plan.copies", copies, 1)
    shapes = {
        "starts": (starts, (queries, sum(n_slices))),
        "stops": (stops, (queries, sum(n_slices))),
        "point_columns": (point_columns, (points,)),
        "copies": (copies, (min(len(copies), points),)),
    }
    for name, (x, shape) in shapes.items():
        check_dense(f"plan.{name}", x, shape, torch.int32, q.device)
    if point_tiles:
        sides = sides[::-1]
        _check_tiles("plan.point_tiles", point_tiles, *sides, max(n_slices), position_dim, q)


def _check_tiles(
    name: str, tensors: Sequence[Tensor], rows: tuple[int, int], columns: tuple[int, int],
    n_slices: int, position_dim: int, q: Tensor,
) -> None:  # fmt: skip
    """``rows`` and ``columns`` are each a number of rows and of the levels that these are at;
    ``n_slices`` is the number of slices of a row.
    """
    tiles = Tiles(*tensors)
    (n_rows, row_levels), (n_columns, column_levels) = rows, columns
    check_dims(f"{name}.firsts", tiles.firsts, 2)
    n_tiles, capacity = tiles.firsts.shape
    height = capacity // n_slices
    if height < 1 or capacity % n_slices or n_tiles != -(-n_rows // height):
        expected = f"space for the {n_slices} slices of each of {n_rows} rows"
        refuse(f"{name}.firsts", expected, tiles.firsts)
    shapes: dict[str, tuple[int, ...]] = {
        "traversal": (n_rows,),
        "order": (n_columns * column_levels,),
        "firsts": (n_tiles, capacity),
        "shifts": (n_tiles, capacity),
        "counts": (n_tiles, row_levels, 2),
        "row_groups": (row_levels, n_rows),
        "row_cells": (row_levels, position_dim, n_rows),
        "column_groups": (column_levels, n_columns),
        "column_cells": (column_levels, position_dim, n_columns),
    }
    for field, shape in shapes.items():
        check_dense(f"{name}.{field}", getattr(tiles, field), shape, torch.int32, q.device)
