"""Predicted sectors and times of the attention's kernels on an H200, and bars for the counts.

Nothing here is measured; the constants below are assumptions. A kernel issues instructions, moves
sectors from L2, and moves each byte once from memory. With perfect overlap it takes as long as the
slowest of the three. It is predicted to take longer by a part of the other two, which is not
hidden.
"""

from typing import NamedTuple

from .scene import SceneCounts, TileCounts

HEADS, WIDTH, BYTES = 8, 32, 2  # of a head, and of a number: bfloat16
SECTOR = 32  # bytes
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.7e9
ISSUE_RATE = 0.6  # of an instruction per cycle and scheduler
L2_RATE, MEMORY_RATE = 4.5e12, 4.3e12  # bytes per second
NOT_HIDDEN = 0.3

_ROW = WIDTH * BYTES // SECTOR  # sectors of a head's row
_LIST_BLOCK = 2 * 32 * 4 // SECTOR  # sectors of a block of a list: items and members


class Bar(NamedTuple):
    name: str
    bar: float
    aim: float | None
    at_least: bool = False  # else at most


BARS = (
    Bar("attend: instructions per block and head, for 16 rows", 350, 300),
    *(
        bar
        for kernel in ("attend", "query_gradients", "point_gradients")
        for bar in (
            Bar(f"{kernel}: LDGSTS of the block loop", 1, None, at_least=True),
            Bar(f"{kernel}: registers", 168, None),
            Bar(f"{kernel}: spills in the block loop", 0, None),
        )
    ),
    Bar("attend: sectors per tile and head, for 16 rows", 620, 500),
    Bar("find_slices: instructions over those of attend", 0.25, 0.1),
    Bar("attend: predicted time over copying q, k, v and out", 3, 2),
    Bar("backward: predicted time over copying q, k, v and out", 7, 5),
    Bar("plan of a step: predicted time over forward and backward", 0.5, 0.3),
)


class Cost(NamedTuple):
    """Of a kernel on the scene, predicted."""

    programs: int
    instructions: float  # per program: of a tile and head
    sectors: float  # per program
    bytes: float  # of all programs, each once

    def seconds(self) -> tuple[float, float]:
        """The time with perfect overlap, and the predicted one."""
        issued = self.programs * self.instructions / (MULTIPROCESSORS * SCHEDULERS * CLOCK)
        parts = (
            issued / ISSUE_RATE,
            self.programs * self.sectors * SECTOR / L2_RATE,
            self.bytes / MEMORY_RATE,
        )
        slowest = max(parts)
        return slowest, slowest + NOT_HIDDEN * (sum(parts) - slowest)


def cost(kernel: str, scene: SceneCounts, block: int, outside: int) -> Cost:
    """The cost of a kernel whose loop has ``block`` instructions, and whose rest ``outside``."""
    tiles = scene.columns if kernel == "point_gradients" else scene.queries
    rows, moved = _SECTORS[kernel](tiles)
    own = tiles.rows * 4 // SECTOR + 1  # its traversal, and where its list is
    sectors = rows + tiles.blocks * _LIST_BLOCK + own
    instructions = outside + block * tiles.blocks
    return Cost(tiles.tiles * HEADS, instructions, sectors, moved * tensor_bytes(scene))


def _forward(tiles: TileCounts) -> tuple[float, int]:
    """q, out and the log-sum-exp of the rows, keys and values; q, k, v, out once."""
    return tiles.rows * (2 * _ROW + 1) + tiles.entries * 2 * _ROW, 4


def _query_gradients(tiles: TileCounts) -> tuple[float, int]:
    """q, out, both gradients, log-sum-exps and statistics of the rows; keys and values.

    All gradients of log-sum-exps are one zero in a training step that does not use these.
    """
    return tiles.rows * (4 * _ROW + 1) + 1 + tiles.row_stats + tiles.entries * 2 * _ROW, 6


def _point_gradients(tiles: TileCounts) -> tuple[float, int]:
    """k, v and their gradients; q, grad_out and the statistics of the columns."""
    return tiles.rows * 4 * _ROW + tiles.entries * 2 * _ROW + tiles.column_stats, 6


_SECTORS = {
    "attend": _forward,
    "query_gradients": _query_gradients,
    "point_gradients": _point_gradients,
}


def tensor_bytes(scene: SceneCounts) -> int:
    """The bytes of q, or of another tensor of its size."""
    return scene.points * HEADS * WIDTH * BYTES


def copy_seconds(scene: SceneCounts) -> float:
    """Copying q, k, v and out once: all are read and written."""
    return 8 * tensor_bytes(scene) / MEMORY_RATE


def search_instructions(scene: SceneCounts, loops: list[int], outside: int, per_warp: int) -> float:
    """Those of `find_slices` for all queries, with ``per_warp`` slices searched at once.

    The first loop halves a range of all points, and the last one a range of a window's width.
    Loops between them serve cells with several points.
    """
    steps, narrow_steps = scene.points.bit_length(), scene.widest.bit_length()
    instructions = outside + loops[0] * steps + loops[-1] * narrow_steps
    return instructions * scene.points * scene.slices / per_warp


def misses(found: dict[str, float]) -> list[str]:
    """A line for every bar that ``found``, by the bars' names, misses or lacks."""
    lines = []
    for bar in BARS:
        value = found.get(bar.name)
        if value is None:
            lines.append(f"{bar.name}: not counted")
        elif value < bar.bar if bar.at_least else value > bar.bar:
            limit = "at least" if bar.at_least else "at most"
            lines.append(f"{bar.name}: {value:.4g}, {limit} {bar.bar:g} expected")
    return lines
