"""The U-Net of submanifold convolutions, and spconv's gradients on a CPU."""

import pytest
import torch
from problems import assert_close

pytest.importorskip("spconv")
from benchmarks.baselines.submanifold import SubmanifoldUNet

SHAPE = (12, 16)


def some_points(n: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    cells = torch.randperm(2 * SHAPE[0] * SHAPE[1])[:n]
    image, cell = cells // (SHAPE[0] * SHAPE[1]), cells % (SHAPE[0] * SHAPE[1])
    return torch.stack((image, cell // SHAPE[1], cell % SHAPE[1]), 1), torch.randn(n, 3)


def test_a_layer_and_its_gradients_are_those_of_a_dense_convolution() -> None:
    net = SubmanifoldUNet(3, 2, (4,), ((1, 1),), (0,))
    coordinates, values = some_points()
    indices = tuple(coordinates.t())
    convolution = net.first[0]
    found = values.clone().requires_grad_()
    tensor = net.tensor(found, coordinates.int(), list(SHAPE), 2)
    out = convolution(tensor).features
    weight = convolution.weight.detach().permute(0, 3, 1, 2).clone().requires_grad_()
    expected = values.clone().requires_grad_()
    dense = torch.zeros(2, *SHAPE, 3).index_put(indices, expected).permute(0, 3, 1, 2)
    by_dense = torch.nn.functional.conv2d(dense, weight, padding=1).permute(0, 2, 3, 1)[indices]
    assert_close(out, by_dense, 1e-5)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    by_dense.backward(gradient)
    assert found.grad is not None
    assert expected.grad is not None
    assert weight.grad is not None
    assert_close(found.grad, expected.grad, 1e-5)
    assert_close(convolution.weight.grad.permute(0, 3, 1, 2), weight.grad, 1e-5)


def test_every_point_has_a_row_in_its_order() -> None:
    net = SubmanifoldUNet(3, 2, (4, 8), ((1, 1), (2, 4)), (0, 1))
    coordinates, values = some_points()
    coordinates = torch.cat((coordinates, coordinates[:5]))  # two points in a cell
    values = torch.cat((values, torch.randn(5, 3)))
    logits = net.eval()(coordinates, values, SHAPE, 2)
    assert torch.equal(logits[:5], logits[-5:])
    order = torch.randperm(len(values))
    assert_close(net(coordinates[order], values[order], SHAPE, 2), logits[order], 1e-5)
    net.train()(coordinates, values, SHAPE, 2).square().sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
