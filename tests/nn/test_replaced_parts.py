"""Blocks of which parts are replaced, hooked, or in another dtype."""

from typing import Any

import deformable_scenes
import pytest
import torch
from block_scenes import EXACT, make_arguments, make_block
from problems import assert_close, scene_2d
from torch import Tensor, nn

from vicinal import (
    FeaturePyramid,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
)
from vicinal._utils.types import BackendName


def module_and_call(kind: str, backend: BackendName, **options: Any) -> tuple[Any, dict[str, Any]]:
    if kind == "block":
        scene = scene_2d()
        return make_block(scene, backend, **options), make_arguments(scene)._asdict()
    scene = deformable_scenes.SCENES[2]
    module = deformable_scenes.make_module(scene, **options)
    return module, deformable_scenes.make_arguments(scene)._asdict()


KINDS = pytest.mark.parametrize("kind", ["block", "deformable"])
NORM_FIRST = pytest.mark.parametrize("norm_first", [False, True])


@KINDS
@NORM_FIRST
def test_norm_may_be_replaced_by_the_identity(
    kind: str, norm_first: bool, backend: BackendName
) -> None:
    module, call = module_and_call(kind, backend, norm_first=norm_first)
    reference, _ = module_and_call(kind, backend, norm_first=True)
    reference.load_state_dict(module.state_dict())
    normed = nn.functional.layer_norm(call["query"], call["query"].shape[1:])
    # On a query that is normed already, a norm without weights changes next to nothing.
    module.norm = nn.Identity()
    reference.norm = nn.LayerNorm(normed.shape[1], eps=0, elementwise_affine=False)
    out = module(**call | {"query": normed})
    assert_close(out, reference(**call | {"query": normed}), 1e-4)
    out.sum().backward()
    assert module.out_proj.weight.grad.isfinite().all()
    module.reset_parameters()


@KINDS
@NORM_FIRST
@pytest.mark.parametrize(
    "make_norm", [lambda width: nn.LayerNorm(width, elementwise_affine=False), nn.RMSNorm]
)
def test_other_norms(kind: str, norm_first: bool, make_norm: Any, backend: BackendName) -> None:
    module, call = module_and_call(kind, backend, norm_first=norm_first)
    norm = make_norm(call["query"].shape[1]).double()
    module.norm = norm
    out = module(**call)
    module.norm, module.norm_first = nn.Identity(), True
    if norm_first:
        added = module(**call | {"query": norm(call["query"])}) - norm(call["query"])
        expected = call["query"] + added
    else:
        expected = norm(module(**call))
    assert_close(out, expected, EXACT)


@KINDS
@NORM_FIRST
def test_norm_in_float32_beside_bfloat16(kind: str, norm_first: bool, backend: BackendName) -> None:
    module, call = module_and_call(kind, backend, norm_first=norm_first)
    exact = module(**call)
    module.bfloat16().norm.float()
    pyramid = call["stacked_feature_maps"]
    call |= {
        "query": call["query"].detach().bfloat16().requires_grad_(),
        "stacked_feature_maps": pyramid.with_values(pyramid.values.bfloat16()),
        "query_spatial_positions": call["query_spatial_positions"].float(),
    }
    out = module(**call)
    assert out.dtype == torch.bfloat16
    assert_close(out.double(), exact, 0.2)
    out.float().square().sum().backward()
    assert module.norm.weight.grad.dtype == torch.float32
    assert module.norm.weight.grad.any()
    assert call["query"].grad.isfinite().all()


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@KINDS
@pytest.mark.parametrize("training", [False, True])
def test_dropout_may_be_replaced(kind: str, training: bool, backend: BackendName) -> None:
    module, call = module_and_call(kind, backend)
    module.train(training)
    expected = module(**call)
    module.dropout = nn.Identity()
    assert_close(module(**call), expected, EXACT)
    module.dropout = Halved()
    assert_close(module(**call), (expected + call["query"]) / 2, EXACT)


@KINDS
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("part", ["dropout", "norm", "out_proj"])
def test_hooks_are_called(
    kind: str, training: bool, rate: float, part: str, backend: BackendName
) -> None:
    module, call = module_and_call(kind, backend, dropout=rate)
    module.train(training)
    shapes = []
    hooked = getattr(module, part)
    handle = hooked.register_forward_hook(lambda *args: shapes.append(args[2].shape))
    module(**call)
    assert shapes == [call["query"].shape]
    handle.remove()
    hooked.register_forward_hook(lambda *args: args[2] * 0)
    out = module(**call)
    if part != "norm":
        assert torch.equal(out, call["query"])


def test_a_projection_without_parameters() -> None:
    pyramid = FeaturePyramid(torch.ones(1, 8), torch.tensor([[0, 1, 1, 0]]), ((4, 4),), 1)
    for attention in (
        SparseNeighborhoodAttentionBlock(8, 2, 1, (3,)),
        SparseDeformableAttention(8, 2, 1, 2),
    ):
        attention.out_proj = nn.Identity()  # type: ignore[assignment]
        assert attention.encode(pyramid).values.isfinite().all()
