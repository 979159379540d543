"""What deformable attention computes, against `grid_sample` on dense maps and at edge cases."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from deformable_scenes import (
    EMBED,
    EXACT,
    HEADS,
    POINTS,
    SCENES,
    Arguments,
    assert_matches_grid_sample,
    gradients,
    make_arguments,
    make_module,
)
from detr_scenes import make_pyramid, make_queries, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import LargestTensor, Scene, assert_close, make_scene, scenes
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseDeformableAttention
from vicinal._index import sampling
from vicinal._index.cell_hash import index_cells
from vicinal.detr import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    FeedForward,
    QuerySelfAttention,
)
from vicinal.nn.deformable import head_directions

# ------------------------------------------------------------------------------ against grid_sample


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_grid_sample_on_dense_maps(dim: int, background: bool, norm_first: bool) -> None:
    module = make_module(SCENES[dim], norm_first=norm_first)
    assert_matches_grid_sample(
        module, make_arguments(SCENES[dim], background=background, mask=True)
    )


@given(scene=scenes(), mask=st.booleans(), bias=st.booleans())
@settings(max_examples=25)
def test_random_scenes_equal_grid_sample(scene: Scene, mask: bool, bias: bool) -> None:
    assert_matches_grid_sample(make_module(scene, bias=bias), make_arguments(scene, mask=mask))


def test_points_that_share_a_cell_are_summed() -> None:
    scene = SCENES[2]
    arguments = make_arguments(scene)
    pyramid = arguments.stacked_feature_maps
    index = index_cells(pyramid)
    assert index.n_cells < len(pyramid)
    module = make_module(scene)
    coo = pyramid.to_coo()
    call = arguments._asdict() | {
        "stacked_feature_maps": coo,
        "level_spatial_shapes": pyramid.level_shapes,
    }
    assert_close(module(**arguments._asdict()), module(**call), EXACT)


@pytest.mark.parametrize("chunk", [1, 200])
def test_results_do_not_depend_on_the_chunk_size(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    whole = module(**arguments._asdict())
    grads = gradients(whole, module, arguments)
    monkeypatch.setitem(sampling._CHUNK, "cpu", chunk)
    parts = module(**arguments._asdict())
    assert torch.equal(parts, whole)
    for left, right in zip(gradients(parts, module, arguments), grads, strict=True):
        assert_close(left, right, EXACT)


# --------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("background", [False, True])
def test_no_points(background: bool) -> None:
    scene = make_scene(((6, 4), (9, 8)), (1, 1), (3, 2), 0)
    module = make_module(scene)
    arguments = make_arguments(scene, background=background)
    out = module(**arguments._asdict())
    if background:
        weights = module.weight_proj(module.norm(arguments.query))
        weights = weights.view(5, HEADS, 2, POINTS).softmax(-1).sum(-1)
        assert_matches_grid_sample(module, arguments)
    else:
        assert_close(out, arguments.query + module.out_proj.bias, EXACT)
    out.sum().backward()
    assert arguments.query.grad is not None


@pytest.mark.parametrize("counts", [(), (0,), (0, 0)])
def test_no_queries(counts: tuple[int, ...]) -> None:
    scene = make_scene(((6, 4), (9, 8)), (1, 1), counts, 9)
    module = make_module(scene)
    for background in (False, True):
        out = module(**make_arguments(scene, background=background)._asdict())
        assert out.shape == (0, EMBED)
        out.sum().backward()


@pytest.mark.parametrize("far", [1e3, -1e3, 1e12, -1e30, 3e38])
def test_queries_far_outside_the_map(far: float) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene)
    outside = arguments._replace(query_spatial_positions=torch.full((11, 2), far).double())
    out = module(**outside._asdict())
    assert_close(out, arguments.query + module.out_proj.bias, EXACT)
    background = make_arguments(scene, background=True).background_embedding
    with_background = module(**outside._replace(background_embedding=background)._asdict())
    assert with_background.isfinite().all()
    assert (with_background - out).abs().amax(1).min() > 1e-6


def test_nan_sampling_offsets_reach_the_output() -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene)
    with torch.no_grad():
        module.offset_proj.bias[0] = math.nan
    assert module(**arguments._asdict()).isnan().all()


@pytest.mark.parametrize("background", [False, True])
def test_uninitialized_memory_is_not_read(background: bool, uninitialized_is_nan: None) -> None:
    assert_matches_grid_sample(
        make_module(SCENES[2]), make_arguments(SCENES[2], background=background)
    )


def test_masked_queries_give_no_gradient() -> None:
    scene = SCENES[2]
    module = make_module(scene)
    arguments = make_arguments(scene, background=True)
    arguments = arguments._replace(query_mask=torch.ones(11, dtype=torch.bool))
    out = module(**arguments._asdict())
    assert_close(out, arguments.query + module.out_proj.bias, EXACT)
    names = [*dict(module.named_parameters()), "query", "positions", "map", "background"]
    grads = dict(zip(names, gradients(out, module, arguments), strict=True))
    assert {name for name, grad in grads.items() if grad.any()} == {"query", "out_proj.bias"}


def test_nan_in_one_image_does_not_reach_other_images() -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    pyramid, background = arguments.stacked_feature_maps, arguments.background_embedding
    assert background is not None
    with_nan = arguments._replace(
        stacked_feature_maps=pyramid.with_values(
            pyramid.values.masked_fill(pyramid.batch[:, None] == 0, math.nan)
        ),
        background_embedding=background.index_fill(0, torch.tensor(0), math.nan),
        query_mask=torch.arange(11) >= 7,
    )
    out = module(**with_nan._asdict())
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()


@pytest.mark.parametrize("background", [False, True])
def test_results_are_deterministic(background: bool, restored_threads: None) -> None:
    scene = make_scene(((30, 20), (15, 10)), (1, 1), (200, 100), 200)
    module, arguments = make_module(scene), make_arguments(scene, background=background)
    answers = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = module(**arguments._asdict())
        answers.append([out, *gradients(out, module, arguments)])
    first, *others = answers
    for other in others[1:]:
        assert all(map(torch.equal, others[0], other))
    for left, right in zip(first, others[0], strict=True):
        assert_close(left, right, 1e-11)


def test_one_compiled_graph() -> None:
    scene = make_scene(((6, 5), (3, 3)), (1, 1), (9, 4), 20)
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    named = {**arguments._asdict(), "plan": module.make_plan(*arguments[1:4])}
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    out, expected = compiled(**named), module(**named)
    assert_close(out, expected, EXACT)
    pairs = zip(*(gradients(x, module, arguments) for x in (out, expected)), strict=True)
    for actual, wanted in pairs:
        assert_close(actual, wanted, EXACT)


# -------------------------------------------------------------------------------- attention weights


def by_weights(module: Any, arguments: Arguments, queries: Tensor | None = None) -> Tensor:
    """The output for ``queries`` (default: all), computed from `attention_weights`.

    Only for modules without biases: a bias would be added per point instead of per cell.
    """
    weights = module.attention_weights(**arguments._asdict(), queries=queries)
    chosen = torch.arange(len(arguments.query)) if queries is None else queries
    query, values = arguments.query[chosen], arguments.stacked_feature_maps.values
    v = module.value_proj(values).unflatten(-1, (HEADS, -1))
    row = torch.repeat_interleave(weights.offsets.diff())
    attended = query.new_zeros(len(chosen), HEADS, EMBED // HEADS)
    attended = attended.index_add(0, row, weights.weights[..., None] * v[weights.points])
    assert (weights.background is None) == (arguments.background_embedding is None)
    if arguments.background_embedding is not None:
        image = torch.searchsorted(arguments.query_batch_offsets, chosen, right=True) - 1
        empty = module.value_proj(arguments.background_embedding).unflatten(-1, (HEADS, -1))
        attended = attended + torch.einsum("nlh,nlhd->nhd", weights.background, empty[image])
    out: Tensor = query + module.out_proj(attended.flatten(1))
    return out if module.norm_first else module.norm(out)


@given(scene=scenes(), background=st.booleans(), mask=st.booleans(), norm_first=st.booleans())
@settings(max_examples=25)
def test_attention_weights_times_values_give_the_output(
    scene: Scene, background: bool, mask: bool, norm_first: bool
) -> None:
    module = make_module(scene, bias=False, norm_first=norm_first)
    arguments = make_arguments(scene, background=background, mask=mask)
    whole = by_weights(module, arguments)
    assert_close(whole, module(**arguments._asdict()), EXACT)
    queries = torch.arange(len(scene.positions))[1::2].flip(0)
    assert_close(by_weights(module, arguments, queries), whole[queries], EXACT)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_weights_list_the_points_around_sampling_locations_in_order(dim: int) -> None:
    scene = SCENES[dim]
    module, arguments = make_module(scene), make_arguments(scene)
    offsets, points, weights, _ = module.attention_weights(**arguments._asdict())
    assert (offsets.dtype, points.dtype) == (torch.int64, torch.int64)
    assert weights.shape == (len(points), HEADS)
    pyramid = scene.pyramid
    shifts = module.offset_proj(module.norm(arguments.query))
    shifts = shifts.view(-1, HEADS, pyramid.n_levels, POINTS, dim)
    scales = torch.tensor(pyramid.level_shapes).double() / torch.tensor(
        [max(axis) for axis in zip(*pyramid.level_shapes, strict=True)]
    )
    images = torch.searchsorted(scene.offsets, torch.arange(11), right=True) - 1
    for query, (position, image) in enumerate(
        zip(arguments.query_spatial_positions, images.tolist(), strict=True)
    ):
        around = []
        for number, (of_image, *cell, level) in enumerate(pyramid.coordinates.tolist()):
            locations = (position * scales[level] + shifts[query, :, level]).flatten(0, 1)
            near = (locations - torch.tensor(cell) - 0.5).abs().lt(1).all(1).any()
            if of_image == image and near:
                around.append(number)
        assert points[offsets[query] : offsets[query + 1]].tolist() == around


def test_points_that_share_a_cell_each_have_its_weight() -> None:
    coordinates = torch.tensor([[0, 1, 2, 0], [0, 1, 3, 0], [0, 1, 2, 0], [0, 3, 0, 0]])
    pyramid = FeaturePyramid(torch.randn(4, EMBED).double(), coordinates, ((4, 5),), 1)
    module = SparseDeformableAttention(EMBED, HEADS, 1, POINTS).double()
    with torch.no_grad():
        module.offset_proj.bias.zero_()
    position = torch.tensor([[1.5, 2.75]], dtype=torch.float64)
    query, offsets = torch.randn(1, EMBED).double(), torch.tensor([0, 1])
    result = module.attention_weights(query, position, offsets, pyramid)
    assert result.offsets.tolist() == [0, 3]
    assert result.points.tolist() == [0, 1, 2]
    expected = torch.tensor([0.75, 0.25, 0.75]).double()[:, None].expand(-1, HEADS)
    assert_close(result.weights, expected, EXACT)


def test_weights_of_cells_and_background_sum_to_one() -> None:
    scene = make_scene(((6, 4), (5, 5)), (1, 1), (5, 0, 6), 40, distinct=True)
    module, arguments = make_module(scene), make_arguments(scene, background=True, mask=True)
    offsets, _, weights, background = module.attention_weights(**arguments._asdict())
    assert background is not None
    assert background.shape == (11, 2, HEADS)
    row = torch.repeat_interleave(offsets.diff())
    sums = background.sum(1).index_add(0, row, weights)
    assert arguments.query_mask is not None
    assert 0 < arguments.query_mask.sum() < 11
    unmasked = ~arguments.query_mask
    assert_close(sums, unmasked[:, None].expand(-1, HEADS).double(), EXACT)
    assert not offsets.diff()[~unmasked].any()
    assert (background.sum(1) < 1)[unmasked].any(), "some queries have points"
    bare = module.attention_weights(**arguments._replace(background_embedding=None)._asdict())
    assert bare.background is None
    assert torch.equal(bare.weights, weights)


def test_weights_without_points_or_queries() -> None:
    empty = make_scene(((6, 4), (9, 8)), (1, 1), (3, 2), 0)
    for scene in (empty, make_scene(((6, 4), (9, 8)), (1, 1), (0, 0), 9)):
        module, n = make_module(scene), len(scene.positions)
        arguments = make_arguments(scene, background=True)
        offsets, points, weights, background = module.attention_weights(**arguments._asdict())
        assert offsets.tolist() == [0] * (n + 1)
        assert (len(points), weights.shape) == (0, (0, HEADS))
        assert background is not None
        assert_close(background.sum(1), torch.ones(n, HEADS).double(), EXACT)


# ------------------------------------------------------------------------------ encoder and decoder


def test_encoder_and_decoder_train_with_it() -> None:
    def attention() -> SparseDeformableAttention:
        return SparseDeformableAttention(8, HEADS, 2, POINTS)

    encoder = Encoder([EncoderLayer(attention(), FeedForward(8, 16)) for _ in range(2)], 8)
    layers = [
        DecoderLayer(QuerySelfAttention(8, HEADS), attention(), FeedForward(8, 16))
        for _ in range(2)
    ]
    decoder = Decoder(layers, 8, 3)
    parts = nn.ModuleList((encoder, decoder)).double()
    stir(parts, 0.1)
    pyramid, queries = make_pyramid((30, 0, 12)), make_queries((4, 2, 6))
    optimizer = torch.optim.SGD(parts.parameters(), 1e-4)

    def loss() -> Tensor:
        predictions, _ = decoder(queries, encoder(pyramid))
        return sum(
            (part.logits.pow(2).mean() + part.boxes.pow(2).mean() for part in predictions),
            torch.zeros(()),
        )

    before = loss()
    before.backward()
    for name, parameter in parts.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    optimizer.step()
    assert loss() < before


# -------------------------------------------------------------------------------------------- plans


def test_plan_is_independent_of_queries_and_values() -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    plan = module.make_plan(scene.positions[:3], torch.tensor([0, 1, 1, 3]), scene.pyramid)
    built, shared = module(**arguments._asdict()), module(**arguments._asdict(), plan=plan)
    assert torch.equal(built, shared)
    assert repr(plan).startswith("CellIndex(points=60, cells=")


# ---------------------------------------------------------------------------------------- precision


def test_float32_matches_float64() -> None:
    scene = SCENES[2]
    module, wide = make_module(scene), make_arguments(scene, background=True)
    arguments = wide.to(torch.float32)
    expected = module(**wide._asdict())
    out = module.float()(**arguments._asdict())
    assert out.dtype == torch.float32
    assert_close(out.double(), expected, 1e-4)


def test_bfloat16_is_interpolated_in_float32() -> None:
    scene = SCENES[2]
    module, wide = make_module(scene), make_arguments(scene)
    expected = module(**wide._asdict())
    out = module.bfloat16()(**wide.to(torch.bfloat16)._asdict())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    error = (out.double() - expected).detach()
    assert float(error.pow(2).mean().sqrt()) < 0.1


def far_arguments() -> tuple[SparseDeformableAttention, dict[str, Any]]:
    """Queries and points near cell 300, where bfloat16 has a spacing of two."""
    axis = torch.arange(300, 308)
    cells = torch.cartesian_prod(axis, axis)
    pyramid = FeaturePyramid(torch.randn(64, 16), F.pad(cells, (1, 1)), ((512, 512),), 1)
    module = SparseDeformableAttention(16, 2, 1)
    call = {
        "query": torch.randn(64, 16),
        "query_spatial_positions": cells + 0.5,
        "query_batch_offsets": torch.tensor([0, 64]),
        "stacked_feature_maps": pyramid,
    }
    return module, call


def test_autocast_keeps_positions_exact() -> None:
    module, call = far_arguments()
    expected = module(**call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(**call)
        out.sum().backward()
    size = (expected - call["query"]).detach().pow(2).mean().sqrt()
    error = (out - expected).detach().pow(2).mean().sqrt() / size
    rounded = call | {"query_spatial_positions": call["query_spatial_positions"].bfloat16().float()}
    confused = (module(**rounded) - expected).detach().pow(2).mean().sqrt() / size
    assert 0 < error < 0.02
    assert confused > 5 * error, "rounding positions gives a larger error"
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------- memory


def test_memory_is_linear_in_the_number_of_sampling_locations() -> None:
    n, heads, levels, points, dim = 3000, 4, 2, 4, 2
    scene = make_scene(((200, 200), (100, 100)), (1, 1), (n,), 2000, dtype=torch.float32)
    embed = 64
    module = SparseDeformableAttention(embed, heads, levels, points)
    pyramid = scene.pyramid.with_values(torch.randn(2000, embed))
    plan = module.make_plan(scene.positions, scene.offsets, pyramid)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    query = torch.randn(n, embed, requires_grad=True)
    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = module(query, scene.positions, scene.offsets, pyramid, plan=plan)
        out.sum().backward()
    locations = n * heads * levels * points
    floats = locations * (dim + 2) + 3 * (n + 2000) * embed
    assert sum(kept.values()) < 4 * floats
    # Eight bytes per corner of a chunk, and no table of 2 ** P rows per sampling location.
    assert largest.nbytes <= max(8 * sampling._CHUNK["cpu"], 4 * locations * dim)


def test_dense_maps_are_never_built() -> None:
    # A dense map would have 2^60 cells.
    cells = torch.randint(2**20, (50, 3))
    pyramid = FeaturePyramid(
        torch.randn(50, EMBED), F.pad(cells, (1, 1)), ((2**20, 2**20, 2**20),), 1
    )
    module = SparseDeformableAttention(EMBED, HEADS, 1, POINTS, 3)
    with torch.no_grad():
        module.offset_proj.bias.zero_()
    positions, offsets = cells.double() + 0.5, torch.tensor([0, 50])
    out = module(torch.zeros(50, EMBED), positions, offsets, pyramid)
    assert_close(out, module.out_proj(module.value_proj(pyramid.values)), 1e-5)


# ------------------------------------------------------------------- initial values and state dicts


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_initial_sampling_locations_are_rings_around_the_query(dim: int) -> None:
    module = SparseDeformableAttention(16, 8, 3, 4, dim)
    assert not module.offset_proj.weight.any()
    assert not module.weight_proj.weight.any()
    assert not module.weight_proj.bias.any()
    locations = module.offset_proj.bias.detach().view(8, 3, 4, dim)
    for step in range(4):
        assert_close(locations[:, :, step].abs().amax(-1), torch.full((8, 3), step + 1.0), 1e-6)
    assert torch.equal(locations, locations[:, :1].expand_as(locations))
    assert_close(locations.mean(0), torch.zeros(3, 4, dim), 1e-6, "no side is preferred")
    directions = head_directions(8, dim)
    nearest = torch.cdist(directions, directions).fill_diagonal_(9).amin(1)
    assert (nearest > 0.6).all() or dim == 1


def test_head_directions() -> None:
    ring = [[0, 1], [1, 1], [1, 0], [1, -1], [0, -1], [-1, -1], [-1, 0], [-1, 1]]
    assert_close(head_directions(8, 2), torch.tensor(ring, dtype=torch.float32), 1e-6)
    assert head_directions(5, 1).flatten().tolist() == [1, -1, 1, -1, 1]


def test_initial_projections() -> None:
    module: Any = SparseDeformableAttention(64, 4)
    assert (module.n_levels, module.n_points, module.position_dim) == (4, 4, 2)
    bound = math.sqrt(6 / 128)
    for proj in (module.value_proj, module.out_proj):
        assert not proj.bias.any()
        assert 0.9 * bound < float(proj.weight.detach().abs().max()) <= bound
    assert (module.norm.weight == 1).all()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    module.reset_parameters()
    torch.manual_seed(1)
    fresh = SparseDeformableAttention(64, 4)
    fresh.reset_parameters()
    assert module.offset_proj.bias.equal(fresh.offset_proj.bias)
    assert not any((parameter == 7).all() for parameter in module.parameters())


def test_state_dict() -> None:
    scene = SCENES[2]
    module, other = make_module(scene), make_module(scene)
    arguments = make_arguments(scene)._asdict()
    assert not torch.equal(module(**arguments), other(**arguments))
    other.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(module(**arguments), other(**arguments))
    assert torch.equal(copy.deepcopy(module)(**arguments), other(**arguments))
    names = {name for name in module.state_dict() if name.endswith("weight")}
    parts = ("norm", "offset_proj", "weight_proj", "value_proj", "out_proj")
    assert names == {f"{part}.weight" for part in parts}
    assert len(make_module(scene, bias=False).state_dict()) == len(module.state_dict()) - 2


def test_dropout_of_the_output_in_training() -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene, dropout=0.4), make_arguments(scene)
    added = module(**arguments._asdict()) - arguments.query
    full = module.eval()(**arguments._asdict()) - arguments.query
    dropped = added == 0
    assert 0.2 < float(dropped.double().mean()) < 0.6
    assert_close(added[~dropped], full[~dropped] / 0.6, EXACT)


# ----------------------------------------------------------------- tensors without contents


def shapes_of_a_step(background: bool) -> None:
    """A training step on tensors of the default device, whatever they hold."""
    coordinates = F.pad(torch.randint(0, 8, (60, 2)), (1, 1))
    pyramid = FeaturePyramid(torch.rand(60, 8), coordinates, ((8, 8), (4, 4)), 1)
    module = SparseDeformableAttention(8, 2, n_levels=2)
    query, positions = torch.rand(5, 8, requires_grad=True), torch.rand(5, 2)
    placement = positions, torch.tensor([0, 5]), pyramid
    empty = torch.rand(1, 2, 8) if background else None
    out = module(query, *placement, background_embedding=empty)
    assert out.shape == (5, 8)
    out.sum().backward()
    for leaf in (query, *module.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
    assert module.make_plan(*placement).n_cells == 60
    with pytest.raises(ValueError, match="query: expected a tensor with contents"):
        module.attention_weights(query, *placement)


@pytest.mark.parametrize("background", [False, True])
def test_meta_tensors_give_shapes(background: bool) -> None:
    with torch.device("meta"):
        shapes_of_a_step(background)


@pytest.mark.parametrize("background", [False, True])
def test_fake_tensors_give_shapes(background: bool) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        shapes_of_a_step(background)


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_initial_values_do_not_depend_on_the_default_device(dim: int, heads: int) -> None:
    def make() -> SparseDeformableAttention:
        return SparseDeformableAttention(8 * heads, heads, 2, 3, position_dim=dim)

    with torch.device("meta"):
        module = make()
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
        module = module.to_empty(device="cpu")
        module.reset_parameters()
    assert torch.equal(module.offset_proj.bias, make().offset_proj.bias)


def test_contents_are_unchecked_on_request() -> None:
    cells = torch.tensor([[0, 1, 1, 0]])
    pyramid = FeaturePyramid(torch.ones(1, 8), cells, ((4, 4),), 1)
    attention = SparseDeformableAttention(8, 2, 1, 2)
    positions, offsets = torch.full((1, 2), torch.nan), torch.tensor([0, 1])
    attention.make_plan(positions, offsets, pyramid, check_contents=False)
    with pytest.raises(ValueError, match="query_spatial_positions"):
        attention.make_plan(positions, offsets, pyramid)
    with pytest.raises(ValueError, match="query_level_indices"):
        attention.make_plan(pyramid.positions(), offsets, pyramid, torch.tensor([3]))
