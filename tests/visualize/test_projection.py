"""Windows, cells and weights in the two drawn axes, by the oracle of `window_slots`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Scene, scenes, window_slots
from records import HEADS, make_record
from torch import Tensor

from vicinal.visualize.projection import project_cells, project_record


@given(scene=scenes(), axis=st.integers(0, 2))
@settings(max_examples=30)
def test_windows_cells_and_weights_in_two_axes(scene: Scene, axis: int) -> None:
    dim, shapes = scene.pyramid.position_dim, scene.pyramid.level_shapes
    axes = [other for other in range(dim) if dim < 3 or other != axis]
    full = [max(sizes) for sizes in zip(*shapes, strict=True)]
    for image in range(scene.pyramid.batch_size):
        record, by_point = make_record(scene, image)
        projected_cells = project_cells(scene.pyramid, image, axis if dim == 3 else None)
        projected = project_record(record, projected_cells)
        assert projected.windows is not None
        for query, weights in by_point.items():
            slots = window_slots(record.positions[query], shapes, scene.sizes)
            for level in range(len(shapes)):
                cells = [slot.cell for slot in slots if slot.level == level]
                widths = [full[i] / shapes[level][i] for i in range(dim)]
                edges = [
                    [min(cell[i] for cell in cells) * widths[i] for i in axes],
                    [max(cell[i] + 1 for cell in cells) * widths[i] for i in axes],
                ]
                window = projected.windows.corners[query, level].tolist()
                for corner, edge, row in zip(window, edges, (0, 1), strict=True):
                    assert corner == pytest.approx(edge if dim > 1 else [row, *edge])
            sums: dict[tuple[int, ...], Tensor] = {}
            for point, heads in weights.items():
                _, *cell, level = scene.pyramid.coordinates[point].tolist()
                key = (level, *([0] * (dim == 1)), *(cell[i] for i in axes))
                sums[key] = sums.get(key, torch.zeros(HEADS)) + heads
            ids, summed = projected.attended(query)
            named = torch.cat(
                (projected_cells.levels[ids, None], projected_cells.cells[ids]), 1
            ).tolist()
            assert {tuple(key) for key in named} == sums.keys()
            for key, heads in zip(named, summed, strict=True):
                torch.testing.assert_close(heads, sums[tuple(key)], check_dtype=False)
