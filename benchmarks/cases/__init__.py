"""What the study measures: one function per idea, run by name, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.cases import (
    compute,
    contests,
    memory,
    precision,
    scaling,
    speed,
    stages,
    threads,
)
from benchmarks.layer import Layer
from benchmarks.outcome import Figures
from benchmarks.peers import PEERS
from benchmarks.scenes import particle_tracks
from benchmarks.sizes import Size, of_density, scenes

Case = Callable[[], Figures]

BLOCK_PEERS = ("gathering", "pairs-block")
OPTIONAL = ("million",)
"""Cases that run only when asked for."""


def all_cases(size: Size) -> dict[str, Case]:
    """By name, in the order they run: peers first, as they show whether results agree."""
    return {
        **_contests(size),
        **_of_scenes(size),
        **_scaling(size),
        "threads": lambda: threads.two_over_one(_tracks(size.tracks), size.repeats),
        "precision": lambda: precision.against_float64(_tracks(size.few_tracks)),
        "speed": lambda: speed.seconds(_tracks(size.tracks), size.repeats),
        "million": lambda: scaling.one_step(Layer(of_density(size.million))),
    }


def contest_names(size: Size) -> list[list[str]]:
    """The contests, each as names to try in turn until one has the memory it takes."""
    few = [[f"peers/{peer}/{size.few_tracks}"] for peer in PEERS if peer != "pairs-block"]
    large = [
        [f"peers/{peer}/{size.tracks}"] for peer in PEERS if peer not in (*BLOCK_PEERS, "pairs")
    ]
    ladders = [
        [f"peers/{peer}/{tracks}" for tracks in (size.tracks, *size.fewer_tracks)]
        for peer in ("pairs", "pairs-block")
    ]
    return few + ladders + large


def _contests(size: Size) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for ladder in contest_names(size):
        for name in ladder:
            _, peer, tracks = name.split("/")
            layer = partial(_tracks, int(tracks))
            cases[name] = partial(contests.seconds, PEERS[peer], layer, size.few_repeats)
            for side in ("theirs", "ours"):
                cases[f"{name}/memory-{side}"] = partial(
                    contests.peak_bytes, PEERS[peer], layer, side
                )
    return cases


def _of_scenes(size: Size) -> dict[str, Case]:
    cases: dict[str, Case] = {}
    for name, layer in scenes(size).items():
        cases[f"compute/{name}"] = partial(_with, layer, compute.over_floor, size.repeats)
        cases[f"stages/{name}"] = partial(_with, layer, stages.seconds, size.repeats)
        cases[f"memory/{name}"] = partial(_with, layer, memory.of_training_step)
    return cases


def _scaling(size: Size) -> dict[str, Case]:
    cases: dict[str, Case] = {
        "scaling": lambda: scaling.seconds(
            [Layer(of_density(n)) for n in size.growing], size.few_repeats
        )
    }
    for n_tracks in size.growing:
        cases[f"scaling/memory/{n_tracks}"] = partial(
            _with, partial(_of_density, n_tracks), memory.of_training_step
        )
    return cases


def _tracks(n_tracks: int) -> Layer:
    return Layer(particle_tracks(n_tracks))


def _of_density(n_tracks: int) -> Layer:
    return Layer(of_density(n_tracks))


def _with(
    layer: Callable[[], Layer], measure: Callable[..., Figures], *arguments: object
) -> Figures:
    return measure(layer(), *arguments)
