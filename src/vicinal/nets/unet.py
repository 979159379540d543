"""A U-Net on the levels of a feature pyramid, which labels points."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import (
    as_integer,
    as_integers,
    check_counts,
    check_dropout,
    describe,
    refuse,
)
from .._utils.modules import Module
from .._utils.ragged import take_rows
from .._utils.strides import Strides
from .._utils.types import StridesLike
from ..detr.encoder import EncoderLayer
from ..detr.layers import FeedForward, run_layer
from ..detr.stem import PointStem, as_stem_windows
from ..nn.block import SparseNeighborhoodAttentionBlock
from ..nn.projections import call_norm
from ..placement import QueryPlacement
from ..pooling import check_pooling, pool_rows
from ..pyramid import FeaturePyramid
from ..window_shapes import (
    Windows,
    WindowsLike,
    as_windows,
    check_windows_fit,
    windows_on_axes,
)


class PointUNet(Module):
    """Predicts the classes of points: a U-Net whose stages attend to neighbors on one level each.

    As in the U-Net for images (Ronneberger et al., "U-Net: Convolutional Networks for Biomedical
    Image Segmentation", 2015), features go down to coarse levels, where a window covers much space,
    and up again, where those that the level had on the way down are added. A `PointStem` takes the
    place of the first convolutions, neighborhood attention and feed-forward layers that of all
    others; a level has a point in every cell that holds at least one, instead of a dense map.

    Down: the features of the points in a coarse cell are averaged, joined with what the stem
    embedded in that cell, normalized and projected. Up: the features of the coarse cell are
    normalized, projected and added to those of each point in it. A level's layers attend within
    that level alone, so its attention has one window, and all its layers share one plan.

    Args:
        in_channels: number of channels of the raw values.
        n_classes: number of classes, C.
        embed_dims: width of every level, one int or one per level; default 64.
        n_heads: heads of every level's attention, one int or one per level; default 4.
        strides: strides of the levels, finest first, in cells of the grid: one int or P ints per
            level, each a multiple of the one before. Default (1, 2, 4, 8).
        neighborhood_sizes: the window of each level in its own cells, as for
            `SparseNeighborhoodAttentionBlock`, but none of them 0. Default (5, 5, 5, 5), for two
            dimensions.
        depths: number of layers of every level on the way down, and as many on the way up, except
            for the coarsest level: one int or one per level, from 0. Default 1. A depth of 0 on the
            finest level, which has most points, saves most of the time.
        position_dim: number of spatial dimensions, P; default 2.
        stem_window_sizes: ``window_sizes`` of the `PointStem`; default (7, 7), for two dimensions.
        stem_window_strides: ``window_strides`` of the `PointStem`; default (1, 2).
        dropout: rate of attention, projections and feed-forward layers, in training; default 0.
        checkpoint: recompute activations in the backward pass instead of storing them; default
            False.
        make_attention: called with each level, once per layer, for an attention other than
            `SparseNeighborhoodAttentionBlock`: a module with its call signature and ``make_plan``,
            the level's width and one level. ``n_heads`` and ``neighborhood_sizes`` have no effect
            then. None (default): the block, with biases and rotated values.

    Attributes:
        embed_dims, n_heads, depths: as given, as a tuple with one per level.
        strides: as given, as a tuple of P ints per level.

    Raises:
        ValueError: a size is below 1, a list does not have one entry per level, strides are not
            multiples of the ones before, a window cannot be one, or ``dropout`` is outside [0, 1).

    Example:
        ```python
        import torch
        from vicinal.nets import PointUNet

        net = PointUNet(
            in_channels=1, n_classes=3, embed_dims=(16, 32), n_heads=2, strides=(1, 4),
            neighborhood_sizes=(3, 5),
        )
        coordinates = torch.randint(0, 2, (200, 3))  # image, row, column
        coordinates[:, 1:] = torch.randint(0, 32, (200, 2))
        logits = net(coordinates, torch.rand(200, 1), spatial_shape=(32, 32), batch_size=2)
        assert logits.shape == (200, 3)
        loss = torch.nn.functional.cross_entropy(logits, torch.randint(0, 3, (200,)))
        loss.backward()
        ```
    """

    def __init__(
        self,
        in_channels: int,
        n_classes: int,
        embed_dims: int | Sequence[int] = 64,
        n_heads: int | Sequence[int] = 4,
        strides: StridesLike = (1, 2, 4, 8),
        neighborhood_sizes: WindowsLike = (5, 5, 5, 5),
        depths: int | Sequence[int] = 1,
        position_dim: int = 2,
        *,
        stem_window_sizes: WindowsLike = (7, 7),
        stem_window_strides: StridesLike = (1, 2),
        dropout: float = 0.0,
        checkpoint: bool = False,
        make_attention: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_counts(n_classes=n_classes, position_dim=position_dim)
        check_dropout("dropout", dropout)
        width = _finest_width(embed_dims)
        as_stem_windows(stem_window_strides, stem_window_sizes, position_dim, "stem_")
        self.stem = PointStem(
            in_channels, width, strides, stem_window_sizes, stem_window_strides, position_dim
        )
        self.strides, self.position_dim = self.stem.strides, self.stem.position_dim
        _check_nested(self.strides)
        n_levels = len(self.strides)
        self.embed_dims = dims = _per_level("embed_dims", embed_dims, n_levels)
        self.n_heads = _per_level("n_heads", n_heads, n_levels)
        self.depths = _per_level("depths", depths, n_levels, least=0)
        self._windows: Windows = ()
        if make_attention is None:
            _check_heads(dims, self.n_heads, self.depths)
            windows = as_windows(neighborhood_sizes, n_levels, self.position_dim)
            self._windows = windows_on_axes(windows, self.position_dim)
            make_attention = functools.partial(self._make_block, windows)
        self.dropout, self.checkpoint = dropout, checkpoint

        make_stage = functools.partial(self._make_stage, make_attention)
        pairs = list(itertools.pairwise(dims))
        self.encoder = nn.ModuleList(map(make_stage, range(n_levels)))
        self.down = nn.ModuleList(_NormedLinear(fine + width, coarse) for fine, coarse in pairs)
        self.up = nn.ModuleList(_NormedLinear(coarse, fine) for fine, coarse in pairs)
        self.decoder = nn.ModuleList(map(make_stage, range(n_levels - 1)))
        self.head = _NormedLinear(width, int(n_classes))

    def _make_stage(self, make_attention: Callable[[int], nn.Module], level: int) -> nn.ModuleList:
        width = self.embed_dims[level]
        attentions = [_made_by(make_attention, level) for _ in range(self.depths[level])]
        return nn.ModuleList(
            EncoderLayer(attention, FeedForward(width, 2 * width, self.dropout))
            for attention in attentions
        )

    def _make_block(self, windows: Sequence[Any], level: int) -> nn.Module:
        return SparseNeighborhoodAttentionBlock(
            self.embed_dims[level],
            self.n_heads[level],
            n_levels=1,
            neighborhood_sizes=windows[level : level + 1],
            position_dim=self.position_dim,
            dropout=self.dropout,
            bias=True,
            rotary_values=True,
        )

    def forward(
        self,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        *,
        periodic_axes: Sequence[int] = (),
    ) -> Tensor:
        """Predicts class logits. On a GPU this synchronizes, as `PointStem` does.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then the cell along each axis of the grid,
                in any order. Points that share a cell of the finest level have the same logits.
            values: ``[n, in_channels]``, in the dtype of the module; autocast takes other floating
                dtypes than float64 as well.
            spatial_shape: P sizes of the grid.
            batch_size: number of images.
            periodic_axes: axes along which the grid repeats, such as an azimuth. Default: none.

        Returns:
            logits ``[n, C]``, a row per given point, in the parameters' dtype, or autocast's.
            Points outside the grid have zeros where contents are not validated, as on a GPU.

        Raises:
            ValueError: shapes, dtypes or devices do not match, points lie outside the grid, the
                size along a periodic axis is not a multiple of all strides, or a window is wider
                than that size or causal along such an axis.
        """
        pyramid = self.stem(
            coordinates,
            values,
            spatial_shape,
            batch_size,
            periodic_axes=periodic_axes,
            keep_point_rows=True,
        )
        for index, window in enumerate(self._windows):
            if self.depths[index]:
                shapes = pyramid.level_shapes[index : index + 1]
                check_windows_fit((window,), shapes, pyramid.periodic_axes, first_level=index)
        levels = _split_levels(pyramid)
        plans = list(map(_make_plan, self.encoder, levels))
        skipped: list[Tensor] = []
        for index, level in enumerate(levels):
            x = level.points.values
            if index:
                pooled = pool_rows(skipped[-1], levels[index - 1].parents, x.shape[0], _MEAN)
                x = self.down[index - 1](torch.cat((pooled, x.to(pooled.dtype)), 1))
            skipped.append(self._run(self.encoder[index], x, level, plans[index]))
        x = skipped[-1]
        for index in reversed(range(len(self.up))):
            x = skipped[index] + take_rows(self.up[index](x), levels[index].parents)
            x = self._run(self.decoder[index], x, levels[index], plans[index])
        logits: Tensor = self.head(x)
        return take_rows(nn.functional.pad(logits, (0, 0, 0, 1)), levels[0].cells)

    def _run(self, stage: Any, x: Tensor, level: "_Level", plan: Any) -> Tensor:
        """The values of a level's points ``[n, E]`` after the layers of a stage."""
        # No layer gets one tensor twice, of which `torch.compile` would make another graph.
        points = level.points.with_values(level.points.values.view_as(level.points.values))
        for layer in stage:
            x = run_layer(
                layer, x, points, level.positions, level.offsets, plan, checkpoint=self.checkpoint
            )
        return x


class _NormedLinear(Module):
    """Layer norm, then a linear layer."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_features)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, in_features]`` to ``[n, out_features]``."""
        out: Tensor = self.linear(call_norm(self.norm, x))
        return out


class _Level(NamedTuple):
    """The points of a level, which is one per cell, and what they belong to.

    Attributes:
        points: a pyramid of this level alone.
        positions: as queries, ``[m, P]``.
        offsets: as queries, ``[B + 1]``.
        cells: int64 ``[n]``, the row of each raw point in ``points``.
        parents: int64 ``[m]``, the row of each point's cell in the ``points`` of the next coarser
            level; of the coarsest level, none.
    """

    points: FeaturePyramid
    positions: Tensor
    offsets: Tensor
    cells: Tensor
    parents: Tensor


def _split_levels(pyramid: FeaturePyramid) -> list[_Level]:
    """The levels of a pyramid that knows the rows of raw points."""
    assert pyramid.point_rows is not None
    levels: list[_Level] = []
    for index, shape in enumerate(pyramid.level_shapes):
        on_level = pyramid.levels == index
        rows = on_level.nonzero().flatten()
        points = FeaturePyramid(
            take_rows(pyramid.values, rows),
            nn.functional.pad(pyramid.coordinates[rows, :-1], (0, 1)),
            (shape,),
            pyramid.batch_size,
            False,
            periodic_axes=pyramid.periodic_axes,
        )
        positions, offsets, _ = QueryPlacement.of_points(points)
        # Of raw points without rows, -1, it is the one after the last.
        rank = nn.functional.pad(on_level.cumsum(0) - 1, (0, 1), value=len(rows))
        cells = rank[pyramid.point_rows[:, index]]
        if levels:
            parents = cells.new_empty(len(levels[-1].positions) + 1)
            # All raw points of a cell write the same parent, so their order does not matter.
            parents.index_copy_(0, levels[-1].cells, cells)
            levels[-1] = levels[-1]._replace(parents=parents[:-1])
        levels.append(_Level(points, positions, offsets, cells, torch.empty_like(rows)))
    return levels


def _make_plan(stage: Any, level: _Level) -> Any:
    """The plan that all layers of a level share; None without layers."""
    if not len(stage):
        return None
    points, positions, offsets = level[:3]
    return stage[0].attention.make_plan(positions, offsets, points, points.levels)


_MEAN = check_pooling("mean")


def _made_by(make_attention: Any, level: int) -> nn.Module:
    expected = "a function of the level that returns a module with make_plan"
    if not callable(make_attention):
        refuse("make_attention", expected, make_attention)
    attention = make_attention(level)
    if not isinstance(attention, nn.Module) or not hasattr(attention, "make_plan"):
        refuse("make_attention", expected, f"one that returns {describe(attention)}")
    return attention


def _check_heads(embed_dims: Sequence[int], n_heads: Sequence[int], depths: Sequence[int]) -> None:
    for level, (width, heads) in enumerate(zip(embed_dims, n_heads, strict=True)):
        if depths[level] and width % heads:
            expected = f"a multiple of n_heads ({heads}) at level {level}"
            refuse("embed_dims", expected, f"{list(embed_dims)}")


def _finest_width(embed_dims: Any) -> int:
    """The width of the finest level."""
    integer = as_integer(embed_dims)
    dims = as_integers(embed_dims) if integer is None else (integer,)
    if not dims or dims[0] < 1:
        refuse("embed_dims", "an integer of at least 1, or one per level", embed_dims)
    return dims[0]


def _per_level(argument: str, value: Any, n_levels: int, least: int = 1) -> tuple[int, ...]:
    """``value`` as one integer per level."""
    integer = as_integer(value)
    integers = as_integers(value) if integer is None else (integer,) * n_levels
    if integers is None or len(integers) != n_levels or min(integers) < least:
        expected = f"an integer of at least {least}, or one for each of {n_levels} levels"
        refuse(argument, expected, value)
    return integers


def _check_nested(strides: Strides) -> None:
    """Raises ValueError unless each stride is a multiple of the one before."""
    for fine, coarse in itertools.pairwise(strides):
        if any(large % small for small, large in zip(fine, coarse, strict=True)):
            refuse("strides", "strides that are multiples of the ones before", str(list(strides)))
