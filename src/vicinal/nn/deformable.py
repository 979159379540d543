"""Multi-scale deformable attention over a sparse pyramid, with the call form of the block."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._index.cell_hash import CellIndex, check_cell_index, index_cells
from .._index.sampling import cell_weights, sample
from .._utils.checks import check_rows, check_type, has_contents, refuse
from .._utils.profiling import stage
from .._utils.ragged import offsets_from_counts
from ..attention import NeighborhoodWeights
from ..placement import check_placement, query_images
from ..pyramid import FeaturePyramid
from ..windows import as_query_levels, level_scales
from ._base import Inputs, SparseAttention, check_sizes
from .initialized import BiasedLinear, XavierLinear, reset_children
from .projections import call_dropout, call_norm
from .row_dropout import RowDropout


class Sampling(NamedTuple):
    """Where each query samples, and with what weight."""

    images: Tensor  # int64 [N], in [0, B)
    masked: Tensor  # bool [N], True: masked or invalid
    locations: Tensor  # [N, H, L, K, P], in cells of each level
    weights: Tensor  # [N, H, L, K], zero for masked queries


class SparseDeformableAttention(SparseAttention[CellIndex]):
    """Attends from queries to a few learned sampling locations per level of a sparse pyramid.

    Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection" (2021),
    in any number of dimensions. From ``x``, the layer-normed query, each head predicts K sampling
    locations per level, as offsets from the query's position in cells of that level, and their
    weights, a softmax over levels and locations. The value at a location is interpolated linearly
    between the centers of the ``2 ** P`` cells around it. An empty cell's value is zero, or the
    background's: unlike `SparseNeighborhoodAttentionBlock`, sampling may miss every point. Points
    that share a cell count as one with the sum of their embeddings, as in a coalesced map. On a
    dense map this equals `torch.nn.functional.grid_sample` with ``align_corners=False`` and
    ``padding_mode="zeros"``.

    `attention_weights` returns the factor of each point's projected embedding. A query's points are
    those in the cells around its sampling locations, in ascending order. A cell's weight is the sum
    over a head's locations of the softmax weight times the cell's interpolation weight; points that
    share a cell each carry its whole weight. With a background the weights of a query and head sum
    to one, each cell counted once; without one, the share of empty cells is missing. Masked queries
    have no points.

    Meta and fake tensors give shapes; `attention_weights`, whose shapes depend on contents, refuses
    them. Memory for the backward pass grows with queries x locations; no dense map is built. The
    sampling locations depend on the query alone, so add a position encoding to it where positions
    matter.

    Args:
        embed_dim: width of queries, points and output, E. A multiple of ``n_heads``.
        n_heads: number of heads, H.
        n_levels: number of levels, L. Default: 4.
        n_points: sampling locations per head and level, K. Default: 4.
        position_dim: number of spatial dimensions, P. Default: 2.
        dropout: probability of dropping a channel of the output projection, in training.
            Default: 0.
        bias: whether the projections of values and output have biases. Those of offsets and
            weights always do. Default: True.
        norm_first: whether the layer norm is on the query before the projections (default), or on
            the result after the residual.
        device: of the parameters. None (default): torch's default device.
        dtype: of the parameters. None (default): torch's default dtype.

    Raises:
        ValueError: sizes below one or that do not divide, or ``dropout`` outside [0, 1).

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseDeformableAttention

        cells = torch.randint(0, 64, (500, 2))
        points = torch.nn.functional.pad(cells, (1, 0))  # image, row, column
        pyramid = FeaturePyramid.from_points(points, torch.randn(500, 32), (64, 64), batch_size=1)
        attention = SparseDeformableAttention(embed_dim=32, n_heads=4)
        queries, positions = torch.randn(5, 32), 64 * torch.rand(5, 2)
        out = attention(queries, positions, torch.tensor([0, 5]), pyramid)
        assert out.shape == (5, 32)
        ```
    """

    _plan_type = CellIndex
    _uses_levels = False

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
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        embed_dim, n_heads, n_levels, n_points, position_dim = check_sizes(
            embed_dim, n_heads, n_levels=n_levels, n_points=n_points, position_dim=position_dim
        )
        super().__init__(embed_dim, n_heads, n_levels, position_dim, dropout, norm_first)
        self.n_points = n_points

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        n_locations = n_heads * n_levels * n_points
        self.norm = nn.LayerNorm(embed_dim, **kind)
        self.offset_proj = _OffsetProjection(
            embed_dim, n_heads, n_levels, n_points, position_dim, **kind
        )
        self.weight_proj = BiasedLinear(embed_dim, n_locations, zero_weights=True, **kind)
        self.value_proj = XavierLinear(embed_dim, embed_dim, bias=bias, **kind)
        self.out_proj = XavierLinear(embed_dim, embed_dim, bias=bias, **kind)
        self.dropout = RowDropout(dropout)

    def reset_parameters(self) -> None:
        """Sets Deformable DETR's initial values.

        For every query, location k of a head lies ``k + 1`` cells away in that head's direction,
        and all weights are equal.
        """
        reset_children(self)

    def make_plan(
        self,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        pyramid: FeaturePyramid,
        query_level_indices: Tensor | None = None,
        *,
        check_contents: bool | None = None,
    ) -> CellIndex:
        """Makes the ``plan`` of `forward`: an index of the pyramid's cells.

        It serves any queries and values on these points; the queries are only validated. On a GPU
        it synchronizes.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device.
        """
        check_type("pyramid", pyramid, FeaturePyramid)
        positions, _, _ = check_placement(
            query_spatial_positions, query_batch_offsets, pyramid, check_contents
        )
        as_query_levels(query_level_indices, positions, pyramid.n_levels, check_contents)
        with stage("index_cells"):
            return index_cells(pyramid)

    def _add_attended(self, inputs: Inputs, plan: CellIndex) -> Tensor:
        query = inputs.query
        sampling = self._sampling(inputs)
        index, pyramid = self._known_points(inputs, plan, sampling)
        table = self._table(index, pyramid.values, inputs.background)
        images, _, locations, weights = sampling
        attended = sample(table, index, images, locations, weights.to(table.dtype))
        projected = self.out_proj(attended.flatten(1).to(self._reference.dtype))
        return query + call_dropout(self.dropout, projected, plan.query_ids)

    def _weights(
        self, inputs: Inputs, plan: CellIndex, queries: Tensor | None
    ) -> NeighborhoodWeights:
        if not has_contents(inputs.query):
            refuse("query", "a tensor with contents, which the points depend on", inputs.query)
        queries = check_rows("queries", queries, len(inputs.query), inputs.query.device)
        sampling = self._sampling(inputs)
        index, pyramid = self._known_points(inputs, plan, sampling)
        chosen: tuple[Tensor, ...] = tuple(part[queries] for part in sampling)
        row, cells, cell_factors, empty = cell_weights(index, *chosen)
        pair, points = index.points_in(cells)
        row = row[pair]
        order = (row * len(pyramid) + points).argsort()
        return NeighborhoodWeights(
            offsets_from_counts(torch.bincount(row, minlength=len(empty))),
            points[order],
            cell_factors[pair[order]],
            None if inputs.background is None else empty,
        )

    def _check_plan(self, plan: CellIndex, inputs: Inputs, check_contents: bool | None) -> None:
        check_cell_index(plan, inputs.pyramid, check_contents)

    def _known_points(
        self, inputs: Inputs, plan: CellIndex, sampling: Sampling
    ) -> tuple[CellIndex, FeaturePyramid]:
        """The points that may lie around the sampling locations, and their cells."""
        return plan, inputs.pyramid

    def _sampling(self, inputs: Inputs) -> Sampling:
        batch_size = inputs.pyramid.batch_size
        images = query_images(inputs.positions, inputs.offsets, batch_size)
        masked = images < 0 if inputs.mask is None else inputs.mask | (images < 0)
        x = call_norm(self.norm, inputs.query) if self.norm_first else inputs.query
        locations = self._locations(x, inputs.finite_positions(), inputs.pyramid)
        return Sampling(images.clamp(min=0), masked, locations, self._softmax(x, masked))

    def _locations(self, x: Tensor, positions: Tensor, pyramid: FeaturePyramid) -> Tensor:
        """``[N, H, L, K, P]``: the sampling locations, in cells of each level."""
        centers = positions[:, None] * level_scales(pyramid.level_shapes, positions)
        sizes = self.n_heads, self.n_levels, self.n_points, self.position_dim
        offsets: Tensor = self.offset_proj(x).unflatten(-1, sizes)
        return centers[:, None, :, None] + offsets

    def _softmax(self, x: Tensor, masked: Tensor) -> Tensor:
        """``[N, H, L, K]``: the weight of each location, zero for masked queries."""
        logits: Tensor = self.weight_proj(x).unflatten(-1, (self.n_heads, -1))
        weights = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights = weights.masked_fill(masked[:, None, None], 0)
        return weights.view(-1, self.n_heads, self.n_levels, self.n_points)

    def _table(self, index: CellIndex, values: Tensor, background: Tensor | None) -> Tensor:
        """The values of the M occupied cells, then those of empty cells if any, see `sample`."""
        table: Tensor = self.value_proj(index.coalesce(values))
        if background is not None:
            table = torch.cat((table, self.value_proj(background).flatten(0, 1)))
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        return table.view(-1, self.n_heads, self.embed_dim // self.n_heads)


class _OffsetProjection(nn.Linear):
    """Predicts the offsets of sampling locations. At first they are the same for every query:
    location k of a head lies ``k + 1`` cells away in that head's direction.
    """

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        n_levels: int,
        n_points: int,
        position_dim: int,
        **kind: Any,
    ) -> None:
        self.sizes = n_heads, n_levels, n_points, position_dim
        super().__init__(embed_dim, math.prod(self.sizes), **kind)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the initial values."""
        n_heads, n_levels, n_points, position_dim = self.sizes
        steps = torch.arange(1.0, n_points + 1, device="cpu")[:, None]
        offsets = (head_directions(n_heads, position_dim)[:, None] * steps)[:, None]
        self.weight.zero_()
        self.bias.copy_(offsets.expand(-1, n_levels, -1, -1).flatten())


def head_directions(n_heads: int, position_dim: int) -> Tensor:
    """``[H, P]`` on the CPU, whichever device is torch's default: a direction per head, its largest
    component one.

    In two dimensions they form a ring, as in Deformable DETR. Otherwise heads come in pairs of
    opposite directions, each pair as far from the earlier ones as any of a set of quasi-random
    directions (M. Roberts, "The unreasonable effectiveness of quasirandom sequences", 2018).
    """
    if position_dim == 2:
        steps = torch.arange(n_heads, dtype=torch.float64, device="cpu")
        angles = steps * (2 * math.pi / n_heads)
        directions = torch.stack((angles.sin(), angles.cos()), 1)
    else:
        candidates = _spread_directions(512, position_dim)
        pairs = candidates[:1] * 0
        pairs[0, -1] = 1
        while 2 * len(pairs) < n_heads:
            nearest = (candidates @ pairs.t()).abs().amax(1)
            pairs = torch.cat((pairs, candidates[nearest.argmin(keepdim=True)]))
        directions = torch.stack((pairs, -pairs), 1).flatten(0, 1)[:n_heads]
    return (directions / directions.abs().amax(1, keepdim=True)).float()


def _spread_directions(n: int, dim: int) -> Tensor:
    """``[n, P]``: unit vectors spread over the half sphere where the last component is positive."""
    root = 2.0
    for _ in range(64):  # converges to the root of x ** (dim + 1) = x + 1
        root = (1 + root) ** (1 / (dim + 1))
    axes, numbers = (
        torch.arange(1.0, stop, dtype=torch.float64, device="cpu") for stop in (dim + 1, n + 1)
    )
    uniform = (0.5 + numbers[:, None] * root**-axes) % 1
    directions = F.normalize(torch.special.ndtri(uniform), dim=1)
    return directions * directions[:, -1:].sign()
