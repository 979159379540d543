"""Layers that encoders and decoders are made of."""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpointed

from .._utils.checks import (
    as_integers,
    as_list,
    check_counts,
    check_dropout,
    check_tensor,
    describe,
    reads_contents,
    refuse,
)
from .._utils.constants import constant
from .._utils.modules import Module
from .._utils.ragged import batch_ids, rank_in_image
from ..nn._base import check_sizes
from ..nn.initialized import BiasedLinear, reset_children
from ..nn.projections import call_dropout, call_norm
from ..nn.rotary import RotaryEncoding
from ..nn.row_dropout import RowDropout
from ..pyramid import FeaturePyramid
from ..windows import coordinate_dtype
from .boxes import apply_deltas
from .structures import ObjectQueries, check_object_queries

_INITIAL_SCORE = 0.01  # low, so that the loss of the many background queries starts small
_PADDING_GROUP = torch.iinfo(torch.int64).min  # the group of padding rows, used by no query


class FeedForward(Module):
    """The feed-forward part of a transformer layer, with layer norm and residual connection.

    Computes ``x + W_2 gelu(W_1 norm(x))``, or ``norm(x + W_2 gelu(W_1 x))`` with
    ``norm_first=False`` (Vaswani et al., "Attention Is All You Need", 2017).

    Args:
        embed_dim: width of the input and of the output, E.
        hidden_dim: width of the hidden layer; None (default): ``4 * embed_dim``.
        dropout: rate after each of the two linear layers, in training; default 0.
        norm_first: layer norm on the input (default), else after the residual connection.

    Raises:
        ValueError: a width is below 1, or ``dropout`` is outside [0, 1).

    Example:
        ```python
        import torch
        from vicinal.detr import FeedForward

        out = FeedForward(embed_dim=8)(torch.randn(5, 8))
        assert out.shape == (5, 8)
        ```
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim)
        hidden_dim = 4 * embed_dim if hidden_dim is None else hidden_dim
        check_counts(hidden_dim=hidden_dim)
        check_dropout("dropout", dropout)
        embed_dim, hidden_dim = int(embed_dim), int(hidden_dim)
        self.embed_dim, self.norm_first = embed_dim, norm_first
        self.norm = nn.LayerNorm(embed_dim)
        self.layers = _RowLayers(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            RowDropout(dropout),
            nn.Linear(hidden_dim, embed_dim),
            RowDropout(dropout),
        )

    def forward(self, x: Tensor, row_ids: Tensor | None = None) -> Tensor:
        """Applies the layer to every row.

        Args:
            x: floating ``[n, E]``.
            row_ids: integer ``[n]``, what dropout counts each row as, see `RowDropout`. None
                (default): its number.

        Returns:
            ``[n, E]``.

        Raises:
            ValueError: ``x`` has another shape.
        """
        x = check_tensor("x", x, ("n", self.embed_dim), kind="floating")
        if self.norm_first:
            return x + self.layers(call_norm(self.norm, x), row_ids)  # type: ignore[no-any-return]
        return call_norm(self.norm, x + self.layers(x, row_ids))


class _RowLayers(nn.Sequential):
    """Layers one after another, of which those that drop elements get the ids of rows."""

    def forward(self, x: Tensor, row_ids: Tensor | None = None) -> Tensor:
        for layer in self:
            x = call_dropout(layer, x, row_ids)
        return x


class DetectionHead(Module):
    """Predicts class logits and refined boxes from embeddings.

    Classes are independent sigmoids (Lin et al., "Focal Loss for Dense Object Detection", 2017).
    Boxes are refined by `apply_deltas`, relative to their own size, so predictions do not depend
    on the size of the map. Initially all scores are near 0.01 and boxes are returned unchanged.

    Args:
        embed_dim: width of the embeddings, E.
        n_classes: number of classes, C.
        position_dim: number of spatial dimensions, P; default 2.

    Raises:
        ValueError: a size is below 1.

    Example:
        ```python
        import torch
        from vicinal.detr import DetectionHead

        head, boxes = DetectionHead(embed_dim=8, n_classes=3), torch.rand(5, 4) + 1
        logits, refined = head(torch.randn(5, 8), boxes)
        assert logits.shape == (5, 3)
        assert torch.equal(refined, boxes)  # a new head does not move boxes
        ```
    """

    def __init__(self, embed_dim: int, n_classes: int, position_dim: int = 2) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim, n_classes=n_classes, position_dim=position_dim)
        embed_dim, n_classes, position_dim = int(embed_dim), int(n_classes), int(position_dim)
        self.embed_dim, self.position_dim = embed_dim, position_dim
        initial_logit = -math.log((1 - _INITIAL_SCORE) / _INITIAL_SCORE)
        self.classes = BiasedLinear(embed_dim, n_classes, initial_bias=initial_logit)
        self.box = nn.Sequential(
            nn.Linear(embed_dim, embed_dim),
            nn.GELU(),
            nn.Linear(embed_dim, embed_dim),
            nn.GELU(),
            BiasedLinear(embed_dim, 2 * position_dim, zero_weights=True),
        )

    def reset_parameters(self) -> None:
        """Reinitializes all parameters."""
        self.classes.reset_parameters()
        reset_children(self.box)

    def forward(self, embeddings: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts logits and boxes.

        Args:
            embeddings: floating ``[n, E]``.
            boxes: floating ``[n, 2P]``, the boxes to refine, center and size per axis.

        Returns:
            logits ``[n, C]`` and boxes ``[n, 2P]`` in the dtype of ``boxes``.

        Raises:
            ValueError: shapes, dtypes or devices do not match.
        """
        embeddings = check_tensor("embeddings", embeddings, ("n", self.embed_dim), kind="floating")
        shape = (embeddings.shape[0], 2 * self.position_dim)
        boxes = check_tensor("boxes", boxes, shape, kind="floating", device=embeddings.device)
        logits: Tensor = self.classes(embeddings)
        return logits, apply_deltas(boxes, self.box(embeddings))


class QuerySelfAttention(Module):
    """Dense multi-head self-attention among the object queries of each image.

    ``out = query + W_o attention(R(W_q x), R(W_k x), W_v x)``, where ``x`` is the layer-normed
    query and R is a rotary encoding of the box's center and the query's level. Self-attention is
    what suppresses duplicate detections in a DETR (Carion et al., "End-to-End Object Detection with
    Transformers", 2020). Queries of an image are padded to the largest number in the batch.

    Rotary angles follow distances within the map, not the short way around periodic axes: queries
    on both sides of the seam attend to each other as if they were a period apart.

    Args:
        embed_dim: width of the embeddings, E, an even multiple of ``n_heads``.
        n_heads: number of heads, H.
        position_dim: number of spatial dimensions, P; default 2.
        dropout: rate on the softmax weights and on the output projection, in training; default 0.
        bias: whether the projections have biases; default True.
        norm_first: layer norm on the query (default), else after the residual connection.
        max_queries: the largest number of queries of an image, to which all images are padded.
            None (default): the largest number in the batch. With it nothing waits for a GPU, so
            that CUDA graphs can capture the layer. Further queries of an image attend to nothing,
            and no query attends to them; on the CPU they raise a ValueError.

    Raises:
        ValueError: a size is below 1, ``embed_dim`` is not an even multiple of ``n_heads``, or
            ``dropout`` is outside [0, 1).

    Example:
        ```python
        import torch
        from vicinal.detr import ObjectQueries, QuerySelfAttention

        queries = ObjectQueries(
            embeddings=torch.randn(3, 8),
            boxes=torch.tensor([[5.0, 5, 2, 2], [9, 3, 4, 4], [1, 1, 2, 2]]),
            levels=torch.tensor([0, 1, 0]),
            offsets=torch.tensor([0, 2, 3]),
        )
        out = QuerySelfAttention(embed_dim=8, n_heads=2)(queries)
        assert out.shape == (3, 8)
        ```
    """

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        position_dim: int = 2,
        dropout: float = 0.0,
        bias: bool = True,
        norm_first: bool = True,
        *,
        max_queries: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, n_heads, position_dim=position_dim)
        if max_queries is not None:
            check_counts(max_queries=max_queries)
            max_queries = int(max_queries)
        if embed_dim % (2 * n_heads):
            refuse("embed_dim", f"an even multiple of n_heads ({n_heads})", embed_dim)
        check_dropout("dropout", dropout)
        embed_dim, n_heads, position_dim = int(embed_dim), int(n_heads), int(position_dim)
        self.embed_dim, self.n_heads = embed_dim, n_heads
        self.position_dim, self.norm_first = position_dim, norm_first
        self.max_queries = max_queries
        self.norm = nn.LayerNorm(embed_dim)
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.pos_encoding = RotaryEncoding(embed_dim // n_heads, n_heads, position_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: ObjectQueries) -> Tensor:
        """Attends within each image, and within each group if ``queries`` has groups.

        On a GPU this synchronizes, to get the largest number of queries of an image, unless
        there is one image or ``max_queries`` was given.

        Args:
            queries: the object queries of all images.

        Returns:
            the new embeddings, ``[N, E]``.

        Raises:
            ValueError: shapes, dtypes or devices of the queries do not match, or on the CPU an
                image has more than ``max_queries``.
        """
        queries = check_object_queries(queries, self.embed_dim, self.position_dim)
        x = call_norm(self.norm, queries.embeddings) if self.norm_first else queries.embeddings
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        coordinates = torch.cat((queries.positions, queries.levels[:, None]), 1)
        coordinates = coordinates.to(coordinate_dtype(queries.boxes.dtype))
        q, k = self.pos_encoding(q, coordinates), self.pos_encoding(k, coordinates)
        attended = self._attend(q, k, v, queries).flatten(1)
        out: Tensor = queries.embeddings + self.dropout(self.out_proj(attended))
        return out if self.norm_first else call_norm(self.norm, out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, queries: ObjectQueries) -> Tensor:
        """``[N, H, d]``, computed on tensors that are padded to ``[B, H, max count, d]``."""
        offsets = queries.offsets.long()
        counts = offsets.diff()
        max_count = self._largest_count(counts, q.shape[0])
        image = batch_ids(offsets, q.shape[0])
        column = rank_in_image(image, offsets)
        groups = torch.zeros_like(image) if queries.groups is None else queries.groups.long()
        surplus = None
        if self.max_queries is not None:
            # They share a column of padding, and their results are zero.
            surplus = column >= max_count
            column, max_count = column.clamp(max=max_count), max_count + 1
            groups = groups.masked_fill(surplus, _PADDING_GROUP)
        # Padding forms a group of its own, so no row of the mask is all False.
        group = torch.full((len(counts), max_count), _PADDING_GROUP, device=q.device)
        group[image, column] = groups
        mask = (group[:, None, :] == group[:, :, None])[:, None]  # [B, 1, max count, max count]

        def pad(x: Tensor) -> Tensor:
            if surplus is not None:  # a weight of zero does not hide a value that is not finite
                x = x.masked_fill(surplus[:, None, None], 0)
            padded = x.new_zeros(*group.shape, *x.shape[1:])
            return padded.index_put((image, column), x).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            pad(q),
            pad(k),
            pad(v),
            attn_mask=mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        rows = attended.transpose(1, 2)[image, column]
        return rows if surplus is None else rows.masked_fill(surplus[:, None, None], 0)

    def _largest_count(self, counts: Tensor, n: int) -> int:
        """The number of queries to which images are padded, of n queries in all."""
        if self.max_queries is None:
            if len(counts) == 1:
                return n  # without reading them
            return int(counts.max()) if len(counts) else 0
        if len(counts) and reads_contents(None, counts.device):
            largest = int(counts.max())
            if largest > self.max_queries:
                expected = f"at most {self.max_queries} queries of an image"
                refuse("queries.offsets", expected, f"an image with {largest}")
        return self.max_queries


def as_layers(layers: Any) -> list[Any]:
    """``layers`` as a list; raises ValueError unless they are at least one module."""
    expected = "a sequence of at least one layer, each a Module"
    given = list(layers) if isinstance(layers, Iterable) else []
    if not given or not all(isinstance(layer, nn.Module) for layer in given):
        refuse("layers", expected, describe(layers))
    return given


def as_levels(name: str, levels: Any) -> tuple[int, ...] | None:
    """``levels`` as numbers; None means all. Raises ValueError unless none is below 0."""
    if levels is None:
        return None
    expected = "at least one level, none below 0"
    indices = as_integers(as_list(name, levels, expected))
    if not indices or min(indices) < 0:
        refuse(name, expected, levels)
    return indices


def check_has_levels(pyramid: FeaturePyramid, levels: tuple[int, ...] | None) -> None:
    """Raises ValueError if ``pyramid`` lacks one of ``levels``."""
    if levels is not None and max(levels) >= pyramid.n_levels:
        refuse("pyramid", f"levels {list(levels)}", repr(pyramid))


def points_of_levels(pyramid: FeaturePyramid, levels: tuple[int, ...] | None) -> Tensor | None:
    """int64 ``[n]``: the rows of the points of ``levels``, ascending; None: all points."""
    if levels is None:
        return None
    wanted = constant(levels, pyramid.values.device)
    return torch.isin(pyramid.levels, wanted).nonzero().flatten()


def run_layer(layer: nn.Module, *arguments: Any, checkpoint: bool, **options: Any) -> Any:
    """Calls a layer, with activation checkpointing if ``checkpoint``.

    The backward pass then recomputes the layer's activations instead of storing them (Chen et al.,
    "Training Deep Nets with Sublinear Memory Cost", 2016).
    """
    if checkpoint and torch.is_grad_enabled():
        return checkpointed(layer, *arguments, use_reentrant=False, **options)
    return layer(*arguments, **options)
