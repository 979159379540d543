"""The Triton kernels compiled ahead of time, for GPUs that this machine need not have."""

import importlib.util
import json
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from compilers import compile_for_gpus

COMPILE = """
import json, sys
from benchmarks.kernels import BLOCK_LOOPS, CASES, launches, usages

architecture, everything = sys.argv[1:]
# All kernels for one GPU: those without options, and those of balls with a bias. For other GPUs,
# and with the widest heads, only the loops over blocks, whose products and shared memory differ.
plain, *others = CASES
balls = next(x for x in others if x.balls)
widest = next(x for x in others if x.width == 256 and x.dtype.itemsize == 4)
whole, loops = ([plain, balls], [widest]) if architecture == "90" else ([], [plain])
if everything:
    whole, loops = CASES, []
for case in [*whole, *loops]:
    names = {launch.kernel.fn.__name__ for launch in launches(case)}
    left_out = names - set(BLOCK_LOOPS) if case in loops else set()
    for usage in usages(case, int(architecture), loops=False, without=left_out):
        print(json.dumps([str(case.dtype), case.width, {**usage, "bias": case.bias}]))
"""
VARIANTS = """
import json, torch
from triton.backends.compiler import GPUTarget
from benchmarks.kernels import Case, launches, variant

found = {}
for n_queries, n_points in ((1, 1), (16, 17), (15, 48)):
    for everything in (True, False):
        case = Case(torch.float16, 32, everything, 1, n_points, n_queries, bias=everything)
        for launch in launches(case):
            source, _ = variant(launch, GPUTarget("cuda", 90, 32))
            name = f"{launch.kernel.fn.__name__} {everything} {launch.options.get('ROWS')}"
            found.setdefault(name, set()).add(source.hash())
print(json.dumps({name: len(hashes) for name, hashes in found.items()}))
"""
FOR_AMD = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from benchmarks.kernels import Case, launches, variant

everything = sys.argv[1]
target = GPUTarget("hip", "gfx942", 64)
done = set()
for case in (
    Case(torch.bfloat16, 32, everything=False),
    Case(torch.bfloat16, 32, everything=True, bias=True),
):
    found = [x for x in launches(case) if everything or x.kernel.fn.__name__ not in done]
    for launch in found:
        source, options = variant(launch, target)
        compiled = triton.compile(source, target=target, options=options)
        print(json.dumps([launch.kernel.fn.__name__, compiled.metadata.shared]))
    done |= {launch.kernel.fn.__name__ for launch in found}
"""
LOOPS = {"attend", "query_gradients", "point_gradients"}
KERNELS = {
    "attend",
    "query_gradients",
    "point_gradients",
    "find_stats",
    "cell_key_gradients",
    "cell_value_gradients",
    "number_cells",
    "bias_gradients",
    "place_queries",
    "place_points",
    "place_along_curve",
    "split_order",
    "find_slices",
    "find_runs",
    "place_lists",
    "write_lists",
    "rotate",
    "rotate_backward",
    "sample",
    "location_gradients",
    "find_bounds",
    "find_entries_of_cells",
    "table_gradients",
}
# What a program may use on every GPU from compute capability 8.0 on. 8.6, 8.9 and 12.0 have the
# least; 8.0 has 163 KiB, 9.0 and 10.0 have 227 KiB.
SHARED_BYTES = 99 * 1024
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="needs ptxas, which Triton ships for Linux"),
]


def run(code: str, folder: Path, *arguments: str) -> list[Any]:
    """Runs ``code`` with ``folder`` as Triton's cache; returns the lines of JSON that it prints."""
    return [json.loads(line) for line in compile_for_gpus(code, *arguments, cache=folder)]


@pytest.fixture
def all_kernels(request: pytest.FixtureRequest) -> str:
    """What the code of processes takes: not empty with the option ``--all-kernels``."""
    return "all" if request.config.getoption("--all-kernels") else ""


def spills_allowed(architecture: int, dtype: str, width: int, usage: dict[str, Any]) -> int:
    """Bytes of a thread. Products of float32 keep both factors in registers."""
    if usage["kernel"].startswith("rotate"):
        return 96  # the sine of a huge angle takes a table
    if usage["bias"] and width <= 128:  # slots of pairs, beside background and dropout
        return 128
    if dtype != "torch.float32":
        return 48  # in float16, with background and dropout
    if width <= 128:
        return 64
    # What older Tritons make of it. For compute capability 8.0, the assembler of 3.6 takes 32
    # registers; before dropout counted points by ids it took 128, and spilled 1200 bytes.
    if usage["kernel"] == "query_gradients":
        version = metadata.version("triton")
        if version.startswith("3.6."):
            return 3400 if architecture == 80 else 1280
        if version.startswith("3.7."):
            return 704
    return 640


def test_one_variant_for_all_numbers_of_queries_and_points(kernel_cache: Path) -> None:
    """Triton would specialize on one and on multiples of 16; sizes are excepted from that."""
    (variants,) = run(VARIANTS, kernel_cache)
    assert {name.split()[0] for name in variants} == KERNELS
    assert {name for name, count in variants.items() if count > 1} == set()


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_kernels_compile_and_stay_within_resource_limits(
    architecture: int,
    all_kernels: str,
    kernel_cache: Path,
    record_property: Callable[[str, object], None],
) -> None:
    lines = run(COMPILE, kernel_cache, str(architecture), all_kernels)
    kernels = KERNELS if all_kernels or architecture == 90 else LOOPS
    assert {usage["kernel"] for _, _, usage in lines} == kernels
    spilling = [
        line for line in lines if line[2]["spilled_bytes"] > spills_allowed(architecture, *line)
    ]
    assert not spilling
    too_large = [line for line in lines if line[2]["shared_bytes"] > SHARED_BYTES]
    assert not too_large
    counts = "registers", "spilled_bytes", "shared_bytes"
    for kernel in sorted(kernels):
        own = [usage for _, _, usage in lines if usage["kernel"] == kernel]
        most = "  ".join(f"{name} {max(usage[name] for usage in own)}" for name in counts)
        record_property("kernel", f"{architecture}  {kernel}  {most}")


def test_kernels_compile_for_amd(all_kernels: str, kernel_cache: Path) -> None:
    if importlib.util.find_spec("triton.backends.amd") is None:
        pytest.skip("this build of Triton has no AMD back end")
    lines = run(FOR_AMD, kernel_cache, all_kernels)
    assert {kernel for kernel, _ in lines} == KERNELS
    assert max(shared for _, shared in lines) <= 64 * 1024
