"""The encoder of a DETR on sparse data: every point of the pyramid is a query."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .._utils.checks import check_counts, check_tensor, refuse
from ..pyramid import FeaturePyramid
from .checkpointing import call


class EncoderLayer(nn.Module):
    """Attention of all points to the points around them, then a feed-forward map of each.

    Args:
        attention: `SparseNeighborhoodAttentionBlock`, `SparseDeformableAttention` or whatever is
            called like them and has their ``make_plan``; norm and residual are its own.
        feed_forward: ``[n, E]`` to ``[n, E]``, norm and residual its own, such as `FeedForward`.
    """

    def __init__(self, attention: nn.Module, feed_forward: nn.Module) -> None:
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(
        self,
        values: Tensor,
        pyramid: FeaturePyramid,
        positions: Tensor,
        offsets: Tensor,
        plan: Any = None,
    ) -> Tensor:
        """The points' new values ``[nnz, E]``.

        Args:
            values: ``[nnz, E]``, which take the place of the pyramid's.
            pyramid: where the points are.
            positions: ``[nnz, P]``, `FeaturePyramid.positions`.
            offsets: ``[B + 1]``, `FeaturePyramid.batch_offsets`.
            plan: of the attention's ``make_plan`` for these; None: made here.
        """
        points = pyramid.with_values(values)
        attended = self.attention(
            values, positions, offsets, points, query_level_indices=pyramid.levels, plan=plan
        )
        out: Tensor = self.feed_forward(attended)
        return out


class Encoder(nn.Module):
    """Layers through which the values of a pyramid flow; its cells stay, so one plan serves all.

    After Deformable DETR's encoder (Zhu et al., 2021), on the points that exist.

    Args:
        layers: `EncoderLayer`, at least one, whose attentions share their windows.
        embed_dim: E, of the norm at the end.
        checkpoint: compute each layer anew in the backward pass instead of storing what is in it.

    Raises:
        ValueError: no layer.
    """

    def __init__(
        self, layers: Sequence[EncoderLayer], embed_dim: int, *, checkpoint: bool = False
    ) -> None:
        super().__init__()
        if not layers:
            refuse("layers", "at least one", "none")
        check_counts(embed_dim=embed_dim)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(embed_dim)
        self.checkpoint = checkpoint

    def forward(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """The same points with new values ``[nnz, E]``. Waits for a GPU, to see where images begin.

        Raises:
            ValueError: embeddings of another width, points that are not sorted by image, or what
                the attention refuses.
        """
        if not isinstance(pyramid, FeaturePyramid):
            refuse("pyramid", "a FeaturePyramid", pyramid)
        width = self.norm.normalized_shape[0]
        check_tensor("pyramid.values", pyramid.values, ("nnz", width), kind="floating")
        positions = pyramid.positions(pyramid.values.dtype)
        offsets = pyramid.batch_offsets()
        attention: Any = self.layers[0].attention
        where = (pyramid, positions, offsets, attention.make_plan(positions, offsets, pyramid))
        values = pyramid.values
        for layer in self.layers:
            values = call(layer, values, *where, again=self.checkpoint)
        return pyramid.with_values(self.norm(values))
