"""How much the study on a GPU measures: in full, or as little as a dry run on the CPU can bear."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.layer import EMBED_DIM, HEADS, Layer
from benchmarks.scenes import particle_tracks

Tracks = tuple[int, int]
"""Their number, and the cells a side of their image."""


class Size(NamedTuple):
    scene: Tracks
    """Of the measures."""
    fewer_tracks: tuple[int, ...]
    """Tracks on the same image to try in turn where a peer lacks memory for all."""
    checked: Tracks
    """Of the check that peers agree, in float32."""
    million: Tracks
    embed_dim: int
    heads: int
    dtype: str
    object_queries: tuple[int, ...]
    """Numbers of them, among the points of the scene."""
    tiles: tuple[int, ...]
    """Rows of a tile, to be tried with each of these blocks and warps."""
    blocks: tuple[int, ...]
    warps: tuple[int, ...]
    repeats: int
    """Rounds of calls that take turns."""
    few_repeats: int
    """The same where a call takes long or there are many."""


SIZES = {
    "full": Size(
        scene=(420, 2048),
        fewer_tracks=(280, 210, 140, 100, 70, 35, 10),
        checked=(10, 512),
        million=(2200, 2401),
        embed_dim=EMBED_DIM,
        heads=HEADS,
        dtype="bfloat16",
        object_queries=(300, 900),
        tiles=(16, 32, 64),
        blocks=(16, 32, 64, 128),
        warps=(1, 2, 4),
        repeats=25,
        few_repeats=7,
    ),
    # Kernels are interpreted, which takes a second for a dozen points.
    "quick": Size(
        scene=(1, 12),
        fewer_tracks=(),
        checked=(1, 12),
        million=(2, 4),
        embed_dim=16,
        heads=1,
        dtype="float32",
        object_queries=(2,),
        tiles=(32,),
        blocks=(16, 32),
        warps=(1,),
        repeats=1,
        few_repeats=1,
    ),
}


def make_layer(
    tracks: Tracks, size: Size, device: torch.device, dtype: torch.dtype | None = None
) -> Layer:
    """A block on ``tracks``, in the size's own dtype or another, computed by Triton's kernels."""
    return Layer(
        particle_tracks(tracks[0], size=tracks[1]),
        embed_dim=size.embed_dim,
        heads=size.heads,
        dtype=getattr(torch, size.dtype) if dtype is None else dtype,
        device=device,
        backend="triton",
    )
