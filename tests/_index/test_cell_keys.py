"""Cell keys: the order of cells, the rows of windows and the Z-order curve."""

import itertools

import pytest
import torch
from torch import Tensor

from vicinal import FeaturePyramid, plan_neighborhoods
from vicinal._index.cell_keys import CellKeys
from vicinal.window_shapes import windows_on_axes

SHAPES, SIZES = ((3, 4), (5, 2)), (3, 5)


def make_keys(batch_size: int = 2) -> CellKeys:
    return CellKeys(SHAPES, windows_on_axes(SIZES, 2), batch_size, torch.device("cpu"))


def all_cells(batch_size: int = 2) -> list[tuple[int, ...]]:
    """(level, image, *cell) of every cell, sorted."""
    return [
        (level, image, *cell)
        for level, shape in enumerate(SHAPES)
        for image in range(batch_size)
        for cell in itertools.product(*map(range, shape))
    ]


def keys_of(keys: CellKeys, cells: list[tuple[int, ...]]) -> Tensor:
    rows = torch.tensor(cells)
    return keys.of(rows[:, 2:], rows[:, 0], rows[:, 1])


def test_keys_sort_by_level_image_and_cell() -> None:
    values = keys_of(make_keys(), all_cells()).tolist()
    assert values == sorted(set(values))


def in_windows(keys: CellKeys, centers: Tensor, cells: list[tuple[int, ...]], image: int) -> Tensor:
    """Bool ``[L, N, cells]``: which cells lie in the windows of ``centers`` ``[N, P]``.

    By the keys that have the first cells of the windows that have each cell.
    """
    point_keys, levels = keys_of(keys, cells), torch.tensor(cells)[:, 0]
    first, last = keys.rows_around(point_keys, levels)
    first_cells = keys.first_cells(centers.expand(len(SHAPES), *centers.shape))
    every_level = torch.arange(len(SHAPES))[:, None]
    query_keys = keys.of(first_cells, every_level, torch.tensor(image))[..., None, None]
    return ((query_keys >= first) & (query_keys <= last)).sum(-1)


def test_windows_with_a_cell_are_those_around_it() -> None:
    keys, cells = make_keys(), all_cells()
    steps = torch.arange(-9, 14)
    centers = torch.cartesian_prod(steps, steps)
    for image in range(2):
        found = in_windows(keys, centers, cells, image)
        for level, (width, of_level) in enumerate(zip(SIZES, found, strict=True)):
            for center, inside in zip(centers.tolist(), of_level, strict=True):
                expected = [
                    cell[:2] == (level, image)
                    and all(abs(x - y) <= width // 2 for x, y in zip(cell[2:], center, strict=True))
                    for cell in cells
                ]
                assert inside.tolist() == expected


@pytest.mark.parametrize("value", [-(2**62), 2**62, 2**40])
def test_windows_of_cells_that_are_far_hold_no_cell(value: int) -> None:
    keys, centers = make_keys(1), torch.tensor([[value, 1], [1, value]])
    assert not in_windows(keys, centers, all_cells(1), 0).any()


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_the_curve_interleaves_the_bits_of_the_axes(dim: int) -> None:
    """From the highest bit on, groups first; cells before the edge count as at the edge."""
    keys = CellKeys(((37,) * dim,), windows_on_axes([3], dim), 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(dim)
    cells = torch.randint(-2, 39, (300, dim), generator=generator)
    groups = torch.randint(4, (300,), generator=generator)
    bits = (37 + 2 * 3).bit_length()  # a margin of 3 on either side
    expected = [
        [group, *((max(cell, 0) >> bit) & 1 for bit in reversed(range(bits)) for cell in row)]
        for group, row in zip(groups.tolist(), cells.tolist(), strict=True)
    ]
    order = keys.along_curve(cells, groups).argsort(stable=True)
    assert order.tolist() == sorted(range(300), key=expected.__getitem__)


def test_more_cells_than_keys_are_refused() -> None:
    pyramid = FeaturePyramid(
        torch.rand(1, 1), torch.tensor([[0, 0, 0, 0, 0]]), ((2**21, 2**21, 2**21),), 1
    )
    with pytest.raises(ValueError, match="level_shapes: expected fewer than"):
        plan_neighborhoods(torch.rand(1, 3), torch.tensor([0, 1]), pyramid, [3])
