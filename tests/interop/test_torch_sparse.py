"""Sparse tensors of PyTorch, as pyramids and back."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vicinal import FeaturePyramid
from vicinal.interop import (
    from_torch_coo,
    from_torch_csr,
    from_torch_nested,
    to_torch_coo,
    to_torch_csr,
    to_torch_nested,
)

# Strided ones.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is:UserWarning")


def coo(size: tuple[int, ...] = (2, 9, 7, 3), n: int = 40) -> Tensor:
    """A coalesced map with float64 values."""
    indices = torch.stack([torch.randint(0, high, (n,)) for high in size[:-1]])
    values = torch.randn(n, size[-1], dtype=torch.float64)
    return torch.sparse_coo_tensor(indices, values, size, check_invariants=True).coalesce()


def test_levels_are_pooled_from_the_map() -> None:
    tensor = coo()
    pyramid = from_torch_coo(tensor, strides=(1, 2), pooling="sum")
    assert pyramid.batch_size == 2
    dense = tensor.to_dense()
    padded = torch.nn.functional.pad(dense, (0, 0, 0, 1, 0, 1))
    coarse = padded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4))
    torch.testing.assert_close(to_torch_coo(pyramid, 1).to_dense(), coarse)
    back = to_torch_coo(pyramid, spatial_shape=(9, 7))
    assert back.is_coalesced()
    assert torch.equal(back.to_dense(), dense)


def test_values_of_points_have_the_order_of_the_map() -> None:
    tensor = coo()
    assert torch.equal(from_torch_coo(tensor).values_of_points(0), tensor.values())


def test_values_of_one_cell_are_added() -> None:
    indices = torch.tensor([[0, 0], [3, 3]])
    tensor = torch.sparse_coo_tensor(indices, torch.ones(2, 1), (1, 4, 1), check_invariants=True)
    assert from_torch_coo(tensor, strides=1).values.tolist() == [[2.0]]


def test_gradients_reach_the_map() -> None:
    tensor = coo().requires_grad_()
    to_torch_coo(from_torch_coo(tensor), 1).to_dense().sum().backward()
    grad = tensor.grad
    assert grad is not None
    assert grad.to_dense().abs().sum() > 0


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 4, 2),
        None,
        coo().to_dense(),
        coo().to_dense().to_sparse(2),
        torch.eye(3).to_sparse(),
        torch.ones(1, 2, 3, dtype=torch.bool).to_sparse(),
        torch.ones(1, 2, 3, dtype=torch.complex64).to_sparse(2),
        [1, 2],
    ],
)
def test_other_tensors_are_refused(tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="tensor"):
        from_torch_coo(tensor)


@pytest.mark.parametrize("level", [2, -1, None, 0.0])
def test_other_levels_are_refused(level: int) -> None:
    with pytest.raises(ValueError, match="level"):
        to_torch_coo(from_torch_coo(coo(), strides=(1, 2)), level)


def test_a_shape_that_is_too_small_is_refused() -> None:
    cells = torch.tensor([[0, 5, 3]])
    pyramid = FeaturePyramid.from_points(cells, torch.ones(1, 1), (8, 8), 1)
    with pytest.raises(ValueError, match="spatial_shape"):
        to_torch_coo(pyramid, spatial_shape=(5, 8))


def test_entries_of_a_cell_become_a_row_of_channels() -> None:
    indices = torch.tensor([[0, 0, 0, 1], [3, 3, 3, 0], [2, 0, 2, 1]])  # image, cell, channel
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64, requires_grad=True)
    tensor = torch.sparse_coo_tensor(indices, values, (3, 4, 3), check_invariants=True)
    pyramid = from_torch_coo(tensor, strides=1)
    assert pyramid.batch_size == 3
    assert pyramid.coordinates[:, :2].tolist() == [[0, 3], [1, 0]]
    assert pyramid.values.tolist() == [[2, 0, 5], [0, 8, 0]]
    (pyramid.values * torch.arange(1, 7).view(2, 3)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3, 1, 3, 5]
    assert torch.equal(to_torch_coo(pyramid).to_dense(), tensor.to_dense())


def test_fully_sparse_and_hybrid_tensors_make_the_same_pyramid() -> None:
    hybrid = coo()
    one, other = from_torch_coo(hybrid), from_torch_coo(hybrid.to_dense().to_sparse())
    assert torch.equal(one.coordinates, other.coordinates)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("size", [(2, 5, 4, 3), (1, 1, 1, 1), (0, 3, 3, 2)])
@pytest.mark.parametrize("n_dense", [0, 1])
def test_tensors_without_entries_become_empty_pyramids(size: tuple[int, ...], n_dense: int) -> None:
    tensor = torch.zeros(size).to_sparse(len(size) - n_dense)
    pyramid = from_torch_coo(tensor, strides=1)
    assert (pyramid.batch_size, len(pyramid), pyramid.embed_dim) == (size[0], 0, size[-1])
    assert to_torch_coo(pyramid).shape == tensor.shape


def csr(n_rows: int = 6, n_columns: int = 9, n: int = 20) -> Tensor:
    dense = torch.zeros(n_rows, n_columns, dtype=torch.float64)
    dense.view(-1)[torch.randperm(dense.numel())[:n]] = torch.randn(n, dtype=torch.float64)
    return dense.to_sparse_csr()


def test_a_csr_matrix_is_one_image() -> None:
    matrix = csr()
    pyramid = from_torch_csr(matrix, strides=(1, 3), pooling="sum")
    assert pyramid.batch_size == 1
    assert torch.equal(pyramid.values_of_points(0)[:, 0], matrix.values())
    [back] = to_torch_csr(pyramid)
    assert torch.equal(back.to_dense(), matrix.to_dense())
    [coarse] = to_torch_csr(pyramid, 1)
    expected = matrix.to_dense().unflatten(1, (3, 3)).unflatten(0, (2, 3)).sum((1, 3))
    torch.testing.assert_close(coarse.to_dense(), expected)


def test_csr_matrices_of_several_sizes_are_a_batch() -> None:
    matrices = [csr(), csr(4, 12, 7), torch.zeros(3, 3, dtype=torch.float64).to_sparse_csr()]
    pyramid = from_torch_csr(matrices, strides=1)
    assert pyramid.level_shapes == ((6, 12),)
    stored = torch.cat([matrix.values() for matrix in matrices])
    assert torch.equal(pyramid.values_of_points(0)[:, 0], stored)
    for matrix, back in zip(matrices, to_torch_csr(pyramid), strict=True):
        n_rows, n_columns = matrix.shape
        assert torch.equal(back.to_dense()[:n_rows, :n_columns], matrix.to_dense())
        assert back.values().numel() == matrix.values().numel()


def test_batched_csr_tensors_with_a_dense_dimension() -> None:
    crow = torch.tensor([[0, 1, 2], [0, 2, 2]])
    columns = torch.tensor([[0, 2], [1, 2]])
    values = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    size = (2, 2, 3, 3)
    batched = [
        torch.sparse_csr_tensor(crow, columns, values, size, check_invariants=True)
        for _ in range(2)
    ]
    pyramid = from_torch_csr(batched, strides=1)
    assert pyramid.batch_size == 4
    cells = [[0, 0, 0], [0, 1, 2], [1, 0, 1], [1, 0, 2]]
    assert pyramid.coordinates[:4, :3].tolist() == cells
    assert torch.equal(pyramid.values[:4], values.flatten(0, 1))
    matrices = to_torch_csr(pyramid)
    assert [matrix.shape for matrix in matrices] == [(2, 3, 3)] * 4
    (matrices[2].values() * 3).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[[3.0] * 3] * 2, [[0.0] * 3] * 2]


def test_points_that_share_a_cell_are_added_in_csr() -> None:
    cells = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0]])
    pyramid = FeaturePyramid(torch.tensor([[1.0], [2.0]]), cells, ((3, 3),), 2)
    first, second = to_torch_csr(pyramid)
    assert first.values().tolist() == [3.0]
    assert not second.values().numel()


@pytest.mark.parametrize("matrix", [torch.eye(3), None, torch.eye(3).to_sparse(), []])
def test_other_matrices_are_refused(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="matrices"):
        from_torch_csr(matrix)


def test_the_matrix_of_a_batch_that_is_refused_is_named() -> None:
    with pytest.raises(ValueError, match=r"matrices\[1\]"):
        from_torch_csr([csr(), torch.eye(3)])


def test_csr_matrices_of_two_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices\[1\].*float64"):
        from_torch_csr([csr(), csr().float()])


def test_csr_has_two_dimensions() -> None:
    cells = torch.tensor([[0, 1, 1, 0]])
    pyramid = FeaturePyramid.from_points(cells, torch.ones(1, 1), (3, 3, 3), 1, strides=1)
    with pytest.raises(ValueError, match="pyramid"):
        to_torch_csr(pyramid)


def scans(width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Images with points, the second of them empty."""
    return [(10 * torch.rand(n, width)).to(dtype) for n in (30, 0, 50)]


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_points_and_features(layout: torch.layout) -> None:
    points, features = scans(2), scans(3)
    pyramid = from_torch_nested(
        torch.nested.nested_tensor(points, layout=layout),
        torch.nested.nested_tensor(features, layout=layout),
        cell_size=1e-3,
        bounds=[(0, 10), (0, 10)],
        strides=(1, 1000),
    )
    assert pyramid.batch_size == 3
    assert torch.equal(pyramid.values_of_points(0), torch.cat(features))
    back = to_torch_nested(pyramid)
    assert back.is_nested
    for image, values in zip(features, back.unbind(), strict=True):
        assert torch.equal(image, values)


def test_slices_of_one_nested_tensor() -> None:
    rows = scans(2 + 3)
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    pyramid = from_torch_nested(nested[..., :2], nested[..., 2:], cell_size=1e-3, strides=1)
    assert torch.equal(pyramid.values_of_points(0), torch.cat(rows)[:, 2:])


def test_nested_clocks_in_nanoseconds_are_exact() -> None:
    start = 2**60 + 1
    clocks = [torch.tensor([[start], [start + 1]]), torch.tensor([[start + 4]])]
    nested = torch.nested.nested_tensor(clocks, layout=torch.jagged)
    pyramid = from_torch_nested(nested, cell_size=2, strides=1, pooling="sum")
    assert pyramid.coordinates[:, :2].tolist() == [[0, 0], [1, 2]]
    assert pyramid.values.tolist() == [[2.0], [1.0]]


def test_gradients_reach_nested_features() -> None:
    features = torch.nested.nested_tensor(scans(3), layout=torch.jagged, requires_grad=True)
    points = torch.nested.nested_tensor(scans(2), layout=torch.jagged)
    pyramid = from_torch_nested(points, features, cell_size=0.5, pooling="sum")
    to_torch_nested(pyramid, 2).values().sum().backward()
    assert features.grad is not None
    assert (features.grad.values() > 0).all()


def test_nested_tensors_that_do_not_match_are_refused() -> None:
    points = torch.nested.nested_tensor(scans(2), layout=torch.jagged)
    others = torch.nested.nested_tensor([torch.rand(40, 3)] * 2, layout=torch.jagged)
    with pytest.raises(ValueError, match="features"):
        from_torch_nested(points, others, cell_size=1)
    with pytest.raises(ValueError, match="features"):
        from_torch_nested(points, torch.rand(80, 3), cell_size=1)
    with pytest.raises(ValueError, match="points"):
        from_torch_nested(torch.rand(80, 2), cell_size=1)
    with pytest.raises(ValueError, match="points"):
        from_torch_nested(torch.nested.nested_tensor([torch.rand(3)] * 2), cell_size=1)


@pytest.mark.parametrize("pyramid", [None, torch.ones(2, 3)])
def test_only_pyramids_have_values_of_points(pyramid: Any) -> None:
    with pytest.raises(ValueError, match="pyramid"):
        to_torch_nested(pyramid)


def test_values_per_point_need_raw_points() -> None:
    with pytest.raises(ValueError, match="point_rows"):
        to_torch_nested(FeaturePyramid(torch.ones(1, 1), torch.zeros(1, 3).long(), ((2,),), 1))


def test_values_of_points_without_an_image_are_left_out() -> None:
    cells = torch.tensor([[0, 1, 0], [2, 1, 0]])
    rows = torch.tensor([[1], [-1], [0], [1]])
    values = torch.tensor([[1.0], [2.0]])
    pyramid = FeaturePyramid(values, cells, ((3,),), 3, point_rows=rows)
    images = [image.flatten().tolist() for image in to_torch_nested(pyramid).unbind()]
    assert images == [[1.0], [], [2.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_counts_of_unsigned_dtypes_add_up(dtype: torch.dtype) -> None:
    indices = torch.tensor([[0, 0, 0], [1, 5, 1], [3, 4, 3]])
    counts = torch.tensor([[1], [2], [60000]]).to(dtype)
    tensor = torch.sparse_coo_tensor(indices, counts, (1, 8, 8, 1), check_invariants=True)
    pyramid = from_torch_coo(tensor, strides=1)
    assert pyramid.coordinates.tolist() == [[0, 1, 3, 0], [0, 5, 4, 0]]
    assert pyramid.values.tolist() == [[60001], [2]]


def test_a_map_without_contents_is_refused() -> None:
    tensor = torch.empty(1, 8, 8, 3, layout=torch.sparse_coo, device="meta")
    with pytest.raises(ValueError, match="tensor: expected a tensor with contents"):
        from_torch_coo(tensor)
