"""The whole block: over its GEMM floor, inside CUDA graphs, and with a million queries."""

from __future__ import annotations

from benchmarks.cases import compute
from benchmarks.gpu.meter import clock_of, peak, replayed
from benchmarks.layer import Layer
from benchmarks.outcome import Figures


def over_floor(layer: Layer, repeats: int) -> Figures:
    """Both passes over the block's dense projections, planning included and the plan given."""
    take_turns = clock_of(layer.x.device)
    figures = compute.over_floor(layer, repeats, take_turns)
    # Of the plan without its tiles, which say little here: see `attention.plan_over_attention`.
    del figures["plan_seconds"], figures["plan_over_attention"]
    planned, floor = layer.planned(), layer.floor()
    forward = take_turns(planned.forward, floor.forward, repeats=repeats)
    step = take_turns(planned.step, floor.step, repeats=repeats)
    return figures | {
        "planned_forward_seconds": forward.median(0),
        "planned_forward_over_floor": forward.ratio(0, 1),
        "planned_step_seconds": step.median(0),
        "planned_step_over_floor": step.ratio(0, 1),
    }


def replayed_over_floor(layer: Layer, repeats: int) -> Figures:
    """A training step over its floor where nobody waits for launches: both as CUDA graphs."""
    device = layer.x.device
    works = (layer.whole(), layer.planned(), layer.floor())
    steps = [replayed(device, work.step) for work in works]
    turns = clock_of(device)(*steps, repeats=repeats)
    return {
        "points": len(layer),
        "step_seconds": turns.median(0),
        "planned_step_seconds": turns.median(1),
        "step_floor_seconds": turns.median(2),
        "step_over_floor": turns.ratio(0, 2),
        "planned_step_over_floor": turns.ratio(1, 2),
    }


def training_step(layer: Layer, repeats: int) -> Figures:
    """A step, planning included: its time and all the memory that is taken meanwhile."""
    step = layer.whole().step
    seconds = clock_of(layer.x.device)(step, repeats=repeats).median(0)
    taken = peak(layer.x.device, step)
    return {
        "points": len(layer),
        "step_seconds": seconds,
        "peak_gib": taken.total / 2**30,
        "gib_before": taken.before / 2**30,
        "peak_over_query": taken.of_call / layer.x_bytes,
    }
