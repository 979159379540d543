"""One graph for any number of points: the op and the block, compiled and exported."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    QueryPlacement,
    SparseNeighborhoodAttentionBlock,
    Window,
    neighborhood_attention,
    plan_neighborhoods,
)
from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend
from vicinal.backends.types import TILE
from vicinal.plan import tensors_for

EMBED, SIZES = 16, [3, 5, 3]
# Triton's kernels are float32's, and slow where they are interpreted.
BACK_ENDS = {
    "cpu": (torch.float64, (60, 90, 140)),
    "triton": (torch.float32, (27, 30, 35)),  # tiles as many as no other size
}
HEADS = {"cpu": 2, "triton": 1}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.usefixtures("runs_by_reference"),
]


def make_pyramid(n_points: int, dtype: torch.dtype = torch.float64) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(n_points)
    image = torch.randint(0, 2, (n_points, 1), generator=generator)
    cells = torch.randint(0, 24, (n_points, 2), generator=generator)
    return FeaturePyramid.from_points(
        torch.cat((image, cells), 1),
        torch.randn(n_points, EMBED, generator=generator, dtype=dtype),
        spatial_shape=(24, 24),
        batch_size=2,
        strides=(1, 2, 4),
    )


def make_plan(pyramid: FeaturePyramid, backend: BackendName) -> NeighborhoodPlan:
    """As `plan_neighborhoods` makes it on the back end's own device."""
    plan = plan_neighborhoods(pyramid.positions(), pyramid.batch_offsets(), pyramid, SIZES)
    tensors_for(plan, choose_backend(backend, plan.device), points_need_grad=True)
    return plan


def assert_one_graph(
    backend: BackendName,
    compute: Callable[..., Tensor],
    make_arguments: Callable[[FeaturePyramid], tuple[Any, ...]],
) -> None:
    """For any number of points; values and gradients are those without a compiler."""
    dtype, counts = BACK_ENDS[backend]
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(compute, fullgraph=True, dynamic=True, backend=counter)
    compilations: set[int] = set()
    for n_points in counts:
        x, *rest = make_arguments(make_pyramid(n_points, dtype))
        x.requires_grad_()
        if not compilations:  # a plan serves many layers: the first must not change it
            compiled(x, *rest)
        out, expected = compiled(x, *rest), compute(x, *rest)
        assert_close(out, expected, tolerance)
        (grad,), (expected_grad,) = (
            torch.autograd.grad(y.square().sum(), x) for y in (out, expected)
        )
        assert_close(grad, expected_grad, 10 * tolerance)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1, "compiled again for another number of points"
    assert min(compilations) > 0


@pytest.mark.parametrize("backend", BACK_ENDS)
def test_the_op(backend: BackendName) -> None:
    def arguments(pyramid: FeaturePyramid) -> tuple[Any, ...]:
        heads = HEADS[backend]
        return pyramid.values.unflatten(1, (heads, -1)).contiguous(), make_plan(pyramid, backend)

    def attend(x: Tensor, plan: NeighborhoodPlan) -> Tensor:
        return neighborhood_attention(x, x, x, plan, backend=backend)

    assert_one_graph(backend, attend, arguments)


@pytest.mark.parametrize("backend", BACK_ENDS)
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
def test_inductor_takes_the_op(backend: BackendName) -> None:
    """Without gradients: compiling them takes longer than all other tests of this file."""
    dtype, counts = BACK_ENDS[backend]
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(x: Tensor, plan: NeighborhoodPlan) -> Tensor:
        return neighborhood_attention(x, x, x, plan, backend=backend)

    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for n_points in counts[:2]:
            pyramid = make_pyramid(n_points, dtype)
            x, plan = pyramid.values[:, None], make_plan(pyramid, backend)
            assert_close(attend(x, plan), neighborhood_attention(x, x, x, plan), 1e-5)


@pytest.mark.parametrize(
    ("planned", "backend"),
    [
        (False, "triton"),
        (False, "cpu"),
        (True, "triton"),
        pytest.param(True, "cpu", marks=pytest.mark.floats_are_inputs),  # the fastest
    ],
)
def test_the_block(planned: bool, backend: BackendName) -> None:
    dtype = BACK_ENDS[backend][0]
    heads = HEADS[backend]
    block = SparseNeighborhoodAttentionBlock(EMBED, heads, 3, SIZES, backend=backend).to(dtype)

    def attend(
        x: Tensor, pyramid: FeaturePyramid, positions: Tensor, offsets: Tensor,
        plan: NeighborhoodPlan | None,
    ) -> Tensor:  # fmt: skip
        out: Tensor = block(x, positions, offsets, pyramid, plan=plan)
        return out

    def arguments(pyramid: FeaturePyramid) -> tuple[Any, ...]:
        plan = make_plan(pyramid, backend) if planned else None
        x = pyramid.values.clone()
        return x, pyramid, pyramid.positions(), pyramid.batch_offsets(), plan

    assert_one_graph(backend, attend, arguments)


def test_the_block_with_windows_of_other_shapes() -> None:
    """Also where the compiled graph makes the plan."""
    windows = [Window((1, 3), shape="ball"), Window((3, 2), 2, causal=(False, True)), (3, 1)]
    block = SparseNeighborhoodAttentionBlock(EMBED, 2, 3, windows, relative_bias=True).double()
    nn.init.normal_(block.get_parameter("relative_bias"))

    def attend(x: Tensor, pyramid: FeaturePyramid, *placement: Tensor) -> Tensor:
        positions, offsets, levels = placement
        background = torch.ones(2, 3, EMBED, dtype=x.dtype)
        out: Tensor = block(x, positions, offsets, pyramid, None, background, levels)
        return out

    def arguments(pyramid: FeaturePyramid) -> tuple[Any, ...]:
        return pyramid.values.clone(), pyramid, *QueryPlacement.of_points(pyramid)

    assert_one_graph("cpu", attend, arguments)


def jvp_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    jvp: Any = torch.func.jvp  # torch types it with two or three results
    return lambda x: jvp(function, (x,), (x,))[1]


@pytest.mark.parametrize("part", ["op", "block"])
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_forward_mode_is_refused_when_compiled(part: str) -> None:
    """As it is without a compiler: no tangent is lost."""
    pyramid = make_pyramid(30)
    plan, positions = make_plan(pyramid, "cpu"), pyramid.positions()
    offsets = pyramid.batch_offsets()
    block = SparseNeighborhoodAttentionBlock(EMBED, 2, 3, SIZES, backend="cpu").double()

    def attend(x: Tensor) -> Tensor:
        if part == "op":
            heads = x.unflatten(1, (2, -1))
            return neighborhood_attention(heads, heads, heads, plan, backend="cpu")
        out: Tensor = block(x, positions, offsets, pyramid, plan=plan)
        return out

    x = pyramid.values
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        jvp_of(attend)(x)
    torch.compiler.reset()
    with pytest.raises(Exception, match="backend='reference'"):
        torch.compile(jvp_of(attend), backend="aot_eager")(x)


def test_a_block_on_a_pyramid_from_coo() -> None:
    """Whether the map is coalesced or not."""
    shapes = ((24, 24), (12, 12), (6, 6))
    block = SparseNeighborhoodAttentionBlock(EMBED, 2, 3, SIZES, backend="cpu").double()

    def attend(x: Tensor, offsets: Tensor, pyramid: FeaturePyramid) -> Tensor:
        out: Tensor = block(x, pyramid.positions(), offsets, pyramid)
        return out

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_points, coalesced in ((60, False), (90, True), (90, False), (60, True)):
        coo = make_pyramid(n_points).to_coo()
        coo = coo.coalesce() if coalesced else coo + 0 * coo
        pyramid = FeaturePyramid.from_coo(coo, shapes)
        x = pyramid.values.detach().clone().requires_grad_()
        offsets = pyramid.batch_offsets()
        answers = [function(x, offsets, pyramid) for function in (compiled, attend)]
        assert_close(answers[0], answers[1], 1e-13)
        grads = [
            torch.autograd.grad(out.square().sum(), [x, *block.parameters()]) for out in answers
        ]
        for left, right in zip(*grads, strict=True):
            assert_close(left, right, 1e-10)


class OnPoints(nn.Module):
    """A block whose points are its queries, as tensors alone."""

    def __init__(self, backend: BackendName) -> None:
        super().__init__()
        heads = HEADS[backend]
        self.block = SparseNeighborhoodAttentionBlock(EMBED, heads, 3, SIZES, backend=backend)

    def forward(self, x: Tensor, coordinates: Tensor, positions: Tensor, offsets: Tensor) -> Tensor:
        shapes = ((24, 24), (12, 12), (6, 6))
        pyramid = FeaturePyramid(x, coordinates, shapes, 2, check_contents=False)
        out: Tensor = self.block(x, positions, offsets, pyramid)
        return out


class AttendOn(nn.Module):
    """The op among points that are queries too, as tensors alone."""

    def __init__(self, backend: BackendName) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: Tensor, coordinates: Tensor, positions: Tensor, offsets: Tensor) -> Tensor:
        shapes = ((24, 24), (12, 12), (6, 6))
        pyramid = FeaturePyramid(x, coordinates, shapes, 2, check_contents=False)
        plan = plan_neighborhoods(positions, offsets, pyramid, SIZES, check_contents=False)
        x = x[:, None]
        return neighborhood_attention(x, x, x, plan, backend=self.backend)


@pytest.mark.parametrize("module", [AttendOn, OnPoints])
@pytest.mark.parametrize("backend", BACK_ENDS)
def test_exports_take_any_number_of_points(
    backend: BackendName, module: Callable[[str], nn.Module]
) -> None:
    dtype, (few, *_, many) = BACK_ENDS[backend]
    # One tile is another graph: torch's check of strides depends on it.
    least = TILE + 1 if backend == "triton" else 0
    assert_exports(module(backend).to(dtype), dtype, (few, many), least)


def assert_exports(
    module: nn.Module, dtype: torch.dtype, counts: tuple[int, ...], least: int = 0
) -> None:
    """For any number of points from ``least`` on, also when saved and loaded again."""

    def arguments(n_points: int) -> tuple[Tensor, ...]:
        pyramid = make_pyramid(n_points, dtype)
        return (
            pyramid.values,
            pyramid.coordinates,
            pyramid.positions(),
            pyramid.batch_offsets(),
        )

    # As many queries, times levels, as 32-bit indices still address.
    points = {0: torch.export.Dim("points", min=least, max=2**29)}
    program = torch.export.export(
        module, arguments(counts[0]), dynamic_shapes=(points, points, points, None)
    )
    torch.export.save(program, file := io.BytesIO())
    file.seek(0)
    exported = torch.export.load(file).module()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    for n_points in counts:
        assert_close(exported(*arguments(n_points)), module(*arguments(n_points)), tolerance)


def test_a_compiled_block_takes_values_of_a_sparse_map() -> None:
    torch.manual_seed(0)
    block = SparseNeighborhoodAttentionBlock(EMBED, 2, 3, SIZES).double()
    maps = make_pyramid(60).to_coo()
    pyramid = FeaturePyramid.from_coo(maps, make_pyramid(60).level_shapes)
    rest = pyramid.positions(), pyramid.batch_offsets(), pyramid
    compiled = torch.compile(block, backend="aot_eager")
    for query in (pyramid.values, maps.values().clone()):
        assert_close(compiled(query, *rest), block(query, *rest), 1e-13)


def test_a_block_on_periodic_maps() -> None:
    block = SparseNeighborhoodAttentionBlock(EMBED, 2, 1, (3,)).double()
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="eager")
    for n_points, axes in ((20, (0,)), (30, (0,)), (30, (1,))):
        cells = torch.nn.functional.pad(torch.randint(0, 32, (n_points, 2)), (1, 1))
        values = torch.randn(n_points, EMBED, dtype=torch.float64)
        pyramid = FeaturePyramid(values, cells, ((32, 32),), 1, periodic_axes=axes)
        call = values, pyramid.positions(), pyramid.batch_offsets(), pyramid
        assert_close(compiled(*call), block(*call), 1e-12)
