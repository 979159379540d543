"""Launches of a plan and of the block, without a GPU: ``python -m benchmarks.launches``.

Runs the host's code for a GPU on tensors of torch's meta device, which have no contents, and counts
torch ops and launches of Triton kernels. ``--check`` prints what misses a bar and exits with 1.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    SparseNeighborhoodAttentionBlock,
    backends,
    plan_neighborhoods,
)
from vicinal._utils import constants
from vicinal.backends.triton import ops as triton_ops
from vicinal.backends.triton import plan_ops
from vicinal.backends.triton.sampling import ops as sampling_ops

SHAPES = ((2048, 2048), (1024, 1024), (512, 512), (256, 256))
SIZES = (3, 5, 7, 9)
EMBED_DIM, N_HEADS = 256, 8
TRACKS = 202_890, 202_890  # queries and points of the scene of docs/performance-gpu.md
OBJECTS = 300, 20_000  # object queries of a decoder
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
ON_HOST = ("promote_types", "scalar_tensor")  # numbers for other ops
SORT_INDEX = 8  # bytes that a sort moves along with a key
SORT_LAUNCHES = 3  # and a pass of the radix sort for each byte of the keys
OTHER_LAUNCHES = {"cumsum": 2, "nonzero": 4}


class Counts(NamedTuple):
    """What a call does on the host.

    Attributes:
        ops: torch ops that are neither views nor allocations; each launches a kernel or more.
        allocations: torch ops that allocate an uninitialized tensor, without a launch.
        kernels: launches of Triton kernels.
        launches: an estimate of all launches, those inside torch ops included.
        bytes: an estimate of what is read and written: each tensor that an op or a kernel takes
            or returns, once; of a sort, keys and indices twice in every pass.
        names: how often each of these ops and kernels runs.
    """

    ops: int
    allocations: int
    kernels: int
    launches: int
    bytes: int
    names: Counter[str]

    @property
    def total(self) -> int:
        """Ops and launches of Triton kernels, which the bars limit."""
        return self.ops + self.kernels


class Bar(NamedTuple):
    """The largest `Counts.total` that a call may have, and the one to aim at."""

    bar: int
    aim: int


BARS = {
    "plan of a forward": Bar(25, 15),
    "plan of a training step": Bar(40, 25),
    "block forward after the plan": Bar(20, 14),
}


def _runs_on_device(op: Any) -> bool:
    """Whether an op of torch computes a tensor; `vicinal::numbers` is in a cache on a GPU."""
    computes = op.namespace == "aten" and not op.is_view
    return computes and op._opname not in ON_HOST


def _bytes(x: Any) -> int:
    return x.numel() * x.element_size() if isinstance(x, Tensor) else 0


class _Recorder(TorchDispatchMode):
    """Counts ops; runs the back end's own code on meta tensors in place of the ops' fakes."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.allocations: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vicinal_triton":
            with self:
                return triton_ops.KERNELS[func._opname](*args)
        name = func._opname
        if name in ALLOCATIONS:
            self.allocations[name] += 1
        elif _runs_on_device(func):
            self.ops[name] += 1
            return self._count_op(name, func(*args, **(kwargs or {})), args)
        return func(*args, **(kwargs or {}))

    def _count_op(self, name: str, result: Any, args: tuple[Any, ...]) -> Any:
        moved = sum(map(_bytes, pytree.tree_leaves((args, result))))
        if name == "sort":
            passes = args[0].element_size()
            self.launches += SORT_LAUNCHES + passes
            moved = passes * 2 * args[0].numel() * (passes + SORT_INDEX)
        else:
            self.launches += OTHER_LAUNCHES.get(name, 1)
        self.bytes += moved
        return result

    def launch(self, kernel: Any, n_programs: int, *arguments: Any, **options: Any) -> None:
        if n_programs:
            self.kernels[kernel.fn.__name__] += 1
            self.launches += 1
            # A walk of tiles contains tensors that are arguments of their own as well.
            tensors = {id(x): x for x in pytree.tree_leaves(arguments)}
            self.bytes += sum(map(_bytes, tensors.values()))

    def counts(self) -> Counts:
        parts = self.ops, self.allocations, self.kernels
        ops, allocations, kernels = (part.total() for part in parts)
        return Counts(ops, allocations, kernels, self.launches, self.bytes, sum(parts, Counter()))


@contextlib.contextmanager
def meta_as_gpu() -> Iterator[None]:
    """Lets the Triton back end take tensors of the meta device as it takes those of a GPU."""
    able = backends._BACKENDS["triton"]._replace(unsupported_reason=lambda device, dtype: None)
    with (
        mock.patch.dict(backends._BACKENDS, triton=able),
        mock.patch.dict(backends._BY_DEVICE, meta="triton"),
        mock.patch.object(constants, "_CACHED_DEVICES", ("meta",)),
    ):
        yield


def count(call: Callable[[], object]) -> Counts:
    """Counts what ``call`` does; on tensors of the meta device, within `meta_as_gpu`."""
    recorder = _Recorder()
    with contextlib.ExitStack() as patches:
        for module in (triton_ops, plan_ops, sampling_ops):
            patches.enter_context(mock.patch.object(module, "launch", recorder.launch))
        with recorder:
            call()
    return recorder.counts()


class Problem:
    """Queries and points of sizes ``[N, nnz]`` on the meta device, and a block for them."""

    def __init__(self, n_queries: int, n_points: int) -> None:
        with torch.device("meta"):
            values = torch.zeros(n_points, EMBED_DIM)
            coordinates = torch.zeros(n_points, 4, dtype=torch.int64)
            self.points = FeaturePyramid(values, coordinates, SHAPES, 1)
            self.block = SparseNeighborhoodAttentionBlock(EMBED_DIM, N_HEADS, 4, SIZES)
            self.query = torch.zeros(n_queries, EMBED_DIM)
            self.positions = torch.zeros(n_queries, 2)
            self.offsets = torch.zeros(2, dtype=torch.int64)

    def plan(self) -> NeighborhoodPlan:
        return plan_neighborhoods(self.positions, self.offsets, self.points, SIZES)

    def forward(self, plan: NeighborhoodPlan) -> torch.Tensor:
        arguments = self.query, self.positions, self.offsets, self.points
        out: torch.Tensor = self.block(*arguments, plan=plan)
        return out

    def counts(self) -> dict[str, Counts]:
        """What the calls of `BARS` do."""
        with torch.no_grad():
            found = {"plan of a forward": count(self.plan)}
            plan = self.plan()
            forward = count(lambda: self.forward(plan))
        return found | {
            "plan of a training step": count(self.plan),
            "block forward after the plan": forward,
        }


def all_counts() -> dict[str, dict[str, Counts]]:
    """The counts by scene and call."""
    with meta_as_gpu():
        return {
            f"{n_queries:,} queries, {n_points:,} points": Problem(n_queries, n_points).counts()
            for n_queries, n_points in (TRACKS, OBJECTS)
        }


def planned_step() -> Counts:
    """The counts of a training step's plan, for the scene of `TRACKS`."""
    with meta_as_gpu():
        return count(Problem(*TRACKS).plan)


def misses(found: dict[str, dict[str, Counts]]) -> list[str]:
    """A line for each count beyond its bar."""
    return [
        f"{call}, {scene}: {counts.total} ops and launches, the bar is {BARS[call].bar}"
        for scene, calls in found.items()
        for call, counts in calls.items()
        if counts.total > BARS[call].bar
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--check", action="store_true", help="print misses alone; 1 if any")
    parser.add_argument("--names", action="store_true", help="list the ops and kernels, too")
    arguments = parser.parse_args()
    found = all_counts()
    if arguments.check:
        missed = misses(found)
        for line in missed:
            print(line)
        return int(bool(missed))
    columns = "total", "bar", "aim", "ops", "kernels", "allocations", "launches"
    print(f"{'':68}" + "".join(f"{column:>12}" for column in columns))
    for scene, calls in found.items():
        for call, counts in calls.items():
            own = counts.ops, counts.kernels, counts.allocations, counts.launches
            numbers = counts.total, *BARS[call], *own
            label = f"{call}, {scene}"
            print(f"{label:68}" + "".join(f"{number:12}" for number in numbers))
            if arguments.names:
                print("   ", ", ".join(f"{name} {n}" for name, n in counts.names.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
