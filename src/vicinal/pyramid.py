"""Feature pyramids: multi-level sparse feature maps as plain dense tensors."""

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

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a point lies outside the batch, the
            levels or its level's shape.

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
            refuse("batch_size", "a non-negative integer", self.batch_size)
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
            dtype: of the computation and the result, float32 or wider. Default: float32.
        """
        cells = self.cells.to(coordinate_dtype(dtype))
        levels = self.levels.clamp(0, self.n_levels - 1)
        return (cells + 0.5) / level_scales(self.level_shapes, cells)[levels]

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
        level_spatial_shapes: Tensor | Sequence[Sequence[int]],
        *,
        check_contents: bool | None = None,
    ) -> "FeaturePyramid":
        """Makes a pyramid from one sparse COO map of all levels.

        Gradients reach the map's values. Points are in the order of the coalesced map.

        Args:
            stacked_feature_maps: sparse COO ``[B, *full_shape, L, E]`` with one dense dimension,
                coalesced or not. On a GPU, coalescing synchronizes.
            level_spatial_shapes: integer ``[L, P]``, the spatial shape of each level.
            check_contents: as for the class.

        Raises:
            ValueError: the map is not a sparse COO tensor with one dense dimension, its sizes do
                not match ``level_spatial_shapes``, or points lie outside their level's shape.

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
        """Makes a pyramid from one sparse COO map per level.

        Points are sorted by image, then level.

        Args:
            levels: sparse COO ``[B, *S[l], E]`` with one dense dimension each, coalesced or not.
            check_contents: as for the class.

        Raises:
            ValueError: there is no level, a map is not sparse COO with one dense dimension, or maps
                differ in batch size, number of dimensions, width, dtype or device.

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
        """Makes a pyramid from the points of one grid, pooled once per stride.

        A level has a point in every cell that at least one of the given points falls into.

        Args:
            coordinates: integer ``[n, P + 1]``: image, then cell along each axis of a grid of
                ``spatial_shape``. Points that share a cell are pooled as well.
            values: floating ``[n, E]``.
            spatial_shape: the ``P`` sizes of the grid. Level ``l`` has ``ceil(size / strides[l])``
                cells along an axis.
            batch_size: number of images, empty images included.
            strides: the width of each level's cells, in cells of the grid. Default: 1, 2, 4, 8.
            pooling: ``"mean"`` (default) or ``"max"`` over all points in the cell.
            check_contents: as for the class.

        Returns:
            a pyramid sorted by image, level and cell. The number of its points depends on tensor
            contents, so on a GPU this synchronizes.

        Raises:
            ValueError: shapes, dtypes or devices do not match, a stride is below 1, ``pooling`` is
                unknown, or points lie outside the grid.

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
    """Pools the points of ``grid`` into cells of ``stride``: values and coordinates."""
    cells = grid.coordinates.clone()
    cells[:, 1:-1] //= stride
    key = cells[:, 0]
    for axis, size in enumerate(grid.level_shapes[0]):
        key = key * -(-size // stride) + cells[:, axis + 1]
    unique, cell_of = torch.unique(key, return_inverse=True)
    # All points of a cell write the same row, so their order does not matter.
    pooled_cells = cells.new_empty(len(unique), cells.shape[1]).index_copy_(0, cell_of, cells)
    return pool(grid.values, cell_of, len(unique)), pooled_cells


def _mean(values: Tensor, cell_of: Tensor, n_cells: int) -> Tensor:
    # index_add, whose gradient reads rows: the gradient of scatter_reduce takes ten times as long.
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
