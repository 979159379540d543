"""The call form that the attention modules share: arguments, their validation, the plan."""

import inspect
import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .._utils.checks import (
    LevelShapes,
    as_level_shapes,
    check_counts,
    check_dropout,
    check_range,
    check_tensor,
    reads_contents,
    refuse,
)
from .._utils.modules import Module
from .._utils.ragged import take_rows
from ..attention import NeighborhoodWeights
from ..placement import QueryPlacement, check_placement
from ..pyramid import FeaturePyramid
from ..windows import (
    as_periodic_axes,
    coordinate_dtype,
    finest_level,
    wrap_positions,
)
from .projections import call_norm, check_dtype

PlanT = TypeVar("PlanT")


def check_sizes(embed_dim: int, n_heads: int, **others: int) -> tuple[int, ...]:
    """The sizes as ints; raises ValueError for sizes below one and an ``embed_dim`` that the heads
    do not divide.
    """
    check_counts(embed_dim=embed_dim, n_heads=n_heads, **others)
    if embed_dim % n_heads:
        refuse("embed_dim", f"a multiple of n_heads ({n_heads})", embed_dim)
    return tuple(map(int, (embed_dim, n_heads, *others.values())))


def check_points_are_queries(attention: Any) -> None:
    """Raises ValueError for an attention module whose points have another width than its queries,
    where every point is a query. Modules without a ``point_dim`` pass.
    """
    embed_dim = getattr(attention, "embed_dim", None)
    point_dim = getattr(attention, "point_dim", embed_dim)
    if point_dim != embed_dim:
        refuse("point_dim", f"embed_dim ({embed_dim}), where every point is a query", point_dim)


class Arguments(NamedTuple):
    """The arguments of `SparseAttention.forward`, as passed."""

    query: Tensor
    query_spatial_positions: Tensor
    query_batch_offsets: Tensor
    stacked_feature_maps: Tensor | FeaturePyramid
    level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None = None
    background_embedding: Tensor | None = None
    query_level_indices: Tensor | None = None
    query_mask: Tensor | None = None
    plan: Any = None
    periodic_axes: Sequence[int] = ()
    check_contents: bool | None = None


class Inputs(NamedTuple):
    """Validated arguments, with the defaults filled in."""

    query: Tensor  # [N, E]
    positions: Tensor  # [N, P]
    offsets: Tensor  # [B + 1]
    level: Tensor | int  # [N], in [0, L)
    mask: Tensor | None  # bool [N]
    pyramid: FeaturePyramid
    background: Tensor | None  # [B, L, point_dim]

    def query_levels(self) -> Tensor | None:
        """The levels of the queries ``[N]``, if they were given."""
        return self.level if isinstance(self.level, Tensor) else None

    def finite_positions(self) -> Tensor:
        """``[N, P]`` in float32 or float64, zero for a position that is not finite: such a query is
        invalid, and its angles must not spoil the gradients.
        """
        dtype = coordinate_dtype(self.positions.dtype)
        positions = self.positions.to(dtype).nan_to_num(0.0, 0.0, 0.0)
        return wrap_positions(positions, self.pyramid.level_shapes, self.pyramid.periodic_axes)


class SparseAttention(Module, Generic[PlanT]):
    """Base of the modules in which queries attend to a sparse feature pyramid."""

    norm: nn.Module
    out_proj: nn.Linear
    _plan_type: type[PlanT]
    _uses_levels = True  # whether results depend on the queries' levels

    def __init__(
        self,
        embed_dim: int,
        n_heads: int,
        n_levels: int,
        position_dim: int,
        dropout: float,
        norm_first: bool,
        point_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_dropout("dropout", dropout)
        self.embed_dim, self.n_heads, self.n_levels = embed_dim, n_heads, n_levels
        self.position_dim, self.norm_first = position_dim, norm_first
        self.point_dim = embed_dim if point_dim is None else point_dim

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
        plan: PlanT | None = None,
        periodic_axes: Sequence[int] = (),
        check_contents: bool | None = None,
    ) -> Tensor:
        """Attends, projects the result and adds the residual.

        Args:
            query: ``[N, E]``, the queries of all images, one image after another.
            query_spatial_positions: floating ``[N, P]``, in cells of the full shape (the largest
                size of each axis over the levels).
            query_batch_offsets: integer ``[B + 1]``: image ``b`` owns the queries
                ``offsets[b]:offsets[b + 1]``.
            stacked_feature_maps: sparse COO ``[B, *full_shape, L, E]`` with one dense dimension,
                coalesced or not, or a `FeaturePyramid`. A block with ``point_dim`` takes points and
                background of that width in place of E.
            level_spatial_shapes: integer ``[L, P]``, the spatial shape of each level; may be None
                for a pyramid.
            background_embedding: ``[B, L, E]``, the embedding of empty cells by image and level,
                also of cells beyond the map. Images without queries may have no row. None
                (default): empty cells contribute nothing.
            query_level_indices: integer ``[N]``, the pyramid level of each query, on which the
                rotary encoding depends, and windows along causal axes. None (default): the level
                with the most cells; along a causal axis, the largest. Deformable attention ignores
                it. `encode` and `QueryPlacement` fill it in where every point is a query.
            query_mask: bool ``[N]``, True: the query is masked; its attended value is zero, so its
                result is ``query + out_proj.bias``.
            plan: what `make_plan` returned for the same points, and for the block the same queries.
                None (default): made here. Layers that share these share a plan.
            periodic_axes: axes along which a sparse COO map repeats. Default: none. A pyramid knows
                its own; with one, they are those or are left out.
            check_contents: whether to validate the contents of tensors, and that ``plan`` was made
                for these points and query cells. None (default): on the CPU only; on a GPU that
                synchronizes.

        Returns:
            ``[N, E]``.

        Raises:
            ValueError: an argument has the wrong shape, dtype or device, or on the CPU invalid
                contents. The message names the argument, what was expected and what came. On a
                GPU values are not validated, to avoid a synchronization; invalid queries and points
                are masked.
        """
        arguments = Arguments(
            query,
            query_spatial_positions,
            query_batch_offsets,
            stacked_feature_maps,
            level_spatial_shapes,
            background_embedding,
            query_level_indices,
            query_mask,
            plan,
            periodic_axes,
            check_contents,
        )
        inputs, plan = self._validate(arguments)
        unused = _nonfinite_masked_rows(inputs)
        if unused is None:
            out = self._add_attended(inputs, plan)
            return out if self.norm_first else call_norm(self.norm, out)
        return self._forward_around(unused, inputs, plan)

    def attention_weights(
        self, *arguments: Any, queries: Tensor | None = None, **keywords: Any
    ) -> NeighborhoodWeights:
        """Returns the weights, before any dropout, that `forward` gives each point, for inspection.

        Args:
            *arguments: those of `forward`.
            queries: integer ``[n]``, the queries to return. None (default): all of them, which
                stores every pair.
            **keywords: those of `forward`.

        Raises:
            ValueError: as `forward` does, or ``queries`` holds no indices of queries.
        """
        try:
            bound = inspect.signature(self.forward).bind(*arguments, **keywords)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.attention_weights: {error}") from None
        return self._weights(*self._validate(Arguments(**bound.arguments)), queries)

    def encode(
        self,
        pyramid: FeaturePyramid,
        plan: PlanT | None = None,
        background_embedding: Tensor | None = None,
    ) -> FeaturePyramid:
        """Lets every point attend as a query, at the center of its cell and on its own level.

        Args:
            pyramid: the points, in any order.
            plan: from `make_encoder_plan` of a pyramid with the same points. None (default): made
                here. Layers share it.
            background_embedding: as for `forward`.

        Returns:
            the pyramid with the results as its embeddings, the points in the given order.

        Raises:
            ValueError: as `forward` does, or the block's ``point_dim`` is not E: no point could be
                a query.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock

            points = torch.nn.functional.pad(torch.randint(0, 64, (500, 2)), (1, 0))
            pyramid = FeaturePyramid.from_points(points, torch.randn(500, 32), (64, 64), 1)
            layers = [SparseNeighborhoodAttentionBlock(32, 4) for _ in range(2)]
            plan = layers[0].make_encoder_plan(pyramid)
            for layer in layers:
                pyramid = layer.encode(pyramid, plan)
            ```
        """
        check_points_are_queries(self)
        order, placement = _placement_of_points(pyramid)
        self._check_level_shapes("pyramid.level_shapes", pyramid.level_shapes)
        self._check_embeddings("pyramid.values", pyramid.values)
        out = self(
            take_rows(pyramid.values, order),
            **placement.arguments(),
            stacked_feature_maps=pyramid,
            background_embedding=background_embedding,
            plan=plan,
        )
        return pyramid.with_values(take_rows(out, order.argsort()))

    def make_encoder_plan(self, pyramid: FeaturePyramid) -> PlanT:
        """Makes the ``plan`` of `encode`, where every point is a query, the points in any order.

        Raises:
            ValueError: as `make_plan` does.
        """
        _, placement = _placement_of_points(pyramid)
        return self.make_plan(**placement.arguments(), pyramid=pyramid)

    @abstractmethod
    def make_plan(
        self,
        query_spatial_positions: Tensor,
        query_batch_offsets: Tensor,
        pyramid: FeaturePyramid,
        query_level_indices: Tensor | None = None,
        *,
        check_contents: bool | None = None,
    ) -> PlanT:
        """Makes the ``plan`` of `forward`."""

    def _forward_around(self, unused: Tensor, inputs: Inputs, plan: PlanT) -> Tensor:
        """The forward pass where the rows ``unused`` ``[N, 1]`` must not reach any parameter's
        gradient: zeros take their place, and the results of these rows are constants.
        """
        query = inputs.query
        out = self._add_attended(inputs._replace(query=query.masked_fill(unused, 0)), plan)
        whole = torch.where(unused, query + out.detach(), out)
        if self.norm_first:
            return whole
        with torch.no_grad():
            normed = call_norm(self.norm, whole)
        return torch.where(unused, normed, call_norm(self.norm, out))

    @abstractmethod
    def _add_attended(self, inputs: Inputs, plan: PlanT) -> Tensor:
        """The query plus its projected attended values, before the norm if that comes last."""

    @abstractmethod
    def _weights(
        self, inputs: Inputs, plan: PlanT, queries: Tensor | None
    ) -> NeighborhoodWeights: ...

    @abstractmethod
    def _check_plan(self, plan: PlanT, inputs: Inputs, check_contents: bool | None) -> None:
        """Raises ValueError unless ``plan`` was made for ``inputs``."""

    def _validate(self, arguments: Arguments) -> tuple[Inputs, PlanT]:
        """Raises ValueError for arguments that do not match; fills in pyramid, level and plan."""
        contents = arguments.check_contents
        if isinstance(arguments.stacked_feature_maps, FeaturePyramid):
            shapes = arguments.stacked_feature_maps.level_shapes
            self._check_level_shapes("stacked_feature_maps", shapes)
        arguments = self._check_queries(arguments)
        positions, offsets, pyramid = check_placement(
            arguments.query_spatial_positions,
            arguments.query_batch_offsets,
            self._pyramid(arguments),
            contents,
        )
        background = _background_of_images(arguments, offsets)
        levels, mask = arguments.query_level_indices, arguments.query_mask
        level = finest_level(pyramid.level_shapes) if levels is None else levels
        if self._uses_levels:
            level, mask = self._mask_invalid_levels(level, mask, contents)
        inputs = Inputs(arguments.query, positions, offsets, level, mask, pyramid, background)
        plan = arguments.plan
        if plan is None:
            levels = inputs.query_levels()
            return inputs, self.make_plan(positions, offsets, pyramid, levels, check_contents=False)
        if not isinstance(plan, self._plan_type):
            refuse("plan", f"a {self._plan_type.__name__} from make_plan, or None", plan)
        self._check_plan(plan, inputs, contents)
        return inputs, plan

    def _mask_invalid_levels(
        self, level: Tensor | int, mask: Tensor | None, check_contents: bool | None
    ) -> tuple[Tensor | int, Tensor | None]:
        """Levels in [0, L), and the mask with the queries at other levels."""
        if isinstance(level, int) or reads_contents(check_contents, level.device):
            return level, mask  # they were validated
        valid = level.clamp(0, self.n_levels - 1)
        invalid = valid.ne(level)
        return valid, invalid if mask is None else mask | invalid

    def _check_queries(self, arguments: Arguments) -> Arguments:
        """The arguments that belong to queries, as tensors; raises ValueError for wrong ones."""
        device = self._reference.device
        query = self._check_embeddings("query", arguments.query)
        n = query.shape[0]
        name, shape = "query_spatial_positions", (n, self.position_dim)
        positions = arguments.query_spatial_positions
        positions = check_tensor(name, positions, shape, kind="floating", device=device)
        background, levels = arguments.background_embedding, arguments.query_level_indices
        if background is not None:
            name, cells = "background_embedding", ("B", self.n_levels, self.point_dim)
            background = check_tensor(name, background, cells, kind="floating", device=device)
            self._check_dtype(name, background)
        if levels is not None:
            name = "query_level_indices"
            levels = check_tensor(name, levels, (n,), kind="integer", device=device)
            if reads_contents(arguments.check_contents, device):
                check_range(name, levels, self.n_levels)
        mask = arguments.query_mask
        if mask is not None:
            mask = check_tensor("query_mask", mask, (n,), kind="bool", device=device)
        return arguments._replace(
            query=query,
            query_spatial_positions=positions,
            background_embedding=background,
            query_level_indices=levels,
            query_mask=mask,
        )

    def _pyramid(self, arguments: Arguments) -> FeaturePyramid:
        """The feature maps as a pyramid."""
        maps, axes = arguments.stacked_feature_maps, arguments.periodic_axes
        if not isinstance(maps, FeaturePyramid | Tensor):
            refuse("stacked_feature_maps", "a sparse COO tensor or a FeaturePyramid", maps)
        shapes = arguments.level_spatial_shapes
        shapes = None if shapes is None else as_level_shapes(shapes)
        if isinstance(maps, FeaturePyramid):
            if shapes not in (None, maps.level_shapes):
                refuse("level_spatial_shapes", f"the pyramid's {maps.level_shapes}", str(shapes))
            shapes = maps.level_shapes
            axes = as_periodic_axes(axes, maps.position_dim)
            if axes not in ((), maps.periodic_axes):
                refuse("periodic_axes", f"the pyramid's {maps.periodic_axes}", str(axes))
        elif shapes is None:
            refuse("level_spatial_shapes", "[L, P] sizes, required with a sparse tensor", None)
        self._check_level_shapes("level_spatial_shapes", shapes)
        values = maps.values if isinstance(maps, FeaturePyramid) else maps
        device = self._reference.device
        if values.shape[-1:] != (self.point_dim,) or values.device != device:
            expected = f"embeddings of width {self.point_dim} on {device}"
            refuse("stacked_feature_maps", expected, values)
        self._check_dtype("stacked_feature_maps", values)
        if isinstance(maps, Tensor):
            contents = arguments.check_contents
            maps = FeaturePyramid.from_coo(
                maps, shapes, periodic_axes=axes, check_contents=contents
            )
        return maps

    def _check_level_shapes(self, argument: str, shapes: LevelShapes) -> None:
        if (len(shapes), len(shapes[0])) != (self.n_levels, self.position_dim):
            expected = f"n_levels={self.n_levels} levels of position_dim={self.position_dim} sizes"
            refuse(argument, expected, str(shapes))

    @property
    def _reference(self) -> Tensor:
        """A parameter, with whose dtype and device all arguments must agree.

        Not one of the norm, which may have another dtype or no parameters.
        """
        weight = getattr(self.out_proj, "weight", None)
        return weight if isinstance(weight, Tensor) else self._any_parameter()

    def _any_parameter(self) -> Tensor:
        """For a module that replaces the projection, and may wrap it or have no parameters."""
        parameters = self.out_proj.parameters(), self.parameters(), self.buffers()
        return next(itertools.chain(*parameters), torch.empty(()))

    def _check_embeddings(self, argument: str, value: Tensor) -> Tensor:
        """The embeddings of queries as a tensor; raises ValueError for wrong ones."""
        shape, device = ("N", self.embed_dim), self._reference.device
        value = check_tensor(argument, value, shape, kind="floating", device=device)
        self._check_dtype(argument, value)
        return value

    def _check_dtype(self, argument: str, value: Tensor) -> None:
        check_dtype(argument, value, self._reference.dtype)


def _nonfinite_masked_rows(inputs: Inputs) -> Tensor | None:
    """Bool ``[N, 1]``: the masked queries that hold a number that is not finite; None if there are
    none, which on a GPU is known only without a mask.
    """
    if inputs.mask is None:
        return None
    largest = torch.linalg.vector_norm(inputs.query.detach(), math.inf, dim=1)
    rows: Tensor = inputs.mask & ~largest.isfinite()
    if reads_contents(None, rows.device) and not rows.any():
        return None
    return rows[:, None]


def _placement_of_points(pyramid: FeaturePyramid) -> tuple[Tensor, QueryPlacement]:
    """The points' rows, sorted by image, and their placement as queries in that order."""
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    images, order = pyramid.batch.sort(stable=True)
    bounds = torch.arange(pyramid.batch_size + 1, device=images.device)
    positions = pyramid.positions(coordinate_dtype(pyramid.values.dtype))
    return order, QueryPlacement(
        positions[order], torch.searchsorted(images, bounds), pyramid.levels[order]
    )


def _background_of_images(arguments: Arguments, offsets: Tensor) -> Tensor | None:
    """The background with a row per image: images without queries may have none."""
    background = arguments.background_embedding
    if background is None:
        return None
    n_images, n_rows = offsets.shape[0] - 1, background.shape[0]
    if n_rows >= n_images:
        return background[:n_images] if n_rows > n_images else background
    if reads_contents(arguments.check_contents, offsets.device):
        n_needed = int((offsets < offsets[-1]).sum())
        if n_needed > n_rows:
            expected = f"a row for each of the {n_needed} images up to the last one with queries"
            refuse("background_embedding", expected, background)
    return nn.functional.pad(background, (0, 0, 0, 0, 0, n_images - n_rows))
