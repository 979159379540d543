"""Floating-point operations of the projections, for `torch.utils.flop_counter`."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import projection_ops  # noqa: F401 - defines the ops


@register_flop_formula(torch.ops.vicinal.project)
def _(x: list[int], weights: list[list[int]], *_: Any, **__: Any) -> int:
    return sum(2 * x[0] * math.prod(weight) for weight in weights)


@register_flop_formula(torch.ops.vicinal.project_backward)
def _(
    grads: list[list[int]], x: list[int], weights: Any, norm: Any, eps: float,
    needs_x: bool, needs_weights: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return sum(2 * math.prod(grad) * x[1] for grad in grads) * (needs_x + needs_weights)
