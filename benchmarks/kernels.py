"""What Triton's kernels take of a GPU that need not be there: ``python -m benchmarks.kernels``.

Compiles each kernel as the ops launch it, for generations of cards, and prints registers, spilled
bytes and shared memory, as the assembler's tools tell them. Nothing runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.scenes import particle_tracks
from vicinal import FeaturePyramid, NeighborhoodPlan, plan_neighborhoods
from vicinal._index.tiles import tile_rows
from vicinal.backends import reference
from vicinal.backends.triton import ops as triton_ops

ARCHITECTURES = (80, 90, 100)
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Case(NamedTuple):
    """What kernels are compiled for."""

    dtype: torch.dtype
    width: int  # of a head
    everything: bool = True  # background and dropout, which take registers
    heads: int = 8
    n_points: int | None = None
    n_queries: int | None = None  # few among many are taken one by one

    def spills_allowed(self, kernel: str) -> int:
        """Bytes of a thread. Products of float32 keep both factors in registers."""
        if kernel.startswith("rotate"):
            return 96  # the sine of a huge angle takes a table
        if self.dtype != torch.float32:
            return 32
        return 64 if self.width <= 128 else 640


CASES = (
    Case(torch.bfloat16, 32, everything=False),
    Case(torch.bfloat16, 32, everything=False, n_queries=5),
    Case(torch.float16, 32),
    Case(torch.float16, 16, heads=1, n_points=1),  # a size of one may be a constant to Triton
    Case(torch.bfloat16, 256),
    Case(torch.float32, 32),
    Case(torch.float32, 256),
)


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    num_warps: int
    constants: dict[str, int]


class Usage(NamedTuple):
    """Of one kernel, in a thread but for what is shared by all."""

    kernel: str
    architecture: int
    rows: int | None
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int


def usages(case: Case, architecture: int) -> Iterator[Usage]:
    """Of every kernel that the ops launch, both passes; those that plan know no dtype."""
    for launch in launches(case):
        name = launch.kernel.fn.__name__
        sizes = _compile(launch, GPUTarget("cuda", architecture, 32))
        yield Usage(name, architecture, launch.constants.get("ROWS"), launch.num_warps, *sizes)


def launches(case: Case) -> list[Launch]:
    """What the ops would launch; they are given tensors on the CPU, which nothing reads."""
    found = []

    def record(
        kernel: Any, n_programs: int, *arguments: Any, num_warps: int, **constants: Any
    ) -> None:
        found.append(Launch(kernel, arguments, num_warps, constants))

    plan = _plan(case)
    with mock.patch.object(triton_ops, "launch", record):
        if not case.everything:
            _plan_tiles(plan, case)
        _rotate(plan, case)
        _attend(plan, case)
    return list({launch.kernel: launch for launch in found}.values())


def _plan(case: Case) -> NeighborhoodPlan:
    scene = particle_tracks(2)
    coordinates = scene.coordinates[: case.n_points]
    points = FeaturePyramid(torch.zeros(len(coordinates), 1), coordinates, scene.level_shapes, 1)
    positions = points.positions()[: case.n_queries]
    offsets = torch.tensor([0, len(positions)])
    return plan_neighborhoods(positions, offsets, points, scene.windows)


def _plan_tiles(plan: NeighborhoodPlan, case: Case) -> None:
    keys, _, query_keys, point_keys, _ = plan._keyed_cells
    slices = plan._tensors.query_slices
    triton_ops.find_slices(point_keys, query_keys, slices.traversal, *keys.window_rows())
    rows = tile_rows(plan.n_queries, plan.n_points)
    sizes = list(plan.neighborhood_sizes)
    triton_ops.find_runs(*slices[:3], sizes, plan.position_dim, rows)


def _rotate(plan: NeighborhoodPlan, case: Case) -> None:
    x = torch.zeros(plan.n_points, case.heads, case.width, dtype=case.dtype)
    coordinates = torch.zeros(plan.n_points, plan.position_dim + 1)
    frequencies = torch.zeros(plan.position_dim + 1, case.heads, case.width // 2)
    triton_ops.rotate(x, coordinates, frequencies)
    triton_ops.rotate_backward(x, x, coordinates, frequencies)


def _attend(plan: NeighborhoodPlan, case: Case) -> None:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, case.heads, case.width, dtype=case.dtype)

    background, seed = [], None
    if case.everything:
        seed = torch.tensor(5)
        levels = plan.n_levels
        background = [zeros(plan.n_queries, levels), zeros(plan.window_slots), zeros(1, levels)]
    slices = plan._tensors.query_slices
    tiles = plan._query_tiles(reference.find_runs), plan._point_tiles(reference.find_runs)
    flags = triton_ops.find_flags(zeros(plan.n_points), zeros(plan.n_points))
    tensors = [*tiles[0], flags, *slices[1:3], plan._tensors.point_columns, *tiles[1]]
    arguments = (
        zeros(plan.n_queries), zeros(plan.n_points), zeros(plan.n_points), None, seed, background,
        tensors, list(plan.neighborhood_sizes), plan.position_dim, 0.1, 0.2,
    )  # fmt: skip
    out, lse = triton_ops.attend(*arguments)
    for needs_queries in (False, True):
        triton_ops.attend_backward(out, lse, out, lse, *arguments, needs_queries, True)


def variant(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch, by its own look at the arguments; and its options."""
    kernel, backend = launch.kernel, make_backend(target)
    keywords = {**launch.constants, "num_warps": launch.num_warps, "enable_fp_fusion": True}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, left = bind(*launch.arguments, **keywords)
    options, *described = kernel._pack_args(backend, keywords, bound, specialization, left)
    return ASTSource(kernel, *described), options.__dict__


def _compile(launch: Launch, target: GPUTarget) -> tuple[int, int, int]:
    """Registers, spilled bytes and bytes of shared memory."""
    source, options = variant(launch, target)
    compiled = triton.compile(source, target=target, options=options)
    registers, stack = _resources(compiled.asm["cubin"])
    return registers, stack, compiled.metadata.shared


def _resources(binary: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, which is where spilled registers go, of a thread."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [tool, "--dump-resource-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--architecture", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--json", action="store_true", help="a line of JSON per kernel")
    arguments = parser.parse_args()
    if triton_ops.INTERPRETS:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    for architecture in arguments.architecture:
        for case in CASES:
            told = {**case._asdict(), "dtype": _NAMES[case.dtype]}
            for usage in usages(case, architecture):
                line = {**told, **usage._asdict()}
                if arguments.json:
                    print(json.dumps(line), flush=True)
                else:
                    print("  ".join(f"{name} {value}" for name, value in line.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
