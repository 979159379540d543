"""Checks of the tiles that the attention ops and `find_lists` are given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._utils.checks import refuse
from ..op_checks import check_dense, check_dims, check_number, check_windows
from ..types import LIST_BLOCK, Tiles

_N_TILES = len(Tiles._fields)
_RUNS = Tiles._fields[: Tiles._fields.index("lists")]
_N_OTHERS = 4  # starts, stops, point_columns, copies


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
    starts, stops, point_columns, copies, *point_tiles = plan[_N_TILES:]
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


def check_runs(
    tiles: Sequence[Tensor], neighborhood_sizes: Sequence[int], position_dim: int, height: int
) -> None:
    """Raises ValueError unless ``tiles``, the fields of `Tiles` before its lists, fit each other,
    the windows and tiles of ``height`` rows.
    """
    check_windows(neighborhood_sizes, position_dim)
    check_number("tiles", tiles, len(_RUNS))
    for name in ("row_groups", "column_groups"):
        check_dims(f"tiles.{name}", tiles[_RUNS.index(name)], 2)
    fields = dict(zip(_RUNS, tiles, strict=True))
    (row_levels, n_rows), (column_levels, n_columns) = (
        fields[name].shape for name in ("row_groups", "column_groups")
    )
    n_levels, own = len(neighborhood_sizes), [row_levels, column_levels]
    if own not in ([n_levels, 1], [1, n_levels]):
        expected = f"{n_levels} levels of queries, and one of points"
        refuse("tiles.row_groups, tiles.column_groups", expected, f"{own} levels")
    n_slices = [size ** (position_dim - 1) for size in neighborhood_sizes]
    n_own = sum(n_slices) if row_levels == n_levels else max(n_slices)
    device = fields["traversal"].device
    sides = (n_rows, row_levels), (n_columns, column_levels)
    if _check_runs("tiles", tiles, *sides, n_own, position_dim, device)[1] != height:
        refuse("rows", "the height of the tiles", height)


def _check_tiles(
    name: str, tensors: Sequence[Tensor], rows: tuple[int, int], columns: tuple[int, int],
    n_slices: int, position_dim: int, q: Tensor,
) -> None:  # fmt: skip
    """``rows`` and ``columns`` are each a number of rows and of the levels that these are at;
    ``n_slices`` is the number of slices of a row.
    """
    runs, (lists, items, members) = tensors[: len(_RUNS)], tensors[len(_RUNS) :]
    n_tiles, _ = _check_runs(name, runs, rows, columns, n_slices, position_dim, q.device)
    check_dims(f"{name}.items", items, 1)
    space = len(items) // LIST_BLOCK * LIST_BLOCK
    shapes = {"lists": (lists, (n_tiles, 2)), "items": (items, (space,))}
    shapes["members"] = members, (space,)
    for field, (x, shape) in shapes.items():
        check_dense(f"{name}.{field}", x, shape, torch.int32, q.device)


def _check_runs(
    name: str, tensors: Sequence[Tensor], rows: tuple[int, int], columns: tuple[int, int],
    n_slices: int, position_dim: int, device: torch.device,
) -> tuple[int, int]:  # fmt: skip
    """The number of tiles and their height."""
    fields = dict(zip(_RUNS, tensors, strict=True))
    (n_rows, row_levels), (n_columns, column_levels) = rows, columns
    firsts = fields["firsts"]
    check_dims(f"{name}.firsts", firsts, 2)
    n_tiles, capacity = firsts.shape
    height = capacity // n_slices
    if height < 1 or capacity % n_slices or n_tiles != -(-n_rows // height):
        expected = f"space for the {n_slices} slices of each of {n_rows} rows"
        refuse(f"{name}.firsts", expected, firsts)
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
        check_dense(f"{name}.{field}", fields[field], shape, torch.int32, device)
    return n_tiles, height
