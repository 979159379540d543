"""Which cells the windows of the levels have: sizes, dilation, causal axes, boxes and balls."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from ._utils.caching import cached
from ._utils.checks import LevelShapes, as_integer, as_integers, as_list, describe, refuse

_LARGEST = 2**31 - 1  # of rows of windows, and of cells along an axis of one
_SHAPES = ("box", "ball")
T = TypeVar("T")


@dataclass(frozen=True, repr=False)
class Window:
    """The window of a level: which cells around a query it attends to.

    A number holds for every axis, a tuple has one entry per axis. Offsets are counted in cells of
    the level: along an axis, ``dilation * o`` for steps ``o``. An axis that is not causal has the
    steps ``-(size - 1) / 2`` to ``(size - 1) / 2`` around the cell that contains the query. A
    causal axis has the steps ``-(size - 1)`` to 0 from the last cell that is complete when the
    query's own cell ends. So a query sees its own cell and the past, and no coarse cell that still
    pools the future.

    Args:
        size: number of cells along each axis; odd along axes that are not causal. 0: the level is
            not attended to.
        dilation: distance of neighboring cells, in cells. Default: 1.
        causal: whether the window reaches only to smaller coordinates. Default: False.
        shape: ``"box"`` (default) or ``"ball"``. A ball has the steps with
            ``sum((o / h) ** 2) <= 1``, where ``h`` is ``size / 2``, or ``size - 1 / 2`` along a
            causal axis.

    Raises:
        ValueError: a size is even along an axis that is not causal, zero in a tuple, or negative; a
            dilation is below 1; tuples differ in length; the shape is unknown.

    Example:
        ```python
        import torch
        from vicinal import Window, get_multilevel_neighborhoods

        flat = Window((5, 5, 1))  # 25 cells in the plane of the query
        past = Window((3, 3, 8), causal=(False, False, True))  # 8 cells of time, up to now
        ball = Window(7, shape="ball")  # 179 of 343 cells in three dimensions
        position, shapes = torch.tensor([[9.5, 9.5, 9.5]]), [[32, 32, 32]] * 3
        cells, _, levels = get_multilevel_neighborhoods(position, shapes, [flat, past, ball])
        assert levels.bincount().tolist() == [25, 72, 179]
        assert cells[0, levels == 1, 2].max() == 9
        ```
    """

    size: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    shape: Literal["box", "ball"] = "box"

    def __post_init__(self) -> None:
        counts = "an integer, or one per axis,"
        size = _per_axis("size", self.size, as_integer, f"{counts} of at least 1, or 0")
        dilation = _per_axis("dilation", self.dilation, as_integer, f"{counts} of at least 1")
        causal = _per_axis("causal", self.causal, _as_bool, "a bool, or one per axis")
        for name, value in (("size", size), ("dilation", dilation), ("causal", causal)):
            object.__setattr__(self, name, value)
        lengths = {len(x) for x in (size, dilation, causal) if isinstance(x, tuple)}
        if len(lengths) > 1:
            refuse("size, dilation, causal", "tuples of one length", self)
        if not isinstance(self.shape, str) or self.shape not in _SHAPES:
            refuse("shape", "'box' or 'ball'", describe(self.shape))
        object.__setattr__(self, "shape", str(self.shape))
        if reason := _refusal(self.on_axes(lengths.pop() if lengths else 1), self.size == 0):
            refuse(*reason, self)

    def on_axes(self, position_dim: int) -> "AxisWindows":
        """The same with one entry per axis."""
        return AxisWindows(
            _on_axes(self.size, position_dim),
            _on_axes(self.dilation, position_dim),
            _on_axes(self.causal, position_dim),
            is_ball=self.shape == "ball",
        )

    def __repr__(self) -> str:
        given = [f"dilation={self.dilation}"] if self.dilation != 1 else []
        given += [f"causal={self.causal}"] if self.causal is not False else []
        given += [f"shape={self.shape!r}"] if self.shape != "box" else []
        return f"Window({', '.join([str(self.size), *given])})"


class AxisWindows(NamedTuple):
    """The window of a level, with one entry per axis; see `Window`.

    Kernels see the cells of a level in *key coordinates*, in which the cells of a window's row
    follow one another. The last key axis is the one along which a box has the most cells, so that
    it has few rows. Along an axis of dilation ``d``, cells are sorted by their remainder modulo
    ``d`` first. There a window is a box of ``sizes`` cells from its *first cell* on, or a part of
    that box. `_index.cell_keys` converts cells, `cell_order` the order of a window's cells.
    """

    sizes: tuple[int, ...]
    dilations: tuple[int, ...]
    causal: tuple[bool, ...]
    is_ball: bool

    def key_axes(self) -> tuple[int, ...]:
        """The axis that each key axis is: the longest comes last, the others keep their order."""
        axes = tuple(range(len(self.sizes)))
        longest = max(self.sizes)
        if self.is_ball or self.sizes[-1] == longest:
            return axes
        last = max(axis for axis in axes if self.sizes[axis] == longest)
        return (*axes[:last], *axes[last + 1 :], last)

    def in_key_order(self) -> "AxisWindows":
        """The same with the axes in the order of `key_axes`."""
        axes = self.key_axes()
        if axes == tuple(range(len(axes))):
            return self
        return AxisWindows(
            tuple(self.sizes[axis] for axis in axes),
            tuple(self.dilations[axis] for axis in axes),
            tuple(self.causal[axis] for axis in axes),
            self.is_ball,
        )

    def first_steps(self) -> list[int]:
        """The least step along each axis."""
        return [
            1 - size if causal else -(size // 2)
            for size, causal in zip(self.sizes, self.causal, strict=True)
        ]

    def reach(self) -> list[int]:
        """The largest distance along each axis from a query's cell to one of its window."""
        steps = zip(self.first_steps(), self.dilations, strict=True)
        return [-step * dilation for step, dilation in steps]

    def is_plain(self) -> bool:
        """Whether it is neither dilated nor causal, and key coordinates are cells."""
        in_order = self.key_axes() == tuple(range(len(self.sizes)))
        return max(self.dilations) == 1 and not any(self.causal) and in_order

    def is_box(self) -> bool:
        """Whether it has every cell of its box."""
        return not self.is_ball


Windows = tuple[AxisWindows, ...]  # one per level
# Type checkers see a list of ints and windows as one of objects.
WindowsLike = Tensor | Sequence[Any]
"""``neighborhood_sizes``: an int, ints per axis or `Window` for each level; or integers ``[L]``."""


class WindowRow(NamedTuple):
    """A row of a window, cells that follow one another along the last axis, in key coordinates."""

    steps: tuple[int, ...]  # [P - 1], from the window's first cell
    start: int  # the row's first cell, from the window's first cell
    width: int  # number of cells


def as_windows(
    neighborhood_sizes: WindowsLike,
    n_levels: int,
    position_dim: int,
    argument: str = "neighborhood_sizes",
) -> tuple[int | tuple[int, ...] | Window, ...]:
    """``neighborhood_sizes`` with an entry per level, each in its shortest form.

    That is an int for a box of equal sizes, a tuple for a box of others, else a `Window`.

    Raises:
        ValueError: there is not one per level, or one cannot be the window of a level of
            ``position_dim`` axes; the message names the level, and the axis.
    """
    expected = f"one window per level ({n_levels})"
    given = as_list(argument, neighborhood_sizes, expected)
    is_text = isinstance(given, str | bytes | bytearray)
    if not isinstance(given, Sequence) or is_text or len(given) != n_levels:
        refuse(argument, expected, describe(neighborhood_sizes))
    windows = [_as_window(argument, level, given, position_dim) for level in range(n_levels)]
    on_axes = list(windows_on_axes(windows, position_dim))
    if not any(max(window.sizes) for window in on_axes):
        refuse(argument, "a level with a window", f"{describe(list(given))}: all levels are 0")
    n_rows = sum(math.prod(window.in_key_order().sizes[:-1]) for window in on_axes)
    if n_rows > _LARGEST or sum(math.prod(window.sizes) for window in on_axes) >= 2**62:
        came = f"{describe(list(given))}: {n_rows} rows"
        refuse(argument, "windows of at most 2^31 - 1 rows in all", came)
    return tuple(_shortest(window, position_dim) for window in windows)


def windows_on_axes(
    neighborhood_sizes: Sequence[int | tuple[int, ...] | Window], position_dim: int
) -> Windows:
    """What `as_windows` returns, with one entry per axis."""
    return tuple(
        entry.on_axes(position_dim) if isinstance(entry, Window) else _plain(entry, position_dim)
        for entry in neighborhood_sizes
    )


def _plain(size: int | tuple[int, ...], position_dim: int) -> AxisWindows:
    """A box that is neither dilated nor causal."""
    ones, no = (1,) * position_dim, (False,) * position_dim
    return AxisWindows(_on_axes(size, position_dim), ones, no, is_ball=False)


def check_windows_fit(
    windows: Windows,
    level_shapes: LevelShapes,
    periodic_axes: Sequence[int],
    argument: str = "neighborhood_sizes",
    first_level: int = 0,
) -> None:
    """Raises ValueError for windows that a map cannot have; the message counts levels from
    ``first_level``.

    Around a periodic axis, a window must not have a cell twice and cannot be causal. Along a causal
    axis, cells of coarse levels must pool whole cells of finer ones.
    """
    for level, (window, shape) in enumerate(zip(windows, level_shapes, strict=True), first_level):
        for axis in periodic_axes:
            size, dilation = window.sizes[axis], window.dilations[axis]
            # Compilers do not make text of an axis that varies, so it is made for errors alone.
            if dilation * (size - 1) + 1 > shape[axis]:
                expected = f"a window of at most {shape[axis]} cells, dilation counted, "
                expected += f"at level {level} along periodic axis {axis}"
                refuse(argument, expected, f"size {size} and dilation {dilation}")
            if window.causal[axis] and size:
                expected = (
                    f"a window that is not causal at level {level} along periodic axis {axis}"
                )
                refuse(argument, expected, "a causal one")
    for axis in causal_axes(windows):
        for one, other in itertools.combinations(range(len(level_shapes)), 2):
            sizes = level_shapes[one][axis], level_shapes[other][axis]
            if max(sizes) % min(sizes):
                expected = f"level sizes that divide each other along causal axis {axis}"
                got = f"{sizes[0]} at level {one}, {sizes[1]} at level {other}"
                refuse(argument, expected, got)


def causal_axes(windows: Windows) -> list[int]:
    """The axes along which the window of some level is causal."""
    return [
        axis
        for axis in range(len(windows[0].sizes))
        if any(window.causal[axis] and window.sizes[axis] for window in windows)
    ]


@cached
def window_rows(window: AxisWindows) -> tuple[WindowRow, ...]:
    """The rows of a window, along the last key axis; those of a ball without a cell are left out.

    A window without cells has one row, of width 0.
    """
    window = window.in_key_order()
    every = itertools.product(*map(range, window.sizes[:-1]))
    if window.is_box():
        size = window.sizes[-1]
        rows = [WindowRow(steps, 0, size) for steps in every if size]
    else:
        rows = [
            WindowRow(steps, start, stop - start)
            for steps in every
            for start, stop in [_row_of_ball(window, steps)]
            if stop > start
        ]
    return tuple(rows) or (WindowRow((0,) * (len(window.sizes) - 1), 0, 0),)


def count_rows(window: AxisWindows) -> int:
    """The number of `window_rows`."""
    if window.is_ball:
        return len(window_rows(window))
    longest = max(window.sizes)
    return math.prod(window.sizes) // longest if longest else 1


@cached
def count_cells(window: AxisWindows) -> int:
    """The number of cells of a window."""
    if window.is_box():
        return math.prod(window.sizes)
    return sum(row.width for row in window_rows(window))


@cached
def window_offsets(window: AxisWindows) -> list[tuple[int, ...]]:
    """The offsets to the cells of a window, ``[K, P]`` in cells of the level, row-major."""
    return sorted(_offsets_by_rows(window))


@cached
def cell_order(window: AxisWindows) -> list[int] | None:
    """For each cell of a window, row by row, its number in row-major order; None if equal."""
    if window == window.in_key_order():
        return None
    offsets = _offsets_by_rows(window)
    number = {offset: index for index, offset in enumerate(window_offsets(window))}
    order = [number[offset] for offset in offsets]
    return None if order == sorted(order) else order


def _offsets_by_rows(window: AxisWindows) -> list[tuple[int, ...]]:
    """The offsets to the cells of a window, in the order of its `window_rows`."""
    axes = window.key_axes()
    firsts, dilations = window.in_key_order().first_steps(), window.in_key_order().dilations
    cells = (
        (*row.steps, row.start + cell) for row in window_rows(window) for cell in range(row.width)
    )
    offsets = (
        [step * (first + x) for step, first, x in zip(dilations, firsts, cell, strict=True)]
        for cell in cells
    )
    return [tuple(offset[axes.index(axis)] for axis in range(len(axes))) for offset in offsets]


def _row_of_ball(window: AxisWindows, steps: Sequence[int]) -> tuple[int, int]:
    """The first cell of a row and the one after its last, from the window's first cell."""
    size = window.sizes[-1]
    firsts = window.first_steps()
    # Twice the half width h of each axis is an integer, so everything is exact in integers.
    widths = [
        2 * size - 1 if causal else size
        for size, causal in zip(window.sizes, window.causal, strict=True)
    ]
    # What the other axes leave of 1 in the sum of (o / h) ** 2, times their common denominator.
    denominator = math.prod([width * width for width in widths[:-1]])
    left = denominator
    for step, first, width in zip(steps, firsts[:-1], widths[:-1], strict=True):
        left -= (2 * (step + first)) ** 2 * denominator // (width * width)
    if left < 0:
        return 0, 0
    farthest = math.isqrt(left * widths[-1] ** 2 // (4 * denominator))
    last = size - 1 + firsts[-1]  # 0 along a causal axis
    return -farthest - firsts[-1], min(farthest, last) + 1 - firsts[-1]


def _per_axis(
    argument: str, value: Any, convert: Callable[[Any], T | None], expected: str
) -> T | tuple[T, ...]:
    """A value, or a tuple of one per axis; raises ValueError unless all convert."""
    value = as_list(argument, value, expected)
    if isinstance(value, list | tuple):
        converted = tuple(convert(as_list(argument, x, expected)) for x in value)
        if converted and all(x is not None for x in converted):
            return converted  # type: ignore[return-value]
    elif (single := convert(value)) is not None:
        return single
    refuse(argument, expected, describe(value))


def _on_axes(value: T | tuple[T, ...], position_dim: int) -> tuple[T, ...]:
    return value if isinstance(value, tuple) else (value,) * position_dim


def _as_bool(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _refusal(window: AxisWindows, is_off: bool) -> tuple[str, str] | None:
    """The argument and what is expected of it, if this cannot be a window."""
    for axis, (size, dilation, causal) in enumerate(
        zip(window.sizes, window.dilations, window.causal, strict=True)
    ):
        if size < 0 or (size == 0 and not is_off):
            expected = f"0 for all axes, or odd neighborhood_sizes of at least 1 along axis {axis}"
            return "size", expected
        if size % 2 == 0 and size and not causal:
            return "size", f"odd neighborhood_sizes where not causal, along axis {axis}"
        if not 1 <= dilation <= _LARGEST:
            return "dilation", f"at least 1, below 2^31, along axis {axis}"
        if size * dilation > _LARGEST:
            return "size", f"odd neighborhood_sizes below 2^31 cells along axis {axis}"
    return None


def _as_window(
    argument: str, level: int, given: Sequence[Any], position_dim: int
) -> int | tuple[int, ...] | Window:
    """The window of a level among those ``given``; sizes alone stay sizes."""
    parts: tuple[Any, ...]
    entry: int | tuple[int, ...] | Window = given[level]
    place, came = f"at level {level}", list(given)
    if not isinstance(entry, Window):
        numbers = as_list(argument, entry, f"a window {place}")
        size = as_integer(numbers)
        sizes = (size,) * position_dim if size is not None else as_integers(numbers)
        if not sizes:
            expected = "odd neighborhood_sizes, one or one per axis, a Window or 0"
            refuse(argument, f"{expected} {place}", came)
        ones = (1,) * len(sizes)
        if reason := _refusal(AxisWindows(sizes, ones, (False,) * len(sizes), False), size == 0):
            refuse(argument, f"{reason[1]} {place}", came)
        entry, parts = sizes if size is None else size, (sizes,)
    else:
        parts = entry.size, entry.dilation, entry.causal
    for part in parts:
        if isinstance(part, tuple) and len(part) != position_dim:
            refuse(argument, f"an entry for each of {position_dim} axes {place}", came)
    return entry


@cached
def _shortest(
    window: int | tuple[int, ...] | Window, position_dim: int
) -> int | tuple[int, ...] | Window:
    """The window in the one form that all equal windows share."""
    if not isinstance(window, Window):
        return _one(_on_axes(window, position_dim))
    if window.size == 0:
        return 0
    sizes, dilations, causal, _ = window.on_axes(position_dim)
    parts = _one(sizes), _one(dilations), _one(causal)
    if parts[1:] == (1, False) and window.shape == "box":
        return parts[0]
    if parts == (window.size, window.dilation, window.causal):
        return window
    return Window(*parts, window.shape)


def _one(values: tuple[T, ...]) -> T | tuple[T, ...]:
    """The value that all axes share, or else the values."""
    return values[0] if len(set(values)) == 1 else values
