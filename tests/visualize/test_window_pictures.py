"""Windows of every shape as they are drawn, against the cells of `get_multilevel_neighborhoods`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from pages import read, unpack

from vicinal import FeaturePyramid, NeighborhoodWeights, Window, get_multilevel_neighborhoods
from vicinal.visualize import AttentionRecord, View, draw_attention, draw_overview, write_explorer
from vicinal.visualize.palette import CATEGORICAL, LIGHT

Cell = tuple[int, ...]
Polygon = list[tuple[float, float]]  # row and column of each vertex, in cells of the full shape


class Case(NamedTuple):
    """A query on a map without points, and the axis to look along."""

    shapes: tuple[Cell, ...]
    sizes: list[Any]
    position: list[float]
    query_level: int | None = None
    periodic: tuple[int, ...] = ()
    axis: int | None = None

    @property
    def drawn_axes(self) -> list[int]:
        return [axis for axis in range(len(self.position)) if axis != self.axis]

    def pyramid(self) -> FeaturePyramid:
        coordinates = torch.zeros(0, len(self.position) + 2).long()
        values = torch.zeros(0, 1)
        return FeaturePyramid(values, coordinates, self.shapes, 1, periodic_axes=self.periodic)

    def record(self, **options: Any) -> AttentionRecord:
        offsets, points = torch.zeros(2).long(), torch.zeros(0).long()
        weights = NeighborhoodWeights(offsets, points, torch.zeros(0, 1), None)
        levels = None if self.query_level is None else torch.tensor([self.query_level])
        position = torch.tensor([self.position], dtype=torch.float64)
        return AttentionRecord(position, weights, self.sizes, levels=levels, **options)

    def cell_sizes(self, level: int) -> tuple[float, ...]:
        """Of the drawn axes, in cells of the full shape."""
        full = [max(sizes) for sizes in zip(*self.shapes, strict=True)]
        return tuple(full[axis] / self.shapes[level][axis] for axis in self.drawn_axes)

    def window(self, level: int) -> set[Cell]:
        """The cells of the window in the drawn axes."""
        levels = None if self.query_level is None else torch.tensor([self.query_level])
        cells, _, slot_levels = get_multilevel_neighborhoods(
            torch.tensor([self.position], dtype=torch.float64),
            self.shapes,
            self.sizes,
            query_level_indices=levels,
            periodic_axes=self.periodic,
        )
        of_level = cells[0, slot_levels == level][:, self.drawn_axes]
        return {tuple(cell) for cell in of_level.tolist()}

    def causal_axes(self, level: int) -> list[int]:
        """Those of the drawn axes along which the window is causal, by their place among them."""
        causal = getattr(self.sizes[level], "causal", False)
        drawn = self.drawn_axes
        if isinstance(causal, tuple):
            causal = [causal[axis] for axis in drawn]
        return [i for i, is_causal in enumerate(np.broadcast_to(causal, len(drawn))) if is_causal]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases of 1 to 3 dimensions; levels in any order, whose sizes divide each other."""
    dim = draw(st.integers(1, 3))
    finest = [draw(st.sampled_from((8, 12))) for _ in range(dim)]
    ratios = draw(st.permutations((1, 2, 4)))[: draw(st.integers(1, 3))]
    shapes = tuple(tuple(size // ratio for size in finest) for ratio in ratios)
    periodic = tuple(axis for axis in range(dim) if draw(st.booleans()))
    sizes: list[Any] = []
    for shape in shapes:
        size, dilation, causal = [], [], []
        for axis in range(dim):
            causal.append(axis not in periodic and draw(st.booleans()))
            size.append(draw(st.sampled_from((1, 2, 3, 4) if causal[-1] else (1, 3, 5))))
            dilation.append(draw(st.integers(1, 3)))
            if axis in periodic and dilation[-1] * (size[-1] - 1) >= shape[axis]:
                size[-1], dilation[-1] = 1, 1
        kind: Literal["box", "ball"] = draw(st.sampled_from(("box", "ball")))
        sizes.append(Window(tuple(size), tuple(dilation), tuple(causal), kind))
    if len(sizes) > 1 and draw(st.booleans()):
        sizes[-1] = 0
    position = [draw(st.floats(-3, size + 3)) for size in finest]
    query_level = draw(st.none() | st.integers(0, len(shapes) - 1))
    return Case(shapes, sizes, position, query_level, periodic, 1 if dim == 3 else None)


BALL = Case(((24, 20), (12, 10)), [Window(7, shape="ball"), Window(5, shape="ball")], [9.5, 7.2])
DILATED = Case(((24, 20), (12, 10)), [Window(5, dilation=2), Window(3, (1, 3))], [9.5, 7.2])
FLAT = Case(((16, 14, 12), (8, 7, 6)), [(5, 7, 1), (5, 5, 3)], [9.5, 7.2, 3.0], axis=2)
TIME = (False, True)
STREAM = Case(
    ((6, 5), (24, 20), (12, 10)),
    [Window((3, 4), causal=TIME), 0, Window((3, 5), (1, 2), TIME, "ball")],
    [9.5, 17.2],
    query_level=1,
)
SHAPES = {"ball": BALL, "dilated": DILATED, "flat": FLAT, "stream": STREAM}


# ------------------------------------------------------------------------------- what is drawn


def vertices(patch: Any) -> list[Polygon]:
    """The polygons of a patch, each without its repeated first vertex."""
    path = patch.get_patch_transform().transform_path(patch.get_path())
    return [[(y, x) for x, y in polygon[:-1].tolist()] for polygon in path.to_polygons()]


def outlines(ax: Axes, color: str) -> list[Polygon]:
    """The polygons of a color."""
    wanted = matplotlib.colors.to_rgba(color)
    patches = [
        patch
        for patch in ax.patches
        if isinstance(patch, Rectangle | PathPatch) and patch.get_edgecolor() == wanted
    ]
    return [polygon for patch in patches for polygon in vertices(patch)]


def edges(ax: Axes, color: str) -> list[tuple[tuple[float, float], ...]]:
    """Both ends of the lines of a color, row and column each."""
    return [
        tuple((float(y), float(x)) for x, y in np.asarray(line.get_xydata()))
        for line in ax.lines
        if isinstance(line, Line2D) and line.get_color() == color and line.get_linestyle() == "-"
    ]


def in_figure(case: Case) -> list[list[Polygon]]:
    figure = draw_attention(case.pyramid(), case.record(), axis=case.axis)
    return [outlines(ax, LIGHT.window) for ax in figure.axes[: len(case.shapes)]]


def in_overview(case: Case) -> list[list[Polygon]]:
    drawn = []
    for level in range(len(case.shapes)):
        options: dict[str, Any] = {"level": level, "axis": case.axis, "windows": True}
        drawn.append(
            outlines(draw_overview(case.pyramid(), case.record(), **options), CATEGORICAL[0])
        )
    return drawn


def in_page(case: Case, file: Path) -> list[list[Polygon]]:
    write_explorer(file, View(case.pyramid(), [case.record()], axis=case.axis))
    (view,) = read(file)["views"]
    windows = view["records"][0]["windows"]
    corners = torch.tensor(unpack(windows["corners"]), dtype=torch.float64).view(-1, 2, 2)
    full = [max(sizes) for sizes in zip(*view["level_shapes"], strict=True)]
    drawn = []
    for low, shape, polygons in zip(
        corners[:, 0].tolist(), view["level_shapes"], windows["outlines"], strict=True
    ):
        size = [n / m for n, m in zip(full, shape, strict=True)]
        drawn.append(
            [
                [(low[0] + row * size[0], low[1] + column * size[1]) for row, column in polygon]
                for polygon in polygons
            ]
        )
    return drawn


def area(polygon: Polygon) -> float:
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(a[0] * b[1] - a[1] * b[0] for a, b in pairs)) / 2


def is_inside(point: Sequence[float], polygons: list[Polygon]) -> bool:
    """By the number of vertical sides to the right of the point."""
    crossings = 0
    for polygon in polygons:
        for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True):
            low, high = sorted((a[0], b[0]))
            crossings += low <= point[0] < high and a[1] > point[1]
    return crossings % 2 == 1


def assert_covers(case: Case, level: int, polygons: list[Polygon]) -> None:
    """The polygons hold exactly the window's cells of the level, whole."""
    expected, sizes = case.window(level), case.cell_sizes(level)
    is_row = len(sizes) == 1
    height, width = (1.0, *sizes) if is_row else sizes
    if not expected:
        assert polygons == []
        return
    scaled = [[(row / height, column / width) for row, column in polygon] for polygon in polygons]
    for coordinate in itertools.chain(*itertools.chain(*scaled)):
        assert coordinate == pytest.approx(round(coordinate), abs=1e-6)  # corners of cells
    rows, columns = (
        range(
            round(min(vertex[axis] for polygon in scaled for vertex in polygon)),
            round(max(vertex[axis] for polygon in scaled for vertex in polygon)),
        )
        for axis in (0, 1)
    )
    covered = [
        (row, column)
        for row, column in itertools.product(rows, columns)
        if is_inside((row + 0.5, column + 0.5), scaled)
    ]
    assert sum(map(area, scaled)) == pytest.approx(len(covered))
    found: set[Cell] = {cell[1:] if is_row else cell for cell in covered}
    assert len(covered) == len(found) == len(expected)
    for i, axis in enumerate(case.drawn_axes):
        if axis in case.periodic:
            size = case.shapes[level][axis]
            found = {(*cell[:i], cell[i] % size, *cell[i + 1 :]) for cell in found}
    assert found == expected


@given(case=cases())
@settings(max_examples=40)
def test_the_outline_in_a_figure_covers_the_cells_of_the_window(case: Case) -> None:
    for level, polygons in enumerate(in_figure(case)):
        assert_covers(case, level, polygons)


@given(case=cases())
@settings(max_examples=15)
def test_the_outline_in_an_overview_covers_the_cells_of_the_window(case: Case) -> None:
    for level, polygons in enumerate(in_overview(case)):
        assert_covers(case, level, polygons)


@given(case=cases())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_outline_in_a_page_covers_the_cells_of_the_window(case: Case, tmp_path: Path) -> None:
    for level, polygons in enumerate(in_page(case, tmp_path / "page.html")):
        assert_covers(case, level, polygons)


@pytest.mark.parametrize("name", SHAPES)
def test_cells_apart_have_an_outline_each(name: str) -> None:
    counts = [len(polygons) for polygons in in_figure(SHAPES[name])]
    assert counts == {
        "ball": [1, 1], "dilated": [25, 3], "flat": [1, 1], "stream": [1, 0, 5]
    }[name]  # fmt: skip


def test_a_projection_shows_the_union_of_the_cells() -> None:
    """Gaps along the axis that is looked along are not seen; the middle of a ball is."""
    gaps = FLAT._replace(sizes=[Window((5, 5, 5), (1, 1, 2)), Window(5, shape="ball")])
    box, ball = in_figure(gaps)
    assert len(box) == 1
    assert area(box[0]) == 25
    assert area(ball[0]) == 21 * 4
    flat = FLAT._replace(sizes=[Window((5, 5, 1), shape="ball"), Window((1, 1, 5), shape="ball")])
    assert [area(polygon) for (polygon,) in in_figure(flat)] == [21, 4]


# ----------------------------------------------------------------------------------- causal edges


@given(case=cases())
@settings(max_examples=40)
def test_a_causal_edge_is_at_the_end_of_the_last_complete_cell(case: Case) -> None:
    figure = draw_attention(case.pyramid(), case.record(), axis=case.axis)
    full = [max(sizes) for sizes in zip(*case.shapes, strict=True)]
    for level, ax in enumerate(figure.axes[: len(case.shapes)]):
        cells, sizes, found = case.window(level), case.cell_sizes(level), edges(ax, LIGHT.window)
        axes = case.causal_axes(level) if cells else []
        assert len(found) == len(axes)
        for i, (start, stop) in zip(axes, found, strict=True):
            axis = case.drawn_axes[i]
            place = 1 if len(sizes) == 1 else i
            end = (max(cell[i] for cell in cells) + 1) * sizes[i]
            assert start[place] == stop[place] == pytest.approx(end)
            own = case.query_level
            if own is None:
                lengths = [shape[axis] for shape in case.shapes]
                own = lengths.index(max(lengths))
            scale = full[axis] / case.shapes[own][axis]
            now = (case.position[axis] // scale + 1) * scale  # the end of the query's own cell
            assert now - sizes[i] < end <= now
            other = 1 - place
            low, high = sorted((start[other], stop[other]))
            corners = [v[other] for polygon in outlines(ax, LIGHT.window) for v in polygon]
            assert (low, high) == pytest.approx((min(corners), max(corners)))


def test_the_view_shows_a_query_beyond_its_window() -> None:
    """A coarse cell that is not complete is not in the window, and the query is in it."""
    case = STREAM._replace(sizes=[Window((3, 1), causal=TIME), 3, Window((3, 1), causal=TIME)])
    figure = draw_attention(case.pyramid(), case.record(), margin=0)
    row, column = case.position
    for level, ax in enumerate(figure.axes[:3]):
        (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
        assert left <= column <= right
        assert top <= row <= bottom
        if level != 1:
            ((_, end), _) = edges(ax, LIGHT.window)[0]
            assert left < end
    ((_, end), _) = edges(figure.axes[0], LIGHT.window)[0]
    assert end < column


def test_windows_follow_the_level_of_the_query() -> None:
    case = STREAM._replace(sizes=[Window((3, 2), causal=TIME)] * 3)
    ends = []
    for query_level in (None, 1, 0, 2):
        ax = draw_attention(case.pyramid(), case._replace(query_level=query_level).record()).axes[1]
        ((_, end), _) = edges(ax, LIGHT.window)[0]
        ends.append(end)
    assert ends == [18, 18, 20, 18]


def test_the_legend_names_the_causal_edge_where_there_is_one() -> None:
    texts = []
    hidden = FLAT._replace(sizes=[Window(3, causal=(False, False, True))] * 2)
    for case in (BALL, STREAM, hidden):
        (legend,) = draw_attention(case.pyramid(), case.record(), axis=case.axis).legends
        texts.append([text.get_text() for text in legend.get_texts()])
    assert ["causal edge" in labels for labels in texts] == [False, True, False]


# ------------------------------------------------------------------------------------------ texts


NAMES: list[tuple[Any, list[str], list[str]]] = [
    (5, ["5 × 5 × 5"], ["ball", "dilation", "causal"]),
    ((5, 5, 1), ["5 × 5 × 1"], ["ball", "dilation", "causal"]),
    (Window((5, 5, 1), shape="ball"), ["5 × 5 × 1", "ball"], ["dilation", "causal"]),
    (Window(3, dilation=2), ["3 × 3 × 3", "dilation 2"], ["ball", "causal"]),
    (Window(3, dilation=(1, 1, 4)), ["dilation 1 × 1 × 4"], ["causal"]),
    (Window((3, 3, 8), causal=(False, False, True)), ["3 × 3 × 8", "causal", "$t"], ["ball"]),
    (Window(3, causal=(True, False, True)), ["causal", "x and $t"], ["y"]),
    (0, ["not attended"], ["window", "0"]),
]


@pytest.mark.parametrize(("size", "present", "absent"), NAMES)
def test_windows_are_named(
    size: Any, present: list[str], absent: list[str], tmp_path: Path
) -> None:
    case = Case(((16, 16, 16),) * 2, [size, 1], [5.0, 6.0, 7.0], axis=0)
    options: dict[str, Any] = {"axis": 0, "axis_names": ["x", "y", "$t"]}
    title = draw_attention(case.pyramid(), case.record(), **options).axes[0].get_title()
    write_explorer(tmp_path / "page.html", View(case.pyramid(), [case.record()], **options))
    (view,) = read(tmp_path / "page.html")["views"]
    for text in (
        title.split(":")[1].rpartition("\n")[0],
        ", ".join(view["records"][0]["windows"]["names"][0]),
    ):
        assert all(part in text for part in present), text
        assert not any(part in text for part in absent), text


# ------------------------------------------------------------------------------------ other input


@pytest.mark.parametrize(
    "sizes", [[3, 5], (3, 5), torch.tensor([3, 5]), np.array([3, 5]), [(3, 3), Window(5)]]
)
def test_sizes_are_given_as_those_of_a_block(sizes: Any) -> None:
    case = BALL._replace(sizes=sizes)
    assert case.record().neighborhood_sizes == (3, 5)
    boxes = [polygons[0] for polygons in in_figure(case)]
    assert list(map(area, boxes)) == [9, 25 * 4]


def test_a_level_without_a_window_shows_the_query() -> None:
    for case in (Case(((8,), (4,)), [3, 0], [5.25]), Case(((8, 8), (4, 4)), [3, 0], [5.25, 3.5])):
        ax = draw_attention(case.pyramid(), case.record(), margin=0).axes[1]
        assert ax.get_xlim()[0] < case.position[-1] < ax.get_xlim()[1]
        assert ax.get_ylim()[1] < ax.get_ylim()[0]
        assert outlines(ax, LIGHT.window) == []


def test_an_overview_draws_windows_of_all_levels_or_none() -> None:
    pyramid, record = STREAM.pyramid(), STREAM.record()
    assert outlines(draw_overview(pyramid, record), CATEGORICAL[0]) == []
    ax = draw_overview(pyramid, record, windows=True)
    assert len(outlines(ax, CATEGORICAL[0])) == 6
    assert len(edges(ax, CATEGORICAL[0])) == 2


def test_queries_beyond_the_map_leave_the_map_in_view() -> None:
    case = BALL._replace(position=[40.0, -30.0])
    ax = draw_overview(case.pyramid(), case.record())
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 20), (24, 0))
