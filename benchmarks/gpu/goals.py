"""The measures that the library is held to on a GPU, set for an H200."""

from __future__ import annotations

from benchmarks.goals import Goal

GOALS = (
    Goal("attention forward / copying q, k, v and out", "attention/tracks",
         "forward_over_copying", 6, 3),
    Goal("attention backward / its forward", "attention/tracks", "backward_over_forward", 4, 3),
    Goal("plan, all that a forward needs / attention forward", "plan/tracks",
         "plan_of_forward_over_attention", 1.5, 0.7),
    Goal("plan, all that a training step needs / the same", "plan/tracks",
         "plan_of_step_over_attention", 1.5, 0.7),
    Goal("training step, planning included / GEMM floor", "compute/tracks",
         "step_over_floor", 3, 2),
    Goal("training step, plan given / GEMM floor", "compute/tracks",
         "planned_step_over_floor", 3, 2),
    # Points as stored and along a curve: either may suit FlexAttention better.
    Goal("attention in training, faster than FlexAttention", "peers/flex/",
         "step_over_vicinal", 5, 10, True),
    Goal("the same, points along a curve", "peers/flex-sorted/", "step_over_vicinal", 5, 10, True),
    Goal("block forward, faster than gathering", "peers/gathering/",
         "forward_over_vicinal", 100, 100, True),
    Goal("training step, faster than gathering", "peers/gathering/",
         "step_over_vicinal", 100, 100, True),
    Goal("memory of a training step, gathering / vicinal", "peers/gathering/",
         "memory_over_vicinal", 40, 40, True),
    Goal("a million queries, training step, GiB in all", "million", "peak_gib", 24, 12),
)  # fmt: skip
