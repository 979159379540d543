"""The block and its attention against what they cannot do without."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.layer import Layer
from benchmarks.measure import TakeTurns, take_turns
from benchmarks.outcome import Figures
from benchmarks.work import Work

ATTENTION_FLOPS = 4  # per pair and channel: a product and a sum for the logit, and for the value
LINEAR_FLOPS = 2  # per weight and row


def over_floor(layer: Layer, repeats: int, take_turns: TakeTurns = take_turns) -> Figures:
    """Times over the GEMM floor, the attention's rate over that of a product, and the plan."""
    whole, floor, attention, linear = (
        layer.whole(),
        layer.floor(),
        layer.attention(),
        _linear(layer),
    )
    forward = take_turns(whole.forward, floor.forward, repeats=repeats)
    step = take_turns(whole.step, floor.step, repeats=repeats)
    rate = take_turns(linear.forward, attention.forward, repeats=repeats)
    plan = take_turns(layer.make_plan, attention.forward, repeats=repeats)
    attention_flops = ATTENTION_FLOPS * layer.n_pairs * layer.block.embed_dim
    linear_flops = LINEAR_FLOPS * len(layer) * linear.inputs[1].numel()
    return {
        "points": len(layer),
        "neighbors": layer.n_pairs / len(layer),
        "forward_seconds": forward.median(0),
        "forward_floor_seconds": forward.median(1),
        "forward_over_floor": forward.ratio(0, 1),
        "step_seconds": step.median(0),
        "step_floor_seconds": step.median(1),
        "step_over_floor": step.ratio(0, 1),
        "attention_seconds": rate.median(1),
        "attention_rate_over_gemm": attention_flops / linear_flops * rate.ratio(0, 1),
        "plan_seconds": plan.median(0),
        "plan_over_attention": plan.ratio(0, 1),
    }


def _linear(layer: Layer) -> Work:
    """A linear map from E to 3E of all queries."""
    embed_dim = layer.block.embed_dim
    weight = torch.randn(3 * embed_dim, embed_dim).to(layer.x)
    return Work(F.linear, (layer.x, weight))
