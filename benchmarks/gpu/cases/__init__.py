"""What the study on a GPU measures: one function per idea, run by name, each in its own process."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, stages
from benchmarks.gpu.cases import attention, block, contests, tuning
from benchmarks.gpu.meter import clock_of
from benchmarks.gpu.sizes import Size, Tracks, make_layer
from benchmarks.gpu.tiling import plan_of_forward, plan_of_step
from benchmarks.layer import Layer
from benchmarks.outcome import Figures
from benchmarks.peers import PEERS

GPU_PEERS = ("gathering", "pairs", "pairs-block", "flex", "flex-sorted")


def all_cases(size: Size, device: torch.device) -> dict[str, Case]:
    """By name: all that the study may run, checks first."""
    layer = partial(make_layer, size.scene, size, device)
    cases: dict[str, Case] = {
        f"agreement/{peer}": partial(_agreement, peer, size, device) for peer in GPU_PEERS
    }
    cases |= {
        "attention/tracks": lambda: attention.over_copying(layer(), size.repeats),
        "plan/tracks": lambda: attention.plan_over_attention(layer(), size.repeats),
        "compute/tracks": lambda: block.over_floor(layer(), size.repeats),
        "replayed/tracks": lambda: block.replayed_over_floor(layer(), size.repeats),
        "stages/tracks": lambda: _stages(layer(), size.repeats),
        "million": lambda: block.training_step(
            make_layer(size.million, size, device), size.few_repeats
        ),
    }
    for name in (name for ladder in contest_names(size) for name in ladder):
        cases[name] = partial(_contest, name, size, device)
    for n_queries in size.object_queries:
        cases[f"decoder/{n_queries}"] = partial(_decoder, n_queries, size, device)
    for tile in size.tiles:
        cases[f"sweep/{tile}"] = partial(_sweep, tile, size, device)
    return cases


def contest_names(size: Size) -> list[list[str]]:
    """The contests, each as names to try in turn until one has the memory that it takes."""
    sizes = (size.scene[0], *size.fewer_tracks)
    return [[f"peers/{peer}/{tracks}" for tracks in sizes] for peer in GPU_PEERS]


def study_names(size: Size, device: torch.device) -> list[list[str]]:
    """All that the study runs, in order: what stands together is tried in turn."""
    contests = contest_names(size)
    in_contests = {name for ladder in contests for name in ladder}
    alone = [[name] for name in all_cases(size, device) if name not in in_contests]
    first_tuning = next(i for i, (name,) in enumerate(alone) if name.startswith("decoder/"))
    return alone[:first_tuning] + contests + alone[first_tuning:]


def _stages(layer: Layer, repeats: int) -> Figures:
    plans = partial(plan_of_forward, layer), partial(plan_of_step, layer)
    return stages.seconds(layer, repeats, clock_of(layer.x.device), plans)


def _agreement(peer: str, size: Size, device: torch.device) -> Figures:
    layer = make_layer(size.checked, size, device, torch.float32)
    return contests.agreement(PEERS[peer], layer)


def _contest(name: str, size: Size, device: torch.device) -> Figures:
    _, peer, n_tracks = name.split("/")
    tracks: Tracks = int(n_tracks), size.scene[1]
    return contests.against(PEERS[peer], make_layer(tracks, size, device), size.few_repeats)


def _decoder(n_queries: int, size: Size, device: torch.device) -> Figures:
    return tuning.scattered(make_layer(size.scene, size, device), n_queries, size.repeats)


def _sweep(tile: int, size: Size, device: torch.device) -> Figures:
    layer = make_layer(size.scene, size, device)
    return tuning.sweep(layer, tile, size.blocks, size.warps, size.few_repeats)
