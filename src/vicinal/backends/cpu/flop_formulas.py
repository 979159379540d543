"""Floating-point operations of this back end's ops, for `torch.utils.flop_counter`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..flop_formulas import PairSlices, register_attention, register_sampling
from . import projection_ops  # noqa: F401 - defines the ops


def _find_slices(plan: Sequence[Tensor]) -> PairSlices:
    """From the list that `cpu.attend` makes."""
    _, starts, stops, _, query_batch, _, point_columns, *_ = plan
    return PairSlices(starts, stops, point_columns, query_batch >= 0)


register_attention("vicinal", _find_slices)
register_sampling("vicinal")


@register_flop_formula(torch.ops.vicinal.project)
def _(x: list[int], weights: list[list[int]], *_: Any, **__: Any) -> int:
    return sum(2 * x[0] * math.prod(weight) for weight in weights)


@register_flop_formula(torch.ops.vicinal.project_backward)
def _(
    grads: list[list[int]], x: list[int], weights: Any, norm: Any, eps: float,
    needs_x: bool, needs_weights: bool, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return sum(2 * math.prod(grad) * x[1] for grad in grads) * (needs_x + needs_weights)
