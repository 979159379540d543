"""Point clouds of NumPy, Open3D and LAS files, as pyramids and back."""

from pathlib import Path
from typing import Any

import numpy as np
import open3d
import pytest
import torch

from vicinal import FeaturePyramid, voxelize
from vicinal.interop import (
    from_las,
    from_numpy_cloud,
    from_open3d,
    to_las,
    to_numpy_cloud,
    to_open3d,
)


def rows(n: int, width: int = 3) -> Any:
    """Random rows of float64."""
    return torch.rand(n, width, dtype=torch.float64).numpy()


def test_a_cloud_is_that_of_voxels() -> None:
    points, features = 9 * rows(200), rows(200, 5).astype(np.float32)
    bounds = [(0, 8), (0, 9), None]
    pyramid = from_numpy_cloud(points, features, cell_size=0.5, bounds=bounds, strides=(1, 2))
    voxels = voxelize(torch.from_numpy(points), cell_size=0.5, bounds=bounds)
    expected = voxels.pyramid(torch.from_numpy(features), strides=(1, 2))
    assert torch.equal(pyramid.coordinates, expected.coordinates)
    assert torch.equal(pyramid.values, expected.values)
    assert torch.equal(pyramid.values_of_points(), expected.values_of_points())


def test_a_list_of_clouds_is_a_batch() -> None:
    clouds = [rows(20), rows(0), rows(30)]
    features = [rows(20, 2), rows(0, 2), rows(30, 2)]
    pyramid = from_numpy_cloud(clouds, features, cell_size=1e-4)
    assert pyramid.batch_size == 3
    np.testing.assert_array_equal(pyramid.values_of_points(0).numpy(), np.concatenate(features))
    back = to_numpy_cloud(pyramid)
    for points, values, (centers, means) in zip(clouds, features, back, strict=True):
        order = np.lexsort(points.T[::-1])
        np.testing.assert_allclose(centers, points[order], atol=1e-4)
        np.testing.assert_array_equal(means, values[order])


def test_points_without_features_are_counted() -> None:
    cloud = np.array([[3, 4], [3, 4], [5, 5]], np.uint16)
    pyramid = from_numpy_cloud(cloud, cell_size=1, strides=(1, 4), pooling="sum")
    assert pyramid.values_of_points().flatten(1).tolist() == [[2, 3], [2, 3], [1, 3]]


def test_arrays_of_any_layout_and_byte_order() -> None:
    points, features = rows(50, 6), rows(50, 4)
    expected = from_numpy_cloud(points[::2, :3].copy(), features[::2].copy(), cell_size=0.1)
    big_endian = features[::2].astype(">f8")
    big_endian.flags.writeable = False
    pyramid = from_numpy_cloud(np.asfortranarray(points)[::2, :3], big_endian, cell_size=0.1)
    assert torch.equal(pyramid.coordinates, expected.coordinates)
    assert torch.equal(pyramid.values, expected.values)


def test_coordinates_of_integers_and_of_utm_are_exact() -> None:
    clocks = np.array([[2**62], [2**62 + 1], [2**62 + 4]])
    pyramid = from_numpy_cloud(clocks, cell_size=2, strides=1)
    assert pyramid.cells[:, 0].tolist() == [0, 2]
    meters = np.array([[5_000_000.1], [5_000_000.3]])
    assert len(from_numpy_cloud(meters, cell_size=0.1, strides=1)) == 2


def test_gradients_reach_features() -> None:
    features = torch.rand(20, 4, requires_grad=True)
    pyramid = from_numpy_cloud([torch.rand(20, 3)], [features], cell_size=0.2, pooling="sum")
    pyramid.values_of_points(1).sum().backward()
    assert features.grad is not None
    assert (features.grad > 0).all()


def test_other_clouds_are_refused() -> None:
    with pytest.raises(ValueError, match="points"):
        from_numpy_cloud(np.zeros(3), cell_size=1)
    with pytest.raises(ValueError, match="points"):
        from_numpy_cloud([], cell_size=1)
    with pytest.raises(ValueError, match=r"points\[1\]"):
        from_numpy_cloud([rows(3), rows(3, 2)], cell_size=1)
    with pytest.raises(ValueError, match=r"points\[1\]"):
        from_numpy_cloud([rows(3), rows(3).astype(np.float32)], cell_size=1)
    with pytest.raises(ValueError, match="features"):
        from_numpy_cloud([rows(3), rows(3)], [rows(3)], cell_size=1)
    with pytest.raises(ValueError, match="features"):
        from_numpy_cloud(rows(3), rows(4), cell_size=1)
    with pytest.raises(ValueError, match=r"features\[1\]"):
        from_numpy_cloud([rows(3), rows(3)], [rows(3), rows(4)], cell_size=1)
    with pytest.raises(ValueError, match="pyramid"):
        to_numpy_cloud(rows(3))


def cloud_of_open3d(**vectors: Any) -> Any:
    cloud = open3d.geometry.PointCloud()
    for name, values in vectors.items():
        setattr(cloud, name, open3d.utility.Vector3dVector(values))
    return cloud


def test_clouds_of_open3d() -> None:
    points, colors, normals = [rows(20), rows(30)], [rows(20), rows(30)], [rows(20), rows(30)]
    clouds = [
        cloud_of_open3d(points=points[0], colors=colors[0], normals=normals[0]),
        cloud_of_open3d(),
        cloud_of_open3d(points=points[1], colors=colors[1], normals=normals[1]),
    ]
    pyramid = from_open3d(clouds, ("normals", "colors"), cell_size=1e-4)
    assert pyramid.batch_size == 3
    expected = np.hstack((np.concatenate(normals), np.concatenate(colors)))
    np.testing.assert_array_equal(pyramid.values_of_points(0).numpy(), expected)
    first, empty, last = to_open3d(pyramid, features=("normals", "colors"))
    assert not len(empty.points)
    order = np.lexsort(points[1].T[::-1])
    np.testing.assert_allclose(np.asarray(last.points), points[1][order], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(last.colors), colors[1][order])
    np.testing.assert_array_equal(np.asarray(last.normals), normals[1][order])
    assert len(first.points) == 20


def test_points_of_open3d_are_counted() -> None:
    pyramid = from_open3d(cloud_of_open3d(points=rows(20)), cell_size=1, strides=1, pooling="sum")
    assert pyramid.values.tolist() == [[20]]
    [cloud] = to_open3d(pyramid)
    assert len(cloud.points) == 1
    assert not len(cloud.colors)


def test_other_clouds_of_open3d_are_refused() -> None:
    cloud = cloud_of_open3d(points=rows(20))
    with pytest.raises(ValueError, match=r"clouds.*colors"):
        from_open3d(cloud, "colors", cell_size=1)
    with pytest.raises(ValueError, match="features"):
        from_open3d(cloud, "intensity", cell_size=1)
    with pytest.raises(ValueError, match="clouds"):
        from_open3d(rows(3), cell_size=1)
    pyramid = from_open3d(cloud, cell_size=1)
    with pytest.raises(ValueError, match="channels"):
        to_open3d(pyramid, features="colors")
    with pytest.raises(ValueError, match="features"):
        to_open3d(pyramid, features="points")
    with pytest.raises(ValueError, match="dimensions"):
        to_open3d(from_numpy_cloud(rows(3, 2), cell_size=1))


def las_data(n: int) -> Any:
    laspy = pytest.importorskip("laspy")
    las = laspy.create(point_format=3, file_version="1.2")
    las.header.offsets, las.header.scales = [500_000, 5_000_000, 0], [0.001] * 3
    las.xyz = 10 * rows(n) + [500_000, 5_000_000, 100]
    las.intensity = np.arange(n)
    las.return_number = np.arange(n) % 5
    las.gps_time = 1e9 + np.arange(n)
    return las


@pytest.mark.parametrize("suffix", ["las", "laz"])
def test_files_of_las(suffix: str, tmp_path: Path) -> None:
    laspy = pytest.importorskip("laspy")
    if suffix == "laz":
        pytest.importorskip("lazrs")
    path = tmp_path / f"scan.{suffix}"
    las_data(100).write(path)
    las = laspy.read(path)
    names = ("intensity", "return_number", "gps_time")
    pyramid = from_las(las, names, cell_size=0.0005, strides=(1, 2**15))
    assert pyramid.values.dtype == torch.float64
    expected = np.stack([las[name] for name in names], 1)
    np.testing.assert_array_equal(pyramid.values_of_points(0).numpy(), expected)
    centers = to_numpy_cloud(pyramid)[0][0]
    np.testing.assert_allclose(np.sort(centers, 0), np.sort(las.xyz, 0), atol=1e-3)

    result = to_las(pyramid, 1, like=las, names=("a", "b", "c"))
    result.write(path)
    again = laspy.read(path)
    np.testing.assert_array_equal(again.intensity, las.intensity)
    np.testing.assert_array_equal(again.xyz, las.xyz)
    np.testing.assert_array_equal(again.c, pyramid.values_of_points(1)[:, 2].numpy())
    assert "a" not in las.point_format.dimension_names


def test_las_data_of_several_files() -> None:
    clouds = [las_data(n) for n in (10, 0, 20)]
    pyramid = from_las(clouds, cell_size=1e-3, bounds=[(500_000, 500_005), None, None])
    assert pyramid.batch_size == 3
    results = to_las(pyramid.to(torch.bfloat16), like=clouds)
    for las, result in zip(clouds, results, strict=True):
        inside = np.asarray(las.x) < 500_005
        assert result.value_0.dtype == np.float32
        np.testing.assert_array_equal(result.value_0, np.where(inside, las.intensity, 0))


def test_integers_of_las_are_counted_exactly() -> None:
    las = las_data(10)
    pyramid = from_las(las, cell_size=100, strides=1, pooling="sum")
    assert pyramid.values.tolist() == [[45]]
    assert to_las(pyramid, like=las).value_0.dtype == np.int64
    assert from_las(las, (), cell_size=100, strides=1, pooling="sum").values.tolist() == [[10]]


def test_other_las_data_is_refused() -> None:
    las = las_data(10)
    pyramid = from_las(las, cell_size=1)
    with pytest.raises(ValueError, match="features"):
        from_las(las, "colour", cell_size=1)
    with pytest.raises(ValueError, match="clouds"):
        from_las(rows(3), cell_size=1)
    with pytest.raises(ValueError, match="like"):
        to_las(pyramid, like=las_data(9))
    with pytest.raises(ValueError, match="like"):
        to_las(pyramid, like=None)
    for names in ([], ["a", "b"], ["intensity"]):
        with pytest.raises(ValueError, match="names"):
            to_las(pyramid, like=las, names=names)
    without_rows = FeaturePyramid.from_points(
        torch.zeros(1, 4).long(), torch.ones(1, 1), (2, 2, 2), 1
    )
    with pytest.raises(ValueError, match="point_rows"):
        to_las(without_rows, like=las)
