"""How much a study measures: in full, or quickly, to check that it runs."""

import math
from typing import NamedTuple

import torch

from benchmarks.layer import EMBED_DIM, HEADS, Layer
from benchmarks.scenes import particle_tracks

Tracks = tuple[int, int]
"""Their number, and the cells a side of their image."""


class Settings(NamedTuple):
    device: str  # where cases run: cpu or cuda
    backend: str | None
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
    embed_dim: int = EMBED_DIM
    n_heads: int = HEADS

    @property
    def few_repeats(self) -> int:
        return math.ceil(self.repeats / 3)

    def layer(self, tracks: Tracks | None = None, dtype: str | None = None) -> Layer:
        """A block on ``tracks``, by default the main scene."""
        n_tracks, size = tracks or self.tracks
        return Layer(
            particle_tracks(n_tracks, size=size),
            embed_dim=self.embed_dim,
            heads=self.n_heads,
            dtype=getattr(torch, dtype or self.dtype),
            device=self.device,
            backend=self.backend,
        )


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
            25, tiles=(16, 32, 64), blocks=(16, 32, 64, 128), warps=(1, 2, 4),
        ),
        # Kernels may be interpreted, which takes a second for a dozen points.
        "quick": Settings(
            "cuda", "triton", "float32", (1, 12), (), (1, 12), 1, million=(1, 12),
            tiles=(32,), blocks=(16, 32), warps=(1,), embed_dim=16, n_heads=1,
        ),
    },
}  # fmt: skip
