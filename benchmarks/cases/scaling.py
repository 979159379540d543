"""Time per query as scenes of one density grow."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.layer import Layer
from benchmarks.measure import Turns, take_turns
from benchmarks.outcome import Figures


def seconds(layers: Sequence[Layer], repeats: int) -> Figures:
    """Of the block's forward, planning included, and of a training step, from small to large.

    The growth of the GEMM floor stands beside that of the block.
    """
    works = [layer.whole() for layer in layers]
    forward = take_turns(*(work.forward for work in works), repeats=repeats)
    step = take_turns(*(work.step for work in works), repeats=repeats)
    ends = [layer.floor() for layer in (layers[0], layers[-1])]
    floor_forward = take_turns(*(work.forward for work in ends), repeats=repeats)
    floor_step = take_turns(*(work.step for work in ends), repeats=repeats)
    figures: Figures = {}
    for index, layer in enumerate(layers):
        figures[f"points_{index}"] = len(layer)
        figures[f"neighbors_{index}"] = layer.n_pairs / len(layer)
        figures[f"forward_seconds_{index}"] = forward.median(index)
        figures[f"step_seconds_{index}"] = step.median(index)
    figures["forward_growth"] = _growth(layers, forward)
    figures["step_growth"] = _growth(layers, step)
    figures["floor_forward_growth"] = _growth(layers, floor_forward)
    figures["floor_step_growth"] = _growth(layers, floor_step)
    return figures


def _growth(layers: Sequence[Layer], turns: Turns) -> float:
    """The largest scene's time per query over the smallest's; they were timed last and first."""
    return turns.ratio(len(turns.seconds) - 1, 0) * len(layers[0]) / len(layers[-1])


def one_step(layer: Layer) -> Figures:
    """A training step that just has to run."""
    step = layer.whole().step
    start = time.perf_counter()
    step()
    return {"points": len(layer), "step_seconds": time.perf_counter() - start}
