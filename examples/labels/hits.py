"""Simulated hits of charged particles on the layers of a cylindrical detector.

A particle of transverse momentum ``p`` moves on a helix: in a magnetic field ``B`` along the
cylinder its path, seen along the field, is a circle of radius ``p / (0.3 B)`` (GeV, tesla, meters).
It leaves a hit on each layer that it crosses. Noise is spread evenly over the layers.

The grid has an axis for layers, one for the azimuth, which is periodic, and one for the
pseudorapidity, along which a particle from the center hardly moves. The label of a hit is 0 for
noise, else the band of its particle's momentum, 1 the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from examples.labels.scenes import LabeledPoints, collate
from examples.training.seeds import derive_seed

RADII = tuple(0.1 + 0.08 * layer for layer in range(12))  # of the layers, in meters
FIELD = 2.0  # tesla
SHAPE = (len(RADII), 2048, 256)  # layers, cells of azimuth, cells of pseudorapidity
MAX_RAPIDITY = 2.0  # the grid spans the pseudorapidities from minus this to this
MOMENTA = (0.3, 5.0)  # GeV: bounds of the transverse momenta, even in their logarithm
BANDS = (0.6, 1.2)  # GeV: between the bands of momenta
ORIGIN_SPREAD = 0.005  # meters: deviation of where particles start, along the cylinder
NOISE_SHARE = 0.1  # of hits
FEWEST = 0.1  # hits of the smallest event, as a share of those of the largest
CLASSES = ("noise", "below 0.6 GeV", "0.6 to 1.2 GeV", "above 1.2 GeV")
NOISE = 0  # the label
CHANNELS = 3


class Events(NamedTuple):
    """The events of a run, generated on demand.

    Attributes:
        n_hits: the largest number of hits of an event.
        seed: of the run.
        same_size: whether all events have about ``n_hits``; else at least a tenth of it.
    """

    n_hits: int
    seed: int
    same_size: bool = False

    def batch(self, numbers: Iterable[int]) -> LabeledPoints:
        """Generates the events with these numbers."""
        return collate(map(self.event, numbers))

    def event(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Cells int64 ``[n, 3]``, values ``[n, 3]`` and labels of the event with this number."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
        share = 1.0
        if not self.same_size:
            share = FEWEST + (1 - FEWEST) * float(torch.rand((), generator=generator))
        return simulate(round(share * self.n_hits), generator)


def simulate(n_hits: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Simulates an event.

    Args:
        n_hits: about how many hits it has, and no more.
        generator: of the random numbers.

    Returns:
        the cells of hits, int64 ``[n, 3]``; the radius in meters and where in its cell a hit is
        along azimuth and pseudorapidity, from -1/2 to 1/2, ``[n, 3]``; and labels int64 ``[n]``.
    """
    n_noise = round(NOISE_SHARE * n_hits)
    tracks = (n_hits - n_noise) // len(RADII)
    layer, azimuth, rapidity, momentum = _crossings(tracks, generator)
    labels = 1 + torch.bucketize(momentum, torch.tensor(BANDS))

    layer = torch.cat((layer, torch.randint(len(RADII), (n_noise,), generator=generator)))
    draws = torch.rand(2, n_noise, generator=generator)
    azimuth = torch.cat((azimuth, 2 * math.pi * draws[0])) % (2 * math.pi)
    rapidity = torch.cat((rapidity, MAX_RAPIDITY * (2 * draws[1] - 1)))
    labels = torch.cat((labels, labels.new_zeros(n_noise)))

    inside = rapidity.abs() < MAX_RAPIDITY
    layer, azimuth, rapidity = layer[inside], azimuth[inside], rapidity[inside]
    places = torch.stack(
        (azimuth / (2 * math.pi) * SHAPE[1], (rapidity / MAX_RAPIDITY + 1) / 2 * SHAPE[2]), 1
    )
    cells = places.long() % torch.tensor(SHAPE[1:])
    values = torch.cat((torch.tensor(RADII)[layer, None], places - places.floor() - 0.5), 1)
    return torch.cat((layer[:, None], cells), 1), values, labels[inside]


def _crossings(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Layer, azimuth, pseudorapidity and momentum of each crossing of ``n`` particles' paths."""
    draws = torch.rand(4, n, 1, generator=generator)
    low, high = map(math.log, MOMENTA)
    momentum = (low + (high - low) * draws[0]).exp()
    charge = 2.0 * (draws[1] < 0.5) - 1
    direction = 2 * math.pi * draws[2]
    slope = (MAX_RAPIDITY * (2 * draws[3] - 1)).sinh()  # along the cylinder, per meter across it
    start = ORIGIN_SPREAD * torch.randn(n, 1, generator=generator)

    radius, curvature = torch.tensor(RADII), momentum / (0.3 * FIELD)  # radius of the circle
    turn = (radius / (2 * curvature)).clamp(max=1).asin()  # half of the angle along the circle
    along = start + slope * 2 * curvature * turn
    crossed = radius < 2 * curvature
    layer = torch.arange(len(RADII)).expand_as(crossed)
    azimuth = direction - charge * turn
    rapidity = (along / radius).asinh()
    every = layer, azimuth, rapidity, momentum.expand_as(crossed)
    layers, azimuths, rapidities, momenta = (x[crossed] for x in every)
    return layers, azimuths, rapidities, momenta
