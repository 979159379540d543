"""The block on the scene of the measures, against what it cannot do without and the obvious way.

`python -m benchmarks.block` prints a table; all figures come from one run.
"""

import argparse
import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vicinal
from benchmarks.gather_and_project import GatherAndProjectBlock
from benchmarks.measure import peak_memory, time_ratio
from benchmarks.scenes import particle_tracks

EMBED_DIM, HEADS, WINDOWS = 256, 8, (3, 5, 7, 9)
SEED = 1  # of the scene; 100 tracks make 43,033 points

Forward = Callable[[Tensor], Tensor]


class Encoder:
    """One block on one scene, every point a query."""

    def __init__(self, n_tracks: int, dtype: torch.dtype = torch.float32) -> None:
        scene = particle_tracks(n_tracks, seed=SEED)
        torch.manual_seed(0)
        self.x = torch.randn(len(scene.coordinates), EMBED_DIM).to(dtype)
        self.pyramid = vicinal.FeaturePyramid(self.x, scene.coordinates, scene.level_shapes, 1)
        self.positions = self.pyramid.positions()
        self.offsets = torch.tensor([0, len(self.x)])
        self.block = vicinal.SparseNeighborhoodAttentionBlock(EMBED_DIM, HEADS).to(dtype)

    def block_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x, self.positions, self.offsets, self.pyramid.with_values(x))
        return out

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """The block's dense projections alone: the floor."""
        parts = (self.block.q_in_proj, self.block.kv_proj, self.block.out_proj)
        return tuple(F.linear(x, part.weight) for part in parts)

    def on_sparse_map(self, block: nn.Module) -> Forward:
        """`block` on a sparse COO map, which both it and its peer understand."""
        shapes = torch.tensor(self.pyramid.level_shapes)

        def forward(x: Tensor) -> Tensor:
            maps = self.pyramid.with_values(x).to_coo()
            out: Tensor = block(x, self.positions, self.offsets, maps, shapes)
            return out

        return forward


def inference(forward: Callable[[Tensor], object], x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            forward(x)

    return run


def training_step(
    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor, module: nn.Module
) -> Callable[[], None]:
    """Forward and backward to the input and all parameters; gradients start from nothing."""

    def run() -> None:
        leaf = x.detach().requires_grad_()
        module.zero_grad(set_to_none=True)
        out = forward(leaf)
        parts = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(parts, [torch.ones_like(part) for part in parts])

    return run


def against_floor(tracks: int, repeats: int) -> None:
    scene = Encoder(tracks)
    plan = vicinal.plan_neighborhoods(scene.positions, scene.offsets, scene.pyramid, WINDOWS)
    print(f"\n{tracks} tracks: {plan}")
    step = training_step(scene.block_forward, scene.x, scene.block)
    floor_step = training_step(scene.projections, scene.x, scene.block)
    forward = inference(scene.block_forward, scene.x)
    floor = inference(scene.projections, scene.x)
    row("block forward over the GEMM floor", time_ratio(forward, floor, repeats))
    row("training step over the GEMM floor", time_ratio(step, floor_step, repeats))
    step()
    size = scene.x.numel() * scene.x.element_size()
    row("peak memory of a training step, in query tensors", peak_memory(step) / size)


def against_gathering(tracks: int, repeats: int) -> None:
    scene = Encoder(tracks)
    peer = GatherAndProjectBlock(EMBED_DIM, HEADS)
    peer.load_state_dict(scene.block.state_dict())
    theirs, ours = scene.on_sparse_map(peer), scene.on_sparse_map(scene.block)
    with torch.no_grad():
        difference = (theirs(scene.x) - ours(scene.x)).abs().max()
    print(f"\n{tracks} tracks, {len(scene.x)} points, beside the gather-and-project way")
    row("largest difference between the two outputs", float(difference))
    steps = [
        training_step(ours, scene.x, scene.block),
        training_step(theirs, scene.x, peer),
    ]
    inferences = [inference(ours, scene.x), inference(theirs, scene.x)]
    row("forward, times faster", time_ratio(inferences[1], inferences[0], repeats))
    row("training step, times faster", time_ratio(steps[1], steps[0], repeats))
    ours_peak, their_peak = (peak_memory(step) for step in steps)
    row("training step, fraction of the memory", ours_peak / their_peak)
    print(f"  ({ours_peak / 2**20:.0f} MiB instead of {their_peak / 2**20:.0f} MiB)")


def precision(tracks: int) -> None:
    """Errors against float64, over those of the reference back end in the same precision."""
    exact = Encoder(tracks, torch.float64)
    expected = exact.block_forward(exact.x).detach()
    print(f"\n{tracks} tracks, error against float64 over that of plain PyTorch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        errors = {}
        for backend in ("cpu", "reference"):
            rounded = copy.copy(exact)
            rounded.block = copy.deepcopy(exact.block).to(dtype)
            rounded.block.backend = rounded.block.pos_encoding.backend = backend
            out = rounded.block_forward(exact.x.to(dtype)).detach().double()
            errors[backend] = float((out - expected).norm() / expected.norm())
        row(f"{dtype} ({errors['cpu']:.1e})", errors["cpu"] / errors["reference"])


def row(label: str, value: float) -> None:
    print(f"  {label:52} {value:10.3g}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tracks", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    against_floor(arguments.tracks, arguments.repeats)
    against_gathering(10, 3)
    precision(10)


if __name__ == "__main__":
    main()
