"""Masked queries that hold numbers that are not finite, in both attention modules."""

import math
from typing import Any

import deformable_scenes
import pytest
import torch
from block_scenes import make_arguments, make_block
from problems import scene_2d
from torch import Tensor, nn

from vicinal._utils.types import BackendName

MASKED = [1, 4, 7]


def modules_and_calls(
    kind: str, backend: BackendName, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """A module and its arguments; the queries `MASKED` are masked."""
    background = options.pop("background")
    if kind == "block":
        scene = scene_2d()
        module = make_block(scene, backend, **options)
        call = make_arguments(scene, background=background, levels=True)._asdict()
    else:
        scene = deformable_scenes.SCENES[2]
        module = deformable_scenes.make_module(scene, **options)
        call = deformable_scenes.make_arguments(scene, background=background)._asdict()
    mask = torch.zeros(len(call["query"]), dtype=torch.bool)
    mask[MASKED] = True
    return module, call | {"query_mask": mask}


def parameter_gradients(module: nn.Module, out: Tensor, weights: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad((out * weights).sum(), list(module.parameters()))
    return dict(zip(dict(module.named_parameters()), grads, strict=True))


@pytest.mark.parametrize("kind", ["block", "deformable"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss", ["finite", "nan"])
def test_nonfinite_masked_rows_add_nothing_to_parameter_gradients(
    kind: str,
    norm_first: bool,
    bias: bool,
    background: bool,
    bad: float,
    loss: str,
    backend: BackendName,
) -> None:
    options = {"norm_first": norm_first, "bias": bias, "background": background}
    module, call = modules_and_calls(kind, backend, **options)
    bad_rows = MASKED[:2]  # the third masked row stays finite
    query = call["query"].detach().clone()
    query[bad_rows[0]] = bad
    query[bad_rows[1], 3] = bad
    query.requires_grad_()
    weights = torch.randn(*query.shape, dtype=torch.float64)
    without = weights.clone()
    without[bad_rows] = 0
    if loss == "nan":
        weights[bad_rows] = math.nan
    good = module(**call)
    out = module(**call | {"query": query})
    found = parameter_gradients(module, out, weights)
    expected = parameter_gradients(module, good, without)
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name

    rest = [row for row in range(len(query)) if row not in bad_rows]
    assert torch.equal(out[rest], good[rest])
    output_bias = module.out_proj.bias if bias else 0
    exact = query + output_bias
    exact = exact if norm_first else module.norm(exact)
    torch.testing.assert_close(out[bad_rows], exact[bad_rows], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("kind", ["block", "deformable"])
def test_finite_masked_rows_reach_the_output_bias(kind: str, backend: BackendName) -> None:
    module, call = modules_and_calls(kind, backend, bias=True, background=False)
    weights = torch.zeros(*call["query"].shape, dtype=torch.float64)
    weights[MASKED] = 1
    grads = parameter_gradients(module, module(**call), weights)
    assert (grads["out_proj.bias"] == len(MASKED)).all()
