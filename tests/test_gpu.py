"""Tests that need a GPU: `make gpu-test`. The results of kernels are tested on every machine, in
`backends.test_triton`, which uses a GPU if there is one.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from problems import answer, make_inputs, make_scene
from torch import Tensor

from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
    neighborhood_attention,
    plan_neighborhoods,
)
from vicinal._index import sampling
from vicinal._index.cell_hash import index_cells
from vicinal.backends import reference
from vicinal.detr import Decoder, DecoderLayer, FeedForward, ObjectQueries, QuerySelfAttention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

EMBED, SIZES = 64, (3, 5, 7)


def make_points(n_points: int, side: int = 128) -> FeaturePyramid:
    """Points of three levels, two images of them, on the GPU."""
    generator = torch.Generator().manual_seed(n_points)
    cells = torch.randint(0, side, (n_points, 2), generator=generator)
    image = torch.randint(0, 2, (n_points, 1), generator=generator)
    values = torch.randn(n_points, EMBED, generator=generator)
    points = FeaturePyramid.from_points(
        torch.cat((image, cells), 1), values, (side, side), 2, strides=(1, 2, 4)
    )
    return points.to("cuda")


def make_block(**options: float) -> SparseNeighborhoodAttentionBlock:
    torch.manual_seed(0)
    return SparseNeighborhoodAttentionBlock(EMBED, 4, 3, SIZES, **options).cuda()  # type: ignore[arg-type]


def step(
    block: SparseNeighborhoodAttentionBlock, points: FeaturePyramid, offsets: Tensor
) -> tuple[Tensor, ...]:
    """A training step, planning included: output and gradients."""
    values = points.values.detach().requires_grad_()
    out = block(values, points.positions(), offsets, points.with_values(values))
    sources = [values, *block.parameters()]
    return out.detach(), *torch.autograd.grad(out.square().sum(), sources)


@pytest.fixture
def restored_sync_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thousands_of_queries(dtype: torch.dtype) -> None:
    """Thousands of tiles against the reference in float64, on the same card."""
    scene = make_scene(((200, 160), (100, 80), (50, 40)), (5, 7, 9), (3000, 0, 5000), 12000)
    plan = scene.plan().to("cuda")
    inputs = make_inputs(plan.to("cpu"), heads=4, width=32, background=True, mask=True, dtype=dtype)
    inputs = inputs.map(Tensor.cuda)._replace(query_mask=inputs.query_mask.cuda())  # type: ignore[union-attr]
    exact = answer(inputs.map(Tensor.double), plan, "reference")
    ours = answer(inputs, plan, "triton")
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for actual, expected in zip((ours.out, *ours.grads), (exact.out, *exact.grads), strict=True):
        assert actual.isfinite().all()
        assert (actual.double() - expected).norm() < tolerance * expected.norm()
    again = answer(inputs, plan, "triton")
    for first, second in zip((ours.out, *ours.grads), (again.out, *again.grads), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("background", [False, True])
def test_samples_of_thousands_of_queries(background: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's ops in float64, on the same card."""
    index, generator = index_cells(make_points(4000)), torch.Generator().manual_seed(0)
    images = torch.arange(5000, device="cuda") % 2
    shapes = (index.n_cells + 6 * background, 4, 32), (5000, 4, 3, 4, 2), (5000, 4, 3, 4)
    table, locations, weights = (torch.rand(x, generator=generator).cuda() for x in shapes)
    sizes = torch.tensor(index.level_shapes, device="cuda")[:, None]
    locations = locations * (sizes + 2) - 1

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (table - 0.5, locations, weights)]
        out = sampling.sample(leaves[0], index, images, leaves[1], leaves[2])
        return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]

    found, again, double = (run(x) for x in (torch.float32, torch.float32, torch.float64))
    assert all(map(torch.equal, found, again))
    monkeypatch.setattr(sampling, "choose_backend", lambda *_: reference.BACKEND)
    for actual, precise, expected in zip(found, double, run(torch.float64), strict=True):
        assert (actual.double() - expected).norm() < 2e-5 * expected.norm()
        assert (precise - expected).norm() < 1e-12 * expected.norm()


def test_deformable_attention_in_a_cuda_graph(restored_sync_mode: None) -> None:
    """Given the index of cells, nothing synchronizes."""
    points = make_points(3000)
    offsets, positions = points.batch_offsets(), points.positions()
    torch.manual_seed(0)
    attention = SparseDeformableAttention(EMBED, 4, 3).cuda()
    plan = attention.make_plan(positions, offsets, points)

    def step() -> list[Tensor]:
        values = points.values.detach().requires_grad_()
        out = attention(values, positions, offsets, points.with_values(values), plan=plan)
        sources = [values, *attention.parameters()]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), sources)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        step()
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    points.values.normal_()
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_training_step_does_not_synchronize(restored_sync_mode: None) -> None:
    block = make_block(dropout=0.1)
    problems = [make_points(n, side) for n, side in ((3000, 128), (4000, 96))]
    offsets = [points.batch_offsets() for points in problems]
    step(block, problems[0], offsets[0])  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for points, starts in zip(problems, offsets, strict=True):  # the second with maps of new shapes
        step(block, points, starts)


def test_a_compiled_training_step_does_not_synchronize(restored_sync_mode: None) -> None:
    """Constants are cached on the GPU and copied there."""
    block, points = make_block(), make_points(3000)
    offsets, positions = points.batch_offsets(), points.positions()

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(x: Tensor, points: FeaturePyramid, positions: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = block(x, positions, offsets, points)
        return out

    torch.compiler.reset()
    attend(points.values, points, positions, offsets).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    attend(points.values, points, positions, offsets).sum().backward()


def test_compiled_graphs_get_copies_of_cached_constants() -> None:
    arguments = [1, 2], [2], torch.int64, torch.device("cuda")
    torch.ops.vicinal.numbers(*arguments).zero_()
    assert torch.ops.vicinal.numbers(*arguments).tolist() == [1, 2]


def test_a_training_step_in_a_cuda_graph() -> None:
    block, points = make_block(), make_points(3000)
    offsets = points.batch_offsets()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(block, points, offsets)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(block, points, offsets)
    # The same number of points elsewhere: a replay recomputes the plan.
    rows = torch.tensor(points.level_shapes, device="cuda")[points.levels, 0]
    points.coordinates[:, 1] = rows - 1 - points.coordinates[:, 1]
    points.values.normal_()
    graph.replay()
    torch.cuda.synchronize()
    expected = step(block, points, offsets)
    for actual, wanted in zip(captured, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_graph_of_maps_of_new_shapes_is_refused() -> None:
    block = make_block()
    step(block, make_points(500), make_points(500).batch_offsets())
    points = make_points(500, side=77)
    offsets = points.batch_offsets()
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="before CUDA-graph capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        step(block, points, offsets)


def test_a_graph_does_not_complete_a_plan() -> None:
    """Made without gradients, it lacks the points' tiles; a run with gradients finds them."""
    points = make_points(500)
    x = torch.randn(len(points), 2, 16, device="cuda").requires_grad_()
    with torch.no_grad():
        plan = plan_neighborhoods(points.positions(), points.batch_offsets(), points, SIZES)
        neighborhood_attention(x, x, x, plan)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match=r"plan lacks .*point_tiles"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        neighborhood_attention(x, x, x, plan)
    (expected,) = torch.autograd.grad(neighborhood_attention(x, x, x, plan).sum(), x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        (grad,) = torch.autograd.grad(neighborhood_attention(x, x, x, plan).sum(), x)
    graph.replay()
    assert torch.equal(grad, expected)


def test_gradients_outside_a_graph_with_its_plan() -> None:
    """Also a plan made without gradients: a replay recomputes all that depends on positions."""
    points = make_points(500)
    offsets, positions = points.batch_offsets(), points.positions()
    x = torch.randn(len(points), 2, 16, device="cuda").requires_grad_()

    def gradient(plan: NeighborhoodPlan) -> Tensor:
        return torch.autograd.grad(neighborhood_attention(x, x, x, plan).square().sum(), x)[0]

    def make_plan() -> NeighborhoodPlan:
        return plan_neighborhoods(positions, offsets, points, SIZES)

    gradient(make_plan())
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        plan = make_plan()
    graph.replay()
    gradient(plan)
    positions += 8
    graph.replay()
    assert torch.equal(gradient(plan), gradient(make_plan()))


def test_a_decoder_in_a_cuda_graph() -> None:
    """Replays with other queries and with another number of points, which -1 fill up."""
    layers = [
        DecoderLayer(
            QuerySelfAttention(EMBED, 4, max_queries=60),
            SparseNeighborhoodAttentionBlock(EMBED, 4, 3, SIZES),
            FeedForward(EMBED),
        )
        for _ in range(2)
    ]
    decoder = Decoder(layers, EMBED, n_classes=3).cuda().eval()
    scenes = [make_points(n) for n in (900, 1400)]
    n_rows = max(map(len, scenes))
    values, coordinates = torch.zeros(n_rows, EMBED).cuda(), torch.full((n_rows, 4), -1).cuda()
    points = FeaturePyramid(values, coordinates, scenes[0].level_shapes, 2)
    boxes, embeddings = torch.ones(100, 4).cuda(), torch.randn(100, EMBED).cuda()
    levels = torch.zeros(100, dtype=torch.int64, device="cuda")
    queries = ObjectQueries(embeddings, boxes, levels, torch.tensor([0, 60, 100]).cuda())

    @torch.no_grad()
    def refine(points: FeaturePyramid) -> tuple[Tensor, Tensor]:
        predictions, _ = decoder(queries, points)
        return predictions[-1].logits, predictions[-1].boxes

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        refine(points)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        captured = refine(points)
    for scene in scenes:
        coordinates.fill_(-1)
        coordinates[: len(scene)] = scene.coordinates
        values[: len(scene)] = scene.values
        boxes[:, :2] = 128 * torch.rand(100, 2).cuda()
        graph.replay()
        for actual, expected in zip(captured, refine(scene), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_compiled_for_any_number_of_points() -> None:
    block = make_block()

    def attend(x: Tensor, points: FeaturePyramid, positions: Tensor, offsets: Tensor) -> Tensor:
        out: Tensor = block(x, positions, offsets, points)
        return out

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (1000, 1700, 2900):
            points = make_points(n)
            arguments = points.values, points, points.positions(), points.batch_offsets()
            torch.testing.assert_close(
                compiled(*arguments), attend(*arguments), rtol=1e-4, atol=1e-4
            )


def test_compiled_to_cuda_graphs() -> None:
    block, points = make_block(), make_points(1000)
    offsets, positions = points.batch_offsets(), points.positions()

    def attend(x: Tensor) -> Tensor:
        out: Tensor = block(x, positions, offsets, points)
        return out

    def step(attend: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x = points.values.clone().requires_grad_()
        out = attend(x)
        return out.detach().clone(), torch.autograd.grad(out.square().sum(), x)[0].clone()

    expected = step(attend)  # which copies the constants to the GPU
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        for actual, wanted in zip(step(compiled), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)


def test_compiled_plans_are_those_without_a_compiler() -> None:
    """A third of a position is an integer, or rounded to just below one."""
    generator = torch.Generator().manual_seed(0)
    coordinates = torch.randint(0, 99, (3000, 3), generator=generator)
    coordinates[:, 0] = 0
    points = FeaturePyramid.from_points(
        coordinates, torch.zeros(3000, 1), (99, 99), 1, strides=(1, 3)
    ).to("cuda")
    positions = torch.cartesian_prod(*[torch.arange(99.0, device="cuda")] * 2)
    offsets = torch.tensor([0, 99**2], device="cuda")

    def find(points: FeaturePyramid, positions: Tensor) -> tuple[Tensor, ...]:
        plan = plan_neighborhoods(positions, offsets, points, (3, 1))
        return *plan._tensors.query_slices, plan._tensors.first_columns

    torch.compiler.reset()
    compiled = torch.compile(find, fullgraph=True, dynamic=True)
    for actual, expected in zip(compiled(points, positions), find(points, positions), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    block, points = make_block(), make_points(2000)
    arguments = points.values, points.positions(), points.batch_offsets(), points
    exact = block(*arguments)
    with torch.autocast("cuda", dtype):
        rounded = block(*arguments)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() < 2e-2 * exact.norm()


def test_memory_of_many_queries() -> None:
    """Nothing of the size of queries x window: 49 points each would be 49 query tensors."""
    side = 256
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).cuda()
    coordinates = torch.nn.functional.pad(cells, (1, 1))
    points = FeaturePyramid(torch.zeros(side**2, 1).cuda(), coordinates, ((side, side),), 1)
    offsets = torch.tensor([0, side**2], device="cuda")
    plan = plan_neighborhoods(cells + 0.5, offsets, points, [7])
    q, k, v = (torch.randn(side**2, 8, 32, device="cuda").requires_grad_() for _ in range(3))
    neighborhood_attention(q, k, v, plan).sum().backward()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    neighborhood_attention(q, k, v, plan).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8 * q.nbytes


def test_more_elements_than_32_bit_indices_address() -> None:
    """The last of 2.26e9 numbers: the same as if they were a tensor of their own."""
    if torch.cuda.get_device_properties().total_memory < 48 * 2**30:
        pytest.skip("takes some 40 GiB")
    side, width = 2100, 512
    cells = torch.cartesian_prod(torch.arange(side), torch.arange(side)).cuda()
    numbers = torch.randn(side**2, 8, width // 8, device="cuda", dtype=torch.bfloat16)
    assert numbers.numel() > 2**31
    found = []
    for n_rows in (16, side):  # the last rows of the map, and all
        last_cells, x = (part[-n_rows * side :] for part in (cells, numbers))
        coordinates = torch.nn.functional.pad(last_cells, (1, 1))
        points = FeaturePyramid(torch.zeros(len(x), 1).cuda(), coordinates, ((side, side),), 1)
        offsets = torch.tensor([0, len(x)], device="cuda")
        plan = plan_neighborhoods(last_cells + 0.5, offsets, points, [5])
        leaf = x.detach().requires_grad_()
        out = neighborhood_attention(leaf, leaf, leaf, plan)
        (grad,) = torch.autograd.grad(out, leaf, x)
        found.append((out.detach()[-8 * side :].float(), grad[-8 * side :].float()))
    for of_few, of_all in zip(*found, strict=True):
        torch.testing.assert_close(of_all, of_few, rtol=2e-2, atol=2e-2)


def test_a_plan_moved_to_another_device() -> None:
    scene = make_scene(((20, 20),), (5,), (40,), 200)
    cpu_plan, gpu_plan = scene.plan(), scene.plan().to("cuda")
    x = torch.randn(len(scene.pyramid), 2, 16)
    q = torch.randn(40, 2, 16)
    out = neighborhood_attention(q.cuda(), x.cuda(), x.cuda(), gpu_plan)
    expected = neighborhood_attention(q, x, x, cpu_plan)
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"q: expected .* on cpu"):
        neighborhood_attention(q.cuda(), x.cuda(), x.cuda(), cpu_plan)
    with pytest.raises(ValueError, match=r"k: expected .* on cuda:0"):
        neighborhood_attention(q.cuda(), x, x.cuda(), gpu_plan)


def test_plans_of_a_gpu_are_those_of_the_cpu() -> None:
    scene = make_scene(((60, 50), (30, 25)), (5, 9), (1500, 2500), 2000)
    cpu_plan = scene.plan()
    points = scene.pyramid.to("cuda")
    gpu_plan = plan_neighborhoods(
        scene.positions.cuda(), scene.offsets.cuda(), points, scene.sizes, check_contents=True
    )
    for ours, theirs in zip(
        (*gpu_plan._tensors.query_slices, *gpu_plan._point_slices()),
        (*cpu_plan._tensors.query_slices, *cpu_plan._point_slices()),
        strict=True,
    ):
        assert torch.equal(ours.cpu(), theirs)
