"""Where the time of a block goes: its stages, each timed alone.

The same code may run at another speed in the block, so the sum may differ from the whole.
"""

from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.measure import Call, Work, time_calls
from benchmarks.outcome import Figures

FLOOR = "GEMM floor"
STAGES = ("norm, projections, residual", "plan", "rotation of queries", "rotation of keys",
          "attention")  # fmt: skip


def stages(layer: Layer, repeats: int) -> Figures:
    """Of every stage, the whole block and the GEMM floor, forward and in a training step."""
    works = _stages(layer)
    calls: dict[str, list[Call]] = {
        "forward": [layer.make_forward_plan, *(work.forward for work in works.values())],
        "step": [layer.make_plan, *(work.step for work in works.values())],
    }
    figures: Figures = {"points": len(layer)}
    for kind in calls:
        timings = time_calls(*calls[kind], repeats=repeats, device=layer.device)
        for index, name in enumerate(("plan", *works)):
            figures[f"{kind}_seconds {name}"] = timings.median(index)
    return figures


def _stages(layer: Layer) -> dict[str, Work]:
    """All but the plan, which has no gradient."""
    # Private, so not at the top: `benchmarks.compare` loads this module with other commits.
    from vicinal.backends import choose_backend
    from vicinal.nn.projections import add_projected, project

    block, attention = layer.block, layer.attention()
    backend = choose_backend(block.backend, layer.device)
    modules = (block.norm, block.q_in_proj, block.kv_proj, block.out_proj)
    dense = tuple(parameter for module in modules for parameter in module.parameters())

    def dense_maps(x: Tensor) -> tuple[Tensor, ...]:
        q = project(backend, x, block.q_in_proj, block.norm)
        kv = project(backend, x, block.kv_proj, parts=2)
        return *q, *kv, add_projected(backend, x, x, block.out_proj)

    def rotation(x: Tensor, coordinates: Tensor) -> Work:
        parameters = tuple(block.pos_encoding.parameters())
        return Work(lambda x: block.pos_encoding(x, coordinates), (x,), parameters)

    return {
        "whole block": layer.whole(),
        FLOOR: layer.floor(),
        "norm, projections, residual": Work(dense_maps, (layer.x,), dense),
        "rotation of queries": rotation(attention.inputs[0], layer.query_coordinates),
        "rotation of keys": rotation(attention.inputs[1], layer.point_coordinates),
        "attention": attention,
    }
