"""Feature pyramids: multi-level sparse feature maps as plain dense tensors."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
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
    is_real,
    reads_contents,
    refuse,
)
from ._utils.constants import constant
from ._utils.ragged import offsets_from_ids
from ._utils.raw_grid import RawGrid, keep_cells
from ._utils.strides import (
    Strides,
    as_strides,
    check_strides_of_shapes,
    least_strides,
    shapes_from_strides,
)
from .pooling import check_pooling, pool_points
from .windows import as_periodic_axes, centers_of_cells, full_shape, position_dtype

# The fields of a pyramid that are tensors.
TENSOR_FIELDS = ("values", "coordinates", "point_rows", "point_batch")


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
        point_batch: int64 ``[n]``, the image of each raw point. None (default): that of its rows,
            and no image for raw points without rows.

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
    point_batch: Tensor | None = None

    def __post_init__(self, check_contents: bool | None) -> None:
        self._set(level_shapes=as_level_shapes(self.level_shapes, "level_shapes"))
        values = check_tensor("values", self.values, ("nnz", "E"), kind="number")
        shape = (values.shape[0], self.position_dim + 2)
        coordinates = check_tensor(
            "coordinates", self.coordinates, shape, kind="integer", device=values.device
        )
        batch_size = as_integer(self.batch_size)
        if batch_size is None or batch_size < 0:
            refuse("batch_size", "a non-negative integer", describe(self.batch_size))
        self._set(values=values, coordinates=coordinates.long(), batch_size=batch_size)
        self._check_geometry()
        if reads_contents(check_contents, coordinates.device):
            _check_points("coordinates", self)
            if self.point_rows is not None:
                _check_point_rows(self.point_rows, len(self))
            if self.point_batch is not None:
                check_range("point_batch", self.point_batch, self.batch_size)

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
            rows = check_tensor("point_rows", self.point_rows, shape, kind="integer", device=device)
            self._set(point_rows=rows.long())
        if self.point_batch is not None:
            n = 0 if self.point_rows is None else len(self.point_rows)
            batch = check_tensor(
                "point_batch", self.point_batch, (n,), kind="integer", device=device
            )
            self._set(point_batch=batch.long())

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
        device = self.coordinates.device
        values = check_tensor("values", values, (len(self), "E"), kind="number", device=device)
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

    def __getitem__(self, images: int | slice) -> "FeaturePyramid":
        """Returns one image, or a slice of the images, as a pyramid.

        Its level shapes are those of the whole batch. Its points are sorted by image, and in their
        order within an image. Raw points, whose rows it keeps, remain in their order. On a GPU this
        synchronizes.

        Raises:
            ValueError: ``images`` is neither a slice nor an index of an image.
        """
        index = as_integer(images)
        if index is not None and -self.batch_size <= index < self.batch_size:
            chosen = [index % self.batch_size]
        elif isinstance(images, slice):
            chosen = list(range(self.batch_size)[images])
        else:
            refuse("images", f"a slice, or the index of one of {self.batch_size} images", images)
        device = self.values.device
        # The last entry is for what belongs to no image.
        new_image = torch.full((self.batch_size + 1,), len(chosen), device=device)
        new_image[torch.tensor(chosen, dtype=torch.int64, device=device)] = torch.arange(
            len(chosen), device=device
        )
        rows, images_of_rows = _rows_of_images(new_image[self._known(self.batch)], len(chosen))
        coordinates = torch.cat((images_of_rows[:, None], self.coordinates[rows, 1:]), 1)
        point_rows, point_batch = self.point_rows, None
        if point_rows is not None:
            of_points = new_image[self._images_of_points(point_rows)]
            points = (of_points < len(chosen)).nonzero().flatten()
            point_batch = of_points[points]
            new_row = torch.full((len(self) + 1,), -1, device=device)
            new_row[rows] = torch.arange(len(rows), device=device)
            point_rows = new_row[self._known(point_rows[points], len(self))]
        return dataclasses.replace(
            self,
            values=self.values[rows],
            coordinates=coordinates,
            batch_size=len(chosen),
            point_rows=point_rows,
            point_batch=point_batch,
            check_contents=False,
        )

    def _images_of_points(self, point_rows: Tensor) -> Tensor:
        """int64 ``[n]``, the image of every raw point, B for none."""
        if self.point_batch is not None:
            return self._known(self.point_batch)
        image_of_row = torch.nn.functional.pad(
            self._known(self.batch), (0, 1), value=self.batch_size
        )
        return image_of_row[self._known(point_rows.amax(1), len(self))]

    def _known(self, indices: Tensor, stop: int | None = None) -> Tensor:
        """``indices``, with ``stop`` (default: B) for those that are out of range."""
        stop = self.batch_size if stop is None else stop
        return indices.masked_fill((indices < 0) | (indices >= stop), stop)

    @classmethod
    def cat(cls, pyramids: Sequence["FeaturePyramid"]) -> "FeaturePyramid":
        """Makes one pyramid of the images of several, one after another.

        Args:
            pyramids: at least one. Their levels, widths, dtypes, devices, periodic axes, origins
                and cell sizes must be the same. With the same strides the level shapes may differ:
                those that hold all pyramids are taken, and positions do not change.

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
        pyramids = _check_alike(pyramids)
        first = pyramids[0]
        n_rows = itertools.accumulate(map(len, pyramids), initial=0)
        n_images = itertools.accumulate((p.batch_size for p in pyramids), initial=0)
        coordinates, rows, batch = [], [], []
        for pyramid, before, images in zip(pyramids, n_rows, n_images, strict=False):
            shifted = torch.cat((pyramid.batch[:, None] + images, pyramid.coordinates[:, 1:]), 1)
            coordinates.append(shifted)
            if pyramid.point_rows is not None:
                rows.append(torch.where(pyramid.point_rows < 0, -1, pyramid.point_rows + before))
            if pyramid.point_batch is not None:
                batch.append(pyramid.point_batch + images)
        return dataclasses.replace(
            first,
            values=torch.cat([pyramid.values for pyramid in pyramids]),
            coordinates=torch.cat(coordinates),
            level_shapes=_largest_shapes(pyramids),
            batch_size=sum(pyramid.batch_size for pyramid in pyramids),
            point_rows=torch.cat(rows) if rows else None,
            point_batch=torch.cat(batch) if len(batch) == len(pyramids) else None,
            check_contents=False,
        )

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
        rows = self.point_rows
        if rows is None:
            refuse("point_rows", "rows of points, as from_points(keep_point_rows=True) keeps", None)
        if level is not None:
            index = as_integer(level)
            if index is None or not 0 <= index < self.n_levels:
                refuse("level", f"a level in [0, {self.n_levels}), or None", level)
            rows = rows[:, index]
        if not is_real(fill):
            refuse("fill", "a number", fill)
        fill_value = float(fill)
        if not (self.values.is_floating_point() or fill_value.is_integer()):
            refuse("fill", "a whole number for values that are integers", fill)
        padded = torch.cat((self.values, self.values.new_full((1, self.embed_dim), fill_value)))
        rows = self._known(rows, len(self))
        return padded.index_select(0, rows.flatten()).view(*rows.shape, self.embed_dim)

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
            given = (tuple(coo.shape[1:-2]),) if shapes is None else shapes
            steps = (least_strides(strides),) if shapes is None else strides
            extent = _extent(name, given, steps, axes)
            extent = _extent_of_points(coordinates, extent, strides, axes)
            shapes = shapes_from_strides(extent, strides, axes, name)
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
        if not isinstance(levels, Sequence) or not levels:
            refuse("levels", "a sequence of at least one map", levels)
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
            extent = _extent("levels", shapes, strides, axes)
            shapes = shapes_from_strides(extent, strides, axes, "levels")
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
                mean of integers is floating, their sum int64.
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
        level_shapes = shapes_from_strides(shape, strides, axes, "spatial_shape")
        pool = check_pooling(pooling)
        coordinates = check_tensor(
            "coordinates", coordinates, ("n", len(shape) + 1), kind="integer"
        )
        values = check_tensor("values", values, (len(coordinates), "E"), kind="number")
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
            point_batch=grid.batch if keep_point_rows else None,
        )


def _rows_of_images(images: Tensor, n_images: int) -> tuple[Tensor, Tensor]:
    """The rows whose ``images`` ``[n]`` are below ``n_images``, sorted by image, and their images.
    Rows of an image keep their order.
    """
    sorted_images, order = images.sort(stable=True)
    kept = sorted_images < n_images
    return order[kept], sorted_images[kept]


def _check_alike(pyramids: Any) -> list[FeaturePyramid]:
    """Raises ValueError unless ``pyramids`` can be one, except for the shapes of levels."""
    if not isinstance(pyramids, Sequence) or not pyramids:
        refuse("pyramids", "at least one FeaturePyramid", pyramids)
    for index, pyramid in enumerate(pyramids):
        if not isinstance(pyramid, FeaturePyramid):
            refuse(f"pyramids[{index}]", "a FeaturePyramid", pyramid)
        for name, want, came in zip(_ALIKE, _facts(pyramids[0]), _facts(pyramid), strict=True):
            if want != came:
                refuse(f"pyramids[{index}]", f"{name} {want}, as of the first", f"{came}")
    return list(pyramids)


_ALIKE = (
    *("number of dimensions", "number of levels", "embed_dim", "dtype", "device", "strides"),
    *("periodic_axes", "origin", "cell_size", "point_rows kept:"),
)


def _facts(pyramid: FeaturePyramid) -> tuple[Any, ...]:
    """What `_ALIKE` names."""
    values = pyramid.values
    return (
        *(pyramid.position_dim, pyramid.n_levels, pyramid.embed_dim, values.dtype, values.device),
        *(pyramid.strides, pyramid.periodic_axes, pyramid.origin, pyramid.cell_size),
        pyramid.point_rows is not None,
    )


def _largest_shapes(pyramids: Sequence[FeaturePyramid]) -> LevelShapes:
    """Level shapes that hold all ``pyramids``.

    Raises:
        ValueError: they differ, and positions would change.
    """
    first = pyramids[0]
    for index, pyramid in enumerate(pyramids):
        periodic = [
            tuple(shape[axis] for axis in first.periodic_axes)
            for shape in (full_shape(first.level_shapes), full_shape(pyramid.level_shapes))
        ]
        differs = pyramid.level_shapes != first.level_shapes
        if differs and (first.strides is None or periodic[0] != periodic[1]):
            why = "without strides" if first.strides is None else "along periodic axes"
            expected = f"level shapes {list(first.level_shapes)}, as of the first, {why}"
            refuse(f"pyramids[{index}]", expected, str(list(pyramid.level_shapes)))
    return tuple(
        tuple(map(max, zip(*shapes, strict=True)))
        for shapes in zip(*(pyramid.level_shapes for pyramid in pyramids), strict=True)
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


def _extent(
    argument: str, shapes: LevelShapes, strides: Strides, periodic_axes: Sequence[int]
) -> list[int]:
    """The raw cells along each axis that hold all levels; the same for all on a periodic axis."""
    levels = zip(shapes, strides, strict=True)
    extents = zip(*(map(operator.mul, *level) for level in levels), strict=True)
    held = []
    for axis, sizes in enumerate(extents):
        if axis in periodic_axes and len(set(sizes)) > 1:
            expected = f"levels of one extent, size times stride, along periodic axis {axis}"
            refuse(argument, expected, str(list(sizes)))
        held.append(max(sizes))
    return held


def _extent_of_points(
    coordinates: Tensor, extent: Sequence[int], strides: Strides, periodic_axes: Sequence[int]
) -> list[int]:
    """``extent``, enlarged until it holds all points; a periodic axis keeps its own."""
    held = list(extent)
    for level, stride in enumerate(strides):
        cells = coordinates[coordinates[:, -1] == level, 1:-1]
        stops = (cells.amax(0) + 1).tolist() if cells.shape[0] else [0] * len(held)
        held = [
            max(size, stop * step) for size, stop, step in zip(held, stops, stride, strict=True)
        ]
    return [extent[axis] if axis in periodic_axes else size for axis, size in enumerate(held)]


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


def _check_point_rows(rows: Tensor, n: int) -> None:
    if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= n):
        came = f"rows from {int(rows.min())} to {int(rows.max())}"
        refuse("point_rows", f"rows in [0, {n}), or -1", came)


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
