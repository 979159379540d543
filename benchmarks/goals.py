"""The measures that the library is held to: what each must reach, and what it aims for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.outcome import Outcome


class Goal(NamedTuple):
    label: str
    case: str
    """The case, or the beginning of its name where several are tried in turn."""
    figure: str
    bar: float
    aim: float
    more_is_better: bool = False

    def reaches(self, value: float, mark: float) -> bool:
        return value >= mark if self.more_is_better else value <= mark


GOALS = (
    Goal("block forward / GEMM floor", "compute/tracks", "forward_over_floor", 1.8, 1.4),
    Goal("training step / GEMM floor", "compute/tracks", "step_over_floor", 1.8, 1.4),
    Goal("attention flop/s / those of a linear map", "compute/tracks",
         "attention_rate_over_gemm", 0.5, 0.8, True),
    Goal("plan / attention forward", "compute/tracks", "plan_over_attention", 0.4, 0.2),
    Goal("memory of a training step / query tensor", "memory/tracks", "peak_over_query", 20, 12),
    Goal("forward, time per query, largest / smallest", "scaling/time", "forward_growth", 1.3, 1.1),
    Goal("training step, time per query, the same", "scaling/time", "step_growth", 1.3, 1.1),
    Goal("forward, the same, freed memory kept", "keeping/scaling/time",
         "forward_growth", 1.3, 1.1),
    Goal("training step, the same, freed memory kept", "keeping/scaling/time",
         "step_growth", 1.3, 1.1),
    Goal("block forward, faster than gathering", "peers/gathering/",
         "forward_over_vicinal", 150, 150, True),
    Goal("training step, faster than gathering", "peers/gathering/",
         "step_over_vicinal", 100, 100, True),
    # The pairs with and without the projections that both ways share, which set a limit to what
    # the attention can gain.
    Goal("attention forward, faster than pairs", "peers/pairs/",
         "forward_over_vicinal", 30, 30, True),
    Goal("attention in training, faster than pairs", "peers/pairs/",
         "step_over_vicinal", 30, 30, True),
    Goal("block forward, faster than pairs", "peers/pairs-block/",
         "forward_over_vicinal", 30, 30, True),
    Goal("training step, faster than pairs", "peers/pairs-block/",
         "step_over_vicinal", 30, 30, True),
    Goal("three dimensions: forward / GEMM floor", "compute/volume",
         "forward_over_floor", 2.5, 1.8),
    Goal("two threads: attention forward, faster", "threads", "attention_forward", 1.8, 1.8, True),
    Goal("two threads: attention backward, faster", "threads",
         "attention_backward", 1.8, 1.8, True),
)  # fmt: skip


def outcome_of(goal: Goal, outcomes: Mapping[str, Outcome]) -> tuple[str, Outcome]:
    """The case that answers and its outcome: of those tried, the largest that has figures."""
    tried = {name: outcomes[name] for name in outcomes if name.startswith(goal.case)}
    able = [name for name in tried if tried[name].find(goal.figure) is not None]
    if able:
        name = max(able, key=lambda name: tried[name].find("points") or 0)
        return name, tried[name]
    return next(iter(tried.items()), (goal.case, Outcome(problem="not run")))
