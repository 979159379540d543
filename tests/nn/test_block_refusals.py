"""Invalid arguments of the neighborhood attention block, with and without checks of contents."""

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_scenes import EMBED, EXACT, coo_arguments, distinct_scene, make_arguments, make_block
from problems import Shapes, assert_close, make_scene, sparse_coo
from torch import Tensor

from vicinal import FeaturePyramid, NeighborhoodPlan, SparseNeighborhoodAttentionBlock
from vicinal._utils.types import BackendName

# -------------------------------------------------------------------------------------- constructor


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("embed_dim", 10, "10"),  # not a multiple of 4 heads
        ("embed_dim", 12, "12 (3)"),  # an odd head width
        ("embed_dim", 0, "0"),
        ("embed_dim", 16.0, "16.0"),
        ("n_heads", 0, "0"),
        ("n_heads", -4, "-4"),
        ("n_levels", 0, "0"),
        ("position_dim", 0, "0"),
        ("position_dim", 2.0, "2.0"),
        ("neighborhood_sizes", [3, 5, 7], "[3, 5, 7]"),
        ("neighborhood_sizes", [3, 5, 7, 9, 11], "[3, 5, 7, 9, 11]"),
        ("neighborhood_sizes", [3, 5, 6, 9], "[3, 5, 6, 9]"),
        ("neighborhood_sizes", [3, 5, (0, 1), 9], "[3, 5, (0, 1), 9]"),
        ("neighborhood_sizes", [3, 5, -7, 9], "[3, 5, -7, 9]"),
        ("neighborhood_sizes", [3, 5, 7.0, 9], "7.0"),
        ("dropout", 1.0, "1.0"),
        ("dropout", -0.1, "-0.1"),
        ("dropout", 2, "2"),
        ("dropout", math.nan, "nan"),
        ("freq_group_pattern", "double", "double"),
        ("backend", "cuda", "cuda"),
    ],
)
def test_invalid_constructor_arguments_raise(argument: str, value: object, came: str) -> None:
    name = f"rope_{argument}" if argument.startswith("freq") else argument
    options: dict[str, Any] = {"embed_dim": 16, "n_heads": 4} | {name: value}
    with pytest.raises(ValueError, match="expected") as refusal:
        SparseNeighborhoodAttentionBlock(**options)
    message = str(refusal.value)
    assert argument in message.split(":")[0]
    assert came in message.split("got")[-1]


def test_unequal_frequency_groups_raise_unless_allowed() -> None:
    # 16 channels per head are 8 pairs, which three groups cannot share evenly.
    with pytest.raises(ValueError, match="equal frequency groups"):
        SparseNeighborhoodAttentionBlock(32, 2, rope_freq_group_pattern="closure")
    block = SparseNeighborhoodAttentionBlock(
        32, 2, rope_freq_group_pattern="closure", rope_enforce_freq_groups_equal=False
    )
    assert [f.shape[-1] for f in block.pos_encoding.freqs] == [3, 3, 2]


# -------------------------------------------------------------------- forward and attention_weights


SCENE = distinct_scene()


N_POINTS = len(SCENE.pyramid)


SHAPES = ((6, 4), (5, 5), (9, 8))


def valid_call() -> dict[str, Any]:
    """A valid call with every argument: 14 queries, 3 images, 3 levels, a map of 9 x 8."""
    arguments = make_arguments(SCENE, background=True, levels=True, mask=True)
    return coo_arguments(arguments)[0]


def coo_map(change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(valid_call()["stacked_feature_maps"].detach())


def with_point(row: list[int]) -> Tensor:
    """The map of the valid call with one more point."""

    def add(coo: Tensor) -> Tensor:
        indices = torch.cat((coo.indices(), torch.tensor(row)[:, None]), 1)
        values = torch.cat((coo.values(), coo.values()[:1]))
        return sparse_coo(indices, values, coo.shape)

    return coo_map(add)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64} | options)


def changed(name: str, row: int, value: float) -> Tensor:
    tensor: Tensor = valid_call()[name].detach().clone()
    tensor[row] = value
    return tensor


INVALID: list[tuple[str, Any, str]] = [
    ("query", zeros(14), "[14]"),
    ("query", zeros(14, 10), "[14, 10]"),
    ("query", zeros(14, 12, 1), "[14, 12, 1]"),
    ("query", zeros(14, 12, dtype=torch.int64), "int64"),
    ("query", zeros(14, 12).to_sparse(), "sparse_coo"),
    ("query", None, "None"),
    ("query_spatial_positions", zeros(13, 2), "[13, 2]"),
    ("query_spatial_positions", zeros(14, 3), "[14, 3]"),
    ("query_spatial_positions", zeros(28), "[28]"),
    ("query_spatial_positions", zeros(14, 2, dtype=torch.int64), "int64"),
    ("query_spatial_positions", zeros(14, 2, dtype=torch.bool), "bool"),
    ("query_spatial_positions", zeros(14, 2, device="meta"), "meta"),
    ("query_batch_offsets", torch.tensor([[0, 6, 6, 14]]), "[1, 4]"),
    ("query_batch_offsets", zeros(4), "float64"),
    ("query_batch_offsets", [0, 6, 6, 14], "list"),
    ("stacked_feature_maps", coo_map(Tensor.to_dense), "[3, 9, 8, 3, 12]"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense().to_sparse()), "sparse_coo"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense().to_sparse(3)), "sparse_coo"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense()[..., 0].to_sparse(3)), "[3, 9, 8, 3]"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense()[..., :6].to_sparse(4)), "6]"),
    ("stacked_feature_maps", coo_map(lambda x: x.float()), "float32"),
    ("stacked_feature_maps", coo_map(lambda x: x.to("meta")), "meta"),
    ("stacked_feature_maps", None, "None"),
    ("level_spatial_shapes", torch.tensor([6, 4]), "[2]"),
    ("level_spatial_shapes", torch.tensor(SHAPES).double(), "float64"),
    ("level_spatial_shapes", torch.tensor(SHAPES[1:]), "((5, 5), (9, 8))"),
    ("level_spatial_shapes", torch.tensor([(6, 4, 1), (5, 5, 1), (9, 8, 1)]), "1"),
    ("level_spatial_shapes", torch.tensor([(6, 4), (5, 0), (9, 8)]), "0"),
    ("level_spatial_shapes", torch.tensor([(6, 4), (5, -5), (9, 8)]), "-5"),
    ("level_spatial_shapes", None, "None"),
    ("background_embedding", zeros(3, 3), "[3, 3]"),
    ("background_embedding", zeros(2, 3, 12), "[2, 3, 12]"),
    ("background_embedding", zeros(3, 2, 12), "[3, 2, 12]"),
    ("background_embedding", zeros(3, 3, 10), "[3, 3, 10]"),
    ("background_embedding", zeros(3, 3, 12, dtype=torch.int64), "int64"),
    ("background_embedding", zeros(3, 3, 12, device="meta"), "meta"),
    ("query_level_indices", zeros(13, dtype=torch.int64), "[13]"),
    ("query_level_indices", zeros(14, 1, dtype=torch.int64), "[14, 1]"),
    ("query_level_indices", zeros(14), "float64"),
    ("query_level_indices", zeros(14, dtype=torch.bool), "bool"),
    ("query_level_indices", changed("query_level_indices", 5, 3), "3"),
    ("query_level_indices", changed("query_level_indices", 5, -1), "-1"),
    ("query_level_indices", zeros(14, dtype=torch.int64, device="meta"), "meta"),
    ("query_mask", zeros(13, dtype=torch.bool), "[13]"),
    ("query_mask", zeros(14, 1, dtype=torch.bool), "[14, 1]"),
    ("query_mask", zeros(14, dtype=torch.int64), "int64"),
    ("query_mask", zeros(14, dtype=torch.bool, device="meta"), "meta"),
]  # fmt: skip


# Errors that can only be found by reading the contents of a tensor.
INVALID_CONTENTS: list[tuple[str, Any, str]] = [
    ("query_spatial_positions", changed("query_spatial_positions", 5, math.nan), "nan"),
    ("query_spatial_positions", changed("query_spatial_positions", 5, math.inf), "inf"),
    ("query_spatial_positions", changed("query_spatial_positions", 5, -math.inf), "-inf"),
    ("query_batch_offsets", torch.tensor([0, 9, 6, 14]), "6 after 9"),
    ("query_batch_offsets", torch.tensor([1, 6, 6, 14]), "from 1"),
    ("query_batch_offsets", torch.tensor([0, 6, 6, 13]), "to 13"),
    ("query_batch_offsets", torch.tensor([0, 6, 6, 15]), "to 15"),
    ("query_batch_offsets", torch.tensor([0, -1, 6, 14]), "-1 after 0"),
]


def assert_raises_for(call: dict[str, Any], name: str, came: str) -> None:
    """The call raises a ValueError that names the argument ``name``, and changes no state."""
    torch.manual_seed(0)
    block = make_block(SCENE, dropout=0.5)
    state = {key: value.clone() for key, value in block.state_dict().items()}
    tensors = [x for x in call.values() if isinstance(x, Tensor)]
    versions, random = [x._version for x in tensors], torch.get_rng_state()
    with pytest.raises(ValueError, match="expected") as refusal:
        block(**call)
    message = str(refusal.value)
    assert message.startswith(f"{name}:"), message
    assert came in message.split("got")[-1], message
    assert torch.equal(torch.get_rng_state(), random)
    assert [x._version for x in tensors] == versions
    assert all(x.grad is None for x in tensors if x.is_leaf)
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(parameter.grad is None for parameter in block.parameters())


def test_valid_arguments_are_accepted() -> None:
    block = make_block(SCENE, dropout=0.5)
    assert block(**valid_call()).isfinite().all()
    call = valid_call()
    pyramid = FeaturePyramid.from_coo(call["stacked_feature_maps"], SHAPES)
    plan = block.make_plan(SCENE.positions, SCENE.offsets, pyramid)
    assert block(**call, plan=plan).isfinite().all()


@pytest.mark.parametrize(("name", "value", "came"), INVALID)
@pytest.mark.parametrize("planned", [False, True])
def test_invalid_arguments_raise(name: str, value: Any, came: str, planned: bool) -> None:
    plan = {"plan": SCENE.plan()} if planned else {}
    assert_raises_for(valid_call() | {name: value} | plan, name, came)


@pytest.mark.parametrize(("name", "value", "came"), INVALID_CONTENTS)
def test_invalid_contents_raise(name: str, value: Any, came: str) -> None:
    assert_raises_for(valid_call() | {name: value}, name, came)


def other_pyramid(values: Tensor, level_shapes: Shapes = SHAPES) -> FeaturePyramid:
    coordinates = torch.zeros(len(values), 4, dtype=torch.int64, device=values.device)
    return FeaturePyramid(values, coordinates, level_shapes, 3)


@pytest.mark.parametrize(
    ("name", "pyramid", "shapes", "came"),
    [
        ("stacked_feature_maps", other_pyramid(zeros(2, 10)), None, "[2, 10]"),
        ("stacked_feature_maps", other_pyramid(zeros(2, 12).float()), SHAPES, "float32"),
        ("stacked_feature_maps", other_pyramid(zeros(2, 12).to("meta")), None, "meta"),
        ("stacked_feature_maps", other_pyramid(zeros(2, 12), SHAPES[:2]), None, "(5, 5)"),
        ("level_spatial_shapes", other_pyramid(zeros(2, 12)), (*SHAPES[:2], (9, 9)), "(9, 9)"),
    ],
)
def test_arguments_that_do_not_match_a_pyramid_raise(
    name: str, pyramid: FeaturePyramid, shapes: Shapes | None, came: str
) -> None:
    beside = {"stacked_feature_maps": pyramid, "level_spatial_shapes": shapes}
    assert_raises_for(valid_call() | beside, name, came)


@pytest.mark.parametrize(("name", "value", "came"), INVALID + INVALID_CONTENTS)
def test_invalid_arguments_of_attention_weights_raise(name: str, value: Any, came: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected") as refusal:
        make_block(SCENE).attention_weights(**valid_call() | {name: value})
    assert came in str(refusal.value).split("got")[-1]


@pytest.mark.parametrize(
    ("queries", "came"),
    [
        (torch.tensor([0, 14]), "14"),
        (torch.tensor([[0]]), "[1, 1]"),
        (torch.tensor([0.0]), "float32"),
        ([0], "list"),
    ],
)
def test_invalid_queries_of_attention_weights_raise(queries: Any, came: str) -> None:
    with pytest.raises(ValueError, match=r"^queries: expected") as refusal:
        make_block(SCENE).attention_weights(**valid_call(), queries=queries)
    assert came in str(refusal.value).split("got")[-1]


MISMATCHED_PLANS: dict[str, NeighborhoodPlan] = {
    "queries": make_scene(SHAPES, (3, 5, 3), (6, 0, 7), N_POINTS).plan(),
    "points": make_scene(SHAPES, (3, 5, 3), (6, 0, 8), N_POINTS - 1).plan(),
    "windows": make_scene(SHAPES, (3, 5, 5), (6, 0, 8), N_POINTS).plan(),
    "dimensions": make_scene(((6,), (5,), (9,)), (3, 5, 3), (6, 0, 8), N_POINTS).plan(),
}


@pytest.mark.parametrize("what", MISMATCHED_PLANS)
def test_plan_that_does_not_match_the_inputs_raises(what: str) -> None:
    assert_raises_for(valid_call() | {"plan": MISMATCHED_PLANS[what]}, "plan", "NeighborhoodPlan(")


# ---------------------------------------------------------------- more invalid arguments of forward


@pytest.mark.parametrize(
    ("row", "came"),
    [([0, 6, 2, 0], "[6, 2] at level 0"), ([1, 2, 5, 1], "[2, 5] at level 1")],
)
def test_point_outside_its_level_raises_for_stacked_feature_maps(row: list[int], came: str) -> None:
    assert_raises_for(
        valid_call() | {"stacked_feature_maps": with_point(row)}, "stacked_feature_maps", came
    )


@pytest.mark.parametrize(("name", "value", "came"), INVALID_CONTENTS)
def test_invalid_contents_raise_when_a_plan_is_given(name: str, value: Any, came: str) -> None:
    assert_raises_for(valid_call() | {name: value, "plan": SCENE.plan()}, name, came)


def test_offsets_on_another_device_raise() -> None:
    offsets = valid_call()["query_batch_offsets"].to("meta")
    for plan in ({}, {"plan": SCENE.plan()}):
        assert_raises_for(
            valid_call() | {"query_batch_offsets": offsets} | plan, "query_batch_offsets", "meta"
        )


def test_level_shapes_as_a_flat_list_raise() -> None:
    assert_raises_for(valid_call() | {"level_spatial_shapes": [9, 8]}, "level_spatial_shapes", "9")


def test_query_on_another_device_than_the_module_raises() -> None:
    block = make_block(SCENE).to("meta")
    with pytest.raises(ValueError, match=r"query: expected .*meta.* got .*cpu"):
        block(**valid_call())


def test_background_of_another_dtype_raises() -> None:
    call = valid_call() | {"background_embedding": zeros(3, 3, 12).float()}
    assert_raises_for(call, "background_embedding", "float32")


def test_plan_for_another_batch_size_raises() -> None:
    plan = make_scene(SHAPES, (3, 5, 3), (6, 8), N_POINTS).plan()
    call = valid_call() | {"plan": plan, "background_embedding": None}
    assert_raises_for(call, "plan", "NeighborhoodPlan(")


# ------------------------------------------------------- contents that are not checked, as on a GPU


@pytest.fixture
def contents_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable the checks that read contents, as on devices where they would synchronize."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vicinal") and hasattr(module, "reads_contents"):
            monkeypatch.setattr(module, "reads_contents", lambda *_: False)


def assert_excluded(
    bad_call: dict[str, Any], good_call: dict[str, Any], queries: list[int], backend: BackendName
) -> None:
    """In ``bad_call``, ``queries`` keep their residual; the rest is as in ``good_call``."""
    block = make_block(SCENE, backend)
    good, bad = block(**good_call), block(**bad_call)
    rest = [query for query in range(14) if query not in queries]
    assert (good != good_call["query"]).any(1).all()
    assert torch.equal(bad[queries], bad_call["query"][queries])
    assert_close(bad[rest], good[rest], 1e-12)
    weights = torch.zeros_like(good)
    weights[rest] = torch.randn(len(rest), EMBED, dtype=torch.float64)
    leaves = list(block.parameters())
    for left, right in zip(
        torch.autograd.grad((bad * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((good * weights).sum(), leaves),
        strict=True,
    ):
        assert_close(left, right, EXACT)
    # Gradients stay finite when the outputs of the excluded queries are used as well.
    grads = torch.autograd.grad(bad.sum(), [*leaves, bad_call["query"]])
    assert all(grad.isfinite().all() for grad in grads)


def unmasked_call(background: bool) -> dict[str, Any]:
    """The valid call without a mask, with every query inside the map."""
    call = valid_call() | {"query_mask": None}
    positions = call["query_spatial_positions"].detach() % torch.tensor([9, 8])
    call["query_spatial_positions"] = positions
    return call if background else call | {"background_embedding": None}


@pytest.mark.usefixtures("contents_unchecked")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_queries_with_nonfinite_positions_are_excluded(
    value: float, background: bool, backend: BackendName
) -> None:
    call = unmasked_call(background)
    positions = call["query_spatial_positions"].clone()
    positions[3], positions[9, 1] = value, value
    bad = call | {"query_spatial_positions": positions}
    assert_excluded(bad, call, [3, 9], backend)


@pytest.mark.usefixtures("contents_unchecked")
@pytest.mark.parametrize("background", [False, True])
def test_queries_outside_all_offsets_are_excluded(background: bool, backend: BackendName) -> None:
    call = unmasked_call(background)
    bad = call | {"query_batch_offsets": torch.tensor([1, 6, 6, 12])}
    assert_excluded(bad, call, [0, 12, 13], backend)


@pytest.mark.usefixtures("contents_unchecked")
@pytest.mark.parametrize("background", [False, True])
def test_points_outside_their_level_are_excluded(background: bool, backend: BackendName) -> None:
    call = unmasked_call(background)
    bad = call | {"stacked_feature_maps": with_point([0, 6, 2, 0]).requires_grad_()}
    block = make_block(SCENE, backend)
    good_out, bad_out = block(**call), block(**bad)
    assert_close(bad_out, good_out, 1e-12)
    bad_out.sum().backward()
    grad = bad["stacked_feature_maps"].grad.coalesce()
    added_point = (grad.indices().t() == torch.tensor([0, 6, 2, 0])).all(1)
    assert added_point.sum() == 1
    assert not grad.values()[added_point].any()
    assert grad.values().isfinite().all()


@pytest.mark.usefixtures("contents_unchecked")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("level", [-1, 3, 2**62])
def test_queries_with_invalid_levels_are_excluded(
    level: int, background: bool, backend: BackendName
) -> None:
    call = unmasked_call(background)
    levels = call["query_level_indices"].clone()
    levels[[3, 9]] = level
    assert_excluded(call | {"query_level_indices": levels}, call, [3, 9], backend)


def test_attention_weights_takes_the_arguments_of_forward() -> None:
    scene = distinct_scene()
    block = make_block(scene)
    arguments = make_arguments(scene)
    plan = block.make_plan(*arguments[1:3], arguments[3])
    with pytest.raises(TypeError, match=r"SparseNeighborhoodAttentionBlock\.attention_weights"):
        block.attention_weights(*arguments[:4], no_such_argument=1)
    with pytest.raises(TypeError, match=r"SparseNeighborhoodAttentionBlock\.attention_weights"):
        block.attention_weights(*arguments[:3])
    with pytest.raises(TypeError):
        block.attention_weights(*arguments[:4], None, None, None, None, plan)
