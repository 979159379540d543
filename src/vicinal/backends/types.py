"""What back ends are given: plain tensors and numbers."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

FindRuns = Callable[..., tuple[Tensor, Tensor, Tensor]]  # see `backends.reference.find_runs`

TILE = 16  # rows of a tile: the least that a matrix unit takes


class NeighborSlices(NamedTuple):
    """One direction of a plan: row ``i`` sees ``order[starts[i, r]:stops[i, r]]`` for every r.

    ``traversal`` lists the rows so that neighbors in it are neighbors in space: whoever walks the
    rows in this order finds what they share in the cache. All are int32.
    """

    traversal: Tensor
    starts: Tensor
    stops: Tensor
    order: Tensor


class Tiles(NamedTuple):
    """One direction of a plan, tile by tile, int32: T tiles of n rows, which see some of m others.

    Attributes:
        traversal: ``[n]``, the rows: a tile is some that stand side by side here.
        order: the columns: all others, once for each level they are at.
        firsts, shifts: ``[T, C]``, the runs, ``C`` being what it takes if none were joined. Those
            of a level begin where the slices of a tile's rows at the levels before it would end.
        counts: ``[T, S, 2]``, how many runs there are and how many entries they have.
        row_groups, row_cells, column_groups, column_cells: the `GroupedCells` of rows and others.
    """

    traversal: Tensor
    order: Tensor
    firsts: Tensor
    shifts: Tensor
    counts: Tensor
    row_groups: Tensor
    row_cells: Tensor
    column_groups: Tensor
    column_cells: Tensor
