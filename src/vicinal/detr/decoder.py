"""The decoder of a DETR on sparse data: object queries look around their boxes and move them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .._utils.checks import check_counts, refuse
from ..pyramid import FeaturePyramid
from .checkpointing import call
from .heads import DetectionHead
from .queries import ObjectQueries, check_queries
from .targets import Predictions


class DecoderLayer(nn.Module):
    """Object queries attend to one another, then to the points around them; then feed-forward.

    Args:
        self_attention: `ObjectQueries` to ``[N, E]``, such as `QuerySelfAttention`.
        cross_attention: `SparseNeighborhoodAttentionBlock`, `SparseDeformableAttention` or whatever
            is called like them.
        feed_forward: ``[N, E]`` to ``[N, E]``, such as `FeedForward`.

    Norms and residuals are the parts' own.
    """

    def __init__(
        self, self_attention: nn.Module, cross_attention: nn.Module, feed_forward: nn.Module
    ) -> None:
        super().__init__()
        self.self_attention = self_attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward

    def forward(self, queries: ObjectQueries, pyramid: FeaturePyramid, plan: Any = None) -> Tensor:
        """The queries' new embeddings ``[N, E]``.

        Args:
            queries: with B images, as many as the pyramid has.
            pyramid: the encoder's points.
            plan: of the cross-attention's ``make_plan`` for these queries; None: made here.
        """
        attended = self.cross_attention(
            self.self_attention(queries),
            queries.positions,
            queries.offsets,
            pyramid,
            query_level_indices=queries.levels,
            plan=plan,
        )
        out: Tensor = self.feed_forward(attended)
        return out


class Decoder(nn.Module):
    """Layers that refine object queries and their boxes step by step.

    Iterative box refinement of Deformable DETR (Zhu et al., 2021): each layer's head moves the
    boxes, the next layer looks around the moved ones, and no gradient passes between through the
    boxes. Windows follow the boxes' centres, so each layer has a plan of its own.

    Args:
        layers: `DecoderLayer`, at least one.
        embed_dim: E.
        n_classes: number of classes, C.
        position_dim: number of spatial dimensions, P.
        checkpoint: compute each layer anew in the backward pass instead of storing what is in it.

    Raises:
        ValueError: no layer.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        embed_dim: int,
        n_classes: int,
        position_dim: int = 2,
        *,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if not layers:
            refuse("layers", "at least one", "none")
        check_counts(embed_dim=embed_dim, n_classes=n_classes, position_dim=position_dim)
        self.embed_dim, self.position_dim = embed_dim, position_dim
        self.layers = nn.ModuleList(layers)
        self.sizes = nn.Sequential(
            nn.Linear(position_dim, embed_dim), nn.GELU(), nn.Linear(embed_dim, embed_dim)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim) for _ in layers)
        self.heads = nn.ModuleList(
            DetectionHead(embed_dim, n_classes, position_dim) for _ in layers
        )
        self.checkpoint = checkpoint

    def forward(
        self, queries: ObjectQueries, pyramid: FeaturePyramid
    ) -> tuple[list[Predictions], list[ObjectQueries]]:
        """Each layer's predictions, the last the best, and the queries that each layer was given.

        Raises:
            ValueError: queries or pyramid do not fit, named.
        """
        check_queries(queries, self.embed_dim, self.position_dim)
        predictions, given = [], []
        for layer, norm, head in zip(self.layers, self.norms, self.heads, strict=True):
            # Positions turn queries and keys; how large the boxes are, embeddings have to say.
            size = queries.boxes[:, self.position_dim :].log2().to(queries.embeddings.dtype)
            queries = queries._replace(embeddings=queries.embeddings + self.sizes(size))
            given.append(queries)
            where = (queries.positions, queries.offsets, pyramid)
            plan = layer.cross_attention.make_plan(*where)  # type: ignore[union-attr, operator]
            embeddings = call(layer, queries, pyramid, plan, again=self.checkpoint)
            logits, boxes = head(norm(embeddings), queries.boxes)
            predictions.append(Predictions(logits, boxes, queries.offsets))
            queries = queries._replace(embeddings=embeddings, boxes=boxes.detach())
        return predictions, given
