"""Points and records projected to the two axes that are drawn.

Three dimensions are projected along one axis: points that differ in that axis alone merge into one
cell, and their weights are summed. One dimension becomes a row that is one cell high.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.checks import LevelShapes, as_integer, as_tensor, check_finite, check_tensor, refuse
from .._utils.ragged import offsets_from_counts
from .._utils.types import CropLike
from ..pyramid import FeaturePyramid
from ..window_shapes import as_windows, windows_on_axes
from ..windows import full_shape, level_scales, window_anchors
from .outlines import ProjectedWindows, name_window, outline_window
from .record import AttentionRecord, check_record, check_text

_DEFAULT_NAMES = {1: ("cell",), 2: ("row", "column"), 3: ("axis 0", "axis 1", "axis 2")}


@dataclass(frozen=True)
class Projection:
    """Selects the drawn axes; a single one is preceded by an axis of size 1."""

    axes: tuple[int, ...]
    dropped_axis: int | None = None

    @property
    def is_row(self) -> bool:
        return len(self.axes) == 1

    def __call__(self, x: Tensor, fill_value: float) -> Tensor:
        """``[..., P]`` to ``[..., 2]``, with ``fill_value`` along the added axis, if any."""
        selected = x[..., list(self.axes)]
        if not self.is_row:
            return selected
        return torch.nn.functional.pad(selected, (1, 0), value=fill_value)


class ProjectedCells(NamedTuple):
    """The occupied cells of one image, each listed once, on the CPU.

    With ``merged=False`` cells that differ along the dropped axis alone are listed apart.
    """

    pyramid: FeaturePyramid
    projection: Projection
    level_shapes: LevelShapes  # [L, 2]
    scales: Tensor  # float64 [L, 2]: cells of the level per cell of the full shape
    axis_names: tuple[str, ...]  # of all P axes
    cells: Tensor  # int64 [m, 2]
    depths: Tensor | None  # int64 [m], along the dropped axis; None where cells are merged
    levels: Tensor  # int64 [m]
    cell_ids: Tensor  # int64 [nnz]: the row in `cells` of each point, -1 for other images

    @property
    def full_shape(self) -> tuple[int, int]:
        height, width = full_shape(self.level_shapes)
        return height, width

    @property
    def drawn_names(self) -> list[str | None]:
        """The names of the two drawn axes; None for the added axis of a row."""
        names: list[str | None] = [self.axis_names[axis] for axis in self.projection.axes]
        return [None, *names] if self.projection.is_row else names

    @property
    def map_corners(self) -> Tensor:
        """int64 ``[2, 2]``: low and high corner of the whole map."""
        return torch.tensor([[0, 0], self.full_shape])

    def corners(self, cell_ids: Tensor) -> Tensor:
        """float64 ``[n, 2, 2]``: low and high corner of cells, in cells of the full shape."""
        corners = torch.stack((self.cells[cell_ids], self.cells[cell_ids] + 1), 1)
        return corners / self.scales[self.levels[cell_ids]][:, None]

    def level_corners(self, level: int) -> Tensor:
        """float64 ``[n, 2, 2]``: `corners` of all cells of a level."""
        return self.corners((self.levels == level).nonzero().squeeze(1))


def check_crop(crop: CropLike, position_dim: int) -> CropLike:
    """``crop`` with its corners, if it has them, as float64 ``[2, P]`` on the CPU.

    Raises:
        ValueError: another text, another shape, numbers that are not finite, or a low corner that
            is not below the high one.
    """
    crop = as_tensor("crop", crop)
    if not isinstance(crop, Tensor):
        if crop not in ("occupied", "map"):
            refuse("crop", f"'occupied', 'map' or a tensor [2, {position_dim}]", crop)
        return crop
    corners = check_tensor("crop", crop, (2, position_dim), kind="number")
    corners = corners.detach().cpu().double()
    check_finite("crop", corners)
    if not (corners[0] < corners[1]).all():
        refuse("crop", "a low corner below the high one", str(corners.tolist()))
    return corners


def crop_corners(crop: CropLike, cells: ProjectedCells, queries: Sequence[Tensor]) -> Tensor:
    """float64 ``[2, 2]``: low and high corner of the view, in cells of the full shape.

    Args:
        crop: as `check_crop` returns it.
        cells: the cells of the image.
        queries: float64 ``[n, 2]`` each, points that belong to what is occupied, beside the cells.
    """
    if isinstance(crop, Tensor):
        return torch.stack((cells.projection(crop[0], 0), cells.projection(crop[1], 1)))
    if crop == "map":
        return cells.map_corners.double()
    corners = cells.corners(torch.arange(len(cells.cells))).flatten(0, 1)
    return _bounds(torch.cat([corners, *queries]), cells)


def _bounds(points: Tensor, cells: ProjectedCells) -> Tensor:
    """float64 ``[2, 2]``: bounds of ``points`` ``[n, 2]`` with a margin, within the map.

    Along an axis along which they are all beyond the map, it is the whole map.
    """
    limits = cells.map_corners.double()
    if not len(points):
        return limits
    low, high = points.amin(0), points.amax(0)
    margin = (0.02 * (high - low)).clamp(min=2)
    bounds = torch.stack((low - margin, high + margin)).clamp(limits[0], limits[1])
    return torch.where(bounds[0] < bounds[1], bounds, limits)


class ProjectedRecord(NamedTuple):
    """An `AttentionRecord` in the two drawn axes, on the CPU, in float64."""

    positions: Tensor  # [n, 2]
    windows: ProjectedWindows | None
    boxes: Tensor | None  # [n, 2, 2]: low and high corner, in cells of the full shape
    offsets: Tensor  # int64 [n + 1]: query i has the pairs offsets[i]:offsets[i + 1]
    cell_ids: Tensor  # int64 [M]
    weights: Tensor  # [M, H]
    background: Tensor | None  # [n, L, H]

    def attended(self, query: int) -> tuple[Tensor, Tensor]:
        """The ids ``[m]`` of the cells that a query attends to, and their weights ``[m, H]``."""
        pairs = slice(int(self.offsets[query]), int(self.offsets[query + 1]))
        return self.cell_ids[pairs], self.weights[pairs]

    def extent(self, queries: Tensor | slice) -> Tensor:
        """``[k, 2]``: the positions of some queries, and the corners of their boxes, if any."""
        positions = self.positions[queries]
        if self.boxes is None:
            return positions
        return torch.cat((positions, self.boxes[queries].flatten(0, 1)))


def choose_projection(pyramid: FeaturePyramid, points: Tensor, axis: int | None) -> Projection:
    """Keeps one or two dimensions; projects three along ``axis``.

    For None, this is the axis along which the ``points`` merge into the most cells, so that the
    fewest are hidden; the first of several.

    Raises:
        ValueError: more than three dimensions, or an ``axis`` with fewer than three.
    """
    position_dim = pyramid.position_dim
    if position_dim > 3:
        refuse("pyramid", "1 to 3 spatial dimensions", f"{position_dim}")
    if position_dim < 3:
        if axis is not None:
            refuse("axis", f"None for {position_dim} dimensions", axis)
        return Projection(tuple(range(position_dim)))
    if axis is None:
        axis = _clearest_axis(pyramid.coordinates[points, 1:])
    given, axis = axis, as_integer(axis)
    if axis not in range(3):
        refuse("axis", "0, 1 or 2", given)
    return Projection(tuple(other for other in range(3) if other != axis), axis)


def _clearest_axis(cells: Tensor) -> int:
    """The axis without which most of ``cells`` ``[m, 3 + 1]``, with their level, differ."""
    kept = ([1, 2, 3], [0, 2, 3], [0, 1, 3])
    counts = [len(torch.unique(cells[:, columns], dim=0)) for columns in kept]
    return counts.index(max(counts))


def check_axis_names(axis_names: Sequence[str] | None, position_dim: int) -> tuple[str, ...]:
    """Names of all axes; the default ones for None."""
    if axis_names is None:
        return _DEFAULT_NAMES[position_dim]
    if isinstance(axis_names, str) or not isinstance(axis_names, Sequence):
        refuse("axis_names", f"{position_dim} texts", axis_names)
    if len(axis_names) != position_dim:
        refuse("axis_names", f"{position_dim} texts", f"{len(axis_names)}")
    for index, name in enumerate(axis_names):
        check_text(f"axis_names[{index}]", name)
    return tuple(axis_names)


def project_cells(
    pyramid: FeaturePyramid,
    batch_index: int,
    axis: int | None,
    axis_names: Sequence[str] | None = None,
    *,
    merged: bool = True,
) -> ProjectedCells:
    """The occupied cells of an image, by level and in row-major order."""
    pyramid = pyramid.to("cpu")
    points = (pyramid.batch == batch_index).nonzero().squeeze(1)
    projection = choose_projection(pyramid, points, axis)
    names = check_axis_names(axis_names, pyramid.position_dim)
    shapes = projection(torch.tensor(pyramid.level_shapes), 1)
    columns = [pyramid.levels[:, None], projection(pyramid.cells, 0)]
    has_depth = not merged and projection.dropped_axis is not None
    if has_depth:
        columns.append(pyramid.cells[:, projection.dropped_axis, None])
    keys = torch.cat(columns, 1)
    unique, inverse = torch.unique(keys[points], dim=0, return_inverse=True)
    return ProjectedCells(
        pyramid,
        projection,
        tuple(map(tuple, shapes.tolist())),
        shapes.double() / shapes.amax(0),
        names,
        unique[:, 1:3],
        unique[:, 3] if has_depth else None,
        unique[:, 0],
        torch.full((len(pyramid),), -1).index_copy_(0, points, inverse),
    )


def project_record(record: AttentionRecord, cells: ProjectedCells) -> ProjectedRecord:
    """Projects a record as ``cells`` of its image are projected, summing weights by cell."""
    check_record(record, cells.pyramid)
    n, dim = record.positions.shape
    offsets, points, weights = (part.detach().cpu() for part in record.weights[:3])
    background = record.weights.background
    query = torch.repeat_interleave(offsets.diff())
    pairs = torch.stack((query, cells.cell_ids[points]), 1)
    pairs, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    summed = weights.new_zeros(len(pairs), record.n_heads, dtype=torch.float64)
    counts = torch.bincount(pairs[:, 0], minlength=n)
    boxes = None
    if record.boxes is not None:
        center, size = record.boxes.detach().cpu().double().split(dim, 1)
        boxes = _project_corners(center - size / 2, center + size / 2, cells.projection)
    return ProjectedRecord(
        cells.projection(record.positions.detach().cpu().double(), 0.5),
        _project_windows(record, cells),
        boxes,
        offsets_from_counts(counts),
        pairs[:, 1],
        summed.index_add_(0, inverse, weights.double()),
        None if background is None else background.detach().cpu().double(),
    )


def _project_windows(record: AttentionRecord, cells: ProjectedCells) -> ProjectedWindows | None:
    if record.neighborhood_sizes is None:
        return None
    pyramid, projection = cells.pyramid, cells.projection
    shapes, axes = pyramid.level_shapes, pyramid.periodic_axes
    dim = pyramid.position_dim
    windows = windows_on_axes(as_windows(record.neighborhood_sizes, pyramid.n_levels, dim), dim)
    levels = None if record.levels is None else record.levels.cpu().long()
    anchors = window_anchors(record.positions.cpu(), shapes, windows, levels, axes).double()
    scales = level_scales(shapes, anchors)[:, None]  # [L, 1, P]
    reach = torch.tensor([window.reach() for window in windows])[:, None]
    is_causal = torch.tensor([window.causal for window in windows])[:, None]
    low, high = anchors - reach, anchors + torch.where(is_causal, 0, reach) + 1  # [L, n, P]
    return ProjectedWindows(
        _project_corners(low / scales, high / scales, projection).transpose(0, 1),
        tuple(outline_window(window, projection.axes) for window in windows),
        tuple(name_window(window, cells.axis_names) for window in windows),
        cells.scales,
    )


def _project_corners(low: Tensor, high: Tensor, projection: Projection) -> Tensor:
    """Corners ``[..., P]`` each, as ``[..., 2, 2]``."""
    return torch.stack((projection(low, 0), projection(high, 1)), -2)
