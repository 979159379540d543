"""Graphs of PyTorch Geometric, as pyramids and back."""

from typing import Any

import pytest
import torch

from vicinal import FeaturePyramid
from vicinal.interop import from_pyg, to_pyg

pyg = pytest.importorskip("torch_geometric.data")


def batch(*lengths: int) -> Any:
    graphs = [
        pyg.Data(x=torch.randn(n, 4, dtype=torch.float64), pos=torch.rand(n, 3)) for n in lengths
    ]
    return pyg.Batch.from_data_list(graphs)


def test_one_graph() -> None:
    data = pyg.Data(x=torch.randn(5, 4), pos=torch.rand(5, 2))
    pyramid = from_pyg(data, cell_size=0.01, bounds=[(0, 1), (0, 1)])
    assert pyramid.batch_size == 1
    assert torch.equal(pyramid.values_of_points(0), data.x)
    assert pyramid.level_shapes[0] == (104, 104)


def test_batches_keep_empty_graphs() -> None:
    data = batch(3, 0, 4, 0)
    pyramid = from_pyg(data, cell_size=1e-6, strides=(1, 2))
    assert torch.equal(pyramid.values_of_points(0), data.x)
    back = to_pyg(pyramid)
    assert back.num_graphs == 4
    assert torch.equal(back.ptr, data.ptr)
    assert torch.equal(back.batch, data.batch)
    assert isinstance(back, pyg.Batch)
    assert [graph.num_nodes for graph in back.to_data_list()] == [3, 0, 4, 0]
    assert from_pyg(back, cell_size=1e-6).batch_size == 4


def test_nodes_come_back_at_the_centers_of_cells() -> None:
    data = batch(30, 40)
    pyramid = from_pyg(data, cell_size=0.25, bounds=[(0, 1)] * 3, strides=(1, 2), pooling="sum")
    back = to_pyg(pyramid, 1, dtype=torch.float64)
    for node in range(back.num_nodes):
        near = ((data.pos - back.pos[node]).abs() < 0.25).all(1) & (data.batch == back.batch[node])
        torch.testing.assert_close(back.x[node], data.x[near].sum(0))
    assert to_pyg(pyramid).pos.dtype == torch.float32


def test_images_in_any_order() -> None:
    data = pyg.Data(
        x=torch.tensor([[1.0], [2.0]]), pos=torch.zeros(2, 1), batch=torch.tensor([1, 0])
    )
    back = to_pyg(from_pyg(data, cell_size=1))
    assert back.x.tolist() == [[2], [1]]
    assert back.ptr.tolist() == [0, 1, 2]


def test_a_graph_without_nodes() -> None:
    pyramid = from_pyg(batch(0), cell_size=0.1)
    back = to_pyg(pyramid)
    assert (back.num_nodes, back.num_graphs) == (0, 1)


def test_gradients_reach_the_nodes() -> None:
    data = batch(5)
    data.x.requires_grad_()
    to_pyg(from_pyg(data, cell_size=0.5, strides=(1, 2)), 1).x.sum().backward()
    assert (data.x.grad > 0).all()


def test_periodic_axes() -> None:
    data = pyg.Data(x=torch.ones(2, 1), pos=torch.tensor([[-0.1], [0.9]]))
    pyramid = from_pyg(
        data, cell_size=0.25, bounds=[(0, 1)], periodic_axes=[0], strides=1, pooling="sum"
    )
    assert pyramid.values.tolist() == [[2]]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x", None),
        ("x", torch.ones(3)),
        ("pos", None),
        ("pos", torch.rand(2, 3)),
        ("pos", torch.full((3, 2), torch.nan)),
        ("ptr", torch.tensor([0, 2])),
        ("batch", torch.tensor([0, 1])),
        ("batch", torch.tensor([0, -1, 0])),
    ],
)
def test_other_attributes_are_refused(name: str, value: Any) -> None:
    data = pyg.Data(**{"x": torch.ones(3, 2), "pos": torch.rand(3, 2), name: value})
    with pytest.raises(ValueError, match=name):
        from_pyg(data, cell_size=0.1)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="data"):
        from_pyg(torch.rand(3, 2), cell_size=0.1)
    with pytest.raises(ValueError, match="cell_size"):
        from_pyg(batch(3), cell_size=0)
    with pytest.raises(ValueError, match="pyramid"):
        to_pyg(batch(3))
    with pytest.raises(ValueError, match="image"):
        to_pyg(FeaturePyramid(torch.ones(0, 2), torch.zeros(0, 4).long(), ((4, 4),), 0))
    pyramid = FeaturePyramid.from_points(torch.tensor([[0, 1, 2]]), torch.ones(1, 2), (4, 4), 1)
    with pytest.raises(ValueError, match="dtype"):
        to_pyg(pyramid, dtype=torch.int32)
