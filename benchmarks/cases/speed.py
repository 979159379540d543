"""Plain seconds, for the comparison of two commits.

Public names alone, which both should have.
"""

from __future__ import annotations

from pathlib import Path

import vicinal
from benchmarks.layer import Layer
from benchmarks.measure import Call, median_time
from benchmarks.outcome import Figures


def seconds(layer: Layer, repeats: int) -> Figures:
    whole, attention = layer.whole(), layer.attention()
    calls: dict[str, Call] = {
        "block forward": whole.forward,
        "training step": whole.step,
        "attention forward": attention.forward,
        "attention backward": attention.backward(),
        "plan": layer.make_plan,
    }
    figures: Figures = {"package": str(Path(vicinal.__file__).parent)}
    return figures | {name: median_time(call, repeats) for name, call in calls.items()}
