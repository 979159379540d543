"""Recursive bisection of space: boxes that hold about as much each."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_WEIGHT_STEPS = (
    2**20
)  # weights are counted in this many steps of the largest, so that sums are exact

# Of what the fuller half has too much, squared, in shares of the weight next to the cut. It makes
# cuts that spare 1 % of the points an exchange worth an imbalance of 4 %.
_COST_OF_EXCESS = 6.0


@dataclass
class _Box:
    """A box of blocks and how many parts it is to be cut into."""

    low: list[int]
    high: list[int]
    n_parts: int


class _Cut(NamedTuple):
    """Where a box may be cut along one axis: before block ``layer``, counted from the box."""

    axis: int
    layer: int
    cost: float


def bisect(
    blocks: Tensor, weights: Tensor | None, n_blocks: list[int], n_parts: int, group: ProcessGroup
) -> list[tuple[list[int], list[int]]]:
    """Cuts a grid of blocks into boxes of about equal weight, recursively (Berger and Bokhari, "A
    partitioning strategy for nonuniform problems on multiprocessors", 1987).

    Every cut goes along the axis where the fewest points lie next to it, since these are what ranks
    exchange. The ranks sum histograms of the boxes along the axes, so that none needs the points of
    others.

    Args:
        blocks: int64 ``[n, P]``, the block of each of the own points.
        weights: ``[n]``, non-negative, or None for equal ones.
        n_blocks: the number of blocks along each axis.
        n_parts: how many boxes there are to be.
        group: all ranks of which call this.

    Returns:
        the first block of each box and the one after its last, by axis. Boxes may be empty.
    """
    amounts = _as_integers(weights, blocks, group)
    boxes = [_Box([0] * len(n_blocks), list(n_blocks), n_parts)]
    box_of_point = blocks.new_zeros(len(blocks))
    while max(box.n_parts for box in boxes) > 1:
        histograms = _histograms(blocks, amounts, box_of_point, boxes, group)
        halves: list[_Box] = []
        low_half = torch.zeros_like(box_of_point)
        is_low = torch.ones_like(box_of_point, dtype=torch.bool)
        for index, (box, histogram) in enumerate(zip(boxes, histograms, strict=True)):
            own = box_of_point == index
            low_half[own] = len(halves)
            if box.n_parts == 1:
                halves.append(box)
                continue
            cut = _best_cut(box, histogram)
            block = box.low[cut.axis] + cut.layer
            is_low[own] = blocks[own, cut.axis] < block
            halves += _halves(box, cut.axis, block)
        box_of_point = low_half + (~is_low).long()
        boxes = halves
    return [(box.low, box.high) for box in boxes]


def _as_integers(weights: Tensor | None, blocks: Tensor, group: ProcessGroup) -> Tensor:
    """``weights`` as int64, which sum to the same numbers on every rank."""
    if weights is None:
        return blocks.new_ones(len(blocks))
    numbers = weights.detach().to(torch.float64)
    largest = numbers.new_zeros(1) if not len(numbers) else numbers.max()[None]
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return (numbers * (_WEIGHT_STEPS / largest.clamp(min=1e-300))).round().long()


def _histograms(
    blocks: Tensor, amounts: Tensor, box_of_point: Tensor, boxes: list[_Box], group: ProcessGroup
) -> list[list[Tensor]]:
    """For each box and axis, the weight in every layer of blocks, of the points of all ranks."""
    sizes = [[high - low for low, high in zip(box.low, box.high, strict=True)] for box in boxes]
    lengths = [length for size in sizes for length in size]
    dim = len(sizes[0])
    device = blocks.device
    first = (torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)).view(-1, dim).to(device)
    lows = torch.tensor([box.low for box in boxes], device=device)
    total = blocks.new_zeros(sum(lengths))
    index = first[box_of_point] + blocks - lows[box_of_point]  # [n, P]
    total.index_add_(0, index.flatten(), amounts[:, None].expand_as(index).flatten())
    dist.all_reduce(total, group=group)
    layers = iter(total.cpu().split(lengths))
    return [[next(layers) for _ in size] for size in sizes]


def _best_cut(box: _Box, histogram: list[Tensor]) -> _Cut:
    cuts = [_cut_along(axis, layers, box) for axis, layers in enumerate(histogram)]
    return min(cuts, key=lambda cut: cut.cost)


def _cut_along(axis: int, layers: Tensor, box: _Box) -> _Cut:
    """The cut along an axis that costs least: the share of the weight that lies next to it, plus
    the square of what the fuller half has too much.
    """
    share = (box.n_parts // 2) / box.n_parts
    total = float(layers.sum())
    if not total:
        return _Cut(axis, round(share * len(layers)), -float(len(layers)))
    low = torch.nn.functional.pad(layers.cumsum(0), (1, 0)) / total
    excess = torch.maximum(low / share, (1 - low) / (1 - share)) - 1
    adjacent = torch.nn.functional.pad(layers, (1, 0)) + torch.nn.functional.pad(layers, (0, 1))
    cost = adjacent / total + _COST_OF_EXCESS * excess.square()
    index = int(cost.argmin())
    return _Cut(axis, index, float(cost[index]))


def _halves(box: _Box, axis: int, block: int) -> list[_Box]:
    """The box below ``block`` along ``axis``, and the one from it on."""
    n_low = box.n_parts // 2
    low = _Box(list(box.low), list(box.high), n_low)
    high = _Box(list(box.low), list(box.high), box.n_parts - n_low)
    low.high[axis] = high.low[axis] = block
    return [low, high]
