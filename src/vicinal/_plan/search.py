"""How a plan's tensors are found: in plain torch, or by the kernels of a back end."""

from typing import Any

import torch
from torch import Tensor

from .._index.cell_keys import CellKeys
from .._index.copies import PointCopies, find_copies
from .._index.kernel_tables import KernelTables, kernel_tables
from .._index.tiles import GroupedCells
from .._utils.constants import constant
from ..backends.types import Backend, NeighborSlices, PlanTensors, row_table
from ..pyramid import FeaturePyramid
from ..window_shapes import Windows
from ..windows import coordinate_dtype, dtype_of_centers, position_dtype, wrap_positions
from .keyed_cells import KeyedCells, Queries, query_cells


def key_coordinates_name(dtype: torch.dtype) -> str:
    """The name by which layers share the coordinates of keys, see `shared_by_layers`."""
    return f"key coordinates in {dtype}"


def find_plan(
    queries: Queries,
    pyramid: FeaturePyramid,
    windows: Windows,
    backend: Backend,
) -> tuple[PointCopies, PlanTensors, KeyedCells, dict[str, Any]]:
    """What a plan holds, and what its cache may hold already.

    Args:
        queries, pyramid: queries and points, as `check_placement` returns them.
        windows: of each level.
        backend: whose kernels find it, if it has some for planning and int32 suffices.
    """
    geometry = pyramid.level_shapes, windows, pyramid.batch_size
    tables = kernel_tables(*geometry, pyramid.periodic_axes) if backend.find_query_slices else None
    n_keys = pyramid.coordinates.shape[0] << len(pyramid.periodic_axes)
    if tables is not None and tables.fits(queries.positions.shape[0], n_keys):
        return _find_by_kernels(queries, pyramid, windows, backend, tables)
    return *_find_in_torch(queries, pyramid, windows, backend), {}


def _column_ids(copies: PointCopies, pyramid: FeaturePyramid) -> Tensor | None:
    """`PlanTensors.column_ids` of a plan in which points count as their rows."""
    if not pyramid.periodic_axes:
        return None
    rows = torch.arange(pyramid.coordinates.shape[0] + 1, device=pyramid.coordinates.device)
    return join_column_ids(rows, copies)


def join_column_ids(ids: Tensor, copies: PointCopies) -> Tensor:
    """`PlanTensors.column_ids` from ``ids`` of the points and, last, of the first empty cell."""
    return torch.cat((ids[:-1], ids[copies.points], ids[-1:])).int()


def _without_invalid(
    starts: Tensor, stops: Tensor, image: Tensor, pyramid: FeaturePyramid
) -> Tensor:
    """``stops`` ``[N, R]`` such that invalid queries, of ``image`` -1, have no neighbors.

    Their windows lie beyond the map, where there are points only along periodic axes: copies.
    """
    if not pyramid.periodic_axes:
        return stops
    return torch.where(image[:, None] < 0, starts, stops)


def _find_in_torch(
    queries: Queries,
    pyramid: FeaturePyramid,
    windows: Windows,
    backend: Backend,
) -> tuple[PointCopies, PlanTensors, KeyedCells]:
    """What a plan holds, found in plain torch on any device."""
    device = pyramid.coordinates.device
    keys = CellKeys(pyramid.level_shapes, windows, pyramid.batch_size, device)
    image, anchors = query_cells(queries, pyramid, windows)
    first_cells = keys.first_cells(anchors)
    levels = torch.arange(pyramid.n_levels, device=device)[:, None]
    query_keys = keys.of(first_cells, levels, image.clamp(min=0))

    misplaced = pyramid.misplaced()
    coordinates = pyramid.coordinates.long().masked_fill(misplaced[:, None], 0)
    copies = find_copies(coordinates, misplaced, pyramid, windows)
    copied = coordinates[copies.points]
    copied[:, 1:-1] += copies.shifts
    coordinates = torch.cat((coordinates, copied))
    cells = keys.key_cells(coordinates[:, 1:-1], coordinates[:, -1])
    point_keys = keys.of(cells, coordinates[:, -1], coordinates[:, 0])
    # Misplaced points, which have no copies, sort to the front, outside every window.
    point_keys[: misplaced.shape[0]].masked_fill_(misplaced, -1)

    sorted_points, order = torch.sort(point_keys, stable=True)
    finest = keys.layout.finest
    shape = constant(pyramid.level_shapes[finest], device)
    curve = keys.along_curve(torch.minimum(anchors[finest], shape), image)
    traversal = torch.argsort(curve, stable=True).int()
    starts, stops = backend.find_slices(sorted_points, query_keys, traversal, *keys.window_rows())
    stops = _without_invalid(starts, stops, image, pyramid)
    tensors = PlanTensors(
        query_slices=NeighborSlices(traversal, starts, stops, order.int()),
        query_batch=image.int(),
        first_columns=first_cells[..., -1].t().int().contiguous(),
        point_columns=cells[order, -1].int(),
        windows=windows,
        window_rows=row_table(windows, device),
        column_ids=_column_ids(copies, pyramid),
    )
    placed = queries.positions.detach().clone(), queries.levels
    return copies, tensors, KeyedCells(first_cells, query_keys, point_keys, coordinates, *placed)


def _find_by_kernels(
    queries: Queries,
    pyramid: FeaturePyramid,
    windows: Windows,
    backend: Backend,
    tables: KernelTables,
) -> tuple[PointCopies, PlanTensors, KeyedCells, dict[str, Any]]:
    """What `_find_in_torch` finds, by the kernels of a back end, and what the plan's cache may
    hold already.
    """
    assert backend.find_query_slices is not None
    positions, offsets, _ = queries
    coordinates, dtype = pyramid.coordinates, coordinate_dtype(positions.dtype)
    dtype = position_dtype(pyramid.level_shapes, dtype)
    if pyramid.periodic_axes:
        misplaced = pyramid.misplaced()
        masked = coordinates.masked_fill(misplaced[:, None], 0)
        copies = find_copies(masked, misplaced, pyramid, windows)
        wrapped = positions.detach().to(dtype_of_centers(positions, pyramid.level_shapes))
        wrapped = wrap_positions(wrapped, pyramid.level_shapes, pyramid.periodic_axes)
    else:
        copies, wrapped = PointCopies(coordinates[:0, 0], coordinates[:0, 1:-1]), positions.detach()
    levels, slots, _ = tables.on(positions.device, tables.layout.key_dtype)
    found = backend.find_query_slices(
        wrapped, offsets, coordinates, *copies, levels, slots, tables.numbers,
        tables.layout.key_dtype, dtype,
    )  # fmt: skip
    stops = _without_invalid(found.starts, found.stops, found.query_batch, pyramid)
    tensors = PlanTensors(
        query_slices=NeighborSlices(found.traversal, found.starts, stops, found.order),
        query_batch=found.query_batch,
        first_columns=found.first_columns,
        point_columns=found.point_columns,
        windows=windows,
        window_rows=row_table(windows, positions.device),
        column_ids=_column_ids(copies, pyramid),
    )
    cells = KeyedCells(
        found.query_cells.transpose(1, 2),
        found.query_keys,
        found.sort_keys[: found.order.shape[0]],
        found.coordinates,
        positions.detach().clone(),
        None,
    )
    cache = {
        "query_cells": GroupedCells(found.query_groups, found.query_cells),
        "point_cells": GroupedCells(found.point_groups, found.point_cells),
        key_coordinates_name(dtype): found.key_coordinates,
    }
    return copies, tensors, cells, cache
