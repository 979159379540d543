"""Options that the earlier implementation lacks: width of points, rotation, axis scales."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from block_scenes import (
    EMBED,
    EXACT,
    HEADS,
    Arguments,
    assert_matches_specification,
    by_weights,
    coo_arguments,
    distinct_scene,
    gradients,
    make_arguments,
    make_block,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Scene, assert_close, plan_by_triton, scene_2d, scenes
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, export_state_dict
from vicinal._utils.types import BackendName

SCALES = (0.3, 4.0, 1.5)
WIDTH = 5

OPTIONS: dict[str, dict[str, Any]] = {
    "point_dim": {"point_dim": WIDTH},
    "rotary": {"rotary": False},
    "rope_axis_scales": {"rope_axis_scales": SCALES[:2]},
    "widths and scales": {"point_dim": 17, "rope_axis_scales": SCALES[:2]},
    "widths alone": {"point_dim": WIDTH, "rotary": False},
    "rotary_values": {"rotary_values": True, "rope_axis_scales": SCALES[:2]},
}
EACH_OPTION = pytest.mark.parametrize("name", OPTIONS)


def arguments_for(
    block: Any, scene: Scene, *, background: bool = False, **options: Any
) -> Arguments:
    """Random arguments that the block takes: no background where it rotates values."""
    background = background and not block.rotary_values
    width = block.kv_proj.in_features
    return make_arguments(scene, point_dim=width, background=background, **options)


# ------------------------------------------------------------------------ values and gradients


@given(
    scene=scenes(),
    background=st.booleans(),
    levels=st.booleans(),
    mask=st.booleans(),
    norm_first=st.booleans(),
    bias=st.booleans(),
    pattern=st.sampled_from(["single", "partition", "closure"]),
    point_dim=st.sampled_from([None, 1, 5, 17]),
    rotation=st.sampled_from(["none", "scaled", "plain", "of values", "scaled, of values"]),
)
@settings(max_examples=25)
def test_output_and_gradients_match_the_specification(
    backend: BackendName,
    scene: Scene,
    background: bool,
    levels: bool,
    mask: bool,
    norm_first: bool,
    bias: bool,
    pattern: str,
    point_dim: int | None,
    rotation: str,
) -> None:
    scales = SCALES[: scene.pyramid.position_dim] if "scaled" in rotation else None
    block = make_block(
        scene,
        backend,
        norm_first=norm_first,
        bias=bias,
        rope_freq_group_pattern=pattern,
        point_dim=point_dim,
        rotary=rotation != "none",
        rope_axis_scales=scales,
        rotary_values="of values" in rotation,
    )
    arguments = arguments_for(block, scene, background=background, levels=levels, mask=mask)
    assert_matches_specification(block, scene, arguments)


@EACH_OPTION
@pytest.mark.parametrize("background", [False, True])
def test_gradcheck(name: str, background: bool, backend: BackendName) -> None:
    scene = scene_2d(n_queries=4, n_points=25)
    block = make_block(scene, backend, **OPTIONS[name])
    background = background and not block.rotary_values  # it takes none
    arguments = arguments_for(block, scene, background=background, levels=True)
    # Away from the borders of cells, where windows change.
    inside = arguments.query_spatial_positions.detach().floor() + 0.3
    leaves = [*arguments.leaves(), *block.parameters()]
    leaves[1] = inside.requires_grad_()
    names = [key for key, _ in block.named_parameters()]

    def attend(query: Tensor, positions: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
        call = arguments._replace(
            query=query,
            query_spatial_positions=positions,
            stacked_feature_maps=arguments.stacked_feature_maps.with_values(values),
            background_embedding=rest[0] if background else None,
        )._asdict()
        parameters = dict(zip(names, rest[background:], strict=True))
        out: Tensor = torch.func.functional_call(block, parameters, (), call)
        return out

    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@EACH_OPTION
def test_back_ends_agree_also_with_dropout(name: str) -> None:
    scene = scene_2d(n_queries=40)
    answers = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        block = make_block(scene, backend, dropout=0.3, **OPTIONS[name])
        arguments = arguments_for(block, scene, background=True, mask=True)
        torch.manual_seed(7)
        out = block(**arguments._asdict())
        answers.append([out, *gradients(out, block, arguments)])
    for left, right in zip(*answers, strict=True):
        assert_close(left, right, EXACT)


@EACH_OPTION
@pytest.mark.parametrize("background", [False, True])
def test_attention_weights_times_values_give_the_output(name: str, background: bool) -> None:
    scene = scene_2d(n_queries=20)
    block = make_block(scene, bias=True, **OPTIONS[name])
    arguments = arguments_for(block, scene, background=background, levels=True, mask=True)
    assert_close(by_weights(block, arguments), block(**arguments._asdict()), EXACT)


def test_points_of_another_width_equal_points_that_are_projected_first(
    backend: BackendName,
) -> None:
    scene = scene_2d(n_queries=20)
    block = make_block(scene, backend, point_dim=WIDTH, bias=True)
    plain = make_block(scene, backend, bias=True)
    widen = torch.randn(EMBED, WIDTH, dtype=torch.float64)
    plain.load_state_dict(block.state_dict() | {"kv_proj.weight": plain.kv_proj.weight})
    with torch.no_grad():
        block.kv_proj.weight.copy_(plain.kv_proj.weight @ widen)
    arguments = arguments_for(block, scene, background=True, levels=True)
    pyramid, background = arguments.stacked_feature_maps, arguments.background_embedding
    assert background is not None
    wide = arguments._replace(
        stacked_feature_maps=pyramid.with_values(pyramid.values @ widen.t()),
        background_embedding=background @ widen.t(),
    )
    assert_close(block(**arguments._asdict()), plain(**wide._asdict()), EXACT)


@pytest.mark.parametrize("background", [False, True])
def test_no_rotation_equals_frequencies_of_zero(background: bool, backend: BackendName) -> None:
    scene = scene_2d(n_queries=20)
    block, plain = make_block(scene, backend, rotary=False), make_block(scene, backend)
    plain.load_state_dict(block.state_dict(), strict=False)
    with torch.no_grad():
        plain.pos_encoding.freqs[0].zero_()
    arguments = arguments_for(block, scene, background=background, levels=True)
    out = block(**arguments._asdict())
    assert_close(out, plain(**arguments._asdict()), EXACT)
    others = torch.zeros(20, dtype=torch.int64)
    at_others = block(**arguments._replace(query_level_indices=others)._asdict())
    assert torch.equal(out, at_others), "levels act through the rotation alone"
    assert not torch.equal(
        make_block(scene, backend)(**arguments._asdict()),
        make_block(scene, backend)(**arguments._replace(query_level_indices=others)._asdict()),
    )


def test_scales_of_one_change_nothing(backend: BackendName) -> None:
    scene = scene_2d(n_queries=20)
    block = make_block(scene, backend, rope_axis_scales=[1, 1])
    plain = make_block(scene, backend)
    plain.load_state_dict(block.state_dict(), strict=True)
    arguments = arguments_for(block, scene, background=True)._asdict()
    assert torch.equal(block(**arguments), plain(**arguments))


@EACH_OPTION
@pytest.mark.parametrize("background", [False, True])
def test_a_map_that_repeats_has_no_seam(name: str, background: bool, backend: BackendName) -> None:
    """The map moved along its periodic axis gives the same result."""
    options = {"rope_spatial_base_theta": 20.0} | OPTIONS[name]
    block: Any = SparseNeighborhoodAttentionBlock(
        EMBED, HEADS, 2, [5, 3], backend=backend, **options
    ).double()
    coordinates = torch.stack([torch.randint(0, size, (90,)) for size in (2, 12, 9)], 1)
    values = torch.randn(90, block.kv_proj.in_features, dtype=torch.float64)
    query, positions = torch.randn(30, EMBED).double(), torch.rand(30, 2).double() * 30 - 8
    background = background and not block.rotary_values  # it takes none
    cells = torch.randn(2, 2, values.shape[1], dtype=torch.float64) if background else None
    outs: list[Tensor] = []
    for shift in (0, 6):
        moved = coordinates + torch.tensor([0, shift, 0])
        moved[:, 1] %= 12
        pyramid = FeaturePyramid.from_points(
            moved, values, (12, 9), 2, strides=((1, 1), (2, 3)), periodic_axes=[0]
        )
        here = positions + torch.tensor([shift, 0])
        outs.append(block(query, here, torch.tensor([0, 17, 30]), pyramid, None, cells))
    assert ((outs[0] - query).abs() > 1e-6).any()
    assert_close(outs[0], outs[1], EXACT)


def test_layers_that_share_a_plan_have_their_own_scales() -> None:
    """Such plans hold the coordinates of keys, which all layers read."""
    pytest.importorskip("triton")
    scene = scene_2d(n_queries=20)
    plan = plan_by_triton(scene, torch.device("cpu"))
    for scales in (None, SCALES[:2], (2.0, 2.0), None):
        block = make_block(scene, rope_axis_scales=scales)
        arguments = arguments_for(block, scene)
        expected = block(**arguments._asdict())
        assert_close(block(**arguments._asdict(), plan=plan), expected, EXACT)
        assert_matches_specification(block, scene, arguments)


# ------------------------------------------------------------------------------ other arguments


@EACH_OPTION
def test_pyramid_and_sparse_map_give_equal_results(name: str, backend: BackendName) -> None:
    scene = distinct_scene()
    block = make_block(scene, backend, **OPTIONS[name])
    arguments = arguments_for(block, scene, background=True)
    call, coo, order = coo_arguments(arguments)
    outs = block(**arguments._asdict()), block(**call)
    assert_close(*outs, 1e-13)
    (grad,) = torch.autograd.grad(outs[0].sin().sum(), arguments.stacked_feature_maps.values)
    outs[1].sin().sum().backward()
    assert coo.grad is not None
    assert_close(coo.grad.coalesce().values(), grad[order], 1e-12)


@EACH_OPTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_modules(name: str, dtype: torch.dtype, backend: BackendName) -> None:
    scene = scene_2d(n_queries=40)
    block = make_block(scene, backend, norm_first=False, **OPTIONS[name])
    wide = arguments_for(block, scene, background=True)
    narrow_block = copy.deepcopy(block).to(dtype)
    block.load_state_dict(narrow_block.state_dict())
    out = narrow_block(**wide.to(dtype)._asdict())
    assert out.dtype == dtype
    assert_close(out.double(), block(**wide._asdict()), 24 * torch.finfo(dtype).eps)
    out.float().sum().backward()
    assert all(parameter.grad.dtype == dtype for parameter in narrow_block.parameters())


@EACH_OPTION
def test_autocast(name: str, backend: BackendName) -> None:
    scene = scene_2d(n_queries=40)
    block = make_block(scene, backend, **OPTIONS[name]).float()
    arguments = arguments_for(block, scene, background=True).to(torch.float32)._asdict()
    expected = block(**arguments) - arguments["query"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(**arguments) - arguments["query"]
    assert 0 < (out - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    "name", ["rotary", "widths and scales", "rotary_values"]
)  # compiling takes long
def test_one_compiled_graph_for_any_number_of_points(name: str) -> None:
    scene = scene_2d()
    block = make_block(scene, "cpu", **OPTIONS[name])

    def attend(x: Tensor, positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid) -> Tensor:
        out: Tensor = block(x, positions, offsets, pyramid)
        return out

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_points in (40, 70):
        other = scene_2d(n_queries=n_points // 2, n_points=n_points)
        call = arguments_for(block, other)[:4]
        with torch._dynamo.config.patch(error_on_recompile=n_points == 70):
            outs = compiled(*call), attend(*call)
        assert_close(*outs, 1e-12)
        ours, theirs = (
            torch.autograd.grad(out.sin().sum(), list(block.parameters())) for out in outs
        )
        for left, right in zip(ours, theirs, strict=True):
            assert_close(left, right, EXACT)


class OnTensors(nn.Module):
    """A block with its arguments as tensors."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, query: Tensor, positions: Tensor, offsets: Tensor, values: Tensor, rows: Tensor
    ) -> Tensor:
        shapes = ((6, 4), (5, 5), (9, 8))
        pyramid = FeaturePyramid(values, rows, shapes, 3, check_contents=False)
        out: Tensor = self.block(query, positions, offsets, pyramid)
        return out


@EACH_OPTION
def test_exported_programs(name: str) -> None:
    scene = scene_2d()
    block = make_block(scene, "cpu", **OPTIONS[name])
    module, arguments = OnTensors(block), arguments_for(block, scene)
    pyramid = arguments.stacked_feature_maps
    call = tuple(x.detach() for x in (*arguments[:3], pyramid.values, pyramid.coordinates))
    exported = torch.export.export(module, call).module()
    assert_close(exported(*call), module(*call), 1e-13)


# --------------------------------------------------------------------------------- parameters


@EACH_OPTION
@pytest.mark.parametrize("bias", [False, True])
def test_parameters_by_name_and_shape(name: str, bias: bool) -> None:
    block = make_block(scene_2d(), bias=bias, **OPTIONS[name])
    width = OPTIONS[name].get("point_dim", EMBED)
    shapes = {
        "norm.weight": (EMBED,),
        "norm.bias": (EMBED,),
        "q_in_proj.weight": (EMBED, EMBED),
        "q_in_proj.bias": (EMBED,),
        "pos_encoding.freqs.0": (3, HEADS, EMBED // HEADS // 2),
        "kv_proj.weight": (2 * EMBED, width),
        "kv_proj.bias": (2 * EMBED,),
        "out_proj.weight": (EMBED, EMBED),
        "out_proj.bias": (EMBED,),
    }
    if not OPTIONS[name].get("rotary", True):
        del shapes["pos_encoding.freqs.0"]
    names = [key for key in shapes if bias or "bias" not in key or "norm" in key]
    assert [key for key, _ in block.named_parameters()] == names
    assert {key: tuple(x.shape) for key, x in block.state_dict().items()} == {
        key: shapes[key] for key in names
    }


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))]
)
@EACH_OPTION
def test_copies_are_equal(name: str, duplicate: Callable[[nn.Module], Any]) -> None:
    scene = scene_2d()
    block = make_block(scene, **OPTIONS[name])
    arguments = arguments_for(block, scene, background=True)._asdict()
    assert torch.equal(duplicate(block)(**arguments), block(**arguments))
    other = make_block(scene, **OPTIONS[name])
    other.load_state_dict(block.state_dict(), strict=True)
    assert torch.equal(other(**arguments), block(**arguments))


@EACH_OPTION
def test_made_on_the_meta_device_and_initialized_later(name: str) -> None:
    scene = scene_2d()
    with torch.device("meta"):
        block = make_block(scene, **OPTIONS[name])
    call = arguments_for(block, scene, background=True, levels=True)
    on_meta = {key: value.to("meta") for key, value in call._asdict().items() if value is not None}
    assert block(**on_meta).shape == (12, EMBED)
    block = block.to_empty(device="cpu")
    block.reset_parameters()
    assert_matches_specification(block, scene, call)


def test_reset_parameters_draws_all_of_them() -> None:
    for options in OPTIONS.values():
        block = make_block(scene_2d(), bias=True, **options)
        before = {key: value.clone() for key, value in block.state_dict().items()}
        block.reset_parameters()
        for key, value in block.state_dict().items():
            assert (value != before[key]).all() or key == "norm.bias", key


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_axis_scales_as_any_sequence(kind: Any) -> None:
    block = SparseNeighborhoodAttentionBlock(12, 2, rope_axis_scales=kind([2.0, 0.5]))
    assert block.rope_axis_scales == (2.0, 0.5)
    assert SparseNeighborhoodAttentionBlock(12, 2).rope_axis_scales is None


def test_groups_of_frequencies_do_not_matter_without_rotation() -> None:
    SparseNeighborhoodAttentionBlock(32, 2, rope_freq_group_pattern="closure", rotary=False)


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("point_dim", 0, "0"),
        ("point_dim", -3, "-3"),
        ("point_dim", 8.0, "8.0"),
        ("point_dim", True, "True"),
        ("rotary_values", 1, "1"),
        ("rotary", "none", "none"),
        ("rotary", None, "None"),
        ("rope_axis_scales", (1.0,), "(1.0,)"),
        ("rope_axis_scales", (1.0, 2.0, 3.0), "3.0"),
        ("rope_axis_scales", 2.0, "2.0"),
        ("rope_axis_scales", (1.0, 0.0), "0.0"),
        ("rope_axis_scales", (1.0, -2.0), "-2.0"),
        ("rope_axis_scales", (1.0, math.inf), "inf"),
        ("rope_axis_scales", torch.tensor([math.nan, 1.0]), "[2]"),
        ("rope_axis_scales", torch.ones(1, 2), "[1, 2]"),
        ("rope_axis_scales", torch.ones(2, device="meta"), "meta"),
        ("rope_axis_scales", torch.ones(2, dtype=torch.bool), "bool"),
        ("rope_axis_scales", ("1", "2"), "1"),
        ("rope_axis_scales", "12", "12"),
        ("rope_axis_scales", {0: 1.0, 1: 2.0}, "dict"),
    ],
)
@pytest.mark.parametrize("rotary", [True, False])
def test_invalid_options_raise(argument: str, value: Any, came: str, rotary: bool) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected") as refusal:
        SparseNeighborhoodAttentionBlock(12, 2, **{"rotary": rotary, argument: value})
    assert came in str(refusal.value).split("got")[-1]


def test_rotated_values_without_rotation_or_with_a_background_raise() -> None:
    with pytest.raises(ValueError, match=r"^rotary_values: expected False with rotary=False, got"):
        SparseNeighborhoodAttentionBlock(12, 2, rotary=False, rotary_values=True)
    scene = scene_2d()
    block = make_block(scene, rotary_values=True)
    arguments = make_arguments(scene, background=True)
    for method in (block, block.attention_weights):
        with pytest.raises(ValueError, match=r"^background_embedding: expected None .*, got"):
            method(**arguments._asdict())


def test_results_tell_where_points_lie_with_rotated_values_alone(backend: BackendName) -> None:
    """A query that sees one point: without them its place has no effect on the result."""
    query, offsets = torch.randn(1, EMBED).double(), torch.tensor([0, 1])
    value = torch.randn(1, EMBED).double()
    for rotary_values in (False, True):
        block: Any = SparseNeighborhoodAttentionBlock(
            EMBED, HEADS, 1, [5], rotary_values=rotary_values, backend=backend
        ).double()
        outs = []
        for column, moved in ((3, 0), (4, 0), (4, 1)):
            point = torch.tensor([[0, 3, column + moved]])
            pyramid = FeaturePyramid.from_points(point, value, (9, 9), 1, strides=[1])
            outs.append(block(query, torch.tensor([[3.2, 3.9 + moved]]), offsets, pyramid))
        assert torch.equal(outs[0], outs[1]) != rotary_values
        assert_close(outs[1], outs[2], EXACT)


@pytest.mark.parametrize("width", [EMBED, WIDTH + 1])
def test_points_and_background_of_another_width_raise(width: int) -> None:
    scene = distinct_scene()
    block = make_block(scene, point_dim=WIDTH)
    right = arguments_for(block, scene, background=True)
    wrong = make_arguments(scene, background=True, point_dim=width)
    coo, _, _ = coo_arguments(wrong)
    right_coo, _, _ = coo_arguments(right)
    for name, call in (
        ("stacked_feature_maps", coo | {"background_embedding": right.background_embedding}),
        ("stacked_feature_maps", right._asdict() | {"stacked_feature_maps": wrong[3]}),
        ("background_embedding", right_coo | {"background_embedding": wrong.background_embedding}),
        ("query", right_coo | {"query": right.query[:, :WIDTH]}),
    ):
        came = WIDTH if name == "query" else width
        for method in (block, block.attention_weights):
            with pytest.raises(ValueError, match=rf"^{name}: expected .* got .*, {came}\]"):
                method(**call)


def test_points_of_another_width_than_the_queries_are_no_queries() -> None:
    scene = scene_2d()
    block = make_block(scene, point_dim=WIDTH)
    for width in (WIDTH, EMBED):
        values = torch.randn(len(scene.pyramid), width, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"^point_dim: expected .*12.* got int 5"):
            block.encode(scene.pyramid.with_values(values))
    same = make_block(scene, point_dim=EMBED)
    values = torch.randn(len(scene.pyramid), EMBED, dtype=torch.float64)
    assert same.encode(scene.pyramid.with_values(values)).values.shape == values.shape


@EACH_OPTION
def test_blocks_that_the_earlier_implementation_lacks_are_not_exported(name: str) -> None:
    block = make_block(scene_2d(), **OPTIONS[name])
    model = nn.ModuleDict({"first": make_block(scene_2d()), "second": block})
    for module in (block, model):
        with pytest.raises(ValueError, match=r"^module: expected ") as refusal:
            export_state_dict(module)
        for option in OPTIONS[name]:
            assert option in str(refusal.value).split("got")[-1]
    assert "second" in str(refusal.value)


def test_options_that_change_nothing_are_exported() -> None:
    torch.manual_seed(0)
    plain = SparseNeighborhoodAttentionBlock(12, 2)
    block = SparseNeighborhoodAttentionBlock(12, 2, point_dim=12, rope_axis_scales=(1.0, 1.0))
    block.load_state_dict(export_state_dict(plain), strict=True)
    exported, expected = export_state_dict(block), export_state_dict(plain)
    assert list(exported) == list(expected)
    assert all(torch.equal(exported[key], value) for key, value in expected.items())
