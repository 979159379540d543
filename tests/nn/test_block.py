"""The module: against the specification spelled out, at the edges of its world, and refusals."""

import copy
import dataclasses
import io
import math
import pickle
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import golden_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    Scene,
    Shapes,
    assert_close,
    make_scene,
    one_room,
    rotate_by_hand,
    scene_2d,
    scenes,
    sparse_coo,
)
from torch import Tensor, nn

from vicinal import FeaturePyramid, NeighborhoodPlan, SparseNeighborhoodAttentionBlock
from vicinal.backends.cpu import projections as cpu_projections

EMBED, HEADS = 12, 2
EXACT = 1e-10


def make_block(scene: Scene, backend: str | None = "cpu", **options: Any) -> Any:
    """A block for the scene, its norm not the identity, in float64."""
    pyramid = scene.pyramid
    block = SparseNeighborhoodAttentionBlock(
        EMBED,
        HEADS,
        pyramid.n_levels,
        list(scene.sizes),
        pyramid.position_dim,
        **{"rope_enforce_freq_groups_equal": False, "backend": backend} | options,
    ).double()
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return block


class Arguments(NamedTuple):
    """What `forward` takes; the map as a pyramid."""

    query: Tensor
    query_spatial_positions: Tensor
    query_batch_offsets: Tensor
    stacked_feature_maps: FeaturePyramid
    background_embedding: Tensor | None = None
    query_level_indices: Tensor | None = None
    query_mask: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        leaves = [self.query, self.query_spatial_positions, self.stacked_feature_maps.values]
        return leaves if self.background_embedding is None else [*leaves, self.background_embedding]

    def to(self, dtype: torch.dtype) -> "Arguments":
        """The same in another dtype, but for the positions: these in float32."""
        pyramid, background = self.stacked_feature_maps, self.background_embedding
        return self._replace(
            query=self.query.to(dtype),
            query_spatial_positions=self.query_spatial_positions.float(),
            stacked_feature_maps=pyramid.with_values(pyramid.values.to(dtype)),
            background_embedding=None if background is None else background.to(dtype),
        )


def make_arguments(
    scene: Scene,
    *,
    background: bool = False,
    levels: bool = False,
    mask: bool = False,
    seed: int = 0,
) -> Arguments:
    """Random arguments; those that can get gradients require them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    n, pyramid = len(scene.positions), scene.pyramid
    return Arguments(
        draw(n, EMBED),
        scene.positions.detach().clone().requires_grad_(),
        scene.offsets,
        pyramid.with_values(draw(len(pyramid), EMBED)),
        draw(pyramid.batch_size, pyramid.n_levels, EMBED) if background else None,
        torch.randint(pyramid.n_levels, (n,), generator=generator) if levels else None,
        torch.rand(n, generator=generator) < 0.3 if mask else None,
    )


def block_by_hand(block: Any, scene: Scene, arguments: Arguments) -> Tensor:
    """The block of the specification, query by query: every empty cell projected and rotated."""
    query, positions, _, pyramid, background, levels, mask = arguments
    shapes = torch.tensor(pyramid.level_shapes, dtype=torch.float64)
    scales = shapes / shapes.amax(0)
    if levels is None:
        levels = shapes.prod(1).argmax().expand(len(query))

    def project(embedding: Tensor) -> tuple[Tensor, Tensor]:
        key, value = block.kv_proj(embedding).chunk(2, -1)
        return key.unflatten(-1, (HEADS, -1)), value.unflatten(-1, (HEADS, -1))

    def keys_at(keys: Tensor, cells: Tensor, level: Tensor) -> Tensor:
        centres = (cells.double() + 0.5) / scales[level]
        return rotate_by_hand(block.pos_encoding, keys, torch.cat((centres, level[:, None]), 1))

    x = block.norm(query) if block.norm_first else query
    q = block.q_in_proj(x).unflatten(-1, (HEADS, -1))
    q = rotate_by_hand(block.pos_encoding, q, torch.cat((positions, levels[:, None]), 1))
    k, v = project(pyramid.values)
    k = keys_at(k, pyramid.cells, pyramid.levels)

    attended = []
    for i, (image, window) in enumerate(zip(scene.images(), scene.windows(), strict=True)):
        takes_part = mask is None or not bool(mask[i])
        seen = [point for _, points in window for point in points if takes_part]
        here, values = k[seen], v[seen]
        empty = [slot for slot, points in window if takes_part and not points]
        if background is not None and empty:
            level = torch.tensor([slot.level for slot in empty])
            cells = torch.tensor([slot.cell for slot in empty])
            keys, cell_values = project(background[image, level])
            here = torch.cat((here, keys_at(keys, cells, level)))
            values = torch.cat((values, cell_values))
        weights = ((q[i] * here).sum(-1) / math.sqrt(EMBED // HEADS)).softmax(0)
        attended.append((weights[..., None] * values).sum(0).flatten())
    stacked = torch.stack(attended) if attended else query * 0
    out: Tensor = query + block.out_proj(stacked)
    return out if block.norm_first else block.norm(out)


def gradients(out: Tensor, block: nn.Module, arguments: Arguments) -> list[Tensor]:
    """Of all parameters and arguments, for a fixed random cotangent; zero where there is none."""
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    leaves = [*block.parameters(), *arguments.leaves()]
    return list(
        torch.autograd.grad(out, leaves, cotangent, allow_unused=True, materialize_grads=True)
    )


def assert_as_by_hand(block: Any, scene: Scene, arguments: Arguments) -> Tensor:
    """Output and all gradients are those of `block_by_hand`; returns the output."""
    out: Tensor = block(**arguments._asdict())
    expected = block_by_hand(block, scene, arguments)
    assert_close(out, expected, EXACT)
    names = [*dict(block.named_parameters()), "query", "positions", "map", "background"]
    for name, left, right in zip(
        names,
        gradients(out, block, arguments),
        gradients(expected, block, arguments),
        strict=False,
    ):
        assert_close(left, right, EXACT, f"gradient of {name}")
    return out.detach()


# -------------------------------------------------------------------------- the specification


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
def test_random_problems_against_the_specification(
    backend: str,
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
    assert_as_by_hand(block, scene, arguments)


WORLDS = {
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


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("background", [False, True])
def test_edges_of_the_world(name: str, background: bool, backend: str) -> None:
    scene = WORLDS[name]
    arguments = make_arguments(scene, background=background)
    assert_as_by_hand(make_block(scene, backend, bias=True), scene, arguments)


def without_level(scene: Scene, level: int) -> Scene:
    """The scene less the points of a level, which stays."""
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
def test_a_level_without_points(level: int, background: bool, backend: str) -> None:
    scene = without_level(scene_2d(n_queries=20), level)
    assert (scene.pyramid.levels.bincount(minlength=3) == 0).tolist() == [
        index == level for index in range(3)
    ]
    assert_as_by_hand(
        make_block(scene, backend), scene, make_arguments(scene, background=background)
    )


@pytest.mark.parametrize("far", [-50.0, 1e4, 1e9])
def test_queries_far_outside(far: float, backend: str) -> None:
    scene = scene_2d(n_queries=20)
    scene.positions[4] = far
    scene.positions[11, 1] = -far
    block = make_block(scene, backend)
    arguments = make_arguments(scene)
    out = assert_as_by_hand(block, scene, arguments)
    assert torch.equal(out[[4, 11]], arguments.query[[4, 11]])


def test_absurdly_far_queries_see_nothing(backend: str) -> None:
    scene = scene_2d(n_queries=20)
    scene.positions[4], scene.positions[11, 1] = 1e30, -1e30
    arguments = make_arguments(scene)
    out = make_block(scene, backend)(**arguments._asdict())
    assert torch.equal(out[[4, 11]], arguments.query[[4, 11]])
    out.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in arguments.leaves())


def test_a_query_that_sees_nothing_keeps_its_residual(backend: str) -> None:
    scene = make_scene(((6, 4),), (3,), (5,), 0)
    arguments = make_arguments(scene)
    block = make_block(scene, backend, bias=True)
    out = block(**arguments._asdict())
    assert_close(out, arguments.query + block.out_proj.bias, 1e-14)
    assert (block.out_proj.bias != 0).all()


def test_stored_zeros_are_points(backend: str) -> None:
    scene = one_room(4, 3)
    block = make_block(scene, backend, bias=True)
    arguments = make_arguments(scene)
    zeros = arguments._replace(
        stacked_feature_maps=scene.pyramid.with_values(torch.zeros(3, EMBED).double()[:])
    )
    coo = zeros.stacked_feature_maps.to_coo()
    out = block(*arguments[:3], coo, [(5, 5)])
    assert_close(out, block_by_hand(block, scene, zeros), EXACT)
    nothing = sparse_coo(coo.indices()[:, :0], coo.values()[:0], coo.shape)
    without = block(*arguments[:3], nothing, [(5, 5)])
    assert ((out - without).abs() > 1e-6).all(), "a point of zeros has the bias for its value"


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_mask_over_every_query(norm_first: bool, background: bool, backend: str) -> None:
    scene = scene_2d()
    block = make_block(scene, backend, norm_first=norm_first, bias=True)
    arguments = make_arguments(scene, background=background)
    arguments = arguments._replace(query_mask=torch.ones(12, dtype=torch.bool))
    out = block(**arguments._asdict())
    residual = arguments.query + block.out_proj.bias
    assert_close(out, residual if norm_first else block.norm(residual), 1e-13)
    names = [*dict(block.named_parameters()), "query", "positions", "map", "background"]
    grads = dict(zip(names, gradients(out, block, arguments), strict=False))
    silent = {"q_in_proj.weight", "q_in_proj.bias", "kv_proj.weight", "kv_proj.bias",
              "pos_encoding.freqs.0", "out_proj.weight", "positions", "map"}  # fmt: skip
    silent |= {"background"} if background else set()
    silent |= {"norm.weight", "norm.bias"} if norm_first else set()
    assert {name for name, grad in grads.items() if not grad.any()} == silent


def test_no_mask_is_a_mask_over_no_query(backend: str) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    arguments = make_arguments(scene)
    masked = arguments._replace(query_mask=torch.zeros(12, dtype=torch.bool))
    assert torch.equal(block(**masked._asdict()), block(**arguments._asdict()))


# ---------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("shapes", "finest"), [(((6, 4), (9, 8)), 1), (((9, 8), (6, 4)), 0), (((20, 1), (5, 5)), 1)]
)
def test_queries_live_on_the_level_with_the_most_cells(
    shapes: tuple[tuple[int, int], ...], finest: int, backend: str
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
        "norm.weight", "norm.bias", "q_in_proj.weight", "kv_proj.weight",
        "pos_encoding.freqs.0", "out_proj.weight",
    ]  # fmt: skip
    torch.manual_seed(0)
    first = block.pos_encoding.freqs[0].detach()
    steps = torch.arange(8) / 8
    for theta, row in zip((100.0, 100.0, 10.0), first, strict=True):
        assert_close(row, row[:, :1] * theta**-steps, 1e-6)


# ----------------------------------------------------------------- ways to say the same thing


def coo_arguments(arguments: Arguments) -> tuple[dict[str, Any], Tensor, Tensor]:
    """The same call with a sparse map, the map, and where each of its rows is in the pyramid."""
    pyramid = arguments.stacked_feature_maps
    coo = pyramid.to_coo().detach().requires_grad_()
    rows = {tuple(row): index for index, row in enumerate(pyramid.coordinates.tolist())}
    order = torch.tensor([rows[tuple(row)] for row in coo.detach().indices().t().tolist()])
    call = arguments._asdict() | {
        "stacked_feature_maps": coo,
        "level_spatial_shapes": torch.tensor(pyramid.level_shapes),
    }
    return call, coo, order


def distinct_scene() -> Scene:
    return make_scene(((6, 4), (5, 5), (9, 8)), (3, 5, 3), (6, 0, 8), 60, distinct=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_pyramid_equals_a_sparse_map(background: bool, backend: str) -> None:
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


def test_a_map_that_is_not_coalesced_is_summed(backend: str) -> None:
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
def test_a_shared_plan_equals_one_built_here(background: bool, backend: str) -> None:
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


# ------------------------------------------------------------------------------- the weights


def by_weights(block: Any, arguments: Arguments, queries: Tensor | None = None) -> Tensor:
    """The output for ``queries``, all if None, from the weights and the values they belong to."""
    weights = block.attention_weights(**arguments._asdict(), queries=queries)
    chosen = torch.arange(len(arguments.query)) if queries is None else queries
    query, pyramid = arguments.query[chosen], arguments.stacked_feature_maps
    v = block.kv_proj(pyramid.values)[:, EMBED:].unflatten(-1, (HEADS, -1))
    row = torch.repeat_interleave(weights.offsets.diff())
    attended = query.new_zeros(len(chosen), HEADS, EMBED // HEADS)
    attended = attended.index_add(0, row, weights.weights[..., None] * v[weights.points])
    if arguments.background_embedding is not None:
        offsets = arguments.query_batch_offsets
        image = torch.searchsorted(offsets, chosen, right=True) - 1
        cells = block.kv_proj(arguments.background_embedding)[..., EMBED:]
        cells = cells.unflatten(-1, (HEADS, -1))[image]
        attended = attended + torch.einsum("nlh,nlhd->nhd", weights.background, cells)
    out: Tensor = query + block.out_proj(attended.flatten(1))
    return out if block.norm_first else block.norm(out)


@given(
    scene=scenes(),
    background=st.booleans(),
    levels=st.booleans(),
    mask=st.booleans(),
    norm_first=st.booleans(),
)
@settings(max_examples=25)
def test_weights_times_values_give_the_output(
    scene: Scene, background: bool, levels: bool, mask: bool, norm_first: bool
) -> None:
    block = make_block(scene, norm_first=norm_first, bias=True, dropout=0.3)
    arguments = make_arguments(scene, background=background, levels=levels, mask=mask)
    whole = by_weights(block, arguments)  # in training too, the weights are those before dropout
    block.eval()
    assert_close(whole, block(**arguments._asdict()), EXACT)
    queries = torch.arange(len(scene.positions))[1::2].flip(0)
    assert_close(by_weights(block, arguments, queries), whole[queries], EXACT)


def test_weights_sum_to_one_or_to_nothing() -> None:
    scene = scene_2d()
    arguments = make_arguments(scene, mask=True)
    weights = make_block(scene).attention_weights(**arguments._asdict())
    row = torch.repeat_interleave(weights.offsets.diff())
    sums = torch.zeros(12, HEADS, dtype=torch.float64).index_add(0, row, weights.weights)
    assert arguments.query_mask is not None
    sees = (scene.plan().counts() > 0) & ~arguments.query_mask
    assert 0 < sees.sum() < 12
    assert_close(sums, sees[:, None].expand(-1, HEADS).double(), 1e-12)


def test_the_plan_a_block_makes_has_its_windows() -> None:
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
def test_integers_of_any_type(dtype: torch.dtype, backend: str) -> None:
    scene = distinct_scene()
    block = make_block(scene, backend)
    call, _, _ = coo_arguments(make_arguments(scene, levels=True))
    narrow = {
        name: call[name].to(dtype)
        for name in ("query_batch_offsets", "query_level_indices", "level_spatial_shapes")
    }
    assert torch.equal(block(**call | narrow), block(**call))


def test_shapes_as_lists(backend: str) -> None:
    scene = distinct_scene()
    block = make_block(scene, backend)
    call, _, _ = coo_arguments(make_arguments(scene))
    listed = call | {"level_spatial_shapes": [[6, 4], [5, 5], [9, 8]]}
    assert torch.equal(block(**listed), block(**call))
    arguments = make_arguments(scene)
    both = arguments._asdict() | {"level_spatial_shapes": torch.tensor(((6, 4), (5, 5), (9, 8)))}
    assert torch.equal(block(**both), block(**arguments._asdict()))


def test_queries_in_another_order(backend: str) -> None:
    # Within each image; rows of the output follow.
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


def test_points_in_another_order(backend: str) -> None:
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


# ----------------------------------------------------------------------------------- dropout


def test_dropout_in_training_and_not_in_evaluation(backend: str) -> None:
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
    # The second dropout is of whole channels of the output's projection ...
    dropped = first == 0
    assert abs(float(dropped.double().mean()) - 0.4) < 4 * math.sqrt(0.24 / first.numel())
    # ... and what it leaves has been through the first.
    full = plain(**arguments) - arguments["query"]
    assert ((first * 0.6 - full).abs()[~dropped] > 1e-9).all()
    block.eval()
    state = torch.get_rng_state()
    assert torch.equal(seeded(1), full)
    torch.set_rng_state(state)
    block(**arguments)
    assert torch.equal(torch.get_rng_state(), state), "evaluation draws no random numbers"


def test_the_second_dropout_follows_its_own_module(backend: str) -> None:
    scene = scene_2d()
    block = make_block(scene, backend, dropout=0.4).eval()
    arguments = make_arguments(scene)._asdict()
    whole = block(**arguments) - arguments["query"]
    block.dropout.train()
    added = block(**arguments) - arguments["query"]
    assert_close(added[added != 0], (whole / 0.6)[added != 0], EXACT)
    assert 0.2 < float((added == 0).double().mean()) < 0.6


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
def test_adapters_around_projections_are_called(name: str, backend: str) -> None:
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


def test_a_norm_without_bias(backend: str) -> None:
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


def test_hooks_of_all_modules_are_called(backend: str) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    called: set[nn.Module] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.add(module))
    try:
        block(**make_arguments(scene)._asdict())
    finally:
        handle.remove()
    assert {block.norm, block.q_in_proj, block.kv_proj, block.out_proj} <= called


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"dropout": 0.3}, {"norm_first": False}])
def test_chunks_of_rows_make_no_difference(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = scene_2d(n_queries=40)
    arguments = make_arguments(scene, background=True, mask=True)
    block = make_block(scene, "cpu", **options)
    answers = []
    for rows in (7, 1000):
        monkeypatch.setattr(cpu_projections, "chunk_rows", lambda x, rows=rows: rows)
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


# --------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("background", [False, True])
def test_narrow_modules(dtype: torch.dtype, background: bool, backend: str) -> None:
    scene = scene_2d(n_queries=40)
    block = make_block(scene, backend, norm_first=False)
    wide = make_arguments(scene, background=background)
    narrow_block = copy.deepcopy(block).to(dtype)
    block.load_state_dict(narrow_block.state_dict())  # the same rounded weights
    out = narrow_block(**wide.to(dtype)._asdict())
    assert out.dtype == dtype
    expected = block(**wide._asdict())
    assert_close(out.double(), expected, 24 * torch.finfo(dtype).eps)
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in narrow_block.parameters())
    assert all(parameter.grad.dtype == dtype for parameter in narrow_block.parameters())


@pytest.mark.parametrize("background", [False, True])
def test_wide_positions_beside_a_narrow_module(background: bool, backend: str) -> None:
    scene = scene_2d(n_queries=20)
    block = make_block(scene, backend).float()
    arguments = make_arguments(scene, background=background).to(torch.float32)
    positions = scene.positions.float()
    narrow = block(**arguments._replace(query_spatial_positions=positions)._asdict())
    wide = block(**arguments._replace(query_spatial_positions=positions.double())._asdict())
    assert wide.dtype == torch.float32
    assert_close(wide, narrow, 1e-5)


def far_scene() -> Scene:
    """Queries and points at cells of some 300, where bfloat16 counts in steps of two."""
    axis = torch.arange(300, 308)
    cells = torch.cartesian_prod(axis, axis)
    coordinates = torch.nn.functional.pad(cells, (1, 1))
    pyramid = FeaturePyramid(torch.zeros(64, EMBED), coordinates, ((512, 512),), 1)
    return Scene(cells + 0.5, torch.tensor([0, 64]), pyramid, (5,))


@pytest.mark.parametrize("background", [False, True])
def test_autocast_keeps_positions_exact(background: bool, backend: str) -> None:
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
    }
    confused = (block(**rounded) - expected).detach().pow(2).mean().sqrt() / size
    assert 0 < error < 0.02
    assert confused > 5 * error, "rounded positions would show"


def test_half_precision_positions_are_computed_with_in_float32(backend: str) -> None:
    scene = scene_2d(n_queries=20)
    block = make_block(scene, backend)
    arguments = make_arguments(scene)._asdict()
    half = scene.positions.bfloat16()
    out = block(**arguments | {"query_spatial_positions": half})
    assert torch.equal(out, block(**arguments | {"query_spatial_positions": half.float()}))


# -------------------------------------------------------------------------- state and copies


def test_names_of_parameters() -> None:
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


def test_keys_come_first_in_the_joint_projection(backend: str) -> None:
    # Without keys all weights are equal: the output is the projected mean of the values.
    scene = one_room(3, 4)
    block = make_block(scene, backend)
    with torch.no_grad():
        block.kv_proj.weight[:EMBED] = 0
    arguments = make_arguments(scene)
    values = arguments.stacked_feature_maps.values @ block.kv_proj.weight[EMBED:].t()
    expected = arguments.query + block.out_proj(values.mean(0))
    assert_close(block(**arguments._asdict()), expected, 1e-13)


@pytest.mark.parametrize("bias", [False, True])
def test_reset_parameters_draws_all_anew(bias: bool) -> None:
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
def test_checkpoints_of_the_earlier_implementation(name: str, buffers: bool, prefix: str) -> None:
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
    assert earlier.keys() == before.keys(), "the caller's dict is the caller's"
    for key, value in block.state_dict().items():
        old = key.replace("kv_proj", "subset_attn.kv_proj")
        assert torch.equal(value, case.state_dict[old])
    module.load_state_dict(module.state_dict(), strict=True)


@pytest.mark.parametrize(
    "key", ["unknown", "q_in_proj.bias", "subset_attn.other", "rope_other_base_theta", "kv_proj.x"]
)
def test_unknown_keys_still_fail(key: str) -> None:
    block = make_block(scene_2d())
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}"):
        block.load_state_dict(block.state_dict() | {key: torch.zeros(1)}, strict=True)


@pytest.mark.parametrize("key", ["norm.bias", "kv_proj.weight", "pos_encoding.freqs.0"])
def test_missing_keys_still_fail(key: str) -> None:
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
def test_copies(duplicate: Callable[[nn.Module], Any]) -> None:
    scene = scene_2d()
    block = make_block(scene, dropout=0.1).eval()
    arguments = make_arguments(scene)._asdict()
    twin = duplicate(block)
    assert torch.equal(twin(**arguments), block(**arguments))
    assert (twin.neighborhood_sizes, twin.training, twin.dropout.p) == ((3, 5, 3), False, 0.1)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    earlier = {name.replace("kv_", "subset_attn.kv_"): value for name, value in before.items()}
    twin.load_state_dict(earlier | {"rope_level_base_theta": torch.tensor(10.0)}, strict=True)
    assert torch.equal(twin(**arguments), block(**arguments))


def test_works_under_functional_call() -> None:
    scene = scene_2d()
    block, other = make_block(scene), make_block(scene)
    arguments = make_arguments(scene)._asdict()
    called = torch.func.functional_call(block, dict(other.named_parameters()), (), arguments)
    assert torch.equal(called, other(**arguments))


def test_arguments_are_left_alone(backend: str) -> None:
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


# -------------------------------------------------------------------- refusals: constructor


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
        ("neighborhood_sizes", [3, 5, 0, 9], "[3, 5, 0, 9]"),
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
def test_constructor_refusals(argument: str, value: object, came: str) -> None:
    name = f"rope_{argument}" if argument.startswith("freq") else argument
    options: dict[str, Any] = {"embed_dim": 16, "n_heads": 4} | {name: value}
    with pytest.raises(ValueError, match="expected") as refusal:
        SparseNeighborhoodAttentionBlock(**options)
    message = str(refusal.value)
    assert argument in message.split(":")[0]
    assert came in message.split("got")[-1]


def test_unequal_frequency_groups_are_refused_unless_allowed() -> None:
    # 16 channels per head are 8 pairs, which three groups cannot share evenly.
    with pytest.raises(ValueError, match="equal frequency groups"):
        SparseNeighborhoodAttentionBlock(32, 2, rope_freq_group_pattern="closure")
    block = SparseNeighborhoodAttentionBlock(
        32, 2, rope_freq_group_pattern="closure", rope_enforce_freq_groups_equal=False
    )
    assert [f.shape[-1] for f in block.pos_encoding.freqs] == [3, 3, 2]


# ------------------------------------------------------------------------ refusals: forward

SCENE = distinct_scene()
N_POINTS = len(SCENE.pyramid)
SHAPES = ((6, 4), (5, 5), (9, 8))


def accepted() -> dict[str, Any]:
    """A call with every argument: 14 queries, 3 images, 3 levels, a map of 9 x 8."""
    arguments = make_arguments(SCENE, background=True, levels=True, mask=True)
    return coo_arguments(arguments)[0]


def coo_map(change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(accepted()["stacked_feature_maps"].detach())


def with_point(row: list[int]) -> Tensor:
    """The accepted map and one more point."""

    def add(coo: Tensor) -> Tensor:
        indices = torch.cat((coo.indices(), torch.tensor(row)[:, None]), 1)
        values = torch.cat((coo.values(), coo.values()[:1]))
        return sparse_coo(indices, values, coo.shape)

    return coo_map(add)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64} | options)


def changed(name: str, row: int, value: float) -> Tensor:
    tensor: Tensor = accepted()[name].detach().clone()
    tensor[row] = value
    return tensor


REFUSALS: list[tuple[str, Any, str]] = [
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
    ("query_batch_offsets", torch.tensor([0, 6, 14]), "[3]"),
    ("query_batch_offsets", torch.tensor([0, 6, 6, 14, 14]), "[5]"),
    ("query_batch_offsets", torch.tensor([[0, 6, 6, 14]]), "[1, 4]"),
    ("query_batch_offsets", zeros(4), "float64"),
    ("query_batch_offsets", [0, 6, 6, 14], "list"),
    ("stacked_feature_maps", coo_map(Tensor.to_dense), "[3, 9, 8, 3, 12]"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense().to_sparse()), "sparse_coo"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense().to_sparse(3)), "sparse_coo"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense()[..., 0].to_sparse(3)), "[3, 9, 8, 3]"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense()[:, :8].to_sparse(4)), "8, 8"),
    ("stacked_feature_maps", coo_map(lambda x: x.to_dense()[:, :, :, :2].to_sparse(4)), "2, 12"),
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

# What must be read to be refused.
CONTENTS: list[tuple[str, Any, str]] = [
    ("query_spatial_positions", changed("query_spatial_positions", 5, math.nan), "nan"),
    ("query_spatial_positions", changed("query_spatial_positions", 5, math.inf), "inf"),
    ("query_spatial_positions", changed("query_spatial_positions", 5, -math.inf), "-inf"),
    ("query_batch_offsets", torch.tensor([0, 9, 6, 14]), "[0, 9, 6, 14]"),
    ("query_batch_offsets", torch.tensor([1, 6, 6, 14]), "[1, 6, 6, 14]"),
    ("query_batch_offsets", torch.tensor([0, 6, 6, 13]), "[0, 6, 6, 13]"),
    ("query_batch_offsets", torch.tensor([0, 6, 6, 15]), "[0, 6, 6, 15]"),
    ("query_batch_offsets", torch.tensor([0, -1, 6, 14]), "[0, -1, 6, 14]"),
]


def assert_refused(call: dict[str, Any], name: str, came: str) -> None:
    """The call is refused for the argument ``name``, and nothing has changed."""
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


def test_the_call_that_refusals_change_is_accepted() -> None:
    block = make_block(SCENE, dropout=0.5)
    assert block(**accepted()).isfinite().all()
    assert block(**accepted(), plan=SCENE.plan()).isfinite().all()


@pytest.mark.parametrize(("name", "value", "came"), REFUSALS)
@pytest.mark.parametrize("planned", [False, True])
def test_refusals(name: str, value: Any, came: str, planned: bool) -> None:
    plan = {"plan": SCENE.plan()} if planned else {}
    assert_refused(accepted() | {name: value} | plan, name, came)


@pytest.mark.parametrize(("name", "value", "came"), CONTENTS)
def test_refusals_of_contents(name: str, value: Any, came: str) -> None:
    assert_refused(accepted() | {name: value}, name, came)


def other_pyramid(values: Tensor, level_shapes: Shapes = SHAPES) -> FeaturePyramid:
    coordinates = torch.zeros(len(values), 4, dtype=torch.int64, device=values.device)
    return FeaturePyramid(values, coordinates, level_shapes, 3)


@pytest.mark.parametrize(
    ("name", "pyramid", "shapes", "came"),
    [
        ("stacked_feature_maps", other_pyramid(zeros(2, 10)), None, "[2, 10]"),
        ("stacked_feature_maps", other_pyramid(zeros(2, 12).float()), SHAPES, "float32"),
        ("stacked_feature_maps", other_pyramid(zeros(2, 12).to("meta")), None, "meta"),
        ("level_spatial_shapes", other_pyramid(zeros(2, 12), SHAPES[:2]), None, "(5, 5)"),
        ("level_spatial_shapes", other_pyramid(zeros(2, 12)), (*SHAPES[:2], (9, 9)), "(9, 9)"),
    ],
)
def test_refusals_beside_a_pyramid(
    name: str, pyramid: FeaturePyramid, shapes: Shapes | None, came: str
) -> None:
    beside = {"stacked_feature_maps": pyramid, "level_spatial_shapes": shapes}
    assert_refused(accepted() | beside, name, came)


@pytest.mark.parametrize(("name", "value", "came"), REFUSALS + CONTENTS)
def test_refusals_of_weights(name: str, value: Any, came: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected") as refusal:
        make_block(SCENE).attention_weights(**accepted() | {name: value})
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
def test_refusals_of_queries_to_look_at(queries: Any, came: str) -> None:
    with pytest.raises(ValueError, match=r"^queries: expected") as refusal:
        make_block(SCENE).attention_weights(**accepted(), queries=queries)
    assert came in str(refusal.value).split("got")[-1]


OTHER_PLANS: dict[str, NeighborhoodPlan] = {
    "queries": make_scene(SHAPES, (3, 5, 3), (6, 0, 7), N_POINTS).plan(),
    "points": make_scene(SHAPES, (3, 5, 3), (6, 0, 8), N_POINTS - 1).plan(),
    "windows": make_scene(SHAPES, (3, 5, 5), (6, 0, 8), N_POINTS).plan(),
    "dimensions": make_scene(((6,), (5,), (9,)), (3, 5, 3), (6, 0, 8), N_POINTS).plan(),
}


@pytest.mark.parametrize("what", OTHER_PLANS)
def test_plans_for_something_else_are_refused(what: str) -> None:
    assert_refused(accepted() | {"plan": OTHER_PLANS[what]}, "plan", "NeighborhoodPlan(")


# ------------------------------------------------------------------------- refusals, further


@pytest.mark.parametrize(
    ("row", "came"),
    [([0, 6, 2, 0], "[6, 2] at level 0"), ([1, 2, 5, 1], "[2, 5] at level 1")],
)
def test_a_point_outside_its_level_is_refused_by_the_name_of_the_map(
    row: list[int], came: str
) -> None:
    assert_refused(
        accepted() | {"stacked_feature_maps": with_point(row)}, "stacked_feature_maps", came
    )


@pytest.mark.parametrize(("name", "value", "came"), CONTENTS)
def test_refusals_of_contents_beside_a_plan(name: str, value: Any, came: str) -> None:
    assert_refused(accepted() | {name: value, "plan": SCENE.plan()}, name, came)


def test_offsets_elsewhere_are_refused() -> None:
    offsets = accepted()["query_batch_offsets"].to("meta")
    for plan in ({}, {"plan": SCENE.plan()}):
        assert_refused(
            accepted() | {"query_batch_offsets": offsets} | plan, "query_batch_offsets", "meta"
        )


def test_shapes_as_a_flat_list_are_refused() -> None:
    assert_refused(accepted() | {"level_spatial_shapes": [9, 8]}, "level_spatial_shapes", "9")


def test_a_query_elsewhere_than_the_module_is_refused() -> None:
    block = make_block(SCENE).to("meta")
    with pytest.raises(ValueError, match=r"query: expected .*meta.* got .*cpu"):
        block(**accepted())


def test_a_background_of_another_dtype_is_refused() -> None:
    call = accepted() | {"background_embedding": zeros(3, 3, 12).float()}
    assert_refused(call, "background_embedding", "float32")


def test_a_plan_for_another_number_of_images_is_refused() -> None:
    plan = make_scene(SHAPES, (3, 5, 3), (6, 8), N_POINTS).plan()
    call = accepted() | {"plan": plan, "background_embedding": None}
    assert_refused(call, "plan", "NeighborhoodPlan(")


def test_keys_that_only_look_like_the_earlier_buffers_still_fail() -> None:
    block = make_block(scene_2d())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*pos_encoding\.unknown"):
        block.load_state_dict(block.state_dict() | {"pos_encoding.unknown": torch.zeros(1)})


# -------------------------------------------------- contents unchecked, as they are on a GPU


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """No contents are looked at, as where that would stall the device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vicinal") and hasattr(module, "reads_contents"):
            monkeypatch.setattr(module, "reads_contents", lambda *_: False)


def assert_takes_no_part(
    bad_call: dict[str, Any], good_call: dict[str, Any], queries: list[int], backend: str
) -> None:
    """In ``bad_call`` the ``queries`` keep their residual; all else is as in ``good_call``."""
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
    # Nor does it matter if what they keep is used.
    grads = torch.autograd.grad(bad.sum(), [*leaves, bad_call["query"]])
    assert all(grad.isfinite().all() for grad in grads)


def seen_by_all(background: bool) -> dict[str, Any]:
    """The accepted call with every query where it sees something, and no mask."""
    call = accepted() | {"query_mask": None}
    positions = call["query_spatial_positions"].detach() % torch.tensor([9, 8])
    call["query_spatial_positions"] = positions
    return call if background else call | {"background_embedding": None}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_queries_at_no_finite_place_take_no_part(
    value: float, background: bool, backend: str
) -> None:
    call = seen_by_all(background)
    positions = call["query_spatial_positions"].clone()
    positions[3], positions[9, 1] = value, value
    bad = call | {"query_spatial_positions": positions}
    assert_takes_no_part(bad, call, [3, 9], backend)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("background", [False, True])
def test_queries_of_no_image_take_no_part(background: bool, backend: str) -> None:
    call = seen_by_all(background)
    bad = call | {"query_batch_offsets": torch.tensor([1, 6, 6, 12])}
    assert_takes_no_part(bad, call, [0, 12, 13], backend)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("background", [False, True])
def test_points_outside_their_level_take_no_part(background: bool, backend: str) -> None:
    call = seen_by_all(background)
    bad = call | {"stacked_feature_maps": with_point([0, 6, 2, 0]).requires_grad_()}
    block = make_block(SCENE, backend)
    good_out, bad_out = block(**call), block(**bad)
    assert_close(bad_out, good_out, 1e-12)
    bad_out.sum().backward()
    grad = bad["stacked_feature_maps"].grad.coalesce()
    here = (grad.indices().t() == torch.tensor([0, 6, 2, 0])).all(1)
    assert here.sum() == 1
    assert not grad.values()[here].any()
    assert grad.values().isfinite().all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("level", [-1, 3, 2**62])
def test_queries_of_no_level_take_no_part(level: int, background: bool, backend: str) -> None:
    call = seen_by_all(background)
    levels = call["query_level_indices"].clone()
    levels[[3, 9]] = level
    assert_takes_no_part(call | {"query_level_indices": levels}, call, [3, 9], backend)
