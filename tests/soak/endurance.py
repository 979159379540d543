"""Many runs of a block: the same bits every time, and no memory that grows."""

import statistics

import torch
from problems import resident_bytes
from torch import Tensor

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock

MOST_GROWTH = 8 << 20  # bytes, of the resident memory from the second quarter of calls to the last


def random_pyramid(n: int, seed: int) -> FeaturePyramid:
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randint(0, size, (n, 1), generator=generator) for size in (2, 64, 64)]
    values = torch.randn(n, 32, generator=generator)
    return FeaturePyramid.from_points(torch.cat(cells, 1), values, (64, 64), 2)


def step(block: SparseNeighborhoodAttentionBlock, pyramid: FeaturePyramid) -> list[Tensor]:
    """Output and gradients of a training step with dropout and a background."""
    torch.manual_seed(0)
    background = torch.randn(2, pyramid.n_levels, 32, requires_grad=True)
    values = pyramid.values.detach().requires_grad_()
    block.zero_grad()
    out = block.encode(pyramid.with_values(values), background_embedding=background).values
    out.square().sum().backward()
    grads = [x.grad for x in (values, background, *block.parameters())]
    return [out.detach(), *(grad.clone() for grad in grads if grad is not None)]


def check_bits(runs: int) -> str:
    """Runs one training step again and again; raises SystemExit where bits differ."""
    block = SparseNeighborhoodAttentionBlock(32, 4, dropout=0.1, relative_bias=True)
    pyramid = random_pyramid(500, seed=0)
    expected = step(block, pyramid)
    for run in range(1, runs):
        found = step(block, pyramid)
        if not all(map(torch.equal, found, expected)):
            raise SystemExit(f"run {run} has other bits than the first")
    return f"{runs} equal runs on {torch.get_num_threads()} threads"


def check_growth(calls: int) -> str:
    """Runs training steps of varying sizes; raises SystemExit if memory grows."""
    block = SparseNeighborhoodAttentionBlock(32, 4)
    resident = []
    for call in range(calls):
        step(block, random_pyramid(1 + call * 7919 % 800, seed=call))
        resident.append(resident_bytes("VmRSS"))
    quarter = calls // 4
    before, after = (statistics.median(part) for part in (resident[quarter : 2 * quarter],
                                                          resident[-quarter:]))  # fmt: skip
    if after - before > MOST_GROWTH:
        raise SystemExit(f"resident memory grew from {before:.0f} to {after:.0f} bytes")
    return f"{calls} calls, resident memory {(after - before) / 2**20:+.1f} MiB"
