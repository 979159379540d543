"""Whether two ways to compute the same thing do.

Differences are counted in roundings: the largest one over the largest value, in units of the
dtype's rounding (2^-24 in float32). What is wrong is off by millions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.outcome import DisagreementError

ROUNDINGS = 256
"""How far apart outputs and gradients of inputs may be. Seen are 20; angles of the rotation reach
some hundred radians, and so some results are known to some hundred roundings."""

ROUNDINGS_OF_HALVES = 32
"""The same for outputs in bfloat16, where 256 make up the largest value. Peers that add up in it
are off by several."""

ROUNDINGS_OF_SUMS = 2**15
"""The same for gradients of parameters. Those of the rotary frequencies sum up to a million
products with positions in the hundreds, of either sign: gathering is off by 10,000 there."""


def check_agreement(
    name: str,
    theirs: Sequence[Tensor | None],
    ours: Sequence[Tensor | None],
    tolerance: float = ROUNDINGS,
) -> float:
    """The largest difference between two lists of results, in roundings.

    Raises:
        DisagreementError: names the peer, for more than ``tolerance``, other shapes, or NaN.
    """
    worst = 0.0
    for index, (actual, expected) in enumerate(zip(theirs, ours, strict=True)):
        if actual is None or expected is None or actual.shape != expected.shape:
            raise DisagreementError(f"{name} {index}: not of the kind that vicinal's is")
        apart = _roundings_apart(actual.detach(), expected.detach())
        if not apart <= tolerance:
            raise DisagreementError(
                f"{name} {index}: {apart:.3g} roundings from vicinal's, more than {tolerance:g}"
            )
        worst = max(worst, apart)
    return worst


def _roundings_apart(actual: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max() * torch.finfo(expected.dtype).eps / 2
    return float((actual - expected).abs().max() / scale)
