"""Traces of the profiler name the stages of a block, and naming them costs next to nothing."""

import time

import torch
from torch.profiler import ProfilerActivity, profile

from vicinal import (
    FeaturePyramid,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
    plan_neighborhoods,
)
from vicinal._utils.profiling import stage


def make_pyramid(n_points: int) -> FeaturePyramid:
    points = torch.nn.functional.pad(torch.randint(0, 32, (n_points, 2)), (1, 0))
    return FeaturePyramid.from_points(points, torch.randn(n_points, 8), (32, 32), 1, strides=(1, 2))


def names(module: torch.nn.Module, pyramid: FeaturePyramid) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        module.encode(pyramid).values.sum().backward()  # type: ignore[operator]
    return {event.key for event in trace.key_averages()}


def test_stages_of_the_block_have_names() -> None:
    block = SparseNeighborhoodAttentionBlock(8, 2, 2, (3, 5))
    found = names(block, make_pyramid(100))
    stages = "neighborhood_attention", "neighborhood_attention_backward", "rotate", "find_slices"
    assert {f"vicinal::{name}" for name in ("plan_neighborhoods", *stages)} <= found


def test_the_index_of_deformable_attention_has_a_name() -> None:
    module = SparseDeformableAttention(8, 2, n_levels=2)
    assert "vicinal::index_cells" in names(module, make_pyramid(100))


def test_names_cost_less_than_a_percent_of_a_small_plan() -> None:
    pyramid = make_pyramid(20)
    arguments = pyramid.positions(), pyramid.batch_offsets(), pyramid, (3, 5)

    def fastest(n: int, repeats: int, named: bool) -> float:
        """Seconds of a plan or of a name."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(n):
                if named:
                    with stage("name"):
                        pass
                else:
                    plan_neighborhoods(*arguments)
            times.append((time.perf_counter() - start) / n)
        return min(times)

    assert fastest(200, 10, named=True) < 0.01 * fastest(3, 10, named=False)
