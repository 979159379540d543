"""Self-attention among the object queries of an image, with rotary positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.checks import check_dropout, refuse
from .._utils.ragged import batch_ids
from ..nn._base import check_sizes
from ..nn.rotary import RotaryEncoding
from ..windows import coordinate_dtype
from .queries import ObjectQueries, check_queries

_FILLER = torch.iinfo(torch.int64).min  # no query's group


class QuerySelfAttention(nn.Module):
    """All object queries of an image attend to one another; images may differ in their number.

    ``out = query + W_o attention(R(W_q x), R(W_k x), W_v x)`` with ``x`` the layer-normed query and
    R a rotary encoding of the box's centre and the query's level. Decoders of DETRs need it so that
    two queries do not claim one object (Carion et al., "End-to-End Object Detection with
    Transformers", 2020). An image's queries are few, so all its pairs are computed.

    Args:
        embed_dim: E, a multiple of ``n_heads`` with an even quotient.
        n_heads: number of heads.
        position_dim: number of spatial dimensions, P.
        dropout: rate on the softmax weights and again on the output projection, in training.
        bias: whether the projections have biases.
        norm_first: layer norm on the query, else after the residual.

    Raises:
        ValueError: sizes below 1, widths that do not divide, an odd head width, a dropout outside
            [0, 1).
    """

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        position_dim: int = 2,
        dropout: float = 0.0,
        bias: bool = True,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, n_heads, position_dim=position_dim)
        if embed_dim % (2 * n_heads):
            refuse("embed_dim", f"an even multiple of n_heads ({n_heads})", embed_dim)
        check_dropout("dropout", dropout)
        self.embed_dim, self.n_heads = embed_dim, n_heads
        self.position_dim, self.norm_first = position_dim, norm_first
        self.norm = nn.LayerNorm(embed_dim)
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias)
        self.pos_encoding = RotaryEncoding(embed_dim // n_heads, n_heads, position_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: ObjectQueries) -> Tensor:
        """``[N, E]``: the queries' new embeddings.

        On a GPU this waits to learn how many queries the fullest image has.

        Raises:
            ValueError: shapes, dtypes or devices of the queries do not fit, named.
        """
        check_queries(queries, self.embed_dim, self.position_dim)
        x = self.norm(queries.embeddings) if self.norm_first else queries.embeddings
        q, k, v = self.in_proj(x).unflatten(-1, (3, self.n_heads, -1)).unbind(1)
        coordinates = torch.cat((queries.positions, queries.levels[:, None]), 1)
        coordinates = coordinates.to(coordinate_dtype(queries.boxes.dtype))
        q, k = self.pos_encoding(q, coordinates), self.pos_encoding(k, coordinates)
        attended = self._attend(q, k, v, queries).flatten(1)
        out: Tensor = queries.embeddings + self.dropout(self.out_proj(attended))
        return out if self.norm_first else self.norm(out)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, queries: ObjectQueries) -> Tensor:
        """``[N, H, d]``, by rows of equal length: images are filled up to the fullest."""
        offsets = queries.offsets.long()
        counts = offsets.diff()
        longest = int(counts.max()) if len(counts) else 0
        image = batch_ids(offsets, len(q))
        place = torch.arange(len(q), device=q.device) - offsets[image]
        # What fills up is a group of its own, so no row is without anything to see.
        group = torch.full((len(counts), longest), _FILLER, device=q.device)
        group[image, place] = 0 if queries.groups is None else queries.groups.long()
        sees = (group[:, None, :] == group[:, :, None])[:, None]

        def fill_up(x: Tensor) -> Tensor:
            rows = x.new_zeros(*group.shape, *x.shape[1:])
            return rows.index_put((image, place), x).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            fill_up(q),
            fill_up(k),
            fill_up(v),
            attn_mask=sees,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return attended.transpose(1, 2)[image, place]
