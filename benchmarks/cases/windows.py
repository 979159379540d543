"""Windows of other shapes, a learned bias, and their plans, over boxes without one."""

import dataclasses
from typing import Any

import vicinal
from benchmarks.layer import Layer
from benchmarks.measure import Call
from benchmarks.outcome import Figures

SHAPES: dict[str, tuple[dict[str, Any], int]] = {
    "ball of 7": ({"size": 7, "shape": "ball"}, 7),
    "flat, 5 x 5 x 1": ({"size": (5, 5, 1)}, 5),
    "dilation 2": ({"size": 5, "dilation": 2}, 5),
}
"""Windows of all levels in three dimensions, and the size of the box that each is compared with."""
# They are made when a case runs: `benchmarks.compare` also times commits that have no `Window`.


def shapes(layer: Layer, repeats: int) -> Figures:
    """The attention's time over that of the box, divided by the ratio of the numbers of pairs.

    Every query has costs that do not depend on its neighbors, such as those of reading its own row.
    So the figures also have the time of one more pair, of the shape and of the box: each from this
    time and that of the same attention with windows of one cell.
    """
    figures: Figures = {}
    levels = len(layer.scene.level_shapes)
    least = layer.with_windows([1] * levels)
    for name, (window, size) in SHAPES.items():
        pair = (vicinal.Window(**window), size)
        layers = [layer.with_windows([one] * levels) for one in pair]
        calls: dict[str, Call] = {
            kind: layer.attention().forward
            for kind, layer in zip(("shape", "box", "least"), (*layers, least), strict=True)
        }
        timings = least.time(calls, repeats)
        pairs = [layer.n_pairs for layer in (*layers, least)]
        seconds = [timings.median(kind) for kind in calls]
        each = [(seconds[i] - seconds[2]) / (pairs[i] - pairs[2]) for i in range(2)]
        figures |= {
            f"pairs of {name} over its box": pairs[0] / pairs[1],
            f"{name}, time over pairs": timings.ratio("shape", "box") * pairs[1] / pairs[0],
            f"{name}, one more pair over the box's": each[0] / each[1],
        }
    return figures


def bias(layer: Layer, repeats: int) -> Figures:
    """Forward pass and training step of the block with a learned bias over those without."""
    figures: Figures = {}
    biased = dataclasses.replace(layer, relative_bias=True)
    for kind in ("forward", "step"):
        calls: dict[str, Call] = {
            name: getattr(each.whole(each.plan), kind)
            for name, each in (("biased", biased), ("plain", layer))
        }
        figures[f"{kind}_over_plain"] = layer.time(calls, repeats).ratio("biased", "plain")
    return figures


def plan(layer: Layer, repeats: int) -> Figures:
    """Plans of causal and of dilated windows over that of boxes of as many cells."""
    sizes, dim = layer.scene.windows, len(layer.scene.level_shapes[0])
    last = (*(False,) * (dim - 1), True)
    others = {
        "causal": [vicinal.Window(size, causal=last) for size in sizes],
        "dilated": [vicinal.Window(size, dilation=2) for size in sizes],
    }
    calls: dict[str, Call] = {
        name: layer.with_windows(windows).make_plan for name, windows in others.items()
    }
    timings = layer.time(calls | {"plain": layer.make_plan}, repeats)
    return {f"{name}_over_plain": timings.ratio(name, "plain") for name in others}
