"""Where the time of a block goes: its stages, each timed alone.

What is timed alone is not what runs in the block: their sum may differ from the whole.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.measure import Call, TakeTurns, take_turns
from benchmarks.outcome import Figures
from benchmarks.work import Work

FLOOR = "GEMM floor"
STAGES = (
    "norm, projections, residual",
    "plan",
    "rotation of queries",
    "rotation of keys",
    "attention",
)


def seconds(
    layer: Layer,
    repeats: int,
    take_turns: TakeTurns = take_turns,
    plans: tuple[Call, Call] | None = None,
) -> Figures:
    """Of every stage, the whole block and the GEMM floor, forward and in a training step.

    ``plans`` are calls that plan for these two; None: the plan has no more to it than making it.
    """
    for_forward, for_step = plans or (layer.make_plan, layer.make_plan)
    works = _stages(layer)
    calls: dict[str, list[Call]] = {
        "forward": [for_forward, *(work.forward for work in works.values())],
        "step": [for_step, *(work.step for work in works.values())],
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

    # Here, so that `benchmarks.compare` can run on commits that do not have them.
    from vicinal.backends import choose_backend
    from vicinal.nn.projections import add_projected, project

    backend = choose_backend(block.backend, layer.x.device)
    modules = (block.norm, block.q_in_proj, block.kv_proj, block.out_proj)
    dense = tuple(parameter for module in modules for parameter in module.parameters())

    def dense_maps(x: Tensor) -> tuple[Tensor, ...]:
        q = project(backend, x, block.q_in_proj, block.norm)
        kv = project(backend, x, block.kv_proj, parts=2)
        return *q, *kv, add_projected(backend, x, x, block.out_proj)

    return {
        "whole block": layer.whole(),
        FLOOR: layer.floor(),
        "norm, projections, residual": Work(dense_maps, (layer.x,), dense),
        "rotation of queries": Work(lambda x: rotate(x, layer.query_coordinates), (q,), rotation),
        "rotation of keys": Work(lambda x: rotate(x, layer.point_coordinates), (k,), rotation),
        "attention": attention,
    }
