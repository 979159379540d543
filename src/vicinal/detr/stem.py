"""The stem: from points with raw values to a pyramid of embeddings, without convolutions."""

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._plan.window_values import values_in_windows
from .._utils.checks import (
    as_spatial_shape,
    check_counts,
    check_tensor,
    refuse,
)
from .._utils.constants import constant
from .._utils.modules import Module
from .._utils.ragged import offsets_from_ids
from .._utils.strides import Strides, as_strides, shapes_from_strides
from .._utils.types import StridesLike
from ..nn.projections import call_norm, check_dtype
from ..placement import QueryPlacement
from ..plan import NeighborhoodPlan, plan_neighborhoods
from ..pyramid import FeaturePyramid
from ..window_shapes import (
    Window,
    Windows,
    WindowsLike,
    as_windows,
    causal_axes,
    check_windows_fit,
    count_cells,
    windows_on_axes,
)
from ..windows import as_periodic_axes, coordinate_dtype


class PointStem(Module):
    """Embeds points by the raw values in windows around them, and pools them into a pyramid.

    The features of a point are the raw values of all cells of its windows, concatenated as the
    pixels of a patch are in Vision Transformers (Dosovitskiy et al., "An Image is Worth 16x16
    Words", 2021), and its position within the cell that contains it at each level. A small network
    maps them to an embedding; embeddings of the points of a cell are averaged.

    Intended for values of few channels: memory grows with points x window cells x channels.

    Args:
        in_channels: number of channels of the raw values.
        embed_dim: width of the embeddings, E.
        strides: strides of the pyramid's levels, in cells of the grid: one int or P ints per level;
            default (1, 2, 4, 8).
        window_sizes: each window, in cells of its stride: an odd width, a tuple of one per axis, a
            `Window`, or 0 for none; default (7, 7). Along a causal axis a point sees itself and the
            past.
        window_strides: stride of each window's cells, one int or P ints each; the first is 1.
            Default (1, 2).
        position_dim: number of spatial dimensions, P; default 2.

    Raises:
        ValueError: a number is below 1, a window size is even along an axis that is not causal,
            there is not one window size per window stride, the first window stride is not 1, or
            window strides do not divide each other along a causal axis.

    Example:
        ```python
        import torch
        from vicinal.detr import PointStem

        stem = PointStem(in_channels=1, embed_dim=8, strides=(1, 2))
        coordinates = torch.tensor([[0, 3, 4], [0, 3, 5], [1, 7, 7]])  # image, row, column
        pyramid = stem(coordinates, torch.rand(3, 1), spatial_shape=(8, 8), batch_size=2)
        assert pyramid.level_shapes == ((8, 8), (4, 4))
        assert pyramid.embed_dim == 8
        ```
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int,
        strides: StridesLike = (1, 2, 4, 8),
        window_sizes: WindowsLike = (7, 7),
        window_strides: StridesLike = (1, 2),
        position_dim: int = 2,
    ) -> None:
        super().__init__()
        check_counts(in_channels=in_channels, embed_dim=embed_dim, position_dim=position_dim)
        in_channels, embed_dim = int(in_channels), int(embed_dim)
        self.in_channels, self.position_dim = in_channels, int(position_dim)
        self.strides = as_strides(strides, self.position_dim)
        self.window_strides, self.window_sizes = as_stem_windows(
            window_strides, window_sizes, self.position_dim
        )
        windows = windows_on_axes(self.window_sizes, self.position_dim)
        n_cells = sum(map(count_cells, windows))
        # Each cell has its values and a flag for whether it is stored.
        n_features = n_cells * (in_channels + 1) + self.position_dim * len(self.strides)
        self.layers = nn.Sequential(
            nn.Linear(n_features, embed_dim),
            nn.GELU(),
            nn.Linear(embed_dim, embed_dim),
            nn.GELU(),
        )
        self.mixes = nn.ModuleList(nn.Linear(embed_dim, embed_dim) for _ in self.strides)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        *,
        periodic_axes: Sequence[int] = (),
        origin: Sequence[float] | None = None,
        cell_size: Sequence[float] | None = None,
        keep_point_rows: bool = False,
    ) -> FeaturePyramid:
        """Builds a pyramid from points.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then the cell along each axis of the grid.
                Values of points that share a cell are averaged.
            values: ``[n, in_channels]``, in the dtype of the module; autocast takes other floating
                dtypes than float64 as well.
            spatial_shape: P sizes of the grid. The result does not depend on how far they exceed
                the points.
            batch_size: number of images.
            periodic_axes: axes along which the grid repeats; windows pass the seam. Default: none.
            origin: raw coordinates of the grid's lower corner, ``[P]``, which the pyramid keeps.
                None (default): not known.
            cell_size: size of the grid's cells in raw units, ``[P]``, likewise.
            keep_point_rows: whether the pyramid keeps the row of each given point on every level,
                as ``point_rows``. Default: False.

        Returns:
            a pyramid with embeddings ``[nnz, E]`` in the dtype of ``values``, sorted by image.

        Raises:
            ValueError: shapes, dtypes or devices do not match, points lie outside the grid, the
                size along a periodic axis is not a multiple of all strides, or a window is wider
                than that size or causal along such an axis.
        """
        raw = self._raw_points(
            coordinates, values, spatial_shape, batch_size, periodic_axes, keep_point_rows
        )
        points = (raw.levels == 0).nonzero().flatten()
        cells = raw.coordinates[points, :-1]
        offsets = self._cell_offsets(cells, raw.values)
        features = torch.cat((self._windows(raw, points), offsets), 1)
        pyramid = FeaturePyramid.from_points(
            cells,
            self.layers(features),
            spatial_shape,
            batch_size,
            strides=self.strides,
            periodic_axes=periodic_axes,
            origin=origin,
            cell_size=cell_size,
            keep_point_rows=keep_point_rows,
        )
        pyramid = _with_rows_of_given_points(pyramid, raw, points)
        # Embeddings have the dtype of the values, under autocast too.
        mixed = self._mix(pyramid).to(raw.values.dtype)
        return pyramid.with_values(call_norm(self.norm, mixed))

    def _mix(self, pyramid: FeaturePyramid) -> Tensor:
        """The values after the map of their level, ``[nnz, E]``."""
        order = torch.argsort(pyramid.levels, stable=True)
        counts = torch.bincount(pyramid.levels, minlength=pyramid.n_levels).tolist()
        parts = pyramid.values.index_select(0, order).split(counts)
        mixed = [mix(part) for mix, part in zip(self.mixes, parts, strict=True)]
        return torch.cat(mixed).index_select(0, torch.argsort(order))

    def _raw_points(
        self,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        periodic_axes: Sequence[int],
        keep_point_rows: bool,
    ) -> FeaturePyramid:
        """The raw values and a one for each point, pooled for the windows. Checks all of them."""
        device = self.norm.weight.device
        values = check_tensor(
            "values", values, ("n", self.in_channels), kind="floating", device=device
        )
        check_dtype("values", values, self.layers)
        shape = (values.shape[0], self.position_dim + 1)
        coordinates = check_tensor("coordinates", coordinates, shape, kind="integer", device=device)
        spatial_shape = as_spatial_shape(spatial_shape, self.position_dim)
        self._check_windows(spatial_shape, periodic_axes)
        return FeaturePyramid.from_points(
            coordinates,
            torch.cat((values, values.new_ones(values.shape[0], 1)), 1),
            spatial_shape,
            batch_size,
            strides=self.window_strides,
            periodic_axes=periodic_axes,
            keep_point_rows=keep_point_rows,
        )

    def _check_windows(self, spatial_shape: Sequence[int], periodic_axes: Sequence[int]) -> None:
        """Raises ValueError for windows that the grid cannot have."""
        axes = as_periodic_axes(periodic_axes, self.position_dim)
        shapes = shapes_from_strides(spatial_shape, self.window_strides, axes, "spatial_shape")
        windows = windows_on_axes(self.window_sizes, self.position_dim)
        check_windows_fit(windows, shapes, axes, "window_sizes")

    def _windows(self, raw: FeaturePyramid, points: Tensor) -> Tensor:
        """``[n, window cells * (channels + 1)]``, the raw values, zero in empty cells."""
        positions, image = raw.positions(raw.values.dtype)[points], raw.batch[points]
        offsets = offsets_from_ids(image, raw.batch_size)
        queries = QueryPlacement(positions, offsets, raw.levels[points])
        plan, values = self._neighborhoods(queries, raw)
        return values_in_windows(
            plan._tensors, plan._keyed_cells, plan._cell_keys(), plan.append_copies(values)
        ).flatten(1)

    def _neighborhoods(
        self, queries: QueryPlacement, raw: FeaturePyramid
    ) -> tuple[NeighborhoodPlan, Tensor]:
        """A plan of the windows around points, and the values of the points that it counts."""
        positions, offsets, levels = queries
        plan = plan_neighborhoods(
            positions, offsets, raw, self.window_sizes, levels, check_contents=False
        )
        return plan, raw.values

    def _cell_offsets(self, cells: Tensor, like: Tensor) -> Tensor:
        """``[n, P * levels]``: offsets from the center of the point's cell at each level.

        In units of that level's cells, in (-1/2, 1/2), with the dtype of ``like``.
        """
        strides = constant(self.strides, cells.device).t()
        remainder = (cells[:, 1:, None] % strides).to(coordinate_dtype(like.dtype))
        return ((remainder + 0.5) / strides - 0.5).flatten(1).to(like.dtype)


def _with_rows_of_given_points(
    pyramid: FeaturePyramid, raw: FeaturePyramid, points: Tensor
) -> FeaturePyramid:
    """``pyramid``, made of the rows ``points`` of ``raw``, with the rows of the points that ``raw``
    was made of, if it keeps them.
    """
    if raw.point_rows is None or pyramid.point_rows is None:
        return pyramid
    rows = raw.point_rows[:, 0].contiguous()
    rank = torch.where(rows < 0, len(points), torch.searchsorted(points, rows))
    return dataclasses.replace(
        pyramid,
        point_rows=torch.nn.functional.pad(pyramid.point_rows, (0, 0, 0, 1), value=-1)[rank],
        point_batch=raw.point_batch,
        check_contents=False,
    )


def as_stem_windows(
    window_strides: StridesLike, window_sizes: WindowsLike, position_dim: int, prefix: str = ""
) -> tuple[Strides, tuple[int | tuple[int, ...] | Window, ...]]:
    """The strides and sizes of the windows of a `PointStem`, each in one form.

    Raises:
        ValueError: they are not as described there; ``prefix`` comes before the arguments' names.
    """
    argument = f"{prefix}window_strides"
    try:
        strides = as_strides(window_strides, position_dim)
    except ValueError:
        refuse(argument, "integers of at least 1, one or P per window", window_strides)
    if max(strides[0]) != 1:
        refuse(argument, "strides that begin with 1", str(list(strides)))
    sizes = as_windows(window_sizes, len(strides), position_dim, f"{prefix}window_sizes")
    _check_causal_strides(argument, strides, windows_on_axes(sizes, position_dim))
    return strides, sizes


def _check_causal_strides(argument: str, window_strides: Strides, windows: Windows) -> None:
    """Raises ValueError unless the cells of coarse windows pool whole cells of finer ones."""
    for axis in causal_axes(windows):
        steps = [stride[axis] for stride in window_strides]
        if any(max(pair) % min(pair) for pair in itertools.combinations(steps, 2)):
            expected = f"strides that divide each other along causal axis {axis}"
            refuse(argument, expected, str(list(window_strides)))
