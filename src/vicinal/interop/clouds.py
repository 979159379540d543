"""Point clouds: plain arrays, Open3D, and LAS or LAZ files."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import check_tensor, refuse
from .._utils.types import ArrayLike, BoundsLike, Pooling, StridesLike
from ..pyramid import FeaturePyramid
from ._common import (
    as_images,
    as_names,
    as_numpy,
    cat_images,
    clouds_of_level,
    import_library,
    pyramid_of_points,
    read_columns,
    stack_features,
    values_by_image,
)

_NAME_BYTES = 32  # of an extra dimension in LAS


def from_numpy_cloud(
    points: ArrayLike | Tensor | Sequence[ArrayLike | Tensor],
    features: ArrayLike | Tensor | Sequence[ArrayLike | Tensor] | None = None,
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from point clouds that are arrays of NumPy or tensors.

    It is `voxelize` and `Voxels.pyramid` in one call, for a list of clouds as data sets have them.

    Args:
        points: floating or integer ``[n, P]``, in any unit. A list or tuple of these is a batch,
            an image each.
        features: floating or integer ``[n, E]``; a list or tuple, as for ``points``, for a batch.
            None (default): a one per point.
        cell_size: size of a cell in raw units, one number or one per axis.
        bounds: ``(low, high)`` in raw units for each axis, as for `voxelize`. None (default): from
            the points of all images.
        strides: the size of each level's cells, in cells: one int or P ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a cell.
        periodic_axes: axes along which space repeats, such as an azimuth. Default: none.

    Returns:
        a pyramid. ``values_of_points`` of it has the order of the points, one image after another.
        Gradients reach ``features``.

    Raises:
        ValueError: an array is not as described, images differ in width, dtype or device, or as for
            `voxelize` and `FeaturePyramid.from_points`.

    Example:
        ```python
        import numpy as np
        from vicinal.interop import from_numpy_cloud, to_numpy_cloud

        rng = np.random.default_rng(0)
        clouds = [rng.random((n, 3)) for n in (50, 80)]  # meters
        pyramid = from_numpy_cloud(clouds, cell_size=0.1, pooling="sum", strides=(1, 2))
        assert pyramid.batch_size == 2
        centers, counts = to_numpy_cloud(pyramid, level=1)[0]
        assert centers.shape[1] == 3 and counts.sum() == 50
        ```
    """
    clouds = [
        check_tensor(label, cloud, ("n", "P"), kind="number")
        for label, cloud in as_images("points", points).items()
    ]
    rows = None
    if features is not None:
        given = as_images("features", features)
        if len(given) != len(clouds):
            refuse("features", f"{len(clouds)} images, as of the points", f"{len(given)} images")
        rows = [
            check_tensor(label, values, (len(cloud), "E"), kind="number", device=cloud.device)
            for (label, values), cloud in zip(given.items(), clouds, strict=True)
        ]
    return _pyramid_of_clouds(
        clouds,
        rows,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _pyramid_of_clouds(
    points: Sequence[Tensor], features: Sequence[Tensor] | None, **options: Any
) -> FeaturePyramid:
    """A pyramid of clouds ``[n, P]`` with features ``[n, E]``, an image each."""
    rows, offsets = cat_images("points", points)
    values = None if features is None else cat_images("features", features)[0]
    return pyramid_of_points(rows, values, offsets=offsets, **options)


def to_numpy_cloud(pyramid: FeaturePyramid, level: int = 0) -> list[tuple[Any, Any]]:
    """Returns the cells of one level as point clouds of NumPy.

    ``pyramid.values_of_points(level)`` has the values at the raw points instead.

    Args:
        pyramid: any pyramid.
        level: the level, from 0. Default: 0.

    Returns:
        for each image the centers of the cells, float64 ``[m, P]`` in raw units, and their values
        ``[m, E]``, on the CPU and without gradients. bfloat16 becomes float32.

    Raises:
        ValueError: there is no such level.

    Example:
        ```python
        import torch
        from vicinal import voxelize
        from vicinal.interop import to_numpy_cloud

        points = torch.tensor([[10.1, 3.2], [10.4, 3.4]])
        voxels = voxelize(points, cell_size=1, bounds=[(10, 20), (0, 10)])
        pyramid = voxels.pyramid(torch.tensor([[1.0], [3.0]]))
        [(centers, values)] = to_numpy_cloud(pyramid)
        assert centers.tolist() == [[10.5, 3.5]] and values.tolist() == [[2.0]]
        ```
    """
    clouds = clouds_of_level(pyramid, level)
    return [(as_numpy(centers), as_numpy(values)) for centers, values in clouds]


def from_open3d(
    clouds: Any | Sequence[Any],
    features: str | Sequence[str] = (),
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from point clouds of Open3D.

    Args:
        clouds: ``open3d.geometry.PointCloud``. A list or tuple of them is a batch, an image each.
        features: what becomes the values, in this order: ``"colors"``, ``"normals"`` or
            ``"points"``, three channels each. Default: none of them, but a one per point.
        cell_size: size of a cell in the unit of the points, one number or one per axis.
        bounds: ``(low, high)`` for each axis, as for `voxelize`. None (default): from the points of
            all images.
        strides: the size of each level's cells, in cells: one int or 3 ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a cell.
        periodic_axes: axes along which space repeats. Default: none.

    Returns:
        a pyramid with float64 values where ``features`` are named, as Open3D has them;
        ``pyramid.to(torch.float32)`` converts them. ``values_of_points`` of it has the order of the
        points, one image after another.

    Raises:
        ValueError: a cloud is not as described or does not have such features, or as for `voxelize`
            and `FeaturePyramid.from_points`.

    Example:
        ```python
        import numpy as np
        import open3d
        from vicinal.interop import from_open3d, to_open3d

        cloud = open3d.geometry.PointCloud()
        points = np.random.default_rng(0).random((500, 3))
        cloud.points = open3d.utility.Vector3dVector(points)
        cloud.paint_uniform_color([1, 0, 0])
        pyramid = from_open3d(cloud, "colors", cell_size=0.05)
        assert pyramid.values_of_points(level=0).tolist() == [[1, 0, 0]] * 500
        [coarse] = to_open3d(pyramid, level=2, features="colors")
        assert len(coarse.points) == int((pyramid.levels == 2).sum())
        ```
    """
    names = _names_of_open3d(features)
    given = as_images("clouds", clouds)
    points = [_vectors_of_open3d(label, cloud, "points") for label, cloud in given.items()]
    rows = [
        torch.cat([_vectors_of_open3d(label, cloud, name) for name in names], 1)
        for label, cloud in given.items()
        if names
    ]
    return _pyramid_of_clouds(
        points,
        rows or None,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _names_of_open3d(features: str | Sequence[str]) -> list[str]:
    names = as_names("features", features)
    for name in names:
        if name not in ("colors", "normals", "points"):
            refuse("features", "some of 'colors', 'normals' and 'points'", name)
    return names


def _vectors_of_open3d(argument: str, cloud: Any, name: str) -> Tensor:
    """What a cloud has of ``name``, float64 ``[n, 3]``."""
    if not hasattr(cloud, "points") or not hasattr(cloud, name):
        refuse(argument, f"a PointCloud of Open3D with {name}", cloud)
    numpy = import_library("numpy")
    n, vectors = len(cloud.points), numpy.asarray(getattr(cloud, name))
    if len(vectors) != n:
        refuse(argument, f"a PointCloud with {name} of its {n} points", f"{len(vectors)} of them")
    return check_tensor(argument, vectors.reshape(n, 3), (n, 3), kind="number")


def to_open3d(
    pyramid: FeaturePyramid, level: int = 0, *, features: str | Sequence[str] = ()
) -> list[Any]:
    """Returns the cells of one level as point clouds of Open3D.

    Args:
        pyramid: one of three spatial dimensions.
        level: the level, from 0. Default: 0.
        features: what the values are of the result, in this order: ``"colors"`` or ``"normals"``,
            three channels each. Default: they are left out.

    Returns:
        for each image an ``open3d.geometry.PointCloud`` of the centers of the cells in raw units.

    Raises:
        ValueError: the pyramid does not have three spatial dimensions, or three channels for each
            of ``features``, or there is no such level.
        ImportError: Open3D is not installed.

    Example:
        ```python
        import open3d
        import torch
        from vicinal import voxelize
        from vicinal.interop import to_open3d

        voxels = voxelize(torch.rand(100, 3), cell_size=0.1)
        [cloud] = to_open3d(voxels.pyramid(torch.rand(100, 3)), level=1, features="colors")
        assert isinstance(cloud, open3d.geometry.PointCloud) and cloud.has_colors()
        ```
    """
    names = _names_of_open3d(features)
    if "points" in names:
        refuse("features", "'colors' or 'normals': points are the centers of cells", features)
    images = clouds_of_level(pyramid, level)
    if pyramid.position_dim != 3:
        refuse("pyramid", "three spatial dimensions", f"{pyramid.position_dim}")
    if names and pyramid.embed_dim != 3 * len(names):
        came = f"{pyramid.embed_dim} channels"
        refuse("pyramid", f"{3 * len(names)} channels, for {' and '.join(names)}", came)
    open3d = import_library("open3d")
    clouds = []
    for centers, values in images:
        cloud = open3d.geometry.PointCloud()
        cloud.points = open3d.utility.Vector3dVector(as_numpy(centers))
        for name, vectors in zip(names, values.double().split(3, 1), strict=False):
            setattr(cloud, name, open3d.utility.Vector3dVector(as_numpy(vectors)))
        clouds.append(cloud)
    return clouds


def from_las(
    clouds: Any | Sequence[Any],
    features: str | Sequence[str] = ("intensity",),
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    strides: StridesLike = (1, 2, 4, 8),
    pooling: Pooling = "mean",
    periodic_axes: Sequence[int] = (),
) -> FeaturePyramid:
    """Makes a pyramid from LAS or LAZ files, read by laspy.

    Args:
        clouds: ``laspy.LasData``, as ``laspy.read`` returns. A list or tuple of them is a batch, an
            image each.
        features: names of the dimensions that become the values, such as ``"intensity"``,
            ``"red"``, ``"return_number"``, ``"classification"`` or extra ones. Default: intensity.
            None of them, ``()``: a one per point.
        cell_size: size of a cell in the unit of the file, mostly meters; one number or one per
            axis.
        bounds: ``(low, high)`` for each axis, as for `voxelize`. None (default): from the points of
            all images.
        strides: the size of each level's cells, in cells: one int or 3 ints per level. Default: 1,
            2, 4, 8.
        pooling: ``"mean"`` (default), ``"sum"`` or ``"max"`` over the points of a cell.
        periodic_axes: axes along which space repeats. Default: none.

    Returns:
        a pyramid of x, y and z, scaled in float64, so that UTM coordinates are exact to what the
        file holds. Values have the dtype that PyTorch promotes the dimensions to; the mean of
        integers is floating. ``values_of_points`` of it has the order of the points, one image
        after another.

    Raises:
        ValueError: a cloud is not as described or does not have such dimensions, or as for
            `voxelize` and `FeaturePyramid.from_points`.

    Example:
        ```python
        import laspy
        import numpy as np
        from vicinal.interop import from_las, to_las

        las = laspy.create(point_format=3)
        las.xyz = np.random.default_rng(0).random((500, 3)) + [500_000, 4_000_000, 120]
        las.intensity = np.arange(500)
        pyramid = from_las(las, ("intensity", "red"), cell_size=0.1)
        assert pyramid.embed_dim == 2
        result = to_las(pyramid, like=las, names=("mean_intensity", "mean_red"))
        assert len(result.mean_red) == 500
        ```
    """
    given = as_images("clouds", clouds)
    for label, cloud in given.items():
        _check_las(label, cloud)
    points = [
        check_tensor(label, cloud.xyz, ("n", 3), kind="floating") for label, cloud in given.items()
    ]
    rows = [stack_features(read_columns("features", cloud, features)) for cloud in given.values()]
    return _pyramid_of_clouds(
        points,
        [values for values in rows if values is not None] or None,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _check_las(argument: str, cloud: Any) -> None:
    if not hasattr(cloud, "xyz") or not hasattr(cloud, "point_format"):
        refuse(argument, "a laspy.LasData", cloud)


def to_las(
    pyramid: FeaturePyramid,
    level: int = 0,
    *,
    like: Any | Sequence[Any],
    names: str | Sequence[str] | None = None,
) -> Any:
    """Returns LAS data with the values at its points as extra dimensions.

    Args:
        pyramid: one that `from_las` made from ``like``, or one of the same points, such as what a
            network returns.
        level: the level whose cells the values are taken from, from 0. Default: 0.
        like: the ``laspy.LasData`` that the pyramid was made from, one or a list or tuple. It does
            not change.
        names: of the extra dimensions, one per channel, at most 32 bytes each. None (default):
            ``value_0``, ``value_1`` and so on.

    Returns:
        a copy of ``like`` with the extra dimensions: one ``laspy.LasData``, or a list of them.
        Points outside the bounds have zeros. Half precisions become float32.

    Raises:
        ValueError: there is no such level, ``like`` does not have the pyramid's points, or there is
            not one new name per channel.
        ImportError: laspy is not installed.

    Example:
        ```python
        import laspy
        import numpy as np
        import torch
        from vicinal.interop import from_las, to_las

        las = laspy.create()
        las.xyz = np.random.default_rng(0).random((500, 3))
        pyramid = from_las(las, cell_size=0.1)
        scores = pyramid.with_values(torch.rand(len(pyramid), 1))
        to_las(scores, like=las, names=["score"]).write("scores.las")
        assert len(laspy.read("scores.las").score) == 500
        ```
    """
    values, counts = values_by_image(pyramid, level)
    for label, cloud in as_images("like", like).items():
        _check_las(label, cloud)
    clouds, lengths = list(as_images("like", like).values()), counts.tolist()
    given = [len(cloud.points) for cloud in clouds]
    if given != lengths:
        refuse("like", f"LAS data of {lengths} points, as of the pyramid", f"{given}")
    width = values.shape[1]
    labels = (
        [f"value_{channel}" for channel in range(width)]
        if names is None
        else as_names("names", names)
    )
    are_new = not any(hasattr(cloud, label) for cloud in clouds for label in labels)
    fit = all(1 <= len(label.encode()) <= _NAME_BYTES for label in labels)
    if len(set(labels)) != width or len(labels) != width or not (are_new and fit):
        expected = f"{width} names of at most {_NAME_BYTES} bytes that the LAS data does not have"
        refuse("names", expected, labels)
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    parts = values.split(lengths)
    copies = [
        _with_dimensions(cloud, labels, as_numpy(part))
        for cloud, part in zip(clouds, parts, strict=True)
    ]
    return copies if isinstance(like, list | tuple) else copies[0]


def _with_dimensions(cloud: Any, names: Sequence[str], values: Any) -> Any:
    """A copy of LAS data with ``values`` ``[n, E]`` as extra dimensions."""
    laspy = import_library("laspy")
    result = laspy.LasData(copy.deepcopy(cloud.header), points=cloud.points.copy())
    result.add_extra_dims([laspy.ExtraBytesParams(name, values.dtype) for name in names])
    for channel, name in enumerate(names):
        result[name] = values[:, channel]
    return result
