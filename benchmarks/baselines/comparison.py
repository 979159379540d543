"""A baseline and the library at the same work: whether they agree, time and memory."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.measure import Work, peak_memory
from benchmarks.outcome import DisagreementError, Figures

Results = Sequence[Tensor | None]

ROUNDINGS = 256
"""How far apart outputs and gradients of inputs may be, in units of the dtype's rounding (2^-24 in
float32) of the largest value. Measured: 20. Angles of the rotation reach some hundred radians,
which makes some results uncertain by some hundred roundings. Errors are millions."""
ROUNDINGS_OF_HALVES = 32
"""The same for outputs in bfloat16, where 256 make up the largest value. Baselines that add in
bfloat16 are off by several."""
ROUNDINGS_OF_SUMS = 2**15
"""The same for gradients of parameters. Those of the rotary frequencies add up to a million
products with positions in the hundreds, of either sign: gathering is off by 10,000."""


def check_agreement(
    name: str, actual: Results, expected: Results, tolerance: float = ROUNDINGS
) -> float:
    """The largest difference between two lists of results, in roundings of the largest value."""
    worst = 0.0
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        if one is None or other is None or one.shape != other.shape:
            raise DisagreementError(f"{name} {index}: does not have the shape of vicinal's")
        one, other = one.detach(), other.detach()
        rounding = other.abs().max() * torch.finfo(other.dtype).eps / 2
        apart = float((one - other).abs().max() / rounding)
        if not apart <= tolerance:
            raise DisagreementError(
                f"{name} {index}: {apart:.3g} roundings from vicinal's, more than {tolerance:g}"
            )
        worst = max(worst, apart)
    return worst


@dataclass(frozen=True)
class Comparison:
    baseline: Work
    vicinal: Work
    same: bool = True
    """Whether both compute the same thing, which is then checked."""
    extra: Figures = field(default_factory=dict)
    """Figures of its preparation; ``no_step``: why the baseline is not measured in training."""

    def check(self, name: str) -> float:
        """The difference of outputs, and in float32 of gradients, in roundings.

        Gradients of parameters are checked, but not part of the result.
        """
        baseline, vicinal = self.baseline.forward(), self.vicinal.forward()
        single = vicinal[0].dtype == torch.float32
        tolerance = ROUNDINGS if single else ROUNDINGS_OF_HALVES
        apart = check_agreement(f"{name}, output", baseline, vicinal, tolerance)
        if single and "no_step" not in self.extra:
            # From random gradients: those of a plain sum cancel in many places.
            grads, expected = self.baseline.step(_random_like), self.vicinal.step(_random_like)
            n = len(self.vicinal.inputs)
            apart = max(apart, check_agreement(f"{name}, gradient", grads[:n], expected[:n]))
            of_weights = f"{name}, gradient of a parameter"
            check_agreement(of_weights, grads[n:], expected[n:], ROUNDINGS_OF_SUMS)
        return apart


def against(
    layer: Layer, label: str, prepare: Callable[[Layer], Comparison], repeats: int
) -> Figures:
    """Time and memory of both, after a check that they agree."""
    comparison = prepare(layer)
    figures = layer.figures | comparison.extra
    if comparison.same:
        figures["roundings_apart"] = comparison.check(label)
    baseline, vicinal = comparison.baseline, comparison.vicinal
    kinds = ("forward",) if "no_step" in comparison.extra else ("forward", "step")
    for kind in kinds:
        other, own = getattr(baseline, kind), getattr(vicinal, kind)
        # The second of two own calls counts: the first works on memory that the baseline, often
        # gigabytes, has just given back to the system, and that has to be cleared.
        timings = layer.time({"baseline": other, "first": own, "vicinal": own}, repeats)
        figures |= {
            f"{kind}_seconds": timings.median("baseline"),
            f"{kind}_seconds_vicinal": timings.median("vicinal"),
            f"{kind}_over_vicinal": timings.ratio("baseline", "vicinal"),
        }
        if "mask_seconds" in figures:
            figures[f"{kind}_with_mask_over_vicinal_with_plan"] = _prepared_ratio(figures, kind)
    if layer.device.type == "cuda" or sys.platform == "linux":
        calls = [getattr(work, kinds[-1]) for work in (baseline, vicinal)]
        peak, peak_vicinal = (peak_memory(call, layer.device).of_call for call in calls)
        figures |= {"peak_bytes": peak, "peak_bytes_vicinal": peak_vicinal}
        figures["memory_over_vicinal"] = peak / max(peak_vicinal, 1)
    return figures


def _prepared_ratio(figures: Figures, kind: str) -> float:
    """The baseline with the time for its mask, over the library with the time for its plan."""
    baseline, own = (
        sum(float(figures[f"{name}_seconds{suffix}"]) for name, suffix in parts)
        for parts in ((("mask", ""), (kind, "")), (("plan", ""), (kind, "_vicinal")))
    )
    return baseline / own


def _random_like(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
