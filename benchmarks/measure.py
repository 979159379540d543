"""Time and memory of calls, on the CPU and on a GPU."""

import ctypes
import gc
import statistics
import sys
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import proc_bytes
from benchmarks.outcome import CaseSkipped, Figures

Call = Callable[[], object]
Compute = Callable[..., Tensor | tuple[Tensor, ...]]

WARM_UPS = 3  # calls on a GPU: the first compiles, the next allocate
FLUSHED = 256 * 2**20  # bytes, several times the caches of today's GPUs


@dataclass(frozen=True)
class Work:
    """``compute(*inputs)``, and the ``parameters`` that also get gradients, as calls to time."""

    compute: Compute
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def forward(self) -> tuple[Tensor, ...]:
        return _as_tuple(self.compute(*self.inputs))

    def step(self, grad_of: Callable[[Tensor], Tensor] = torch.ones_like) -> tuple[Tensor, ...]:
        """A training step: forward, and backward from ``grad_of(output)`` to inputs and parameters.

        Returns the gradients, None where there is none.
        """
        leaves, out = self._with_graph()
        grads = [grad_of(part) for part in out]
        return torch.autograd.grad(out, [*leaves, *self.parameters], grads, allow_unused=True)

    def backward(self) -> Call:
        """The backward pass to the inputs alone; the forward pass runs here, once."""
        leaves, out = self._with_graph()
        ones = [torch.ones_like(part) for part in out]
        return lambda: torch.autograd.grad(out, leaves, ones, retain_graph=True)

    def _with_graph(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        return leaves, _as_tuple(self.compute(*leaves))


def _as_tuple(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@dataclass(frozen=True)
class Timings:
    """Seconds of several calls by name, of every round."""

    seconds: dict[str, tuple[float, ...]]

    def median(self, call: str) -> float:
        return statistics.median(self.seconds[call])

    def ratio(self, call: str, base: str) -> float:
        """How many times longer ``call`` takes than ``base``: the median over the rounds."""
        pairs = zip(self.seconds[call], self.seconds[base], strict=True)
        return statistics.median(one / other for one, other in pairs)

    def medians(self) -> Figures:
        return {f"{call}_seconds": self.median(call) for call in self.seconds}


def time_calls(calls: Mapping[str, Call], repeats: int, device: torch.device) -> Timings:
    """Times ``repeats`` rounds of all ``calls``, after a warm-up.

    The calls alternate, so that a change of the machine's speed affects all of them. On a GPU, CUDA
    events measure with cold caches; the host does not wait between calls, so the time of a launch
    counts only where the GPU waits for it.
    """
    on_gpu, each = device.type == "cuda", [*calls.values()]
    for call in each:
        for _ in range(WARM_UPS if on_gpu else 1):
            call()
    in_turn = each * repeats
    seconds = _on_gpu(in_turn) if on_gpu else [timeit.timeit(call, number=1) for call in in_turn]
    return Timings({name: tuple(seconds[i :: len(each)]) for i, name in enumerate(calls)})


def _on_gpu(calls: Sequence[Call]) -> list[float]:
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    events = []
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in events]


def as_cuda_graph(call: Call, device: torch.device) -> Call:
    """A replay of the kernels of ``call``, without the time of launching; on the CPU, ``call``."""
    if device.type != "cuda":
        return call
    warm_up = torch.cuda.Stream()  # captures must not follow the first call of a library
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def kernel_seconds(call: Call, repeats: int, device: torch.device) -> dict[str, float]:
    """Seconds of a ``call`` in each GPU kernel, by its name, after a warm-up; on the CPU, nothing.

    Caches are as the kernels before left them.
    """
    if device.type != "cuda":
        return {}
    from torch.profiler import ProfilerActivity, profile

    for _ in range(WARM_UPS):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total / 1e6 / repeats
        for event in profiled.key_averages()
        if event.self_device_time_total
    }


def host_seconds(call: Call, repeats: int, device: torch.device) -> float:
    """Seconds that the host takes for a ``call`` whose GPU kernels it does not wait for."""
    seconds = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(timeit.timeit(call, number=1))
    return statistics.median(seconds)


class Peak(NamedTuple):
    """Bytes at the peak of a call, and those of them that the call allocated."""

    total: int
    of_call: int


def peak_memory(call: Call, device: torch.device) -> Peak:
    """Memory of a call, after a warm-up that allocates what stays (threads, packed weights).

    On a GPU, bytes of tensors. On the CPU, resident memory of the process, so that the workspace of
    libraries counts.
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        total = torch.cuda.max_memory_allocated()
        return Peak(total, total - before)
    if sys.platform != "linux":
        raise CaseSkipped("peak memory of a process is measured on Linux only")
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)  # freed memory that malloc retains, reused, would hide a part of the peak
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, see proc(5)
    before = proc_bytes("self/status", "VmRSS")
    call()
    total = proc_bytes("self/status", "VmHWM")
    return Peak(total, max(0, total - before))
