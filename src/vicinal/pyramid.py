"""A multi-level sparse feature map as plain dense tensors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from ._utils.checks import (
    LevelShapes,
    as_level_shapes,
    check_range,
    check_tensor,
    describe,
    reads_contents,
    refuse,
)
from ._utils.constants import constant
from ._utils.ragged import offsets_from_ids
from .windows import coordinate_dtype, full_shape, level_scales

Pool = Callable[[Tensor, Tensor, int], Tensor]


@dataclass(frozen=True, repr=False, eq=False)
class FeaturePyramid:
    """Points of a feature pyramid: a point exists because it is stored, whatever its values.

    Args:
        values: ``[nnz, E]``, an embedding per point.
        coordinates: integer ``[nnz, P + 2]``: batch, cell along each axis, level.
        level_shapes: ``[L, P]`` sizes of the levels, a tensor or nested sequences; kept as tuples.
        batch_size: number of images, empty ones counted.
        check_contents: whether to look for points outside their level, which on a GPU waits for
            the device. None: on the CPU only.

    The order of the points is free. Two points in one cell stay two points.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, or a point lies outside the
            batch, the levels or its level's shape.
    """

    values: Tensor
    coordinates: Tensor
    level_shapes: LevelShapes
    batch_size: int
    check_contents: InitVar[bool | None] = None

    def __post_init__(self, check_contents: bool | None) -> None:
        shapes = as_level_shapes(self.level_shapes, "level_shapes")
        object.__setattr__(self, "level_shapes", shapes)
        check_tensor("values", self.values, ("nnz", "E"), kind="floating")
        check_tensor(
            "coordinates",
            self.coordinates,
            (self.values.shape[0], self.position_dim + 2),
            kind="integer",
            device=self.values.device,
        )
        if not isinstance(self.batch_size, int) or self.batch_size < 0:
            refuse("batch_size", "a count of images", self.batch_size)
        object.__setattr__(self, "coordinates", self.coordinates.long())
        if reads_contents(check_contents, self.coordinates.device):
            _check_points("coordinates", self)

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
        return len(self.level_shapes)

    @property
    def position_dim(self) -> int:
        return len(self.level_shapes[0])

    @property
    def embed_dim(self) -> int:
        return self.values.shape[1]

    @property
    def batch(self) -> Tensor:
        """``[nnz]``: the image of every point."""
        return self.coordinates[:, 0]

    @property
    def cells(self) -> Tensor:
        """``[nnz, P]``: the cell of every point, in its own level's grid."""
        return self.coordinates[:, 1:-1]

    @property
    def levels(self) -> Tensor:
        """``[nnz]``: the level of every point."""
        return self.coordinates[:, -1]

    def misplaced(self) -> Tensor:
        """Bool ``[nnz]``: points of no image or level, or outside their level's shape."""
        shapes = constant(self.level_shapes, self.coordinates.device)
        levels = self.levels.clamp(0, self.n_levels - 1)
        no_level = self.levels != levels
        no_image = (self.batch < 0) | (self.batch >= self.batch_size)
        no_cell = ((self.cells < 0) | (self.cells >= shapes[levels])).any(1)
        return no_level | no_image | no_cell

    def positions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``[nnz, P]``: the centres of the points' cells, in cells of the full shape.

        Computed in ``dtype``, float32 at the least. With points as queries these are their
        positions.
        """
        cells = self.cells.to(coordinate_dtype(dtype))
        levels = self.levels.clamp(0, self.n_levels - 1)
        return (cells + 0.5) / level_scales(self.level_shapes, cells)[levels]

    def batch_offsets(self) -> Tensor:
        """``[B + 1]``: image ``b`` holds the points ``offsets[b]:offsets[b + 1]``.

        With points as queries these are their offsets. Reads contents.

        Raises:
            ValueError: the points of an image do not stand together, images in order.
        """
        if not (self.batch[1:] >= self.batch[:-1]).all():
            refuse("coordinates", "points sorted by image", "images out of order")
        return offsets_from_ids(self.batch, self.batch_size)

    def with_values(self, values: Tensor) -> "FeaturePyramid":
        """The same points with other embeddings ``[nnz, E']``."""
        return dataclasses.replace(self, values=values, check_contents=False)

    def to(self, device: torch.device | str) -> "FeaturePyramid":
        return dataclasses.replace(
            self,
            values=self.values.to(device),
            coordinates=self.coordinates.to(device),
            check_contents=False,
        )

    def to_coo(self) -> Tensor:
        """The coalesced sparse COO map ``[B, *full_shape, L, E]`` with one dense dimension."""
        size = (self.batch_size, *full_shape(self.level_shapes), self.n_levels, self.embed_dim)
        coo = torch.sparse_coo_tensor(
            self.coordinates.t(), self.values, size, check_invariants=False
        )
        return coo.coalesce()

    @classmethod
    def from_coo(
        cls,
        stacked_feature_maps: Tensor,
        level_spatial_shapes: Tensor | Sequence[Sequence[int]],
        *,
        check_contents: bool | None = None,
    ) -> "FeaturePyramid":
        """From a sparse COO map ``[B, *full_shape, L, E]``, coalesced or not.

        Gradients reach the map's values. Points stand in the order of the coalesced map.

        Raises:
            ValueError: not a sparse COO tensor with one dense dimension, sizes that do not match
                ``level_spatial_shapes`` ``[L, P]``, or points outside their level's shape.
        """
        shapes = as_level_shapes(level_spatial_shapes)
        sizes: list[int | str] = ["B", *full_shape(shapes), len(shapes), "E"]
        _check_coo("stacked_feature_maps", stacked_feature_maps, sizes)
        coo = stacked_feature_maps.coalesce()
        pyramid = cls(coo.values(), coo.indices().t(), shapes, coo.shape[0], check_contents=False)
        if reads_contents(check_contents, coo.device):
            _check_points("stacked_feature_maps", pyramid)
        return pyramid

    @classmethod
    def from_levels(
        cls, levels: Sequence[Tensor], *, check_contents: bool | None = None
    ) -> "FeaturePyramid":
        """From one sparse COO map ``[B, *S[l], E]`` per level, coalesced or not.

        Raises:
            ValueError: no level, a map that is not sparse COO with one dense dimension, or maps
                that differ in batch size, number of dimensions, width, dtype or device.
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
        maps = [level.coalesce() for level in levels]
        coordinates = [
            torch.nn.functional.pad(level.indices().t(), (0, 1), value=index)
            for index, level in enumerate(maps)
        ]
        return _sorted_by_image(
            torch.cat([level.values() for level in maps]),
            torch.cat(coordinates),
            tuple(tuple(level.shape[1:-1]) for level in maps),
            first.shape[0],
            check_contents,
        )

    @classmethod
    def from_points(
        cls,
        coordinates: Tensor,
        values: Tensor,
        spatial_shape: Sequence[int],
        batch_size: int,
        *,
        strides: Sequence[int] = (1, 2, 4, 8),
        pooling: str = "mean",
        check_contents: bool | None = None,
    ) -> "FeaturePyramid":
        """Pools points into levels: a cell exists where at least one point falls into it.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then cell along each axis of a grid of
                ``spatial_shape``. Points that share a cell are pooled as well.
            values: floating ``[n, E]``.
            spatial_shape: ``P`` sizes of the grid; level ``l`` has ``ceil(size / strides[l])``.
            batch_size: number of images, empty ones counted.
            strides: width of each level's cells, in cells of the grid.
            pooling: ``"mean"`` or ``"max"`` over all points in the cell.
            check_contents: as for the class.

        Returns:
            a pyramid sorted by image, level and cell. The number of its points depends on the
            contents, so on a GPU this waits for the device.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, a stride below 1, unknown
                ``pooling``, or points outside the grid.
        """
        shape = as_level_shapes([spatial_shape], "spatial_shape")
        if math.prod(shape[0]) * batch_size >= 2**62:
            refuse("spatial_shape", "fewer than 2^62 cells in all images", str(shape[0]))
        if pooling not in _POOLING:
            refuse("pooling", f"one of {list(_POOLING)}", pooling)
        if not strides or any(not isinstance(stride, int) or stride < 1 for stride in strides):
            refuse("strides", "integers of at least 1", str(list(strides)))
        check_tensor("coordinates", coordinates, ("n", len(shape[0]) + 1), kind="integer")
        grid = cls(
            values,
            torch.nn.functional.pad(coordinates, (0, 1)),
            shape,
            batch_size,
            check_contents,
        )
        levels = [_pool(grid, stride, _POOLING[pooling]) for stride in strides]
        for index, (_, cells) in enumerate(levels):
            cells[:, -1] = index
        return _sorted_by_image(
            torch.cat([pooled for pooled, _ in levels]),
            torch.cat([cells for _, cells in levels]),
            tuple(tuple(-(-size // stride) for size in shape[0]) for stride in strides),
            batch_size,
            False,
        )


def _pool(grid: FeaturePyramid, stride: int, pool: Pool) -> tuple[Tensor, Tensor]:
    """The values and coordinates of ``grid``'s points pooled into cells of ``stride``."""
    cells = grid.coordinates.clone()
    cells[:, 1:-1] //= stride
    key = cells[:, 0]
    for axis, size in enumerate(grid.level_shapes[0]):
        key = key * -(-size // stride) + cells[:, axis + 1]
    unique, cell_of = torch.unique(key, return_inverse=True)
    # All points of a cell give the same row, so whichever is written last does not matter.
    pooled_cells = cells.new_empty(len(unique), cells.shape[1]).index_copy_(0, cell_of, cells)
    return pool(grid.values, cell_of, len(unique)), pooled_cells


def _mean(values: Tensor, cell_of: Tensor, n_cells: int) -> Tensor:
    # Sums, whose gradient is read row by row: that of a scattered mean takes ten times as long.
    wide = values.to(coordinate_dtype(values.dtype))
    sums = wide.new_zeros(n_cells, values.shape[1]).index_add(0, cell_of, wide)
    counts = torch.bincount(cell_of, minlength=n_cells)
    return (sums / counts[:, None]).to(values.dtype)


def _max(values: Tensor, cell_of: Tensor, n_cells: int) -> Tensor:
    index = cell_of[:, None].expand_as(values)
    empty = values.new_zeros(n_cells, values.shape[1])
    return empty.scatter_reduce(0, index, values, "amax", include_self=False)


_POOLING: dict[str, Pool] = {"mean": _mean, "max": _max}


def _sorted_by_image(
    values: Tensor,
    coordinates: Tensor,
    level_shapes: LevelShapes,
    batch_size: int,
    check_contents: bool | None,
) -> FeaturePyramid:
    order = torch.argsort(coordinates[:, 0], stable=True)
    return FeaturePyramid(
        values[order], coordinates[order], level_shapes, batch_size, check_contents
    )


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
