"""Encodes a stream of events slice by slice: ``python -m examples.stream_events``.

An event camera reports time, row, column and polarity wherever the brightness changes. Here all
windows are causal along time, so new events never change what was computed for the past. Every
slice is encoded once. Of the past, the stream keeps what windows still reach: events for the stem,
and each layer's inputs, as language models keep keys and values. So the cost of a slice does not
grow with the past. Takes a few seconds on two CPU cores.
"""

import argparse
import time
from typing import Any

import torch
from torch import Tensor

from vicinal import FeaturePyramid, QueryPlacement, SparseNeighborhoodAttentionBlock, Window
from vicinal.detr import Encoder, EncoderLayer, FeedForward, PointStem

# Axes: time, row, column. The length of a slice must be a multiple of all strides in time: only
# where a slice ends are the coarse cells in it complete.
SENSOR, STEPS, SLICE, EMBED = (48, 64), 128, 8, 32
STRIDES = ((1, 1, 1), (2, 2, 2), (4, 4, 4))
SIZES = ((4, 5, 5), (3, 5, 5), (2, 5, 5))  # of the windows
STEM_STRIDES, STEM_SIZES = ((1, 1, 1), (2, 2, 2)), ((4, 3, 3), (4, 3, 3))


def make_model(n_layers: int = 3) -> tuple[PointStem, Encoder]:
    windows, stem_windows = (
        [Window(size, causal=(True, False, False)) for size in sizes]
        for sizes in (SIZES, STEM_SIZES)
    )
    stem = PointStem(1, EMBED, STRIDES, stem_windows, STEM_STRIDES, position_dim=3)
    blocks = [
        SparseNeighborhoodAttentionBlock(EMBED, 4, len(STRIDES), windows, position_dim=3)
        for _ in range(n_layers)
    ]
    return stem, Encoder([EncoderLayer(block, FeedForward(EMBED)) for block in blocks], EMBED)


def reach_in_time() -> int:
    """The steps before a slice that its windows reach, rounded up to whole coarse cells.

    When a query's cell ends, the last complete cell of a level ends at most a cell earlier;
    ``size - 1`` cells come before that one.
    """
    levels = [*zip(SIZES, STRIDES, strict=True), *zip(STEM_SIZES, STEM_STRIDES, strict=True)]
    reach = max(size[0] * stride[0] for size, stride in levels)
    coarsest = max(stride[0] for _, stride in levels)
    return -(-reach // coarsest) * coarsest


class EventStream:
    """Encodes slice after slice, with the results of ``encoder(stem(...))`` for all at once.

    Time counts from the first step that is kept, so that a stream may be endless: attention depends
    on differences of positions alone.
    """

    def __init__(self, stem: PointStem, encoder: Encoder, slice_steps: int = SLICE) -> None:
        self.stem, self.encoder = stem, encoder
        self.slice_steps, self.reach = slice_steps, reach_in_time()
        like = encoder.norm.weight.detach()
        self.events = torch.empty(0, 4, dtype=torch.int64)  # image, time, row, column
        self.polarities = like.new_empty(0, 1)
        self.points = torch.empty(0, 5, dtype=torch.int64)  # image, cell, level
        self.inputs = [like.new_empty(0, EMBED) for _ in encoder.layers]  # of the points

    @torch.no_grad()
    def step(self, events: Tensor, polarities: Tensor) -> FeaturePyramid:
        """Encodes the next slice: events ``[n, 4]`` with times from its beginning on, polarities
        ``[n, 1]``. In the result it begins at step ``reach``.
        """
        self.events = torch.cat((self.events, move(events, self.reach)))
        self.polarities = torch.cat((self.polarities, polarities))
        shape = (self.reach + self.slice_steps, *SENSOR)
        embedded = self.stem(self.events, self.polarities, shape, batch_size=1)
        # The earlier points were embedded when all of their windows were there.
        new = select(embedded, times(embedded.coordinates) >= self.reach)
        encoded = self._encode(new)
        self._forget()
        return encoded

    def _encode(self, new: FeaturePyramid) -> FeaturePyramid:
        """Lets the new points attend, in every layer, to one another and to those that are kept."""
        self.points = torch.cat((self.points, new.coordinates))
        queries, plan, x = QueryPlacement.of_points(new).arguments(), None, new.values
        layers: Any = self.encoder.layers
        for index, layer in enumerate(layers):
            self.inputs[index] = torch.cat((self.inputs[index], x))
            near = FeaturePyramid(self.inputs[index], self.points, new.level_shapes, batch_size=1)
            plan = plan or layer.attention.make_plan(**queries, pyramid=near)
            x = layer.attention(x, **queries, stacked_feature_maps=near, plan=plan)
            x = layer.feed_forward(x)
        return new.with_values(self.encoder.norm(x))

    def _forget(self) -> None:
        """Drops what the windows of the next slice do not reach."""
        kept = self.events[:, 1] >= self.slice_steps
        self.events = move(self.events[kept], -self.slice_steps)
        self.polarities = self.polarities[kept]
        kept = times(self.points) >= self.slice_steps
        self.points = move(self.points[kept], -self.slice_steps)
        self.inputs = [inputs[kept] for inputs in self.inputs]


def time_strides(points: Tensor) -> Tensor | int:
    """Steps per cell of events ``[n, 4]``, or of a pyramid's points ``[n, 5]``."""
    return 1 if points.shape[1] == 4 else torch.tensor(STRIDES)[points[:, -1], 0]


def times(points: Tensor) -> Tensor:
    """The steps at which the cells of ``points`` begin."""
    return points[:, 1] * time_strides(points)


def move(points: Tensor, steps: int) -> Tensor:
    cells = points[:, 1] + steps // time_strides(points)
    return torch.cat((points[:, :1], cells[:, None], points[:, 2:]), 1)


def select(pyramid: FeaturePyramid, rows: Tensor) -> FeaturePyramid:
    values, coordinates = pyramid.values[rows], pyramid.coordinates[rows]
    return FeaturePyramid(values, coordinates, pyramid.level_shapes, pyramid.batch_size)


def moving_disks(n_disks: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Events ``[n, 4]`` and polarities ``[n, 1]`` at the edges of disks that swing."""
    generator = torch.Generator().manual_seed(seed)
    start, speed, phase = torch.rand(3, n_disks, 2, generator=generator)
    swing = torch.sin(0.02 * (1 + 2 * speed) * torch.arange(STEPS + 1)[:, None, None] + 6 * phase)
    centers = (0.2 + 0.6 * start + 0.3 * swing) * torch.tensor(SENSOR)  # [steps + 1, disks, 2]
    pixels = torch.cartesian_prod(*map(torch.arange, SENSOR))
    bright = torch.stack([(torch.cdist(pixels.float(), c) < 8).any(1) for c in centers]).float()
    change = bright.diff(dim=0)  # [steps, pixels]
    step, pixel = change.nonzero(as_tuple=True)
    events = torch.cat((torch.zeros(len(step), 1).long(), step[:, None], pixels[pixel]), 1)
    return events, change[step, pixel][:, None]


def compare(stem: PointStem, encoder: Encoder, events: Tensor, polarities: Tensor) -> float:
    """The largest difference between slices and the whole; prints it and the time by slice."""
    with torch.no_grad():
        whole = encoder(stem(events, polarities, (STEPS, *SENSOR), batch_size=1))
    print(f"{len(events):,} events in {polarities.dtype}")
    print("slice  new points  kept points     time  difference")
    stream, differences = EventStream(stem, encoder), []
    for first in range(0, STEPS, SLICE):
        rows = (events[:, 1] >= first) & (events[:, 1] < first + SLICE)
        started = time.perf_counter()
        part = stream.step(move(events[rows], -first), polarities[rows])
        ms = 1000 * (time.perf_counter() - started)
        begins = times(whole.coordinates)
        expected = select(whole, (begins >= first) & (begins < first + SLICE))
        assert torch.equal(move(part.coordinates, first - stream.reach), expected.coordinates)
        differences.append(float((part.values - expected.values).abs().max()))
        counts = f"{first // SLICE:5}{len(part):12,}{len(stream.points):13,}"
        print(f"{counts}{ms:6.0f} ms{differences[-1]:12.1e}")
    print(f"largest difference to the whole at once: {max(differences):.1e}\n")
    return max(differences)


def main() -> None:
    name = "python -m examples.stream_events"
    argparse.ArgumentParser(prog=name, description=__doc__).parse_args()
    torch.set_num_threads(1)  # a slice is too small for more
    torch.manual_seed(0)
    events, polarities = moving_disks()
    stem, encoder = make_model()
    assert compare(stem, encoder, events, polarities) <= 1e-5
    assert compare(stem.double(), encoder.double(), events, polarities.double()) <= 1e-12


if __name__ == "__main__":
    main()
