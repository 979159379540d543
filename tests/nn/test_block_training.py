"""The neighborhood attention block in training: dropout, hooks, precision and state dicts."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import golden_cases
import pytest
import torch
from block_scenes import EMBED, EXACT, HEADS, gradients, make_arguments, make_block
from problems import Scene, assert_close, full_window_scene, scene_2d
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal._utils.types import BackendName
from vicinal.backends import chunks

# ------------------------------------------------------------------------------------------ dropout


def test_dropout_is_active_in_training_only(backend: BackendName) -> None:
    scene = scene_2d(n_queries=200, n_points=200)
    arguments = make_arguments(scene, background=True)._asdict()
    block = make_block(scene, backend, dropout=0.4)
    plain = make_block(scene, backend)
    plain.load_state_dict(block.state_dict())

    def seeded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        added: Tensor = block(**arguments) - arguments["query"]
        return added

    first, again, other = seeded(1), seeded(1), seeded(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # The output dropout sets elements of the projected output to zero ...
    dropped = first == 0
    assert abs(float(dropped.double().mean()) - 0.4) < 4 * math.sqrt(0.24 / first.numel())
    # ... and the remaining elements show the dropout of the attention weights.
    full = plain(**arguments) - arguments["query"]
    assert ((first * 0.6 - full).abs()[~dropped] > 1e-9).all()
    block.eval()
    state = torch.get_rng_state()
    assert torch.equal(seeded(1), full)
    torch.set_rng_state(state)
    block(**arguments)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws no random numbers"


def test_output_dropout_follows_the_mode_of_its_module(backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend, dropout=0.4).eval()
    arguments = make_arguments(scene)._asdict()
    whole = block(**arguments) - arguments["query"]
    block.dropout.train()
    added = block(**arguments) - arguments["query"]
    assert_close(added[added != 0], (whole / 0.6)[added != 0], EXACT)
    assert 0.2 < float((added == 0).double().mean()) < 0.6


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"dropout": 0.3}, {"norm_first": False}])
def test_results_do_not_depend_on_the_chunk_size(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_2d(n_queries=40)
    arguments = make_arguments(scene, background=True, mask=True)
    block = make_block(scene, "cpu", **options)
    answers = []
    for rows in (7, 1000):
        monkeypatch.setattr(chunks, "chunk_rows", lambda x, rows=rows: rows)
        torch.manual_seed(7)
        out = block(**arguments._asdict())
        answers.append([out, *gradients(out, block, arguments)])
    for left, right in zip(*answers, strict=True):
        assert_close(left, right, EXACT)


def test_dropout_is_the_same_on_both_backends() -> None:
    scene = scene_2d(n_queries=40)
    arguments = make_arguments(scene, background=True, mask=True)
    outs, grads = [], []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        block = make_block(scene, backend, dropout=0.3)
        torch.manual_seed(7)
        out = block(**arguments._asdict())
        outs.append(out)
        grads.append(gradients(out, block, arguments))
    assert_close(outs[0], outs[1], 1e-12)
    for left, right in zip(*grads, strict=True):
        assert_close(left, right, EXACT)


# ---------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("background", [False, True])
def test_low_precision_modules(dtype: torch.dtype, background: bool, backend: BackendName) -> None:
    scene = scene_2d(n_queries=40)
    block = make_block(scene, backend, norm_first=False)
    wide = make_arguments(scene, background=background)
    narrow_block = copy.deepcopy(block).to(dtype)
    block.load_state_dict(narrow_block.state_dict())  # both have the same rounded weights
    out = narrow_block(**wide.to(dtype)._asdict())
    assert out.dtype == dtype
    expected = block(**wide._asdict())
    assert_close(out.double(), expected, 24 * torch.finfo(dtype).eps)
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in narrow_block.parameters())
    assert all(parameter.grad.dtype == dtype for parameter in narrow_block.parameters())


@pytest.mark.parametrize("background", [False, True])
def test_float64_positions_with_a_float32_module(background: bool, backend: BackendName) -> None:
    scene = scene_2d(n_queries=20)
    block = make_block(scene, backend).float()
    arguments = make_arguments(scene, background=background).to(torch.float32)
    positions = scene.positions.float()
    narrow = block(**arguments._replace(query_spatial_positions=positions)._asdict())
    wide = block(**arguments._replace(query_spatial_positions=positions.double())._asdict())
    assert wide.dtype == torch.float32
    assert_close(wide, narrow, 1e-5)


def far_scene() -> Scene:
    """Queries and points near cell 300, where bfloat16 has a spacing of two."""
    axis = torch.arange(300, 308)
    cells = torch.cartesian_prod(axis, axis)
    coordinates = torch.nn.functional.pad(cells, (1, 1))
    pyramid = FeaturePyramid(torch.zeros(64, EMBED), coordinates, ((512, 512),), 1)
    return Scene(cells + 0.5, torch.tensor([0, 64]), pyramid, (5,))


@pytest.mark.parametrize("background", [False, True])
def test_autocast_keeps_positions_exact(background: bool, backend: BackendName) -> None:
    scene = far_scene()
    block = make_block(scene, backend).float()
    arguments = make_arguments(scene, background=background).to(torch.float32)._asdict()
    expected = block(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(**arguments)
    size = (expected - arguments["query"]).detach().pow(2).mean().sqrt()
    error = (out - expected).detach().pow(2).mean().sqrt() / size
    rounded = arguments | {
        "query_spatial_positions": scene.positions.bfloat16().float(),
        "plan": scene.plan(),
        "check_contents": False,  # positions have left their cells
    }
    confused = (block(**rounded) - expected).detach().pow(2).mean().sqrt() / size
    assert 0 < error < 0.02
    assert confused > 5 * error, "rounding positions gives a larger error"


def test_bfloat16_positions_are_computed_in_float32(backend: BackendName) -> None:
    scene = scene_2d(n_queries=20)
    block = make_block(scene, backend)
    arguments = make_arguments(scene)._asdict()
    half = scene.positions.bfloat16()
    out = block(**arguments | {"query_spatial_positions": half})
    assert torch.equal(out, block(**arguments | {"query_spatial_positions": half.float()}))


# --------------------------------------------------------------- parameters, state dicts and copies


def test_state_dict_names_and_shapes() -> None:
    for bias in (False, True):
        for pattern, groups in (("single", 1), ("partition", 2), ("closure", 3)):
            block = make_block(scene_2d(), bias=bias, rope_freq_group_pattern=pattern)
            expected = {"norm.weight": (12,), "norm.bias": (12,), "q_in_proj.weight": (12, 12),
                        "kv_proj.weight": (24, 12), "out_proj.weight": (12, 12)}  # fmt: skip
            if bias:
                expected |= {
                    "q_in_proj.bias": (12,),
                    "kv_proj.bias": (24,),
                    "out_proj.bias": (12,),
                }
            state = {name: tuple(value.shape) for name, value in block.state_dict().items()}
            for group in range(groups):
                assert state.pop(f"pos_encoding.freqs.{group}")[1] == HEADS
            assert state == expected
            assert set(block.state_dict()) == set(dict(block.named_parameters()))


def test_kv_proj_holds_keys_before_values(backend: BackendName) -> None:
    # With zero keys all weights are equal, so the output is the projected mean of the values.
    scene = full_window_scene(3, 4)
    block = make_block(scene, backend)
    with torch.no_grad():
        block.kv_proj.weight[:EMBED] = 0
    arguments = make_arguments(scene)
    values = arguments.stacked_feature_maps.values @ block.kv_proj.weight[EMBED:].t()
    expected = arguments.query + block.out_proj(values.mean(0))
    assert_close(block(**arguments._asdict()), expected, 1e-13)


@pytest.mark.parametrize("bias", [False, True])
def test_reset_parameters_draws_new_values(bias: bool) -> None:
    block = make_block(scene_2d(), bias=bias, rope_freq_group_pattern="closure")
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(77.0)
    block.reset_parameters()
    first = {name: value.detach().clone() for name, value in block.named_parameters()}
    assert all((value != 77).all() for value in first.values())
    assert (block.norm.weight == 1).all()
    assert not block.norm.bias.any()
    block.reset_parameters()
    for name, value in block.named_parameters():
        assert name.startswith("norm.") or (value != first[name]).all()
    for layer in (block.q_in_proj, block.kv_proj, block.out_proj):
        fresh = nn.Linear(layer.in_features, 1000).weight
        assert abs(float((layer.weight.std() / fresh.std()).detach()) - 1) < 0.2


@pytest.mark.parametrize("name", golden_cases.NAMES)
@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("prefix", ["", "layers.0.attention."])
def test_loads_checkpoints_of_the_earlier_implementation(
    name: str, buffers: bool, prefix: str
) -> None:
    case = golden_cases.load(name)
    block = SparseNeighborhoodAttentionBlock(**case.config).double()
    module: nn.Module = block
    for part in reversed(prefix.rstrip(".").split(".")) if prefix else ():
        module = nn.ModuleDict({part: module})
    earlier = {
        prefix + key: value
        for key, value in case.state_dict.items()
        if buffers or key.startswith(("norm", "q_", "subset", "out_", "pos_encoding.freqs."))
    }
    constants = {key for key in earlier if "theta" in key or "pos_encoding.freq_" in key}
    assert bool(constants) == buffers
    before = dict(earlier)
    module.load_state_dict(earlier, strict=True)
    assert earlier.keys() == before.keys(), "load_state_dict does not modify its argument"
    for key, value in block.state_dict().items():
        old = key.replace("kv_proj", "subset_attn.kv_proj")
        assert torch.equal(value, case.state_dict[old])
    module.load_state_dict(module.state_dict(), strict=True)


@pytest.mark.parametrize(
    "key", ["unknown", "q_in_proj.bias", "subset_attn.other", "rope_other_base_theta", "kv_proj.x"]
)
def test_unknown_state_dict_keys_raise(key: str) -> None:
    block = make_block(scene_2d())
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}"):
        block.load_state_dict(block.state_dict() | {key: torch.zeros(1)}, strict=True)


@pytest.mark.parametrize("key", ["norm.bias", "kv_proj.weight", "pos_encoding.freqs.0"])
def test_missing_state_dict_keys_raise(key: str) -> None:
    block = make_block(scene_2d())
    state = block.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f"Missing key.*{key}"):
        block.load_state_dict(state, strict=True)


def through_pickle(block: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(block))


def through_a_file(block: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_are_equal_and_independent(duplicate: Callable[[nn.Module], Any]) -> None:
    scene = scene_2d()
    block = make_block(scene, dropout=0.1).eval()
    arguments = make_arguments(scene)._asdict()
    duplicated = duplicate(block)
    assert torch.equal(duplicated(**arguments), block(**arguments))
    assert (duplicated.neighborhood_sizes, duplicated.training, duplicated.dropout.p) == (
        (3, 5, 3),
        False,
        0.1,
    )
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        for parameter in duplicated.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    earlier = {name.replace("kv_", "subset_attn.kv_"): value for name, value in before.items()}
    duplicated.load_state_dict(earlier | {"rope_level_base_theta": torch.tensor(10.0)}, strict=True)
    assert torch.equal(duplicated(**arguments), block(**arguments))


def test_works_under_functional_call() -> None:
    scene = scene_2d()
    block, other = make_block(scene), make_block(scene)
    arguments = make_arguments(scene)._asdict()
    called = torch.func.functional_call(block, dict(other.named_parameters()), (), arguments)
    assert torch.equal(called, other(**arguments))


def test_arguments_are_not_modified(backend: BackendName) -> None:
    scene = scene_2d()
    arguments = make_arguments(scene, background=True, levels=True, mask=True)
    tensors = [x for x in arguments if isinstance(x, Tensor)] + [
        arguments.stacked_feature_maps.values,
        arguments.stacked_feature_maps.coordinates,
    ]
    before = [x._version for x in tensors]
    block = make_block(scene, backend, dropout=0.5)
    block(**arguments._asdict()).sum().backward()
    assert [x._version for x in tensors] == before


# ---------------------------------------------------------------- more invalid arguments of forward


def test_keys_similar_to_earlier_buffers_raise() -> None:
    block = make_block(scene_2d())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*pos_encoding\.unknown"):
        block.load_state_dict(block.state_dict() | {"pos_encoding.unknown": torch.zeros(1)})
