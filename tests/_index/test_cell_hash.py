"""The hash table that finds cells by their coordinates."""

import torch
import torch.nn.functional as F
from deformable_scenes import SCENES

from vicinal import FeaturePyramid
from vicinal._index.cell_hash import index_cells


def test_find_returns_the_corner_cells_of_every_location() -> None:
    for scene in SCENES.values():
        pyramid, index = scene.pyramid, index_cells(scene.pyramid)
        found = {
            tuple(row): int(cell)
            for row, cell in zip(pyramid.coordinates.tolist(), index.cell_of_point, strict=True)
        }
        dim = pyramid.position_dim
        for level, shape in enumerate(pyramid.level_shapes):
            firsts = torch.cartesian_prod(*[torch.arange(-4, size + 4) for size in shape])
            firsts = firsts.view(-1, dim).double()
            for image in range(3):
                axes = [axis[None, None] for axis in firsts.unbind(1)]
                levels = torch.full((len(firsts),), level)
                corners = index.find(torch.tensor([image]), levels, axes)[0, 0]
                offsets = torch.cartesian_prod(*[torch.arange(2)] * dim).view(-1, dim)
                for offset, cells in zip(offsets, corners, strict=True):
                    expected = [
                        found.get((image, *cell, level), index.n_cells)
                        for cell in (firsts + offset).long().tolist()
                    ]
                    assert cells.tolist() == expected


def test_regular_keys_do_not_overfill_buckets() -> None:
    # The fullest bucket bounds the time of a lookup, so regular keys must not share buckets.
    axis = torch.arange(0, 4096, 4)
    grid = torch.cartesian_prod(axis[:200], axis[:200])
    for cells in (F.pad(axis[:, None], (1, 0)), F.pad(axis[:, None], (0, 1)), grid):
        pyramid = FeaturePyramid(
            torch.zeros(len(cells), 1), F.pad(cells, (1, 1)), ((4096, 4096),), 1
        )
        assert index_cells(pyramid)._largest <= 6
