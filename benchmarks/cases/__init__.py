"""What a study measures: every case has a name and gives figures, in a process of its own."""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.baselines import BASELINES
from benchmarks.baselines.comparison import against
from benchmarks.cases import block, tuning, windows
from benchmarks.layer import Layer
from benchmarks.outcome import RETAINED, Figures
from benchmarks.scenes import handwriting, of_density, particle_tracks, tracks_in_volume
from vicinal._utils.types import BackendName

Tracks = tuple[int, int]
"""Their number, and the cells a side of their image."""


class Settings(NamedTuple):
    device: str  # where cases run: cpu or cuda
    backend: BackendName | None
    dtype: str
    tracks: Tracks  # the main scene
    fewer_tracks: tuple[int, ...]  # on the same image, in turn, where a baseline lacks memory
    few_tracks: Tracks  # the scene on which all baselines run and agree
    repeats: int  # rounds of timed calls; a third where calls take long or there are many
    million: Tracks = (2200, 2401)  # a million points, as dense as 100 tracks on 512 x 512 cells
    volume: Tracks = (120, 160)
    digits: int = 200
    growing: tuple[int, ...] = (28, 94, 356, 1410)  # tracks that make 10,000 to 640,000 points
    tiles: tuple[int, ...] = ()  # rows of a tile, each tried with these blocks and warps
    blocks: tuple[int, ...] = ()
    warps: tuple[int, ...] = ()
    embed_dim: int = 256
    n_heads: int = 8

    @property
    def all_tracks(self) -> list[Tracks]:
        return [self.tracks, *((n_tracks, self.tracks[1]) for n_tracks in self.fewer_tracks)]

    @property
    def few_repeats(self) -> int:
        return math.ceil(self.repeats / 3)

    def layer(self, tracks: Tracks | None = None, dtype: str | None = None) -> Layer:
        """A block on ``tracks``, by default the main scene."""
        n_tracks, size = tracks or self.tracks
        scene = particle_tracks(n_tracks, size=size)
        kind = getattr(torch, dtype or self.dtype), torch.device(self.device)
        return Layer(scene, self.embed_dim, self.n_heads, *kind, self.backend)


SETTINGS = {
    "cpu": {
        "full": Settings("cpu", None, "float32", (100, 512), (75, 50, 25), (10, 512), 9),
        "quick": Settings(
            "cpu", None, "float32", (4, 512), (3, 2), (1, 512), 2,
            million=(16, 205), volume=(4, 40), digits=8, growing=(2, 4, 8),
        ),
    },
    "cuda": {
        "full": Settings(
            "cuda", "triton", "bfloat16", (420, 2048), (280, 210, 140, 100, 70, 35, 10), (10, 512),
            25, tiles=(32, 16, 64), blocks=(32, 64, 16, 128), warps=(1, 2, 4),
        ),
        # Kernels may be interpreted, which takes a second for a dozen points.
        "quick": Settings(
            "cuda", "triton", "float32", (1, 6), (), (1, 6), 1, million=(1, 6),
            tiles=(32,), blocks=(16, 32), warps=(1,), embed_dim=16, n_heads=1,
        ),
    },
}  # fmt: skip

Case = Callable[[], Figures]
Ladder = dict[str, Case]
"""Cases by name, of which the next runs only where one lacks memory."""

MILLION, SPEED = "million", "speed"  # the study runs them only where asked to
AGREEING_ON_GPU = ("gathering", "pairs", "pairs-block", "edges", "flex", "flex-sorted")
BASELINES_ON_GPU = (*AGREEING_ON_GPU, "deformable-sparse")


def all_cases(settings: Settings) -> dict[str, Case]:
    return {name: case for ladder in ladders(settings) for name, case in ladder.items()}


def ladders(settings: Settings) -> list[Ladder]:
    """All cases, in the order in which they run: those that check results come first."""
    return _on_gpu(settings) if settings.backend == "triton" else _on_cpu(settings)


def _on_cpu(s: Settings) -> list[Ladder]:
    few = [_ladder(s, name, [s.few_tracks]) for name in BASELINES if name != "pairs-block"]
    many = [_ladder(s, name, s.all_tracks) for name in BASELINES if name != "gathering"]
    scenes: dict[str, Callable[[], Layer]] = {
        "tracks": s.layer,
        "volume": lambda: Layer(tracks_in_volume(s.volume[0], size=s.volume[1])),
        "handwriting": lambda: Layer(handwriting(s.digits)),
    }
    cases: dict[str, Case] = {
        "scaling/time": lambda: block.scaling([_grown(n) for n in s.growing], s.few_repeats),
        "threads": partial(_on, s.layer, block.two_threads, s.repeats),
    }
    for name, make in scenes.items():
        cases[f"compute/{name}"] = partial(_on, make, block.compute, s.repeats)
        cases[f"stages/{name}"] = partial(_on, make, block.stages, s.repeats)
        cases[f"memory/{name}"] = partial(_on, make, block.memory)
    cases["plan-check"] = partial(_on, s.layer, block.plan_check, s.repeats)
    cases["windows/shapes"] = partial(_on, scenes["volume"], windows.shapes, s.few_repeats)
    cases["windows/bias"] = partial(_on, s.layer, windows.bias, s.repeats)
    cases["windows/plan"] = partial(_on, s.layer, windows.plan, s.repeats)
    for n in s.growing:
        cases[f"scaling/memory/{n}"] = partial(_on, partial(_grown, n), block.memory)
    cases |= _common(s)
    # Once more where malloc keeps freed memory.
    known = cases | {name: case for ladder in few for name, case in ladder.items()}
    baselines = [f"baselines/{name}/{s.few_tracks[0]}" for name in ("gathering", "pairs")]
    retained = [*baselines, "compute/tracks", "scaling/time"]
    cases = {RETAINED + name: known[name] for name in retained} | cases
    return few + many + [{name: case} for name, case in cases.items()]


def _on_gpu(s: Settings) -> list[Ladder]:
    few = partial(s.layer, s.few_tracks, "float32")  # in which gradients are checked, too
    cases: dict[str, Case] = {
        f"agreement/{name}": partial(_on, few, against, *BASELINES[name], 1)
        for name in AGREEING_ON_GPU
    }
    for measure in (
        block.attention, block.plan, block.kernels, block.compute, block.replayed, block.stages,
    ):  # fmt: skip
        cases[f"{measure.__name__}/tracks"] = partial(_on, s.layer, measure, s.repeats)
    cases |= _common(s)
    # A case per tile and block, so that a study that ends early has the figures of some.
    tuned: dict[str, Case] = {
        f"sweep/{rows}x{block}": partial(
            _on, s.layer, tuning.sweep, s.few_repeats, (block,), s.warps, rows
        )
        for block, rows in itertools.product(s.blocks, s.tiles)
    }
    compared = [_ladder(s, name, s.all_tracks) for name in BASELINES_ON_GPU]
    first, last = ([{name: case} for name, case in part.items()] for part in (cases, tuned))
    return first + compared + last


def _common(s: Settings) -> dict[str, Case]:
    return {
        SPEED: partial(_on, s.layer, block.seconds, s.repeats),
        MILLION: partial(_on, partial(s.layer, s.million), block.training_step, s.few_repeats),
    }


def _ladder(s: Settings, name: str, scenes: Sequence[Tracks]) -> Ladder:
    return {
        f"baselines/{name}/{tracks[0]}": partial(
            _on, partial(s.layer, tracks), against, *BASELINES[name], s.few_repeats
        )
        for tracks in scenes
    }


def _grown(n_tracks: int) -> Layer:
    return Layer(of_density(n_tracks))


def _on(make: Callable[[], Layer], measure: Callable[..., Figures], *arguments: object) -> Figures:
    return measure(make(), *arguments)
