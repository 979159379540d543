"""What the neighborhood attention block computes, against the specification and at edge cases."""

import dataclasses

import pytest
import torch
from block_scenes import (
    EMBED,
    EXACT,
    HEADS,
    assert_matches_specification,
    by_weights,
    coo_arguments,
    distinct_scene,
    gradients,
    make_arguments,
    make_block,
    specification,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Scene,
    assert_close,
    full_window_scene,
    make_scene,
    scene_2d,
    scenes,
    sparse_coo,
)
from torch import Tensor

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal._utils.types import BackendName

# -------------------------------------------------------------------------------- the specification


@given(
    scene=scenes(),
    background=st.booleans(),
    levels=st.booleans(),
    mask=st.booleans(),
    norm_first=st.booleans(),
    bias=st.booleans(),
    share_heads=st.booleans(),
    pattern=st.sampled_from(["single", "partition", "closure"]),
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
    share_heads: bool,
    pattern: str,
) -> None:
    block = make_block(
        scene,
        backend,
        norm_first=norm_first,
        bias=bias,
        rope_share_heads=share_heads,
        rope_freq_group_pattern=pattern,
    )
    arguments = make_arguments(scene, background=background, levels=levels, mask=mask)
    assert_matches_specification(block, scene, arguments)


EDGE_CASES = {
    "empty map": make_scene(((6, 4), (3, 3)), (3, 5), (4, 3), 0),
    "no queries": make_scene(((6, 4), (3, 3)), (3, 5), (0, 0), 20),
    "no images": make_scene(((6, 4), (3, 3)), (3, 5), (), 0),
    "empty images": make_scene(((6, 4), (3, 3)), (3, 5), (0, 5, 0, 4), 30),
    "one point": make_scene(((1, 1), (1, 1)), (3, 5), (2,), 1),
    "one query": make_scene(((6, 4), (3, 3)), (3, 5), (1,), 30),
    "one cell": make_scene(((1, 1),), (1,), (3,), 2),
    "windows wider than the map": make_scene(((3, 2), (2, 5)), (9, 11), (4, 4), 9),
    "finest level first": make_scene(((9, 8), (5, 5)), (3, 5), (6, 3), 40),
    "one dimension": make_scene(((30,), (11,)), (5, 9), (6, 3), 20),
    "four dimensions": make_scene(((3, 2, 3, 2), (2, 2, 1, 1)), (3, 3), (3, 2), 20),
}


@pytest.mark.parametrize("name", EDGE_CASES)
@pytest.mark.parametrize("background", [False, True])
def test_edge_case_scenes(name: str, background: bool, backend: BackendName) -> None:
    scene = EDGE_CASES[name]
    arguments = make_arguments(scene, background=background)
    assert_matches_specification(make_block(scene, backend, bias=True), scene, arguments)


def without_level(scene: Scene, level: int) -> Scene:
    """The scene without the points of one level; the empty level remains."""
    rest = scene.pyramid.levels != level
    pyramid = scene.pyramid
    pyramid = dataclasses.replace(
        pyramid,
        values=pyramid.values[rest],
        coordinates=pyramid.coordinates[rest],
        check_contents=True,
    )
    return dataclasses.replace(scene, pyramid=pyramid)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("level", [0, 2])
def test_a_level_without_points(level: int, background: bool, backend: BackendName) -> None:
    scene = without_level(scene_2d(n_queries=20), level)
    assert (scene.pyramid.levels.bincount(minlength=3) == 0).tolist() == [
        index == level for index in range(3)
    ]
    assert_matches_specification(
        make_block(scene, backend), scene, make_arguments(scene, background=background)
    )


@pytest.mark.parametrize("far", [-50.0, 1e4, 1e9])
def test_queries_far_outside_the_map_keep_their_residual(far: float, backend: BackendName) -> None:
    scene = scene_2d(n_queries=20)
    scene.positions[4] = far
    scene.positions[11, 1] = -far
    block = make_block(scene, backend)
    arguments = make_arguments(scene)
    out = assert_matches_specification(block, scene, arguments)
    assert torch.equal(out[[4, 11]], arguments.query[[4, 11]])


def test_queries_at_1e30_keep_their_residual(backend: BackendName) -> None:
    scene = scene_2d(n_queries=20)
    scene.positions[4], scene.positions[11, 1] = 1e30, -1e30
    arguments = make_arguments(scene)
    out = make_block(scene, backend)(**arguments._asdict())
    assert torch.equal(out[[4, 11]], arguments.query[[4, 11]])
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in arguments.leaves())


def test_empty_map_gives_query_plus_output_bias(backend: BackendName) -> None:
    scene = make_scene(((6, 4),), (3,), (5,), 0)
    arguments = make_arguments(scene)
    block = make_block(scene, backend, bias=True)
    out = block(**arguments._asdict())
    assert_close(out, arguments.query + block.out_proj.bias, 1e-14)
    assert (block.out_proj.bias != 0).all()


def test_explicit_zeros_of_a_sparse_map_are_points(backend: BackendName) -> None:
    scene = full_window_scene(4, 3)
    block = make_block(scene, backend, bias=True)
    arguments = make_arguments(scene)
    zeros = arguments._replace(
        stacked_feature_maps=scene.pyramid.with_values(torch.zeros(3, EMBED).double()[:])
    )
    coo = zeros.stacked_feature_maps.to_coo()
    out = block(*arguments[:3], coo, [(5, 5)])
    assert_close(out, specification(block, scene, zeros), EXACT)
    nothing = sparse_coo(coo.indices()[:, :0], coo.values()[:0], coo.shape)
    without = block(*arguments[:3], nothing, [(5, 5)])
    assert ((out - without).abs() > 1e-6).all(), "the value of an all-zero point is the bias"


# -------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_all_queries_masked(norm_first: bool, background: bool, backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend, norm_first=norm_first, bias=True)
    arguments = make_arguments(scene, background=background)
    arguments = arguments._replace(query_mask=torch.ones(12, dtype=torch.bool))
    out = block(**arguments._asdict())
    residual = arguments.query + block.out_proj.bias
    assert_close(out, residual if norm_first else block.norm(residual), 1e-13)
    names = [*dict(block.named_parameters()), "query", "positions", "map", "background"]
    grads = dict(zip(names, gradients(out, block, arguments), strict=False))
    without_gradient = {"q_in_proj.weight", "q_in_proj.bias", "kv_proj.weight", "kv_proj.bias",
              "pos_encoding.freqs.0", "out_proj.weight", "positions", "map"}  # fmt: skip
    without_gradient |= {"background"} if background else set()
    without_gradient |= {"norm.weight", "norm.bias"} if norm_first else set()
    assert {name for name, grad in grads.items() if not grad.any()} == without_gradient


def test_all_false_mask_equals_no_mask(backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    arguments = make_arguments(scene)
    masked = arguments._replace(query_mask=torch.zeros(12, dtype=torch.bool))
    assert torch.equal(block(**masked._asdict()), block(**arguments._asdict()))


# ----------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("shapes", "finest"), [(((6, 4), (9, 8)), 1), (((9, 8), (6, 4)), 0), (((20, 1), (5, 5)), 1)]
)
def test_default_query_level_is_the_one_with_the_most_cells(
    shapes: tuple[tuple[int, int], ...], finest: int, backend: BackendName
) -> None:
    scene = make_scene(shapes, (5, 5), (9,), 40)
    block = make_block(scene, backend)
    arguments = make_arguments(scene)
    out = block(**arguments._asdict())
    for level in range(2):
        given = torch.full((9,), level, dtype=torch.int32)
        at_level = block(**arguments._replace(query_level_indices=given)._asdict())
        assert torch.equal(at_level, out) == (level == finest)


def test_constructor_defaults() -> None:
    block = SparseNeighborhoodAttentionBlock(64, 4)
    assert block.neighborhood_sizes == (3, 5, 7, 9)
    assert (block.n_levels, block.position_dim, block.norm_first) == (4, 2, True)
    assert block.dropout.p == 0
    assert list(block.state_dict()) == [
        "norm.weight", "norm.bias", "q_in_proj.weight", "pos_encoding.freqs.0",
        "kv_proj.weight", "out_proj.weight",
    ]  # fmt: skip
    torch.manual_seed(0)
    first = block.pos_encoding.freqs[0].detach()
    steps = torch.arange(8) / 8
    for theta, row in zip((100.0, 100.0, 10.0), first, strict=True):
        assert_close(row, row[:, :1] * theta**-steps, 1e-6)


# ----------------------------------------------------------------------------- equivalent arguments


@pytest.mark.parametrize("background", [False, True])
def test_pyramid_and_sparse_map_give_equal_results(background: bool, backend: BackendName) -> None:
    scene = distinct_scene()
    block = make_block(scene, backend)
    arguments = make_arguments(scene, background=background)
    call, coo, order = coo_arguments(arguments)
    from_pyramid, from_coo = block(**arguments._asdict()), block(**call)
    assert_close(from_pyramid, from_coo, 1e-13)
    weights = torch.randn_like(from_coo)
    (pyramid_grad,) = torch.autograd.grad(
        (from_pyramid * weights).sum(), arguments.stacked_feature_maps.values
    )
    (from_coo * weights).sum().backward()
    grad = coo.grad
    assert grad is not None
    assert grad.layout == torch.sparse_coo
    assert torch.equal(grad.coalesce().indices(), coo.detach().indices())
    assert_close(grad.coalesce().values(), pyramid_grad[order], 1e-13)


def test_uncoalesced_map_is_summed(backend: BackendName) -> None:
    scene = distinct_scene()
    block = make_block(scene, backend)
    call, coo, _ = coo_arguments(make_arguments(scene))
    indices, values = coo.detach().indices(), coo.detach().values()
    halves = torch.cat((0.25 * values, 0.75 * values))
    twice = sparse_coo(torch.cat((indices, indices), 1), halves, coo.shape).requires_grad_()
    assert not twice.is_coalesced()
    out = block(**call | {"stacked_feature_maps": twice})
    assert_close(out, block(**call), 1e-12)
    out.sum().backward()
    assert twice.grad is not None
    assert torch.equal(twice.grad.coalesce().indices(), indices)


@pytest.mark.parametrize("background", [False, True])
def test_given_plan_equals_the_plan_built_by_the_block(
    background: bool, backend: BackendName
) -> None:
    scene = scene_2d(n_queries=20)
    arguments = make_arguments(scene, background=background, mask=True)
    plan = scene.plan()
    for block in (make_block(scene, backend), make_block(scene, backend, norm_first=False)):
        built, shared = block(**arguments._asdict()), block(**arguments._asdict(), plan=plan)
        assert torch.equal(built, shared)
        for left, right in zip(
            gradients(built, block, arguments), gradients(shared, block, arguments), strict=True
        ):
            assert_close(left, right, 1e-13)


# -------------------------------------------------------------------------------- attention weights


@given(
    scene=scenes(),
    background=st.booleans(),
    levels=st.booleans(),
    mask=st.booleans(),
    norm_first=st.booleans(),
)
@settings(max_examples=25)
def test_attention_weights_times_values_give_the_output(
    scene: Scene, background: bool, levels: bool, mask: bool, norm_first: bool
) -> None:
    block = make_block(scene, norm_first=norm_first, bias=True, dropout=0.3)
    arguments = make_arguments(scene, background=background, levels=levels, mask=mask)
    whole = by_weights(block, arguments)  # weights are before dropout, even in training mode
    block.eval()
    assert_close(whole, block(**arguments._asdict()), EXACT)
    queries = torch.arange(len(scene.positions))[1::2].flip(0)
    assert_close(by_weights(block, arguments, queries), whole[queries], EXACT)


def test_attention_weights_sum_to_one_or_zero() -> None:
    scene = scene_2d()
    arguments = make_arguments(scene, mask=True)
    weights = make_block(scene).attention_weights(**arguments._asdict())
    row = torch.repeat_interleave(weights.offsets.diff())
    sums = torch.zeros(12, HEADS, dtype=torch.float64).index_add(0, row, weights.weights)
    assert arguments.query_mask is not None
    has_neighbors = (scene.plan().counts() > 0) & ~arguments.query_mask
    assert 0 < has_neighbors.sum() < 12
    assert_close(sums, has_neighbors[:, None].expand(-1, HEADS).double(), 1e-12)


def test_make_plan_uses_the_windows_of_the_block() -> None:
    scene = scene_2d()
    block, arguments = make_block(scene), make_arguments(scene)
    plan = block.make_plan(scene.positions, scene.offsets, scene.pyramid)
    assert plan.neighborhood_sizes == block.neighborhood_sizes == scene.sizes
    assert torch.equal(plan.pairs(), scene.plan().pairs())
    out = block(**arguments._asdict(), plan=plan)
    assert torch.equal(out, block(**arguments._asdict()))
    weights = block.attention_weights(**arguments._asdict(), plan=plan)
    assert torch.equal(weights.points, plan.pairs()[:, 1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
def test_integer_arguments_of_any_dtype(dtype: torch.dtype, backend: BackendName) -> None:
    scene = distinct_scene()
    block = make_block(scene, backend)
    call, _, _ = coo_arguments(make_arguments(scene, levels=True))
    narrow = {
        name: call[name].to(dtype)
        for name in ("query_batch_offsets", "query_level_indices", "level_spatial_shapes")
    }
    assert torch.equal(block(**call | narrow), block(**call))


def test_level_shapes_as_lists(backend: BackendName) -> None:
    scene = distinct_scene()
    block = make_block(scene, backend)
    call, _, _ = coo_arguments(make_arguments(scene))
    listed = call | {"level_spatial_shapes": [[6, 4], [5, 5], [9, 8]]}
    assert torch.equal(block(**listed), block(**call))
    arguments = make_arguments(scene)
    both = arguments._asdict() | {"level_spatial_shapes": torch.tensor(((6, 4), (5, 5), (9, 8)))}
    assert torch.equal(block(**both), block(**arguments._asdict()))


def test_permuting_queries_permutes_the_output(backend: BackendName) -> None:
    # The permutation keeps queries within their image.
    scene = scene_2d(n_queries=40)
    block = make_block(scene, backend)
    arguments = make_arguments(scene, background=True, levels=True, mask=True)
    order = torch.cat((torch.randperm(20), 20 + torch.randperm(20)))
    moved = {
        name: value[order]
        for name, value in arguments._asdict().items()
        if isinstance(value, Tensor) and name not in ("query_batch_offsets", "background_embedding")
    }
    assert len(moved) == 4
    out = block(**arguments._asdict())
    assert_close(block(**arguments._asdict() | moved), out[order], 1e-12)


def test_permuting_points_keeps_the_output(backend: BackendName) -> None:
    scene = scene_2d(n_queries=40)
    block = make_block(scene, backend)
    arguments = make_arguments(scene, background=True)
    pyramid = arguments.stacked_feature_maps
    order = torch.randperm(len(pyramid))
    moved = FeaturePyramid(
        pyramid.values[order], pyramid.coordinates[order], pyramid.level_shapes, 3
    )
    out = block(**arguments._replace(stacked_feature_maps=moved)._asdict())
    assert_close(out, block(**arguments._asdict()), 1e-12)
