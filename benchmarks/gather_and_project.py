"""The obvious way to compute the block, as a peer for the measures.

It gathers the K cells around every query, projects each of them to a key and a value, and hides
the N x K x E memory this takes from the training step by recomputing it in the backward pass.
Plain PyTorch: of vicinal it takes the spelled-out neighborhoods and the rotary frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vicinal import RotaryEncoding, get_multilevel_neighborhoods


class GatherAndProjectBlock(nn.Module):
    """`SparseNeighborhoodAttentionBlock` the obvious way: same arguments, same parameters."""

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        n_levels: int = 4,
        neighborhood_sizes: Sequence[int] = (3, 5, 7, 9),
        position_dim: int = 2,
        dropout: float = 0.0,
        bias: bool = False,
        norm_first: bool = True,
        rope_spatial_base_theta: float = 100.0,
        rope_level_base_theta: float = 10.0,
        rope_share_heads: bool = False,
        rope_freq_group_pattern: str = "single",
        rope_enforce_freq_groups_equal: bool = True,
    ) -> None:
        super().__init__()
        if dropout > 0:
            raise NotImplementedError("this peer is measured without dropout")
        if len(neighborhood_sizes) != n_levels:
            raise ValueError(f"{len(neighborhood_sizes)} neighborhood_sizes, {n_levels} levels")
        self.n_heads = n_heads
        self.neighborhood_sizes = neighborhood_sizes
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(embed_dim)
        self.q_in_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.kv_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.pos_encoding = RotaryEncoding(
            embed_dim // n_heads,
            n_heads,
            position_dim,
            spatial_base_theta=rope_spatial_base_theta,
            level_base_theta=rope_level_base_theta,
            share_heads=rope_share_heads,
            freq_group_pattern=rope_freq_group_pattern,
            enforce_freq_groups_equal=rope_enforce_freq_groups_equal,
        )

    def forward(
        self,
        query: Tensor,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        stacked_feature_maps: Tensor,
        level_spatial_shapes: Tensor,
        background_embedding: Tensor | None = None,
        query_level_indices: Tensor | None = None,
        query_mask: Tensor | None = None,
    ) -> Tensor:
        """Query [N, E] and positions [N, P] -> [N, E]."""
        n_queries = len(query)
        level_spatial_shapes = level_spatial_shapes.to(query.device)
        positions = query_spatial_positions.to(
            torch.promote_types(query_spatial_positions.dtype, torch.float32)
        )
        cells, outside, levels = get_multilevel_neighborhoods(
            positions, level_spatial_shapes, self.neighborhood_sizes
        )  # [N, K, P], [N, K], [K]
        scales = level_spatial_shapes / level_spatial_shapes.amax(dim=0).to(positions.dtype)
        centers = (cells.to(positions.dtype) + 0.5) / scales[levels]
        key_positions = torch.cat((centers, levels.expand(n_queries, -1).unsqueeze(-1)), dim=-1)

        batch = torch.repeat_interleave(query_batch_offsets.diff(), output_size=n_queries)
        table, rows = _look_up(stacked_feature_maps.coalesce(), batch, cells, levels, outside)
        empty_row = len(table) - 1
        taken = rows != empty_row
        if background_embedding is not None:
            background_rows = len(table) + batch.unsqueeze(1) * len(scales) + levels
            rows = torch.where(taken, rows, background_rows)
            table = torch.cat((table, background_embedding.flatten(0, 1)))
            taken = torch.ones_like(taken)
        if query_mask is not None:
            taken = taken & ~query_mask.unsqueeze(1)

        if query_level_indices is None:
            query_level_indices = level_spatial_shapes.prod(dim=-1).argmax().expand(n_queries)
        x = self.norm(query) if self.norm_first else query
        q = self.q_in_proj(x).unflatten(-1, (self.n_heads, -1))
        q = self._rotate(q, torch.cat((positions, query_level_indices.unsqueeze(-1)), dim=-1))
        attended = checkpoint(
            self._gather_project_attend,
            *(q, table, rows, taken, key_positions, empty_row),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        out: Tensor = self.out_proj(attended) + query
        return out if self.norm_first else self.norm(out)

    def _gather_project_attend(
        self,
        q: Tensor,  # [N, H, d]
        table: Tensor,  # [M, E]
        rows: Tensor,  # [N, K]
        taken: Tensor,  # [N, K]
        key_positions: Tensor,  # [N, K, P + 1]
        empty_row: int,  # of the table
    ) -> Tensor:
        """Attended values [N, E]; all that is as large as N x K x E lives and dies in here."""
        # An embedding look-up, so that the backward pass skips the row that most slots share.
        gathered = F.embedding(rows, table, padding_idx=empty_row)  # [N, K, E]
        k, v = self.kv_proj(gathered).unflatten(-1, (2, self.n_heads, -1)).unbind(2)
        k = self._rotate(k, key_positions)
        scores = torch.einsum("nhd,nkhd->nhk", q, k) / math.sqrt(q.shape[-1])
        # The lowest number instead of -inf, and zeros after: a query with nothing to attend to
        # gets zero instead of NaN.
        empty = ~taken.unsqueeze(1)
        scores = scores.masked_fill(empty, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(empty, 0.0)
        return torch.einsum("nhk,nkhd->nhd", weights.to(v.dtype), v).flatten(1)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """X [..., H, d], rotated to its positions [..., P + 1]."""
        # Angles keep the precision of the positions, whatever that of x: bfloat16 cannot tell
        # cell 300 from 301.
        with torch.autocast(x.device.type, enabled=False):
            freqs = self.pos_encoding.frequencies().to(positions.dtype)
            angles = torch.einsum("...c,chn->...hn", positions, freqs)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _look_up(
    feature_map: Tensor, batch: Tensor, cells: Tensor, levels: Tensor, outside: Tensor
) -> tuple[Tensor, Tensor]:
    """The map's values and below them a row of zeros [nnz + 1, E], and each cell's row [N, K].

    Empty cells, and those outside their level, have the row of zeros.
    """
    sizes = feature_map.shape[: feature_map.sparse_dim()]
    stored = _linear_keys(feature_map.indices(), sizes)  # sorted, as the map is coalesced
    # The row of zeros has the key of no cell, the largest, so no search ends past it.
    stored = torch.cat((stored, stored.new_full((1,), torch.iinfo(stored.dtype).max)))
    keys = _linear_keys((batch.unsqueeze(1), *cells.unbind(-1), levels), sizes)
    rows = torch.searchsorted(stored, keys)
    empty = outside | (stored[rows] != keys)
    return F.pad(feature_map.values(), (0, 0, 0, 1)), rows.masked_fill(empty, len(stored) - 1)


def _linear_keys(coordinates: Sequence[Tensor] | Tensor, sizes: Sequence[int]) -> Tensor:
    """Row-major keys of coordinates given axis by axis, broadcast against one another."""
    keys = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        keys = keys * size + coordinate
    return keys
