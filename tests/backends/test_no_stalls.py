"""A training step never reads contents of tensors on the host, which would synchronize a GPU.

Tensors of torch's meta device have no contents, so reading them fails. The code that runs on the
host is that which runs for a GPU; kernels are not launched.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # its tables of functions must not hold those that fixtures put in place
from problems import OwnOps
from torch import Tensor

from vicinal import (
    FeaturePyramid,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
    backends,
    neighborhood_attention,
    plan_neighborhoods,
)
from vicinal import plan as plan_module
from vicinal._utils import constants
from vicinal.backends import triton

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from vicinal.backends.triton import ops as triton_ops
from vicinal.backends.triton import plan_ops
from vicinal.backends.triton.sampling import ops as sampling_ops
from vicinal.backends.types import POINT_TILE

SHAPES = ((24, 24), (12, 12), (6, 6))
SIZES = (3, 5, 3)


@pytest.fixture(autouse=True)
def meta_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    able = backends._BACKENDS["triton"]._replace(unsupported_reason=lambda device, dtype: None)
    monkeypatch.setitem(backends._BACKENDS, "triton", able)
    monkeypatch.setitem(backends._BY_DEVICE, "meta", "triton")


class HostCode(OwnOps):
    """Runs the back end's own code in place of the fakes, and compares the metadata of results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        expected = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != self.namespace:
            return expected
        found = triton_ops.KERNELS[func._opname](*args)
        flat, flat_expected = (torch.utils._pytree.tree_leaves(x) for x in (found, expected))
        for ours, fake in zip(flat, flat_expected, strict=True):
            assert (ours.shape, ours.dtype, ours.device) == (fake.shape, fake.dtype, fake.device)
            assert ours.stride() == fake.stride()
        return found


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that would be launched."""
    names: list[str] = []

    def launch(kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        assert isinstance(n_programs, int)
        names.append(kernel.fn.__name__)

    for module in (triton_ops, plan_ops, sampling_ops):
        monkeypatch.setattr(module, "launch", launch)
    with HostCode("vicinal_triton"):
        yield names


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that make tensors of numbers, which would be copied to a GPU."""
    modules = []
    for name in ("tensor", "as_tensor"):
        plain = getattr(torch, name)

        def spy(*args: Any, plain: Any = plain, **options: Any) -> Tensor:
            frame = __import__("sys")._getframe(1)
            modules.append(frame.f_globals["__name__"])
            made: Tensor = plain(*args, **options)
            return made

        monkeypatch.setattr(torch, name, spy)
    return modules


def make_points(n: int) -> FeaturePyramid:
    coordinates = torch.zeros(n, 4, dtype=torch.int64, device="meta")
    return FeaturePyramid(
        torch.randn(n, 32, device="meta").requires_grad_(), coordinates, SHAPES, 2
    )


@pytest.mark.parametrize("background", [False, True])
def test_a_training_step_with_planning(
    background: bool, copied: list[str], launched: list[str]
) -> None:
    with torch.device("meta"):
        block = SparseNeighborhoodAttentionBlock(32, 2, 3, SIZES, dropout=0.1)
        offsets = torch.zeros(3, dtype=torch.int64)
        level, mask = torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.bool)
        cells = torch.randn(2, 3, 32).requires_grad_() if background else None
    points = make_points(50)
    copied.clear()
    out = block(points.values, points.positions(), offsets, points, SHAPES, cells, level, mask)
    out.sum().backward()
    assert points.values.grad is not None
    assert all(parameter.grad is not None for parameter in block.parameters())
    # Constants are cached on the GPU, so each is copied once.
    assert set(copied) == {constants.__name__}
    kernels = {"place_queries", "place_points", "place_along_curve", "split_order", "find_slices"}
    kernels |= {"find_runs", "place_lists", "write_lists"}
    kernels |= {"attend", "query_gradients", "point_gradients", "rotate", "rotate_backward"}
    if background:
        kernels |= {"cell_key_gradients", "cell_value_gradients"}
    assert set(launched) == kernels


@pytest.mark.parametrize("background", [False, True])
def test_a_step_of_deformable_attention(
    background: bool, copied: list[str], launched: list[str]
) -> None:
    """After the index of cells, whose size depends on contents."""
    with torch.device("meta"):
        attention = SparseDeformableAttention(32, 2, 3, dropout=0.1)
        offsets = torch.zeros(3, dtype=torch.int64)
        mask = torch.zeros(50, dtype=torch.bool)
        cells = torch.randn(2, 3, 32).requires_grad_() if background else None
    points = make_points(50)
    plan = attention.make_plan(points.positions(), offsets, points)
    copied.clear()
    arguments = points.positions(), offsets, points, SHAPES, cells, None, mask
    attention(points.values, *arguments, plan=plan).sum().backward()
    assert points.values.grad is not None
    assert all(parameter.grad is not None for parameter in attention.parameters())
    assert set(copied) == {constants.__name__}
    kernels = {"sample", "location_gradients", "find_bounds", "find_entries_of_cells"}
    kernels |= {"table_gradients"} | ({"cell_value_gradients"} if background else set())
    assert set(launched) == kernels


@pytest.mark.parametrize("frozen", ["queries", "points"])
def test_gradients_of_frozen_inputs_are_not_computed(frozen: str, launched: list[str]) -> None:
    points = make_points(50)
    with torch.no_grad():
        offsets = torch.zeros(3, dtype=torch.int64, device="meta")
        plan = plan_neighborhoods(points.positions(), offsets, points, SIZES)
    q, k = (torch.randn(50, 2, 16, device="meta") for _ in range(2))
    (k if frozen == "queries" else q).requires_grad_()
    neighborhood_attention(q, k, k, plan).sum().backward()
    of_points, of_queries = {"point_gradients", "find_stats"}, {"query_gradients"}
    wanted, others = (of_points, of_queries) if frozen == "queries" else (of_queries, of_points)
    assert wanted < set(launched)
    assert not others & set(launched)
    assert ("point_tiles" in plan._cache) == (frozen == "queries")


def run_by(computer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "execution_mode", lambda device: computer)


def test_a_graph_completes_its_own_plans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a graph have values only after a replay, so eager code must not add to its plan,
    nor the graph to a plan made outside.
    """
    points = make_points(50)
    offsets = torch.zeros(3, dtype=torch.int64, device="meta")
    x = torch.randn(50, 2, 16, device="meta")
    with torch.no_grad():
        plan = plan_neighborhoods(points.positions(), offsets, points, SIZES)
        run_by("graph", monkeypatch)
        captured = plan_neighborhoods(points.positions(), offsets, points, SIZES)
    assert "point_tiles" in captured._cache
    neighborhood_attention(x, x, x, plan)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"plan lacks .*point_tiles"):
        neighborhood_attention(x, x, x, plan)
    run_by("python", monkeypatch)
    neighborhood_attention(x, x, x, captured)
    del captured._cache["point_tiles"]
    with pytest.raises(RuntimeError, match=r"made in a CUDA graph .*point_tiles"):
        neighborhood_attention(x, x, x, captured)


@pytest.mark.parametrize("makers", [("python", "compiler"), ("compiler", "graph")])
def test_compiled_code_does_not_change_plans(
    makers: tuple[str, str], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code cannot know whether a CUDA graph captures it."""
    points = make_points(50)
    offsets = torch.zeros(3, dtype=torch.int64, device="meta")
    run_by(makers[0], monkeypatch)
    with torch.no_grad():
        plan = plan_neighborhoods(points.positions(), offsets, points, SIZES)
    before = set(plan._cache)
    run_by(makers[1], monkeypatch)
    x = torch.randn(50, 2, 16, device="meta").requires_grad_()
    neighborhood_attention(x, x, x, plan).sum().backward()
    assert "point_gradients" in launched
    assert set(plan._cache) == before


def test_a_compiled_step_uses_cached_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Constants of a graph would be copied, with a synchronization, at every step."""
    with torch.device("meta"):
        block = SparseNeighborhoodAttentionBlock(32, 2, 3, SIZES)
        offsets = torch.zeros(3, dtype=torch.int64)
        cells = torch.randn(2, 3, 32)

    def step(points: FeaturePyramid, positions: Tensor) -> Tensor:
        out: Tensor = block(points.values, positions, offsets, points, None, cells)
        return out

    graphs = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    points = make_points(50)
    positions = points.positions()
    monkeypatch.setattr(constants, "_CACHED_DEVICES", ("meta",))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=record)
    compiled(points, positions).sum().backward()
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    assert called.count(torch.ops.vicinal.numbers) > 5
    assert not {torch.tensor, torch.as_tensor} & {*called}
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]
    for node in graph.graph.nodes:  # from one dtype to another alone
        if node.target in ("to", "cuda", "copy_"):
            assert len(node.args) == 2
            assert isinstance(node.args[1], torch.dtype)


def test_reading_contents_fails() -> None:
    """The check itself: reading contents of a meta tensor raises an error."""
    with pytest.raises(Exception, match=r"meta"):
        torch.zeros(3, device="meta").sum().item()
    points = make_points(5)
    with pytest.raises(Exception, match=r"meta|Meta"):
        points.batch_offsets()


def test_shapes_follow_from_sizes_alone(launched: list[str]) -> None:
    """Also with few queries among many points, which are taken one by one."""
    points = make_points(400)
    offsets = torch.zeros(3, dtype=torch.int64, device="meta")
    positions = torch.rand(7, 2, device="meta")
    plan = plan_neighborhoods(positions, offsets, points, SIZES)
    assert plan._query_tiles(triton.find_runs).firsts.shape == (7, 3 + 5 + 3)
    assert plan._point_tiles(triton.find_runs).firsts.shape == (25, POINT_TILE * 5)
    q, k = (torch.randn(n, 2, 16, device="meta").requires_grad_() for n in (7, 400))
    out, lse = neighborhood_attention(q, k, k, plan, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert out.shape == (7, 2, 16)
    assert {"find_runs", "query_gradients", "point_gradients"} < set(launched)
    assert k.grad is not None
