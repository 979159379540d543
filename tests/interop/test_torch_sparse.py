"""Sparse tensors of PyTorch, as pyramids and back."""

import pytest
import torch
from torch import Tensor

from vicinal import FeaturePyramid
from vicinal.interop import from_torch_coo, to_torch_coo


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
    "tensor", [torch.zeros(1, 4, 2), None, coo().to_dense().to_sparse(), [1, 2]]
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
