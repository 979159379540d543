"""The block and its attention: time over their floors, memory, scaling and threads."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vicinal
from benchmarks.layer import Layer
from benchmarks.machine import usable_cores
from benchmarks.measure import (
    Call,
    Work,
    as_cuda_graph,
    host_seconds,
    kernel_seconds,
    peak_memory,
)
from benchmarks.outcome import CaseSkipped, Figures

ATTENTION_FLOPS = 4  # per pair and channel: a product and a sum for the logit, and for the value
LINEAR_FLOPS = 2  # per weight and row
FLOOR = "GEMM floor"
SHOWN = 60  # characters of the name of a GPU kernel; those of templates are longer
STAGES = ("norm, projections, residual", "plan", "rotation of queries", "rotation of keys",
          "attention")  # fmt: skip


def over_last(layer: Layer, calls: Mapping[str, Call], repeats: int, base: str) -> Figures:
    """Seconds of all calls, and of each over those of the last, which figures call ``base``."""
    timings, (*names, last) = layer.time(calls, repeats), calls
    return timings.medians() | {f"{name}_over_{base}": timings.ratio(name, last) for name in names}


def compute(layer: Layer, repeats: int) -> Figures:
    """The block over its GEMM floor, the attention's flop/s over those of a product, the plan."""
    attention = layer.attention().forward
    weight = torch.randn(3 * layer.embed_dim, layer.embed_dim).to(layer.x)
    linear = Work(F.linear, (layer.x, weight)).forward
    timings = layer.time({"linear": linear, "attention": attention}, repeats)
    flops = ATTENTION_FLOPS * layer.n_pairs * layer.embed_dim
    rate = flops / (LINEAR_FLOPS * len(layer) * weight.numel())
    rate *= timings.ratio("linear", "attention")
    figures = layer.figures | {"attention_rate_over_gemm": rate}
    for kind in ("forward", "step"):
        figures |= over_last(layer, _over_floor(layer, kind), repeats, "floor")
    calls = {"plan": layer.make_plan, "attention": attention}
    return figures | over_last(layer, calls, repeats, "attention")


def replayed(layer: Layer, repeats: int) -> Figures:
    """A training step over its floor without the time of launches: both as CUDA graphs."""
    calls = _over_floor(layer, "step")
    graphs = {name: as_cuda_graph(call, layer.device) for name, call in calls.items()}
    return layer.figures | over_last(layer, graphs, repeats, "floor")


def _over_floor(layer: Layer, kind: str) -> dict[str, Call]:
    """Calls of a ``kind``, forward or step: planning included, with a plan given, the floor."""
    works = {kind: layer.whole(), f"planned_{kind}": layer.whole(layer.plan)}
    works[f"{kind}_floor"] = layer.floor()
    return {name: getattr(work, kind) for name, work in works.items()}


def attention(layer: Layer, repeats: int) -> Figures:
    """Times of both passes, the forward's over that of copying q, k, v and out once."""
    attention = layer.attention()
    sources = (*attention.inputs, *attention.forward())
    targets = [torch.empty_like(x) for x in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    calls = {"copying": copy, "forward": attention.forward, "backward": attention.backward()}
    timings = layer.time(calls, repeats)
    pairs = (("forward", "copying"), ("backward", "forward"))
    ratios = {f"{name}_over_{base}": timings.ratio(name, base) for name, base in pairs}
    return layer.figures | timings.medians() | ratios


def kernels(layer: Layer, repeats: int) -> Figures:
    """Time of each GPU kernel of a plan and of the attention's passes, and the host's time."""
    attention = layer.attention()
    calls: dict[str, Call] = {
        "plan_of_forward": layer.make_forward_plan,
        "plan_of_step": layer.make_plan,
        "forward": attention.forward,
        "backward": attention.backward(),
    }
    figures = layer.figures
    for name, call in calls.items():
        of_kernels = kernel_seconds(call, repeats, layer.device)
        figures[f"{name}_host_seconds"] = host_seconds(call, repeats, layer.device)
        figures[f"{name}_gpu_seconds"] = sum(of_kernels.values())
        for kernel, seconds in of_kernels.items():
            label = f"{name}_seconds {kernel[:SHOWN]}"
            figures[label] = float(figures.get(label, 0.0)) + seconds
    return figures


def plan(layer: Layer, repeats: int) -> Figures:
    """Times of planning over that of the attention's forward: as launched, and as CUDA graphs.

    A plan for training also has the tiles of points; so has any plan made in a CUDA graph.
    """
    calls: dict[str, Call] = {
        "plan_of_forward": layer.make_forward_plan,
        "plan_of_step": layer.make_plan,
        "attention": layer.attention().forward,
    }
    graphs = {f"replayed_{name}": as_cuda_graph(calls[name], layer.device) for name in calls}
    figures: Figures = {"points": len(layer)}
    for some in (calls, graphs):
        figures |= over_last(layer, some, repeats, "attention")
    return figures


def plan_check(layer: Layer, repeats: int) -> Figures:
    """Checks of a plan against its arguments over the block's forward pass with that plan: for the
    positions that it was made for, and for ones that moved within their cells.
    """
    # Private, so not at the top: `benchmarks.compare` loads this module with other commits.
    from vicinal.nn.plan_checks import check_plan

    windows, plan = layer.block.neighborhood_sizes, layer.plan
    moved = layer.positions + 0.4 * torch.rand_like(layer.positions)
    calls: dict[str, Call] = {
        name: partial(check_plan, plan, positions, layer.offsets, layer.pyramid, windows)
        for name, positions in (("same", layer.positions), ("moved", moved))
    }
    return over_last(layer, calls | {"forward": layer.whole(plan).forward}, repeats, "forward")


def stages(layer: Layer, repeats: int) -> Figures:
    """Times of every stage, the whole block and the GEMM floor, forward and in a training step.

    Each is timed alone. In the block it may run at another speed: the sum may differ.
    """
    works = _stages(layer)
    figures: Figures = {"points": len(layer)}
    for kind, plan in (("forward", layer.make_forward_plan), ("step", layer.make_plan)):
        calls: dict[str, Call] = {name: getattr(work, kind) for name, work in works.items()}
        timings = layer.time({"plan": plan} | calls, repeats)
        figures |= {f"{kind}_seconds {name}": timings.median(name) for name in timings.seconds}
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


def memory(layer: Layer) -> Figures:
    """Of a training step: its own, and all that is in use meanwhile; in a process of its own."""
    total, of_step = peak_memory(layer.whole().step, layer.device)
    peaks = {"peak_bytes": of_step, "peak_over_query": of_step / layer.x.nbytes}
    return layer.figures | peaks | {"peak_gib": total / 2**30}


def training_step(layer: Layer, repeats: int) -> Figures:
    """A step, planning included: its memory and its time."""
    return memory(layer) | layer.time({"step": layer.whole().step}, repeats).medians()


def scaling(layers: Sequence[Layer], repeats: int) -> Figures:
    """Time per query as scenes of one density grow, from small to large, and of the GEMM floor.

    A growth is the largest scene's time per query over the smallest's.
    """
    figures: Figures = {}
    for index, layer in enumerate(layers):
        figures |= {f"{name}_{index}": value for name, value in layer.figures.items()}
    first, last = "0", str(len(layers) - 1)
    points = len(layers[0]) / len(layers[-1])
    for kind in ("forward", "step"):
        calls = {str(i): getattr(layer.whole(), kind) for i, layer in enumerate(layers)}
        blocks = layers[0].time(calls, repeats)
        calls = {i: getattr(layers[int(i)].floor(), kind) for i in (first, last)}
        floors = layers[0].time(calls, repeats)
        figures |= {f"{kind}_seconds_{i}": blocks.median(i) for i in blocks.seconds}
        figures[f"{kind}_growth"] = points * blocks.ratio(last, first)
        figures[f"floor_{kind}_growth"] = points * floors.ratio(last, first)
    return figures


def two_threads(layer: Layer, repeats: int) -> Figures:
    """How many times faster two threads are than one."""
    if usable_cores() < 2:
        raise CaseSkipped("two threads need two cores, and there is one")
    threads = torch.get_num_threads()

    def with_threads(n_threads: int, call: Call) -> None:
        torch.set_num_threads(n_threads)
        call()

    figures: Figures = {}
    for name, call in _calls(layer).items():
        # The first call with another number of threads also starts them, so the second counts.
        to_one, to_two = (partial(with_threads, n, call) for n in (1, 2))
        calls: dict[str, Call] = {"to one": to_one, "one": call, "to two": to_two, "two": call}
        figures[name.replace(" ", "_")] = layer.time(calls, repeats).ratio("one", "two")
    torch.set_num_threads(threads)
    return figures


def seconds(layer: Layer, repeats: int) -> Figures:
    """Times for the comparison of two commits, by public names, which both should have."""
    calls = {**_calls(layer), "plan": layer.make_plan}
    times = {name: layer.time({name: call}, repeats).median(name) for name, call in calls.items()}
    return {"package": str(Path(vicinal.__file__).parent), **times}


def _calls(layer: Layer) -> dict[str, Call]:
    whole, attention = layer.whole(), layer.attention()
    return {
        "attention forward": attention.forward,
        "attention backward": attention.backward(),
        "block forward": whole.forward,
        "block step": whole.step,
    }
