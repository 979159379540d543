"""Multi-scale deformable attention over a sparse pyramid, called as the block is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._index.cell_hash import CellIndex, index_cells
from .._index.sampling import cell_weights, sample
from .._utils.checks import check_dropout, check_rows, refuse
from ..attention import NeighborhoodWeights
from ..plan import check_placement, query_images
from ..pyramid import FeaturePyramid
from ..windows import coordinate_dtype, level_scales
from ._base import Expected, check_sizes


class _Look(NamedTuple):
    """Where queries look, from arguments that are checked."""

    pyramid: FeaturePyramid
    cells: CellIndex
    images: Tensor  # int64 [N], in [0, B)
    silent: Tensor  # bool [N], True: takes no part
    places: Tensor  # [N, H, L, K, P], in cells of each level
    weights: Tensor  # [N, H, L, K], nothing for those that take no part


class SparseDeformableAttention(nn.Module):
    """Queries attend to a few places per level, which they choose, in a sparse feature pyramid.

    Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection" (2021),
    in any number of dimensions. From ``x``, the layer-normed query, each head predicts K places
    per level, as offsets from the query's position in cells of that level, and their weights, a
    softmax over levels and places. A place's value is interpolated between the ``2 ** P`` cells
    around it, whose centres are at whole numbers and a half. Where a cell holds no point its value
    is zero, or the background's: places may well find nothing, which is what a neighborhood never
    does (`SparseNeighborhoodAttentionBlock`). Points that share a cell are one, the sum of their
    embeddings, as in a coalesced map. On a densified map all this is what `grid_sample` with
    ``align_corners=False`` and ``padding_mode="zeros"`` computes.

    What is stored for the backward pass grows with queries x places, and no map is ever dense.

    Args:
        embed_dim: width of queries, points and output, E; a multiple of ``n_heads``.
        n_heads: number of heads, H.
        n_levels: number of levels, L.
        n_points: places per head and level, K.
        position_dim: number of spatial dimensions, P.
        dropout: rate on the output projection, in training.
        bias: whether the projections of values and output have biases; those of offsets and
            weights always do.
        norm_first: layer norm on the query before the projections, else after the residual.

    The query alone says where to look, so whoever wants its position to count adds an encoding.

    Raises:
        ValueError: sizes below one or that do not divide, a dropout outside [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        n_levels: int = 4,
        n_points: int = 4,
        position_dim: int = 2,
        dropout: float = 0.0,
        bias: bool = True,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            embed_dim, n_heads, n_levels=n_levels, n_points=n_points, position_dim=position_dim
        )
        check_dropout("dropout", dropout)
        self.embed_dim, self.n_heads, self.n_levels = embed_dim, n_heads, n_levels
        self.n_points, self.position_dim, self.norm_first = n_points, position_dim, norm_first

        n_places = n_heads * n_levels * n_points
        self.norm = nn.LayerNorm(embed_dim)
        self.offset_proj = nn.Linear(embed_dim, n_places * position_dim)
        self.weight_proj = nn.Linear(embed_dim, n_places)
        self.value_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Deformable DETR's initial values.

        Whatever the query, place k of a head lies ``k + 1`` cells from it in the head's own
        direction, and all weigh the same.
        """
        self.norm.reset_parameters()
        for proj in (self.offset_proj, self.weight_proj):
            nn.init.zeros_(proj.weight)
            nn.init.zeros_(proj.bias)
        for proj in (self.value_proj, self.out_proj):
            nn.init.xavier_uniform_(proj.weight)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)
        steps = torch.arange(1.0, self.n_points + 1)[:, None]
        places = (head_directions(self.n_heads, self.position_dim)[:, None] * steps)[:, None]
        with torch.no_grad():
            self.offset_proj.bias.copy_(places.expand(-1, self.n_levels, -1, -1).flatten())

    def make_plan(
        self,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        pyramid: FeaturePyramid,
    ) -> CellIndex:
        """What ``plan=`` takes: an index of the pyramid's cells, for any queries and values.

        On a GPU it waits for the device. The queries count for nothing here, where the block
        needs them, but are checked.

        Raises:
            ValueError: arguments of the wrong shape, dtype or device.
        """
        if not isinstance(pyramid, FeaturePyramid):
            refuse("pyramid", "a FeaturePyramid", pyramid)
        check_placement(query_spatial_positions, query_batch_offsets, pyramid)
        return index_cells(pyramid)

    def forward(
        self,
        query: Tensor,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        stacked_feature_maps: Tensor | FeaturePyramid,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None = None,
        background_embedding: Tensor | None = None,
        query_level_indices: Tensor | None = None,
        query_mask: Tensor | None = None,
        *,
        plan: CellIndex | None = None,
    ) -> Tensor:
        """Samples, projects and adds the residual.

        Args:
            query: ``[N, E]``, all images' queries, one after another.
            query_spatial_positions: floating ``[N, P]``, in cells of the full shape (the largest
                size of each axis over the levels).
            query_batch_offsets: integer ``[B + 1]``: image ``b`` owns the queries
                ``offsets[b]:offsets[b + 1]``.
            stacked_feature_maps: sparse COO ``[B, *full_shape, L, E]`` with one dense dimension,
                coalesced or not, or a `FeaturePyramid`.
            level_spatial_shapes: integer ``[L, P]``; may be None beside a pyramid.
            background_embedding: ``[B, L, E]``, what empty cells hold, also those beyond the map;
                None: zero, after the projection.
            query_level_indices: integer ``[N]``; taken as the block does, but of no use here.
            query_mask: bool ``[N]``, True: this query takes no part.
            plan: from `make_plan` for the same points; None: built here. Layers that share cells
                share a plan.

        Returns:
            ``[N, E]``.

        Raises:
            ValueError: any argument of the wrong shape, dtype or device, and on the CPU contents
                that cannot be right; names the argument, what was expected and what came.
        """
        look = self._look(
            query,
            query_spatial_positions,
            query_batch_offsets,
            stacked_feature_maps,
            level_spatial_shapes,
            background_embedding,
            query_level_indices,
            query_mask,
            plan,
        )
        table = self._table(look.cells, look.pyramid.values, background_embedding)
        weights = look.weights.to(table.dtype)
        attended = sample(table, look.cells, look.images, look.places, weights)
        projected = self.out_proj(attended.flatten(1).to(self.out_proj.weight.dtype))
        out: Tensor = query + self.dropout(projected)
        return out if self.norm_first else self.norm(out)

    def attention_weights(
        self,
        query: Tensor,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        stacked_feature_maps: Tensor | FeaturePyramid,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None = None,
        background_embedding: Tensor | None = None,
        query_level_indices: Tensor | None = None,
        query_mask: Tensor | None = None,
        *,
        plan: CellIndex | None = None,
        queries: Tensor | None = None,
    ) -> NeighborhoodWeights:
        """What `forward` multiplies each point's projected embedding with, for looking.

        A query's points are those in the cells around its places, ascending. A cell's weight is,
        summed over the places of a head, the place's softmax weight times the cell's share in the
        interpolation there. Points that share a cell each carry its whole weight, as their
        embeddings add.

        Counting each cell once and with a background, the weights of a query and head sum to one.
        Without a background they do not: what places give to empty cells is in no weight.

        Args:
            queries: integer ``[n]``, the queries to look at; None: all, which stores every pair.

        The other arguments, and the errors, are those of `forward`. Masked queries have no points.
        """
        look = self._look(
            query,
            query_spatial_positions,
            query_batch_offsets,
            stacked_feature_maps,
            level_spatial_shapes,
            background_embedding,
            query_level_indices,
            query_mask,
            plan,
        )
        queries = check_rows("queries", queries, len(query), query.device)
        chosen: tuple[Tensor, ...] = tuple(part[queries] for part in look[2:])
        row, cells, of_cells, empty = cell_weights(look.cells, *chosen)
        pair, points = look.cells.points_in(cells)
        row = row[pair]
        order = (row * len(look.pyramid) + points).argsort()
        counts = torch.bincount(row, minlength=len(empty))
        return NeighborhoodWeights(
            F.pad(counts.cumsum(0), (1, 0)),
            points[order],
            of_cells[pair[order]],
            None if background_embedding is None else empty,
        )

    def _look(
        self,
        query: Tensor,
        positions: Tensor,
        offsets: Tensor,
        maps: Tensor | FeaturePyramid,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None,
        background: Tensor | None,
        levels: Tensor | None,
        mask: Tensor | None,
        plan: CellIndex | None,
    ) -> "_Look":
        """Refuses what does not fit; says where queries look, and how much each place counts."""
        weight, sizes = self.norm.weight, (self.embed_dim, self.n_levels, self.position_dim)
        expected = Expected(*sizes, weight.dtype, weight.device)
        expected.check_queries(query, positions, background, levels, mask)
        pyramid = expected.pyramid(maps, level_spatial_shapes, background)
        check_placement(positions, offsets, pyramid)
        index = index_cells(pyramid) if plan is None else self._check_plan(plan, pyramid)

        images = query_images(positions, offsets, pyramid.batch_size)
        silent = images < 0 if mask is None else mask | (images < 0)
        x = self.norm(query) if self.norm_first else query
        places = self._places(x, positions, pyramid)
        weights = self._weights(x, silent)
        return _Look(pyramid, index, images.clamp(min=0), silent, places, weights)

    def _places(self, x: Tensor, positions: Tensor, pyramid: FeaturePyramid) -> Tensor:
        """``[N, H, L, K, P]``: where each head looks, in cells of each level."""
        positions = positions.to(coordinate_dtype(positions.dtype)).nan_to_num(0.0, 0.0, 0.0)
        centers = positions[:, None] * level_scales(pyramid.level_shapes, positions)
        sizes = self.n_heads, self.n_levels, self.n_points, self.position_dim
        offsets: Tensor = self.offset_proj(x).unflatten(-1, sizes)
        return centers[:, None, :, None] + offsets

    def _weights(self, x: Tensor, silent: Tensor) -> Tensor:
        """``[N, H, L, K]``: what each place counts, nothing for queries that take no part."""
        logits: Tensor = self.weight_proj(x).unflatten(-1, (self.n_heads, -1))
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights = weights.masked_fill(silent[:, None, None], 0)
        return weights.view(-1, self.n_heads, self.n_levels, self.n_points)

    def _table(self, index: CellIndex, values: Tensor, background: Tensor | None) -> Tensor:
        """``[M + absent, H, d]``: the values of all cells, then those of empty ones."""
        table: Tensor = self.value_proj(index.coalesce(values))
        if background is None:
            table = F.pad(table, (0, 0, 0, 1))
        else:
            table = torch.cat((table, self.value_proj(background).flatten(0, 1)))
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        return table.view(-1, self.n_heads, self.embed_dim // self.n_heads)

    def _check_plan(self, plan: CellIndex, pyramid: FeaturePyramid) -> CellIndex:
        if not isinstance(plan, CellIndex):
            refuse("plan", "a CellIndex, from make_plan, or None", plan)
        made_for = {
            "points": (plan.n_points, len(pyramid)),
            "images": (plan.batch_size, pyramid.batch_size),
            "level_shapes": (plan.level_shapes, pyramid.level_shapes),
            "device": (plan.device, pyramid.coordinates.device),
        }
        if any(plans != ours for plans, ours in made_for.values()):
            expected = ", ".join(f"{name} {ours}" for name, (_, ours) in made_for.items())
            refuse("plan", f"one for {expected}", repr(plan))
        return plan


def head_directions(n_heads: int, position_dim: int) -> Tensor:
    """``[H, P]``: a direction per head, its largest component one.

    In two dimensions a ring, as in Deformable DETR; else heads come in pairs that look opposite
    ways, each pair as far from those before as any of some quasi-random directions (M. Roberts,
    "The unreasonable effectiveness of quasirandom sequences", 2018).
    """
    if position_dim == 2:
        angles = torch.arange(n_heads, dtype=torch.float64) * (2 * math.pi / n_heads)
        directions = torch.stack((angles.sin(), angles.cos()), 1)
    else:
        candidates = _spread_directions(512, position_dim)
        pairs = candidates[:1] * 0
        pairs[0, -1] = 1
        while 2 * len(pairs) < n_heads:
            nearest = (candidates @ pairs.t()).abs().amax(1)
            pairs = torch.cat((pairs, candidates[nearest.argmin()][None]))
        directions = torch.stack((pairs, -pairs), 1).flatten(0, 1)[:n_heads]
    return (directions / directions.abs().amax(1, keepdim=True)).float()


def _spread_directions(n: int, dim: int) -> Tensor:
    """``[n, P]``: unit vectors, all over the half of the sphere where the last is positive."""
    root = 2.0
    for _ in range(64):  # to the root of x ** (dim + 1) = x + 1
        root = (1 + root) ** (1 / (dim + 1))
    powers = root ** -torch.arange(1.0, dim + 1, dtype=torch.float64)
    uniform = (0.5 + torch.arange(1.0, n + 1, dtype=torch.float64)[:, None] * powers) % 1
    directions = F.normalize(torch.special.ndtri(uniform), dim=1)
    return directions * directions[:, -1:].sign()
