"""The geometry of windows: scales, centers, and the cells around a position on each level."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._utils.checks import (
    LevelShapes,
    as_integers,
    as_level_shapes,
    as_list,
    check_finite,
    check_range,
    check_tensor,
    reads_contents,
    refuse,
)
from ._utils.constants import constant, widest_dtype
from ._utils.user_warnings import warn_user
from .window_shapes import (
    Windows,
    WindowsLike,
    as_windows,
    causal_axes,
    check_windows_fit,
    count_cells,
    window_offsets,
    windows_on_axes,
)

_FEWEST_NORMALIZED = 16  # numbers in [0, 1] are then no coincidence
# Up to this size float32 products of cell centers and scales lie in the right cells: the error, two
# roundings of at most 2^-24 each, is below half a cell of the finer level.
_FLOAT32_PRODUCTS = 2**21
_warned_normalized: set[str] = set()  # the argument that was warned of, if any


def full_shape(level_shapes: LevelShapes) -> tuple[int, ...]:
    """The largest size of each axis over the levels."""
    return tuple(map(max, zip(*level_shapes, strict=True)))


def finest_level(level_shapes: LevelShapes) -> int:
    """The level with the most cells; the first one of several."""
    cells = [math.prod(shape) for shape in level_shapes]
    return cells.index(max(cells))


def coordinate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for coordinates, float32 or wider: bfloat16 cannot tell cell 300 from 301."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def position_dtype(level_shapes: LevelShapes, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or the next wider one in which cell centers of the map lie in their own cells.

    That is float32 up to 2^23 cells along an axis, else float64.
    """
    dtype = coordinate_dtype(dtype)
    return dtype if holds_centers(level_shapes, dtype) else torch.float64


def holds_centers(level_shapes: LevelShapes, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` can represent ``x + 0.5`` for every cell ``x`` of the full shape."""
    return max(full_shape(level_shapes)) <= 1 / torch.finfo(dtype).eps


def check_position_dtype(argument: str, positions: Tensor, level_shapes: LevelShapes) -> None:
    """Raises ValueError for positions in a dtype in which cell centers leave their cells."""
    if not holds_centers(level_shapes, positions.dtype):
        full = full_shape(level_shapes)
        expected = f"a dtype that holds the cell centers of a map of {list(full)} cells"
        wider = "torch.float64, or positions() of the pyramid"
        refuse(argument, f"{expected} ({wider})", positions)


def warn_if_normalized(argument: str, positions: Tensor, level_shapes: LevelShapes) -> None:
    """Warns, once per process, where ``positions`` seem to be in units of the map.

    That is where the rows of a whole batch, at least 16 of positions or boxes ``[N, ...]``, lie in
    [0, 1] on a map of more cells. It reads contents, so it does so on the CPU only, and not in a
    compiled graph.
    """
    if _warned_normalized or not reads_contents(None, positions.device):
        return
    full = full_shape(level_shapes)
    if positions.shape[0] < _FEWEST_NORMALIZED or max(full) == 1:
        return
    low, high = positions.detach().aminmax()
    if low >= 0 and high <= 1:
        _warned_normalized.add(argument)
        expected = f"in cells of the full shape, {list(full)}"
        message = f"{argument}: expected numbers {expected}, got {positions.shape[0]} rows"
        warn_user(f"{message} that all lie in [0, 1]", UserWarning)


def level_scales(level_shapes: LevelShapes, like: Tensor) -> Tensor:
    """``[L, P]``: each level's size over the full shape, with the dtype and device of ``like``."""
    # Divided in float64 and rounded: compiled float32 division need not round to nearest, and a
    # cell's border may lie between the two results.
    shapes, full = (
        constant(sizes, like.device, widest_dtype(like.device))
        for sizes in (level_shapes, full_shape(level_shapes))
    )
    return (shapes / full).to(like.dtype)


def wrap_positions(
    positions: Tensor, level_shapes: LevelShapes, periodic_axes: Sequence[int]
) -> Tensor:
    """``positions`` ``[N, P]`` modulo the full shape along ``periodic_axes``, in [0, F)."""
    if not periodic_axes:
        return positions
    full = full_shape(level_shapes)
    columns = list(positions.unbind(1))
    for axis in periodic_axes:
        wrapped = columns[axis].remainder(full[axis])
        # The remainder of a small negative number is rounded to F. Zero, with its gradient.
        columns[axis] = torch.where(wrapped < full[axis], wrapped, wrapped - wrapped.detach())
    return torch.stack(columns, 1)


def centers_in_float64(level_shapes: LevelShapes) -> bool:
    """Whether float32 is not exact enough for the `window_centers` of a map of these shapes."""
    return max(full_shape(level_shapes)) > _FLOAT32_PRODUCTS


def dtype_of_centers(positions: Tensor, level_shapes: LevelShapes) -> torch.dtype:
    """The dtype in which `window_centers` computes."""
    if centers_in_float64(level_shapes):
        return widest_dtype(positions.device)
    return coordinate_dtype(positions.dtype)


def window_centers(
    positions: Tensor, level_shapes: LevelShapes, periodic_axes: Sequence[int] = ()
) -> Tensor:
    """``[L, N, P]``: the cell, as floats, that contains each of ``positions`` ``[N, P]``."""
    dtype = dtype_of_centers(positions, level_shapes)
    positions = wrap_positions(positions.detach().to(dtype), level_shapes, periodic_axes)
    centers = (positions * level_scales(level_shapes, positions)[:, None]).floor_()
    if not periodic_axes:
        return centers
    # The product of a position below F and a scale may be rounded to S[l].
    last = [
        [size - 1 if axis in periodic_axes else 2**62 for axis, size in enumerate(shape)]
        for shape in level_shapes
    ]
    return torch.minimum(centers, constant(last, centers.device, centers.dtype)[:, None])


def window_anchors(
    positions: Tensor,
    level_shapes: LevelShapes,
    windows: Windows,
    query_levels: Tensor | None = None,
    periodic_axes: Sequence[int] = (),
) -> Tensor:
    """int64 ``[L, N, P]``: the cells that the offsets of the windows count from.

    That is the cell that contains the position, or along a causal axis the last cell that is
    complete when the query's own cell ends. Its own cell is that of its level, ``query_levels``
    ``[N]``, or for None of the level that is largest along the axis.
    """
    centers = window_centers(positions, level_shapes, periodic_axes)
    # Clamped, since the conversion of very large numbers to integers would overflow.
    anchors = centers.nan_to_num_(nan=-math.inf).clamp_(-(2.0**62), 2.0**62).long()
    axes = causal_axes(windows)
    if not axes:
        return anchors
    columns = list(anchors.unbind(2))
    for axis in axes:
        sizes = [shape[axis] for shape in level_shapes]
        own = query_levels
        if own is None:
            own = anchors.new_full(anchors.shape[1:2], sizes.index(max(sizes)))
        causal = constant([int(window.causal[axis]) for window in windows], anchors.device).bool()
        complete = _last_complete_cells(columns[axis], sizes, own)
        columns[axis] = torch.where(causal[:, None], complete, columns[axis])
    return torch.stack(columns, 2)


def _last_complete_cells(cells: Tensor, sizes: Sequence[int], own: Tensor) -> Tensor:
    """``[L, N]``: along one axis, the last cell of each level that is complete at the end of a
    query's own cell: that of its level ``own`` ``[N]`` among ``cells`` ``[L, N]``.

    ``sizes`` ``[L]`` are those of the levels, of which each two divide one another. Cells far
    beyond the map are clamped where products would overflow.
    """
    device = cells.device
    ratios = [[_ratio(size, other) for other in sizes] for size in sizes]
    numerator, denominator = (
        constant([[ratio[part] for ratio in row] for row in ratios], device)[:, own]
        for part in range(2)
    )
    limit = constant([[2**62 // ratio[0] for ratio in row] for row in ratios], device)[:, own]
    end = torch.minimum(torch.maximum(cells.gather(0, own[None]) + 1, -limit), limit)
    return torch.div(end * numerator, denominator, rounding_mode="floor") - 1


def _ratio(size: int, other: int) -> tuple[int, int]:
    """Numerator and denominator of ``size / other``, of which one divides the other."""
    return (size // other, 1) if size >= other else (1, other // size)


def cell_positions(
    cells: Tensor,
    levels: Tensor,
    level_spatial_shapes: Tensor | Sequence[Sequence[int]],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Returns the centers of cells as positions, in cells of the full shape.

    The full shape is the largest size of each axis over the levels. The center of cell ``x`` on
    level ``l`` is ``(x + 0.5) * full_shape / level_spatial_shapes[l]``.

    Args:
        cells: integer ``[n, P]``, each in cells of its own level, inside the map or not.
        levels: integer ``[n]``, the level of each cell, in ``[0, L)``.
        level_spatial_shapes: integer ``[L, P]``, the spatial shape of each level.
        dtype: of the result. Default: float32. A dtype that cannot hold the centers is widened:
            half precisions to float32, and float32 to float64 above 2^23 cells along an axis.

    Returns:
        ``[n, P]``, the positions of queries that lie at these cells.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or, on the CPU, a level is not in
            ``[0, L)``.

    Example:
        ```python
        import torch
        from vicinal import cell_positions

        cells, levels = torch.tensor([[3, 5], [1, 2]]), torch.tensor([0, 1])
        positions = cell_positions(cells, levels, [[8, 8], [4, 4]])
        assert positions.tolist() == [[3.5, 5.5], [3.0, 5.0]]
        ```
    """
    shapes = as_level_shapes(level_spatial_shapes)
    cells = check_tensor("cells", cells, ("n", len(shapes[0])), kind="integer")
    levels = check_tensor("levels", levels, (cells.shape[0],), kind="integer", device=cells.device)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        refuse("dtype", "a floating dtype", dtype)
    if reads_contents(None, cells.device):
        check_range("levels", levels, len(shapes))
    return centers_of_cells(cells, levels.clamp(0, len(shapes) - 1), shapes, dtype)


def centers_of_cells(
    cells: Tensor, levels: Tensor, level_shapes: LevelShapes, dtype: torch.dtype
) -> Tensor:
    """`cell_positions` of arguments that are known to be valid."""
    # Computed in float64 and rounded: the scale of stride 3 is rounded in float32.
    wide = cells.to(widest_dtype(cells.device))
    centers = (wide + 0.5) / level_scales(level_shapes, wide)[levels]
    return centers.to(position_dtype(level_shapes, dtype))


def get_multilevel_neighborhoods(
    query_fullscale_spatial_positions: Tensor,
    level_spatial_shapes: Tensor | Sequence[Sequence[int]],
    neighborhood_sizes: WindowsLike = (3, 5, 7, 9),
    *,
    query_level_indices: Tensor | None = None,
    periodic_axes: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the cells of every query's windows, for inspection and tests.

    There are K per query, for boxes ``K = sum(w[l] ** P)``. The attention never builds these
    ``[N, K, ...]`` tensors.

    Args:
        query_fullscale_spatial_positions: floating ``[N, P]``, in cells of the full shape (the
            largest size of each axis over the levels).
        level_spatial_shapes: integer ``[L, P]``, the size of each level in its own cells.
        neighborhood_sizes: the window of each level, in cells of that level: an odd width, a tuple
            of one per axis, a `Window`, or 0 for none. Integers ``[L]`` may be a tensor or an
            array.
        query_level_indices: integer ``[N]``, the level of each query; windows depend on it along
            causal axes. None (default): the level that is largest along the axis.
        periodic_axes: axes along which the map repeats. Default: none.

    Returns:
        the cells, int64 ``[N, K, P]``, levels in order and each window row-major, cells beyond
        the map as computed, but wrapped along periodic axes; a bool mask ``[N, K]``, True where a
        cell lies outside its level; the level of every slot, int64 ``[K]``.

    Raises:
        ValueError: positions or shapes are not 2-D or do not agree on P, positions are integers
            or not finite, positions have a dtype that cannot hold the map's cell centers, a level
            index is not in ``[0, L)``, a size is even along an axis that is not causal, or
            negative, all sizes are 0, a window is wider than its level or causal along a periodic
            axis, or level sizes do not divide each other along a causal axis.

    Example:
        ```python
        import torch
        from vicinal import get_multilevel_neighborhoods

        positions = torch.tensor([[0.5, 5.5]])  # one query on a map of 8 x 8 cells
        cells, outside, levels = get_multilevel_neighborhoods(positions, [[8, 8], [4, 4]], [3, 1])
        assert cells.shape == (1, 3 * 3 + 1, 2)
        assert cells[0, 4].tolist() == [0, 5]  # the center of the window on level 0
        assert cells[0, 9].tolist() == [0, 2]  # the window of one cell on level 1
        assert outside[0, :3].all()  # the row above the map
        ```
    """
    name = "query_fullscale_spatial_positions"
    shapes = as_level_shapes(level_spatial_shapes)
    dim = len(shapes[0])
    positions = check_tensor(name, query_fullscale_spatial_positions, ("N", dim), kind="floating")
    windows = windows_on_axes(as_windows(neighborhood_sizes, len(shapes), dim), dim)
    axes = as_periodic_axes(periodic_axes, dim)
    check_windows_fit(windows, shapes, axes)
    check_position_dtype(name, positions, shapes)
    query_levels = as_query_levels(query_level_indices, positions, len(shapes))
    if reads_contents(None, positions.device):
        check_finite(name, positions)

    device = positions.device
    offsets = [constant(window_offsets(window), device).view(-1, dim) for window in windows]
    anchors = window_anchors(positions, shapes, windows, query_levels, axes)
    cells = torch.cat(
        [anchor[:, None] + window for anchor, window in zip(anchors, offsets, strict=True)],
        1,
    )
    slot_levels = torch.repeat_interleave(
        torch.arange(len(windows), device=device),
        constant(list(map(count_cells, windows)), device),
    )
    slot_shapes = constant(shapes, device)[slot_levels]
    for axis in axes:
        cells[..., axis] %= slot_shapes[:, axis]
    outside = ((cells < 0) | (cells >= slot_shapes)).any(-1)
    return cells, outside, slot_levels


def as_query_levels(
    query_level_indices: Tensor | None,
    positions: Tensor,
    n_levels: int,
    check_contents: bool | None = None,
) -> Tensor | None:
    """``query_level_indices`` of N queries as int64 in ``[0, L)``, or None.

    Raises:
        ValueError: they are no integers ``[N]``, or, where contents are checked, not in ``[0, L)``.
    """
    name, device = "query_level_indices", positions.device
    if query_level_indices is None:
        return None
    shape = (positions.shape[0],)
    levels = check_tensor(name, query_level_indices, shape, kind="integer", device=device)
    if reads_contents(check_contents, device):
        check_range(name, levels, n_levels)
    return levels.long().clamp(0, n_levels - 1)


def as_periodic_axes(periodic_axes: Any, position_dim: int) -> tuple[int, ...]:
    """``periodic_axes`` in ascending order; raises ValueError unless they are axes of space."""
    return as_axes("periodic_axes", periodic_axes, position_dim)


def as_axes(argument: str, value: Any, position_dim: int) -> tuple[int, ...]:
    """Axes in ascending order; raises ValueError unless they are axes of space."""
    expected = f"distinct axes in [0, {position_dim})"
    axes = as_integers(as_list(argument, value, expected))
    valid = axes is not None and len(set(axes)) == len(axes)
    if axes is None or not valid or any(not 0 <= axis < position_dim for axis in axes):
        refuse(argument, expected, value)
    return tuple(sorted(axes))
