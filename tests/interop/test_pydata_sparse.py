"""Arrays of the package sparse, as pyramids and back."""

from typing import Any

import numpy as np
import pytest
import sparse
import torch

from vicinal import FeaturePyramid
from vicinal.interop import from_pydata_sparse, from_torch_coo, to_pydata_sparse


def dense(shape: tuple[int, ...] = (2, 9, 7, 3), n: int = 60) -> Any:
    values = np.zeros(shape)
    values.flat[torch.randperm(values.size)[:n].numpy()] = torch.randn(n).numpy()
    return values


@pytest.mark.parametrize("name", ["COO", "GCXS", "DOK"])
def test_arrays_are_those_of_torch(name: str) -> None:
    values = dense()
    array = getattr(sparse, name).from_numpy(values)
    pyramid = from_pydata_sparse(array, strides=(1, 2))
    expected = from_torch_coo(torch.from_numpy(values).to_sparse(), strides=(1, 2))
    assert torch.equal(pyramid.coordinates, expected.coordinates)
    assert torch.equal(pyramid.values, expected.values)
    assert torch.equal(pyramid.values_of_points(), expected.values_of_points())
    back = to_pydata_sparse(pyramid, spatial_shape=(9, 7))
    np.testing.assert_array_equal(back.todense(), values)


@pytest.mark.parametrize("shape", [(1, 12, 1), (3, 4, 5, 6, 2), (0, 3, 2), (2, 3, 2)])
def test_arrays_of_other_shapes(shape: tuple[int, ...]) -> None:
    values = dense(shape, 5 if shape[0] == 1 else 0)
    pyramid = from_pydata_sparse(sparse.COO.from_numpy(values), strides=1)
    assert (pyramid.batch_size, pyramid.embed_dim) == (shape[0], shape[-1])
    np.testing.assert_array_equal(to_pydata_sparse(pyramid).todense(), values)


def test_integers_and_booleans_are_exact() -> None:
    large = 2**62 + 1
    array = sparse.COO(np.array([[0], [1], [0]]), np.array([large]), shape=(1, 2, 1))
    pyramid = from_pydata_sparse(array, strides=1, pooling="sum")
    assert pyramid.values.tolist() == [[large]]
    assert to_pydata_sparse(pyramid).data.tolist() == [large]
    assert from_pydata_sparse(array.astype(bool), strides=1, pooling="sum").values.tolist() == [[1]]


def test_all_channels_of_a_point_are_stored() -> None:
    cells = torch.tensor([[0, 5, 3]])
    pyramid = FeaturePyramid.from_points(cells, torch.tensor([[0.0, 1.0]]), (8, 8), 1, strides=1)
    assert to_pydata_sparse(pyramid).nnz == 2


@pytest.mark.parametrize(
    "array", [np.eye(3), None, sparse.COO.from_numpy(np.eye(3)), torch.zeros(1, 2, 1)]
)
def test_other_arrays_are_refused(array: Any) -> None:
    with pytest.raises(ValueError, match="array"):
        from_pydata_sparse(array)


def test_another_fill_value_is_refused() -> None:
    array = sparse.COO(np.array([[0], [1], [0]]), np.ones(1), shape=(1, 2, 1), fill_value=1)
    with pytest.raises(ValueError, match="fill value"):
        from_pydata_sparse(array)
