"""Multilinear sampling of sparse maps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from deformable_scenes import EXACT
from problems import assert_close, make_scene
from torch import Tensor

from vicinal import FeaturePyramid
from vicinal._index import sampling
from vicinal._index.cell_hash import index_cells


@pytest.mark.parametrize("background", [False, True])
def test_gradcheck(background: bool) -> None:
    scene = make_scene(((3, 2), (2, 4)), (1, 1), (2, 1), 8)
    index, images = index_cells(scene.pyramid), torch.tensor([0, 0, 1])
    rows = index.n_cells + (4 if background else 0)

    def sample(table: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return sampling.sample(table, index, images, locations, weights)

    table = torch.randn(rows, 2, 2, dtype=torch.float64, requires_grad=True)
    locations = (4 * torch.rand(3, 2, 2, 2, 2, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sample, (table, locations, weights))


def test_one_row_of_empty_cells() -> None:
    """One image and one level have one, which is no row of zeros."""
    index = index_cells(FeaturePyramid(torch.zeros(1, 1), torch.tensor([[0, 1, 0]]), ((4,),), 1))
    table = torch.tensor([[[1.0]], [[10]]], dtype=torch.float64).requires_grad_()
    locations = torch.tensor([1.75, 3.5], dtype=torch.float64).view(2, 1, 1, 1, 1).requires_grad_()
    weights = torch.ones(2, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    out = sampling.sample(table, index, torch.tensor([0, 0]), locations, weights)
    assert out.flatten().tolist() == [0.75 * 1 + 0.25 * 10, 10]
    grads = torch.autograd.grad(out.sum(), (table, locations, weights))
    expected = [0.75, 0.25 + 1], [10 - 1, 0], [3.25, 10]
    assert [grad.flatten().tolist() for grad in grads] == [list(x) for x in expected]


def sampled_weights() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`sample` as a function of the weights, and weights."""
    scene = make_scene(((3, 2), (2, 4)), (1, 1), (2, 1), 8)
    index, images = index_cells(scene.pyramid), torch.tensor([0, 0, 1])
    table = torch.randn(index.n_cells + 4, 2, 2, dtype=torch.float64)
    locations = 4 * torch.rand(3, 2, 2, 2, 2, dtype=torch.float64)
    weights = torch.randn(3, 2, 2, 2, dtype=torch.float64)
    return lambda x: sampling.sample(table, index, images, locations, x), weights


def test_transforms() -> None:
    sample, weights = sampled_weights()
    expected = torch.autograd.functional.jacobian(sample, weights)
    assert_close(torch.func.jacrev(sample)(weights), expected, EXACT)
    both = torch.func.vmap(sample)(torch.stack((weights, 2 * weights)))
    assert_close(both, torch.stack((sample(weights), sample(2 * weights))), EXACT)


# Torch itself uses it, when forward mode is first used in a process.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_other_derivatives_are_refused() -> None:
    sample, weights = sampled_weights()
    leaf = weights.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sample(leaf).pow(2).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="once"):
        grad.sum().backward()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(sample, (weights,), (weights,))


def test_linear_functions_are_interpolated_exactly_in_four_dimensions() -> None:
    shape, dim = (4, 3, 4, 3), 4
    cells = torch.cartesian_prod(*[torch.arange(size) for size in shape])
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    table = ((cells.double() + 0.5) @ slope)[:, None, None]
    coordinates = F.pad(cells, (1, 1))
    pyramid = FeaturePyramid(torch.zeros(len(cells), 1), coordinates, (shape,), 1)
    spans = torch.tensor([3.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    locations = 0.5 + spans * torch.rand(20, 1, 1, 1, dim, dtype=torch.float64)
    weights = torch.ones(20, 1, 1, 1, dtype=torch.float64)
    images = torch.zeros(20, dtype=torch.int64)
    out = sampling.sample(table, index_cells(pyramid), images, locations, weights)
    assert_close(out.flatten(), (locations @ slope).flatten(), EXACT)
