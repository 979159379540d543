"""How much the study measures: in full, or quickly, to see that it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.layer import Layer
from benchmarks.scenes import Scene, handwriting, particle_tracks, tracks_in_volume


class Size(NamedTuple):
    tracks: int
    """Of the scene of the measures, on 512 x 512 cells."""
    few_tracks: int
    """Of the same, for peers that manage no more."""
    fewer_tracks: tuple[int, ...]
    """Tracks to try in turn where ``tracks`` take more memory than there is."""
    volume: tuple[int, int]
    """Tracks, and cells a side, of the scene in three dimensions."""
    digits: int
    """On 512 x 512 cells."""
    growing: tuple[int, ...]
    """Tracks of the scenes of one density, which should make about 10,000 to 640,000 points."""
    million: int
    """Tracks that make a million points, at the same density."""
    repeats: int
    """Rounds of calls that take turns; a third where a peer takes minutes."""

    @property
    def few_repeats(self) -> int:
        return math.ceil(self.repeats / 3)


SIZES = {
    "full": Size(100, 10, (75, 50, 25), (120, 160), 200, (28, 94, 356, 1410), 2200, 9),
    "quick": Size(4, 1, (3, 2), (4, 40), 8, (2, 4, 8), 16, 2),
}


def of_density(n_tracks: int) -> Scene:
    """Tracks as dense as 100 on 512 x 512 cells, on a canvas that grows with their number."""
    return particle_tracks(n_tracks, size=round(512 * math.sqrt(n_tracks / 100)))


def scenes(size: Size) -> dict[str, Callable[[], Layer]]:
    """The layers of the study by name, each made when asked for."""
    return {
        "tracks": lambda: Layer(particle_tracks(size.tracks)),
        "volume": lambda: Layer(tracks_in_volume(size.volume[0], size=size.volume[1])),
        "handwriting": lambda: Layer(handwriting(size.digits)),
    }
