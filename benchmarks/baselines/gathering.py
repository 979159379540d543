"""Gather and project, the obvious way to compute the block.

It gathers the K cells around every query, projects each of them to a key and a value, and does not
keep the N x K x E memory that this takes for the backward pass, but computes it again there. Plain
PyTorch, with the block's own parameters and the library's list of the cells of each window.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.baselines.comparison import Comparison
from benchmarks.layer import Layer
from benchmarks.measure import Work
from vicinal import get_multilevel_neighborhoods


def prepare(layer: Layer) -> Comparison:
    """The whole block, on a sparse COO map, which is what this baseline takes."""
    shapes = torch.tensor(layer.pyramid.level_shapes)

    def vicinal(x: Tensor) -> Tensor:
        maps = layer.pyramid.with_values(x).to_coo()
        out: Tensor = layer.block(x, layer.positions, layer.offsets, maps, shapes)
        return out

    given = (layer.x,), tuple(layer.block.parameters())
    return Comparison(Work(GatherAndProject(layer), *given), Work(vicinal, *given))


class GatherAndProject:
    """Computes what the block of ``layer`` does, without its options, for one image."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.block = layer, layer.block

    def __call__(self, x: Tensor) -> Tensor:
        """X [N, E] -> [N, E]."""
        layer, positions, windows = self.layer, self.layer.positions, self.layer.scene.windows
        maps = layer.pyramid.with_values(x).to_coo().coalesce()
        shapes = torch.tensor(layer.pyramid.level_shapes, device=x.device)
        # [N, K, P], [N, K], [K]
        cells, outside, levels = get_multilevel_neighborhoods(positions, shapes, windows)
        scales = shapes / shapes.amax(dim=0).to(positions.dtype)
        centers = (cells.to(positions.dtype) + 0.5) / scales[levels]
        key_positions = torch.cat((centers, levels.expand(len(x), -1).unsqueeze(-1)), dim=-1)
        table, rows = _look_up(maps, cells, levels, outside)
        q = self.block.q_in_proj(self.block.norm(x)).unflatten(-1, (layer.heads, -1))
        q = self._rotate(q, layer.query_coordinates)
        attend = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        attended = attend(self._attend, q, table, rows, key_positions)
        out: Tensor = self.block.out_proj(attended) + x
        return out

    def _attend(self, q: Tensor, table: Tensor, rows: Tensor, key_positions: Tensor) -> Tensor:
        """Q [N, H, d], rows [N, K] of the table [M, E] and their positions [N, K, P + 1] -> [N, E].

        Only here are tensors of N x K x E.
        """
        # As an embedding, so that the backward pass skips the row that most slots share.
        empty_row = len(table) - 1
        gathered = F.embedding(rows, table, padding_idx=empty_row)  # [N, K, E]
        k, v = self.block.kv_proj(gathered).unflatten(-1, (2, *q.shape[1:])).unbind(2)
        k = self._rotate(k, key_positions)
        logits = torch.einsum("nhd,nkhd->nhk", q, k) / math.sqrt(q.shape[-1])
        # The lowest number instead of -inf, and zeros afterwards: no NaN without neighbors.
        empty = (rows == empty_row).unsqueeze(1)
        logits = logits.masked_fill(empty, torch.finfo(logits.dtype).min)
        weights = logits.softmax(dim=-1).masked_fill(empty, 0.0)
        return torch.einsum("nhk,nkhd->nhd", weights, v).flatten(1)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """X [..., H, d], rotated to its positions [..., P + 1], in their precision."""
        frequencies = self.block.pos_encoding.frequencies().to(positions.dtype)
        angles = torch.einsum("...c,chn->...hn", positions, frequencies)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _look_up(maps: Tensor, cells: Tensor, levels: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """The map's values and a row of zeros [nnz + 1, E], and each cell's row [N, K].

    Empty cells, and those outside their level, have the row of zeros.
    """
    sizes = maps.shape[1 : maps.sparse_dim()]
    stored = _linear_keys(maps.indices()[1:], sizes)  # sorted, as the map is coalesced
    # The row of zeros has the largest key, which is no cell's, so that no search ends past it.
    stored = torch.cat((stored, stored.new_full((1,), torch.iinfo(stored.dtype).max)))
    keys = _linear_keys((*cells.unbind(-1), levels), sizes)
    rows = torch.searchsorted(stored, keys)
    empty = outside | (stored[rows] != keys)
    return F.pad(maps.values(), (0, 0, 0, 1)), rows.masked_fill(empty, len(stored) - 1)


def _linear_keys(coordinates: Sequence[Tensor] | Tensor, sizes: Sequence[int]) -> Tensor:
    """Row-major keys of coordinates given axis by axis, which broadcast."""
    keys = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        keys = keys * size + coordinate
    return keys
