"""Containers of sparse networks: how tests make and read each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import fvdb
import MinkowskiEngine
import pytest
import torch
import torchsparse
from spconv.pytorch import SparseConvTensor
from torch import Tensor
from trellis.modules import sparse as trellis
from warpconvnet.geometry.types.voxels import Voxels

from vicinal import FeaturePyramid, interop

Read = tuple[Tensor, Tensor]  # image and cell int64 [n, 4], values [n, E]


@dataclass
class Case:
    """A container of cells of three dimensions.

    Attributes:
        name: of its conversions.
        make: a container of cells ``[n, 4]``, values ``[n, E]`` and a number of images.
        read: its cells and values.
        negative: whether cells may be negative.
        knows_batch_size: whether it knows about empty images at its end.
        takes_empty: whether it may have no points.
    """

    name: str
    make: Callable[[Tensor, Tensor, int], Any]
    read: Callable[[Any], Read]
    negative: bool = True
    knows_batch_size: bool = True
    takes_empty: bool = True

    def from_container(self, container: Any, **options: Any) -> FeaturePyramid:
        parts = container if isinstance(container, tuple) else (container,)
        pyramid: FeaturePyramid = getattr(interop, f"from_{self.name}")(*parts, **options)
        return pyramid

    def to_container(self, pyramid: Any, level: int = 0, **options: Any) -> Any:
        return getattr(interop, f"to_{self.name}")(pyramid, level, **options)


def offsets_of(cells: Tensor, batch_size: int) -> Tensor:
    counts = torch.bincount(cells[:, 0], minlength=batch_size)
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def with_images(cells: Tensor, offsets: Tensor) -> Tensor:
    images = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    return torch.cat((images[:, None], cells.long()), 1)


def make_fvdb(cells: Tensor, values: Tensor, batch_size: int) -> tuple[Any, Any]:
    offsets = offsets_of(cells, batch_size)
    ijk = fvdb.JaggedTensor.from_data_and_offsets(cells[:, 1:].int(), offsets)
    grid = fvdb.GridBatch.from_ijk(ijk)
    index = grid.ijk_to_index(ijk, cumulative=True).jdata
    return grid, grid.jagged_like(torch.zeros_like(values).index_copy(0, index, values))


def read_fvdb(container: tuple[Any, Any]) -> Read:
    grid, data = container
    return with_images(grid.ijk.jdata, grid.ijk.joffsets), data.jdata


def make_point(cells: Tensor, values: Tensor, batch_size: int) -> dict[str, Any]:
    offset = offsets_of(cells, batch_size)[1:]
    return {"grid_coord": cells[:, 1:].int(), "feat": values, "offset": offset}


def read_point(point: dict[str, Any]) -> Read:
    offsets = torch.nn.functional.pad(point["offset"], (1, 0))
    cells = with_images(point["grid_coord"], offsets)
    assert torch.equal(point.get("batch", cells[:, 0]), cells[:, 0])
    return cells, point["feat"]


def read_minkowski(tensor: Any) -> Read:
    steps = torch.tensor([1, *tensor.tensor_stride])
    assert (tensor.C % steps == 0).all()
    return tensor.C // steps, tensor.F


CASES = [
    Case(
        "spconv",
        lambda cells, values, n: SparseConvTensor(values, cells.int(), [40, 40, 40], n),
        lambda tensor: (tensor.indices.long(), tensor.features),
        negative=False,
    ),
    Case(
        "minkowski",
        lambda cells, values, n: MinkowskiEngine.SparseTensor(values, cells.int()),
        read_minkowski,
        knows_batch_size=False,
    ),
    Case(
        "torchsparse",
        lambda cells, values, n: torchsparse.SparseTensor(values, cells.int()),
        lambda tensor: (tensor.coords.long(), tensor.feats),
        knows_batch_size=False,
    ),
    Case(
        "trellis",
        lambda cells, values, n: trellis.SparseTensor(
            values, cells.int(), torch.Size([n, values.shape[1]])
        ),
        lambda tensor: (tensor.coords.long(), tensor.feats),
        negative=False,
        takes_empty=False,
    ),
    Case("fvdb", make_fvdb, read_fvdb),
    Case(
        "warpconvnet",
        lambda cells, values, n: Voxels(cells[:, 1:].int(), values, offsets_of(cells, n)),
        lambda voxels: (
            with_images(voxels.coordinate_tensor, voxels.offsets),
            voxels.feature_tensor,
        ),
    ),
    Case("pointcept", make_point, read_point, negative=False),
]
every_container = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def scene(*, low: int = 0, n: int = 60) -> Read:
    """Distinct cells in images 0 and 2, in no order within an image, and float64 values."""
    cells = torch.randint(low, 30, (n, 3)).unique(dim=0)
    cells = cells[torch.randperm(len(cells))]
    images = 2 * (torch.arange(len(cells)) >= len(cells) // 3)
    coordinates = torch.cat((images[:, None], cells), 1)
    return coordinates, torch.randn(len(cells), 4, dtype=torch.float64)


def pooled(cells: Tensor, values: Tensor, stride: int) -> dict[tuple[int, ...], Tensor]:
    """The sum of the values of every cell of ``stride``, by image and cell."""
    sums: dict[tuple[int, ...], Tensor] = {}
    for (image, *cell), value in zip(cells.tolist(), values, strict=True):
        key = (image, *(at // stride for at in cell))
        sums[key] = sums.get(key, torch.zeros_like(value)) + value
    return sums


def assert_same_cells(read: Read, expected: dict[tuple[int, ...], Tensor]) -> None:
    cells, values = read
    assert sorted(map(tuple, cells.tolist())) == sorted(expected)
    for cell, value in zip(cells.tolist(), values, strict=True):
        torch.testing.assert_close(value, expected[tuple(cell)])
