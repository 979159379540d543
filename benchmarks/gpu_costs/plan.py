"""The predicted time of a training step's plan on an H200; as in `model`, nothing is measured.

The GPU is assumed to wait between launches as in a CUDA graph, and the host to launch without one;
what is shorter of the two hides in part behind the other.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.launches import Counts

from . import model
from .sass import Code
from .scene import SceneCounts, TileCounts

GAP = 1.5e-6  # seconds from the end of a launch to the start of the next one in a CUDA graph
LAUNCH, ALLOCATION = 7e-6, 1.5e-6  # seconds of the host
CHUNK, CHUNK_SECONDS = 4096, 7e-6  # tiles that `place_lists` handles at once, one after another
CACHED_STEPS = 12  # of a search: they read 4,096 keys, which stay in L1
KEYS_PER_SECTOR = 8
COLUMN_SECTORS = 4  # that `write_lists` reads for an entry: its item, its group and two cells
RUN_STEPS = 8  # of its search among the runs of a tile, of which there are at most 144
BIT_STEPS = 4  # of loops over the bits of a coordinate: by four, and the rest one by one


class PlanKernel(NamedTuple):
    """A kernel of the plan, compiled."""

    code: Code
    warps: int
    block: int  # rows of a program, for kernels that go through rows
    stages: tuple[int, ...] = ()  # of the sorts of `find_runs`, by levels


Variants = dict[int, PlanKernel]
"""By the rows of the tiles on which the kernel works; 0 for a kernel that does not."""


class _Direction(NamedTuple):
    """Windows of rows among sorted keys, and tiles of these rows."""

    rows: int
    slices: int  # of a row
    keys: int
    tiles: TileCounts


def seconds(
    scene: SceneCounts, levels: int, searches: float, kernels: dict[str, Variants],
    step: Counts, unused_bytes: float,
) -> float:  # fmt: skip
    """The predicted time.

    Args:
        scene: the scene; windows have one axis beside that of their slices.
        levels: of the scene.
        searches: instructions of `find_slices` for all queries.
        kernels: the variants of the other kernels, by name.
        step: what the host does for the plan.
        unused_bytes: of tensors of the plan, space that nothing is written to.
    """
    directions = (
        _Direction(scene.points, scene.slices, scene.points, scene.queries),
        _Direction(scene.points, scene.widest, scene.points * levels, scene.columns),
    )
    instructions = sum(_searched(x, directions[0]) for x in directions) * searches
    instructions += sum(_WORK[name](scene, levels, variants) for name, variants in kernels.items())
    moved = step.bytes - unused_bytes
    sectors = moved / model.SECTOR + sum(_search_sectors(x, scene.widest) for x in directions)
    sectors += sum(x.tiles.tiles * x.tiles.entries * COLUMN_SECTORS for x in directions)
    _, busy = model.Cost(1, instructions, sectors, moved).seconds()
    chunks = sum(math.ceil(x.tiles.tiles / CHUNK) for x in directions)
    on_device = busy + chunks * CHUNK_SECONDS + step.launches * GAP
    on_host = step.launches * LAUNCH + step.allocations * ALLOCATION
    longer, shorter = max(on_device, on_host), min(on_device, on_host)
    return longer + model.NOT_HIDDEN * shorter


def _searched(direction: _Direction, first: _Direction) -> float:
    """Instructions to search for its slices over those for the first direction's."""
    steps = direction.keys.bit_length() / first.keys.bit_length()
    return steps * direction.rows * direction.slices / (first.rows * first.slices)


def _search_sectors(direction: _Direction, width: int) -> float:
    """Sectors from L2: every slice reads its own, those of its last steps and of its keys once."""
    within_sector = KEYS_PER_SECTOR.bit_length() - 1
    steps = max(direction.keys.bit_length() - CACHED_STEPS - within_sector, 0) + 1
    return direction.rows * direction.slices * (steps + width / KEYS_PER_SECTOR)


def _by_rows(scene: SceneCounts, levels: int, variants: Variants) -> float:
    kernel = variants[0]
    loops = sum(loop.length for loop in kernel.code.innermost_loops())
    instructions = len(kernel.code.instructions) + (BIT_STEPS - 1) * loops
    return math.ceil(scene.points / kernel.block) * kernel.warps * instructions


def _by_keys(scene: SceneCounts, levels: int, variants: Variants) -> float:
    return levels * _by_rows(scene, levels, variants)


def _split_order(scene: SceneCounts, levels: int, variants: Variants) -> float:
    return (1 + levels) * _by_rows(scene, levels, variants)


def _find_runs(scene: SceneCounts, levels: int, variants: Variants) -> float:
    """A program takes the way of one level, a tile of queries all ways, one of points the longest.

    Each way has its own end.
    """
    of_queries, of_points = variants[scene.queries.rows], variants[scene.columns.rows]
    found = scene.queries.tiles * of_queries.warps * sum(_ways(of_queries))
    return found + scene.columns.tiles * of_points.warps * max(_ways(of_points))


def _ways(kernel: PlanKernel) -> list[float]:
    """The instructions of each level's way, the longer ones of levels that sort more.

    A loop, if the compiler left one, goes through the stages of the sort. The first stage takes one
    of its steps, the last one takes all.
    """
    code = kernel.code
    ends = [0, *(i for i, line in enumerate(code.instructions) if line.startswith("EXIT"))]
    ways = sorted(itertools.pairwise(ends), key=lambda way: way[1] - way[0])[-len(kernel.stages) :]
    found = []
    for (start, stop), stages in zip(ways, sorted(kernel.stages), strict=True):
        loops = sum(x.length for x in code.innermost_loops() if start <= x.start < stop)
        found.append(stop - start - loops + loops * (stages + 1) / 2)
    return found


def _write_lists(scene: SceneCounts, levels: int, variants: Variants) -> float:
    queries = _list_instructions(scene.queries, levels, variants[scene.queries.rows])
    return queries + _list_instructions(scene.columns, 1, variants[scene.columns.rows])


def _list_instructions(tiles: TileCounts, levels: int, kernel: PlanKernel) -> float:
    """The loop over a level's blocks contains the search among its runs."""
    (search,) = kernel.code.innermost_loops()
    block = min(
        stop - start + 1
        for stop, start in kernel.code.targets.items()
        if start < search.start and search.stop <= stop
    )
    outside = len(kernel.code.instructions) - block
    block += (RUN_STEPS - 1) * search.length
    return kernel.warps * tiles.tiles * (tiles.level_blocks * block + levels * outside)


_WORK: dict[str, Callable[[SceneCounts, int, Variants], float]] = {
    "place_queries": _by_rows,
    "place_points": _by_rows,
    "place_along_curve": _by_keys,
    "split_order": _split_order,
    "find_runs": _find_runs,
    "write_lists": _write_lists,
}
KERNELS = frozenset(_WORK)
