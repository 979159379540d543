"""Sparse arrays of SciPy, as pyramids and back."""

from typing import Any

import numpy as np
import pytest
import torch

from vicinal import FeaturePyramid
from vicinal.interop import from_scipy, to_scipy

sparse = pytest.importorskip("scipy.sparse")

FORMATS = ["bsr", "coo", "csc", "csr", "dia", "dok", "lil"]


def array(shape: tuple[int, ...] = (6, 9), n: int = 20) -> Any:
    """A COO array of float64."""
    dense = np.zeros(shape)
    cells = torch.randperm(dense.size)[:n].numpy()
    dense.flat[cells] = torch.randn(n, dtype=torch.float64).numpy()
    return sparse.coo_array(dense)


@pytest.mark.parametrize("kind", ["array", "matrix"])
@pytest.mark.parametrize("name", FORMATS)
def test_an_array_of_any_format_is_an_image(name: str, kind: str) -> None:
    given = getattr(sparse, f"{name}_{kind}")(array())
    pyramid = from_scipy(given, strides=(1, 3), pooling="sum")
    assert pyramid.batch_size == 1
    np.testing.assert_array_equal(pyramid.values_of_points(0)[:, 0].numpy(), given.tocoo().data)
    [back], [coarse] = to_scipy(pyramid), to_scipy(pyramid, 1)
    np.testing.assert_array_equal(back.toarray(), given.toarray())
    expected = given.toarray().reshape(2, 3, 3, 3).sum((1, 3))
    np.testing.assert_allclose(coarse.toarray(), expected, atol=1e-12)


def test_values_of_points_are_data_of_the_array() -> None:
    given = sparse.csc_array(array())
    points = from_scipy(given, strides=(1, 2)).values_of_points(0)
    np.testing.assert_array_equal(points[:, 0].numpy(), given.data)


@pytest.mark.parametrize("shape", [(12,), (5, 4, 3), (3, 2, 4, 2)])
def test_arrays_of_other_dimensions(shape: tuple[int, ...]) -> None:
    given = array(shape, 8)
    pyramid = from_scipy(given, strides=1)
    assert pyramid.level_shapes == (shape,)
    np.testing.assert_array_equal(to_scipy(pyramid)[0].toarray(), given.toarray())


def test_a_sequence_is_a_batch() -> None:
    images = [array(), sparse.csr_array((4, 12)), array((3, 3), 5)]
    pyramid = from_scipy(images, strides=1)
    assert (pyramid.batch_size, pyramid.level_shapes) == (3, ((6, 12),))
    for given, back in zip(images, to_scipy(pyramid), strict=True):
        n_rows, n_columns = given.shape
        np.testing.assert_array_equal(back.toarray()[:n_rows, :n_columns], given.toarray())
        assert back.nnz == given.nnz


def test_entries_of_one_cell_are_added_before_they_are_pooled() -> None:
    entries = (np.array([1, 2, 9], np.int32), (np.array([0, 0, 1]), np.array([1, 1, 1])))
    pyramid = from_scipy(sparse.coo_array(entries, shape=(2, 2)), strides=(1, 2))
    assert pyramid.values_of_points(0).tolist() == [[3], [3], [9]]
    assert pyramid.values_of_points(1).tolist() == [[6]] * 3


def test_sums_of_small_integers_do_not_wrap() -> None:
    entries = (np.array([100, 100], np.int8), (np.zeros(2, int), np.zeros(2, int)))
    pyramid = from_scipy(sparse.coo_array(entries, shape=(1, 1)), strides=1, pooling="max")
    assert pyramid.values.tolist() == [[200]]


def test_stored_zeros_are_points() -> None:
    entries = (np.array([0.0]), (np.array([1]), np.array([1])))
    pyramid = from_scipy(sparse.coo_array(entries, shape=(2, 2)), strides=1)
    assert len(pyramid) == to_scipy(pyramid)[0].nnz == 1


def test_integers_and_booleans_are_exact() -> None:
    large = 2**62 + 1
    given = sparse.coo_array((np.array([large]), (np.array([1]), np.array([0]))), shape=(2, 2))
    pyramid = from_scipy(given, strides=1, pooling="sum")
    assert pyramid.values.tolist() == [[large]]
    assert to_scipy(pyramid)[0].data.tolist() == [large]
    mask = from_scipy(given.astype(bool), strides=1, pooling="sum")
    assert mask.values.tolist() == [[1]]


def test_means_of_integers_are_rounded_once() -> None:
    """To PyTorch's default dtype, float32."""
    given = sparse.coo_array((np.array([2**24 + 1]), ([1], [1])), shape=(2, 2))
    assert from_scipy(given, strides=1).values.item() == 2**24
    cells, values = torch.zeros(20_000, 2, dtype=torch.int64), torch.full((20_000, 1), 65_535)
    pooled = FeaturePyramid.from_points(cells, values, (1,), 1, strides=1)
    assert pooled.values.item() == 65_535


def test_cells_of_the_largest_grids_stay_apart() -> None:
    """There a number for each cell would not be an int64."""
    rows, columns = np.array([5, 5 + 2**24, 7]), np.array([3, 3, 9])
    entries = np.array([1.0, 2.0, 4.0]), (rows, columns)
    given = sparse.coo_array(entries, shape=(2**40, 2**40))
    pyramid = from_scipy(given, strides=(2**22,), pooling="sum")
    assert pyramid.cells.tolist() == [[0, 0], [4, 0]]
    assert pyramid.values_of_points(0).tolist() == [[5], [2], [5]]


def test_arrays_that_share_memory_with_others() -> None:
    data = np.arange(12.0)[::2]
    data.flags.writeable = False
    entries = (data, (np.arange(6), np.arange(6)[::-1]))
    pyramid = from_scipy(sparse.coo_array(entries, shape=(6, 6)), strides=1)
    assert pyramid.values_of_points(0)[:, 0].tolist() == data.tolist()


@pytest.mark.parametrize("given", [np.eye(3), None, [], [array(), None], torch.eye(3)])
def test_other_arrays_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="arrays"):
        from_scipy(given)


def test_images_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="arrays"):
        from_scipy([array(), array((4, 3, 2), 5)])
    with pytest.raises(ValueError, match=r"arrays\[1\]"):
        from_scipy([array(), array().astype(np.float32)])
    with pytest.raises(ValueError, match="arrays"):
        from_scipy(array().astype(complex))


def test_several_channels_are_refused() -> None:
    cells = torch.tensor([[0, 1, 1]])
    pyramid = FeaturePyramid.from_points(cells, torch.ones(1, 2), (3, 3), 1, strides=1)
    with pytest.raises(ValueError, match="pyramid"):
        to_scipy(pyramid)


def test_gradients_and_half_precisions_stay_behind() -> None:
    cells = torch.tensor([[0, 1, 1]])
    values = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    pyramid = FeaturePyramid.from_points(cells, values, (3, 3), 1, strides=1)
    assert to_scipy(pyramid)[0].dtype == np.float32
