"""Figures: their cells, windows, boxes, colors and texts."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from problems import make_scene, window_slots
from records import CUBE, IMAGE, LINE, SCENE, boxes_around, busiest_query, make_record

from vicinal import FeaturePyramid, NeighborhoodWeights, Window
from vicinal.visualize import AttentionRecord, draw_attention, draw_overview
from vicinal.visualize.image import to_uint8
from vicinal.visualize.palette import CATEGORICAL, LIGHT
from vicinal.visualize.projection import project_cells, project_record

PAST = (False, False, True)
FIELD_SIZES: Any = Window((5, 5, 4), (1, 2, 1), PAST, "ball"), Window((5, 5, 8), causal=PAST)
FIELD = make_scene(((6, 5, 8), (3, 5, 4)), FIELD_SIZES, (4,), 120)
ONE_LEVEL = make_scene(((400, 300),), (5,), (3,), 3000, distinct=True)


def corners(collection: PolyCollection) -> list[tuple[float, ...]]:
    """Left, top, right and bottom of each square."""
    return [tuple(map(float, path.get_extents().extents)) for path in collection.get_paths()]


def squares(ax: Axes, zorder: int) -> PolyCollection:
    (found,) = (x for x in ax.collections if x.get_zorder() == zorder)
    assert isinstance(found, PolyCollection)
    return found


def outlines(ax: Axes, color: str) -> list[tuple[float, ...]]:
    """Left, top, width and height of the frames of a color."""
    wanted = matplotlib.colors.to_rgba(color)
    return [
        (*patch.get_xy(), patch.get_width(), patch.get_height())
        for patch in ax.patches
        if isinstance(patch, Rectangle) and not patch.get_fill() and patch.get_edgecolor() == wanted
    ]


def markers(ax: Axes) -> list[list[float]]:
    """Column and row of each mark, one a line."""
    return [np.asarray(line.get_xydata())[0].tolist() for line in ax.lines]


def integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def percents(ax: Axes) -> list[str]:
    """The shares of the weight below a panel: of its points, then of its empty cells."""
    return re.findall(r"\d+%", ax.get_xlabel())


def texts(figure: Figure) -> list[Text]:
    """All visible texts."""
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def ticks_beyond_the_view(ax: Axes) -> list[Text]:
    """Labels that an axis keeps and does not draw."""
    hidden = []
    for axis, coordinate in ((ax.xaxis, 0), (ax.yaxis, 1)):
        low, high = sorted(axis.get_view_interval())
        for label in axis.get_ticklabels():
            if not low <= label.get_position()[coordinate] <= high:
                hidden.append(label)
    return hidden


def assert_texts_do_not_overlap(figure: Figure) -> None:
    inside, boxes = figure.bbox, []
    found = texts(figure)
    hidden = {id(label) for ax in figure.axes for label in ticks_beyond_the_view(ax)}
    for text in found:
        box = text.get_window_extent()
        if id(text) in hidden:
            continue
        boxes.append((text.get_text(), box))
        assert inside.x0 <= box.x0 <= box.x1 <= inside.x1, text
        assert inside.y0 <= box.y0 <= box.y1 <= inside.y1, text
    for (a, left), (b, right) in itertools.combinations(boxes, 2):
        assert not left.padded(-0.5).overlaps(right.padded(-0.5)), (a, b)


def expected_color(share: float) -> np.ndarray:
    """Between the palette's four colors, at the square root."""
    stops = np.array([[int(hex[i : i + 2], 16) / 255 for i in (1, 3, 5)] for hex in LIGHT.weights])
    at = math.sqrt(share) * 3
    return np.array([np.interp(at, range(4), stops[:, channel]) for channel in range(3)])


# ----------------------------------------------------------------------------- one query, by levels


@pytest.mark.parametrize("query", range(4))
def test_a_panel_per_level_holds_the_points_and_weights_of_the_query(query: int) -> None:
    record, by_point = make_record(SCENE, IMAGE)
    figure = draw_attention(SCENE.pyramid, record, query)
    *panels, bar = figure.axes
    assert len(panels) == 2
    means = {point: float(weights.mean()) for point, weights in by_point[query].items()}
    largest = max(means.values(), default=1.0)
    for level, ax in enumerate(panels):
        side = 2**level
        expected: dict[tuple[float, ...], float] = {}
        for point, mean in means.items():
            _, row, column, point_level = SCENE.pyramid.coordinates[point].tolist()
            if point_level == level:
                edges = (column, row, column + 1, row + 1)
                expected[tuple(float(edge * side) for edge in edges)] = mean
        drawn = squares(ax, 2)
        assert sorted(corners(drawn)) == sorted(expected)
        for square, color in zip(corners(drawn), np.asarray(drawn.get_facecolor()), strict=True):
            share = expected[square] / largest
            np.testing.assert_allclose(color[:3], expected_color(share), atol=0.02)
        assert percents(ax) == [f"{sum(expected.values()):.0%}"]
        size = record.neighborhood_sizes[level]  # type: ignore[index]
        assert integers(ax.get_title()) == [level, size, size, len(expected)]
    assert bar.get_ylim() == pytest.approx((0, largest))


@pytest.mark.parametrize("query", range(4))
def test_positions_of_windows_query_and_grid(query: int) -> None:
    record, _ = make_record(SCENE, IMAGE)
    position = record.positions[query]
    slots = window_slots(position, SCENE.pyramid.level_shapes, SCENE.sizes)
    figure = draw_attention(SCENE.pyramid, record, query, margin=2)
    for level, ax in enumerate(figure.axes[:2]):
        side, size = 2**level, SCENE.sizes[level]
        top, left = min(slot.cell for slot in slots if slot.level == level)
        assert outlines(ax, LIGHT.window) == [(left * side, top * side, size * side, size * side)]
        assert markers(ax) == [[float(position[1]), float(position[0])]]
        assert ax.get_xlim() == ((left - 2) * side, (left + size + 2) * side)
        assert ax.get_ylim() == ((top + size + 2) * side, (top - 2) * side)
        edges = [float((left - 2 + i) * side) for i in range(size + 5)]
        assert ax.xaxis.get_minorticklocs().tolist() == edges


def test_points_without_weight_are_gray() -> None:
    record, by_point = make_record(SCENE, IMAGE)
    query = busiest_query(SCENE, IMAGE)
    ax = draw_attention(SCENE.pyramid, record, query).axes[0]
    pyramid = SCENE.pyramid
    of_level = (pyramid.batch == IMAGE) & (pyramid.levels == 0)
    rows, columns = pyramid.cells[of_level].t()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    near = (columns + 1 > left) & (columns < right) & (rows + 1 > top) & (rows < bottom)
    attended = sum(int(SCENE.pyramid.levels[point]) == 0 for point in by_point[query])
    assert near.sum() > attended > 0
    assert len(corners(squares(ax, 1))) == near.sum()
    assert set(corners(squares(ax, 2))) < set(corners(squares(ax, 1)))


def test_a_row_per_head() -> None:
    record, by_point = make_record(SCENE, IMAGE)
    query = busiest_query(SCENE, IMAGE)
    figure = draw_attention(SCENE.pyramid, record, query, heads="each")
    rows = [figure.axes[:2], figure.axes[2:4], figure.axes[4:6]]
    weights = torch.stack(list(by_point[query].values()))
    levels = SCENE.pyramid.levels[list(by_point[query])]
    for head, row in enumerate(rows):
        assert row[0].get_ylabel().splitlines()[0] == f"head {head}"
        for level, ax in enumerate(row):
            share = float(weights[levels == level, head].sum())
            assert percents(ax) == [f"{share:.0%}"]
            assert len(corners(squares(ax, 2))) == int((levels == level).sum())
    assert figure.axes[-1].get_ylim() == pytest.approx((0, float(weights.max())))
    two = draw_attention(SCENE.pyramid, record, query, heads=[2, 0])
    assert [ax.get_ylabel().splitlines()[0] for ax in two.axes[:4:2]] == ["head 2", "head 0"]
    assert percents(two.axes[0]) == percents(rows[2][0])


def test_boxes_backgrounds_and_names() -> None:
    positions = SCENE.positions[6:]
    record, _ = make_record(
        SCENE,
        IMAGE,
        background=True,
        boxes=boxes_around(positions),
        labels=["a", "$x^2$", "c", "d"],
        scores=torch.tensor([0.1, 0.25, 0.3, 0.4]),
        name="decoder layer 2",
    )
    figure = draw_attention(SCENE.pyramid, record, 1)
    assert "$x^2$ 0.25" in figure.get_suptitle()
    assert "decoder layer 2" in figure.get_suptitle()
    (row, column), (height, width) = boxes_around(positions)[1].view(2, 2).tolist()
    empty = record.weights.background
    assert empty is not None
    for level, ax in enumerate(figure.axes[:2]):
        (box,) = outlines(ax, LIGHT.query)
        assert box == pytest.approx((column - width / 2, row - height / 2, width, height))
        assert percents(ax)[1:] == [f"{float(empty[1, level].mean()):.0%}"]
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 4  # query, window, box, other points


def test_without_windows_the_view_holds_all_attended_points() -> None:
    record, by_point = make_record(SCENE, IMAGE)
    record = dataclasses.replace(record, neighborhood_sizes=None)
    query = busiest_query(SCENE, IMAGE)
    figure = draw_attention(SCENE.pyramid, record, query, margin=0)
    attended = SCENE.pyramid.coordinates[list(by_point[query])]
    for level, ax in enumerate(figure.axes[:2]):
        assert outlines(ax, LIGHT.window) == []
        cells = attended[attended[:, -1] == level, 1:3]
        position = record.positions[query].tolist()
        right = max(position[1], int(cells[:, 1].max() + 1) * 2**level)
        assert ax.get_xlim()[1] == right
        assert len(corners(squares(ax, 2))) == len(cells)


CASES: dict[str, Callable[[], Figure]] = {
    "mean": lambda: draw_attention(SCENE.pyramid, make_record(SCENE, 1)[0], 2),
    "each head": lambda: draw_attention(SCENE.pyramid, make_record(SCENE, 1)[0], 2, heads="each"),
    "background": lambda: draw_attention(
        SCENE.pyramid, make_record(SCENE, 1, background=True)[0], 2, heads="each"
    ),
    "one level": lambda: draw_attention(ONE_LEVEL.pyramid, make_record(ONE_LEVEL, 0)[0], 0),
    "one dimension": lambda: draw_attention(LINE.pyramid, make_record(LINE, 0)[0], 0, heads="each"),
    "three dimensions": lambda: draw_attention(CUBE.pyramid, make_record(CUBE, 0)[0], 0, axis=2),
    "window shapes": lambda: draw_attention(
        FIELD.pyramid, make_record(FIELD, 0, background=True)[0], axis=1
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_texts_do_not_overlap_and_are_not_cut(name: str) -> None:
    assert_texts_do_not_overlap(CASES[name]())


def test_an_image_lies_over_the_whole_map() -> None:
    record, _ = make_record(SCENE, IMAGE)
    ink = torch.rand(32, 24)
    ax = draw_attention(SCENE.pyramid, record, 0, image=ink).axes[0]
    (drawn,) = ax.images
    assert tuple(drawn.get_extent()) == (0, 12, 16, 0)
    array = drawn.get_array()
    assert array is not None
    np.testing.assert_allclose(array[..., 3], 0.35 * ink.numpy(), atol=0.35 / 255)
    assert ax.get_xlim() != (0, 12)  # the view is the window's, not the image's
    colors = torch.rand(4, 3, 3)
    (drawn,) = draw_attention(SCENE.pyramid, record, 0, image=colors).axes[0].images
    assert drawn.get_zorder() < 1
    np.testing.assert_array_equal(drawn.get_array(), to_uint8(colors).numpy())


def test_a_query_without_neighbors() -> None:
    pyramid = FeaturePyramid(torch.zeros(0, 4), torch.zeros(0, 4).long(), ((6, 6), (3, 3)), 1)
    weights = NeighborhoodWeights(
        torch.tensor([0, 0]), torch.zeros(0).long(), torch.zeros(0, 2), None
    )
    record = AttentionRecord(torch.tensor([[2.5, 3.5]]), weights, (3, 5))
    figure = draw_attention(pyramid, record)
    assert integers(figure.axes[0].get_title()) == [0, 3, 3, 0]
    assert percents(figure.axes[1]) == ["0%"]
    record = dataclasses.replace(record, neighborhood_sizes=None)
    assert_texts_do_not_overlap(draw_attention(pyramid, record))
    draw_overview(pyramid, record).get_figure()


@pytest.mark.parametrize("dim", [1, 2])
def test_a_level_without_windows_and_points_shows_the_cell_of_the_query(dim: int) -> None:
    shapes = ((8,) * dim, (4,) * dim)
    pyramid = FeaturePyramid(torch.zeros(0, 1), torch.zeros(0, dim + 2).long(), shapes, 1)
    nothing = NeighborhoodWeights(
        torch.zeros(2).long(), torch.zeros(0).long(), torch.zeros(0, 1), None
    )
    record = AttentionRecord(torch.full((1, dim), 5.25), nothing)
    figure = draw_attention(pyramid, record, margin=0)
    assert [ax.get_xlim() for ax in figure.axes[:2]] == [(5, 6), (4, 6)]
    assert figure.axes[1].get_ylim() == ((6, 4) if dim == 2 else (1, 0))


# --------------------------------------------------------------------------------- other dimensions


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_three_dimensions_add_up_along_an_axis(axis: int | None) -> None:
    record, by_point = make_record(CUBE, 0, boxes=boxes_around(CUBE.positions))
    query = busiest_query(CUBE, 0)
    cells = CUBE.pyramid.coordinates[CUBE.pyramid.batch == 0, 1:].tolist()
    shown = [len({(*c[:i], *c[i + 1 :]) for c in map(tuple, cells)}) for i in range(3)]
    along = shown.index(max(shown)) if axis is None else axis  # it hides the fewest cells
    row, column = (other for other in range(3) if other != along)
    figure = draw_attention(CUBE.pyramid, record, query, axis=axis)
    shapes = CUBE.pyramid.level_shapes
    for level, ax in enumerate(figure.axes[:2]):
        height, width = (max(6, 5, 7) and max(s[i] for s in shapes) / shapes[level][i]
                         for i in (row, column))  # fmt: skip
        sums: dict[tuple[int, int], float] = {}
        for point, weights in by_point[query].items():
            _, *cell, point_level = CUBE.pyramid.coordinates[point].tolist()
            if point_level == level:
                square = (cell[row], cell[column])
                sums[square] = sums.get(square, 0) + float(weights.mean())
        expected = {
            tuple(round(x, 6) for x in (c * width, r * height, (c + 1) * width, (r + 1) * height))
            for r, c in sums
        }
        drawn = [tuple(round(x, 6) for x in square) for square in corners(squares(ax, 2))]
        assert len(drawn) == len(set(drawn)) == len(sums)
        assert set(drawn) == expected
        assert percents(ax) == [f"{sum(sums.values()):.0%}"]
        (box,) = outlines(ax, LIGHT.query)
        center, size = record.boxes[query].view(2, 3)  # type: ignore[index]
        assert box[2:] == pytest.approx((float(size[column]), float(size[row])))
        assert box[0] + box[2] / 2 == pytest.approx(float(center[column]))
    assert figure.get_suptitle().endswith(f"axis {along}")
    largest = figure.axes[-1].get_ylim()[1]
    projected = project_record(record, project_cells(CUBE.pyramid, 0, axis))
    assert largest == pytest.approx(float(projected.attended(query)[1].mean(1).max()))


def test_one_dimension_is_a_row_of_cells() -> None:
    record, by_point = make_record(LINE, 0, boxes=boxes_around(LINE.positions))
    query = busiest_query(LINE, 0)
    figure = draw_attention(LINE.pyramid, record, query, image=torch.rand(1, 40))
    for level, ax in enumerate(figure.axes[:2]):
        side = 2**level
        cells = {
            int(cell)
            for cell, point_level in LINE.pyramid.coordinates[list(by_point[query]), 1:].tolist()
            if point_level == level
        }
        expected = {(float(c * side), 0.0, float((c + 1) * side), 1.0) for c in cells}
        assert set(corners(squares(ax, 2))) == expected
        assert ax.get_ylim() == (1, 0)
        assert ax.get_aspect() == "auto"
        assert markers(ax) == [[float(record.positions[query, 0]), 0.5]]


def test_points_that_share_a_cell_are_one_square() -> None:
    scene = make_scene(((3, 2),), (5,), (1,), 40)
    record, by_point = make_record(scene, 0)
    figure = draw_attention(scene.pyramid, record)
    assert len(by_point[0]) > 6
    assert len(corners(squares(figure.axes[0], 2))) <= 6
    assert integers(figure.axes[0].get_title())[-1] == len(by_point[0])
    assert percents(figure.axes[0]) == ["100%"]


# -------------------------------------------------------------------------------------- all queries


@pytest.mark.parametrize("level", [None, 0, 1])
def test_the_overview_draws_the_points_of_each_query(level: int | None) -> None:
    positions = SCENE.positions[6:]
    record, by_point = make_record(SCENE, IMAGE, boxes=boxes_around(positions))
    ax = draw_overview(SCENE.pyramid, record, queries=torch.tensor([3, 1]), level=level, crop="map")
    dots = [x for x in ax.collections if isinstance(x, PathCollection)]
    for query, drawn in zip([3, 1], dots, strict=True):
        expected = {}
        for point, weights in by_point[query].items():
            _, row, column, at = SCENE.pyramid.coordinates[point].tolist()
            if level in (None, at):
                expected[(column + 0.5) * 2**at, (row + 0.5) * 2**at] = float(weights.mean())
        points = [tuple(point) for point in np.asarray(drawn.get_offsets()).tolist()]
        assert sorted(points) == sorted(expected)
        areas = np.array([expected[point] for point in points])
        if len(areas):
            np.testing.assert_allclose(drawn.get_sizes(), areas / areas.max() * 60)
        (box,) = outlines(ax, CATEGORICAL[query])
        row, column, height, width = boxes_around(positions)[query].tolist()
        assert box == pytest.approx((column - width / 2, row - height / 2, width, height))
    assert ax.get_xlim() == (0, 12)
    assert ax.get_ylim() == (16, 0)


def test_labels_of_the_overview_do_not_overlap() -> None:
    crowd = make_scene(((20, 20), (10, 10)), (3, 5), (40,), 200, distinct=True)
    scores = torch.rand(40)
    record, _ = make_record(
        crowd,
        0,
        boxes=boxes_around(crowd.positions),
        labels=[f"a long name {i}" for i in range(40)],
        scores=scores,
    )
    ax = draw_overview(crowd.pyramid, record)
    assert isinstance(ax.figure, Figure)
    assert_texts_do_not_overlap(ax.figure)
    shown = {text.get_text() for text in ax.texts}
    assert 3 < len(shown) < 40
    inside = ((crowd.positions > 3) & (crowd.positions < 17)).all(1)
    surest = int(scores.masked_fill(~inside, -1).argmax())
    assert f"a long name {surest} {float(scores[surest]):.2f}" in shown


def test_an_overview_without_boxes_in_given_axes() -> None:
    record, _ = make_record(SCENE, IMAGE, labels=["a", "b", "c", "d"])
    ax = Figure().subplots()
    assert draw_overview(SCENE.pyramid, record, image=torch.rand(4, 3), ax=ax) is ax
    assert markers(ax) == record.positions.flip(1).tolist()
    assert len(ax.images) == 1


def test_an_overview_of_three_dimensions() -> None:
    record, _ = make_record(CUBE, 0)
    ax = draw_overview(CUBE.pyramid, record, axis=1, axis_names=["x", "y", "$z"], crop="map")
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("x", "$z")
    assert ax.get_xlim() == (0, 7)
    assert ax.get_ylim() == (6, 0)


# --------------------------------------------------------------------------------------- large maps


def wall(n: int) -> tuple[FeaturePyramid, AttentionRecord]:
    """Points on a line of cells across a part of a large map, and a query on the first of them."""
    cells = torch.full((n, 3), 40)
    cells[:, 0] = 700 + torch.arange(n)
    cells[:, 2] = 20 + torch.arange(n) % 30
    coordinates = torch.nn.functional.pad(cells, (1, 1))
    pyramid = FeaturePyramid(torch.zeros(n, 1), coordinates, ((4000, 4000, 80),), 1)
    weights = NeighborhoodWeights(
        torch.tensor([0, n]), torch.arange(n), torch.full((n, 1), 1 / n), None
    )
    return pyramid, AttentionRecord(pyramid.positions()[:1], weights)


def dark_pixels(figure: Figure, darkest: int) -> int:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return int((np.asarray(canvas.buffer_rgba())[..., :3].max(-1) < darkest).sum())


def test_cells_smaller_than_a_pixel_are_visible() -> None:
    pyramid, record = wall(400)
    none = torch.zeros(0).long()
    whole = draw_overview(pyramid, record, axis=2, queries=none, crop="map")
    frame = draw_overview(pyramid, record, axis=2, queries=none, crop=torch.tensor(
        [[0, 2000, 0], [4000, 4000, 80]]))  # fmt: skip
    visible = dark_pixels(whole.figure, 190) - dark_pixels(frame.figure, 190)  # type: ignore[arg-type]
    assert visible > 40  # of the 60 that 400 of 4000 cells take


def test_attended_cells_smaller_than_a_pixel_keep_the_color_of_their_weight() -> None:
    pyramid, record = wall(400)
    apart = torch.tensor([[0, 0, 0, 0, 0], [0, 3999, 3999, 0, 0]])
    pyramid = FeaturePyramid(torch.zeros(2, 1), apart, pyramid.level_shapes, 1)
    weights = NeighborhoodWeights(
        torch.tensor([0, 2]), torch.arange(2), torch.full((2, 1), 0.5), None
    )
    record = AttentionRecord(torch.tensor([[2000.0, 9.0, 1.0]]), weights)
    figure = draw_attention(pyramid, record, axis=2)
    ink = tuple(int(LIGHT.weights[-1][i : i + 2], 16) for i in (1, 3, 5))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    left = np.asarray(canvas.buffer_rgba())[:, : canvas.get_width_height()[0] * 2 // 3, :3]
    assert (np.abs(left.astype(int) - ink).max(-1) < 100).sum() >= 2


def test_the_overview_shows_what_is_occupied() -> None:
    pyramid, record = wall(400)
    ax = draw_overview(pyramid, record, axis=1)
    assert ax.get_ylim() == pytest.approx((1100 + 8, 700 - 8))  # 2 % of 400 cells
    assert ax.get_xlim() == pytest.approx((18, 52))  # 2 cells
    given = torch.tensor([[650, 0, 10], [900, 60, 70.5]])
    crops: tuple[Any, ...] = given, given.numpy(), np.asfortranarray(given.double())
    for crop in crops:
        ax = draw_overview(pyramid, record, axis=1, crop=crop)
        assert (ax.get_xlim(), ax.get_ylim()) == ((10, 70.5), (900, 650))


def test_queries_and_images_may_be_arrays() -> None:
    record, _ = make_record(SCENE, 0, boxes=boxes_around(SCENE.positions[:6]))
    queries, image = torch.tensor([3, 1]), torch.rand(4, 3)
    given: list[tuple[Any, Any]] = [(queries, image), (queries.numpy(), image.numpy())]
    drawn = [
        draw_overview(SCENE.pyramid, record, queries=chosen, image=picture)
        for chosen, picture in given
    ]
    for color in (CATEGORICAL[3], CATEGORICAL[1]):
        first, second = (outlines(ax, color) for ax in drawn)
        assert first == second
        assert len(first) == 1
    pixels = [np.asarray(ax.images[0].get_array()) for ax in drawn]
    np.testing.assert_array_equal(pixels[0], pixels[1])


def test_a_label_at_the_edge_keeps_its_frame() -> None:
    """The label of a box at the top of the view has no room above it."""
    pyramid, _ = wall(400)
    box = torch.tensor([[707.0, 40, 30, 30, 30, 30]])
    nothing = NeighborhoodWeights(
        torch.zeros(2).long(), torch.zeros(0).long(), torch.zeros(0, 1), None
    )
    record = AttentionRecord(box[:, :3], nothing, boxes=box, labels=["car"])
    for top in (664, 667, 670, 673):
        crop = torch.tensor([[top, -500, 0], [top + 1000, 500, 80]])
        ax = draw_overview(pyramid, record, axis=2, crop=crop)
        frame = ax.get_window_extent()
        FigureCanvasAgg(ax.figure).draw()  # type: ignore[arg-type]
        assert ax.texts
        for text in ax.texts:
            patch = text.get_bbox_patch()
            assert patch is not None
            assert patch.get_window_extent().y1 <= frame.y1


@pytest.mark.parametrize("size", [2**23, 2**30])
def test_large_coordinates_are_written_in_full(size: int) -> None:
    last = size - 3
    coordinates = torch.tensor([[0, last, last, 0]])
    pyramid = FeaturePyramid(torch.zeros(1, 1), coordinates, ((size, size),), 1)
    weights = NeighborhoodWeights(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1, 1), None)
    record = AttentionRecord(pyramid.positions(torch.float64), weights, (3,))
    figures = [draw_attention(pyramid, record), draw_overview(pyramid, record).figure]
    for figure in figures:
        FigureCanvasAgg(figure).draw()  # type: ignore[arg-type]
        ax = figure.axes[0]
        for axis, (low, high) in (
            (ax.xaxis, sorted(ax.get_xlim())),
            (ax.yaxis, sorted(ax.get_ylim())),
        ):
            assert axis.get_offset_text().get_text() == ""
            shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
            texts = [text.get_text() for text in axis.get_ticklabels()]
            assert 1 <= len(shown) <= 4
            assert {str(int(tick)) for tick in shown} <= set(texts)
        assert_texts_do_not_overlap(figure)  # type: ignore[arg-type]


def test_the_axis_to_look_along_hides_the_fewest_cells() -> None:
    pyramid, record = wall(400)
    ax = draw_overview(pyramid, record, axis_names=["x", "y", "z"])
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("x", "z")
    assert draw_attention(pyramid, record).get_suptitle().endswith("axis 1")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("crop", "all"),
        ("crop", torch.zeros(2, 2)),
        ("crop", torch.zeros(2, 3)),
        ("crop", np.zeros((2, 3))),
        ("crop", np.zeros((3, 2))),
        ("crop", torch.tensor([[0, 0, 0], [9, torch.inf, 9]])),
        ("axis_names", "xyz"),
        ("axis_names", ["x", "y"]),
        ("axis_names", ["x", "y", 3]),
    ],
)
def test_wrong_views_are_refused(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}.*: expected"):
        draw_overview(*wall(5), **{argument: value})  # type: ignore[arg-type]
