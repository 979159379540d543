"""One block beside the obvious way, which gathers and projects the cells around every query."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gather_and_project import GatherAndProjectBlock
from benchmarks.measure import peak_memory
from examples.encoder import EMBED_DIM, HEADS, WINDOWS
from vicinal import FeaturePyramid

TOLERANCE = 1e-4
HEADER = (
    f"{'':34}{'forward':^22}{'training step':^22}\n"
    f"{'':34}{'time':>10}{'memory':>12}{'time':>10}{'memory':>12}"
)


class Cost(NamedTuple):
    """Seconds (median), and bytes at the peak above what the process held before."""

    forward_time: float
    forward_memory: float
    step_time: float
    step_memory: float

    def times(self, factor: float) -> Cost:
        return Cost(*(factor * value for value in self))


def compare(block: nn.Module, tile: FeaturePyramid, canvas: FeaturePyramid) -> None:
    """Prints what a block costs on a tile of the canvas, either way, and on the canvas.

    The whole canvas is too much for gathering and projecting; its cost there is scaled up from the
    tile by the number of queries, to which it is proportional.
    """
    peer = GatherAndProjectBlock(EMBED_DIM, HEADS, neighborhood_sizes=WINDOWS, bias=True)
    peer.load_state_dict(block.state_dict())
    _check_agreement(block, peer, tile)

    print(HEADER)
    print(f"  on a tile of {len(tile):,} points")
    obvious = _cost(peer, tile, repeats=1)
    _print_row("gather and project", obvious)
    ours = _cost(block, tile, repeats=9)
    _print_row("vicinal", ours)
    ratios = [f"{theirs / own:.0f} x" for theirs, own in zip(obvious, ours, strict=True)]
    print(_row("a factor of", ratios))
    print(f"  on the whole canvas, {len(canvas):,} points")
    _print_row("gather and project, scaled up", obvious.times(len(canvas) / len(tile)), about="~")
    _print_row("vicinal", _cost(block, canvas, repeats=3))


def _check_agreement(block: nn.Module, peer: nn.Module, pyramid: FeaturePyramid) -> None:
    arguments = _arguments(pyramid)
    with torch.no_grad():
        difference = float((block(**arguments) - peer(**arguments)).abs().max())
    if difference > TOLERANCE:
        raise AssertionError(f"the two ways differ by {difference:.1e}, more than {TOLERANCE:.0e}")
    print(f"Both ways, same parameters: outputs agree to {difference:.1e}.")


def _arguments(pyramid: FeaturePyramid) -> dict[str, Tensor]:
    """What both blocks take: every point a query, and the map as a sparse tensor."""
    return {
        "query": pyramid.values.detach().requires_grad_(),
        "query_spatial_positions": pyramid.positions(),
        "query_batch_offsets": pyramid.batch_offsets(),
        "stacked_feature_maps": pyramid.to_coo().detach().requires_grad_(),
        "level_spatial_shapes": torch.tensor(pyramid.level_shapes),
        "query_level_indices": pyramid.levels,
    }


def _cost(block: nn.Module, pyramid: FeaturePyramid, repeats: int) -> Cost:
    arguments = _arguments(pyramid)
    inputs = [arguments["query"], arguments["stacked_feature_maps"], *block.parameters()]

    @torch.no_grad()
    def forward() -> None:
        block(**arguments)

    def step() -> None:
        out = block(**arguments)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return Cost(*_time_and_memory(forward, repeats), *_time_and_memory(step, repeats))


def _time_and_memory(fn: Callable[[], None], repeats: int) -> tuple[float, int]:
    """The median of ``repeats`` runs and the peak of the first: the obvious way is slow."""
    seconds = []

    def timed() -> None:
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)

    memory = peak_memory(timed)
    for _ in range(repeats - 1):
        timed()
    return statistics.median(seconds), memory


def _print_row(name: str, cost: Cost, about: str = "") -> None:
    def seconds(value: float) -> str:
        return f"{about}{value:.3f} s" if value < 1 else f"{about}{value:.1f} s"

    def size(value: float) -> str:
        return f"{about}{value / 1e9:.1f} GB" if value >= 1e9 else f"{about}{value / 1e6:.0f} MB"

    print(_row(name, [write(v) for write, v in zip((seconds, size) * 2, cost, strict=True)]))


def _row(name: str, columns: list[str]) -> str:
    widths = (10, 12, 10, 12)
    return f"    {name:30}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
