"""Feature pyramids: multi-level sparse feature maps as plain dense tensors."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from ._utils.checks import (
    LevelShapes,
    as_integer,
    as_level_shapes,
    as_numbers,
    as_spatial_shape,
    check_range,
    check_tensor,
    describe,
    reads_contents,
    refuse,
)
from ._utils.constants import constant
from ._utils.ragged import offsets_from_ids
from ._utils.strides import (
    Strides,
    as_strides,
    check_strides_of_shapes,
    least_strides,
    shapes_from_strides,
)
from .pooling import check_pooling, pool_points
from .windows import as_periodic_axes, centers_of_cells, full_shape


@dataclass(frozen=True, repr=False, eq=False)
class FeaturePyramid:
    """The points of a multi-level sparse feature map.

    A point is a stored row, whatever its values are. Points may come in any order, and two points
    in one cell remain two points. Properties return what is stored or a view of it; methods
    compute.

    Args:
        values: ``[nnz, E]``, an embedding per point.
        coordinates: integer ``[nnz, P + 2]``: image, cell along each axis, level.
        level_shapes: ``[L, P]``, the spatial shape of each level, a tensor or nested sequences.
            Kept as tuples.
        batch_size: number of images B, empty images included.
        check_contents: whether to validate that points lie inside their level. On a GPU that
            synchronizes. None (default): on the CPU only.
        strides: the raw cells per cell of each level, one per axis: one int or P ints per level.
            Sizes times strides must be the same for all levels. None (default): not known.
        periodic_axes: axes along which the map repeats, such as an azimuth. Default: none.
        origin: raw coordinates of the lower corner of raw cell 0, ``[P]``. None (default): not
            known.
        cell_size: size of a raw cell in raw units, ``[P]``. None (default): not known.
        point_rows: int64 ``[n, L]``, the row of the cell on each level that each of n raw points
            was pooled into, or -1. None (default): not known.

    Raw cells are those of the grid that the levels were pooled from, at stride 1. Positions are in
    cells of the full shape: raw cells divided by the least stride of the axis.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a point lies outside the batch, the
            levels or its level's shape, strides do not belong to the level shapes, or the axes, the
            origin or the cell size are not those of P dimensions.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid

        coordinates = torch.tensor([[0, 2, 3, 0], [0, 1, 1, 1]])  # image, row, column, level
        pyramid = FeaturePyramid(torch.randn(2, 16), coordinates, [(8, 8), (4, 4)], batch_size=1)
        assert pyramid.positions().tolist() == [[2.5, 3.5], [3.0, 3.0]]
        ```
    """

    values: Tensor
    coordinates: Tensor
    level_shapes: LevelShapes
    batch_size: int
    check_contents: InitVar[bool | None] = None
    _: KW_ONLY
    strides: Strides | None = None
    periodic_axes: tuple[int, ...] = ()
    origin: tuple[float, ...] | None = None
    cell_size: tuple[float, ...] | None = None
    point_rows: Tensor | None = None

    def __post_init__(self, check_contents: bool | None) -> None:
        self._set(level_shapes=as_level_shapes(self.level_shapes, "level_shapes"))
        values = check_tensor("values", self.values, ("nnz", "E"), kind="number")
        shape = (values.shape[0], self.position_dim + 2)
        coordinates = check_tensor(
            "coordinates", self.coordinates, shape, kind="integer", device=values.device
        )
        batch_size = as_integer(self.batch_size)
        if batch_size is None or batch_size < 0:
            refuse("batch_size", "a non-negative integer", self.batch_size)
        self._set(values=values, coordinates=coordinates.long(), batch_size=batch_size)
        self._check_geometry()
        if reads_contents(check_contents, coordinates.device):
            _check_points("coordinates", self)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _check_geometry(self) -> None:
        dim, device = self.position_dim, self.values.device
        self._set(periodic_axes=as_periodic_axes(self.periodic_axes, dim))
        if self.strides is not None:
            self._set(strides=as_strides(self.strides, dim, self.n_levels))
            check_strides_of_shapes(self.strides, self.level_shapes)
        if self.origin is not None:
            self._set(origin=as_numbers("origin", self.origin, dim))
        if self.cell_size is not None:
            self._set(cell_size=as_numbers("cell_size", self.cell_size, dim))
            if min(self.cell_size) <= 0:
                refuse("cell_size", "sizes above 0", self.cell_size)
        if self.point_rows is not None:
            shape = ("n", self.n_levels)
            check_tensor("point_rows", self.point_rows, shape, kind="integer", device=device)

    def __repr__(self) -> str:
        levels = ", ".join("x".join(map(str, shape)) for shape in self.level_shapes)
        return (
            f"FeaturePyramid(points={len(self)}, batch_size={self.batch_size}, levels=[{levels}], "
            f"values={describe(self.values)})"
        )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def n_levels(self) -> int:
        """L, the number of levels."""
        return len(self.level_shapes)

    @property
    def position_dim(self) -> int:
        """P, the number of spatial dimensions."""
        return len(self.level_shapes[0])

    @property
    def embed_dim(self) -> int:
        """E, the width of the embeddings."""
        return self.values.shape[1]

    @property
    def batch(self) -> Tensor:
        """int64 ``[nnz]``, the image of every point."""
        return self.coordinates[:, 0]

    @property
    def cells(self) -> Tensor:
        """int64 ``[nnz, P]``, the cell of every point, on its own level."""
        return self.coordinates[:, 1:-1]

    @property
    def levels(self) -> Tensor:
        """int64 ``[nnz]``, the level of every point."""
        return self.coordinates[:, -1]

    def misplaced(self) -> Tensor:
        """Returns bool ``[nnz]``, True where the image, the level or the cell is out of range."""
        shapes = constant(self.level_shapes, self.coordinates.device)
        levels = self.levels.clamp(0, self.n_levels - 1)
        no_level = self.levels != levels
        no_image = (self.batch < 0) | (self.batch >= self.batch_size)
        no_cell = ((self.cells < 0) | (self.cells >= shapes[levels])).any(1)
        return no_level | no_image | no_cell

    def positions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the centers of the points' cells ``[nnz, P]``, in cells of the full shape.

        These are the query positions where every point is a query.

        Args:
            dtype: of the result. Default: float32. A dtype that cannot hold the centers is widened:
                half precisions to float32, and float32 to float64 above 2^23 cells along an axis.
        """
        levels = self.levels.clamp(0, self.n_levels - 1)
        return centers_of_cells(self.cells, levels, self.level_shapes, dtype)

    def batch_offsets(self) -> Tensor:
        """Returns int64 ``[B + 1]``: image ``b`` holds the points ``offsets[b]:offsets[b + 1]``.

        These are the query offsets where every point is a query. On a GPU this synchronizes.

        Raises:
            ValueError: the points are not sorted by image.
        """
        if not (self.batch[1:] >= self.batch[:-1]).all():
            refuse("coordinates", "points sorted by image", "images out of order")
        return offsets_from_ids(self.batch, self.batch_size)

    def with_values(self, values: Tensor) -> "FeaturePyramid":
        """Returns a pyramid of the same points with other embeddings ``[nnz, E']``."""
        return dataclasses.replace(self, values=values, check_contents=False)

    def to(self, device: torch.device | str) -> "FeaturePyramid":
        """Returns the same pyramid on another device."""
        return dataclasses.replace(
            self,
            values=self.values.to(device),
            coordinates=self.coordinates.to(device),
            check_contents=False,
        )

    def to_coo(self) -> Tensor:
        """Returns the coalesced sparse COO map ``[B, *full_shape, L, E]`` with one dense dimension.

        Points that share a cell become one point with the sum of their embeddings.
        """
        size = (self.batch_size, *full_shape(self.level_shapes), self.n_levels, self.embed_dim)
        coo = torch.sparse_coo_tensor(
            self.coordinates.t(), self.values, size, check_invariants=False
        )
        return coo.coalesce()

    @classmethod
    def from_coo(
        cls,
        stacked_feature_maps: Tensor,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        strides: Any = None,
        periodic_axes: Sequence[int] = (),
        check_contents: bool | None = None,
    ) -> "FeaturePyramid":
        """Makes a pyramid from one sparse COO map of all levels.

        Gradients reach the map's values. Points are in the order of the coalesced map.

        Args:
            stacked_feature_maps: sparse COO ``[B, *full_shape, L, E]`` with one dense dimension,
                coalesced or not. Its sizes may be smaller or larger if all points lie inside their
                levels. On a GPU, coalescing synchronizes.
            level_spatial_shapes: integer ``[L, P]``, the spatial shape of each level. With
                ``strides`` it may be None (default): the shapes that hold the map and its points.
            strides: raw cells per cell of each level, one int or P ints per level. Level shapes are
                padded to an extent that all levels share, so that positions are exact. None
                (default): level shapes are taken as they are.
            periodic_axes: axes along which the map repeats; they are not padded. Default: none.
            check_contents: as for the class.

        Raises:
            ValueError: the map is not a sparse COO tensor with one dense dimension, its number of
                dimensions does not match, points lie outside their level's shape, a size along a
                periodic axis is not a multiple of the strides, or both ``level_spatial_shapes`` and
                ``strides`` are missing.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid

            indices = torch.tensor([[0, 0], [5, 1], [7, 1], [0, 1]])  # image, row, column, level
            size, values = (1, 8, 8, 2, 16), torch.randn(2, 16)
            coo = torch.sparse_coo_tensor(indices, values, size, check_invariants=True)
            pyramid = FeaturePyramid.from_coo(coo, [(8, 8), (4, 4)])
            assert len(pyramid) == 2
            ```
        """
        name = "stacked_feature_maps"
        shapes = None if level_spatial_shapes is None else as_level_shapes(level_spatial_shapes)
        if shapes is None and strides is None:
            refuse("level_spatial_shapes", "[L, P] sizes, or strides", None)
        dim = _dim_of_coo(stacked_feature_maps) if shapes is None else len(shapes[0])
        _check_coo(
            name, stacked_feature_maps, ["B", *[f"S{axis}" for axis in range(dim)], "L", "E"]
        )
        axes = as_periodic_axes(periodic_axes, dim)
        coo = stacked_feature_maps.coalesce()
        # Copies: graphs of torch.compile do not take views of a sparse tensor.
        values = coo.values().clone()
        coordinates = coo.indices().t().contiguous()
        if strides is not None:
            strides = as_strides(strides, dim, None if shapes is None else len(shapes))
            extent = _extent_of_coo(coo.shape[1:-2], coordinates, shapes, strides)
            shapes = shapes_from_strides(extent, strides, axes)
        assert shapes is not None
        pyramid = cls(
            values, coordinates, shapes, coo.shape[0], False, strides=strides, periodic_axes=axes
        )
        if reads_contents(check_contents, coo.device):
            _check_points(name, pyramid)
        return pyramid

    @classmethod
    def from_levels(
        cls,
        levels: Sequence[Tensor],
        *,
        strides: Any = None,
        periodic_axes: Sequence[int] = (),
        check_contents: bool | None = None,
    ) -> "FeaturePyramid":
        """Makes a pyramid from one sparse COO map per level.

        Points are sorted by image, then level.

        Args:
            levels: sparse COO ``[B, *S[l], E]`` with one dense dimension each, coalesced or not.
            strides: raw cells per cell of each level, one int or P ints per level. Level shapes are
                padded to an extent that all levels share, so that positions are exact; strided
                convolutions with padding return maps of other sizes. None (default): the sizes of
                the maps.
            periodic_axes: axes along which the maps repeat; they are not padded. Default: none.
            check_contents: as for the class.

        Raises:
            ValueError: there is no level, a map is not sparse COO with one dense dimension, maps
                differ in batch size, number of dimensions, width, dtype or device, there is not one
                stride per level, or a size along a periodic axis is not a multiple of the strides.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid

            def make_map(cell: list[int], side: int) -> torch.Tensor:
                indices = torch.tensor([[0, *cell]]).t()  # image, row, column
                size, values = (1, side, side, 16), torch.randn(1, 16)
                return torch.sparse_coo_tensor(indices, values, size, check_invariants=True)

            pyramid = FeaturePyramid.from_levels([make_map([5, 7], 8), make_map([2, 3], 4)])
            assert pyramid.level_shapes == ((8, 8), (4, 4))
            ```
        """
        if not levels:
            refuse("levels", "at least one map", "none")
        first = levels[0]
        for index, level in enumerate(levels):
            if not isinstance(level, Tensor) or not isinstance(first, Tensor):
                refuse(f"levels[{index}]", "a sparse COO tensor [B, *S, E]", level)
            sizes: list[int | str] = ["B", *[f"S{axis}" for axis in range(first.dim() - 2)], "E"]
            if index:
                sizes[0], sizes[-1] = first.shape[0], first.shape[-1]
            _check_coo(f"levels[{index}]", level, sizes)
            if (level.dtype, level.device) != (first.dtype, first.device):
                refuse(f"levels[{index}]", f"{first.dtype} on {first.device}", level)
        shapes = tuple(tuple(level.shape[1:-1]) for level in levels)
        axes = as_periodic_axes(periodic_axes, len(shapes[0]))
        if strides is not None:
            strides = as_strides(strides, len(shapes[0]), len(levels))
            shapes = shapes_from_strides(_extent(shapes, strides), strides, axes)
        maps = [level.coalesce() for level in levels]
        cells = [
            torch.nn.functional.pad(level.indices().t(), (0, 1), value=index)
            for index, level in enumerate(maps)
        ]
        coordinates, order = _sort_by_image(torch.cat(cells))
        values = torch.cat([level.values() for level in maps])[order]
        return cls(
            values,
            coordinates,
            shapes,
            first.shape[0],
            check_contents,
            strides=strides,
            periodic_axes=axes,
        )

    @classmethod
    def from_points(
        cls,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        *,
        strides: Any = (1, 2, 4, 8),
        pooling: str = "mean",
        periodic_axes: Sequence[int] = (),
        origin: Sequence[float] | None = None,
        cell_size: Sequence[float] | None = None,
        keep_point_rows: bool = False,
        check_contents: bool | None = None,
    ) -> "FeaturePyramid":
        """Makes a pyramid from the points of one grid, pooled once per stride.

        A level has a point in every cell that at least one of the given points falls into.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then cell along each axis of a grid of
                ``spatial_shape``. Points that share a cell are pooled as well.
            values: floating or integer ``[n, E]``.
            spatial_shape: the ``P`` sizes of the grid. Along each axis the grid is padded to a
                common multiple of the strides, so that positions are exact and do not depend on
                the size of the grid.
            batch_size: number of images, empty images included.
            strides: the size of each level's cells, in cells of the grid: one int or P ints per
                level; one int is one level. Default: 1, 2, 4, 8.
            pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over all points in the cell. The
                mean of integers is floating.
            periodic_axes: axes along which the grid repeats, such as an azimuth. They are not
                padded. Default: none.
            origin: raw coordinates of the grid's lower corner, ``[P]``. None (default): not known.
            cell_size: size of a cell of the grid in raw units, ``[P]``. None (default): not known.
            keep_point_rows: whether the pyramid keeps the row that each given point was pooled into
                on every level, as ``point_rows``. Default: False.
            check_contents: as for the class.

        Returns:
            a pyramid sorted by image, level and cell. The number of its points depends on tensor
            contents, so on a GPU this synchronizes.

        Raises:
            ValueError: shapes, dtypes or devices do not match, a stride is below 1, ``pooling`` is
                unknown, points lie outside the grid, or the size along a periodic axis is not a
                multiple of every stride.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid

            coordinates = torch.tensor([[0, 2, 3], [0, 3, 3], [0, 7, 0]])  # image, row, column
            pyramid = FeaturePyramid.from_points(
                coordinates, torch.randn(3, 16), spatial_shape=(8, 8), batch_size=1, strides=(1, 2)
            )
            assert pyramid.levels.tolist() == [0, 0, 0, 1, 1]
            ```
        """
        shape = as_spatial_shape(spatial_shape)
        strides = as_strides(strides, len(shape))
        axes = as_periodic_axes(periodic_axes, len(shape))
        level_shapes = shapes_from_strides(shape, strides, axes)
        pool = check_pooling(pooling)
        coordinates = check_tensor(
            "coordinates", coordinates, ("n", len(shape) + 1), kind="integer"
        )
        grid = cls(
            values,
            torch.nn.functional.pad(coordinates, (0, 1)),
            (shape,),
            batch_size,
            check_contents,
        )
        if math.prod(map(max, zip(*level_shapes, strict=True))) * grid.batch_size >= 2**62:
            refuse("spatial_shape", "fewer than 2^62 cells in all images", spatial_shape)
        levels = [
            pool_points(grid.values, grid.coordinates[:, :-1], stride, level_shape, pool)
            for stride, level_shape in zip(strides, level_shapes, strict=True)
        ]
        cells = [
            torch.nn.functional.pad(cells, (0, 1), value=index)
            for index, (_, cells, _) in enumerate(levels)
        ]
        sorted_cells, order = _sort_by_image(torch.cat(cells))
        return cls(
            torch.cat([pooled for pooled, _, _ in levels])[order],
            sorted_cells,
            level_shapes,
            grid.batch_size,
            False,
            strides=strides,
            periodic_axes=axes,
            origin=None if origin is None else as_numbers("origin", origin, len(shape)),
            cell_size=None if cell_size is None else as_numbers("cell_size", cell_size, len(shape)),
            point_rows=_rows_of_points(levels, order) if keep_point_rows else None,
        )


def _rows_of_points(levels: Sequence[tuple[Tensor, Tensor, Tensor]], order: Tensor) -> Tensor:
    """``[n, L]``: the row of each point on every level, after all levels were sorted by ``order``.

    ``levels`` is what `pool_points` returned for each level.
    """
    row_after = torch.argsort(order)
    first_rows = itertools.accumulate((len(cells) for _, cells, _ in levels), initial=0)
    rows = [row_after[row + first] for (_, _, row), first in zip(levels, first_rows, strict=False)]
    return torch.stack(rows, 1)


def _sort_by_image(coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """``coordinates`` sorted by image, and their order before that."""
    order = torch.argsort(coordinates[:, 0], stable=True)
    return coordinates[order], order


def _extent(shapes: LevelShapes, strides: Strides) -> list[int]:
    """The raw cells along each axis that hold all levels."""
    pairs = zip(shapes, strides, strict=True)
    extents = ([size * step for size, step in zip(*level, strict=True)] for level in pairs)
    return [max(axis) for axis in zip(*extents, strict=True)]


def _extent_of_coo(
    sizes: Sequence[int], coordinates: Tensor, shapes: LevelShapes | None, strides: Strides
) -> list[int]:
    """The raw cells along each axis that hold a COO map of spatial ``sizes``, and its points.

    ``shapes`` are given level shapes, or None.
    """
    stored = [[1] * len(sizes) for _ in strides]
    for level in range(len(strides)):
        cells = coordinates[coordinates[:, -1] == level, 1:-1]
        if len(cells):
            stored[level] = (cells.amax(0) + 1).tolist()
    given = [(tuple(sizes), least_strides(strides)), *zip(stored, strides, strict=True)]
    given += [] if shapes is None else zip(shapes, strides, strict=True)
    held, steps = zip(*given, strict=True)
    return _extent(tuple(map(tuple, held)), steps)


def _dim_of_coo(value: Any) -> int:
    """The number of spatial dimensions of a map ``[B, *full_shape, L, E]``, at least 1."""
    return max(value.dim() - 3, 1) if isinstance(value, Tensor) else 1


def _check_coo(argument: str, value: Tensor, sizes: Sequence[int | str]) -> None:
    expected = f"a sparse COO tensor [{', '.join(map(str, sizes))}] with one dense dimension"
    is_coo = isinstance(value, Tensor) and value.layout == torch.sparse_coo
    if not is_coo or value.dense_dim() != 1 or value.dim() != len(sizes):
        refuse(argument, expected, value)
    if any(
        isinstance(want, int) and want != size
        for want, size in zip(sizes, value.shape, strict=True)
    ):
        refuse(argument, expected, value)


def _check_points(argument: str, pyramid: FeaturePyramid) -> None:
    check_range(f"{argument} (batch)", pyramid.batch, pyramid.batch_size)
    check_range(f"{argument} (level)", pyramid.levels, pyramid.n_levels)
    misplaced = pyramid.misplaced()
    if misplaced.any():
        row = int(misplaced.nonzero()[0])
        cell, level = pyramid.cells[row].tolist(), int(pyramid.levels[row])
        refuse(
            argument,
            f"cells inside their level's shape {list(pyramid.level_shapes[level])}",
            f"cell {cell} at level {level} (point {row})",
        )
