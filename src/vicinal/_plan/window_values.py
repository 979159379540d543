"""The values in the windows of a plan's queries, spelled out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._index.cell_keys import CellKeys, KeyLayout
from .._utils.constants import constant
from .._utils.ragged import take_rows
from ..backends.types import PlanTensors, slot_order
from ..window_shapes import Windows
from .keyed_cells import KeyedCells

_BEYOND = 2**62  # no key is as large


def values_in_windows(
    plan: PlanTensors, cells: KeyedCells, keys: CellKeys, values: Tensor
) -> Tensor:
    """``[N, K, C]``: the values of all cells in the windows of each query, row-major, zero in empty
    cells. Queries are valid, and a cell holds one point at most.

    Args:
        plan, cells, keys: those of one plan.
        values: ``[nnz, C]``, of the points and copies.

    With W the width of the widest row of a window, the points are laid out on a line, in the order
    of their keys and as far apart as these, but at most W + 1 places. So every W cells in a row of
    the map are W places of the line, and rows of windows are copied whole. For W = 3:

        keys of the points          7 8   10                 2000 2003
        places on the line  . . . . 7 8 . 10 . . . 2000 . . 2003 . . .
        row from key 9                  `----'
        row from key 500                      `---'
        row from key 1998                       `------'
    """
    level, first, _ = keys.window_rows()
    longest = max(row.width for rows in keys.layout.rows for row in rows)
    starts, order = plan.query_slices.starts, plan.query_slices.order
    point_keys = cells.point_keys[order].long()
    gaps = F.pad(point_keys.diff().clamp(max=longest + 1), (1, 1), value=longest + 1)
    places = gaps.cumsum(0)
    line = values.new_zeros(gaps.shape[0] * (longest + 1), values.shape[1])
    own_places = places[: order.shape[0]]
    line = line.index_copy(0, own_places, values.index_select(0, order))
    # From the first cell of each row to the first point from there on, [N, R].
    (n_queries, n_rows), width, starts = starts.shape, values.shape[1], starts.flatten()
    distance = take_rows(F.pad(point_keys, (0, 1), value=_BEYOND), starts).view(n_queries, n_rows)
    distance -= cells.query_keys.long()[level].t() + first
    row_places = take_rows(places, starts).view(n_queries, n_rows) - distance.clamp_(max=longest)
    rows = take_rows(line.flatten().unfold(0, longest * width, width), row_places.flatten())
    windows = rows.view(n_queries, n_rows * longest, width)
    in_windows = _cells_in_windows(keys.layout, plan.windows, values.device)
    return windows if in_windows is None else windows.index_select(1, in_windows)


def _cells_in_windows(layout: KeyLayout, windows: Windows, device: torch.device) -> Tensor | None:
    """int64 ``[K]``: for each cell of the windows, row-major, its index in rows that all have the
    width of the widest; None for all cells in order.
    """
    rows = [row for rows in layout.rows for row in rows]
    longest = max(row.width for row in rows)
    cells = [index * longest + cell for index, row in enumerate(rows) for cell in range(row.width)]
    order = slot_order(windows, device)
    if order is None:
        return None if len(cells) == len(rows) * longest else constant(cells, device)
    return constant(cells, device)[order.argsort()]
