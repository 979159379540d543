"""Points on dense maps, for peers that know no sparse ones."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from benchmarks.layer import Layer


def densified(layer: Layer, values: Tensor) -> Tensor:
    """``values`` [nnz, ...] of the layer's points, as cells [all levels' cells, ...], else zero."""
    cells = map(math.prod, layer.pyramid.level_shapes)
    return values.new_zeros(sum(cells), *values.shape[1:]).index_copy(
        0, cell_numbers(layer), values
    )


def cell_numbers(layer: Layer) -> Tensor:
    """Int64 [nnz]: every point's cell, cells of all levels counted row by row."""
    shapes = layer.pyramid.level_shapes
    first = torch.tensor([0, *itertools.accumulate(map(math.prod, shapes))])
    sizes = torch.tensor(shapes)[layer.pyramid.levels]  # [nnz, P]
    number = torch.zeros_like(layer.pyramid.levels)
    for cell, size in zip(layer.pyramid.cells.unbind(1), sizes.unbind(1), strict=True):
        number = number * size + cell
    return first[layer.pyramid.levels] + number
