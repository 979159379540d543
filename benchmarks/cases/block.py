"""The block and its attention: time over their floors, memory, scaling and threads."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

import vicinal
from benchmarks.layer import Layer
from benchmarks.machine import usable_cores
from benchmarks.measure import Call, Work, as_cuda_graph, peak_memory, time_calls
from benchmarks.outcome import CaseSkipped, Figures

ATTENTION_FLOPS = 4  # per pair and channel: a product and a sum for the logit, and for the value
LINEAR_FLOPS = 2  # per weight and row


def over_base(layer: Layer, calls: dict[str, Call], base: str, repeats: int) -> Figures:
    """Seconds of all calls, and of each over those of the last, which figures call ``base``."""
    timings = time_calls(*calls.values(), repeats=repeats, device=layer.device)
    names, last = list(calls), len(calls) - 1
    figures: Figures = {f"{name}_seconds": timings.median(i) for i, name in enumerate(names)}
    return figures | {f"{names[i]}_over_{base}": timings.ratio(i, last) for i in range(last)}


def compute(layer: Layer, repeats: int) -> Figures:
    """The block over its GEMM floor, the attention's flop/s over those of a product, the plan."""
    attention, embed_dim = layer.attention(), layer.block.embed_dim
    weight = torch.randn(3 * embed_dim, embed_dim).to(layer.x)
    linear = Work(F.linear, (layer.x, weight))
    both = (linear.forward, attention.forward)
    rate = time_calls(*both, repeats=repeats, device=layer.device).ratio(0, 1)
    flops = ATTENTION_FLOPS * layer.n_pairs * embed_dim
    rate *= flops / (LINEAR_FLOPS * len(layer) * weight.numel())
    figures = layer.figures | {"attention_rate_over_gemm": rate}
    figures |= _over_floor(layer, repeats, ("forward", "step"), lambda call: call)
    calls = {"plan": layer.make_plan, "attention": attention.forward}
    return figures | over_base(layer, calls, "attention", repeats)


def replayed(layer: Layer, repeats: int) -> Figures:
    """A training step over its floor without the time of launches: both as CUDA graphs."""
    return layer.figures | _over_floor(
        layer, repeats, ("step",), lambda call: as_cuda_graph(call, layer.device)
    )


def _over_floor(
    layer: Layer, repeats: int, kinds: Sequence[str], wrap: Callable[[Call], Call]
) -> Figures:
    figures: Figures = {}
    for kind in kinds:
        whole, planned, floor = layer.whole(), layer.planned(), layer.floor()
        works = {kind: whole, f"planned_{kind}": planned, f"{kind}_floor": floor}
        calls = {name: wrap(getattr(work, kind)) for name, work in works.items()}
        figures |= over_base(layer, calls, "floor", repeats)
    return figures


def attention(layer: Layer, repeats: int) -> Figures:
    """Times of both passes, the forward's over that of copying q, k, v and out once."""
    attention = layer.attention()
    sources = (*attention.inputs, *attention.forward())
    targets = [torch.empty_like(x) for x in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    calls = (copy, attention.forward, attention.backward())
    timings = time_calls(*calls, repeats=repeats, device=layer.device)
    copied_bytes = sum(2 * x.nbytes for x in sources)  # read and written
    return layer.figures | {
        "copying_seconds": timings.median(0),
        "copied_bytes_per_second": copied_bytes / timings.median(0),
        "forward_seconds": timings.median(1),
        "backward_seconds": timings.median(2),
        "forward_over_copying": timings.ratio(1, 0),
        "backward_over_forward": timings.ratio(2, 1),
    }


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
        figures |= over_base(layer, some, "attention", repeats)
    return figures


def memory(layer: Layer) -> Figures:
    """Of a training step; to be measured in a process that has done nothing else."""
    peak = peak_memory(layer.whole().step, layer.device).of_call
    return layer.figures | {"peak_bytes": peak, "peak_over_query": peak / layer.x.nbytes}


def training_step(layer: Layer, repeats: int) -> Figures:
    """A step, planning included: its time, and all the memory that is in use meanwhile."""
    step = layer.whole().step
    peak = peak_memory(step, layer.device)
    seconds = time_calls(step, repeats=repeats, device=layer.device).median(0)
    figures: Figures = {"points": len(layer), "step_seconds": seconds}
    return figures | {
        "peak_gib": peak.total / 2**30,
        "peak_over_query": peak.of_call / layer.x.nbytes,
    }


def scaling(layers: Sequence[Layer], repeats: int) -> Figures:
    """Time per query as scenes of one density grow, from small to large, and of the GEMM floor.

    A growth is the largest scene's time per query over the smallest's.
    """
    figures: Figures = {}
    for index, layer in enumerate(layers):
        figures |= {f"{name}_{index}": value for name, value in layer.figures.items()}
    points = len(layers[0]) / len(layers[-1])
    for kind in ("forward", "step"):
        calls = [getattr(layer.whole(), kind) for layer in layers]
        floor = [getattr(layer.floor(), kind) for layer in (layers[0], layers[-1])]
        blocks, floors = (
            time_calls(*some, repeats=repeats, device=layers[0].device) for some in (calls, floor)
        )
        figures |= {f"{kind}_seconds_{i}": blocks.median(i) for i in range(len(calls))}
        figures[f"{kind}_growth"] = points * blocks.ratio(len(calls) - 1, 0)
        figures[f"floor_{kind}_growth"] = points * floors.ratio(1, 0)
    return figures


def two_threads(layer: Layer, repeats: int) -> Figures:
    """How many times faster two threads are than one."""
    if usable_cores() < 2:
        raise CaseSkipped("two threads need two cores, and there is one")
    threads = torch.get_num_threads()

    def with_threads(n_threads: int, call: Call) -> Call:
        def run() -> None:
            torch.set_num_threads(n_threads)
            call()

        return run

    figures: Figures = {}
    for name, call in _calls(layer).items():
        # The first call with another number of threads also starts them, so the second counts.
        calls = with_threads(1, call), call, with_threads(2, call), call
        timings = time_calls(*calls, repeats=repeats, device=layer.device)
        figures[name.replace(" ", "_")] = timings.ratio(1, 3)
    torch.set_num_threads(threads)
    return figures


def seconds(layer: Layer, repeats: int) -> Figures:
    """Times for the comparison of two commits, by public names, which both should have."""
    calls = {**_calls(layer), "plan": layer.make_plan}
    figures: Figures = {"package": str(Path(vicinal.__file__).parent)}
    for name, call in calls.items():
        figures[name] = time_calls(call, repeats=repeats, device=layer.device).median(0)
    return figures


def _calls(layer: Layer) -> dict[str, Call]:
    whole, attention = layer.whole(), layer.attention()
    return {
        "attention forward": attention.forward,
        "attention backward": attention.backward(),
        "block forward": whole.forward,
        "block step": whole.step,
    }
