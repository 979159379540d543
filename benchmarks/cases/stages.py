"""Where the time of a block goes: its stages, each timed alone.

What is timed alone is not what runs in the block: their sum may differ from the whole.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.measure import Call, take_turns
from benchmarks.outcome import Figures
from benchmarks.work import Work

STAGES = (
    "plan",
    "norm",
    "projections",
    "rotation of queries",
    "rotation of keys",
    "attention",
)


def seconds(layer: Layer, repeats: int) -> Figures:
    """Of every stage and of the whole block, forward and in a training step."""
    works = _stages(layer)
    calls: dict[str, list[Call]] = {
        "forward": [layer.make_plan, *(work.forward for work in works.values())],
        "step": [layer.make_plan, *(work.step for work in works.values())],
    }
    figures: Figures = {"points": len(layer)}
    for kind in calls:
        turns = take_turns(*calls[kind], repeats=repeats)
        for index, name in enumerate(("plan", *works)):
            figures[f"{kind}_seconds {name}"] = turns.median(index)
    return figures


def _stages(layer: Layer) -> dict[str, Work]:
    """All but the plan, which has no gradient."""
    block = layer.block
    attention = layer.attention()
    q, k, _ = attention.inputs
    rotation = tuple(block.pos_encoding.parameters())

    def rotate(x: Tensor, coordinates: Tensor) -> Tensor:
        out: Tensor = block.pos_encoding(x, coordinates)
        return out

    return {
        "whole block": layer.whole(),
        "norm": Work(block.norm, (layer.x,), tuple(block.norm.parameters())),
        "projections": layer.floor(),
        "rotation of queries": Work(lambda x: rotate(x, layer.query_coordinates), (q,), rotation),
        "rotation of keys": Work(lambda x: rotate(x, layer.point_coordinates), (k,), rotation),
        "attention": attention,
    }
