"""Resources and costs of Triton's kernels, without a GPU: ``python -m benchmarks.kernels``.

Compiles each kernel as the ops launch it, for generations of cards, and prints a line of JSON per
kernel: registers, spilled bytes and shared memory, and of the loops over blocks what is in them.
Then it prints what `gpu_costs` predicts for a scene on an H200, beside bars. Nothing runs. With
``--costs`` it prints that alone, in a fraction of the time. With ``--check`` it prints the bars
that are missed, and exits with 1 if there are any.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import launches as host
from benchmarks.gpu_costs import model, plan, sass, scene
from benchmarks.scenes import particle_tracks
from vicinal import FeaturePyramid, NeighborhoodPlan, Window, plan_neighborhoods
from vicinal._index.cell_hash import index_cells
from vicinal._index.tiles import tile_rows
from vicinal.backends import reference
from vicinal.backends import triton as triton_backend
from vicinal.backends.ops import list_space
from vicinal.backends.triton import ops as triton_ops
from vicinal.backends.triton import plan_ops
from vicinal.backends.triton.checks import PlanParts
from vicinal.backends.triton.sampling import ops as sampling_ops
from vicinal.backends.types import LIST_BLOCK, window_tables


class Case(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype
    width: int  # of a head
    everything: bool = True  # background and dropout, which take registers
    heads: int = 8
    n_points: int | None = None
    n_queries: int | None = None  # few among many have tiles of one row
    balls: bool = False  # windows
    bias: bool = False


CASES = (
    Case(torch.bfloat16, 32, everything=False),
    Case(torch.bfloat16, 32, everything=False, n_queries=5),
    Case(torch.float16, 32),
    Case(torch.bfloat16, 32, balls=True, bias=True),
    Case(torch.float32, 32, bias=True),
    Case(torch.float16, 1, heads=1, n_points=1),  # one may be a constant to Triton
    Case(torch.bfloat16, 256),
    Case(torch.float32, 32),
    Case(torch.float32, 256),
)

SAMPLING = (
    "sample", "location_gradients", "find_bounds", "find_entries_of_cells", "table_gradients",
)  # fmt: skip
BLOCK_LOOPS = ("attend", "query_gradients", "point_gradients")  # kernels that loop over blocks


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """The constants and the number of warps."""


class Compiled(NamedTuple):
    launch: Launch
    cubin: bytes
    resources: sass.Resources
    shared_bytes: int

    @property
    def name(self) -> str:
        name: str = self.launch.kernel.fn.__name__
        return name

    def code(self) -> sass.Code:
        """Its instructions, from a program that takes longer than compiling most kernels."""
        return sass.disassemble(self.cubin)


def compiled(case: Case, architecture: int, without: Collection[str] = ()) -> Iterator[Compiled]:
    """Every kernel that the ops launch, but for those whose names are in ``without``."""
    target = GPUTarget("cuda", architecture, 32)
    for launch in launches(case):
        if launch.kernel.fn.__name__ in without:
            continue
        source, options = variant(launch, target)
        built = triton.compile(source, target=target, options=options)
        cubin = built.asm["cubin"]
        yield Compiled(launch, cubin, sass.resources(cubin), built.metadata.shared)


def usages(
    case: Case, architecture: int, loops: bool = True, without: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Of every kernel: registers and spills per thread, shared memory, the loop over blocks.

    Without ``loops`` no code is disassembled. Kernels whose names are in ``without`` are left out.
    """
    for kernel in compiled(case, architecture, without):
        usage = {
            "kernel": kernel.name,
            "warps": kernel.launch.options["num_warps"],
            **kernel.resources._asdict(),
            "shared_bytes": kernel.shared_bytes,
        }
        has_loop = loops and kernel.name in BLOCK_LOOPS
        loop = kernel.code().block_loop() if has_loop else None
        if loop is not None:
            usage["instructions"] = loop.length
            usage |= {kind: loop.counts[kind] for kind in ("HMMA", "LDGSTS")}
        yield usage


def figures(counts: scene.SceneCounts) -> tuple[dict[str, float], dict[str, model.Cost]]:
    """What `model.BARS` judge, by their names, and the cost of each kernel with a block loop."""
    found: dict[str, float] = {}
    costs: dict[str, model.Cost] = {}
    searches = 0.0
    of_plan: dict[str, plan.Variants] = {}
    for kernel in compiled(CASES[0], 90, without=SAMPLING):
        if kernel.name in BLOCK_LOOPS:
            code = kernel.code()
            loop = code.block_loop()
            assert loop is not None, kernel.name
            outside = code.path_outside(loop)
            costs[kernel.name] = model.cost(kernel.name, counts, loop.length, outside)
            found[f"{kernel.name}: LDGSTS of the block loop"] = loop.counts["LDGSTS"]
            found[f"{kernel.name}: registers"] = kernel.resources.registers
            spills = loop.counts["LDL"] + loop.counts["STL"]
            found[f"{kernel.name}: spills in the block loop"] = spills
            if kernel.name == "attend":
                part = 16 / counts.queries.rows
                found["attend: instructions per block and head, for 16 rows"] = part * loop.length
                sectors = part * costs["attend"].sectors
                found["attend: sectors per tile and head, for 16 rows"] = sectors
        elif kernel.name == "find_slices":
            code = kernel.code()
            loops = code.innermost_loops()
            outside = len(code.instructions) - sum(loop.length for loop in loops)
            options = kernel.launch.options
            searches = model.search_instructions(
                counts, [loop.length for loop in loops], outside,
                options["BLOCK"] // options["num_warps"],
            )  # fmt: skip
        elif kernel.name in plan.KERNELS:
            options = kernel.launch.options
            of_plan.setdefault(kernel.name, {})[options.get("ROWS", 0)] = plan.PlanKernel(
                kernel.code(), options["num_warps"], options.get("BLOCK", 1),
                options.get("BITS", ()),
            )  # fmt: skip
    forward = costs["attend"]
    of_forward = forward.programs * forward.instructions
    found["find_slices: instructions over those of attend"] = searches / of_forward
    copy = model.copy_seconds(counts)
    backward = sum(costs[name].seconds()[1] for name in BLOCK_LOOPS if name != "attend")
    found["attend: predicted time over copying q, k, v and out"] = forward.seconds()[1] / copy
    found["backward: predicted time over copying q, k, v and out"] = backward / copy
    planning = plan.seconds(
        counts, len(host.SIZES), searches, of_plan, host.planned_step(), _unused_bytes(counts)
    )
    found["plan of a step: predicted time over forward and backward"] = planning / (
        forward.seconds()[1] + backward
    )
    return found, costs


def _unused_bytes(counts: scene.SceneCounts) -> float:
    """The space for lists of tiles, less what is written."""
    slots = sum(size**2 for size in host.SIZES)
    per_block = 2 * LIST_BLOCK * torch.int32.itemsize  # items and members
    return per_block * sum(
        list_space(x.tiles, x.rows, slots) - x.tiles * x.blocks
        for x in (counts.queries, counts.columns)
    )


def launches(case: Case) -> list[Launch]:
    """What the ops would launch; nothing reads the tensors on the CPU that they get."""
    found: dict[Any, Launch] = {}

    def record(kernel: Any, n_programs: int, *arguments: Any, **options: int) -> None:
        found[kernel, options.get("ROWS")] = Launch(kernel, arguments, options)

    plan = _plan(case)
    with (
        mock.patch.object(triton_ops, "launch", record),
        mock.patch.object(plan_ops, "launch", record),
        mock.patch.object(sampling_ops, "launch", record),
    ):
        if not case.everything or case.balls:
            _find_tiles(plan)
        if not case.everything or (case.dtype, case.width) == (torch.float32, 256):
            _sample(plan, case)
        _rotate_and_attend(plan, case)
    return list(found.values())


def _points(case: Case) -> FeaturePyramid:
    scene = particle_tracks(2)
    coordinates = scene.coordinates[: case.n_points]
    return FeaturePyramid(torch.zeros(len(coordinates), 1), coordinates, scene.level_shapes, 1)


def _plan(case: Case) -> NeighborhoodPlan:
    points, scene = _points(case), particle_tracks(2)
    positions = points.positions()[: case.n_queries]
    windows = [Window(size, shape="ball") if case.balls else size for size in scene.windows]
    return plan_neighborhoods(positions, torch.tensor([0, len(positions)]), points, windows)


def _find_tiles(plan: NeighborhoodPlan) -> None:
    tables, cells = plan._kernel_tables(), plan._point_cells()
    assert tables is not None
    levels, query_slots, point_slots = tables.on(plan.device, tables.layout.key_dtype)
    numbers, dtype = list(tables.numbers), tables.layout.key_dtype
    positions, coordinates = plan._keyed_cells.positions, plan._keyed_cells.coordinates
    offsets, (points, shifts) = torch.tensor([0, len(positions)]), plan.copies
    query_keys = torch.zeros(plan.n_levels, plan.n_queries, dtype=dtype)
    point_keys = torch.zeros(plan.n_points, dtype=dtype)
    plan_ops.find_point_slices(query_keys, point_keys, *cells, point_slots, numbers, plan.n_levels)
    plan_ops.find_query_slices(
        positions,
        offsets,
        coordinates,
        points,
        shifts,
        levels,
        query_slots,
        numbers,
        dtype,
        torch.float32,
    )
    sizes, n_queries, n_points = plan._tensors.slices_per_level(), plan.n_queries, plan.n_points
    sides = (
        (plan._tensors.query_slices, sizes, tile_rows(n_queries, n_points, True)),
        (plan._point_slices(), [max(sizes)], tile_rows(n_points, n_queries, False)),
    )
    for slices, own, rows in sides:
        plan_ops.find_runs(*slices[:3], len(slices.order), own, rows)


def _rotate_and_attend(plan: NeighborhoodPlan, case: Case) -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, case.heads, case.width, dtype=case.dtype)

    x = zeros(plan.n_points)
    axes, exact = plan.position_dim + 1, torch.float64
    coordinates = torch.zeros(plan.n_points, axes, dtype=exact)
    frequencies = torch.zeros(axes, case.heads, case.width // 2, dtype=exact)
    triton_ops.rotate(x, coordinates, frequencies)
    triton_ops.rotate_backward(x, x, coordinates, frequencies, case.everything)
    background, seed, bias = [], None, None
    if case.everything:
        seed = torch.tensor(5)
        levels = plan.n_levels
        background = [zeros(plan.n_queries, levels), zeros(plan.window_slots), zeros(1, levels)]
    if case.bias:
        bias = torch.zeros(plan.window_slots, case.heads, dtype=case.dtype)
    slices = plan._tensors.query_slices
    find = reference.find_runs, triton_backend.find_lists
    tiles = plan._query_tiles(*find), plan._point_tiles(*find)
    columns = plan._tensors.point_columns
    windows = window_tables(plan._windows, plan.device, slots=bias is not None)
    parts = PlanParts(tiles[0], windows, *slices[1:3], columns, point_tiles=tiles[1])
    arguments = (
        zeros(plan.n_queries), zeros(plan.n_points), zeros(plan.n_points), None, seed, background,
        bias, parts.tensors(), plan._tensors.slices_per_level(), 0.1, 0.2,
    )  # fmt: skip
    out, lse = triton_ops.attend(*arguments)
    no_gradient = lse.new_zeros(()).expand_as(lse)  # as in a training step
    for needs_queries in (False, True):
        triton_ops.attend_backward(out, no_gradient, out, lse, *arguments, needs_queries, True)


def _sample(plan: NeighborhoodPlan, case: Case) -> None:
    """Deformable sampling, by default of 4 locations per head and level."""
    index = index_cells(_points(case))
    sizes = plan.n_queries, case.heads, plan.n_levels, 4
    table = torch.zeros(index.n_cells + plan.n_levels, case.heads, case.width)
    locations, weights = torch.zeros(*sizes, plan.position_dim), torch.zeros(sizes)
    images = torch.zeros(plan.n_queries, dtype=torch.int64)
    arguments = table, locations, weights, images, *index.lookup_arguments(), True
    sampling_ops.sample_backward(sampling_ops.sample(*arguments), *arguments)


def variant(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch, as it specializes the arguments; and its options."""
    kernel, backend = launch.kernel, make_backend(target)
    keywords = {**launch.options, "enable_fp_fusion": True}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, left = bind(*launch.arguments, **keywords)
    options, *described = kernel._pack_args(backend, keywords, bound, specialization, left)
    return ASTSource(kernel, *described), options.__dict__


def report(found: dict[str, float], costs: dict[str, model.Cost]) -> Iterator[str]:
    """Lines of text: costs on the scene, and figures beside their bars."""
    for name, cost in costs.items():
        least, most = (1e3 * seconds for seconds in cost.seconds())
        yield (
            f"{name}: {cost.instructions:.0f} instructions and {cost.sectors:.0f} sectors per tile "
            f"and head; predicted {least:.2f} to {most:.2f} ms on an H200"
        )
    for bar in model.BARS:
        aim = "" if bar.aim is None else f", aim {bar.aim:g}"
        yield f"{bar.name}: {found[bar.name]:.4g}  (bar {bar.bar:g}{aim})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="print missed bars alone; then exit 1")
    parser.add_argument("--costs", action="store_true", help="print costs on the scene alone")
    arguments = parser.parse_args()
    if triton_ops.INTERPRETS:
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile")
    if not (arguments.check or arguments.costs):
        for architecture, case in itertools.product((80, 90, 100), CASES):
            for usage in usages(case, architecture):
                line = {"triton": triton.__version__, "architecture": architecture}
                print(json.dumps({**line, **case._asdict(), **usage}, default=str), flush=True)
    found, costs = figures(scene.count(particle_tracks(420, size=2048)))
    missed = model.misses(found)
    print("\n".join(missed if arguments.check else report(found, costs)))
    if arguments.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
