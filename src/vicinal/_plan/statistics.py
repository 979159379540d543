"""How many neighbors queries have on each level."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.constants import widest_dtype
from ..backends.types import PlanTensors


class NeighborStatistics(NamedTuple):
    """How many neighbors queries have on each level. `NeighborhoodPlan.neighbors_per_level` finds
    it.

    Numbers are points per query. A copy of a point beyond the seam of a periodic axis counts as a
    neighbor of its own. All tensors are ``[L]``, and zero where there are no queries.

    Attributes:
        mean: float64 (float32 on Apple's GPUs).
        median: int64, the least number that at least half of the queries do not exceed.
        percentile_99: int64, the least number that at least 99 % of the queries do not exceed.
        largest: int64.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, plan_neighborhoods

        points = torch.tensor([[0, 3, 4], [0, 3, 5], [0, 9, 9]])  # image, row, column
        pyramid = FeaturePyramid.from_points(points, torch.ones(3, 8), (16, 16), 1, strides=(1, 2))
        offsets = pyramid.batch_offsets()
        plan = plan_neighborhoods(pyramid.positions(), offsets, pyramid, neighborhood_sizes=[3, 3])
        statistics = plan.neighbors_per_level()
        assert statistics.largest.tolist() == [2, 1]
        print(statistics.mean)  # tensor([1.6000, 1.0000], dtype=torch.float64)
        ```
    """

    mean: Tensor
    median: Tensor
    percentile_99: Tensor
    largest: Tensor

    def describe(self) -> str:
        """Returns the numbers in one line, as the plan's repr shows them."""
        means = ", ".join(f"{mean:.1f}" for mean in self.mean.tolist())
        names = ("median", self.median), ("99 %", self.percentile_99), ("largest", self.largest)
        counts = [f"{name} {', '.join(map(str, count.tolist()))}" for name, count in names]
        return "; ".join((f"mean {means}", *counts))


def count_neighbors(tensors: PlanTensors) -> Tensor:
    """The number of neighbors of each query on each level, int64 ``[L, N]``."""
    slices, n_slices = tensors.query_slices, tensors.slices_per_level()
    parts = zip(slices.starts.split(n_slices, 1), slices.stops.split(n_slices, 1), strict=True)
    # In int32, which holds the number of points: several times as fast.
    counts = [(stops - starts).sum(1, dtype=torch.int32) for starts, stops in parts]
    return torch.stack(counts).long()


def summarize(counts: Tensor) -> NeighborStatistics:
    """The statistics of what `count_neighbors` returns."""
    (n_levels, n), dtype = counts.shape, widest_dtype(counts.device)
    if n == 0:
        zero = counts.new_zeros(n_levels)
        return NeighborStatistics(zero.to(dtype), zero, zero, zero)
    return NeighborStatistics(
        counts.to(dtype).mean(1),
        counts.kthvalue(-(-n // 2)).values,
        counts.kthvalue(-(-99 * n // 100)).values,
        counts.amax(1),
    )
