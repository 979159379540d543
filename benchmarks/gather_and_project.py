"""The obvious way to compute the block, as a peer for the measures.

It gathers the K cells around every query, projects each of them to a key and a value, and hides
the N x K x E memory this takes from the training step by recomputing it in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class RotaryFrequencies(nn.Module):
    """Learned frequencies of the pairs of every head, for positions of P + 1 coordinates."""

    def __init__(
        self, head_dim: int, n_heads: int, thetas: Sequence[float], pattern: str, equal: bool
    ) -> None:
        super().__init__()
        n = len(thetas)
        space, level, everything = slice(0, n - 1), slice(n - 1, n), slice(0, n)
        self.groups = {
            "single": [everything],
            "partition": [space, level],
            "closure": [space, level, everything],
        }[pattern]
        self.thetas = tuple(thetas)  # base of each coordinate
        share, remainder = divmod(head_dim // 2, len(self.groups))
        if remainder and equal:
            raise ValueError(f"{head_dim // 2} pairs do not divide into {len(self.groups)} groups")
        self.freqs = nn.ParameterList(
            torch.empty(len(self.thetas[group]), n_heads, share + (g < remainder))
            for g, group in enumerate(self.groups)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for group, freqs in zip(self.groups, self.freqs, strict=True):
            n_coordinates, n_heads, n_pairs = freqs.shape
            phase = 2 * math.pi * torch.rand(n_coordinates, n_heads, 1, device=freqs.device)
            theta = torch.tensor(self.thetas[group], device=freqs.device).view(-1, 1, 1)
            exponent = torch.arange(n_pairs, device=freqs.device) / max(n_pairs, 1)
            freqs.copy_(phase.cos() * theta**-exponent)

    def _freqs_of_all_coordinates(self) -> Tensor:
        """The groups side by side, [P + 1, H or 1, d / 2]; zero for what a group does not see."""
        padded = [
            F.pad(freqs, (0, 0, 0, 0, group.start, len(self.thetas) - group.stop))
            for group, freqs in zip(self.groups, self.freqs, strict=True)
        ]
        return torch.cat(padded, dim=-1)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """X [..., H, d], rotated to its positions [..., P + 1]."""
        # Angles keep the precision of the positions, whatever that of x: bfloat16 cannot tell
        # cell 300 from 301.
        with torch.autocast(x.device.type, enabled=False):
            freqs = self._freqs_of_all_coordinates().to(positions.dtype)
            angles = torch.einsum("...c,chn->...hn", positions, freqs)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


class GatherAndProjectBlock(nn.Module):
    """`SparseNeighborhoodAttentionBlock` the obvious way: same arguments, same parameters."""

    slot_offsets: Tensor
    slot_levels: Tensor

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
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(embed_dim)
        self.q_in_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.kv_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.pos_encoding = RotaryFrequencies(
            embed_dim // n_heads,
            1 if rope_share_heads else n_heads,
            [rope_spatial_base_theta] * position_dim + [rope_level_base_theta],
            rope_freq_group_pattern,
            rope_enforce_freq_groups_equal,
        )
        offsets = [_window_offsets(width, position_dim) for width in neighborhood_sizes]
        levels = [torch.full((len(o),), level) for level, o in enumerate(offsets)]
        self.register_buffer("slot_offsets", torch.cat(offsets), persistent=False)  # [K, P]
        self.register_buffer("slot_levels", torch.cat(levels), persistent=False)  # [K]

    def reset_parameters(self) -> None:
        for module in (self.norm, self.q_in_proj, self.kv_proj, self.out_proj, self.pos_encoding):
            module.reset_parameters()

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
        positions = query_spatial_positions.to(
            torch.promote_types(query_spatial_positions.dtype, torch.float32)
        )
        shapes = level_spatial_shapes.to(positions.dtype)
        scales = shapes / shapes.amax(dim=0)  # [L, P]
        if query_level_indices is None:
            finest = level_spatial_shapes.prod(dim=-1).argmax()
            query_level_indices = finest.expand(len(query))

        batch = torch.repeat_interleave(query_batch_offsets.diff(), output_size=len(query))
        centers = (positions.unsqueeze(1) * scales).floor().long()  # [N, L, P]
        cells = centers[:, self.slot_levels] + self.slot_offsets  # [N, K, P]
        levels = self.slot_levels.expand(len(query), -1)  # [N, K]
        key_positions = torch.cat(
            ((cells.to(positions.dtype) + 0.5) / scales[self.slot_levels], levels.unsqueeze(-1)),
            dim=-1,
        )

        table, rows, taken = self._look_up(
            stacked_feature_maps.coalesce(), batch, cells, level_spatial_shapes
        )
        empty_row = len(table) - 1
        if background_embedding is not None:
            background_rows = len(table) + batch.unsqueeze(1) * len(scales) + levels
            rows = torch.where(taken, rows, background_rows)
            table = torch.cat((table, background_embedding.flatten(0, 1)))
            taken = torch.ones_like(taken)
        if query_mask is not None:
            taken = taken & ~query_mask.unsqueeze(1)

        x = self.norm(query) if self.norm_first else query
        q = self.q_in_proj(x).unflatten(-1, (self.n_heads, -1))
        q = self.pos_encoding(q, torch.cat((positions, query_level_indices.unsqueeze(-1)), dim=-1))
        attended = checkpoint(
            self._gather_project_attend,
            *(q, table, rows, taken, key_positions, empty_row),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        out: Tensor = self.out_proj(attended) + query
        return out if self.norm_first else self.norm(out)

    def _look_up(
        self, feature_map: Tensor, batch: Tensor, cells: Tensor, level_spatial_shapes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The map's values and a row of zeros [nnz + 1, E], each cell's row there, and if stored.

        Cells, rows and "is stored" are [N, K, P], [N, K] and [N, K].
        """
        sizes = feature_map.shape[: feature_map.sparse_dim()]
        stored = _linear_keys(feature_map.indices(), sizes)  # sorted, as the map is coalesced
        # The row of zeros has the key of no cell, the largest, so no search ends past it.
        stored = torch.cat((stored, stored.new_full((1,), torch.iinfo(stored.dtype).max)))
        keys = _linear_keys((batch.unsqueeze(1), *cells.unbind(-1), self.slot_levels), sizes)
        rows = torch.searchsorted(stored, keys)
        inside = ((cells >= 0) & (cells < level_spatial_shapes[self.slot_levels])).all(dim=-1)
        taken = inside & (stored[rows] == keys)
        table = F.pad(feature_map.values(), (0, 0, 0, 1))
        return table, torch.where(taken, rows, len(table) - 1), taken

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
        k = self.pos_encoding(k, key_positions)
        scores = torch.einsum("nhd,nkhd->nhk", q, k) / math.sqrt(q.shape[-1])
        # The lowest number instead of -inf, and zeros after: a query with nothing to attend to
        # gets zero instead of NaN.
        empty = ~taken.unsqueeze(1)
        scores = scores.masked_fill(empty, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1).masked_fill(empty, 0.0)
        return torch.einsum("nhk,nkhd->nhd", weights.to(v.dtype), v).flatten(1)


def _window_offsets(width: int, position_dim: int) -> Tensor:
    """Offsets of a window's cells from its centre in row-major order, [width ** P, P]."""
    axis = torch.arange(width) - width // 2
    return torch.stack(torch.meshgrid([axis] * position_dim, indexing="ij"), -1).flatten(0, -2)


def _linear_keys(coordinates: Sequence[Tensor] | Tensor, sizes: Sequence[int]) -> Tensor:
    """Row-major keys of coordinates given axis by axis, broadcast against one another."""
    keys = coordinates[0]
    for coordinate, size in zip(coordinates[1:], sizes[1:], strict=True):
        keys = keys * size + coordinate
    return keys
