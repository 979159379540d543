"""Floating-point operations of this back end's ops, for `torch.utils.flop_counter`."""

from collections.abc import Sequence

from torch import Tensor

from ..flop_formulas import PairSlices, register_attention, register_sampling
from .checks import plan_parts


def _find_slices(plan: Sequence[Tensor]) -> PairSlices:
    parts = plan_parts(plan)
    valid = parts.query_tiles.row_groups[0] >= 0
    return PairSlices(parts.starts, parts.stops, parts.point_columns, valid)


register_attention("vicinal_triton", _find_slices)
register_sampling("vicinal_triton")
