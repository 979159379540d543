"""Deformable attention: against `grid_sample` on densified maps, at its edges, and refusals."""

import copy
import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from detr_scenes import make_pyramid, make_queries, stir
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import LargestTensor, Scene, assert_close, make_scene, scenes, sparse_coo
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

EMBED, HEADS, POINTS = 6, 2, 3
EXACT = 1e-12

SCENES = {
    1: make_scene(((7,), (12,), (5,)), (1, 1, 1), (5, 0, 6), 20),
    2: make_scene(((6, 4), (5, 5), (9, 8)), (1, 1, 1), (5, 0, 6), 60),
    3: make_scene(((3, 5, 4), (6, 5, 3)), (1, 1), (5, 0, 6), 70),
}


def make_module(scene: Scene, **options: Any) -> SparseDeformableAttention:
    """For the scene, in float64, every parameter random: places depend on queries."""
    pyramid = scene.pyramid
    module = SparseDeformableAttention(
        EMBED, HEADS, pyramid.n_levels, POINTS, pyramid.position_dim, **options
    ).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    return module


class Arguments(NamedTuple):
    """What `forward` takes; the map as a pyramid."""

    query: Tensor
    query_spatial_positions: Tensor
    query_batch_offsets: Tensor
    stacked_feature_maps: FeaturePyramid
    background_embedding: Tensor | None = None
    query_mask: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        leaves = [self.query, self.query_spatial_positions, self.stacked_feature_maps.values]
        return leaves if self.background_embedding is None else [*leaves, self.background_embedding]

    def to(self, dtype: torch.dtype) -> "Arguments":
        """The same in another dtype, but for the positions: these in float32."""
        pyramid, background = self.stacked_feature_maps, self.background_embedding
        return self._replace(
            query=self.query.detach().to(dtype),
            query_spatial_positions=self.query_spatial_positions.detach().float(),
            stacked_feature_maps=pyramid.with_values(pyramid.values.detach().to(dtype)),
            background_embedding=None if background is None else background.detach().to(dtype),
        )


def make_arguments(scene: Scene, *, background: bool = False, mask: bool = False) -> Arguments:
    """Random arguments; those that can get gradients require them."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    n, pyramid = len(scene.positions), scene.pyramid
    # Off the borders of cells, where the gradient jumps.
    positions = scene.positions + 0.3 * torch.rand(scene.positions.shape, generator=generator)
    return Arguments(
        draw(n, EMBED),
        positions.requires_grad_(),
        scene.offsets,
        pyramid.with_values(draw(len(pyramid), EMBED)),
        draw(pyramid.batch_size, pyramid.n_levels, EMBED) if background else None,
        torch.rand(n, generator=generator) < 0.3 if mask else None,
    )


def dense_level(
    module: Any, coo: Tensor, image: int, level: int, shape: tuple[int, ...], empty: Tensor
) -> Tensor:
    """``[1, E, *shape]``: the projected map of one level, ``empty`` ``[E]`` where nothing is."""
    indices, embeddings = coo.indices(), coo.values()
    here = (indices[0] == image) & (indices[-1] == level)
    cells = tuple(indices[1:-1, here])
    dense = empty.expand(*shape, -1).clone()
    dense[cells] = module.value_proj(embeddings[here])
    return dense.movedim(-1, 0)[None]


def by_hand(module: Any, arguments: Arguments) -> Tensor:
    """The module, with `grid_sample` on dense maps, image by image and head by head."""
    query, positions, offsets, pyramid, background, mask = arguments
    coo, dim = pyramid.to_coo(), pyramid.position_dim
    shapes = torch.tensor(pyramid.level_shapes, dtype=torch.float64)
    scales = shapes / shapes.amax(0)
    x = module.norm(query) if module.norm_first else query
    levels = len(shapes)
    shifts = module.offset_proj(x).view(-1, HEADS, levels, POINTS, dim)
    weights = module.weight_proj(x).view(-1, HEADS, levels * POINTS).softmax(-1)
    weights = weights.view(-1, HEADS, levels, POINTS)
    attended = [query.new_zeros(0, EMBED)]
    for image in range(pyramid.batch_size):
        rows = slice(int(offsets[image]), int(offsets[image + 1]))
        total = query.new_zeros(rows.stop - rows.start, HEADS, EMBED // HEADS)
        for level, shape in enumerate(pyramid.level_shapes):
            empty = query.new_zeros(EMBED)
            if background is not None:
                empty = module.value_proj(background[image, level])
            dense = dense_level(module, coo, image, level, shape, empty)
            # So much background around the map that no place lies beyond it.
            margin = 0 if background is None else 12
            wide = empty[:, None].expand(-1, math.prod(size + 2 * margin for size in shape))
            wide = wide.reshape(1, EMBED, *[size + 2 * margin for size in shape]).clone()
            inner = wide
            for axis, size in enumerate(shape, start=2):
                inner = inner.narrow(axis, margin, size)
            inner.copy_(dense)
            place = (positions[rows] * scales[level])[:, None, None] + shifts[rows, :, level]
            inside = (place > 1 - margin) & (place < shapes[level] + margin - 1)
            assert background is None or inside.all()
            grid = 2 * (place + margin) / (shapes[level] + 2 * margin) - 1
            grid = grid.flip(-1).transpose(0, 1)  # [H, n, K, P], the last axis first
            if dim == 1:
                wide, grid = wide[:, :, None], F.pad(grid, (0, 1))
            if dim == 3:
                grid = grid[..., None, :]
            maps = wide.view(HEADS, EMBED // HEADS, *wide.shape[2:])
            seen = F.grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
            seen = seen.flatten(3).flatten(2).view(HEADS, EMBED // HEADS, -1, POINTS)
            total = total + torch.einsum("hcnk,nhk->nhc", seen, weights[rows, :, level])
        attended.append(total.flatten(1))
    summed = torch.cat(attended)
    if mask is not None:
        summed = summed.masked_fill(mask[:, None], 0)
    out: Tensor = query + module.out_proj(summed)
    return out if module.norm_first else module.norm(out)


def gradients(out: Tensor, module: nn.Module, arguments: Arguments) -> list[Tensor]:
    """Of all parameters and arguments, for a fixed random cotangent; zero where there is none."""
    generator = torch.Generator().manual_seed(3)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    leaves = [*module.parameters(), *arguments.leaves()]
    return list(
        torch.autograd.grad(out, leaves, cotangent, allow_unused=True, materialize_grads=True)
    )


def assert_as_by_hand(module: Any, arguments: Arguments) -> None:
    out, expected = module(**arguments._asdict()), by_hand(module, arguments)
    assert_close(out, expected, EXACT)
    names = [*dict(module.named_parameters()), "query", "positions", "map", "background"]
    for name, left, right in zip(
        names,
        gradients(out, module, arguments),
        gradients(expected, module, arguments),
        strict=False,
    ):
        assert_close(left, right, 1e-11, f"gradient of {name}")


# -------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_grid_sample_on_dense_maps(dim: int, background: bool, norm_first: bool) -> None:
    module = make_module(SCENES[dim], norm_first=norm_first)
    assert_as_by_hand(module, make_arguments(SCENES[dim], background=background, mask=True))


@given(scene=scenes(), mask=st.booleans(), bias=st.booleans())
@settings(max_examples=25)
def test_random_problems_against_grid_sample(scene: Scene, mask: bool, bias: bool) -> None:
    assert_as_by_hand(make_module(scene, bias=bias), make_arguments(scene, mask=mask))


@pytest.mark.parametrize("background", [False, True])
def test_gradcheck(background: bool) -> None:
    scene = make_scene(((3, 2), (2, 4)), (1, 1), (2, 1), 8)
    index, images = index_cells(scene.pyramid), torch.tensor([0, 0, 1])
    rows = index.n_cells + (4 if background else 1)

    def sample(table: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        if not background:  # a row of zeros, which no one may change
            table = torch.cat((table[:-1], torch.zeros_like(table[-1:])))
        return sampling.sample(table, index, images, places, weights)

    table = torch.randn(rows, 2, 2, dtype=torch.float64, requires_grad=True)
    places = (4 * torch.rand(3, 2, 2, 2, 2, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(sample, (table, places, weights))


def test_four_dimensions() -> None:
    # A linear function is its own interpolation.
    shape, dim = (4, 3, 4, 3), 4
    cells = torch.cartesian_prod(*[torch.arange(size) for size in shape])
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    table = F.pad(((cells.double() + 0.5) @ slope)[:, None, None], (0, 0, 0, 0, 0, 1))
    coordinates = F.pad(cells, (1, 1))
    pyramid = FeaturePyramid(torch.zeros(len(cells), 1), coordinates, (shape,), 1)
    spans = torch.tensor([3.0, 2.0, 3.0, 2.0], dtype=torch.float64)
    places = 0.5 + spans * torch.rand(20, 1, 1, 1, dim, dtype=torch.float64)
    weights = torch.ones(20, 1, 1, 1, dtype=torch.float64)
    images = torch.zeros(20, dtype=torch.int64)
    out = sampling.sample(table, index_cells(pyramid), images, places, weights)
    assert_close(out.flatten(), (places @ slope).flatten(), EXACT)


def test_points_that_share_a_cell_are_one() -> None:
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
def test_chunks_make_no_difference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    whole = module(**arguments._asdict())
    grads = gradients(whole, module, arguments)
    monkeypatch.setitem(sampling._CHUNK, "cpu", chunk)
    parts = module(**arguments._asdict())
    assert torch.equal(parts, whole)
    for left, right in zip(gradients(parts, module, arguments), grads, strict=True):
        assert_close(left, right, EXACT)


# ----------------------------------------------------------------------------------- the edges


@pytest.mark.parametrize("background", [False, True])
def test_no_points(background: bool) -> None:
    scene = make_scene(((6, 4), (9, 8)), (1, 1), (3, 2), 0)
    module = make_module(scene)
    arguments = make_arguments(scene, background=background)
    out = module(**arguments._asdict())
    if background:
        weights = module.weight_proj(module.norm(arguments.query))
        weights = weights.view(5, HEADS, 2, POINTS).softmax(-1).sum(-1)
        assert_as_by_hand(module, arguments)
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
def test_queries_beyond_the_map(far: float) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene)
    away = arguments._replace(query_spatial_positions=torch.full((11, 2), far).double())
    out = module(**away._asdict())
    assert_close(out, arguments.query + module.out_proj.bias, EXACT)
    background = make_arguments(scene, background=True).background_embedding
    seen = module(**away._replace(background_embedding=background)._asdict())
    assert seen.isfinite().all()
    assert (seen - out).abs().amax(1).min() > 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_positions_that_are_not_finite(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    positions = arguments.query_spatial_positions.detach().clone()
    positions[4, 1] = value
    nowhere = arguments._replace(query_spatial_positions=positions.requires_grad_())
    with pytest.raises(ValueError, match="query_spatial_positions: expected finite"):
        module(**nowhere._asdict())
    # Where nobody looks, as on a GPU, it takes no part.
    monkeypatch.setattr("vicinal.plan.reads_contents", lambda *_: False)
    mask = torch.arange(11) == 4
    masked = arguments._replace(query_mask=mask)
    out, expected = module(**nowhere._asdict()), module(**masked._asdict())
    assert torch.equal(out, expected)
    for left, right in zip(
        gradients(out, module, nowhere), gradients(expected, module, masked), strict=True
    ):
        assert torch.equal(left, right)


def test_queries_of_no_image_take_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    monkeypatch.setattr("vicinal.plan.reads_contents", lambda *_: False)
    short = arguments._replace(query_batch_offsets=torch.tensor([0, 5, 5, 9]))
    masked = arguments._replace(query_mask=torch.arange(11) >= 9)
    assert torch.equal(module(**short._asdict()), module(**masked._asdict()))


def test_offsets_that_are_not_finite_are_seen_in_the_output() -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene)
    with torch.no_grad():
        module.offset_proj.bias[0] = math.nan
    assert module(**arguments._asdict()).isnan().all()


@pytest.mark.parametrize("background", [False, True])
def test_memory_without_contents_is_not_read(background: bool, uninitialised_is_nan: None) -> None:
    assert_as_by_hand(make_module(SCENES[2]), make_arguments(SCENES[2], background=background))


def test_misplaced_points_take_no_part() -> None:
    scene = SCENES[2]
    pyramid = scene.pyramid
    rows = [[0, 6, 3, 0], [0, -1, 0, 1], [7, 0, 0, 0], [0, 0, 0, 9], [-1, 0, 0, 0]]
    bad = torch.cat((pyramid.coordinates, torch.tensor(rows)))
    module, arguments = make_module(scene), make_arguments(scene)
    values = torch.cat((arguments.stacked_feature_maps.values, torch.ones(5, EMBED)))
    more = FeaturePyramid(values, bad, pyramid.level_shapes, 3, check_contents=False)
    out = module(**arguments._replace(stacked_feature_maps=more)._asdict())
    assert_close(out, module(**arguments._asdict()), EXACT)


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


def test_masked_queries_see_nothing_of_other_images() -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    pyramid, background = arguments.stacked_feature_maps, arguments.background_embedding
    assert background is not None
    spoilt = arguments._replace(
        stacked_feature_maps=pyramid.with_values(
            pyramid.values.masked_fill(pyramid.batch[:, None] == 0, math.nan)
        ),
        background_embedding=background.index_fill(0, torch.tensor(0), math.nan),
        query_mask=torch.arange(11) >= 7,
    )
    out = module(**spoilt._asdict())
    assert out[:5].isnan().all()
    assert out[5:].isfinite().all()


@pytest.mark.parametrize("background", [False, True])
def test_the_same_bits_twice(background: bool, restored_threads: None) -> None:
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


# ------------------------------------------------------------------------------- the weights


def by_weights(module: Any, arguments: Arguments, queries: Tensor | None = None) -> Tensor:
    """The output for ``queries``, all if None, from the weights and the values they belong to;
    for modules without biases, which would count for every point instead of every cell.
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
def test_weights_times_values_give_the_output(
    scene: Scene, background: bool, mask: bool, norm_first: bool
) -> None:
    module = make_module(scene, bias=False, norm_first=norm_first)
    arguments = make_arguments(scene, background=background, mask=mask)
    whole = by_weights(module, arguments)
    assert_close(whole, module(**arguments._asdict()), EXACT)
    queries = torch.arange(len(scene.positions))[1::2].flip(0)
    assert_close(by_weights(module, arguments, queries), whole[queries], EXACT)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_each_query_has_the_points_around_its_places_in_order(dim: int) -> None:
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
            places = (position * scales[level] + shifts[query, :, level]).flatten(0, 1)
            near = (places - torch.tensor(cell) - 0.5).abs().lt(1).all(1).any()
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
    seen = module.attention_weights(query, position, offsets, pyramid)
    assert seen.offsets.tolist() == [0, 3]
    assert seen.points.tolist() == [0, 1, 2]
    expected = torch.tensor([0.75, 0.25, 0.75]).double()[:, None].expand(-1, HEADS)
    assert_close(seen.weights, expected, EXACT)


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
    looks = ~arguments.query_mask
    assert_close(sums, looks[:, None].expand(-1, HEADS).double(), EXACT)
    assert not offsets.diff()[~looks].any()
    assert (background.sum(1) < 1)[looks].any(), "some look at points"
    bare = module.attention_weights(**arguments._replace(background_embedding=None)._asdict())
    assert bare.background is None
    assert torch.equal(bare.weights, weights)


def test_weights_where_there_is_nothing_to_look_at() -> None:
    empty = make_scene(((6, 4), (9, 8)), (1, 1), (3, 2), 0)
    for scene in (empty, make_scene(((6, 4), (9, 8)), (1, 1), (0, 0), 9)):
        module, n = make_module(scene), len(scene.positions)
        arguments = make_arguments(scene, background=True)
        offsets, points, weights, background = module.attention_weights(**arguments._asdict())
        assert offsets.tolist() == [0] * (n + 1)
        assert (len(points), weights.shape) == (0, (0, HEADS))
        assert background is not None
        assert_close(background.sum(1), torch.ones(n, HEADS).double(), EXACT)


@pytest.mark.parametrize(
    ("queries", "came"),
    [
        (torch.tensor([0, 11]), "11"),
        (torch.tensor([-1]), "-1"),
        (torch.tensor([[0]]), "[1, 1]"),
        (torch.tensor([0.0]), "float32"),
        ([0], "list"),
    ],
)
def test_refusals_of_queries_to_look_at(queries: Any, came: str) -> None:
    call = make_arguments(SCENES[2])._asdict()
    with pytest.raises(ValueError, match=r"^queries: expected") as refusal:
        make_module(SCENES[2]).attention_weights(**call, queries=queries)
    assert came in str(refusal.value).split("got")[-1]


# ------------------------------------------------------------------------- encoder and decoder


def test_an_encoder_and_a_decoder_learn_with_it() -> None:
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


# -------------------------------------------------------------------------------------- plans


def test_a_plan_is_for_any_queries_and_values() -> None:
    scene = SCENES[2]
    module, arguments = make_module(scene), make_arguments(scene, background=True)
    plan = module.make_plan(scene.positions[:3], torch.tensor([0, 1, 1, 3]), scene.pyramid)
    built, shared = module(**arguments._asdict()), module(**arguments._asdict(), plan=plan)
    assert torch.equal(built, shared)
    assert repr(plan).startswith("CellIndex(points=60, cells=")


def test_cells_are_found_by_looking() -> None:
    for scene in SCENES.values():
        pyramid, index = scene.pyramid, index_cells(scene.pyramid)
        found = {
            tuple(row): int(cell)
            for row, cell in zip(pyramid.coordinates.tolist(), index.cell_of_point, strict=True)
        }
        dim = pyramid.position_dim
        for level, shape in enumerate(pyramid.level_shapes):
            firsts = torch.cartesian_prod(*[torch.arange(-4, size + 4) for size in shape])
            firsts = firsts.view(-1, dim).double()
            for image in range(3):
                axes = [axis[None, None] for axis in firsts.unbind(1)]
                levels = torch.full((len(firsts),), level)
                corners = index.find(torch.tensor([image]), levels, axes)[0, 0]
                offsets = torch.cartesian_prod(*[torch.arange(2)] * dim).view(-1, dim)
                for offset, cells in zip(offsets, corners, strict=True):
                    expected = [
                        found.get((image, *cell, level), index.n_cells)
                        for cell in (firsts + offset).long().tolist()
                    ]
                    assert cells.tolist() == expected


def test_many_cells_in_a_row_fill_no_bucket() -> None:
    # However regular their keys: buckets decide how long a look takes.
    axis = torch.arange(0, 4096, 4)
    grid = torch.cartesian_prod(axis[:200], axis[:200])
    for cells in (F.pad(axis[:, None], (1, 0)), F.pad(axis[:, None], (0, 1)), grid):
        pyramid = FeaturePyramid(
            torch.zeros(len(cells), 1), F.pad(cells, (1, 1)), ((4096, 4096),), 1
        )
        assert index_cells(pyramid)._fullest <= 6


# ---------------------------------------------------------------------------------- precision


def test_float32() -> None:
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
    """Queries and points at cells of some 300, where bfloat16 counts in steps of two."""
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
    assert confused > 5 * error, "rounded positions would show"
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


# -------------------------------------------------------------------------------------- memory


def test_memory_is_linear_in_queries_times_places() -> None:
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
    places = n * heads * levels * points
    floats = places * (dim + 2) + 3 * (n + 2000) * embed
    assert sum(kept.values()) < 4 * floats
    # Eight bytes for each corner that is looked at together, and no table of 2 ** P rows per place.
    assert largest.nbytes <= max(8 * sampling._CHUNK["cpu"], 4 * places * dim)


def test_dense_maps_are_never_built() -> None:
    # 2^60 cells.
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


# ---------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("dim", [1, 2, 3, 4])
def test_initial_places_are_rings_around_the_query(dim: int) -> None:
    module = SparseDeformableAttention(16, 8, 3, 4, dim)
    assert not module.offset_proj.weight.any()
    assert not module.weight_proj.weight.any()
    assert not module.weight_proj.bias.any()
    places = module.offset_proj.bias.detach().view(8, 3, 4, dim)
    for step in range(4):
        assert_close(places[:, :, step].abs().amax(-1), torch.full((8, 3), step + 1.0), 1e-6)
    assert torch.equal(places, places[:, :1].expand_as(places))
    assert_close(places.mean(0), torch.zeros(3, 4, dim), 1e-6, "no side is preferred")
    directions = head_directions(8, dim)
    nearest = torch.cdist(directions, directions).fill_diagonal_(9).amin(1)
    assert (nearest > 0.6).all() or dim == 1


def test_directions_of_heads() -> None:
    ring = [[0, 1], [1, 1], [1, 0], [1, -1], [0, -1], [-1, -1], [-1, 0], [-1, 1]]
    assert_close(head_directions(8, 2), torch.tensor(ring, dtype=torch.float32), 1e-6)
    assert head_directions(5, 1).flatten().tolist() == [1, -1, 1, -1, 1]


def test_initial_projections() -> None:
    module = SparseDeformableAttention(64, 4)
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


# ----------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("embed_dim", 10),  # not a multiple of 4 heads
        ("embed_dim", 0),
        ("embed_dim", 16.0),
        ("n_heads", 0),
        ("n_levels", -1),
        ("n_points", 0),
        ("n_points", 2.0),
        ("position_dim", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_constructor_refusals(argument: str, value: object) -> None:
    options: dict[str, Any] = {"embed_dim": 16, "n_heads": 4} | {argument: value}
    with pytest.raises(ValueError, match=f"^{argument}: expected .* got .*{value}"):
        SparseDeformableAttention(**options)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **{"dtype": torch.float64} | options)


MAP = SCENES[2].pyramid.with_values(zeros(60, EMBED))
OTHER = make_scene(((6, 4), (5, 5)), (1, 1), (5, 0, 6), 60)


@pytest.mark.parametrize(
    ("argument", "value", "came"),
    [
        ("query", zeros(11), "[11]"),
        ("query", zeros(11, 5), "[11, 5]"),
        ("query", zeros(11, EMBED, dtype=torch.float32), "float32"),
        ("query", None, "None"),
        ("query_spatial_positions", zeros(10, 2), "[10, 2]"),
        ("query_spatial_positions", zeros(11, 3), "[11, 3]"),
        ("query_spatial_positions", zeros(11, 2, dtype=torch.int64), "int64"),
        ("query_batch_offsets", torch.tensor([0, 5, 11]), "[3]"),
        ("query_batch_offsets", torch.tensor([0, 6, 5, 11]), "[0, 6, 5, 11]"),
        ("query_batch_offsets", zeros(4), "float64"),
        ("stacked_feature_maps", MAP.to_coo().to_dense(), "[3, 9, 8, 3, 6]"),
        ("stacked_feature_maps", MAP.with_values(zeros(60, 4)), "[60, 4]"),
        ("stacked_feature_maps", MAP.with_values(MAP.values.float()), "float32"),
        ("stacked_feature_maps", None, "None"),
        ("level_spatial_shapes", [[6, 4], [5, 5], [9, 9]], "(9, 9)"),
        ("level_spatial_shapes", [[6, 4], [9, 8]], "(9, 8)"),
        ("background_embedding", zeros(2, 3, EMBED), "[2, 3, 6]"),
        ("background_embedding", zeros(3, 2, EMBED), "[3, 2, 6]"),
        ("query_level_indices", torch.full((11,), 3), "3"),
        ("query_level_indices", zeros(11), "float64"),
        ("query_mask", zeros(11), "float64"),
        ("query_mask", torch.zeros(10, dtype=torch.bool), "[10]"),
        ("plan", SCENES[2].plan(), "NeighborhoodPlan"),
        ("plan", index_cells(OTHER.pyramid), "cells="),
    ],
)
def test_forward_refusals(argument: str, value: object, came: str) -> None:
    call = make_arguments(SCENES[2])._asdict() | {"level_spatial_shapes": MAP.level_shapes}
    call |= {argument: value}
    with pytest.raises(ValueError, match="expected") as refusal:
        make_module(SCENES[2])(**call)
    message = str(refusal.value)
    assert message.startswith(f"{argument}: expected ")
    assert came in message.split("got")[-1]


def test_a_sparse_map_needs_its_shapes() -> None:
    call = make_arguments(SCENES[2])._asdict() | {"stacked_feature_maps": MAP.to_coo()}
    with pytest.raises(ValueError, match=r"^level_spatial_shapes: expected"):
        make_module(SCENES[2])(**call)
    coo = sparse_coo(torch.tensor([[0], [8], [7], [0]]), zeros(1, EMBED), (3, 9, 8, 3, EMBED))
    call |= {"stacked_feature_maps": coo, "level_spatial_shapes": MAP.level_shapes}
    with pytest.raises(ValueError, match="stacked_feature_maps: expected cells inside"):
        make_module(SCENES[2])(**call)


def test_plan_refusals() -> None:
    scene = SCENES[2]
    module = make_module(scene)
    with pytest.raises(ValueError, match=r"^pyramid: expected"):
        module.make_plan(scene.positions, scene.offsets, MAP.to_coo())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^query_batch_offsets: expected"):
        module.make_plan(scene.positions, scene.offsets[1:], scene.pyramid)
    with pytest.raises(ValueError, match=r"^pyramid: expected"):
        index_cells(MAP.to_coo())  # type: ignore[arg-type]
    huge = dataclasses.replace(MAP, level_shapes=((2**31, 2**31),) * 3, check_contents=False)
    with pytest.raises(ValueError, match="level_shapes: expected fewer than"):
        index_cells(huge)
