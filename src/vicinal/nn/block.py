"""The module: norm, project, rotate, attend, project, residual."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import (
    check_dropout,
    check_neighborhood_sizes,
    reads_contents,
    refuse,
)
from .._utils.constants import constant
from ..attention import (
    Background,
    NeighborhoodWeights,
    neighborhood_attention,
    neighborhood_attention_weights,
)
from ..backends import check_backend, choose_backend
from ..backends.reference import apply_rotary
from ..plan import NeighborhoodPlan, check_placement, plan_neighborhoods
from ..pyramid import FeaturePyramid
from ..windows import (
    coordinate_dtype,
    finest_level,
    level_scales,
    window_centers,
    window_offsets,
)
from ._base import Expected, check_sizes
from .projections import add_projected, project
from .rotary import RotaryEncoding


class _Call(NamedTuple):
    """The arguments of `SparseNeighborhoodAttentionBlock.forward`, checked and finite."""

    query: Tensor
    positions: Tensor
    level: Tensor | int
    mask: Tensor | None
    pyramid: FeaturePyramid
    plan: NeighborhoodPlan
    background: Tensor | None


class SparseNeighborhoodAttentionBlock(nn.Module):
    """Queries attend to all points of a sparse feature pyramid near them, one window per level.

    ``out = query + W_o attention(R(W_q x), R(W_k e), W_v e)`` with ``x`` the layer-normed query,
    ``e`` the points' embeddings and R a rotary encoding of position and level.

    Args:
        embed_dim: width of queries, points and output, E; a multiple of ``n_heads`` with an even
            quotient.
        n_heads: number of heads, H.
        n_levels: number of levels, L.
        neighborhood_sizes: odd window width of each level, in cells of that level.
        position_dim: number of spatial dimensions, P.
        dropout: rate on the softmax weights and again on the output projection, in training.
        bias: whether the projections have biases.
        norm_first: layer norm on the query before the projection, else after the residual.
        rope_spatial_base_theta, rope_level_base_theta, rope_share_heads, rope_freq_group_pattern,
            rope_enforce_freq_groups_equal: see `RotaryEncoding`.
        backend: of the attention, see `neighborhood_attention`.

    Checkpoints of the implementation this one replaces load with ``strict=True``.

    Raises:
        ValueError: sizes that do not divide, an odd head width, a number of windows other than
            ``n_levels``, windows that are not odd, a dropout outside [0, 1), unknown names.
    """

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
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim, n_heads, n_levels=n_levels, position_dim=position_dim)
        if embed_dim // n_heads % 2:
            width = embed_dim // n_heads
            refuse(
                "embed_dim", f"an even head width, embed_dim / {n_heads}", f"{embed_dim} ({width})"
            )
        check_dropout("dropout", dropout)
        check_backend(backend)
        self.embed_dim, self.n_heads, self.n_levels = embed_dim, n_heads, n_levels
        self.neighborhood_sizes = check_neighborhood_sizes(neighborhood_sizes, n_levels)
        self.position_dim, self.norm_first, self.backend = position_dim, norm_first, backend

        self.norm = nn.LayerNorm(embed_dim)
        self.q_in_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.kv_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=bias)
        self.pos_encoding = RotaryEncoding(
            embed_dim // n_heads,
            n_heads,
            position_dim,
            spatial_base_theta=rope_spatial_base_theta,
            level_base_theta=rope_level_base_theta,
            share_heads=rope_share_heads,
            freq_group_pattern=rope_freq_group_pattern,
            enforce_freq_groups_equal=rope_enforce_freq_groups_equal,
            backend=backend,
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.register_load_state_dict_pre_hook(_rename_earlier_keys)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for part in (self.norm, self.q_in_proj, self.kv_proj, self.pos_encoding, self.out_proj):
            part.reset_parameters()

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
        plan: NeighborhoodPlan | None = None,
    ) -> Tensor:
        """Attends, projects and adds the residual.

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
                None: they take no part.
            query_level_indices: integer ``[N]``, the level a query lives on; None: the level with
                the most cells.
            query_mask: bool ``[N]``, True: this query takes no part.
            plan: from `plan_neighborhoods` for the same queries, points and windows; None: built
                here. Layers that share cells and queries share a plan.

        Returns:
            ``[N, E]``.

        Raises:
            ValueError: any argument of the wrong shape, dtype or device, and on the CPU contents
                that cannot be right; names the argument, what was expected and what came.
        """
        attended = self._attend(
            self._check(
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
        )
        backend = choose_backend(self.backend, query.device, query.dtype)
        if self.dropout.training and self.dropout.p > 0:
            (projected,) = project(backend, attended, self.out_proj)
            out: Tensor = query + self.dropout(projected)
        else:
            out = add_projected(backend, query, attended, self.out_proj)
        return out if self.norm_first else self.norm(out)

    def make_plan(
        self,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        pyramid: FeaturePyramid,
    ) -> NeighborhoodPlan:
        """What `forward` takes as ``plan``: `plan_neighborhoods` with the windows of this block."""
        return plan_neighborhoods(
            query_spatial_positions, query_batch_offsets, pyramid, self.neighborhood_sizes
        )

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
        plan: NeighborhoodPlan | None = None,
        queries: Tensor | None = None,
    ) -> NeighborhoodWeights:
        """The softmax weights, before any dropout, that `forward` gives each point, for looking.

        Args:
            queries: integer ``[n]``, the queries to look at; None: all, which stores every pair.

        The other arguments, and the errors, are those of `forward`.
        """
        call = self._check(
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
        q, k, _, background = self._project(call)
        return neighborhood_attention_weights(
            q, k, call.plan, background=background, query_mask=call.mask, queries=queries
        )

    def _attend(self, call: "_Call") -> Tensor:
        """Norm, projections, rotations and attention: ``[N, E]``, all that is left of them."""
        q, k, v, background = self._project(call)
        return neighborhood_attention(
            q,
            k,
            v,
            call.plan,
            dropout_p=self.dropout.p if self.training else 0.0,
            background=background,
            query_mask=call.mask,
            backend=self.backend,
        ).flatten(1)

    def _project(self, call: "_Call") -> tuple[Tensor, Tensor, Tensor, Background | None]:
        """q, k, v and what empty cells hold, as the attention takes them."""
        query, positions, level, _, pyramid, plan, background_embedding = call
        norm = self.norm if self.norm_first else None
        (q,) = self._heads(query, self.q_in_proj, 1, norm)
        q = self.pos_encoding(q, _with_level(positions, level))
        k, v = self._heads(pyramid.values, self.kv_proj, 2)
        k = self.pos_encoding(k, _with_level(pyramid.positions(positions.dtype), pyramid.levels))
        background = None
        if background_embedding is not None:
            centers = window_centers(positions, pyramid.level_shapes)
            background = self._background(background_embedding, q, centers, plan, pyramid)
        return q, k, v, background

    def _heads(
        self, x: Tensor, linear: nn.Linear, parts: int, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, ...]:
        """``linear(norm(x))`` as ``parts`` of ``[n, H, d]``."""
        backend = choose_backend(self.backend, x.device, x.dtype)
        projected = project(backend, x, linear, norm, parts)
        return tuple(part.unflatten(-1, (self.n_heads, -1)) for part in projected)

    def _background(
        self,
        embedding: Tensor,
        q: Tensor,
        centers: Tensor,
        plan: NeighborhoodPlan,
        pyramid: FeaturePyramid,
    ) -> Background:
        """What the empty cells hold, from ``embedding`` ``[B, L, E]``, q and ``centers`` [L, N, P].

        A cell's rotation is that of its window's centre times that of its offset from there. The
        first goes into the query with the level's one unrotated key, the second, shared by all
        queries, into the cell's key: both as pairs of channels, a complex number each.
        """
        key, value = self.kv_proj(embedding).unflatten(-1, (2, self.n_heads, -1)).unbind(-3)
        scales = level_scales(pyramid.level_shapes, centers)
        image = plan.query_batch.long().clamp(min=0)
        queries, offsets = [], []
        for level, (scale, size) in enumerate(zip(scales, self.neighborhood_sizes, strict=True)):
            position = _with_level((centers[level] + 0.5) / scale, level)
            # Embedding: the gradient of plain indexing is not summed in the same order every time.
            keys = nn.functional.embedding(image, key[:, level].flatten(1)).view_as(q)
            at_center = self.pos_encoding(keys, position)
            queries.append(apply_rotary(q, at_center[..., ::2], -at_center[..., 1::2]))
            window = window_offsets(size, self.position_dim)
            offsets.append(_with_level(constant(window, scale.device, scale.dtype) / scale, 0))
        one = constant([1, 0], q.device, q.dtype)
        ones = one.repeat(plan.window_slots, self.n_heads, q.shape[-1] // 2)
        cell_keys = self.pos_encoding(ones, torch.cat(offsets))
        return Background(torch.stack(queries, 1), cell_keys, value)

    def _check(
        self,
        query: Tensor,
        positions: Tensor,
        offsets: Tensor,
        maps: Tensor | FeaturePyramid,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None,
        background: Tensor | None,
        levels: Tensor | None,
        mask: Tensor | None,
        plan: NeighborhoodPlan | None,
    ) -> "_Call":
        """Refuses what does not fit; fills in pyramid, plan and level where they are left out."""
        weight, sizes = self.norm.weight, (self.embed_dim, self.n_levels, self.position_dim)
        expected = Expected(*sizes, weight.dtype, weight.device)
        expected.check_queries(query, positions, background, levels, mask)
        pyramid = expected.pyramid(maps, level_spatial_shapes, background)
        plan = self._plan(plan, positions, offsets, pyramid)
        # A query at no finite place takes no part; its angles must not spoil the gradients.
        positions = positions.to(coordinate_dtype(positions.dtype)).nan_to_num(0.0, 0.0, 0.0)
        level: Tensor | int = finest_level(pyramid.level_shapes)
        if levels is not None:
            level = levels.clamp(0, self.n_levels - 1)
            if not reads_contents(None, query.device):  # nobody has looked: such take no part
                nowhere = level.ne(levels)
                mask = nowhere if mask is None else mask | nowhere
        return _Call(query, positions, level, mask, pyramid, plan, background)

    def _plan(
        self,
        plan: NeighborhoodPlan | None,
        positions: Tensor,
        offsets: Tensor,
        pyramid: FeaturePyramid,
    ) -> NeighborhoodPlan:
        if plan is None:
            return self.make_plan(positions, offsets, pyramid)
        if not isinstance(plan, NeighborhoodPlan):
            refuse("plan", "a NeighborhoodPlan or None", plan)
        check_placement(positions, offsets, pyramid)
        made_for = {
            "queries": (plan.n_queries, positions.shape[0]),
            "points": (plan.n_points, pyramid.values.shape[0]),
            "images": (plan.batch_size, pyramid.batch_size),
            "level_shapes": (plan.level_shapes, pyramid.level_shapes),
            "neighborhood_sizes": (plan.neighborhood_sizes, self.neighborhood_sizes),
            "position_dim": (plan.position_dim, self.position_dim),
            "device": (plan.device, positions.device),
        }
        if any(plans != ours for plans, ours in made_for.values()):
            expected = ", ".join(f"{name} {ours}" for name, (_, ours) in made_for.items())
            refuse("plan", f"one for {expected}", repr(plan))
        return plan


def _with_level(positions: Tensor, level: Tensor | int) -> Tensor:
    """``[n, P + 1]``: positions ``[n, P]`` with the level as one more coordinate."""
    if isinstance(level, int):
        return torch.nn.functional.pad(positions, (0, 1), value=float(level))
    return torch.cat((positions, level.to(positions.dtype)[:, None]), 1)


def _rename_earlier_keys(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """The earlier implementation called the projection otherwise and saved two constants."""
    for name in ("weight", "bias"):
        if f"{prefix}subset_attn.kv_proj.{name}" in state_dict:
            moved = state_dict.pop(f"{prefix}subset_attn.kv_proj.{name}")
            state_dict[f"{prefix}kv_proj.{name}"] = moved
    for name in ("rope_spatial_base_theta", "rope_level_base_theta"):
        state_dict.pop(f"{prefix}{name}", None)
