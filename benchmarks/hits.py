"""Times an encoder on one event of a particle detector: ``python -m benchmarks.hits``.

The event is one of `examples.labels.hits`. `PointStem` makes a pyramid of it, and every point of
the pyramid is a query of each layer of the encoder, once with the finest level alone, whose points
are the hits, and once with all levels. Times are medians, and include the plan.
"""

import argparse
from typing import NamedTuple

import torch

from benchmarks.measure import time_calls
from benchmarks.report import table
from examples.labels.hits import CHANNELS, SHAPE, Events
from examples.labels.tasks import TASKS, TEST_SEED
from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import Encoder, EncoderLayer, FeedForward, PointStem

EMBED_DIM, HEADS, LAYERS, DIMENSIONS = 128, 8, 4, 3


class Result(NamedTuple):
    """What is timed, and the seconds of a forward pass and of a training step."""

    hits: int
    levels: int
    points: int
    neighbors: float  # per query
    forward: float
    step: float


def make_block(n_levels: int) -> SparseNeighborhoodAttentionBlock:
    """With the windows of the network that labels hits."""
    windows = TASKS["hits"].net["neighborhood_sizes"][:n_levels]
    return SparseNeighborhoodAttentionBlock(
        EMBED_DIM, HEADS, n_levels, windows, position_dim=DIMENSIONS
    )


def make_encoder(n_levels: int) -> Encoder:
    layers = [
        EncoderLayer(make_block(n_levels), FeedForward(EMBED_DIM, 2 * EMBED_DIM))
        for _ in range(LAYERS)
    ]
    return Encoder(layers, EMBED_DIM)


def make_pyramid(n_hits: int, n_levels: int) -> FeaturePyramid:
    """One event, embedded by a stem."""
    task = TASKS["hits"]
    batch = Events(n_hits, TEST_SEED, same_size=True).batch([0])
    strides = task.net["strides"][:n_levels]
    windows = task.net["stem_window_sizes"], task.net["stem_window_strides"]
    stem = PointStem(CHANNELS, EMBED_DIM, strides, *windows, DIMENSIONS)
    with torch.no_grad():
        return stem(batch.coordinates, batch.values, SHAPE, 1, periodic_axes=task.periodic_axes)


def run(n_hits: int, n_levels: int, repeats: int) -> Result:
    """Times the encoder on one event."""
    torch.manual_seed(0)
    pyramid, encoder = make_pyramid(n_hits, n_levels), make_encoder(n_levels)

    def step() -> None:
        encoder.zero_grad()
        encoder(pyramid).values.sum().backward()

    forward = torch.no_grad()(lambda: encoder(pyramid))
    times = time_calls({"forward": forward, "step": step}, repeats, torch.device("cpu"))
    queries = pyramid.positions(), pyramid.batch_offsets(), pyramid
    neighbors = make_block(n_levels).make_plan(*queries).counts().double().mean().item()
    seconds = times.median("forward"), times.median("step")
    return Result(n_hits, n_levels, len(pyramid.values), neighbors, *seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hits")
    parser.add_argument("--hits", type=int, nargs="*", default=[12_000, 60_000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for n_hits in arguments.hits:
        for n_levels in 1, len(TASKS["hits"].net["strides"]):
            x = run(n_hits, n_levels, arguments.repeats)
            sizes = f"{x.hits:,}", str(x.levels), f"{x.points:,}", f"{x.neighbors:.1f}"
            rows.append((*sizes, f"{x.forward:.2f}", f"{x.step:.2f}"))
    print(table(("hits", "levels", "points", "neighbors", "forward, s", "step, s"), rows))


if __name__ == "__main__":
    main()
