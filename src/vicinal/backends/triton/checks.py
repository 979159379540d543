"""Checks of the tiles that the attention ops and `find_lists` are given."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._utils.checks import refuse
from ..op_checks import check_dense, check_dims, check_number, check_slices
from ..types import LIST_BLOCK, Tiles, WindowTables

_N_TILES = len(Tiles._fields)
_RUNS = Tiles._fields[: Tiles._fields.index("lists")]
_N_WINDOWS = len(WindowTables._fields)
_N_OTHERS = 3  # starts, stops, point_columns
_MOST_FITTING = 1024
_fitting: set[Hashable] = set()  # what `check_plan` found to fit


class PlanParts(NamedTuple):
    """What the attention ops' argument ``plan`` lists, one after another."""

    query_tiles: Tiles
    windows: WindowTables
    starts: Tensor
    stops: Tensor
    point_columns: Tensor
    dropout_ids: Sequence[Tensor] = ()
    """See `PlanTensors.dropout_ids`."""
    point_tiles: Tiles | None = None
    """For backward passes that need gradients of points."""

    @property
    def query_ids(self) -> Tensor | None:
        """See `PlanTensors`."""
        return self.dropout_ids[0] if len(self.dropout_ids) > 1 else None

    @property
    def column_ids(self) -> Tensor | None:
        """See `PlanTensors`."""
        return self.dropout_ids[-1] if self.dropout_ids else None

    def tensors(self) -> list[Tensor]:
        """The list."""
        found: list[Tensor] = []
        for part in self:
            if isinstance(part, Tensor):
                found.append(part)
            elif part is not None:
                found.extend(part)  # not +=, which torch 2.11 does not compile
        return found


def plan_parts(plan: Sequence[Tensor]) -> PlanParts:
    """The parts of which `PlanParts.tensors` made the list ``plan``."""
    tiles, rest = Tiles(*plan[:_N_TILES]), plan[_N_TILES:]
    windows, rest = WindowTables(*rest[:_N_WINDOWS]), rest[_N_WINDOWS:]
    starts, stops, point_columns, *rest = rest
    n_ids = len(rest) % _N_TILES
    ids, rest = rest[:n_ids], rest[n_ids:]
    point_tiles = Tiles(*rest) if rest else None
    return PlanParts(tiles, windows, starts, stops, point_columns, ids, point_tiles)


def check_plan(plan: Sequence[Tensor], slices: Sequence[int], q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless the tensors of ``plan`` fit q, k, and windows of ``slices`` rows.

    Layers share a plan, so what fits is looked up from then on: the key holds all that the checks
    read.
    """
    layouts = [(x.shape, x.dtype, x.device, x.is_contiguous()) for x in plan]
    key = tuple(layouts), tuple(slices), q.shape[0], q.device, k.shape[0]
    if key in _fitting:
        return
    _check_plan(plan, slices, q, k)
    if len(_fitting) >= _MOST_FITTING:
        _fitting.clear()
    _fitting.add(key)


def _check_plan(plan: Sequence[Tensor], slices: Sequence[int], q: Tensor, k: Tensor) -> None:
    n_without = _N_TILES + _N_WINDOWS + _N_OTHERS
    numbers = [n_without + n_ids + n for n in (0, _N_TILES) for n_ids in range(3)]
    check_number("plan", plan, *numbers)
    parts = plan_parts(plan)
    dim = _check_windows("plan.windows", parts.windows, slices, q.device)
    queries, points, n_levels, n_slices = len(q), len(k), len(slices), sum(slices)
    sides = (queries, n_levels), (points, 1)
    _check_tiles("plan.query_tiles", parts.query_tiles, *sides, n_slices, dim, q)
    shapes = {
        "starts": (queries, n_slices),
        "stops": (queries, n_slices),
        "point_columns": (points,),
        "query_ids": (queries,),
        "column_ids": (points + 1,),
    }
    for name, shape in shapes.items():
        x = getattr(parts, name)
        if x is not None:
            check_dense(f"plan.{name}", x, shape, torch.int32, q.device)
    if parts.point_tiles is not None:
        _check_tiles("plan.point_tiles", parts.point_tiles, *sides[::-1], max(slices), dim, q)


def check_runs(
    tiles: Sequence[Tensor], windows: Sequence[Tensor], slices: Sequence[int], height: int,
    rows_are_queries: bool,
) -> None:  # fmt: skip
    """Raises ValueError unless ``tiles``, the fields of `Tiles` before its lists, fit each other,
    the windows and tiles of ``height`` rows.
    """
    check_slices(slices)
    check_number("tiles", tiles, len(_RUNS))
    check_number("windows", windows, _N_WINDOWS)
    for name in ("row_groups", "column_groups"):
        check_dims(f"tiles.{name}", tiles[_RUNS.index(name)], 2)
    fields = dict(zip(_RUNS, tiles, strict=True))
    device = fields["traversal"].device
    dim = _check_windows("windows", WindowTables(*windows), slices, device)
    n_rows, n_columns = (fields[name].shape[1] for name in ("row_groups", "column_groups"))
    levels = (len(slices), 1) if rows_are_queries else (1, len(slices))
    sides = (n_rows, levels[0]), (n_columns, levels[1])
    n_own = sum(slices) if rows_are_queries else max(slices)
    if _check_runs("tiles", tiles, *sides, n_own, dim, device)[1] != height:
        refuse("rows", "the height of the tiles", height)


def _check_windows(
    name: str, tables: WindowTables, slices: Sequence[int], device: torch.device
) -> int:
    """The number of dimensions."""
    for field, n_dims in zip(WindowTables._fields, (2, 2, 2, 1), strict=True):
        check_dims(f"{name}.{field}", getattr(tables, field), n_dims)
    dim: int = tables.levels.shape[1] - 2
    if dim < 1:
        refuse(f"{name}.levels", "a column for each of one axis or more, after two", tables.levels)
    shapes = {
        "levels": (len(slices), dim + 2),
        "rows": (sum(slices), 3),
        "box_rows": (len(tables.box_rows), 2),
        "box_slots": (len(tables.box_slots),),
    }
    for field, shape in shapes.items():
        check_dense(f"{name}.{field}", getattr(tables, field), shape, torch.int32, device)
    return dim


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
