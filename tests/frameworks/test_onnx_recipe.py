"""The recipe's program for ONNX Runtime, on more inputs than the recipe shows."""

from typing import Any

import pytest
import torch
from docs.test_docs_code import CODE_OF_PAGES
from torch import Tensor

from vicinal import FeaturePyramid

for _package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(_package)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*axis name:UserWarning"
)
BLOCKS = [
    code
    for code in CODE_OF_PAGES["docs/recipes/frameworks.md"]
    if any(
        name in code for name in ("class Classifier", "model.pt2", "class Encode", "onnxruntime")
    )
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("onnx"))
        for code in BLOCKS:
            exec(compile(code, "recipe", "exec"), namespace)
    return namespace


def make_inputs(n_points: int, n_cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points of four images in ``n_cells`` rows and columns, some in one cell, images unequal."""
    image = torch.randint(0, 4, (n_points, 1))
    points = torch.cat((image, torch.randint(0, n_cells, (n_points, 2))), 1)
    pyramid = FeaturePyramid.from_points(
        points, torch.randn(n_points, 16), (16, 16), 4, strides=(1, 2)
    )
    return pyramid.values, pyramid.coordinates, pyramid.batch_offsets()


@pytest.mark.parametrize(("n_points", "n_cells"), [(2, 16), (40, 3), (300, 16)])
def test_results_are_those_of_the_module(
    recipe: dict[str, Any], n_points: int, n_cells: int
) -> None:
    inputs = make_inputs(n_points, n_cells)
    session, names = recipe["session"], recipe["names"]
    (found,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    expected = recipe["encode"](*inputs)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
