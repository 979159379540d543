"""Cell keys: the order of cells, the rows of windows and the Z-order curve."""

import itertools

import pytest
import torch
from torch import Tensor

from vicinal import FeaturePyramid, plan_neighborhoods
from vicinal._index.cell_keys import CellKeys

SHAPES, SIZES = ((3, 4), (5, 2)), (3, 5)


def make_keys(batch_size: int = 2) -> CellKeys:
    return CellKeys(SHAPES, SIZES, batch_size, torch.device("cpu"))


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


def test_keys_of_the_rows_around_a_center_are_those_of_its_window() -> None:
    keys = make_keys()
    cells = all_cells()
    point_keys = keys_of(keys, cells)
    steps = torch.arange(-9.0, 14.0)
    centers = torch.cartesian_prod(steps, steps)
    clamped = keys.clamp(torch.stack((centers, centers)))
    for level, image in itertools.product(range(2), range(2)):
        of_level = torch.full((len(centers),), level)
        center_keys = keys.of(clamped[level], of_level, torch.full_like(of_level, image))
        first, last = keys.rows_around(center_keys, of_level)
        found = (point_keys >= first[..., None]) & (point_keys <= last[..., None])
        radius = SIZES[level] // 2
        for center, inside in zip(centers.tolist(), found.sum(1), strict=True):
            expected = [
                cell[:2] == (level, image)
                and all(abs(x - y) <= radius for x, y in zip(cell[2:], center, strict=True))
                for cell in cells
            ]
            assert inside.tolist() == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e30])
def test_windows_of_centers_that_are_far_or_not_finite_hold_no_cell(value: float) -> None:
    keys = make_keys(1)
    clamped = keys.clamp(torch.tensor([[[value, 1.0]], [[1.0, value]]]))
    point_keys = keys_of(keys, all_cells(1))
    for level in range(2):
        levels = torch.tensor([level])
        first, last = keys.rows_around(keys.of(clamped[level], levels, levels * 0), levels)
        assert not ((point_keys >= first[..., None]) & (point_keys <= last[..., None])).any()


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_the_curve_interleaves_the_bits_of_the_axes(dim: int) -> None:
    """From the highest bit on, groups first; cells before the edge count as at the edge."""
    keys = CellKeys(((37,) * dim,), [3], 4, torch.device("cpu"))
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
