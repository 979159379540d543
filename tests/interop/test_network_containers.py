"""What conversions of all containers of sparse networks have in common."""

import sys
from typing import Any

import pytest
import torch
from interop.network_cases import (
    CASES,
    Case,
    assert_same_cells,
    every_container,
    pooled,
    scene,
)

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock

with_negative_cells = pytest.mark.parametrize(
    "case", [case for case in CASES if case.negative], ids=lambda case: case.name
)


@every_container
@pytest.mark.parametrize("level", [0, 1])
def test_containers_come_back(case: Case, level: int) -> None:
    cells, values = scene()
    container = case.make(cells, values, 3)
    pyramid = case.from_container(container, strides=(1, 2), pooling="sum")
    assert pyramid.batch_size == 3
    stride = level + 1
    assert_same_cells(case.read(case.to_container(pyramid, level)), pooled(cells, values, stride))


@with_negative_cells
@pytest.mark.parametrize("level", [0, 1, 2])
def test_negative_cells_come_back(case: Case, level: int) -> None:
    cells, values = scene(low=-17)
    pyramid = case.from_container(case.make(cells, values, 3), strides=(1, 2, 3), pooling="sum")
    options = {"origin": [level / 2] * 3} if case.name == "fvdb" else {}
    container = case.to_container(pyramid, level, **options)
    assert_same_cells(case.read(container), pooled(cells, values, level + 1))


@every_container
def test_values_of_points_have_the_order_of_the_container(case: Case) -> None:
    container = case.make(*scene(), 3)
    _, values = case.read(container)
    assert torch.equal(case.from_container(container).values_of_points(0), values)


@every_container
def test_empty_images_come_back(case: Case) -> None:
    container = case.make(*scene(), 5)
    options = {} if case.knows_batch_size else {"batch_size": 5}
    pyramid = case.from_container(container, **options)
    assert pyramid.batch_size == 5
    back = case.from_container(case.to_container(pyramid), **options)
    assert back.batch_size == 5


@every_container
def test_containers_without_points(case: Case) -> None:
    cells, values = scene()
    pyramid = case.from_container(case.make(cells, values, 3), strides=(1, 2))
    nothing = FeaturePyramid(
        values[:0],
        pyramid.coordinates[:0],
        pyramid.level_shapes,
        2,
        strides=pyramid.strides,
    )
    if not case.takes_empty:
        with pytest.raises(ValueError, match="pyramid"):
            case.to_container(nothing)
        return
    container = case.to_container(nothing)
    read_cells, read_values = case.read(container)
    assert read_cells.shape == (0, 4)
    assert read_values.shape == (0, 4)
    empty = case.from_container(container, strides=(1, 2))
    assert len(empty) == 0
    assert empty.batch_size == (2 if case.knows_batch_size else empty.batch_size)
    assert empty.values_of_points(0).shape == (0, 4)


@every_container
def test_points_of_one_cell_are_pooled_or_added(case: Case) -> None:
    cells = torch.tensor([[0, 3, 2, 1, 0], [0, 3, 2, 1, 0], [1, 0, 0, 0, 0]])
    values = torch.tensor([[1.0], [2.0], [4.0]])
    pyramid = FeaturePyramid(values, cells.flip(0), ((4, 4, 4),), 2, strides=((1,) * 3,))
    expected = pooled(cells[:, :4], values.flip(0), 1)
    assert_same_cells(case.read(case.to_container(pyramid)), expected)
    if case.name in ("minkowski", "fvdb"):  # these keep each cell once
        return
    container = case.make(cells[:, :4], values, 2)
    means = case.from_container(container, strides=1)
    assert means.values.tolist() == [[1.5], [4.0]]
    assert means.values_of_points(0).tolist() == [[1.5], [1.5], [4.0]]


@every_container
def test_gradients_reach_the_container_and_the_pyramid(case: Case) -> None:
    cells, values = scene()
    values.requires_grad_()
    pyramid = case.from_container(case.make(cells, values, 3), strides=(1, 2), pooling="sum")
    _, back = case.read(case.to_container(pyramid, 1))
    (back**2).sum().backward()
    sums = pooled(cells, values.detach(), 2)
    expected = [2 * sums[(image, *(at // 2 for at in cell))] for image, *cell in cells.tolist()]
    torch.testing.assert_close(values.grad, torch.stack(expected))


@every_container
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(case: Case, dtype: torch.dtype) -> None:
    cells, values = scene()
    container = case.make(cells, values.to(dtype), 3)
    back = case.to_container(case.from_container(container))
    assert case.read(back)[1].dtype == dtype


@every_container
def test_cells_are_int32(case: Case) -> None:
    container = case.make(*scene(), 3)
    back = case.to_container(case.from_container(container))
    tensors = {
        "spconv": lambda: back.indices,
        "minkowski": lambda: back.C,
        "torchsparse": lambda: back.coords,
        "trellis": lambda: back.coords,
        "fvdb": lambda: back[0].ijk.jdata,
        "warpconvnet": lambda: back.coordinate_tensor,
        "pointcept": lambda: back["grid_coord"],
    }
    assert tensors[case.name]().dtype == torch.int32


@every_container
def test_a_block_between(case: Case) -> None:
    cells, values = scene()
    container = case.make(cells, values.float(), 3)
    block = SparseNeighborhoodAttentionBlock(
        4, 2, n_levels=2, neighborhood_sizes=(3, 5), position_dim=3
    )
    encoded = block.encode(case.from_container(container, strides=(1, 2)))
    attended = encoded.values_of_points(0)
    assert attended.shape == values.shape
    read_cells, read_values = case.read(case.to_container(encoded))
    rows = dict(zip(map(tuple, read_cells.tolist()), read_values, strict=True))
    for cell, value in zip(case.read(container)[0].tolist(), attended, strict=True):
        assert torch.equal(rows[tuple(cell)], value)


@every_container
@pytest.mark.parametrize("container", [None, [1, 2], torch.zeros(3, 4)])
def test_other_containers_are_refused(case: Case, container: Any) -> None:
    parts = (container, container) if case.name == "fvdb" else container
    with pytest.raises(ValueError, match=r"tensor|grid|voxels|point"):
        case.from_container(parts)


@every_container
@pytest.mark.parametrize(
    ("name", "value"), [("strides", (0,)), ("pooling", "median"), ("periodic_axes", (3,))]
)
def test_other_options_are_refused(case: Case, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        case.from_container(case.make(*scene(), 3), **{name: value})


@every_container
@pytest.mark.parametrize("level", [2, -1, None, 0.0])
def test_other_levels_are_refused(case: Case, level: Any) -> None:
    pyramid = case.from_container(case.make(*scene(), 3), strides=(1, 2))
    with pytest.raises(ValueError, match="level"):
        case.to_container(pyramid, level)
    with pytest.raises(ValueError, match="pyramid"):
        case.to_container(pyramid.values)


@every_container
def test_cells_beyond_int32_are_refused(case: Case) -> None:
    cells = torch.tensor([[0, 2**31, 0, 0, 0]])
    pyramid = FeaturePyramid(torch.ones(1, 1), cells, ((2**32, 1, 1),), 1, strides=((1,) * 3,))
    with pytest.raises(ValueError, match="int32"):
        case.to_container(pyramid)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "spconv"], ids=lambda case: case.name
)
def test_bounds_leave_points_out(case: Case) -> None:
    cells, values = scene()
    container = case.make(cells, values, 3)
    bounds = [(0, 12), None, (4, 28)]
    pyramid = case.from_container(container, bounds=bounds, strides=(1, 2))
    read_cells, read_values = case.read(container)
    x, _, z = read_cells[:, 1:].unbind(1)
    inside = (x < 12) & (z >= 4) & (z < 28)
    expected = read_values * inside[:, None]
    assert torch.equal(pyramid.values_of_points(0), expected)
    assert pyramid.level_shapes[0][::2] == (12, 24)
    with pytest.raises(ValueError, match="bounds"):
        case.from_container(container, bounds=[(0, 12)])


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "spconv"], ids=lambda case: case.name
)
def test_periodic_axes_need_bounds(case: Case) -> None:
    container = case.make(*scene(), 3)
    with pytest.raises(ValueError, match="bounds"):
        case.from_container(container, periodic_axes=[1])
    pyramid = case.from_container(
        container, bounds=[None, (0, 32), None], periodic_axes=[1], strides=(1, 2)
    )
    assert pyramid.periodic_axes == (1,)
    assert pyramid.level_shapes[0][1] == 32


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name != "pointcept"], ids=lambda case: case.name
)
def test_a_missing_library_is_named(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pyramid = case.from_container(case.make(*scene(), 3))
    package = {"minkowski": "MinkowskiEngine"}.get(case.name, case.name)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"(?i){package}"):
        case.to_container(pyramid)
