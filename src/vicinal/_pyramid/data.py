"""What a feature pyramid stores: its fields, their checks, and views of them."""

from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import (
    LevelShapes,
    as_integer,
    as_level_shapes,
    as_numbers,
    check_range,
    check_tensor,
    describe,
    has_contents,
    reads_contents,
    refuse,
)
from .._utils.constants import constant
from .._utils.strides import Strides, as_strides, check_strides_of_shapes
from ..windows import as_periodic_axes

# The fields of a pyramid that are tensors.
TENSOR_FIELDS = ("values", "coordinates", "point_rows", "point_batch")


@dataclass(frozen=True, repr=False, eq=False)
class PyramidData:
    """The fields of a `FeaturePyramid`, whose docstring describes them."""

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
            check_points("coordinates", self)
            _check_indices("point_rows", self.point_rows, self.values.shape[0])
            _check_indices("point_batch", self.point_batch, batch_size)

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
            n = 0 if self.point_rows is None else self.point_rows.shape[0]
            batch = check_tensor(
                "point_batch", self.point_batch, (n,), kind="integer", device=device
            )
            self._set(point_batch=batch.long())

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


def rows_on_map(pyramid: PyramidData) -> Tensor | None:
    """int64 ``[m]``: the rows of the points that are not misplaced; None for all of them, and where
    contents are not known.
    """
    if torch.compiler.is_compiling() or not has_contents(pyramid.coordinates):
        return None
    misplaced = pyramid.misplaced()
    return misplaced.logical_not().nonzero().flatten() if misplaced.any() else None


def check_points(argument: str, pyramid: PyramidData) -> None:
    """Raises ValueError, naming ``argument``, unless all points lie inside their level."""
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


def _check_indices(argument: str, indices: Tensor | None, stop: int) -> None:
    """Raises ValueError unless all ``indices`` are in [0, stop) or -1, for none."""
    if indices is not None and indices.numel():
        least, largest = int(indices.min()), int(indices.max())
        if least < -1 or largest >= stop:
            came = f"indices from {least} to {largest}"
            refuse(argument, f"indices in [0, {stop}), or -1", came)
