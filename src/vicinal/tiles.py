"""What neighbors see together: rows by the tile, and what a tile sees as few long runs.

Rows that are neighbors in space see much the same. A back end that takes a tile of them at a time
walks what any of them sees, once, and finds out by coordinates who sees what of it. The union of
a tile's slices is a list of runs: entry ``e`` of it is the column ``e + shifts[i]``, where ``i`` is
the last run with ``firsts[i] <= e``. Most of a tile's slices overlap, so runs are few.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

FindRuns = Callable[..., tuple[Tensor, Tensor, Tensor]]  # see `kernels.reference.find_runs`

TILE = 16  # rows: what a matrix unit takes at the least
SCATTERED = 32  # others per row from which on rows are rarely neighbors


class Places(NamedTuple):
    """Where queries or points are: queries at all S levels, a point at its own, S is one.

    Attributes:
        groups: int32 ``[S, n]``: ``image * n_levels + level``. What takes no part has a negative
            one, of which no query's is a point's.
        cells: int32 ``[S, P, n]``, of queries those they fall into.
    """

    groups: Tensor
    cells: Tensor


class NeighborSlices(NamedTuple):
    """One direction of a plan: row ``i`` sees ``order[starts[i, r]:stops[i, r]]`` for every r.

    ``visits`` lists the rows so that neighbors in it are neighbors in space: whoever walks the
    rows in this order finds what they share in the cache. All are int32.
    """

    visits: Tensor
    starts: Tensor
    stops: Tensor
    order: Tensor


class Tiles(NamedTuple):
    """One direction of a plan, tile by tile, int32: T tiles of n rows, which see some of m others.

    Attributes:
        visits: ``[n]``, the rows: a tile is some that stand side by side here.
        order: the columns: all others, once for each level they are at.
        firsts, shifts: ``[T, C]``, the runs, ``C`` being what it takes if none were joined. Those
            of a level begin where the slices of a tile's rows at the levels before it would end.
        counts: ``[T, S, 2]``, how many runs there are and how many entries they have.
        row_groups, row_cells, column_groups, column_cells: the `Places` of rows and others.
    """

    visits: Tensor
    order: Tensor
    firsts: Tensor
    shifts: Tensor
    counts: Tensor
    row_groups: Tensor
    row_cells: Tensor
    column_groups: Tensor
    column_cells: Tensor


def tile_rows(n_rows: int, n_others: int) -> int:
    """How many rows make a tile: one where they are so few that they stand apart."""
    return 1 if n_rows * SCATTERED < n_others else TILE


def find_tiles(
    slices: NeighborSlices,
    rows: Places,
    others: Places,
    sizes: Sequence[int],
    position_dim: int,
    find_runs: FindRuns,
) -> Tiles:
    """The tiles of ``slices``, which are those of windows of ``sizes``."""
    height = tile_rows(rows.groups.shape[1], others.groups.shape[1])
    visits, starts, stops, order = slices
    runs = find_runs(visits, starts, stops, sizes, position_dim, height)
    return Tiles(visits, order, *runs, *rows, *others)
