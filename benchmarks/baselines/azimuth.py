"""What trackers use: hits sorted by azimuth, and 1-D windows of that order, around the seam.

Van Stroud et al., "Transformers for Charged Particle Track Reconstruction in High Energy Physics"
(2024).
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal import FeaturePyramid, RotaryEncoding, Window, plan_neighborhoods

CHUNKS = 32, 256  # the fewest and the most queries that share their keys


class Chunks(NamedTuple):
    """The windows of all events, c chunks of q queries and k keys in all.

    Attributes:
        queries: int64 ``[c, q]``, the rows of the queries, in order around the seam.
        valid: bool ``[c, q]``, False where a chunk is longer than what is left of its event.
        keys: int64 ``[c, k]``, the rows of the keys.
        turns: int64 ``[c, k]``, by how many periods a key is moved, so that it is near its queries.
        mask: bool ``[c, 1, q, k]``, whether a key is in a query's window.
    """

    queries: Tensor
    valid: Tensor
    keys: Tensor
    turns: Tensor
    mask: Tensor


class AzimuthAttention(nn.Module):
    """Every hit attends to ``window`` others, half of them on each side in the order of azimuth.

    It has the call signature, the projections and the rotated values of the blocks of `PointUNet`,
    for maps of one level. Of an event with fewer hits, a window has as many as there are on each
    side.

    Args:
        embed_dim: width, E.
        n_heads: number of heads.
        axis: the azimuth, which is periodic.
        position_dim: number of spatial dimensions.
        window: number of other hits; or a neighborhood, for as many as it holds on average in the
            first events that a plan is made for.
    """

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        axis: int,
        position_dim: int = 3,
        window: int | tuple[int, ...] | Window = 512,
    ) -> None:
        super().__init__()
        self.n_heads, self.axis, self.window = n_heads, axis, window
        self.norm = nn.LayerNorm(embed_dim)
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.pos_encoding = RotaryEncoding(embed_dim // n_heads, n_heads, position_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def make_plan(
        self,
        positions: Tensor,
        offsets: Tensor,
        pyramid: FeaturePyramid,
        levels: Tensor | None = None,
    ) -> Chunks:
        """The chunks of all events; layers share them."""
        if not isinstance(self.window, int):
            counts = plan_neighborhoods(positions, offsets, pyramid, [self.window]).counts()
            self.window = round(float(counts.double().mean())) - 1  # others
        azimuth, half = positions[:, self.axis], max(self.window // 2, 1)
        events = [
            _chunks_of_event(start + torch.argsort(azimuth[start:stop], stable=True), half)
            for start, stop in itertools.pairwise(offsets.tolist())
            if stop > start
        ]
        return Chunks(*(_cat(parts) for parts in zip(*events, strict=True)))

    def forward(
        self,
        query: Tensor,
        positions: Tensor,
        offsets: Tensor,
        pyramid: FeaturePyramid,
        *,
        query_level_indices: Tensor | None = None,
        plan: Chunks | None = None,
    ) -> Tensor:
        """``[n, E]``, the residual included; every hit is a query and a key."""
        if not len(query):
            return query
        plan = plan or self.make_plan(positions, offsets, pyramid)
        level = positions.new_zeros(len(positions), 1)
        coordinates = torch.cat((positions, level), 1)
        moved = plan.turns.nonzero(as_tuple=True)  # the few keys around the seam
        moved_rows = plan.keys[moved]
        there = coordinates[moved_rows]
        turns = plan.turns[moved].to(there)
        there[:, self.axis] += turns * pyramid.level_shapes[0][self.axis]

        def in_windows(x: Tensor) -> Tensor:
            """``[c, H, k, d]``: keys or values ``[n, H, d]``, rotated where windows have them."""
            near = self.pos_encoding(x, coordinates)[plan.keys]
            return near.index_put(moved, self.pos_encoding(x[moved_rows], there)).transpose(1, 2)

        q, k, v = self.in_proj(self.norm(query)).unflatten(1, (3, self.n_heads, -1)).unbind(1)
        q = self.pos_encoding(q, coordinates)[plan.queries].transpose(1, 2)
        attended = F.scaled_dot_product_attention(
            q, in_windows(k), in_windows(v), attn_mask=plan.mask
        )
        rows = attended.transpose(1, 2)[plan.valid]
        attended = torch.empty_like(rows).index_copy(0, plan.queries[plan.valid], rows)
        out: Tensor = query + self.out_proj(self.pos_encoding(attended, -coordinates).flatten(1))
        return out


def _chunks_of_event(order: Tensor, half: int) -> Chunks:
    """The chunks of one event, whose rows are in ``order``."""
    n = len(order)
    size = min(max(half // 2, CHUNKS[0]), CHUNKS[1])  # then a fifth of the pairs is masked
    half = min(half, (n - 1) // 2)
    first = torch.arange(0, n, size, device=order.device)[:, None]
    rank = first + torch.arange(size, device=order.device)
    key_rank = first - half + torch.arange(size + 2 * half, device=order.device)
    mask = (key_rank[:, None, :] - rank[:, :, None]).abs() <= half
    turns = key_rank.div(n, rounding_mode="floor")
    # Queries beyond the event are those of its beginning, moved by a turn; they are left out.
    return Chunks(order[rank % n], rank < n, order[key_rank % n], turns, mask[:, None])


def _cat(parts: tuple[Tensor, ...]) -> Tensor:
    """Concatenates chunks, those with fewer keys filled up with zeros: False in the mask."""
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1])) for part in parts])
