"""How well space divides: halo and balance of many parts, counted in one process."""

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.outcome import Figures
from benchmarks.ranks.settings import RanksSettings
from benchmarks.scenes import STRIDES, lidar_scan, of_density
from vicinal import FeaturePyramid, plan_neighborhoods
from vicinal._plan.keyed_cells import Queries
from vicinal.distributed.bisection import bisect
from vicinal.distributed.groups import as_group
from vicinal.distributed.plan import _within, find_reach
from vicinal.window_shapes import WindowsLike, as_windows, windows_on_axes

ALIGN = STRIDES[-1]
FLOAT32 = 4  # bytes
Box = tuple[list[int], list[int]]


@contextlib.contextmanager
def world_of_one() -> Iterator[None]:
    """A process group of this process alone, for as long as the context lasts."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure_parts(settings: RanksSettings) -> dict[str, Figures]:
    """A case per scene and number of parts."""
    scenes = {"tracks": (lambda: of_density(settings.part_tracks), settings.parts)}
    if settings.lidar_parts:
        scenes["lidar"] = (lidar_scan, settings.lidar_parts)
    found: dict[str, Figures] = {}
    with world_of_one():
        for name, (make, numbers) in scenes.items():
            scene = make()
            shapes, values = scene.level_shapes, torch.zeros(len(scene.coordinates), 1)
            cut = CutScene(FeaturePyramid(values, scene.coordinates, shapes, 1), scene.windows)
            for n in numbers:
                found[f"parts/{name}/{n}"] = cut.figures(n, settings.embed_dim)
    return found


class CutScene:
    """A scene that is cut by the number of neighbors of its points, every point a query.

    Its levels have the strides of the scenes. Cutting needs a process group, see `world_of_one`.
    """

    def __init__(self, pyramid: FeaturePyramid, windows: WindowsLike) -> None:
        self.pyramid, dim = pyramid, pyramid.position_dim
        self.positions = pyramid.positions()
        placed = self.positions, pyramid.batch_offsets(), pyramid
        self.counts = plan_neighborhoods(*placed, windows).counts()
        self.windows = windows_on_axes(as_windows(windows, pyramid.n_levels, dim), dim)
        self.blocks = pyramid.cells * torch.tensor(STRIDES)[pyramid.levels][:, None] // ALIGN
        self.n_blocks = [-(-size // ALIGN) for size in pyramid.level_shapes[0]]

    def boxes(self, n_parts: int) -> list[Box]:
        """The first block of each part and the one after its last, by axis."""
        return bisect(self.blocks, self.counts, self.n_blocks, n_parts, as_group(None))

    def own(self, box: Box) -> Tensor:
        """Bool ``[nnz]``: which points are in a part."""
        low, high = (torch.tensor(corner) for corner in box)
        return ((self.blocks >= low) & (self.blocks < high)).all(1)

    def halo(self, own: Tensor) -> Tensor:
        """Bool ``[nnz]``: which points a part gets from others, all within reach of its windows."""
        offsets = torch.tensor([0, int(own.sum())])
        queries = Queries(self.positions[own], offsets, None)
        reach = find_reach(queries, self.pyramid, self.windows)
        return _within(reach, self.pyramid) & ~own

    def figures(self, n_parts: int, embed_dim: int) -> Figures:
        """Halo, balance and bytes of so many parts."""
        start = time.perf_counter()
        boxes = self.boxes(n_parts)
        seconds = time.perf_counter() - start
        parts = [self.own(box) for box in boxes]
        halos = torch.tensor([int(self.halo(own).sum()) for own in parts])
        points = torch.tensor([int(own.sum()) for own in parts])
        pairs = torch.tensor([int(self.counts[own].sum()) for own in parts])
        return {
            "points": len(self.pyramid),
            "parts": n_parts,
            "halo_over_own": float(halos.sum() / points.sum()),
            "points_of_largest_halo": int(halos.max()),
            "imbalance_of_pairs": float(pairs.max() * n_parts / pairs.sum()),
            "imbalance_of_points": float(points.max() * n_parts / points.sum()),
            "kib_per_layer_of_a_part": float(2 * embed_dim * FLOAT32 * halos.max() / 2**10),
            "bisection_seconds": seconds,
        }
