"""Attention over dense maps, densified beforehand. It computes something else than the library.

NATTEN, Hassani et al., "Neighborhood Attention Transformer" (2023): every cell attends to the
window around it, empty or not. Each level attends to itself alone, empty cells are keys of zeros,
and windows do not cross the border.

Deformable attention, Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object
Detection" (2021), in the plain PyTorch of `transformers`, at as many keys per query. It samples
locations that a network predicts, whether they hold a point or not; here they are random.
"""

import math

import torch
from torch import Tensor

from benchmarks.baselines.comparison import Comparison, require, step_problem
from benchmarks.layer import Attend, Layer
from benchmarks.machine import available_memory
from benchmarks.measure import Work
from benchmarks.outcome import CaseSkipped


def prepare_natten(layer: Layer) -> Comparison:
    """NATTEN: the attention alone, level by level."""
    require("natten")
    cells = max(map(math.prod, layer.pyramid.level_shapes))
    scores = layer.block.n_heads * cells**2 * layer.x.element_size()
    if scores > available_memory():
        raise CaseSkipped(
            "it has no CPU kernel; without one it stores a score for every two cells of a map, "
            f"{scores / 2**30:,.0f} GiB for {cells:,} cells"
        )
    vicinal = layer.attention()
    maps = tuple(densified(layer, x) for x in vicinal.inputs)
    work = Work(_attention(layer.pyramid.level_shapes, layer.scene.windows), maps)
    extra: dict[str, float | str] = {"map_mib": maps[0].nbytes / 2**20}
    return Comparison(work, vicinal, same=False, no_step=step_problem(work), extra=extra)


def _attention(shapes: tuple[tuple[int, ...], ...], windows: tuple[int, ...]) -> Attend:
    """Of maps [all levels' cells, H, d]."""
    import natten

    dim = len(shapes[0])
    attend_map = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[dim]
    sizes = [math.prod(shape) for shape in shapes]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        levels = zip(q.split(sizes), k.split(sizes), v.split(sizes), shapes, windows, strict=True)
        out = []
        for *qkv, shape, width in levels:
            maps = (x.unflatten(0, shape)[None] for x in qkv)
            out.append(attend_map(*maps, kernel_size=(width,) * dim)[0].flatten(0, dim - 1))
        return torch.cat(out)

    return attend


def prepare_deformable(layer: Layer) -> Comparison:
    """Deformable: the sampling alone; values, locations and weights given."""
    require("transformers")
    if layer.pyramid.position_dim != 2:
        raise CaseSkipped("it samples images of two dimensions only")
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        MultiScaleDeformableAttention,
    )

    sample = MultiScaleDeformableAttention()
    shapes = list(layer.pyramid.level_shapes)
    starts = torch.tensor([0, *(h * w for h, w in shapes)]).cumsum(0)[:-1]
    locations, weights = _locations_and_weights(layer)

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = sample(value, torch.tensor(shapes), shapes, starts, locations, weights, 64)
        return out

    vicinal = layer.attention()
    value = densified(layer, vicinal.inputs[2])[None]
    keys = weights.shape[-1] * len(shapes)
    return Comparison(
        Work(attend, (value, locations, weights)),
        vicinal,
        same=False,
        extra={"keys_per_query": keys, "map_mib": value.nbytes / 2**20},
    )


def _locations_and_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    """Locations [1, N, H, L, K, 2] in each level's window, in [0, 1] as (x, y), and weights.

    K is such that a query samples as many keys as it has neighbors on average.
    """
    n, heads, n_levels = len(layer), layer.block.n_heads, layer.pyramid.n_levels
    per_level = max(1, round(layer.n_pairs / n / n_levels))
    shapes = torch.tensor(layer.pyramid.level_shapes)
    windows = torch.tensor(layer.scene.windows)[:, None] / shapes  # [L, 2], as parts of the map
    offsets = torch.rand(1, n, heads, n_levels, per_level, 2) - 0.5
    centers = (layer.positions / shapes.amax(0))[:, None, None, None]
    locations = (centers + offsets * windows[:, None]).flip(-1)
    weights = torch.randn(locations.shape[:-1]).flatten(-2).softmax(-1)
    return locations, weights.view(locations.shape[:-1])


def densified(layer: Layer, values: Tensor) -> Tensor:
    """``values`` [nnz, ...] of the layer's points as cells [all levels' cells, ...], else zero."""
    cells = sum(map(math.prod, layer.pyramid.level_shapes))
    return values.new_zeros(cells, *values.shape[1:]).index_copy(0, cell_numbers(layer), values)


def cell_numbers(layer: Layer) -> Tensor:
    """Int64 [nnz]: every point's cell; cells are numbered level by level, in row-major order."""
    shapes, levels = torch.tensor(layer.pyramid.level_shapes), layer.pyramid.levels
    number = torch.zeros_like(levels)
    for cell, size in zip(layer.pyramid.cells.unbind(1), shapes[levels].unbind(1), strict=True):
        number = number * size + cell
    return (shapes.prod(1).cumsum(0) - shapes.prod(1))[levels] + number
