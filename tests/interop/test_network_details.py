"""What is special to each container of sparse networks."""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import fvdb
import MinkowskiEngine
import numpy as np
import pytest
import torch
import torchsparse
from interop.network_cases import assert_same_cells, pooled, scene
from spconv.pytorch import SparseConvTensor
from torch import Tensor
from trellis.modules import sparse as trellis
from warpconvnet.geometry.types.points import Points
from warpconvnet.geometry.types.voxels import Voxels

from vicinal import FeaturePyramid, voxelize
from vicinal.interop import (
    from_fvdb,
    from_minkowski,
    from_pointcept,
    from_spconv,
    from_torchsparse,
    from_trellis,
    from_warpconvnet,
    from_warpconvnet_points,
    to_fvdb,
    to_minkowski,
    to_pointcept,
    to_spconv,
    to_torchsparse,
    to_trellis,
    to_warpconvnet,
    to_warpconvnet_points,
)


def int32(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# spconv


def test_spconv_keeps_its_shape() -> None:
    tensor = SparseConvTensor(torch.ones(1, 2), int32([[0, 4, 8]]), [5, 9], 1)
    pyramid = from_spconv(tensor, strides=(1, 2))
    assert pyramid.level_shapes == ((6, 10), (3, 5))
    assert list(to_spconv(pyramid).spatial_shape) == [6, 10]
    assert list(to_spconv(pyramid, spatial_shape=(5, 9)).spatial_shape) == [5, 9]
    with pytest.raises(ValueError, match="spatial_shape"):
        to_spconv(pyramid, spatial_shape=(5, 8))


def test_spconv_makes_the_same_map() -> None:
    cells, values = scene()
    tensor = SparseConvTensor(values, cells.int(), [30, 30, 30], 3)
    back = to_spconv(from_spconv(tensor, strides=1))
    assert back.indices.is_contiguous()
    assert_same_cells((back.indices, back.features), pooled(cells, values, 1))


@pytest.mark.parametrize("indices", [[[0, 5, 0]], [[1, 0, 0]], [[0, -1, 0]]])
def test_spconv_cells_outside_are_refused(indices: list[list[int]]) -> None:
    tensor = SparseConvTensor(torch.ones(1, 2), int32(indices), [5, 9], 1)
    with pytest.raises(ValueError, match="coordinates"):
        from_spconv(tensor)


def test_spconv_works_in_any_dimension() -> None:
    tensor = SparseConvTensor(torch.ones(1, 2), int32([[0, 1, 2, 3, 4]]), [5] * 4, 1)
    assert to_spconv(from_spconv(tensor)).indices.tolist() == [[0, 1, 2, 3, 4]]


# MinkowskiEngine


def test_minkowski_strides_are_cell_sizes() -> None:
    coordinates = int32([[0, -6, 2], [1, 8, 0]])
    tensor = MinkowskiEngine.SparseTensor(torch.ones(2, 3), coordinates, tensor_stride=2)
    pyramid = from_minkowski(tensor, strides=(1, 2, 4))
    assert pyramid.cell_size == (2, 2)
    assert pyramid.origin == (-8, 0)
    raw = pyramid.raw_from_positions(pyramid.positions())[pyramid.levels == 0]
    assert raw.tolist() == [[-5, 3], [9, 1]]  # centers of cells of 2
    back = to_minkowski(pyramid)
    assert torch.equal(back.C, coordinates)
    assert back.tensor_stride == [2, 2]
    coarse = to_minkowski(pyramid, 2, coordinate_manager=tensor.coordinate_manager)
    assert coarse.C.tolist() == [[0, -8, 0], [1, 8, 0]]
    assert coarse.tensor_stride == [8, 8]
    assert coarse.coordinate_manager is tensor.coordinate_manager


def test_minkowski_strides_may_differ_by_axis() -> None:
    coordinates = int32([[0, -6, 3]])
    tensor = MinkowskiEngine.SparseTensor(torch.ones(1, 3), coordinates, tensor_stride=[2, 1])
    coarse = to_minkowski(from_minkowski(tensor, strides=[(1, 1), (1, 2)]), 1)
    assert coarse.C.tolist() == [[0, -6, 2]]
    assert coarse.tensor_stride == [2, 2]


def test_minkowski_batches_of_one_grid_are_joined() -> None:
    tensors = [
        MinkowskiEngine.SparseTensor(torch.ones(1, 3), int32([cell])) for cell in ([0, 3], [0, 9])
    ]
    pyramids = [from_minkowski(tensor, batch_size=2, strides=(1, 2)) for tensor in tensors]
    joined = FeaturePyramid.cat(pyramids)
    assert to_minkowski(joined).C.tolist() == [[0, 3], [2, 9]]


def test_minkowski_from_meters() -> None:
    points = torch.tensor([[-0.15, 3.45], [1.95, 0.65]])
    voxels = voxelize(points, cell_size=0.1, bounds=[(-4, 4), (-4, 4)])
    pyramid = voxels.pyramid(torch.randn(2, 3), strides=(1, 2))
    assert to_minkowski(pyramid).C.tolist() == [[0, -2, 34], [0, 19, 6]]
    coarse = to_minkowski(pyramid, 1)
    assert coarse.C.tolist() == [[0, -2, 34], [0, 18, 6]]
    assert coarse.tensor_stride == [2, 2]


def test_minkowski_needs_a_whole_origin() -> None:
    points = torch.tensor([[-0.23, 3.4], [1.9, 0.6]])
    pyramid = voxelize(points, cell_size=0.1).pyramid(torch.randn(2, 3))
    with pytest.raises(ValueError, match="origin"):
        to_minkowski(pyramid)
    from_corner = to_minkowski(dataclasses.replace(pyramid, origin=None))
    assert from_corner.C[:, 1:].amin(0).tolist() == [0, 0]


def test_minkowski_needs_strides() -> None:
    pyramid = FeaturePyramid(torch.ones(1, 2), torch.zeros(1, 4).long(), ((4, 4),), 1)
    with pytest.raises(ValueError, match="strides"):
        to_minkowski(pyramid)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("C", torch.zeros(2, 4, dtype=torch.int32)),
        ("C", torch.zeros(3, 4)),
        ("C", torch.tensor([[-1, 0, 0]] * 3)),
        ("F", torch.zeros(3)),
        ("tensor_stride", [2]),
        ("tensor_stride", 0),
        ("tensor_stride", "2"),
    ],
)
def test_minkowski_refuses_other_attributes(name: str, value: Any) -> None:
    tensor = MinkowskiEngine.SparseTensor(torch.ones(3, 2), torch.eye(3).int())
    setattr(tensor, name, value)
    with pytest.raises(ValueError, match=name):
        from_minkowski(tensor)


@pytest.mark.parametrize("batch_size", [1, -1, 2.0, "3"])
def test_minkowski_refuses_other_batch_sizes(batch_size: Any) -> None:
    tensor = MinkowskiEngine.SparseTensor(torch.ones(1, 2), int32([[1, 0, 0]]))
    with pytest.raises(ValueError, match=r"batch_size|images"):
        from_minkowski(tensor, batch_size=batch_size)


# torchsparse


class OldSparseTensor:
    """That of torchsparse before 2.1: the image comes last, and there is no ``spatial_range``."""

    def __init__(self, feats: Tensor, coords: Tensor, stride: Any = 1) -> None:
        self.feats, self.coords = feats, coords
        self.stride = (stride,) * 3 if isinstance(stride, int) else stride


def test_torchsparse_numbers_strided_cells_one_by_one() -> None:
    coords = int32([[0, 1, 2, 3], [1, 7, 0, 5]])
    tensor = torchsparse.SparseTensor(torch.ones(2, 3), coords, stride=2)
    pyramid = from_torchsparse(tensor, strides=(1, 2))
    assert pyramid.cell_size == (2, 2, 2)
    back, coarse = to_torchsparse(pyramid), to_torchsparse(pyramid, 1)
    assert torch.equal(back.coords, coords)
    assert back.stride == (2, 2, 2)
    assert coarse.coords.tolist() == [[0, 0, 1, 1], [1, 3, 0, 2]]
    assert coarse.stride == (4, 4, 4)


def test_torchsparse_keeps_its_range() -> None:
    coords = int32([[0, 1, 2, 3]])
    tensor = torchsparse.SparseTensor(torch.ones(1, 3), coords, 2, spatial_range=(4, 10, 12, 14))
    pyramid = from_torchsparse(tensor, strides=(1, 2))
    assert pyramid.batch_size == 4
    assert pyramid.level_shapes[0] == (10, 12, 14)
    assert to_torchsparse(pyramid).spatial_range == (4, 10, 12, 14)
    assert to_torchsparse(pyramid, 1).spatial_range == (4, 5, 6, 7)
    negative = torchsparse.SparseTensor(torch.ones(1, 3), -coords)
    assert to_torchsparse(from_torchsparse(negative)).spatial_range is None


def test_torchsparse_before_2_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchsparse, "SparseTensor", OldSparseTensor)
    coords = int32([[2, 4, -6, 0], [14, 0, 10, 1]])  # x, y, z, image
    tensor = OldSparseTensor(torch.ones(2, 3), coords, 2)
    pyramid = from_torchsparse(tensor, strides=(1, 2))
    assert pyramid.batch_size == 2
    assert torch.equal(to_torchsparse(pyramid).coords, coords)
    coarse = to_torchsparse(pyramid, 1)
    assert coarse.coords.tolist() == [[0, 4, -8, 0], [12, 0, 8, 1]]
    assert coarse.stride == (4, 4, 4)


@pytest.mark.parametrize("convert", [to_minkowski, to_torchsparse])
def test_corners_beyond_int32_are_refused(convert: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchsparse, "SparseTensor", OldSparseTensor)
    points = torch.tensor([[10, 0, 0], [5_000_000_000, 20, 3]])  # time in microseconds, row, column
    bounds = [(0, 6_000_000_000), (0, 32), (0, 32)]
    voxels = voxelize(points, cell_size=(1000, 1, 1), bounds=bounds)
    with pytest.raises(ValueError, match="pyramid: expected cells that int32 holds"):
        convert(voxels.pyramid(torch.ones(2, 1), strides=(1, 2)))
    voxels = voxelize(points, cell_size=(3_000_000_000, 1, 1), bounds=bounds)
    with pytest.raises(ValueError, match="pyramid: expected cells of a size that int32 holds"):
        convert(voxels.pyramid(torch.ones(2, 1), strides=(1, 2)))


def test_strides_beyond_the_dtype_of_the_cells() -> None:
    coords = torch.tensor([[0, 1, 1, 3], [0, 5, 7, 1]], dtype=torch.int8)
    tensor = torchsparse.SparseTensor(torch.ones(2, 1), coords, 256)
    assert from_torchsparse(tensor, strides=1).cells.tolist() == coords[:, 1:].tolist()
    large = torchsparse.SparseTensor(torch.ones(2, 1), coords.int(), 2**31)
    assert from_torchsparse(large, strides=1).cell_size == (2.0**31,) * 3


@pytest.mark.parametrize("convert", [to_pointcept, to_warpconvnet_points, to_minkowski])
def test_a_level_may_be_an_array(convert: Any) -> None:
    pyramid = FeaturePyramid.from_points(
        torch.tensor([[0, 2, 3, 1]]), torch.ones(1, 2), (8, 8, 8), 1, strides=(1, 2)
    )
    convert(pyramid, np.array(1))


def flat() -> FeaturePyramid:
    """Two dimensions, which most containers do not have."""
    return FeaturePyramid.from_points(torch.tensor([[0, 1, 2]]), torch.ones(1, 2), (4, 4), 1)


@pytest.mark.parametrize("convert", [to_torchsparse, to_trellis, to_fvdb])
def test_two_dimensions_are_refused(convert: Any) -> None:
    with pytest.raises(ValueError, match="three dimensions"):
        convert(flat())


# TRELLIS


def test_trellis_keeps_its_shape_and_layout() -> None:
    tensor = trellis.SparseTensor(
        torch.ones(2, 3), int32([[0, 1, 2, 3], [2, 7, 0, 5]]), torch.Size([4, 3])
    )
    back = to_trellis(from_trellis(tensor))
    assert back.shape == (4, 3)
    assert back.layout == tensor.layout == [slice(0, 1), slice(1, 1), slice(1, 2), slice(2, 2)]


def test_trellis_takes_no_negative_cells() -> None:
    points = torch.tensor([[-0.2, 3.4, 0.0]])
    voxels = voxelize(points, cell_size=0.5, bounds=[(-4, 4)] * 3)
    with pytest.raises(ValueError, match="0 on"):
        to_trellis(voxels.pyramid(torch.ones(1, 2), strides=1))


def test_trellis_of_another_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trellis2", trellis)
    tensor = trellis.SparseTensor(torch.ones(1, 3), int32([[0, 1, 2, 3]]))
    pyramid = from_trellis(tensor)
    assert torch.equal(to_trellis(pyramid, library="trellis2").coords, tensor.coords)
    with pytest.raises(ImportError, match="TRELLIS"):
        to_trellis(pyramid, library="trellis3.modules.sparse")
    with pytest.raises(ValueError, match="library"):
        to_trellis(pyramid, library=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [None, (), (1, 3)])
def test_trellis_refuses_other_shapes(shape: Any) -> None:
    tensor = trellis.SparseTensor(torch.ones(2, 3), int32([[0, 1, 2, 3], [1, 1, 1, 1]]))
    tensor.shape = shape
    with pytest.raises(ValueError, match=r"shape|images"):
        from_trellis(tensor)


# fVDB


def test_fvdb_has_world_coordinates() -> None:
    ijk = fvdb.JaggedTensor([torch.tensor([[-3, 1, 3]]), torch.tensor([[5, 7, 1]])])
    grid = fvdb.GridBatch.from_ijk(ijk, voxel_sizes=0.5, origins=[1.0, 2.0, 3.0])
    pyramid = from_fvdb(grid, grid.jagged_like(torch.ones(2, 2)), strides=(1, 2))
    assert pyramid.cell_size == (0.5, 0.5, 0.5)
    raw = pyramid.raw_from_positions(pyramid.positions())[pyramid.levels == 0]
    centers = grid.ijk.jdata * 0.5 + torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(raw, centers.double())
    coarse, _ = to_fvdb(pyramid, 1)
    world = coarse.ijk.jdata * coarse.voxel_sizes[0] + coarse.origins[0]
    raw = pyramid.raw_from_positions(pyramid.positions())[pyramid.levels == 1]
    torch.testing.assert_close(world.double(), raw)


def test_fvdb_voxels_begin_where_asked() -> None:
    ijk = fvdb.JaggedTensor([torch.tensor([[-3, 1, 3]])])
    grid = fvdb.GridBatch.from_ijk(ijk, voxel_sizes=0.1, origins=[0.3, 0.0, 7.0])
    pyramid = from_fvdb(grid, grid.jagged_like(torch.ones(1, 2)), strides=(1, 2))
    same, _ = to_fvdb(pyramid, origin=[0.3, 0.0, 7.0])
    assert torch.equal(same.ijk.jdata, grid.ijk.jdata)
    torch.testing.assert_close(same.origins, grid.origins)
    corner, _ = to_fvdb(pyramid)
    assert corner.ijk.jdata.tolist() == [[1, 1, 3]]
    for origin in ([0.35, 0.0, 7.0], [0.3], "x"):
        with pytest.raises(ValueError, match="origin"):
            to_fvdb(pyramid, origin=origin)  # type: ignore[arg-type]


def test_fvdb_data_have_the_order_of_the_grid() -> None:
    cells, values = scene()
    pyramid = FeaturePyramid.from_points(cells, values, (30, 30, 30), 3, strides=1)
    grid, data = to_fvdb(pyramid)
    rows = {tuple(cell): value for cell, value in zip(cells.tolist(), values, strict=True)}
    images = torch.arange(3).repeat_interleave(grid.ijk.joffsets.diff()).tolist()
    for image, cell, value in zip(images, grid.ijk.jdata.tolist(), data.jdata, strict=True):
        assert torch.equal(rows[(image, *cell)], value)


def test_fvdb_grids_must_be_alike() -> None:
    ijk = fvdb.JaggedTensor([torch.zeros(1, 3).int(), torch.zeros(1, 3).int()])
    for name in ("voxel_sizes", "origins"):
        numbers = {name: torch.tensor([[1.0] * 3, [2.0] * 3])}
        grid = fvdb.GridBatch.from_ijk(ijk, **numbers)
        with pytest.raises(ValueError, match=name):
            from_fvdb(grid, grid.jagged_like(torch.ones(2, 2)))


def test_fvdb_without_grids() -> None:
    none = torch.zeros(0, 3)
    grid = fvdb.GridBatch(torch.zeros(0, 4).long(), none, none)
    pyramid = from_fvdb(grid, grid.jagged_like(torch.ones(0, 2)))
    assert (len(pyramid), pyramid.batch_size) == (0, 0)
    with pytest.raises(ValueError, match="image"):
        to_fvdb(pyramid)


def test_fvdb_refuses_other_data() -> None:
    grid = fvdb.GridBatch.from_ijk(fvdb.JaggedTensor([torch.zeros(1, 3).int()]))
    for data in (torch.ones(1, 2), fvdb.JaggedTensor([torch.ones(3, 2)])):
        with pytest.raises(ValueError, match="data"):
            from_fvdb(grid, data)


# WarpConvNet


def test_warpconvnet_strides_and_voxel_sizes() -> None:
    cells = int32([[-3, 1], [5, 7]])
    voxels = Voxels(cells, torch.ones(2, 3), torch.tensor([0, 1, 2]), tensor_stride=(2, 1))
    pyramid = from_warpconvnet(voxels, strides=(1, 2))
    assert pyramid.cell_size == (2, 1)
    back = to_warpconvnet(pyramid, voxel_size=0.1)
    assert torch.equal(back.coordinate_tensor, cells)
    assert (back.tensor_stride, back.voxel_size) == ((2, 1), 0.1)
    coarse = to_warpconvnet(pyramid, 1)
    assert coarse.coordinate_tensor.tolist() == [[-2, 0], [2, 3]]
    assert (coarse.tensor_stride, coarse.voxel_size) == ((4, 2), None)


@pytest.mark.parametrize(
    "offsets", [torch.tensor([0, 3]), torch.tensor([1, 2]), torch.tensor([0.0, 2.0]), [0, 2]]
)
def test_warpconvnet_refuses_other_offsets(offsets: Any) -> None:
    voxels = Voxels(int32([[0, 0], [1, 1]]), torch.ones(2, 3), torch.tensor([0, 2]))
    points = Points(torch.rand(2, 2), torch.ones(2, 3), torch.tensor([0, 2]))
    voxels.offsets = points.offsets = offsets
    with pytest.raises(ValueError, match="offsets"):
        from_warpconvnet(voxels)
    with pytest.raises(ValueError, match="offsets"):
        from_warpconvnet_points(points, cell_size=0.1)
    voxels.offsets = points.offsets = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="offsets"):
        from_warpconvnet(voxels)


def test_warpconvnet_points_come_back_as_centers() -> None:
    positions = torch.tensor([[0.1, 0.2], [0.9, 0.7], [0.95, 0.75]])
    features = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    points = Points(positions, features, torch.tensor([0, 1, 1, 3]))
    pyramid = from_warpconvnet_points(
        points, cell_size=0.5, bounds=[(0, 1), (0, 1)], strides=(1, 2)
    )
    back = to_warpconvnet_points(pyramid)
    assert back.coordinate_tensor.tolist() == [[0.25, 0.25], [0.75, 0.75]]
    assert back.feature_tensor.tolist() == [[1], [3]]
    assert back.offsets.tolist() == [0, 1, 1, 2]
    back.feature_tensor.sum().backward()
    assert features.grad is not None
    assert features.grad.tolist() == [[1], [0.5], [0.5]]
    exact = to_warpconvnet_points(pyramid, dtype=torch.float64)
    assert exact.coordinate_tensor.dtype == torch.float64
    with pytest.raises(ValueError, match="dtype"):
        to_warpconvnet_points(pyramid, dtype=torch.int64)


# Pointcept


def test_pointcept_offsets_have_no_leading_zero() -> None:
    point = {
        "grid_coord": int32([[0, 0], [1, 1], [2, 2]]),
        "feat": torch.ones(3, 2),
        "offset": torch.tensor([1, 1, 3]),
    }
    pyramid = from_pointcept(point, strides=1)
    assert pyramid.batch.tolist() == [0, 2, 2]
    assert to_pointcept(pyramid)["offset"].tolist() == [1, 1, 3]


def test_pointcept_batch_stands_in_for_offsets() -> None:
    point = {
        "grid_coord": int32([[0, 0], [1, 1]]),
        "feat": torch.ones(2, 2),
        "batch": torch.tensor([1, 0]),
    }
    assert from_pointcept(point, strides=1).coordinates[:, :3].tolist() == [[0, 1, 1], [1, 0, 0]]
    del point["batch"]
    assert from_pointcept(point, strides=1).batch_size == 1


@pytest.mark.parametrize("size", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5])])
def test_pointcept_without_cells_has_a_grid_size(size: Any) -> None:
    point = {"coord": torch.tensor([[0.1, 0.6]]), "feat": torch.ones(1, 2), "grid_size": size}
    pyramid = from_pointcept(point, bounds=[(0, 1), (0, 1)], strides=(1, 2))
    assert pyramid.cell_size == (0.5, 0.5)
    back = to_pointcept(pyramid)
    assert back["coord"].tolist() == [[0.25, 0.75]]
    assert back["grid_coord"].tolist() == [[0, 1]]
    assert back["grid_size"] == 0.5
    assert to_pointcept(pyramid, 1)["grid_size"] == 1.0


def test_pointcept_cells_of_another_size() -> None:
    point = {
        "coord": torch.tensor([[0.1, 0.6]]),
        "grid_coord": int32([[7, 7]]),
        "feat": torch.ones(1, 2),
    }
    pyramid = from_pointcept(point, cell_size=(0.5, 0.25), bounds=[(0, 1), (0, 1)], strides=1)
    back = to_pointcept(pyramid)
    assert back["grid_coord"].tolist() == [[0, 2]]
    assert "grid_size" not in back


@pytest.mark.parametrize(
    ("name", "value", "argument"),
    [
        ("feat", None, "feat"),
        ("feat", torch.ones(2), "feat"),
        ("coord", None, "coord"),
        ("coord", torch.ones(3, 2), "coord"),
        ("grid_size", None, "cell_size"),
        ("grid_size", torch.tensor([0.5, 1.0]), "grid_size"),
        ("grid_size", torch.zeros(0), "grid_size"),
        ("grid_size", "x", "grid_size"),
        ("grid_coord", torch.zeros(2, 0, dtype=torch.int32), "grid_coord"),
        ("grid_coord", torch.zeros(2, 3), "grid_coord"),
        ("offset", torch.tensor([1]), "offset"),
        ("offset", torch.tensor([1.0, 2.0]), "offset"),
        ("batch", torch.tensor([0]), "batch"),
    ],
)
def test_pointcept_refuses_other_keys(name: str, value: Any, argument: str) -> None:
    point = {"coord": torch.rand(2, 2), "feat": torch.ones(2, 2), "grid_size": 0.1, name: value}
    if value is None:
        del point[name]
    with pytest.raises(ValueError, match=argument):
        from_pointcept(point)
