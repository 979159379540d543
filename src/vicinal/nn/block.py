"""The neighborhood attention block: norm, project, rotate, attend, project, residual."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._plan.search import key_coordinates_name
from .._utils.checks import (
    check_base,
    check_counts,
    check_dropout,
    check_type,
    refuse,
)
from .._utils.constants import constant
from .._utils.types import BackendName, FreqGroupsLike
from ..attention import (
    Background,
    NeighborhoodWeights,
    attend,
    neighborhood_attention_weights,
)
from ..backends import check_backend, choose_backend, prepare_backends
from ..backends.reference import apply_rotary
from ..plan import NeighborhoodPlan, plan_neighborhoods
from ..pyramid import FeaturePyramid
from ..window_shapes import WindowsLike, as_windows, count_cells, window_offsets, windows_on_axes
from ..windows import (
    centers_of_cells,
    dtype_of_centers,
    level_scales,
    position_dtype,
    window_anchors,
)
from ._base import Arguments, Inputs, SparseAttention, check_sizes
from ._earlier_keys import rename_earlier_keys
from .initialized import reset_children
from .plan_checks import check_plan
from .projections import add_projected, call_dropout, is_inactive_dropout, project
from .rotary import RotaryEncoding, as_axis_scales, as_freq_group_pattern, check_equal_groups
from .row_dropout import RowDropout


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
        neighborhood_sizes: the window of each level, in cells of that level: an odd width, a tuple
            of one per axis, a `Window`, or 0 for none. Integers ``[L]`` may be a tensor or an
            array. Default: ``(3, 5, 7, 9)``, for two dimensions. In three, take smaller ones, see
            `suggest_windows`.
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
        point_dim: width of points and background. None (default): E. Where it is not E, no point
            can be a query, so `encode` raises a ValueError.
        rotary: whether queries and keys are rotated. Default: True. False: R is left out, there are
            no frequencies, ``rope_`` arguments have no effect, and positions have no gradient,
            since they choose the windows alone.
        rope_axis_scales: ``[P]`` finite numbers above 0, a sequence, a tensor or an array: spatial
            coordinates are multiplied with them before R. With the sizes of cells, in any unit,
            the initial frequencies are isotropic in space where cells are not cubes: for cells of
            0.1 x 0.1 x 0.4 m, ``(1, 1, 4)``. None (default): with one. They are not in the state
            dict.
        relative_bias: whether a learned number is added to the logits of what each cell of the
            windows holds, for each head (Shaw et al., "Self-Attention with Relative Position
            Representations", 2018; Liu et al., "Swin Transformer", 2021). Default: False.
        rotary_values: whether R rotates values as well, and its inverse at the query's position and
            level the attended values: ``R(p)^-1 sum_j a_j R(p_j) v_j`` (Miyato et al., "GTA",
            2024). So a result tells where its points lie relative to the query, as boxes need it,
            without further parameters. Default: False. It needs ``rotary`` and takes no background,
            and is not in the state dict.
        backend: back end of the attention, see `neighborhood_attention`. None (default): chosen by
            device and dtype.
        device: of the parameters. None (default): torch's default device.
        dtype: of the parameters. None (default): torch's default dtype.

    Checkpoints of the earlier implementation load with ``strict=True``, and the parameters are in
    its order, so that the state of an optimizer loads as well. `export_state_dict` writes such
    checkpoints.

    Attributes:
        attn_drop_rate: probability of dropping a softmax weight in training.
        point_dim: width of points and background.
        pos_encoding: the `RotaryEncoding`; None with ``rotary=False``.
        rope_spatial_base_theta, rope_level_base_theta, rope_share_heads, rotary_values: as given.
        rope_axis_scales: as given, as a tuple of floats or None.
        relative_bias: ``[K, H]``, the last parameter, zero at first, for the K cells of the
            windows, levels in order, windows row-major; None without it.

    Raises:
        ValueError: sizes do not divide, the head width is odd, the number of windows is not
            ``n_levels``, a window is even along an axis that is not causal, or negative, all
            windows are 0, a rate of dropout is outside [0, 1), a name is unknown,
            ``rope_axis_scales`` are not P finite numbers above 0, or ``rotary_values`` is True
            without ``rotary``.

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

    relative_bias: nn.Parameter | None
    pos_encoding: RotaryEncoding  # None without rotary, as torch types the bias of nn.Linear
    _plan_type: type[NeighborhoodPlan] = NeighborhoodPlan

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        n_levels: int = 4,
        neighborhood_sizes: WindowsLike = (3, 5, 7, 9),
        position_dim: int = 2,
        dropout: float = 0.0,
        bias: bool = False,
        norm_first: bool = True,
        rope_spatial_base_theta: float = 100.0,
        rope_level_base_theta: float = 10.0,
        rope_share_heads: bool = False,
        rope_freq_group_pattern: FreqGroupsLike = "single",
        rope_enforce_freq_groups_equal: bool = True,
        *,
        attention_dropout: float | None = None,
        point_dim: int | None = None,
        rotary: bool = True,
        rope_axis_scales: Tensor | Sequence[float] | None = None,
        relative_bias: bool = False,
        rotary_values: bool = False,
        backend: BackendName | None = None,
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
        check_counts(point_dim=embed_dim if point_dim is None else point_dim)
        point_dim = embed_dim if point_dim is None else int(point_dim)
        check_type("bias", bias, bool)
        check_type("norm_first", norm_first, bool)
        check_type("rope_share_heads", rope_share_heads, bool)
        check_type("rotary", rotary, bool)
        check_type("relative_bias", relative_bias, bool)
        check_type("rotary_values", rotary_values, bool)
        if rotary_values and not rotary:
            refuse("rotary_values", "False with rotary=False", rotary_values)
        pattern = as_freq_group_pattern("rope_freq_group_pattern", rope_freq_group_pattern)
        if rotary and rope_enforce_freq_groups_equal:
            check_equal_groups("embed_dim", width, pattern)
        axis_scales = as_axis_scales("rope_axis_scales", rope_axis_scales, position_dim)
        check_dropout("dropout", dropout)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        check_dropout("attention_dropout", attention_dropout)
        super().__init__(embed_dim, n_heads, n_levels, position_dim, dropout, norm_first, point_dim)
        check_backend(backend)
        self.neighborhood_sizes = as_windows(neighborhood_sizes, n_levels, position_dim)
        self.backend = backend
        self.attn_drop_rate = attention_dropout
        bases = rope_spatial_base_theta, rope_level_base_theta
        self.rope_spatial_base_theta = check_base("rope_spatial_base_theta", bases[0])
        self.rope_level_base_theta = check_base("rope_level_base_theta", bases[1])
        self.rope_share_heads, self.rope_axis_scales = rope_share_heads, axis_scales
        self.rotary_values = rotary_values
        prepare_backends()

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(embed_dim, **kind)
        self.q_in_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **kind)
        self.register_module("pos_encoding", None)
        if rotary:
            self.pos_encoding = RotaryEncoding(
                width,
                n_heads,
                position_dim,
                spatial_base_theta=rope_spatial_base_theta,
                level_base_theta=rope_level_base_theta,
                share_heads=rope_share_heads,
                freq_group_pattern=pattern,
                enforce_freq_groups_equal=rope_enforce_freq_groups_equal,
                axis_scales=axis_scales,
                backend=backend,
                **kind,
            )
        self.kv_proj = nn.Linear(point_dim, 2 * embed_dim, bias=bias, **kind)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **kind)
        self.dropout = RowDropout(dropout)
        table = self._new_bias(**kind) if relative_bias else None
        self.register_parameter("relative_bias", table)
        self.register_load_state_dict_pre_hook(rename_earlier_keys)

    def reset_parameters(self) -> None:
        """Draws all parameters from their initial distribution."""
        reset_children(self)
        self._reset_bias()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As of all modules, but with a `relative_bias` the block follows its parts, so that this
        is the last of its parameters: the state of an optimizer of a block without one still fits.
        """
        modules = list(super().named_modules(memo, prefix, remove_duplicate))
        yield from modules if self.relative_bias is None else modules[1:] + modules[:1]

    def _new_bias(self, **kind: Any) -> nn.Parameter:
        """The `relative_bias` at first."""
        windows = windows_on_axes(self.neighborhood_sizes, self.position_dim)
        return nn.Parameter(torch.zeros(sum(map(count_cells, windows)), self.n_heads, **kind))

    def _reset_bias(self) -> None:
        if self.relative_bias is not None:
            nn.init.zeros_(self.relative_bias)

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

        The plan depends on ``query_level_indices`` where an axis of the windows is causal.
        """
        return plan_neighborhoods(
            query_spatial_positions,
            query_batch_offsets,
            pyramid,
            self.neighborhood_sizes,
            query_level_indices,
            check_contents=check_contents,
        )

    def _add_attended(self, inputs: Inputs, plan: NeighborhoodPlan) -> Tensor:
        query, attended = inputs.query, self._attend(inputs, plan)
        backend = choose_backend(self.backend, query.device, query.dtype)
        if is_inactive_dropout(self.dropout):
            return add_projected(backend, query, attended, self.out_proj)
        (projected,) = project(backend, attended, self.out_proj)
        return query + call_dropout(self.dropout, projected, plan._tensors.query_ids)

    def _weights(
        self, inputs: Inputs, plan: NeighborhoodPlan, queries: Tensor | None
    ) -> NeighborhoodWeights:
        q, k, _, background = self._project(inputs, plan)
        return neighborhood_attention_weights(
            q,
            k,
            plan,
            background=background,
            bias=self.relative_bias,
            query_mask=inputs.mask,
            queries=queries,
        )

    def _check_queries(self, arguments: Arguments) -> Arguments:
        background = arguments.background_embedding
        if self.rotary_values and background is not None:
            refuse("background_embedding", "None for a block with rotary_values", background)
        return super()._check_queries(arguments)

    def _check_plan(
        self, plan: NeighborhoodPlan, inputs: Inputs, check_contents: bool | None
    ) -> None:
        queries = inputs.positions, inputs.offsets
        windows, levels = self.neighborhood_sizes, inputs.query_levels()
        check_plan(plan, *queries, inputs.pyramid, windows, levels, check_contents)

    def _attend(self, inputs: Inputs, plan: NeighborhoodPlan) -> Tensor:
        """The attended values ``[N, E]``. All intermediate tensors are freed on return."""
        return self._attend_projected(inputs, plan, *self._project(inputs, plan))

    def _attend_projected(
        self,
        inputs: Inputs,
        plan: NeighborhoodPlan,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        background: Background | None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """The attended values ``[N, E]``. ``seed``: see `attend`."""
        out, _ = attend(
            q,
            k,
            v,
            plan,
            dropout_p=self._attention_dropout(),
            background=background,
            bias=self.relative_bias,
            query_mask=inputs.mask,
            backend=self.backend,
            seed=seed,
        )
        if self.rotary_values:
            positions = _with_level(inputs.finite_positions(), inputs.level)
            out = self.pos_encoding(out, -positions)
        return out.flatten(1)

    def _attention_dropout(self) -> float:
        return self.attn_drop_rate if self.training else 0.0

    def _project(
        self, inputs: Inputs, plan: NeighborhoodPlan
    ) -> tuple[Tensor, Tensor, Tensor, Background | None]:
        """Q ``[N, H, d]``, k and v ``[nnz, H, d]``, and the background of the attention."""
        q, positions = self._project_queries(inputs)
        k, v = self._heads(inputs.pyramid.values, self.kv_proj, 2)
        return q, *self._encode_keys(inputs, plan, q, positions, k, v)

    def _project_queries(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Q ``[N, H, d]`` and the positions ``[N, P]`` that they are rotated by."""
        positions = inputs.finite_positions()
        norm = self.norm if self.norm_first else None
        (q,) = self._heads(inputs.query, self.q_in_proj, 1, norm)
        if self.pos_encoding is not None:
            q = self.pos_encoding(q, _with_level(positions, inputs.level))
        return q, positions

    def _encode_keys(
        self,
        inputs: Inputs,
        plan: NeighborhoodPlan,
        q: Tensor,
        positions: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Background | None]:
        """K and v ``[nnz + C, H, d]`` with the plan's copies, rotated, from those of the points
        ``[nnz, H, d]``; and the background of the attention of q at ``positions``.
        """
        pyramid = inputs.pyramid
        k, v = plan.append_copies(k), plan.append_copies(v)
        if self.pos_encoding is not None:
            coordinates = key_coordinates(pyramid, plan, positions.dtype)
            k = self.pos_encoding(k, coordinates)
            v = self.pos_encoding(v, coordinates) if self.rotary_values else v
        background = None
        if inputs.background is not None:
            anchors = self._anchors(inputs, positions)
            background = self._background(inputs.background, q, anchors, plan, pyramid)
        return k, v, background

    def _heads(
        self, x: Tensor, linear: nn.Linear, parts: int, norm: nn.Module | None = None
    ) -> tuple[Tensor, ...]:
        """``linear(norm(x))`` as ``parts`` of ``[n, H, d]``."""
        backend = choose_backend(self.backend, x.device, x.dtype)
        projected = project(backend, x, linear, norm, parts)
        return tuple(part.unflatten(-1, (self.n_heads, -1)) for part in projected)

    def _anchors(self, inputs: Inputs, positions: Tensor) -> Tensor:
        """The cells that the windows' offsets count from, as floats ``[L, N, P]``."""
        shapes, axes = inputs.pyramid.level_shapes, inputs.pyramid.periodic_axes
        windows = windows_on_axes(self.neighborhood_sizes, self.position_dim)
        anchors = window_anchors(positions, shapes, windows, inputs.query_levels(), axes)
        return anchors.to(dtype_of_centers(positions, shapes))

    def _background(
        self,
        embedding: Tensor,
        q: Tensor,
        anchors: Tensor,
        plan: NeighborhoodPlan,
        pyramid: FeaturePyramid,
    ) -> Background:
        """The background of the attention, from ``embedding`` ``[B, L, point_dim]``, q
        ``[N, H, d]`` and the windows' ``anchors`` ``[L, N, P]``.

        The rotation of a cell is the rotation of its window's anchor times that of its offset. The
        first, with the level's unrotated key, goes into the query vector of that level. The
        second, which all queries share, is the cell's key. Pairs of channels act as complex
        numbers in both.
        """
        key, value = self.kv_proj(embedding).unflatten(-1, (2, self.n_heads, -1)).unbind(-3)
        scales = level_scales(pyramid.level_shapes, anchors)
        image = plan.query_batch.long().clamp(min=0)
        queries, offsets = [], []
        for level, (scale, window) in enumerate(zip(scales, plan._windows, strict=True)):
            position = _with_level((anchors[level] + 0.5) / scale, level)
            # embedding: the gradient of plain indexing is not summed in the same order every time.
            keys = nn.functional.embedding(image, key[:, level].flatten(1)).view_as(q)
            at_anchor = self._rotate(keys, position)
            queries.append(apply_rotary(q, at_anchor[..., ::2], -at_anchor[..., 1::2]))
            cells = constant(window_offsets(window), scale.device, scale.dtype)
            offsets.append(_with_level(cells.view(-1, self.position_dim) / scale, 0))
        one = constant([1, 0], q.device, q.dtype)
        ones = one.repeat(plan.window_slots, self.n_heads, q.shape[-1] // 2)
        cell_keys = self._rotate(ones, torch.cat(offsets))
        return Background(torch.stack(queries, 1), cell_keys, value)

    def _rotate(self, x: Tensor, coordinates: Tensor) -> Tensor:
        """R of ``x`` ``[n, H, d]`` at ``coordinates`` ``[n, P + 1]``."""
        rotated: Tensor = x if self.pos_encoding is None else self.pos_encoding(x, coordinates)
        return rotated


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
