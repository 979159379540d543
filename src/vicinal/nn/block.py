"""The neighborhood attention block: norm, project, rotate, attend, project, residual."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from .._plan.search import key_coordinates_name
from .._utils.checks import (
    check_base,
    check_dropout,
    check_neighborhood_sizes,
    refuse,
)
from .._utils.constants import constant
from ..attention import (
    Background,
    NeighborhoodWeights,
    neighborhood_attention,
    neighborhood_attention_weights,
)
from ..backends import check_backend, choose_backend, prepare_backends
from ..backends.reference import apply_rotary
from ..plan import NeighborhoodPlan, check_plan, plan_neighborhoods
from ..pyramid import FeaturePyramid
from ..windows import (
    centers_of_cells,
    level_scales,
    position_dtype,
    window_centers,
    window_offsets,
)
from ._base import Inputs, SparseAttention, check_sizes
from ._earlier_keys import rename_earlier_keys
from .initialized import reset_children
from .projections import add_projected, is_inactive_dropout, project
from .rotary import RotaryEncoding, as_freq_group_pattern, check_equal_groups


class SparseNeighborhoodAttentionBlock(SparseAttention[NeighborhoodPlan]):
    """Attends from queries to all nearby points of a sparse feature pyramid, one window per level.

    It computes ``out = query + W_o attention(R(W_q x), R(W_k e), W_v e)`` with ``x`` the
    layer-normed query, ``e`` the points' embeddings, and R a rotary encoding of position and level.
    `neighborhood_attention` is the attention alone. Memory grows with queries and points, not with
    queries x window.

    Args:
        embed_dim: width of queries, points and output, E. A multiple of ``n_heads`` with an even
            quotient.
        n_heads: number of heads, H.
        n_levels: number of levels, L. Default: 4.
        neighborhood_sizes: odd window width of each level, in cells of that level, a sequence, an
            integer tensor or an array ``[L]``. Default: ``(3, 5, 7, 9)``.
        position_dim: number of spatial dimensions, P. Default: 2.
        dropout: probability of dropping a channel of the output projection, in training.
            Default: 0.
        bias: whether the projections have biases. Default: False.
        norm_first: whether the layer norm is on the query before its projection (default), or on
            the result after the residual.
        rope_spatial_base_theta: see `RotaryEncoding`, for all ``rope_`` arguments.
        rope_level_base_theta: base of the level's frequencies.
        rope_share_heads: whether heads share their frequencies.
        rope_freq_group_pattern: ``"single"``, ``"partition"`` or ``"closure"``, or an enum with
            that value, such as `FreqGroupPattern`.
        rope_enforce_freq_groups_equal: whether groups of unequal size raise a ValueError.
        attention_dropout: probability of dropping a softmax weight in training. None (default):
            that of ``dropout``. The earlier implementation never dropped weights, as with 0.
        backend: back end of the attention, see `neighborhood_attention`. None (default): chosen by
            device and dtype.
        device: of the parameters. None (default): torch's default device.
        dtype: of the parameters. None (default): torch's default dtype.

    Checkpoints of the earlier implementation load with ``strict=True``, and the parameters are in
    its order, so that the state of an optimizer loads as well. `export_state_dict` writes such
    checkpoints.

    Attributes:
        attn_drop_rate: probability of dropping a softmax weight in training.
        rope_spatial_base_theta, rope_level_base_theta, rope_share_heads: as given.

    Raises:
        ValueError: sizes do not divide, the head width is odd, the number of windows is not
            ``n_levels``, a window is not odd, a rate of dropout is outside [0, 1), or a name is
            unknown.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock

        cells = torch.randint(0, 64, (500, 2))
        points = torch.nn.functional.pad(cells, (1, 0))  # image, row, column
        pyramid = FeaturePyramid.from_points(points, torch.randn(500, 32), (64, 64), batch_size=1)
        block = SparseNeighborhoodAttentionBlock(embed_dim=32, n_heads=4)
        positions, offsets = pyramid.positions(), pyramid.batch_offsets()
        plan = block.make_plan(positions, offsets, pyramid)  # layers share it
        out = block(
            pyramid.values, positions, offsets, pyramid,
            query_level_indices=pyramid.levels, plan=plan,
        )
        assert out.shape == pyramid.values.shape
        ```
    """

    _plan_type = NeighborhoodPlan

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        n_levels: int = 4,
        neighborhood_sizes: Tensor | Sequence[int] = (3, 5, 7, 9),
        position_dim: int = 2,
        dropout: float = 0.0,
        bias: bool = False,
        norm_first: bool = True,
        rope_spatial_base_theta: float = 100.0,
        rope_level_base_theta: float = 10.0,
        rope_share_heads: bool = False,
        rope_freq_group_pattern: str | Enum = "single",
        rope_enforce_freq_groups_equal: bool = True,
        *,
        attention_dropout: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        embed_dim, n_heads, n_levels, position_dim = check_sizes(
            embed_dim, n_heads, n_levels=n_levels, position_dim=position_dim
        )
        width = embed_dim // n_heads
        if width % 2:
            expected = f"an even head width, embed_dim / {n_heads}"
            refuse("embed_dim", expected, f"{embed_dim} ({width})")
        pattern = as_freq_group_pattern("rope_freq_group_pattern", rope_freq_group_pattern)
        if rope_enforce_freq_groups_equal:
            check_equal_groups("embed_dim", width, pattern)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        check_dropout("attention_dropout", attention_dropout)
        super().__init__(embed_dim, n_heads, n_levels, position_dim, dropout, norm_first)
        check_backend(backend)
        self.neighborhood_sizes = check_neighborhood_sizes(neighborhood_sizes, n_levels)
        self.backend = backend
        self.attn_drop_rate = attention_dropout
        bases = rope_spatial_base_theta, rope_level_base_theta
        self.rope_spatial_base_theta = check_base("rope_spatial_base_theta", bases[0])
        self.rope_level_base_theta = check_base("rope_level_base_theta", bases[1])
        self.rope_share_heads = rope_share_heads
        prepare_backends()

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(embed_dim, **kind)
        self.q_in_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **kind)
        self.pos_encoding = RotaryEncoding(
            width,
            n_heads,
            position_dim,
            spatial_base_theta=rope_spatial_base_theta,
            level_base_theta=rope_level_base_theta,
            share_heads=rope_share_heads,
            freq_group_pattern=pattern,
            enforce_freq_groups_equal=rope_enforce_freq_groups_equal,
            backend=backend,
            **kind,
        )
        self.kv_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=bias, **kind)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **kind)
        self.dropout = nn.Dropout(dropout)
        self.register_load_state_dict_pre_hook(rename_earlier_keys)

    def reset_parameters(self) -> None:
        """Draws all parameters from their initial distribution."""
        reset_children(self)

    def make_plan(
        self,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        pyramid: FeaturePyramid,
        query_level_indices: Tensor | None = None,
        *,
        check_contents: bool | None = None,
    ) -> NeighborhoodPlan:
        """Makes the ``plan`` of `forward`: `plan_neighborhoods` with the windows of this block.

        ``query_level_indices`` is not used, so that ``**placement.arguments()`` of a
        `QueryPlacement` can be passed.
        """
        return plan_neighborhoods(
            query_spatial_positions,
            query_batch_offsets,
            pyramid,
            self.neighborhood_sizes,
            check_contents=check_contents,
        )

    def _add_attended(self, inputs: Inputs, plan: NeighborhoodPlan) -> Tensor:
        query, attended = inputs.query, self._attend(inputs, plan)
        backend = choose_backend(self.backend, query.device, query.dtype)
        if is_inactive_dropout(self.dropout):
            return add_projected(backend, query, attended, self.out_proj)
        (projected,) = project(backend, attended, self.out_proj)
        out: Tensor = query + self.dropout(projected)
        return out

    def _weights(
        self, inputs: Inputs, plan: NeighborhoodPlan, queries: Tensor | None
    ) -> NeighborhoodWeights:
        q, k, _, background = self._project(inputs, plan)
        return neighborhood_attention_weights(
            q, k, plan, background=background, query_mask=inputs.mask, queries=queries
        )

    def _check_plan(
        self, plan: NeighborhoodPlan, inputs: Inputs, check_contents: bool | None
    ) -> None:
        queries = inputs.positions, inputs.offsets
        check_plan(plan, *queries, inputs.pyramid, self.neighborhood_sizes, check_contents)

    def _attend(self, inputs: Inputs, plan: NeighborhoodPlan) -> Tensor:
        """The attended values ``[N, E]``. All intermediate tensors are freed on return."""
        q, k, v, background = self._project(inputs, plan)
        return neighborhood_attention(
            q,
            k,
            v,
            plan,
            dropout_p=self.attn_drop_rate if self.training else 0.0,
            background=background,
            query_mask=inputs.mask,
            backend=self.backend,
        ).flatten(1)

    def _project(
        self, inputs: Inputs, plan: NeighborhoodPlan
    ) -> tuple[Tensor, Tensor, Tensor, Background | None]:
        """Q ``[N, H, d]``, k and v ``[nnz, H, d]``, and the background of the attention."""
        positions, pyramid = inputs.finite_positions(), inputs.pyramid
        norm = self.norm if self.norm_first else None
        (q,) = self._heads(inputs.query, self.q_in_proj, 1, norm)
        q = self.pos_encoding(q, _with_level(positions, inputs.level))
        k, v = map(plan.append_copies, self._heads(pyramid.values, self.kv_proj, 2))
        k = self.pos_encoding(k, key_coordinates(pyramid, plan, positions.dtype))
        background = None
        if inputs.background is not None:
            centers = window_centers(positions, pyramid.level_shapes, pyramid.periodic_axes)
            background = self._background(inputs.background, q, centers, plan, pyramid)
        return q, k, v, background

    def _heads(
        self, x: Tensor, linear: nn.Linear, parts: int, norm: nn.Module | None = None
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
        """The background of the attention, from ``embedding`` ``[B, L, E]``, q ``[N, H, d]`` and
        the windows' ``centers`` ``[L, N, P]``.

        The rotation of a cell is the rotation of its window's center times that of its offset. The
        first, with the level's unrotated key, goes into the query vector of that level. The
        second, which all queries share, is the cell's key. Pairs of channels act as complex
        numbers in both.
        """
        key, value = self.kv_proj(embedding).unflatten(-1, (2, self.n_heads, -1)).unbind(-3)
        scales = level_scales(pyramid.level_shapes, centers)
        image = plan.query_batch.long().clamp(min=0)
        queries, offsets = [], []
        for level, (scale, size) in enumerate(zip(scales, self.neighborhood_sizes, strict=True)):
            position = _with_level((centers[level] + 0.5) / scale, level)
            # embedding: the gradient of plain indexing is not summed in the same order every time.
            keys = nn.functional.embedding(image, key[:, level].flatten(1)).view_as(q)
            at_center = self.pos_encoding(keys, position)
            queries.append(apply_rotary(q, at_center[..., ::2], -at_center[..., 1::2]))
            window = window_offsets(size, self.position_dim)
            offsets.append(_with_level(constant(window, scale.device, scale.dtype) / scale, 0))
        one = constant([1, 0], q.device, q.dtype)
        ones = one.repeat(plan.window_slots, self.n_heads, q.shape[-1] // 2)
        cell_keys = self.pos_encoding(ones, torch.cat(offsets))
        return Background(torch.stack(queries, 1), cell_keys, value)


def key_coordinates(pyramid: FeaturePyramid, plan: NeighborhoodPlan, dtype: torch.dtype) -> Tensor:
    """``[nnz + C, P + 1]``: positions and levels of the points, then of the plan's copies."""
    dtype = position_dtype(pyramid.level_shapes, dtype)
    return plan.shared_by_layers(
        key_coordinates_name(dtype), lambda: _find_key_coordinates(pyramid, plan, dtype)
    )


def _find_key_coordinates(
    pyramid: FeaturePyramid, plan: NeighborhoodPlan, dtype: torch.dtype
) -> Tensor:
    positions = pyramid.positions(dtype)
    if pyramid.periodic_axes:
        points, shifts = plan.copies
        cells, levels = pyramid.cells[points] + shifts, pyramid.levels[points]
        at_copies = centers_of_cells(cells, levels, pyramid.level_shapes, dtype)
        positions = torch.cat((positions, at_copies))
    return _with_level(positions, plan.append_copies(pyramid.levels))


def _with_level(positions: Tensor, level: Tensor | int) -> Tensor:
    """``[n, P + 1]``: positions ``[n, P]`` with the level appended as a coordinate."""
    if isinstance(level, int):
        return torch.nn.functional.pad(positions, (0, 1), value=float(level))
    return torch.cat((positions, level.to(positions.dtype)[:, None]), 1)
