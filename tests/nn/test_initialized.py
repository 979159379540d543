"""Modules are reset in any order: parents before their children or after them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vicinal import RotaryEncoding, SparseDeformableAttention, SparseNeighborhoodAttentionBlock
from vicinal.nn.initialized import BiasedLinear, XavierLinear

KINDS: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = [
    (SparseNeighborhoodAttentionBlock, {"embed_dim": 64, "n_heads": 4, "bias": True}),
    (SparseDeformableAttention, {"embed_dim": 64, "n_heads": 4}),
    (SparseDeformableAttention, {"embed_dim": 64, "n_heads": 4, "position_dim": 3, "bias": False}),
    (RotaryEncoding, {"head_dim": 64, "n_heads": 4, "position_dim": 2}),
]


def statistics(module: nn.Module) -> dict[str, tuple[float, float]]:
    """The mean and the deviation of every parameter."""
    return {
        name: (float(value.mean()), float(value.std(correction=0)))
        for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize(("kind", "options"), KINDS)
@pytest.mark.parametrize("backwards", [False, True])
def test_order_of_resets_does_not_matter(
    kind: Callable[..., nn.Module], options: dict[str, Any], backwards: bool
) -> None:
    fresh = kind(**options)
    module: nn.Module = kind(**options, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7.0)
    parts = list(nn.Sequential(module).modules())
    for part in reversed(parts) if backwards else parts:
        reset: Any = getattr(part, "reset_parameters", None)
        if reset is not None:
            reset()
    expected = statistics(fresh)
    assert list(module.state_dict()) == list(expected)
    drawn = {name for name in expected if "freqs" in name}
    for name in drawn:
        assert (module.state_dict()[name].abs() <= 1).all()
    for name, (mean, deviation) in statistics(module).items():
        if name in drawn:
            continue
        assert abs(mean - expected[name][0]) < 0.1 * expected[name][1] + 0.1, name
        assert abs(deviation - expected[name][1]) < 0.2 * expected[name][1] + 1e-9, name
    if kind is SparseDeformableAttention:
        state = fresh.state_dict()
        for name in ("offset_proj.weight", "offset_proj.bias", "weight_proj.bias"):
            assert torch.equal(module.state_dict()[name], state[name]), name
        assert not module.state_dict()["weight_proj.weight"].any()


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_skip_init(kind: Any, options: dict[str, Any]) -> None:
    module = torch.nn.utils.skip_init(kind, **options)
    module.load_state_dict(kind(**options).state_dict(), strict=True)
    module.reset_parameters()
    assert all(value.isfinite().all() for value in module.state_dict().values())


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_parameters_have_the_given_dtype(kind: Any, options: dict[str, Any]) -> None:
    module = kind(**options, dtype=torch.float64)
    assert {value.dtype for value in module.state_dict().values()} == {torch.float64}


def test_biased_layers() -> None:
    layer = BiasedLinear(64, 32, initial_bias=-4.0)
    assert (layer.bias == -4).all()
    assert layer.weight.std() > 0.05
    assert not BiasedLinear(64, 32, zero_weights=True).weight.any()
    assert not BiasedLinear(64, 32).bias.any()


def test_xavier_layers() -> None:
    layer = XavierLinear(300, 500)
    assert abs(float(layer.weight.detach().std()) - (2 / 800) ** 0.5) < 1e-3
    assert not layer.bias.any()
    assert XavierLinear(3, 5, bias=False).bias is None
