"""Draws random problems: maps, windows, points and queries, as plain numbers."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .windows import Cell, LevelWindow, draw_plain_window, draw_windows, window_steps

Real = type[np.float32] | type[np.float64]

MOST_SLOTS = 4000  # of all queries
CHAINS = ((1, 2, 4), (1, 2, 4, 8), (2, 4, 8, 16), (1, 3, 6), (2, 6, 12), (1, 5, 10), (3, 3, 6))


@dataclass(frozen=True)
class Problem:
    """One random problem. Everything follows from its seed."""

    seed: int
    real: Real  # type of positions, queries and embeddings
    shapes: tuple[Cell, ...]  # of the levels
    strides: tuple[Cell, ...] | None
    periodic_axes: Cell
    windows: tuple[LevelWindow, ...]
    coordinates: list[Cell]  # image, cell, level
    map_images: int
    offsets: list[int]
    positions: list[list[float]]  # representable as `real`
    query_levels: list[int] | None
    mask: list[bool] | None
    background: bool
    bias: bool  # a learned one, of the functional op
    background_rows: int  # at least one for every image with queries
    heads: int
    head_dim: int
    block: dict[str, Any] | None  # options of the block; None: no block
    through: str  # what the block is given: pyramid, plan or coo
    raw_points: list[Cell] | None  # image, cell: what the coordinates were pooled from
    raw_shape: Cell

    @property
    def dim(self) -> int:
        return len(self.shapes[0])

    @property
    def n_slots(self) -> int:
        """K, the number of cells of a query's windows."""
        return sum(len(window_steps(window)) for window in self.windows)

    @property
    def neighborhood_sizes(self) -> list[Any]:
        """The windows as an argument of the library."""
        return [window.as_argument(short=self.seed % 4 > 0) for window in self.windows]

    @property
    def images(self) -> int:
        """The number of images: the largest that map and offsets name."""
        return max(self.map_images, len(self.offsets) - 1)

    @property
    def embed_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def point_dim(self) -> int:
        """The width of the points that the block attends to."""
        return (self.block and self.block["point_dim"]) or self.embed_dim


def draw_problem(seed: int, real: Real = np.float64) -> Problem:
    """The problem of a seed."""
    rng = random.Random(seed)
    dim, n_levels = rng.choice((1, 2, 2, 3, 3, 4)), rng.choice((1, 2, 2, 3, 4))
    axes = tuple(axis for axis in range(dim) if rng.random() < 0.3)
    plain = rng.random() < 0.35
    causal_axes = tuple(
        axis for axis in range(dim) if axis not in axes and not plain and rng.random() < 0.4
    )
    strides, raw_shape = None, (1,) * dim
    if rng.random() < 0.6:
        strides = draw_strides(rng, dim, n_levels, causal_axes)
        raw_shape, shapes = draw_shapes(rng, strides, axes)
    else:
        shapes = draw_free_shapes(rng, dim, n_levels, causal_axes)
    if plain:
        windows = tuple(draw_plain_window(rng, shape, axes) for shape in shapes)
    else:
        windows = draw_windows(rng, shapes, axes, causal_axes)
    images = rng.randint(1, 3)
    raw_points, coordinates = None, draw_coordinates(rng, shapes, images)
    if strides is not None and rng.random() < 0.5:
        raw_points = draw_raw_points(rng, raw_shape, images)
        coordinates = pooled_coordinates(raw_points, strides)
    background = rng.random() < 0.5
    block = draw_block(rng, dim, background) if rng.random() < 0.6 else None
    slots = sum(len(window_steps(window)) for window in windows)
    n = rng.randint(0, max(1, min(15, MOST_SLOTS // slots)))
    offsets = [0, *sorted(rng.randint(0, n) for _ in range(images - 1)), n]
    geometry = shapes, coordinates
    positions = [draw_position(rng, *geometry, far=block is None) for _ in range(n)]
    used = max((row[0] + 1 for row in coordinates), default=1)
    masked = rng.choice((0.3, 0.3, 1.0))
    head_dim = rng.choice((2, 4, 6, 8))
    return Problem(
        seed=seed,
        real=real,
        shapes=shapes,
        strides=strides,
        periodic_axes=axes,
        windows=windows,
        coordinates=coordinates,
        map_images=images if raw_points is not None else rng.randint(used, max(used, images + 1)),
        offsets=offsets,
        positions=[[float(real(x)) for x in position] for position in positions],
        query_levels=[rng.randrange(n_levels) for _ in range(n)] if rng.random() < 0.5 else None,
        mask=[rng.random() < masked for _ in range(n)] if rng.random() < 0.4 else None,
        background=background,
        bias=rng.random() < 0.5,
        background_rows=rng.randint(sum(offset < n for offset in offsets), images + 1),
        heads=rng.randint(1 if head_dim > 2 else 2, 3),  # a norm over 2 channels amplifies errors
        head_dim=head_dim,
        block=block,
        through=rng.choice(("pyramid", "plan", "coo")),
        raw_points=raw_points,
        raw_shape=raw_shape,
    )


def draw_strides(
    rng: random.Random, dim: int, n_levels: int, causal_axes: Cell
) -> tuple[Cell, ...]:
    """Along causal axes, of every two levels one stride divides the other."""
    choices = rng.choice(((1, 2, 4, 8), (2, 4, 8, 16), (1, 2, 3), (2, 3, 4, 6), (1, 5, 7)))
    if rng.random() < 0.5:
        strides = [[rng.choice(choices)] * dim for _ in range(n_levels)]
    else:
        strides = [[rng.choice(choices) for _ in range(dim)] for _ in range(n_levels)]
    for axis in causal_axes:
        chain = rng.choice(CHAINS)
        for level in strides:
            level[axis] = rng.choice(chain)
    return tuple(map(tuple, strides))


def draw_free_shapes(
    rng: random.Random, dim: int, n_levels: int, causal_axes: Cell
) -> tuple[Cell, ...]:
    """Those of levels without strides. Along causal axes one size divides the other."""
    largest = (30, 13, 8, 5)[dim - 1]
    shapes = [[rng.randint(1, largest) for _ in range(dim)] for _ in range(n_levels)]
    for axis in causal_axes:
        chain = rng.choice(CHAINS)
        unit = rng.randint(1, max(1, largest // chain[2]))
        for shape in shapes:
            shape[axis] = unit * rng.choice(chain)
    return tuple(map(tuple, shapes))


def draw_shapes(
    rng: random.Random, strides: Sequence[Cell], periodic_axes: Cell
) -> tuple[Cell, tuple[Cell, ...]]:
    """The shape of a raw grid, and those of the levels: padded to a multiple of all strides."""
    raw, extents = [], []
    for axis, steps in enumerate(zip(*strides, strict=True)):
        multiple = math.lcm(*steps)
        size = rng.randint(1, 40)
        if axis in periodic_axes:
            size = multiple * rng.randint(1, max(1, 40 // multiple))
        raw.append(size)
        extents.append(-(-size // multiple) * multiple)
    shapes = [
        tuple(extent // step for extent, step in zip(extents, level, strict=True))
        for level in strides
    ]
    return tuple(raw), tuple(shapes)


def draw_coordinates(rng: random.Random, shapes: Sequence[Cell], images: int) -> list[Cell]:
    """Points in any order, some in one cell, some images and levels without any."""
    rows = []
    for image, level in itertools.product(range(images), range(len(shapes))):
        if rng.random() < 0.25:
            continue
        heart = [rng.randrange(size) for size in shapes[level]]
        spread = rng.choice((1, 3, 1000))
        for _ in range(rng.randint(0, 10)):
            near = (x + rng.randint(-spread, spread) for x in heart)
            cell = tuple(x % size for x, size in zip(near, shapes[level], strict=True))
            rows.append((image, *cell, level))
    rng.shuffle(rows)
    return rows[:40]


def draw_raw_points(rng: random.Random, raw_shape: Cell, images: int) -> list[Cell]:
    rows = draw_coordinates(rng, [raw_shape], images)
    return [row[:-1] for row in rows[:12]]


def pooled_coordinates(raw_points: Sequence[Cell], strides: Sequence[Cell]) -> list[Cell]:
    """The cells of all levels with a raw point in them, sorted by image, level and cell."""
    found = set()
    for image, *cell in raw_points:
        for level, steps in enumerate(strides):
            pooled = tuple(x // step for x, step in zip(cell, steps, strict=True))
            found.add((image, level, pooled))
    return [(image, *cell, level) for image, level, cell in sorted(found)]


def draw_position(
    rng: random.Random, shapes: Sequence[Cell], coordinates: Sequence[Cell], *, far: bool
) -> list[float]:
    """Near a point, on a border of cells, inside the map, or outside (very far if ``far``)."""
    full = [max(axis) for axis in zip(*shapes, strict=True)]
    kind = rng.choice(("point", "point", "center", "border", "inside", "outside", "mixed"))
    if kind in ("point", "center") and coordinates:
        _, *cell, level = rng.choice(coordinates)
        spread = 0.0 if kind == "center" else 1.5
        return [
            (x + 0.5 + rng.uniform(-spread, spread)) * most / size
            for x, most, size in zip(cell, full, shapes[level], strict=True)
        ]
    position = []
    for axis, most in enumerate(full):
        size = rng.choice(shapes)[axis]
        border = rng.randint(-1, size + 1) * most / size
        outside = rng.uniform(-1, 2) * most * (10.0 ** rng.choice((0, 5, 15, 30)) if far else 1)
        places = {
            "border": border,
            "inside": rng.uniform(0, most),
            "outside": outside,
            "mixed": rng.choice((border, outside, -1e-20, float(most), 0.0)),
        }
        position.append(places.get(kind, border))
    return position


def draw_block(rng: random.Random, dim: int, background: bool) -> dict[str, Any]:
    scales = [rng.choice((1.0, 0.5, 3.0)) for _ in range(dim)]
    rotary = rng.random() < 0.8
    return {
        "bias": rng.random() < 0.5,
        "norm_first": rng.random() < 0.5,
        "rope_spatial_base_theta": rng.choice((100.0, 20.0)),
        "rope_share_heads": rng.random() < 0.5,
        "rope_freq_group_pattern": rng.choice(("single", "partition", "closure")),
        "rope_enforce_freq_groups_equal": False,
        "relative_bias": rng.random() < 0.5,
        "point_dim": rng.choice((None, None, None, 5)),
        "rotary": rotary,
        "rope_axis_scales": scales if rng.random() < 0.3 else None,
        "rotary_values": rotary and not background and rng.random() < 0.5,
    }
