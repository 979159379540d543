"""The projections of the block: modules that are modified in any way are called."""

import pytest
import torch
from block_scenes import EMBED, EXACT, gradients, make_arguments, make_block
from problems import assert_close, scene_2d
from torch import Tensor, nn

from vicinal._utils.types import BackendName
from vicinal.nn import projections


@pytest.mark.parametrize("name", ["norm", "q_in_proj", "kv_proj", "out_proj"])
@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_of_projections_are_called(name: str, register: str) -> None:
    scene = scene_2d()
    block = make_block(scene)
    calls = []
    getattr(getattr(block, name), register)(lambda *_: calls.append(1))
    block(**make_arguments(scene)._asdict()).sum().backward()
    assert calls


@pytest.mark.parametrize("name", ["kv_proj", "out_proj"])
def test_modules_that_replace_projections_are_called(name: str, backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    arguments = make_arguments(scene)._asdict()
    before = block(**arguments)

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = 2 * self.inner(x)
            return out

    setattr(block, name, Doubled(getattr(block, name)))
    assert (block(**arguments) - before).abs().max() > 0.1


def test_layer_norm_without_bias(backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    arguments = make_arguments(scene)._asdict()
    with torch.no_grad():
        block.norm.bias.zero_()
    expected = block(**arguments)
    without = nn.LayerNorm(EMBED, bias=False).double()
    without.weight = block.norm.weight
    block.norm = without
    assert_close(block(**arguments), expected, 1e-13)


def test_global_module_hooks_are_called(backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    called: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        block(**make_arguments(scene)._asdict())
    finally:
        handle.remove()
    assert {block.norm, block.q_in_proj, block.kv_proj, block.out_proj} <= called


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """A list to which every called linear layer is appended."""
    calls: list[nn.Module] = []
    plain = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        calls.append(self)
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    return calls


@pytest.mark.parametrize("norm_first", [True, False])
def test_modules_are_called_where_torch_does_not_report_hooks(
    norm_first: bool, backend: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same as that of the back end's projections."""
    scene = scene_2d()
    block = make_block(scene, backend, norm_first=norm_first, bias=True)
    arguments = make_arguments(scene)
    calls = record_calls(monkeypatch)
    expected = block(**arguments._asdict())
    assert not calls
    monkeypatch.setattr(projections, "_has_any_global_hook", None)
    out = block(**arguments._asdict())
    assert {block.q_in_proj, block.kv_proj, block.out_proj} <= set(calls)
    assert_close(out, expected, EXACT)
    for left, right in zip(
        gradients(out, block, arguments), gradients(expected, block, arguments), strict=True
    ):
        assert_close(left, right, EXACT)


def test_a_subclass_of_linear_is_called(backend: BackendName) -> None:
    class Negated(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    scene = scene_2d()
    block = make_block(scene, backend)
    arguments = make_arguments(scene)._asdict()
    query = arguments["query"]
    before = block(**arguments)
    negated = Negated(EMBED, EMBED, bias=block.out_proj.bias is not None).double()
    negated.load_state_dict(block.out_proj.state_dict())
    block.out_proj = negated
    assert_close(block(**arguments) - query, query - before, EXACT)
    assert (before - query).abs().max() > 0.1


def test_autocast_applies_to_projections(backend: BackendName) -> None:
    """Under autocast, modules are called, so that they round as autocast prescribes."""
    scene = scene_2d()
    block = make_block(scene, backend).float()
    arguments = make_arguments(scene).to(torch.float32)._asdict()
    dtypes = []
    exact = block(**arguments)
    block.kv_proj.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = block(**arguments)
    assert set(dtypes) == {torch.bfloat16}
    assert 0 < (rounded - exact).abs().max() < 0.1
