"""The attention alone against what it cannot do without, and the plan against the attention."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.meter import clock_of, replayed
from benchmarks.gpu.tiling import plan_of_forward, plan_of_step
from benchmarks.layer import Layer
from benchmarks.measure import Call
from benchmarks.outcome import Figures
from benchmarks.work import Work


def over_copying(layer: Layer, repeats: int) -> Figures:
    """Times of both passes, the forward's over that of copying q, k, v and out once."""
    attention = layer.attention()
    copying, copied_bytes = _copying(attention)
    calls = (copying, attention.forward, attention.backward())
    turns = clock_of(layer.x.device)(*calls, repeats=repeats)
    return {
        "points": len(layer),
        "neighbors": layer.n_pairs / len(layer),
        "copying_seconds": turns.median(0),
        "copied_bytes_per_second": copied_bytes / turns.median(0),
        "forward_seconds": turns.median(1),
        "backward_seconds": turns.median(2),
        "forward_over_copying": turns.ratio(1, 0),
        "backward_over_forward": turns.ratio(2, 1),
    }


def _copying(attention: Work) -> tuple[Call, int]:
    """A call that copies what goes in and comes out, and how many bytes it reads and writes."""
    sources = (*attention.inputs, *attention.forward())
    targets = [torch.empty_like(x) for x in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    return copy, sum(2 * x.nbytes for x in sources)


def plan_over_attention(layer: Layer, repeats: int) -> Figures:
    """Times of planning, over that of the attention's forward: as launched, and replayed.

    A forward needs tiles of queries beside the plan, a training step those of points as well.
    """
    calls: dict[str, Call] = {
        "attention": layer.attention().forward,
        "plan_alone": layer.make_plan,
        "plan_of_forward": partial(plan_of_forward, layer),
        "plan_of_step": partial(plan_of_step, layer),
    }
    figures: Figures = {"points": len(layer)}
    for kind, of_kind in (("", calls), ("replayed_", _replayed(layer, calls))):
        turns = clock_of(layer.x.device)(*of_kind.values(), repeats=repeats)
        for index, name in enumerate(of_kind):
            figures[f"{kind}{name}_seconds"] = turns.median(index)
        for index, name in list(enumerate(of_kind))[1:]:
            figures[f"{kind}{name}_over_attention"] = turns.ratio(index, 0)
    return figures


def _replayed(layer: Layer, calls: dict[str, Call]) -> dict[str, Call]:
    return {name: replayed(layer.x.device, call) for name, call in calls.items()}
