"""What a training step would take on many GPUs: a model, not a measurement.

Halo and balance are those of the parts that were counted. Times follow from `Assumptions` and from
a `Network`. All exchanges are exposed: a rank computes nothing while it waits.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.outcome import Figures

GPUS = (8, 16, 32, 64, 128, 256, 512)
MILLIONS = (722_213, 10_000_000)  # points of scenes; the first is cut into parts, see `parts`
EXPOSED = 0.1  # of the computation: the break-even


class Network(NamedTuple):
    """Between GPUs."""

    name: str
    latency: float  # seconds of an exchange with neighbors, launch included
    bandwidth: float  # bytes per second, GPU and direction


NETWORKS = (Network("NVLink", 35e-6, 450e9), Network("InfiniBand", 80e-6, 50e9))


class Assumptions(NamedTuple):
    """Of an encoder in bfloat16 on an H200. Times: docs/performance-gpu.md, in CUDA graphs."""

    layer_seconds: float = 4.9e-3 / 202_890  # of a block's step per point, plan given
    plan_seconds: float = 1.4e-3 / 202_890  # per point
    received_share: float = 0.25  # cost of a halo point, of which keys and values alone are made
    plan_exchanges: int = 7  # of `plan_sharded`
    layers: int = 6
    embed_dim: int = 256
    element_bytes: int = 2


class Parts(NamedTuple):
    """Halo and balance by points per part, from the largest parts to the smallest."""

    points: Sequence[float]
    halo_over_own: Sequence[float]
    imbalance: Sequence[float]

    def halo(self, points: float) -> float:
        """Of a part of so many points, over these; by power laws between the counted parts."""
        return _interpolate(points, self.points, self.halo_over_own, beyond=True)

    def balance(self, points: float) -> float:
        """The largest part over the average one; beyond the counted parts as at their ends."""
        return _interpolate(points, self.points, self.imbalance, beyond=False)


def parts_of(found: dict[str, Figures]) -> Parts | None:
    """What was counted for the tracks; None for fewer than two numbers of parts."""
    cases = [case for name, case in found.items() if name.startswith("parts/tracks/")]
    cases = sorted(cases, key=lambda case: float(case["parts"]))
    if len(cases) < 2:
        return None
    return Parts(
        [float(case["points"]) / float(case["parts"]) for case in cases],
        [float(case["halo_over_own"]) for case in cases],
        [float(case["imbalance_of_pairs"]) for case in cases],
    )


def exposed_share(points: float, parts: Parts, network: Network, given: Assumptions) -> float:
    """Time of the exchanges of a layer over its computation, for a rank of so many points."""
    return layer_exchange(points, parts, network, given) / (points * given.layer_seconds)


def layer_exchange(points: float, parts: Parts, network: Network, given: Assumptions) -> float:
    """Seconds of a layer's two exchanges, of values forward and of gradients backward."""
    sent = points * parts.halo(points) * given.embed_dim * given.element_bytes
    return 2 * (network.latency + sent / network.bandwidth)


def break_even(parts: Parts, network: Network, given: Assumptions) -> float:
    """The points per rank from which exchanges take less than `EXPOSED` of the computation."""
    low, high = 1.0, 1e9
    for _ in range(100):
        middle = math.sqrt(low * high)
        if exposed_share(middle, parts, network, given) > EXPOSED:
            low = middle
        else:
            high = middle
    return high


def step_seconds(points: float, parts: Parts, network: Network, given: Assumptions) -> float:
    """Of a whole training step of the fullest rank, for so many points per rank on average.

    The sum of weights' gradients is not in it, as DDP hides it behind the backward pass.
    """
    cost = parts.balance(points) * (1 + given.received_share * parts.halo(points))
    compute = points * (given.layers * given.layer_seconds + given.plan_seconds) * cost
    exchanges = given.layers * layer_exchange(points, parts, network, given)
    return compute + exchanges + given.plan_exchanges * network.latency


def efficiency(
    n_points: float, n_gpus: int, parts: Parts, network: Network, given: Assumptions
) -> float:
    """Time of one GPU, had it the memory, over that of all, times their number."""
    alone = n_points * (given.layers * given.layer_seconds + given.plan_seconds)
    return alone / n_gpus / step_seconds(n_points / n_gpus, parts, network, given)


def predict(found: dict[str, Figures]) -> dict[str, Figures]:
    """A case per network and scene."""
    parts, given = parts_of(found), Assumptions()
    if parts is None:
        return {}
    cases: dict[str, Figures] = {}
    for network in NETWORKS:
        even = break_even(parts, network, given)
        for n_points in MILLIONS:
            figures: Figures = {"points": n_points, "points_per_gpu_at_break_even": even}
            for n_gpus in GPUS:
                reached = efficiency(n_points, n_gpus, parts, network, given)
                figures[f"efficiency_{n_gpus}"] = reached
            cases[f"model/{network.name}, {n_points:,}"] = figures
    return cases


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float], *, beyond: bool) -> float:
    """``y`` at ``x``, by power laws between the pairs, of which ``xs`` descend."""
    if not beyond:
        x = min(max(x, xs[-1]), xs[0])
    later = [i for i in range(1, len(xs)) if x >= xs[i]]
    i = later[0] if later else len(xs) - 1
    slope = math.log(ys[i] / ys[i - 1]) / math.log(xs[i] / xs[i - 1])
    return float(ys[i] * (x / xs[i]) ** slope)
