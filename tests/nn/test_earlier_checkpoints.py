"""Going back and forth between the block and the earlier implementation of it."""

import copy
from collections import OrderedDict
from enum import Enum
from typing import Any

import golden_cases
import numpy as np
import pytest
import torch
from block_scenes import make_arguments, make_block
from problems import assert_close, scene_2d
from torch import nn

from vicinal import (
    FreqGroupPattern,
    RotaryEncoding,
    SparseNeighborhoodAttentionBlock,
    export_state_dict,
)
from vicinal._utils.types import BackendName


def golden_block(name: str) -> tuple[SparseNeighborhoodAttentionBlock, golden_cases.GoldenCase]:
    case = golden_cases.load(name)
    block = SparseNeighborhoodAttentionBlock(**case.config).double()
    block.load_state_dict(case.state_dict, strict=True)
    return block, case


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal keys in equal order, and tensors of equal dtype, shape and value."""
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def test_all_patterns_are_among_the_golden_cases() -> None:
    assert {"encoder_2d", "partition_2d", "closure_3d"} <= set(golden_cases.NAMES)


@pytest.mark.parametrize("name", golden_cases.NAMES)
def test_export_equals_the_checkpoint_of_the_earlier_implementation(name: str) -> None:
    block, case = golden_block(name)
    assert_same_state(export_state_dict(block), case.state_dict)


@pytest.mark.parametrize("name", ["encoder_2d", "closure_3d"])
def test_export_of_a_module_that_contains_blocks(name: str) -> None:
    block, case = golden_block(name)
    other, _ = golden_block(name)
    before, after = nn.Linear(3, 4), nn.BatchNorm1d(4)
    layers = nn.ModuleList([nn.ModuleDict({"attention": part}) for part in (block, other)])
    model = nn.Sequential(OrderedDict(kv_proj=before, layers=layers, head=after))
    exported = export_state_dict(model)
    expected = {f"kv_proj.{key}": value for key, value in before.state_dict().items()}
    for index in range(2):
        prefix = f"layers.{index}.attention."
        expected |= {prefix + key: value for key, value in case.state_dict.items()}
    expected |= {f"head.{key}": value for key, value in after.state_dict().items()}
    assert_same_state(exported, expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict({key: value.clone() for key, value in expected.items()}, strict=True)
    model.load_state_dict(export_state_dict(model), strict=True)


def test_export_of_one_block_under_two_names() -> None:
    block, case = golden_block("partition_2d")
    model = nn.ModuleDict({"first": block, "second": block})
    expected = {
        f"{name}.{key}": value
        for name in ("first", "second")
        for key, value in case.state_dict.items()
    }
    assert_same_state(export_state_dict(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bases_have_the_dtype_of_the_module(dtype: torch.dtype) -> None:
    block = SparseNeighborhoodAttentionBlock(
        12, 2, rope_spatial_base_theta=50.0, rope_level_base_theta=5.0
    ).to(dtype)
    exported = export_state_dict(block)
    for key, base in (("rope_spatial_base_theta", 50.0), ("rope_level_base_theta", 5.0)):
        assert exported[key].dtype == dtype
        assert exported[key] == base


def test_export_refuses_what_is_no_module() -> None:
    with pytest.raises(ValueError, match=r"module: expected .* got dict"):
        export_state_dict({})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ optimizers


def specified_order(bias: bool, groups: int) -> list[str]:
    names = ["norm.weight", "norm.bias"]
    names += ["q_in_proj.weight", *["q_in_proj.bias"] * bias]
    names += [f"pos_encoding.freqs.{group}" for group in range(groups)]
    names += ["kv_proj.weight", *["kv_proj.bias"] * bias]
    return [*names, "out_proj.weight", *["out_proj.bias"] * bias]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("pattern", "groups"), [("single", 1), ("partition", 2), ("closure", 3)])
def test_parameters_have_the_specified_order(bias: bool, pattern: str, groups: int) -> None:
    block = make_block(scene_2d(), bias=bias, rope_freq_group_pattern=pattern)
    assert [name for name, _ in block.named_parameters()] == specified_order(bias, groups)


def test_state_of_an_optimizer_in_the_specified_order_resumes() -> None:
    scene = scene_2d()
    earlier, block = make_block(scene, bias=True), make_block(scene, bias=True)
    block.load_state_dict(earlier.state_dict())
    arguments = make_arguments(scene)._asdict()
    in_order = [earlier.get_parameter(name) for name in specified_order(True, 1)]
    saved = torch.optim.Adam(in_order, lr=0.01)
    resumed = torch.optim.Adam(block.parameters(), lr=0.5)

    def step(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(**arguments).square().sum().backward()
        optimizer.step()

    step(earlier, saved)
    block.load_state_dict(earlier.state_dict())
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    for module, optimizer in ((earlier, saved), (block, resumed)):
        step(module, optimizer)
    for name, value in earlier.state_dict().items():
        assert torch.equal(block.state_dict()[name], value), name


# ---------------------------------------------------------- arguments of the constructor


class OtherPattern(Enum):
    JOINT = "closure"


@pytest.mark.parametrize("pattern", [FreqGroupPattern.CLOSURE, OtherPattern.JOINT, "closure"])
def test_pattern_may_be_an_enum(pattern: Any) -> None:
    rotary = RotaryEncoding(12, 2, 2, freq_group_pattern=pattern)
    assert [len(freqs) for freqs in rotary.freqs] == [2, 1, 3]
    assert rotary.freq_group_pattern == "closure"
    block = SparseNeighborhoodAttentionBlock(24, 2, rope_freq_group_pattern=pattern)
    assert [len(freqs) for freqs in block.pos_encoding.freqs] == [2, 1, 3]


class NoPattern(Enum):
    TRIPLE = "triple"
    NUMBER = 1


@pytest.mark.parametrize(
    "pattern", [NoPattern.TRIPLE, NoPattern.NUMBER, "triple", None, ["single"]]
)
def test_other_patterns_raise(pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"^freq_group_pattern: expected"):
        RotaryEncoding(12, 2, 2, freq_group_pattern=pattern)
    with pytest.raises(ValueError, match=r"^rope_freq_group_pattern: expected"):
        SparseNeighborhoodAttentionBlock(24, 2, rope_freq_group_pattern=pattern)


@pytest.mark.parametrize(
    "sizes",
    [
        torch.tensor([3, 5]),
        torch.tensor([3, 5], dtype=torch.int32),
        np.array([3, 5]),
        [np.int64(3), np.int64(5)],
    ],
)
def test_neighborhood_sizes_may_be_a_tensor_or_an_array(sizes: Any) -> None:
    block = SparseNeighborhoodAttentionBlock(8, 2, 2, sizes)
    assert block.neighborhood_sizes == (3, 5)
    assert all(type(size) is int for size in block.neighborhood_sizes)


def test_sizes_may_be_integers_of_numpy() -> None:
    sizes: Any = (np.int64(8), np.int32(2), np.int64(2))
    dim: Any = np.int64(3)
    block = SparseNeighborhoodAttentionBlock(sizes[0], sizes[1], sizes[2], (3, 5), dim)
    assert block.kv_proj.weight.shape == (16, 8)
    for name in ("embed_dim", "n_heads", "n_levels", "position_dim"):
        assert type(getattr(block, name)) is int
    rotary = RotaryEncoding(*sizes)
    assert rotary.freqs[0].shape == (3, 2, 4)


def test_options_are_attributes() -> None:
    block = SparseNeighborhoodAttentionBlock(
        8, 2, dropout=0.25, rope_spatial_base_theta=50.0, rope_share_heads=True
    )
    assert block.attn_drop_rate == 0.25
    assert (block.rope_spatial_base_theta, block.rope_level_base_theta) == (50.0, 10.0)
    assert block.rope_share_heads is True
    block = SparseNeighborhoodAttentionBlock(8, 2, dropout=0.25, attention_dropout=0.5)
    assert (block.attn_drop_rate, block.dropout.p) == (0.5, 0.25)


@pytest.mark.parametrize("rate", [-0.1, 1.0, "0.1"])
def test_rates_of_attention_dropout_are_checked(rate: Any) -> None:
    with pytest.raises(ValueError, match=r"^attention_dropout: expected"):
        SparseNeighborhoodAttentionBlock(8, 2, attention_dropout=rate)


def test_attention_dropout_without_dropout_of_the_output(backend: BackendName) -> None:
    scene = scene_2d(n_queries=200, n_points=200)
    arguments = make_arguments(scene)._asdict()
    block = make_block(scene, backend, attention_dropout=0.5)
    dropped = block(**arguments) - arguments["query"]
    whole = block.eval()(**arguments) - arguments["query"]
    changed = (dropped - whole).abs().amax(1) > 1e-9
    assert changed.double().mean() > 0.9
    assert (dropped == 0).double().mean() < 0.1


def test_no_attention_dropout_as_in_the_earlier_implementation(backend: BackendName) -> None:
    scene = scene_2d(n_queries=200, n_points=200)
    arguments = make_arguments(scene)._asdict()
    block = make_block(scene, backend, dropout=0.5, attention_dropout=0.0)
    added = block(**arguments) - arguments["query"]
    whole = block.eval()(**arguments) - arguments["query"]
    kept = added != 0
    assert_close(added[kept], 2 * whole[kept], 1e-12)
    assert abs(float(kept.double().mean()) - 0.5) < 0.1
