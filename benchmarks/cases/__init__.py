"""What the study measures: one function per idea, run by name, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.allocator import KEEPING, keeping
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

AT_FEW_TRACKS = [peer for peer in PEERS if peer != "pairs-block"]
AT_MANY_TRACKS = [peer for peer in PEERS if peer != "gathering"]
MAIN_PEERS = ("gathering", "pairs")  # of the whole block, and of the attention


def all_cases(size: Size) -> dict[str, Case]:
    """By name: all that the study may run."""
    cases: dict[str, Case] = {
        "scaling/time": lambda: scaling.seconds(
            [Layer(of_density(n)) for n in size.growing], size.few_repeats
        ),
        "threads": lambda: threads.two_over_one(_tracks(size.tracks), size.repeats),
        "precision": lambda: precision.against_float64(_tracks(size.few_tracks)),
        "speed": lambda: speed.seconds(_tracks(size.tracks), size.repeats),
        "million": lambda: scaling.one_step(Layer(of_density(size.million))),
    }
    for name, make in scenes(size).items():
        cases[f"compute/{name}"] = partial(_of, make, compute.over_floor, size.repeats)
        cases[f"stages/{name}"] = partial(_of, make, stages.seconds, size.repeats)
        cases[f"memory/{name}"] = partial(_of, make, memory.of_training_step)
    for n in size.growing:
        make = partial(_growing, n)
        cases[f"scaling/memory/{n}"] = partial(_of, make, memory.of_training_step)
    for names in contest_names(size):
        for name in names:
            cases |= _contest(name, size)
    return cases | {KEEPING + name: keeping(cases[name]) for name in _kept_names(size)}


def contest_names(size: Size) -> list[list[str]]:
    """The contests, each as names to try in turn until one has the memory that it takes."""
    few = [[f"peers/{peer}/{size.few_tracks}"] for peer in AT_FEW_TRACKS]
    sizes = (size.tracks, *size.fewer_tracks)
    many = [[f"peers/{peer}/{tracks}" for tracks in sizes] for peer in AT_MANY_TRACKS]
    return few + many


def memory_names(contest: str) -> list[str]:
    """The cases that take the memory of a contest."""
    peer = contest.split("/")[1]
    sides = ("theirs", "ours") if peer in MAIN_PEERS else ("theirs",)
    return [f"memory-of-{contest}/{side}" for side in sides]


def study_names(size: Size) -> list[str]:
    """All that the study runs after the contests; those where freed memory is kept come first."""
    parts = ("compute/", "memory/", "stages/", "scaling/", "threads", "precision")
    kept = [KEEPING + name for name in _kept_names(size)]
    return kept + [name for name in all_cases(size) if name.startswith(parts)]


def _kept_names(size: Size) -> list[str]:
    """The cases that run once more where freed memory is kept, peers first."""
    contests = [f"peers/{peer}/{size.few_tracks}" for peer in MAIN_PEERS]
    return [*contests, "compute/tracks", "scaling/time"]


def _contest(name: str, size: Size) -> dict[str, Case]:
    _, peer, tracks = name.split("/")
    layer = partial(_tracks, int(tracks))
    cases: dict[str, Case] = {name: partial(contests.seconds, PEERS[peer], layer, size.few_repeats)}
    for side in ("theirs", "ours"):
        cases[f"memory-of-{name}/{side}"] = partial(contests.peak_bytes, PEERS[peer], layer, side)
    return cases


def _tracks(n_tracks: int) -> Layer:
    return Layer(particle_tracks(n_tracks))


def _growing(n_tracks: int) -> Layer:
    return Layer(of_density(n_tracks))


def _of(make: Callable[[], Layer], measure: Callable[..., Figures], *arguments: object) -> Figures:
    return measure(make(), *arguments)
