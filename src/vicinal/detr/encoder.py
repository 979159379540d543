"""The encoder of a DETR on sparse data: every point of the pyramid is a query."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import (
    check_counts,
    check_range,
    check_tensor,
    check_type,
    reads_contents,
    refuse,
)
from .._utils.modules import Module
from .._utils.ragged import offsets_from_ids, take_rows
from ..nn._base import check_points_are_queries
from ..nn.projections import call_norm
from ..placement import QueryPlacement
from ..pyramid import FeaturePyramid
from .layers import (
    FeedForward,
    as_layers,
    as_levels,
    check_has_levels,
    points_of_levels,
    run_layer,
)


class EncoderLayer(Module):
    """Attention of every point to its neighbors, followed by a feed-forward part.

    Args:
        attention: `SparseNeighborhoodAttentionBlock`, `SparseDeformableAttention`, or any module
            with the same call signature and ``make_plan``, query levels included; it includes norm
            and residual.
        feed_forward: maps ``[n, E]`` to ``[n, E]``, norm and residual included, such as
            `FeedForward`.

    Raises:
        ValueError: a part is not a module.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.detr import EncoderLayer, FeedForward

        coordinates = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0]])  # image, row, column, level
        pyramid = FeaturePyramid(torch.randn(2, 8), coordinates, ((4, 4),), batch_size=1)
        attention = SparseNeighborhoodAttentionBlock(8, 2, n_levels=1, neighborhood_sizes=(3,))
        layer = EncoderLayer(attention, FeedForward(8))
        out = layer(pyramid.values, pyramid, pyramid.positions(), pyramid.batch_offsets())
        assert out.shape == (2, 8)
        ```
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        check_type("attention", attention, nn.Module)
        check_type("feed_forward", feed_forward, nn.Module)
        self.attention, self.feed_forward = attention, feed_forward

    def forward(
        self,
        values: Tensor,
        pyramid: FeaturePyramid,
        positions: Tensor,
        offsets: Tensor,
        plan: Any = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Computes the new values of the points, or of those that are queries.

        Args:
            values: floating ``[nnz, E]``, used instead of the pyramid's own values.
            pyramid: the points.
            positions: floating ``[nnz, P]``, as `FeaturePyramid.positions` gives them.
            offsets: int64 ``[B + 1]``, as `FeaturePyramid.batch_offsets` gives them.
            plan: from the attention's ``make_plan`` for these points; None (default): made by the
                attention.
            rows: int64 ``[N]``, the rows of the points that are queries, each once. Positions,
                offsets and plan are theirs, and the other points keep their values. None (default):
                all points, in their order.

        Returns:
            ``[nnz, E]``.

        Raises:
            ValueError: ``pyramid`` is not a `FeaturePyramid`, ``rows`` is not an integer tensor
                ``[N]`` or, on the CPU, has other numbers than rows of points or one of them twice,
                the attention has a ``point_dim`` other than E, or a part refuses its arguments.
        """
        check_points_are_queries(self.attention)
        check_type("pyramid", pyramid, FeaturePyramid)
        points = pyramid.with_values(values)
        if rows is None:
            return self._attend(values, points, positions, offsets, pyramid.levels, plan)
        rows = _check_rows(rows, values)
        query, levels = values.index_select(0, rows), pyramid.levels.index_select(0, rows)
        new = self._attend(query, points, positions, offsets, levels, plan)
        # In place, since autocast on CPUs refuses the other form in float16.
        return values.clone().index_copy_(0, rows, new.to(values.dtype))

    def _attend(
        self,
        query: Tensor,
        points: FeaturePyramid,
        positions: Tensor,
        offsets: Tensor,
        levels: Tensor,
        plan: Any,
    ) -> Tensor:
        """The new values of the points that are queries."""
        attended = self.attention(
            query, positions, offsets, points, query_level_indices=levels, plan=plan
        )
        ids = getattr(plan, "query_ids", None)
        if ids is not None and isinstance(self.feed_forward, FeedForward):
            return self.feed_forward(attended, ids)
        out: Tensor = self.feed_forward(attended)
        return out


def _check_rows(rows: Tensor, values: Tensor) -> Tensor:
    """``rows`` in int64."""
    n = values.shape[0]
    rows = check_tensor("rows", rows, ("N",), kind="integer", device=values.device).long()
    if reads_contents(None, values.device):
        check_range("rows", rows, n)
        is_row = torch.zeros(n, dtype=torch.bool, device=values.device).index_fill(0, rows, True)
        if int(is_row.sum()) < rows.shape[0]:
            refuse("rows", "each row at most once", f"{rows.shape[0]} rows, some of them twice")
    return rows


class Encoder(Module):
    """A stack of encoder layers with a final layer norm, on a pyramid of sparse points.

    The encoder of Deformable DETR (Zhu et al., "Deformable DETR", 2021), restricted to nonempty
    cells. Points do not move, so one plan serves all layers.

    With ``query_levels``, only the points of these levels are queries. Those of other levels are
    keys in every layer, with the values that they came with; the final layer norm is applied to
    them too. The finest level often has most of the points, and without its queries the encoder
    takes a fraction of the time and memory.

    Args:
        layers: at least one `EncoderLayer`; their attentions have the same windows.
        embed_dim: width of the values, E.
        query_levels: the levels whose points are queries; None (default): all.
        checkpoint: recompute activations in the backward pass instead of storing them; default
            False.

    Raises:
        ValueError: ``layers`` is empty or has no modules, ``embed_dim`` is below 1, or
            ``query_levels`` is empty or has negative numbers.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.detr import Encoder, EncoderLayer, FeedForward

        coordinates = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0]])  # image, row, column, level
        pyramid = FeaturePyramid(torch.randn(2, 8), coordinates, ((4, 4),), batch_size=1)
        layers = [
            EncoderLayer(SparseNeighborhoodAttentionBlock(8, 2, 1, (3,)), FeedForward(8))
            for _ in range(2)
        ]
        assert Encoder(layers, embed_dim=8)(pyramid).values.shape == (2, 8)
        ```
    """

    def __init__(
        self,
        layers: Sequence[EncoderLayer],
        embed_dim: int,
        *,
        query_levels: Sequence[int] | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        layers = as_layers(layers)
        check_counts(embed_dim=embed_dim)
        self.query_levels = as_levels("query_levels", query_levels)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(int(embed_dim))
        self.checkpoint = checkpoint

    def forward(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """Encodes a pyramid. On a GPU this synchronizes, to see whether points are sorted by image.

        Args:
            pyramid: points with values ``[nnz, E]``, in any order.

        Returns:
            the same points, in the same order, with new values ``[nnz, E]``.

        Raises:
            ValueError: the values have another width, the pyramid lacks one of ``query_levels``, an
                attention has a ``point_dim`` other than E, or refuses its arguments.
        """
        for layer in self.layers:
            check_points_are_queries(getattr(layer, "attention", None))
        check_type("pyramid", pyramid, FeaturePyramid)
        width = self.norm.normalized_shape[0]
        check_tensor("pyramid.values", pyramid.values, ("nnz", width), kind="floating")
        check_has_levels(pyramid, self.query_levels)
        if (pyramid.batch[1:] >= pyramid.batch[:-1]).all():
            return pyramid.with_values(self._encode(pyramid))
        order = torch.argsort(pyramid.batch, stable=True)
        sorted_points = dataclasses.replace(
            pyramid,
            values=take_rows(pyramid.values, order),
            coordinates=take_rows(pyramid.coordinates, order),
            point_rows=None,
            point_batch=None,
            check_contents=False,
        )
        return pyramid.with_values(take_rows(self._encode(sorted_points), torch.argsort(order)))

    def _encode(self, pyramid: FeaturePyramid) -> Tensor:
        """The new values of points that are sorted by image."""
        positions, offsets, levels = QueryPlacement.of_points(pyramid)
        rows = points_of_levels(pyramid, self.query_levels)
        if rows is not None:
            positions, levels = positions[rows], pyramid.levels[rows]
            offsets = offsets_from_ids(pyramid.batch[rows], pyramid.batch_size)
        attention: Any = self.layers[0].attention
        plan = attention.make_plan(positions, offsets, pyramid, levels)
        values = pyramid.values
        # No layer gets one tensor twice, of which `torch.compile` would make another graph.
        points = pyramid.with_values(values.view_as(values))
        for layer in self.layers:
            values = run_layer(
                layer,
                *(values, points, positions, offsets, plan),
                checkpoint=self.checkpoint,
                **({} if rows is None else {"rows": rows}),
            )
        return call_norm(self.norm, values)

    def extra_repr(self) -> str:
        return "" if self.query_levels is None else f"query_levels={list(self.query_levels)}"
