"""Draws the windows of random problems, as plain numbers, and lists their steps."""

import functools
import itertools
import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import vicinal

Cell = tuple[int, ...]

MOST_CELLS = 700  # of a window
DILATIONS = (1, 1, 2, 2, 2, 3, 4, 7, 50)


class LevelWindow(NamedTuple):
    """The window of a level, with one entry per axis. All sizes 0: the level is not attended to."""

    sizes: Cell
    dilations: Cell
    causal: tuple[bool, ...]
    is_ball: bool

    def is_plain(self) -> bool:
        """Whether one odd width says it all."""
        simple = not self.is_ball and set(self.dilations) == {1} and not any(self.causal)
        return simple and len(set(self.sizes)) == 1

    def is_off(self) -> bool:
        return not any(self.sizes)

    def as_argument(self, *, short: bool) -> Any:
        """An entry of ``neighborhood_sizes``: a number or a tuple where ``short`` and possible."""
        size, dilation, causal = map(one_if_equal, self[:3])
        shape: Literal["box", "ball"] = "ball" if self.is_ball else "box"
        if short and (dilation, causal, shape) == (1, False, "box"):
            return size
        if short:
            return vicinal.Window(size, dilation, causal, shape)
        sizes = 0 if self.is_off() else self.sizes
        return vicinal.Window(sizes, self.dilations, self.causal, shape)


def one_if_equal(entries: Sequence[Any]) -> Any:
    return entries[0] if len(set(entries)) == 1 else tuple(entries)


def plain_window(width: int, dim: int) -> LevelWindow:
    return LevelWindow((width,) * dim, (1,) * dim, (False,) * dim, False)


@functools.cache
def window_steps(window: LevelWindow) -> list[Cell]:
    """The steps of a window along the axes, before dilation, row-major, by definition."""
    ranges, halves = [], []
    for w, causal in zip(window.sizes, window.causal, strict=True):
        ranges.append(range(-(w - 1), 1) if causal else range(-((w - 1) // 2), (w - 1) // 2 + 1))
        halves.append(w - Fraction(1, 2) if causal else Fraction(w, 2))
    if window.is_off():
        return []
    steps = list(itertools.product(*ranges))
    if not window.is_ball:
        return steps
    return [
        step for step in steps if sum((o / h) ** 2 for o, h in zip(step, halves, strict=True)) <= 1
    ]


def draw_windows(
    rng: random.Random, shapes: Sequence[Cell], periodic_axes: Cell, causal_axes: Cell
) -> tuple[LevelWindow, ...]:
    """A window of any kind for every level, not all of them off."""
    windows = [
        draw_window(rng, shape, periodic_axes, causal_axes)
        if rng.random() < 0.75
        else draw_plain_window(rng, shape, periodic_axes)
        for shape in shapes
    ]
    for level in range(len(shapes)):
        if rng.random() < 0.1 and not all(
            w.is_off() for w in windows[:level] + windows[level + 1 :]
        ):
            windows[level] = plain_window(0, len(shapes[level]))
    return tuple(windows)


def draw_window(
    rng: random.Random, shape: Cell, periodic_axes: Cell, causal_axes: Cell
) -> LevelWindow:
    """One with few cells that fits around the periodic axes."""
    while True:
        window = draw_any_window(rng, len(shape), causal_axes)
        fits = all(window.sizes[axis] <= shape[axis] for axis in periodic_axes)
        if fits and math.prod(window.sizes) <= MOST_CELLS:
            break
    dilations = list(window.dilations)
    for axis in periodic_axes:
        if window.sizes[axis] > 1:
            most = (shape[axis] - 1) // (window.sizes[axis] - 1)
            dilations[axis] = min(dilations[axis], most)
    return window._replace(dilations=tuple(dilations))


def draw_any_window(rng: random.Random, dim: int, causal_axes: Cell) -> LevelWindow:
    most = rng.choice((3, 5, 5, 8, 8, 30))
    causal = tuple(axis in causal_axes and rng.random() < 0.7 for axis in range(dim))
    sizes = draw_per_axis(rng, dim, lambda: rng.randint(1, most))
    dilations = (1,) * dim
    if rng.random() < 0.5:
        dilations = draw_per_axis(rng, dim, lambda: rng.choice(DILATIONS))
    sizes = tuple(w if past else w | 1 for w, past in zip(sizes, causal, strict=True))
    return LevelWindow(sizes, dilations, causal, rng.random() < 0.4)


def draw_per_axis(rng: random.Random, dim: int, draw: Callable[[], int]) -> Cell:
    """One number for all axes, or one for each."""
    return (draw(),) * dim if rng.random() < 0.4 else tuple(draw() for _ in range(dim))


def draw_plain_window(rng: random.Random, shape: Cell, periodic_axes: Cell) -> LevelWindow:
    """An odd width: small, or the largest that a periodic axis and the time allow."""
    dim = len(shape)
    widths = [w for w in range(1, 2 * max(shape) + 4, 2) if w**dim <= MOST_CELLS]
    widths = [w for w in widths if all(w <= shape[axis] for axis in periodic_axes)]
    return plain_window(widths[-1] if rng.random() < 0.2 else rng.choice(widths[:4]), dim)
