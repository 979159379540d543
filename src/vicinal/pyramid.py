"""Feature pyramids: multi-level sparse feature maps as plain dense tensors."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._pyramid import sources
from ._pyramid.concatenation import cat_pyramids
from ._pyramid.coo import check_map_size, coalesce
from ._pyramid.data import TENSOR_FIELDS, PyramidData, rows_on_map
from ._pyramid.images import select_images
from ._pyramid.raw_points import values_of_points
from ._utils.checks import check_tensor, describe, refuse
from ._utils.collation import batched_by_cat
from ._utils.ragged import offsets_from_ids, take_rows
from ._utils.raw_grid import RawGrid, keep_cells
from ._utils.strides import least_strides
from ._utils.types import Pooling, StridesLike
from .windows import centers_of_cells, full_shape, position_dtype


@batched_by_cat
@dataclass(frozen=True, repr=False, eq=False)
class FeaturePyramid(PyramidData):
    """The points of a multi-level sparse feature map.

    A point is a stored row, whatever its values are. Points may come in any order, and two points
    in one cell remain two points. Properties return what is stored or a view of it; methods
    compute.

    ``len(pyramid)`` counts points, as the rows of ``values``. Indexing and iteration go by image
    instead: ``pyramid[b]`` is image b, ``for image in pyramid`` yields all ``batch_size`` images.

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
        point_batch: int64 ``[n]``, the image of each raw point, or -1 for none. None (default):
            that of its rows, and no image for raw points without rows.

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

    def __repr__(self) -> str:
        levels = ", ".join("x".join(map(str, shape)) for shape in self.level_shapes)
        return (
            f"FeaturePyramid(points={len(self)}, batch_size={self.batch_size}, levels=[{levels}], "
            f"values={describe(self.values)})"
        )

    def positions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the centers of the points' cells ``[nnz, P]``, in cells of the full shape.

        These are the query positions where every point is a query.

        Args:
            dtype: of the result. Default: float32. A dtype that cannot hold the centers is widened:
                half precisions to float32, and float32 to float64 above 2^23 cells along an axis.

        Raises:
            ValueError: ``dtype`` is not floating.
        """
        levels = self.levels.clamp(0, self.n_levels - 1)
        dtype = self._position_dtype(dtype)
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
        """Returns a pyramid of the same points with other embeddings ``[nnz, E']``.

        Raises:
            ValueError: ``values`` does not have a row per point, on the points' device.
        """
        # Not len: torch.export would take the number of points for a constant.
        shape, device = (self.values.shape[0], "E"), self.coordinates.device
        values = check_tensor("values", values, shape, kind="number", device=device)
        return dataclasses.replace(self, values=values, check_contents=False)

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        non_blocking: bool = False,
    ) -> "FeaturePyramid":
        """Returns the same pyramid on another device or with values of another dtype.

        As for `torch.Tensor.to`, the dtype may come first: ``to(dtype)``, ``to(device)``,
        ``to(device, dtype)``.

        Args:
            device: of all tensors. None (default): as they are.
            dtype: floating; that of the values, if they are floating too. Coordinates remain
                int64. None (default): as they are.
            non_blocking: whether copies from pinned memory to a GPU may run asynchronously.

        Raises:
            ValueError: ``device`` is not a device, or ``dtype`` is not floating.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            refuse("dtype", "a floating dtype", dtype)
        try:
            target = self.values.device if device is None else torch.device(device)
        except (RuntimeError, TypeError):
            refuse("device", "a device", device)
        moved = self._map_tensors(lambda tensor: tensor.to(target, non_blocking=non_blocking))
        if dtype is None or not self.values.is_floating_point():
            return moved
        return moved.with_values(moved.values.to(dtype))

    def pin_memory(self) -> "FeaturePyramid":
        """Returns the same pyramid in pinned memory, as a ``DataLoader`` with ``pin_memory=True``
        does.
        """
        return self._map_tensors(lambda tensor: tensor.pin_memory())

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "FeaturePyramid":
        tensors = {name: getattr(self, name) for name in TENSOR_FIELDS}
        mapped: dict[str, Any] = {
            name: function(value) for name, value in tensors.items() if value is not None
        }
        return dataclasses.replace(self, **mapped, check_contents=False)

    def __iter__(self) -> Iterator["FeaturePyramid"]:
        return (self[image] for image in range(self.batch_size))

    def __reversed__(self) -> Iterator["FeaturePyramid"]:
        # Without it, `reversed` would take the number of points for that of the images.
        return (self[image] for image in reversed(range(self.batch_size)))

    def __getitem__(self, images: int | slice) -> "FeaturePyramid":
        """Returns one image, or a slice of the images, as a pyramid.

        Its level shapes are those of the whole batch. Its points are sorted by image, and in their
        order within an image. Raw points, whose rows it keeps, remain in their order. On a GPU this
        synchronizes.

        Raises:
            ValueError: ``images`` is neither a slice nor an index of an image.
        """
        return select_images(self, images)

    @classmethod
    def cat(cls, pyramids: Sequence["FeaturePyramid"]) -> "FeaturePyramid":
        """Makes one pyramid of the images of several, one after another.

        Args:
            pyramids: at least one. Their levels, widths, dtypes, devices, periodic axes, origins
                and cell sizes must be the same. With the same strides the level shapes may differ:
                those that hold all pyramids are taken, and positions do not change. If only some
                know the images of their raw points, ``point_batch``, the others' raw points have
                the image of their rows, or none, -1, without rows.

        Raises:
            ValueError: there is no pyramid, one differs from the first in what must be the same, or
                some keep the rows of raw points and others do not.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid

            points, values = torch.tensor([[0, 3, 4], [0, 9, 9]]), torch.randn(2, 16)
            small = FeaturePyramid.from_points(points, values, (16, 16), batch_size=1)
            large = FeaturePyramid.from_points(points, values, (40, 16), batch_size=1)
            both = FeaturePyramid.cat([small, large])
            assert both.batch_size == 2
            assert both.level_shapes == large.level_shapes
            assert torch.equal(both[0].positions(), small.positions())
            ```
        """
        return cat_pyramids(cls, pyramids)

    def values_of_points(self, level: int | None = None, *, fill: float = 0.0) -> Tensor:
        """Maps values back to the raw points that the pyramid was pooled from.

        Args:
            level: the level whose values to return, from 0. None (default): all levels, for
                example to concatenate them, ``pyramid.values_of_points().flatten(1)``.
            fill: the value of points that lie outside the map. Default: 0.

        Returns:
            ``[n, E]``, for each raw point the values of the cell that it lies in, or ``[n, L, E]``
            for all levels. Gradients reach the values.

        Raises:
            ValueError: the pyramid does not know the rows of raw points, there is no such level, or
                ``fill`` is not a number of the values' kind.

        Example:
            ```python
            import torch
            from vicinal import FeaturePyramid

            coordinates = torch.tensor([[0, 2, 3], [0, 3, 3], [0, 7, 0]])  # image, row, column
            counts = torch.ones(3, 1)
            pyramid = FeaturePyramid.from_points(
                coordinates, counts, (8, 8), 1, strides=(1, 2), pooling="sum", keep_point_rows=True
            )
            assert pyramid.values_of_points(level=1).tolist() == [[2], [2], [1]]
            assert pyramid.values_of_points().shape == (3, 2, 1)
            ```
        """
        return values_of_points(self, level, fill)

    def positions_from_raw(self, points: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Converts raw coordinates to positions, in cells of the full shape.

        Where origin or cell size are not known, raw coordinates are in raw cells from the map's
        corner: origin 0, size 1. Without strides, raw cells are those of the full shape. The
        arithmetic is in float64. A position lies in the cell that its raw coordinates lie in, also
        where ``dtype`` is narrower.

        Args:
            points: floating or integer ``[n, P]``, in raw units.
            dtype: of the result, floating. Default: float32. It is widened as for `positions`.

        Returns:
            ``[n, P]``, not wrapped along periodic axes.

        Raises:
            ValueError: ``points`` does not have P columns, or ``dtype`` is not floating.

        Example:
            ```python
            import torch
            from vicinal import voxelize

            points = torch.tensor([[500_000.25, 5_000_000.0]], dtype=torch.float64)  # meters
            bounds = [(500_000, 500_100), (4_999_990, 5_000_090)]
            voxels = voxelize(points, cell_size=0.5, bounds=bounds)
            pyramid = voxels.pyramid(torch.randn(1, 16), strides=(2, 4))
            assert pyramid.positions_from_raw(points).tolist() == [[0.25, 10.0]]
            ```
        """
        points = self._check_rows_of_numbers("points", points, self.position_dim)
        return keep_cells(self._raw_grid().cells_of(points), self._position_dtype(dtype))

    def raw_from_positions(self, positions: Tensor) -> Tensor:
        """Converts positions to raw coordinates, the inverse of `positions_from_raw`.

        Args:
            positions: floating ``[n, P]``, in cells of the full shape.

        Returns:
            float64 ``[n, P]``, in raw units.

        Raises:
            ValueError: ``positions`` does not have P columns.
        """
        positions = self._check_rows_of_numbers("positions", positions, self.position_dim)
        return self._raw_grid().points_of(positions)

    def boxes_from_raw(self, boxes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Converts boxes in raw units to boxes in cells of the full shape.

        Args:
            boxes: floating or integer ``[n, 2P]``: center, then size along each axis, in raw units.
            dtype: of the result, as for `positions_from_raw`.

        Returns:
            ``[n, 2P]``, center and size, as `vicinal.detr` takes them.

        Raises:
            ValueError: ``boxes`` does not have 2P columns, or ``dtype`` is not floating.

        Example:
            ```python
            import torch
            from vicinal import voxelize

            points = torch.rand(50, 2)
            voxels = voxelize(points, cell_size=(0.1, 0.05), bounds=[(0, 1), (0, 1)])
            pyramid = voxels.pyramid(torch.randn(50, 16))
            boxes = pyramid.boxes_from_raw(torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
            torch.testing.assert_close(boxes, torch.tensor([[5.0, 10.0, 2.0, 4.0]]))
            ```
        """
        boxes = self._check_rows_of_numbers("boxes", boxes, 2 * self.position_dim)
        center, size = boxes.chunk(2, 1)
        sizes = self._raw_grid().cells_of_lengths(size)
        centers = self.positions_from_raw(center, dtype)
        return torch.cat((centers, sizes.to(centers.dtype)), 1)

    def raw_from_boxes(self, boxes: Tensor) -> Tensor:
        """Converts boxes in cells of the full shape to raw units, the inverse of `boxes_from_raw`.

        Args:
            boxes: floating ``[n, 2P]``: center, then size along each axis.

        Returns:
            float64 ``[n, 2P]``, center and size in raw units.

        Raises:
            ValueError: ``boxes`` does not have 2P columns.
        """
        boxes = self._check_rows_of_numbers("boxes", boxes, 2 * self.position_dim)
        center, size = boxes.chunk(2, 1)
        grid = self._raw_grid()
        return torch.cat((grid.points_of(center), grid.lengths_of(size)), 1)

    def _check_rows_of_numbers(self, argument: str, value: Any, width: int) -> Tensor:
        return check_tensor(argument, value, ("n", width), kind="number")

    def _position_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            refuse("dtype", "a floating dtype", dtype)
        return position_dtype(self.level_shapes, dtype)

    def _raw_grid(self) -> RawGrid:
        """The grid of the full shape's cells over raw coordinates."""
        ones = (1,) * self.position_dim
        return RawGrid(
            (0.0,) * self.position_dim if self.origin is None else self.origin,
            ones if self.cell_size is None else self.cell_size,
            ones if self.strides is None else least_strides(self.strides),
        )

    def to_coo(self) -> Tensor:
        """Returns the coalesced sparse COO map ``[B, *full_shape, L, E]`` with one dense dimension.

        Points that share a cell become one point with the sum of their embeddings. Sums of half
        precisions are accumulated in float32 and rounded once. Misplaced points are left out.

        Raises:
            ValueError: the map would have 2^63 numbers or more, zeros included.
        """
        size = (self.batch_size, *full_shape(self.level_shapes), self.n_levels, self.embed_dim)
        check_map_size(size)
        coordinates, values, on_map = self.coordinates, self.values, rows_on_map(self)
        if on_map is not None:
            coordinates, values = coordinates[on_map], take_rows(values, on_map)
        coo = torch.sparse_coo_tensor(coordinates.t(), values, size, check_invariants=False)
        return coalesce(coo)

    @classmethod
    def from_coo(
        cls,
        stacked_feature_maps: Tensor,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        strides: StridesLike | None = None,
        periodic_axes: Sequence[int] = (),
        check_contents: bool | None = None,
    ) -> "FeaturePyramid":
        """Makes a pyramid from one sparse COO map of all levels.

        Gradients reach the map's values. Points are in the order of the coalesced map.

        Args:
            stacked_feature_maps: sparse COO ``[B, *full_shape, L, E]`` with one dense dimension,
                coalesced or not: values of one cell are added, as in `to_coo`. Its sizes may be
                smaller or larger if all points lie inside their levels. On a GPU, coalescing
                synchronizes.
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
        return sources.from_coo(
            cls,
            stacked_feature_maps,
            level_spatial_shapes,
            strides,
            periodic_axes,
            check_contents,
        )

    @classmethod
    def from_levels(
        cls,
        levels: Sequence[Tensor],
        *,
        strides: StridesLike | None = None,
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
        return sources.from_levels(cls, levels, strides, periodic_axes, check_contents)

    @classmethod
    def from_points(
        cls,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        *,
        strides: StridesLike = (1, 2, 4, 8),
        pooling: Pooling = "mean",
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
                mean of integers has PyTorch's default dtype, in which float32 rounds those above
                2^24; their sum is int64. Sums and means of half precisions are accumulated in
                float32, means of integers in float64, and rounded once. A sum beyond the range of
                the dtype overflows: from 65,520 on to infinity in float16. Counts stay exact as
                integers. Where a cell has many thousands of points, give float64 values: the error
                of a float32 sum grows with their number.
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
        return sources.from_points(
            cls,
            coordinates,
            values,
            spatial_shape,
            batch_size,
            strides=strides,
            pooling=pooling,
            periodic_axes=periodic_axes,
            origin=origin,
            cell_size=cell_size,
            keep_point_rows=keep_point_rows,
            check_contents=check_contents,
        )
