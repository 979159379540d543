"""Contents of containers that look right and are not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vicinal import FeaturePyramid
from vicinal.interop import (
    from_events,
    from_hdf5,
    from_minkowski,
    from_numpy_cloud,
    from_pointcept,
    from_pyg,
    from_spconv,
    from_torch_csr,
    to_scipy,
    to_torch_coo,
)

COLUMNS = {name: np.arange(6.0) for name in "xyz"}


def events(n: int, n_signs: int) -> dict[str, list[int]]:
    return {"x": [1] * n, "y": [1] * n, "t": [1] * n, "p": [1] * n_signs}


def test_each_recording_has_a_polarity_per_event() -> None:
    with pytest.raises(ValueError, match="polarity"):
        from_events([events(2, 1), events(1, 2)], cell_size=1)


def test_a_recording_may_be_empty() -> None:
    pyramid = from_events([events(2, 2), events(0, 0)], cell_size=1)
    assert pyramid.batch_size == 2


def test_masked_entries_are_refused() -> None:
    points = np.ma.masked_equal(np.array([[0, 1.0], [9999, 2], [1, 1]]), 9999)
    with pytest.raises(ValueError, match=r"points.*masked"):
        from_numpy_cloud(points, cell_size=1)
    x = np.ma.masked_array(np.arange(6.0), mask=[False] * 5 + [True])
    with pytest.raises(ValueError, match="masked"):
        from_hdf5({**COLUMNS, "x": x}, cell_size=1)


def test_an_array_whose_mask_is_empty_is_an_array() -> None:
    points = np.ma.masked_equal(np.array([[0, 1.0], [1, 1]]), 9999)
    assert from_numpy_cloud(points, cell_size=1).batch_size == 1


def test_cells_between_multiples_of_the_stride_are_refused() -> None:
    import MinkowskiEngine

    cells = torch.tensor([[0, 1, 1], [0, 3, 5]], dtype=torch.int32)
    tensor = MinkowskiEngine.SparseTensor(torch.ones(2, 1), cells, tensor_stride=2)
    with pytest.raises(ValueError, match=r"tensor\.C"):
        from_minkowski(tensor)


def test_graphs_of_nodes_are_those_of_batch() -> None:
    """Subgraphs of a batch have its `ptr`, which counts all nodes."""
    data = SimpleNamespace(
        x=torch.ones(3, 1),
        pos=torch.rand(3, 2),
        batch=torch.tensor([0, 0, 1]),
        ptr=torch.tensor([0, 4, 7, 9]),
    )
    pyramid = from_pyg(data, cell_size=0.1, strides=1)
    assert pyramid.batch_size == 3
    assert pyramid.point_batch is not None
    assert pyramid.point_batch.tolist() == [0, 0, 1]


@pytest.mark.parametrize("names", [["event", "x"], []])
@pytest.mark.parametrize("argument", ["event", "offsets"])
def test_several_columns_of_events_are_refused(argument: str, names: Any) -> None:
    table = {**COLUMNS, "event": np.arange(6)}
    with pytest.raises(ValueError, match=argument):
        from_hdf5(table, cell_size=1, **{argument: names})


def test_numbers_that_are_not_finite_are_refused_by_the_name_of_the_argument() -> None:
    with pytest.raises(ValueError, match="fields"):
        from_hdf5({**COLUMNS, "y": np.array([0, 1, np.nan, 3, 4, 5])}, cell_size=1)


def test_tensors_without_contents_are_refused() -> None:
    x, pos = torch.ones(3, 1, device="meta"), torch.ones(3, 2, device="meta")
    graph = SimpleNamespace(x=x, pos=pos, batch=None, ptr=None)
    with pytest.raises(ValueError, match="contents"):
        from_pyg(graph, cell_size=1)
    indices = torch.ones(3, 3, dtype=torch.int32, device="meta")
    tensor = SimpleNamespace(features=x, indices=indices, spatial_shape=[4, 4], batch_size=1)
    with pytest.raises(ValueError, match="contents"):
        from_spconv(tensor)


def test_half_precision_becomes_float32_in_scipy() -> None:
    pytest.importorskip("scipy")
    values = torch.tensor([50.0, 100.0]).half()
    matrix = torch.sparse_csr_tensor(
        torch.tensor([0, 1, 2]), torch.tensor([0, 1]), values, (2, 2), check_invariants=True
    )
    (found,) = to_scipy(from_torch_csr(matrix, strides=1, pooling="sum"))
    assert found.toarray().tolist() == [[50, 0], [0, 100]]


def test_lists_of_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="fields 'x': expected a column of numbers, got list"):
        from_events({"x": [[1], [1, 2]], "y": [1, 2], "t": [1, 2], "p": [1, 0]}, cell_size=1)


def test_maps_that_pytorch_cannot_have_are_refused() -> None:
    shape = (2**20,) * 3
    cells = torch.zeros(1, 4, dtype=torch.int64)
    pyramid = FeaturePyramid.from_points(cells, torch.ones(1, 64), shape, 1, strides=1)
    for convert in (FeaturePyramid.to_coo, to_torch_coo):
        with pytest.raises(ValueError, match="pyramid: expected a map of fewer than"):
            convert(pyramid)


def test_a_size_of_cells_may_be_an_array() -> None:
    point = {"coord": torch.rand(3, 3), "feat": torch.ones(3, 1), "offset": torch.tensor([1, 3])}
    sizes = np.array([0.05, 0.05])
    pyramid = from_pointcept({**point, "grid_size": sizes}, strides=1)
    assert pyramid.cell_size == (0.05,) * 3
