"""What a second thread brings."""

from __future__ import annotations

import torch

from benchmarks.layer import Layer
from benchmarks.machine import usable_cores
from benchmarks.measure import Call, take_turns
from benchmarks.outcome import Figures, Unable


def two_over_one(layer: Layer, repeats: int) -> Figures:
    """How many times faster two threads are than one.

    Raises:
        Unable: there is one core.
    """
    if usable_cores() < 2:
        raise Unable("two threads need two cores, and there is one")
    whole, attention = layer.whole(), layer.attention()
    calls: dict[str, Call] = {
        "attention_forward": attention.forward,
        "attention_backward": attention.backward(),
        "block_forward": whole.forward,
        "block_step": whole.step,
    }
    threads = torch.get_num_threads()
    figures = {name: _speed_up(call, repeats) for name, call in calls.items()}
    torch.set_num_threads(threads)
    return dict(figures)


def _speed_up(call: Call, repeats: int) -> float:
    def with_threads(threads: int) -> Call:
        def run() -> None:
            torch.set_num_threads(threads)
            call()

        return run

    # The first call with another number of threads also starts them, so the second one counts.
    turns = take_turns(with_threads(1), call, with_threads(2), call, repeats=repeats)
    return turns.ratio(1, 3)
