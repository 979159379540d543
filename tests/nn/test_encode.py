"""Calls that leave nothing to get wrong: every point a query, plans that are checked, batches."""

import dataclasses
from typing import Any

import deformable_scenes
import pytest
import torch
from block_scenes import EMBED, EXACT, coo_arguments, distinct_scene, make_arguments, make_block
from problems import assert_close, run_python, scene_2d
from torch import Tensor

from vicinal import (
    FeaturePyramid,
    QueryPlacement,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
)
from vicinal._utils.types import BackendName

KINDS = pytest.mark.parametrize("kind", ["block", "deformable"])


def make_module(kind: str, backend: BackendName = "cpu") -> Any:
    if kind == "block":
        return make_block(scene_2d(), backend)
    return deformable_scenes.make_module(deformable_scenes.SCENES[2])


def points_for(module: Any, n: int = 50) -> FeaturePyramid:
    """Points of the module's levels, in no order, with metadata."""
    shapes = ((8, 16), (4, 8), (2, 4))[: module.n_levels]
    level = torch.randint(len(shapes), (n,))
    cells = [torch.randint(shapes[index][axis], (1,)) for index in level for axis in (0, 1)]
    coordinates = torch.cat(
        (torch.randint(3, (n, 1)), torch.cat(cells).view(n, 2), level[:, None]), 1
    )
    values = torch.randn(n, module.embed_dim, dtype=torch.float64)
    return FeaturePyramid(values, coordinates, shapes, 4, origin=(1.0, 2.0), cell_size=(0.5, 0.25))


# ----------------------------------------------------------------------------- encode


@KINDS
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_encode_lets_every_point_attend(
    kind: str, background: bool, planned: bool, backend: BackendName
) -> None:
    module = make_module(kind, backend)
    pyramid = points_for(module)
    cells = torch.randn(4, module.n_levels, module.embed_dim, dtype=torch.float64)
    order = pyramid.batch.argsort(stable=True)
    images = pyramid.batch[order]
    expected = torch.empty_like(pyramid.values)
    expected[order] = module(
        pyramid.values[order],
        pyramid.positions(torch.float64)[order],
        torch.tensor([0, *[int((images <= image).sum()) for image in range(4)]]),
        pyramid,
        background_embedding=cells if background else None,
        query_level_indices=pyramid.levels[order],
    ).detach()
    plan = module.make_encoder_plan(pyramid) if planned else None
    encoded = module.encode(pyramid, plan, cells if background else None)
    assert_close(encoded.values, expected, EXACT)
    assert torch.equal(encoded.coordinates, pyramid.coordinates)
    for name in ("level_shapes", "batch_size", "origin", "cell_size", "strides", "periodic_axes"):
        assert getattr(encoded, name) == getattr(pyramid, name)


@KINDS
def test_placement_feeds_plan_and_call(kind: str) -> None:
    module = make_module(kind)
    pyramid = points_for(module)
    positions = 8 * torch.rand(4, 5, 2, dtype=torch.float64)
    padding = torch.arange(5) >= torch.tensor([[5], [2], [0], [3]])
    levels = torch.randint(module.n_levels, (4, 5))
    placement = QueryPlacement.from_padded(positions, padding, levels)
    query = torch.randn(10, module.embed_dim, dtype=torch.float64)
    plan = module.make_plan(**placement.arguments(), pyramid=pyramid)
    out = module(query, **placement.arguments(), stacked_feature_maps=pyramid, plan=plan)
    offsets = torch.tensor([0, 5, 7, 7, 10])
    expected = module(
        query, positions[~padding], offsets, pyramid, query_level_indices=levels[~padding]
    )
    assert torch.equal(out, expected)


@KINDS
def test_encode_refuses_what_is_no_pyramid(kind: str) -> None:
    with pytest.raises(ValueError, match=r"^pyramid: expected"):
        make_module(kind).encode(torch.zeros(2, 3))


@KINDS
@pytest.mark.parametrize(
    "change",
    [
        lambda pyramid: pyramid.with_values(pyramid.values[:, 1:]),
        lambda pyramid: pyramid.with_values(pyramid.values.long()),
        lambda pyramid: pyramid.to(torch.float32),
        lambda pyramid: dataclasses.replace(pyramid, level_shapes=((9, 17),) * 7),
    ],
)
def test_encode_names_the_pyramid_that_does_not_fit(kind: str, change: Any) -> None:
    module = make_module(kind)
    with pytest.raises(ValueError, match=r"^pyramid\.(values|level_shapes): expected"):
        module.encode(change(points_for(module)))


# ------------------------------------------------------------------------------ plans


@KINDS
@pytest.mark.parametrize("change", ["permuted", "moved", "other images"])
def test_plan_for_other_points_raises(kind: str, change: str, backend: BackendName) -> None:
    module = make_module(kind, backend)
    pyramid = points_for(module)
    plan = module.make_encoder_plan(pyramid)
    coordinates = pyramid.coordinates.clone()
    if change == "permuted":
        coordinates = coordinates.roll(1, 0)
    elif change == "moved":
        coordinates[0, 1] = (coordinates[0, 1] + 1) % 2
    else:
        coordinates[:, 0] = 2 - coordinates[:, 0]
    other = dataclasses.replace(pyramid, coordinates=coordinates)
    with pytest.raises(ValueError, match=r"^plan: made for other points.*stacked_feature_maps"):
        module.encode(other, plan)


def test_plan_of_a_pyramid_is_not_that_of_its_map() -> None:
    scene = distinct_scene()
    block = make_block(scene)
    arguments = make_arguments(scene)
    plan = block.make_plan(scene.positions, scene.offsets, scene.pyramid)
    call, _, _ = coo_arguments(arguments)
    with pytest.raises(ValueError, match=r"^plan: made for other points"):
        block(**call, plan=plan)


def test_plan_for_other_query_cells_raises(backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    arguments = make_arguments(scene)._asdict()
    plan = block.make_plan(scene.positions, scene.offsets, scene.pyramid)
    moved = scene.positions + 3
    with pytest.raises(ValueError, match=r"^plan: made for other query cells"):
        block(**arguments | {"query_spatial_positions": moved}, plan=plan)
    unchecked = arguments | {"query_spatial_positions": moved, "check_contents": False}
    assert block(**unchecked, plan=plan).isfinite().all()


def test_queries_may_move_within_their_cells(backend: BackendName) -> None:
    scene = scene_2d()
    block = make_block(scene, backend)
    arguments = make_arguments(scene)._asdict()
    plan = block.make_plan(scene.positions, scene.offsets, scene.pyramid)
    moved = {"query_spatial_positions": scene.positions + 1e-9}
    assert_close(block(**arguments | moved, plan=plan), block(**arguments | moved), 0.0)


@KINDS
def test_plan_made_in_inference_mode_can_be_trained_with(kind: str, backend: BackendName) -> None:
    module = make_module(kind, backend)
    pyramid = points_for(module)
    with torch.inference_mode():
        plan = module.make_encoder_plan(pyramid)
    module.encode(pyramid, plan).values.square().sum().backward()
    found = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    module.encode(pyramid).values.square().sum().backward()
    for grad, parameter in zip(found, module.parameters(), strict=True):
        assert torch.equal(grad, parameter.grad)


# ---------------------------------------------------------------------------- batches


@KINDS
def test_images_that_are_missing_at_the_end_hold_nothing(kind: str, backend: BackendName) -> None:
    module = make_module(kind, backend)
    pyramid = points_for(module)  # the last of four images is empty
    query = torch.randn(6, module.embed_dim, dtype=torch.float64)
    positions = 8 * torch.rand(6, 2, dtype=torch.float64)
    cells = torch.randn(4, module.n_levels, module.embed_dim, dtype=torch.float64)
    offsets = torch.tensor([0, 2, 5, 6, 6])
    call = {"query": query, "query_spatial_positions": positions, "background_embedding": cells}
    expected = module(**call, query_batch_offsets=offsets, stacked_feature_maps=pyramid)

    def assert_same(**changes: Any) -> None:
        given = {"query_batch_offsets": offsets, "stacked_feature_maps": pyramid}
        assert torch.equal(module(**call | given | changes), expected)

    assert_same(query_batch_offsets=offsets[:-1])
    assert_same(background_embedding=cells[:-1])
    assert_same(background_embedding=torch.cat((cells, cells)))
    assert_same(stacked_feature_maps=dataclasses.replace(pyramid, batch_size=3))
    with pytest.raises(ValueError, match=r"^background_embedding: expected .*3 .*got.*\[2, "):
        assert_same(background_embedding=cells[:2])


def test_maps_smaller_and_larger_than_the_full_shape() -> None:
    scene = distinct_scene()
    block = make_block(scene)
    call, coo, _ = coo_arguments(make_arguments(scene))
    expected = block(**call)
    coo = coo.detach()
    tight = [int(size) + 1 for size in coo.indices().amax(1)]
    for sizes in (tight, [size + 3 for size in tight]):
        sized = torch.sparse_coo_tensor(
            coo.indices(), coo.values(), (*sizes, EMBED), check_invariants=True
        )
        sized = sized if sizes == tight else sized.coalesce()
        maps = {"stacked_feature_maps": sized}
        assert torch.equal(block(**call | maps), expected)


# ----------------------------------------------------------------------------- warning

WARNINGS = """
import warnings, torch
from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
block = SparseNeighborhoodAttentionBlock(8, 2, 1, [3], position_dim=1)
for size, n, factor in {calls}:
    pyramid = FeaturePyramid(torch.randn(1, 8), torch.tensor([[0, 0, 0]]), [(size,)], 1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        block(torch.randn(n, 8), factor * torch.linspace(0, 1, n)[:, None],
              torch.tensor([0, n]), pyramid)
    about = [w for w in caught if "query_spatial_positions" in str(w.message)]
    print([w.category.__name__ for w in about])
"""


def test_positions_in_the_unit_interval_are_warned_of_once() -> None:
    """By a process, which starts once: a call that warns comes after all that do not."""
    silent, warned = [(8, 15, 1), (8, 16, 8), (1, 16, 1)], (8, 16, 1)
    lines = run_python(WARNINGS.format(calls=[*silent, *silent, warned, warned])).splitlines()
    assert lines == ["[]"] * 6 + ["['UserWarning']", "[]"]


# ------------------------------------------------------------------------ periodic axes


def perturbed(module: Any) -> Any:
    """In float64, with parameters of which none are zero, so that gradients reach all others."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module.double()


def seam_scene(shift: int) -> tuple[FeaturePyramid, Tensor]:
    """Points and queries near the seam of the last axis, moved by ``shift`` cells of the map."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((8, 16), (4, 8))
    rows, columns = torch.randint(8, (40,), generator=generator), torch.arange(40) % 16
    fine = torch.stack((torch.zeros(40).long(), rows, (columns + shift) % 16), 1)
    coarse = fine // torch.tensor([1, 2, 2])
    coordinates = torch.cat(
        [
            torch.nn.functional.pad(part, (0, 1), value=level)
            for level, part in enumerate((fine, coarse))
        ]
    )
    values = torch.randn(80, EMBED, generator=generator, dtype=torch.float64)
    pyramid = FeaturePyramid(values, coordinates, shapes, 1, periodic_axes=(1,))
    positions = torch.rand(20, 2, generator=generator, dtype=torch.float64)
    positions = positions * torch.tensor([8, 16]) + torch.tensor([0, shift])
    return pyramid, positions


def unwound_loop(block: Any, query: Tensor, positions: Tensor, pyramid: FeaturePyramid) -> Tensor:
    """The block over the map repeated three times, without periodic axes."""
    sizes = torch.tensor(pyramid.level_shapes)
    copies = []
    for turn in range(3):
        moved = pyramid.coordinates.clone()
        moved[:, 2] += turn * sizes[pyramid.levels, 1]
        copies.append(moved)
    shapes = tuple((rows, 3 * columns) for rows, columns in pyramid.level_shapes)
    values = pyramid.values.repeat(3, 1)
    plain = FeaturePyramid(values, torch.cat(copies), shapes, 1)
    inside = positions % torch.tensor([1e9, 16.0], dtype=torch.float64)
    inside = inside + torch.tensor([0.0, 16.0])
    out: Tensor = block(query, inside, torch.tensor([0, len(query)]), plain)
    return out


@KINDS
@pytest.mark.parametrize("background", [False, True])
def test_results_do_not_depend_on_where_the_seam_is(
    kind: str, background: bool, backend: BackendName
) -> None:
    if kind == "block":
        module: Any = SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 5), backend=backend)
    else:
        module = SparseDeformableAttention(EMBED, 2, 2)
    module = perturbed(module)
    query = torch.randn(20, EMBED, dtype=torch.float64, requires_grad=True)
    cells = torch.randn(1, 2, EMBED, dtype=torch.float64, requires_grad=True)
    given = {"background_embedding": cells} if background else {}
    answers = []
    for shift in (0, 2, 8, 14, -30):
        pyramid, positions = seam_scene(shift)
        pyramid = pyramid.with_values(pyramid.values.requires_grad_())
        positions.requires_grad_()
        out = module(query, positions, torch.tensor([0, 20]), pyramid, **given)
        leaves = {"query": query, "positions": positions, "values": pyramid.values, **given}
        leaves |= dict(module.named_parameters())
        grads = torch.autograd.grad(out.square().sum(), tuple(leaves.values()))
        answers.append({"out": out, **dict(zip(leaves, grads, strict=True))})
    for answer in answers[1:]:
        for name, expected in answers[0].items():
            assert expected.any(), name
            # A shift changes the last bits of positions and angles and the order of sums.
            tolerance = 1e-13 * max(1.0, float(expected.detach().abs().max()))
            assert_close(answer[name], expected, tolerance, name)
    if kind == "block" and not background:
        pyramid, positions = seam_scene(6)
        out = module(query, positions, torch.tensor([0, 20]), pyramid)
        assert_close(out, unwound_loop(module, query, positions, pyramid), 1e-13)


def test_periodic_axes_of_a_sparse_map() -> None:
    module: Any = SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 5)).double()
    pyramid, positions = seam_scene(6)
    query = torch.randn(20, EMBED, dtype=torch.float64)
    offsets, coo = torch.tensor([0, 20]), pyramid.to_coo()
    shapes = pyramid.level_shapes
    of_map = FeaturePyramid.from_coo(coo, shapes, periodic_axes=(1,))
    expected = module(query, positions, offsets, of_map)
    assert torch.equal(module(query, positions, offsets, of_map, periodic_axes=[1]), expected)
    assert torch.equal(module(query, positions, offsets, coo, shapes, periodic_axes=(1,)), expected)
    assert not torch.equal(module(query, positions % 8, offsets, coo, shapes), expected)
    with pytest.raises(ValueError, match=r"^periodic_axes: expected"):
        module(query, positions, offsets, of_map, periodic_axes=(0,))


def test_weights_list_points_and_never_copies(backend: BackendName) -> None:
    module: Any = SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 5), backend=backend).double()
    pyramid, positions = seam_scene(6)
    query = torch.randn(20, EMBED, dtype=torch.float64)
    offsets, points, weights, _ = module.attention_weights(
        query, positions, torch.tensor([0, 20]), pyramid
    )
    assert int(points.max()) < len(pyramid)
    row = torch.repeat_interleave(offsets.diff())
    values = module.kv_proj(pyramid.values)[:, EMBED:].unflatten(1, (2, -1))[points]
    attended = torch.zeros(20, 2, EMBED // 2, dtype=torch.float64)
    attended = attended.index_add(0, row, weights[..., None] * values)
    expected = module(query, positions, torch.tensor([0, 20]), pyramid)
    assert_close(query + module.out_proj(attended.flatten(1)), expected, EXACT)


# ----------------------------------------------------------------- tensors without contents


def test_meta_tensors_give_shapes() -> None:
    scene = scene_2d()
    block = make_block(scene, None).to("meta")
    arguments = make_arguments(scene, background=True, levels=True, mask=True)._asdict()
    call = {
        name: value.to("meta") if isinstance(value, Tensor | FeaturePyramid) else value
        for name, value in arguments.items()
    }
    out = block(**call)
    assert (out.device.type, out.shape) == ("meta", arguments["query"].shape)


def test_fake_tensors_give_shapes() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        block = SparseNeighborhoodAttentionBlock(12, 2, 2, (3, 5))
        coordinates = torch.zeros(30, 4, dtype=torch.int64)
        pyramid = FeaturePyramid(torch.randn(30, 12), coordinates, ((8, 8), (4, 4)), 1)
        out = block(torch.randn(5, 12), torch.rand(5, 2), torch.tensor([0, 5]), pyramid)
        assert out.shape == (5, 12)


# ------------------------------------------------------------------------------- compiled


def test_block_compiles_on_a_pyramid_of_a_sparse_map() -> None:
    scene = distinct_scene()
    block = make_block(scene)
    call, coo, _ = coo_arguments(make_arguments(scene))
    shapes = call.pop("level_spatial_shapes")
    call["stacked_feature_maps"] = FeaturePyramid.from_coo(coo.detach(), shapes)
    call["plan"] = block.make_plan(
        call["query_spatial_positions"], call["query_batch_offsets"], call["stacked_feature_maps"]
    )
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    assert_close(compiled(**call), block(**call), 1e-12)


# ------------------------------------------------------------------------------ large maps


@KINDS
def test_positions_on_large_maps_need_a_dtype_that_holds_the_cells(kind: str) -> None:
    size = 2**24
    coordinates = torch.tensor([[0, size - 1 - cell, 0] for cell in range(5)])
    module: Any = (
        SparseNeighborhoodAttentionBlock(EMBED, 2, 1, [1], position_dim=1)
        if kind == "block"
        else SparseDeformableAttention(EMBED, 2, 1, position_dim=1)
    )
    pyramid = FeaturePyramid(torch.randn(5, EMBED), coordinates, ((size,),), 1)
    assert pyramid.positions().dtype == torch.float64
    narrow = pyramid.positions().float()
    call = torch.randn(5, EMBED), narrow, torch.tensor([0, 5]), pyramid
    with pytest.raises(ValueError, match=r"^query_spatial_positions: expected"):
        module(*call)
    assert module.encode(pyramid).values.isfinite().all()
    if kind == "block":  # windows of one cell: every point sees itself alone
        _, points, weights, _ = module.attention_weights(
            torch.randn(5, EMBED), pyramid.positions(), torch.tensor([0, 5]), pyramid
        )
        assert points.tolist() == list(range(5))
        assert (weights == 1).all()
