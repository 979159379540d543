"""How long calls take on a GPU, by its own clock, and how much of its memory they need."""

from __future__ import annotations

import gc
from typing import NamedTuple

import torch

from benchmarks import measure
from benchmarks.measure import Call, TakeTurns, Turns, wait_for

WARM_UPS = 3  # calls: the first compiles, the next find their memory
FLUSHED = 256 * 2**20  # bytes, several times what the caches of today's GPUs hold


class Peak(NamedTuple):
    """Bytes of a GPU's memory that tensors take."""

    before: int
    """The call began."""
    total: int
    """At the peak, those included."""

    @property
    def of_call(self) -> int:
        return self.total - self.before


def take_turns(*calls: Call, repeats: int) -> Turns:
    """`benchmarks.measure.take_turns` by CUDA events, each call with caches that are cold.

    Nothing waits between calls, so the time to launch counts only where the GPU has to wait for it.
    """
    for call in calls:
        for _ in range(WARM_UPS):
            call()
    flushed = torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    rounds = [[_between_events(call, flushed) for call in calls] for _ in range(repeats)]
    torch.cuda.synchronize()
    seconds = [[start.elapsed_time(end) / 1000 for start, end in events] for events in rounds]
    return Turns(tuple(zip(*seconds, strict=True)))


def _between_events(call: Call, flushed: torch.Tensor) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flushed.zero_()
    start.record()
    call()
    end.record()
    return start, end


def peak(device: torch.device, call: Call) -> Peak:
    """Memory of a call, after one that sets up what stays for good.

    On the CPU, to try things out: what the process takes, and nothing before.
    """
    call()
    if device.type != "cuda":
        return Peak(0, measure.peak_memory(call))
    gc.collect()
    wait_for(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait_for(device)
    return Peak(before, torch.cuda.max_memory_allocated())


def replayed(device: torch.device, call: Call) -> Call:
    """The kernels of ``call`` as a CUDA graph: what is left of it when launching costs nothing.

    On the CPU, to try things out: the call itself.
    """
    if device.type != "cuda":
        return call
    _warm_up_aside(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _warm_up_aside(call: Call) -> None:
    """On another stream, as before any capture."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(aside)


def clock_of(device: torch.device) -> TakeTurns:
    """How calls on a device are timed."""
    return take_turns if device.type == "cuda" else measure.take_turns
