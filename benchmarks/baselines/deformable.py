"""Deformable attention, which computes something else than the library's neighborhood attention.

Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection" (2021), in
the plain PyTorch of `transformers` over a densified map, or by the kernel of
`SparseDeformableAttention`, at as many keys per query. It samples locations that a network
predicts, whether they hold a point or not; here they are random, and empty cells are zero.
"""

import torch
from torch import Tensor

from benchmarks.baselines.comparison import Comparison
from benchmarks.layer import Layer
from benchmarks.measure import Work
from benchmarks.outcome import Figures, require
from vicinal._index.cell_hash import index_cells
from vicinal._index.sampling import sample as sample_sparse


def prepare(layer: Layer) -> Comparison:
    """The sampling alone, on two dimensions; values, locations and weights given."""
    require("transformers")
    from transformers.models.deformable_detr import modeling_deformable_detr

    sample = modeling_deformable_detr.MultiScaleDeformableAttention()
    shapes = list(layer.pyramid.level_shapes)
    starts = torch.tensor([0, *(h * w for h, w in shapes)]).cumsum(0)[:-1]
    locations, weights = _locations_and_weights(layer)

    def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        out: Tensor = sample(value, torch.tensor(shapes), shapes, starts, locations, weights, 64)
        return out

    vicinal = layer.attention()
    value = densified(layer, vicinal.inputs[2])[None]
    keys = weights.shape[-1] * len(shapes)
    work = Work(attend, (value, locations, weights))
    extra: Figures = {"keys_per_query": keys, "map_mib": value.nbytes / 2**20}
    return Comparison(work, vicinal, same=False, extra=extra)


def prepare_sparse(layer: Layer) -> Comparison:
    """The sampling of `SparseDeformableAttention` alone, of the same locations."""
    vicinal, index = layer.attention(), index_cells(layer.pyramid)
    locations, weights = _locations_and_weights(layer)
    shapes = torch.tensor(layer.pyramid.level_shapes, device=layer.device)[:, None]
    images = layer.pyramid.coordinates[:, 0].contiguous()
    v = vicinal.inputs[2].float()  # as the module samples in any dtype
    values = v.new_zeros(index.n_cells, *v.shape[1:]).index_add(0, index.cell_of_point, v)

    def attend(values: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return sample_sparse(values, index, images, locations, weights)

    work = Work(attend, (values, locations[0].flip(-1) * shapes, weights[0]))
    keys = weights.shape[-1] * len(shapes)
    return Comparison(work, vicinal, same=False, extra={"keys_per_query": keys})


def _locations_and_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    """Locations [1, N, H, L, K, 2] in each level's window, in [0, 1] as (x, y), and weights.

    K is such that a query samples as many keys as it has neighbors on average.
    """
    n, heads, n_levels = len(layer), layer.heads, layer.pyramid.n_levels
    per_level = max(1, round(layer.n_pairs / n / n_levels))
    shapes = torch.tensor(layer.pyramid.level_shapes)
    windows = torch.tensor(layer.scene.windows)[:, None] / shapes  # [L, 2], as parts of the map
    offsets = torch.rand(1, n, heads, n_levels, per_level, 2) - 0.5
    centers = (layer.positions.cpu() / shapes.amax(0))[:, None, None, None]
    locations = (centers + offsets * windows[:, None]).flip(-1)
    weights = torch.randn(locations.shape[:-1]).flatten(-2).softmax(-1)
    weights = weights.view(locations.shape[:-1])
    return locations.to(layer.device), weights.to(layer.device)


def densified(layer: Layer, x: Tensor) -> Tensor:
    """``x`` [nnz, ...] as [cells, ...], zero in empty cells, levels in order and row-major."""
    cells = sum(h * w for h, w in layer.pyramid.level_shapes)
    return x.new_zeros(cells, *x.shape[1:]).index_put((cell_numbers(layer),), x)


def cell_numbers(layer: Layer) -> Tensor:
    """Int64 [nnz]: every point's cell; cells are numbered level by level, in row-major order."""
    levels, (rows, columns) = layer.pyramid.levels, layer.pyramid.cells.unbind(1)
    shapes = torch.tensor(layer.pyramid.level_shapes)
    sizes = shapes.prod(1)
    return (sizes.cumsum(0) - sizes)[levels] + rows * shapes[levels, 1] + columns
