"""Tiles and runs: the worked example of `vicinal._index.tiles`."""

from collections.abc import Sequence

import torch

from vicinal._index.tiles import GroupedCells, find_tiles, tile_rows
from vicinal.backends import reference
from vicinal.backends.types import POINT_TILE, TILE, NeighborSlices
from vicinal.window_shapes import windows_on_axes

STARTS = [[2, 8], [3, 9], [3, 12]]
STOPS = [[5, 10], [6, 11], [5, 14]]


def find_runs(
    starts: Sequence[Sequence[int]], stops: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[int]]:
    """The runs of one tile of rows: firsts, shifts and counts."""
    n_rows, n_slices = len(starts), len(starts[0])
    start, stop = (torch.tensor(x, dtype=torch.int32) for x in (starts, stops))
    found = reference.find_runs(torch.arange(n_rows), start, stop, 99, [n_slices], n_rows)
    firsts, shifts, counts = (x.squeeze(0) for x in found)
    n_runs, n_entries = counts[0].tolist()
    return firsts[:n_runs].tolist(), shifts[:n_runs].tolist(), [n_runs, n_entries]


def test_worked_example() -> None:
    firsts, shifts, counts = find_runs(STARTS, STOPS)
    assert firsts == [0, 4, 7]
    assert shifts == [2, 4, 5]
    assert counts == [3, 9]
    columns = []
    for entry in range(counts[1]):
        run = max(i for i, first in enumerate(firsts) if first <= entry)
        columns.append(entry + shifts[run])
    assert columns == [2, 3, 4, 5, 8, 9, 10, 12, 13]
    assert columns[5] == 9
    slices = [
        range(*edges) for row in zip(STARTS, STOPS, strict=True) for edges in zip(*row, strict=True)
    ]
    assert columns == sorted(set().union(*slices))
    assert sum(map(len, slices)) == 14


def test_slices_that_touch_are_one_run() -> None:
    assert find_runs([[2], [4]], [[4], [6]]) == ([0], [2], [1, 4])


def test_empty_slices_are_in_no_run() -> None:
    assert find_runs([[3], [7]], [[3], [9]]) == ([0], [7], [1, 2])
    assert find_runs([[3], [7]], [[3], [7]]) == ([], [], [0, 0])


def test_a_tile_is_one_row_if_rows_are_few() -> None:
    assert tile_rows(3, 1000, True) == 1
    assert tile_rows(1000, 1000, True) == TILE
    assert tile_rows(1000, 3, False) == POINT_TILE


def test_a_last_tile_may_have_fewer_rows() -> None:
    n = TILE + 3
    starts = torch.arange(n, dtype=torch.int32)[:, None]
    order = torch.arange(n, dtype=torch.int32)
    slices = NeighborSlices(order, starts, starts + 1, order)
    cells = GroupedCells(order.new_zeros(1, n), order[None, None])
    windows = windows_on_axes([1], 1)
    tiles = find_tiles(slices, cells, cells, [1], windows, reference.find_runs)
    assert tiles.counts.tolist() == [[[1, TILE]], [[1, 3]]]
    assert tiles.shifts[:, 0].tolist() == [0, TILE]
