"""The decoder of a DETR on sparse data: object queries attend to points and refine their boxes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._utils.checks import check_counts, check_type, refuse
from .._utils.modules import Module
from ..backends.ops import has_tangent
from ..nn.projections import call_norm, check_dtype
from ..placement import QueryPlacement
from ..pyramid import FeaturePyramid
from ..windows import wrap_positions
from .layers import DetectionHead, as_layers, run_layer
from .reference_points import ReferencePoints
from .structures import ObjectQueries, Predictions, check_boxes_on_map, check_object_queries


class DecoderLayer(Module):
    """Self-attention of the object queries, cross-attention to the points, feed-forward part.

    Args:
        self_attention: maps `ObjectQueries` to ``[N, E]``, such as `QuerySelfAttention`.
        cross_attention: `SparseNeighborhoodAttentionBlock`, `SparseDeformableAttention`, or any
            module with the same call signature and ``make_plan``, query levels included. The points
            may be wider or narrower than the queries, with ``point_dim`` of the block.
        feed_forward: maps ``[N, E]`` to ``[N, E]``, such as `FeedForward`.
        reference_points: several positions in its box that a query attends from. None (default):
            its center alone.

    Each part includes its norm and residual connection.

    Raises:
        ValueError: a part is not a module, or ``reference_points`` are not `ReferencePoints`.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.detr import DecoderLayer, FeedForward, ObjectQueries, QuerySelfAttention

        coordinates = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0]])  # image, row, column, level
        pyramid = FeaturePyramid(torch.randn(2, 8), coordinates, ((4, 4),), batch_size=1)
        boxes = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
        queries = ObjectQueries(
            torch.randn(1, 8), boxes, levels=torch.tensor([0]), offsets=torch.tensor([0, 1])
        )
        cross_attention = SparseNeighborhoodAttentionBlock(8, 2, 1, (3,))
        layer = DecoderLayer(QuerySelfAttention(8, 2), cross_attention, FeedForward(8))
        assert layer(queries, pyramid).shape == (1, 8)
        ```
    """

    def __init__(
        self,
        self_attention: nn.Module,
        cross_attention: nn.Module,
        feed_forward: nn.Module,
        *,
        reference_points: ReferencePoints | None = None,
    ) -> None:
        super().__init__()
        check_type("self_attention", self_attention, nn.Module)
        check_type("cross_attention", cross_attention, nn.Module)
        check_type("feed_forward", feed_forward, nn.Module)
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward
        if reference_points is not None:
            check_type("reference_points", reference_points, ReferencePoints)
        self.reference_points = reference_points

    def forward(self, queries: ObjectQueries, pyramid: FeaturePyramid, plan: Any = None) -> Tensor:
        """Computes the new embeddings of the queries.

        Args:
            queries: object queries of the images of the pyramid.
            pyramid: the encoder's points, as wide as the cross-attention takes them.
            plan: from `make_plan` for these queries; None (default): made here.

        Returns:
            ``[N, E]``.

        Raises:
            ValueError: ``queries`` are not `ObjectQueries`, ``pyramid`` is not a `FeaturePyramid`,
                or a part refuses its arguments.
        """
        check_type("queries", queries, ObjectQueries)
        check_type("pyramid", pyramid, FeaturePyramid)
        embeddings = self.self_attention(queries)
        placement = self.placement(queries, pyramid)

        def attend(x: Tensor) -> Tensor:
            return self._attend(x, placement, pyramid, plan)

        points = self.reference_points
        attended = attend(embeddings) if points is None else points(embeddings, attend)
        out: Tensor = self.feed_forward(attended)
        return out

    def make_plan(self, queries: ObjectQueries, pyramid: FeaturePyramid) -> Any:
        """Makes the ``plan`` of `forward` for these queries: that of the cross-attention.

        Args:
            queries: object queries of the images of the pyramid; their embeddings are not used.
            pyramid: the encoder's points.

        Raises:
            ValueError: ``queries`` are not `ObjectQueries`, ``pyramid`` is not a `FeaturePyramid`,
                or the cross-attention refuses its arguments.
        """
        check_type("queries", queries, ObjectQueries)
        check_type("pyramid", pyramid, FeaturePyramid)
        return self._make_plan(self.placement(queries, pyramid), pyramid)

    def placement(self, queries: ObjectQueries, pyramid: FeaturePyramid) -> QueryPlacement:
        """Returns where the cross-attention's queries are: at the centers of the boxes, or at the
        `ReferencePoints`, K rows for each object query.

        Args:
            queries: object queries of the images of the pyramid; their embeddings are not used.
            pyramid: the encoder's points. Along its periodic axes, reference points outside the map
                are moved into it.

        Raises:
            ValueError: ``queries.boxes`` do not have the dimensions of the reference points.
        """
        if self.reference_points is None:
            return queries.placement
        placement: QueryPlacement = self.reference_points.placement(queries)
        axes = pyramid.periodic_axes
        return placement._replace(
            positions=wrap_positions(placement.positions, pyramid.level_shapes, axes)
        )

    def _make_plan(self, placement: QueryPlacement, pyramid: FeaturePyramid) -> Any:
        """The cross-attention's plan for its queries."""
        positions, offsets, levels = placement
        cross_attention: Any = self.cross_attention
        return cross_attention.make_plan(positions, offsets, pyramid, levels)

    def _attend(
        self, embeddings: Tensor, placement: QueryPlacement, pyramid: FeaturePyramid, plan: Any
    ) -> Tensor:
        """The embeddings of the cross-attention's queries after it."""
        positions, offsets, levels = placement
        attended: Tensor = self.cross_attention(
            embeddings, positions, offsets, pyramid, query_level_indices=levels, plan=plan
        )
        return attended


class Decoder(Module):
    """A stack of decoder layers with iterative box refinement.

    As in Deformable DETR (Zhu et al., "Deformable DETR", 2021), each layer's head refines the
    boxes, and the next layer attends around the refined boxes, without gradient. The gradient of a
    layer's predicted boxes reaches the head before, whose boxes it refined, and no further: "look
    forward twice" (Zhang et al., "DINO", 2022). Boxes that are given with a gradient get those of
    the first two layers.

    Windows follow the centers of the boxes, so each layer makes a plan of its own. An embedding of
    the size of its box is added to each query before every layer. Along periodic axes of the map,
    centers are wrapped into it before every layer, so boxes may pass the seam; the self-attention
    measures distances within the map, not around the axis.

    Args:
        layers: at least one `DecoderLayer`.
        embed_dim: width of the embeddings, E.
        n_classes: number of classes, C.
        position_dim: number of spatial dimensions, P; default 2.
        checkpoint: recompute activations in the backward pass instead of storing them; default
            False.
        look_forward_twice: the gradient of predicted boxes reaches the head of the layer before as
            well; default True. Where gradients are computed, heads between the first and the last
            are called twice then, which heads with dropout or running statistics notice; otherwise
            the predictions are the same.

    Raises:
        ValueError: ``layers`` is empty or has no modules, or a size is below 1.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.detr import (
            Decoder, DecoderLayer, FeedForward, ObjectQueries, QuerySelfAttention
        )

        coordinates = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0]])  # image, row, column, level
        pyramid = FeaturePyramid(torch.randn(2, 8), coordinates, ((4, 4),), batch_size=1)
        boxes = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
        queries = ObjectQueries(
            torch.randn(1, 8), boxes, levels=torch.tensor([0]), offsets=torch.tensor([0, 1])
        )
        layers = [
            DecoderLayer(
                QuerySelfAttention(8, 2),
                SparseNeighborhoodAttentionBlock(8, 2, 1, (3,)),
                FeedForward(8),
            )
            for _ in range(2)
        ]
        predictions, _ = Decoder(layers, embed_dim=8, n_classes=3)(queries, pyramid)
        assert [layer.logits.shape for layer in predictions] == [(1, 3), (1, 3)]
        ```
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embed_dim: int,
        n_classes: int,
        position_dim: int = 2,
        *,
        checkpoint: bool = False,
        look_forward_twice: bool = True,
    ) -> None:
        super().__init__()
        layers = as_layers(layers)
        for layer in layers:
            if not hasattr(layer, "make_plan"):
                expected = "DecoderLayers, or modules with their call signature and make_plan"
                refuse("layers", expected, type(layer).__name__)
        check_counts(embed_dim=embed_dim, n_classes=n_classes, position_dim=position_dim)
        self.embed_dim, self.position_dim = int(embed_dim), int(position_dim)
        self.layers = nn.ModuleList(layers)
        self.sizes = nn.Sequential(
            nn.Linear(self.position_dim, self.embed_dim),
            nn.GELU(),
            nn.Linear(self.embed_dim, self.embed_dim),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(self.embed_dim) for _ in layers)
        self.heads = nn.ModuleList(
            DetectionHead(embed_dim, n_classes, position_dim) for _ in layers
        )
        self.checkpoint, self.look_forward_twice = checkpoint, look_forward_twice

    def forward(
        self, queries: ObjectQueries, pyramid: FeaturePyramid
    ) -> tuple[list[Predictions], list[ObjectQueries]]:
        """Refines object queries layer by layer.

        Args:
            queries: object queries of the images of the pyramid. Their boxes have a dtype that
                holds the map's cells.
            pyramid: the encoder's points, with values ``[nnz, E]``, or as wide as the
                cross-attentions take them.

        Returns:
            the predictions of each layer, the last being the final ones, and the queries that were
            passed to each layer.

        Raises:
            ValueError: queries or pyramid do not fit, embeddings have another dtype than the
                module, or boxes one in which centers of the map's cells do not lie in their own
                cells.
        """
        queries = check_object_queries(queries, self.embed_dim, self.position_dim)
        check_dtype("queries.embeddings", queries.embeddings, self.sizes)
        check_type("pyramid", pyramid, FeaturePyramid)
        if pyramid.position_dim != self.position_dim:
            refuse("pyramid", f"{self.position_dim} spatial dimensions", repr(pyramid))
        check_boxes_on_map("queries.boxes", queries.boxes, pyramid)
        predictions, layer_queries = [], []
        refined: Tensor | None = None  # boxes of the layer before, with the gradient by its head
        layers = zip(self.layers, self.norms, self.heads, strict=True)
        for index, (layer, norm, head) in enumerate(layers):
            queries = _wrap_centers(queries, pyramid)
            # The rotary encoding covers positions only; the box's size enters by an embedding.
            size = queries.boxes[:, self.position_dim :].log2().to(queries.embeddings.dtype)
            queries = queries._replace(embeddings=queries.embeddings + self.sizes(size))
            layer_queries.append(queries)
            make_plan: Any = layer.make_plan
            plan = make_plan(queries, pyramid)
            embeddings = run_layer(layer, queries, pyramid, plan, checkpoint=self.checkpoint)
            x, start = call_norm(norm, embeddings), queries.boxes
            logits, boxes = head(x, start if refined is None else _with_gradient_of(refined, start))
            predictions.append(Predictions(logits, boxes, queries.offsets))
            if not self._looks_forward(boxes) or index + 1 == len(self.layers):
                refined = None
            else:
                refined = boxes if refined is None else head(x, start)[1]
            queries = queries._replace(embeddings=embeddings, boxes=boxes.detach())
        return predictions, layer_queries

    def _looks_forward(self, boxes: Tensor) -> bool:
        """Whether the next head's boxes shall have a gradient by ``boxes``."""
        return self.look_forward_twice and (boxes.requires_grad or has_tangent(boxes))


def _with_gradient_of(refined: Tensor, start: Tensor) -> Tensor:
    """``start`` with the gradient of ``refined``, from which it differs by whole turns."""
    return start + (refined - refined.detach())


def _wrap_centers(queries: ObjectQueries, pyramid: FeaturePyramid) -> ObjectQueries:
    """Queries whose centers lie inside the map along its periodic axes."""
    if not pyramid.periodic_axes:
        return queries
    centers = wrap_positions(queries.positions, pyramid.level_shapes, pyramid.periodic_axes)
    sizes = queries.boxes[:, pyramid.position_dim :]
    return queries._replace(boxes=torch.cat((centers, sizes), 1))
