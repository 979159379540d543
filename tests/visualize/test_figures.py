"""Figures of attention, by what stands in them; records and pictures; refusals."""

import dataclasses
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from problems import Scene, make_inputs, make_scene, run_python, scenes, window_slots
from torch import Tensor

from vicinal import FeaturePyramid, NeighborhoodWeights, neighborhood_attention_weights
from vicinal.visualize import AttentionRecord, View, draw_attention, draw_overview
from vicinal.visualize.flat import find_places, flatten
from vicinal.visualize.palette import DARK, DISTINCT, LIGHT, Palette
from vicinal.visualize.picture import as_picture, encode_png

HEADS = 3
SCENE = make_scene(((16, 12), (8, 6)), (3, 5), (6, 4), 150, distinct=True)
ONE_LEVEL = make_scene(((400, 300),), (5,), (3,), 3000, distinct=True)
LINE = make_scene(((40,), (20,)), (5, 7), (5, 0), 40)
CUBE = make_scene(((6, 5, 7), (3, 5, 4)), (3, 5), (4,), 120)
IMAGE = 1  # queries 6 to 9
PAGE = "src/vicinal/visualize/page"


def look(
    scene: Scene, image: int, *, background: bool = False, **options: Any
) -> tuple[AttentionRecord, dict[int, dict[int, Tensor]]]:
    """A record of all the image's queries, and by query and point the weights ``[H]`` it holds."""
    plan = scene.plan()
    inputs = make_inputs(plan, heads=HEADS, background=background)
    queries = torch.arange(int(scene.offsets[image]), int(scene.offsets[image + 1]))
    weights = neighborhood_attention_weights(
        inputs.q, inputs.k, plan, background=inputs.background, queries=queries
    )
    record = AttentionRecord(
        scene.positions[queries], weights, scene.sizes, batch_index=image, **options
    )
    by_point: dict[int, dict[int, Tensor]] = {}
    for query, (start, stop) in enumerate(itertools.pairwise(weights.offsets.tolist())):
        pairs = zip(weights.points[start:stop].tolist(), weights.weights[start:stop], strict=True)
        by_point[query] = dict(pairs)
    return record, by_point


def boxes_around(positions: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 + 4 * torch.rand(positions.shape, generator=generator, dtype=positions.dtype)
    return torch.cat((positions, sizes), 1)


def seeing(scene: Scene, image: int) -> int:
    """The query of the image that sees the most points."""
    first, last = int(scene.offsets[image]), int(scene.offsets[image + 1])
    return int(scene.plan().counts()[first:last].argmax())


def corners(collection: PolyCollection) -> list[tuple[float, ...]]:
    """Left, top, right and bottom of each square."""
    return [tuple(map(float, path.get_extents().extents)) for path in collection.get_paths()]


def squares(ax: Axes, zorder: int) -> PolyCollection:
    (found,) = (x for x in ax.collections if x.get_zorder() == zorder)
    assert isinstance(found, PolyCollection)
    return found


def outlines(ax: Axes, color: str) -> list[tuple[float, ...]]:
    """Left, top, width and height of the frames of a colour."""
    wanted = matplotlib.colors.to_rgba(color)
    return [
        (*patch.get_xy(), patch.get_width(), patch.get_height())
        for patch in ax.patches
        if isinstance(patch, Rectangle) and not patch.get_fill() and patch.get_edgecolor() == wanted
    ]


def markers(ax: Axes) -> list[list[float]]:
    """Column and row of each mark, one a line."""
    return [np.asarray(line.get_xydata())[0].tolist() for line in ax.lines]


def texts(figure: Figure) -> list[Text]:
    """All texts that are seen."""
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


def assert_no_text_covers_another(figure: Figure) -> None:
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
    """Between the palette's four colours, at the square root."""
    stops = np.array([[int(hex[i : i + 2], 16) / 255 for i in (1, 3, 5)] for hex in LIGHT.weights])
    at = math.sqrt(share) * 3
    return np.array([np.interp(at, range(4), stops[:, channel]) for channel in range(3)])


# --------------------------------------------------------------------------- one query, by levels


@pytest.mark.parametrize("query", range(4))
def test_a_panel_per_level_holds_the_points_and_weights_of_the_query(query: int) -> None:
    record, by_point = look(SCENE, IMAGE)
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
        assert ax.get_xlabel() == f"{sum(expected.values()):.0%} of the weight"
        plural = "" if len(expected) == 1 else "s"
        size = record.neighborhood_sizes[level]  # type: ignore[index]
        title = f"level {level}: window {size} × {size}\n{len(expected)} point{plural}"
        assert ax.get_title() == title
    assert bar.get_ylabel() == "attention weight"
    assert bar.get_ylim() == pytest.approx((0, largest))


@pytest.mark.parametrize("query", range(4))
def test_windows_query_and_grid_stand_where_they_belong(query: int) -> None:
    record, _ = look(SCENE, IMAGE)
    position = record.positions[query]
    slots = window_slots(position, SCENE.pyramid.level_shapes, SCENE.sizes)
    figure = draw_attention(SCENE.pyramid, record, query, margin=2)
    for level, ax in enumerate(figure.axes[:2]):
        side, size = 2**level, SCENE.sizes[level]
        top, left = min(slot.cell for slot in slots if slot.level == level)
        assert outlines(ax, LIGHT.frame) == [(left * side, top * side, size * side, size * side)]
        assert markers(ax) == [[float(position[1]), float(position[0])]]
        assert ax.get_xlim() == ((left - 2) * side, (left + size + 2) * side)
        assert ax.get_ylim() == ((top + size + 2) * side, (top - 2) * side)
        edges = [float((left - 2 + i) * side) for i in range(size + 5)]
        assert ax.xaxis.get_minorticklocs().tolist() == edges


def test_other_points_nearby_are_grey() -> None:
    record, by_point = look(SCENE, IMAGE)
    query = seeing(SCENE, IMAGE)
    ax = draw_attention(SCENE.pyramid, record, query).axes[0]
    pyramid = SCENE.pyramid
    of_level = (pyramid.batch == IMAGE) & (pyramid.levels == 0)
    rows, columns = pyramid.cells[of_level].t()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    near = (columns + 1 > left) & (columns < right) & (rows + 1 > top) & (rows < bottom)
    seen = sum(int(SCENE.pyramid.levels[point]) == 0 for point in by_point[query])
    assert near.sum() > seen > 0
    assert len(corners(squares(ax, 1))) == near.sum()
    assert set(corners(squares(ax, 2))) < set(corners(squares(ax, 1)))


def test_a_row_per_head() -> None:
    record, by_point = look(SCENE, IMAGE)
    query = seeing(SCENE, IMAGE)
    figure = draw_attention(SCENE.pyramid, record, query, heads="each")
    rows = [figure.axes[:2], figure.axes[2:4], figure.axes[4:6]]
    weights = torch.stack(list(by_point[query].values()))
    levels = SCENE.pyramid.levels[list(by_point[query])]
    for head, row in enumerate(rows):
        assert row[0].get_ylabel() == f"head {head}"
        for level, ax in enumerate(row):
            share = float(weights[levels == level, head].sum())
            assert ax.get_xlabel() == f"{share:.0%} of the weight"
            assert len(corners(squares(ax, 2))) == int((levels == level).sum())
    assert figure.axes[-1].get_ylim() == pytest.approx((0, float(weights.max())))
    two = draw_attention(SCENE.pyramid, record, query, heads=[2, 0])
    assert [ax.get_ylabel() for ax in two.axes[:4:2]] == ["head 2", "head 0"]
    assert two.axes[0].get_xlabel() == rows[2][0].get_xlabel()


def test_boxes_backgrounds_and_names() -> None:
    positions = SCENE.positions[6:]
    record, _ = look(
        SCENE,
        IMAGE,
        background=True,
        boxes=boxes_around(positions),
        labels=["a", "$x^2$", "c", "d"],
        scores=torch.tensor([0.1, 0.25, 0.3, 0.4]),
        name="decoder layer 2",
    )
    figure = draw_attention(SCENE.pyramid, record, 1)
    assert figure.get_suptitle() == "What $x^2$ 0.25 attends to: decoder layer 2"
    (row, column), (height, width) = boxes_around(positions)[1].view(2, 2).tolist()
    empty = record.weights.background
    assert empty is not None
    for level, ax in enumerate(figure.axes[:2]):
        (box,) = outlines(ax, LIGHT.query)
        assert box == pytest.approx((column - width / 2, row - height / 2, width, height))
        share = f"{float(empty[1, level].mean()):.0%} on empty cells"
        assert ax.get_xlabel().split("\n")[1] == share
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["query", "its window", "its box", "points it does not attend to"]


def test_without_windows_all_that_is_attended_is_in_sight() -> None:
    record, by_point = look(SCENE, IMAGE)
    record = dataclasses.replace(record, neighborhood_sizes=None)
    query = seeing(SCENE, IMAGE)
    figure = draw_attention(SCENE.pyramid, record, query, margin=0)
    seen = SCENE.pyramid.coordinates[list(by_point[query])]
    for level, ax in enumerate(figure.axes[:2]):
        assert outlines(ax, LIGHT.frame) == []
        cells = seen[seen[:, -1] == level, 1:3]
        position = record.positions[query].tolist()
        right = max(position[1], int(cells[:, 1].max() + 1) * 2**level)
        assert ax.get_xlim()[1] == right
        assert len(corners(squares(ax, 2))) == len(cells)


CASES: dict[str, Callable[[], Figure]] = {
    "mean": lambda: draw_attention(SCENE.pyramid, look(SCENE, 1)[0], 2),
    "each head": lambda: draw_attention(SCENE.pyramid, look(SCENE, 1)[0], 2, heads="each"),
    "background": lambda: draw_attention(
        SCENE.pyramid, look(SCENE, 1, background=True)[0], 2, heads="each"
    ),
    "one level": lambda: draw_attention(ONE_LEVEL.pyramid, look(ONE_LEVEL, 0)[0], 0),
    "one dimension": lambda: draw_attention(LINE.pyramid, look(LINE, 0)[0], 0, heads="each"),
    "three dimensions": lambda: draw_attention(CUBE.pyramid, look(CUBE, 0)[0], 0, axis=2),
}


@pytest.mark.parametrize("name", CASES)
def test_no_text_covers_another_or_is_cut(name: str) -> None:
    assert_no_text_covers_another(CASES[name]())


def test_an_image_lies_over_the_whole_map() -> None:
    record, _ = look(SCENE, IMAGE)
    ink = torch.rand(32, 24)
    ax = draw_attention(SCENE.pyramid, record, 0, image=ink).axes[0]
    (drawn,) = ax.images
    assert tuple(drawn.get_extent()) == (0, 12, 16, 0)
    array = drawn.get_array()
    assert array is not None
    np.testing.assert_allclose(array[..., 3], 0.35 * ink.numpy(), atol=0.35 / 255)
    assert ax.get_xlim() != (0, 12)  # the view is the window's, not the image's
    colours = torch.rand(4, 3, 3)
    (drawn,) = draw_attention(SCENE.pyramid, record, 0, image=colours).axes[0].images
    assert drawn.get_zorder() < 1
    np.testing.assert_array_equal(drawn.get_array(), as_picture(colours).numpy())


def test_a_query_that_sees_nothing() -> None:
    pyramid = FeaturePyramid(torch.zeros(0, 4), torch.zeros(0, 4).long(), ((6, 6), (3, 3)), 1)
    weights = NeighborhoodWeights(
        torch.tensor([0, 0]), torch.zeros(0).long(), torch.zeros(0, 2), None
    )
    record = AttentionRecord(torch.tensor([[2.5, 3.5]]), weights, (3, 5))
    figure = draw_attention(pyramid, record)
    assert figure.axes[0].get_title() == "level 0: window 3 × 3\n0 points"
    assert figure.axes[1].get_xlabel() == "0% of the weight"
    record = dataclasses.replace(record, neighborhood_sizes=None)
    assert_no_text_covers_another(draw_attention(pyramid, record))
    draw_overview(pyramid, record).get_figure()


# ------------------------------------------------------------------------------- other dimensions


@given(scene=scenes(), axis=st.integers(0, 2))
@settings(max_examples=30)
def test_windows_places_and_weights_in_two_axes(scene: Scene, axis: int) -> None:
    dim, shapes = scene.pyramid.position_dim, scene.pyramid.level_shapes
    shown = [other for other in range(dim) if dim < 3 or other != axis]
    full = [max(sizes) for sizes in zip(*shapes, strict=True)]
    for image in range(scene.pyramid.batch_size):
        record, by_point = look(scene, image)
        places = find_places(scene.pyramid, image, axis if dim == 3 else None)
        flat = flatten(record, places)
        assert flat.windows is not None
        for query, weights in by_point.items():
            slots = window_slots(record.positions[query], shapes, scene.sizes)
            for level in range(len(shapes)):
                cells = [slot.cell for slot in slots if slot.level == level]
                widths = [full[i] / shapes[level][i] for i in range(dim)]
                edges = [
                    [min(cell[i] for cell in cells) * widths[i] for i in shown],
                    [max(cell[i] + 1 for cell in cells) * widths[i] for i in shown],
                ]
                window = flat.windows[query, level].tolist()
                for corner, edge, row in zip(window, edges, (0, 1), strict=True):
                    assert corner == pytest.approx(edge if dim > 1 else [row, *edge])
            sums: dict[tuple[int, ...], Tensor] = {}
            for point, heads in weights.items():
                _, *cell, level = scene.pyramid.coordinates[point].tolist()
                place = (level, *([0] * (dim == 1)), *(cell[i] for i in shown))
                sums[place] = sums.get(place, torch.zeros(HEADS)) + heads
            seen, summed = flat.of(query)
            named = torch.cat((places.levels[seen, None], places.cells[seen]), 1).tolist()
            assert {tuple(place) for place in named} == sums.keys()
            for place, heads in zip(named, summed, strict=True):
                torch.testing.assert_close(heads, sums[tuple(place)], check_dtype=False)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_three_dimensions_add_up_along_an_axis(axis: int | None) -> None:
    record, by_point = look(CUBE, 0, boxes=boxes_around(CUBE.positions))
    query = seeing(CUBE, 0)
    along = 0 if axis is None else axis
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
                place = (cell[row], cell[column])
                sums[place] = sums.get(place, 0) + float(weights.mean())
        expected = {
            tuple(round(x, 6) for x in (c * width, r * height, (c + 1) * width, (r + 1) * height))
            for r, c in sums
        }
        drawn = [tuple(round(x, 6) for x in square) for square in corners(squares(ax, 2))]
        assert len(drawn) == len(set(drawn)) == len(sums)
        assert set(drawn) == expected
        assert ax.get_xlabel() == f"{sum(sums.values()):.0%} of the weight"
        (box,) = outlines(ax, LIGHT.query)
        center, size = record.boxes[query].view(2, 3)  # type: ignore[index]
        assert box[2:] == pytest.approx((float(size[column]), float(size[row])))
        assert box[0] + box[2] / 2 == pytest.approx(float(center[column]))
    assert figure.get_suptitle().endswith(f", along axis {along}")
    largest = figure.axes[-1].get_ylim()[1]
    flat = flatten(record, find_places(CUBE.pyramid, 0, axis))
    assert largest == pytest.approx(float(flat.of(query)[1].mean(1).max()))


def test_one_dimension_is_a_row_of_cells() -> None:
    record, by_point = look(LINE, 0, boxes=boxes_around(LINE.positions))
    query = seeing(LINE, 0)
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
    record, by_point = look(scene, 0)
    figure = draw_attention(scene.pyramid, record)
    assert len(by_point[0]) > 6
    assert len(corners(squares(figure.axes[0], 2))) <= 6
    assert figure.axes[0].get_title().endswith(f"{len(by_point[0])} points")
    assert figure.axes[0].get_xlabel() == "100% of the weight"


# -------------------------------------------------------------------------------------- all queries


@pytest.mark.parametrize("level", [None, 0, 1])
def test_the_overview_draws_the_points_of_each_query(level: int | None) -> None:
    positions = SCENE.positions[6:]
    record, by_point = look(SCENE, IMAGE, boxes=boxes_around(positions))
    ax = draw_overview(SCENE.pyramid, record, queries=torch.tensor([3, 1]), level=level)
    dots = [x for x in ax.collections if isinstance(x, PathCollection)]
    for query, drawn in zip([3, 1], dots, strict=True):
        expected = {}
        for point, weights in by_point[query].items():
            _, row, column, at = SCENE.pyramid.coordinates[point].tolist()
            if level in (None, at):
                expected[(column + 0.5) * 2**at, (row + 0.5) * 2**at] = float(weights.mean())
        places = [tuple(place) for place in np.asarray(drawn.get_offsets()).tolist()]
        assert sorted(places) == sorted(expected)
        areas = np.array([expected[place] for place in places])
        if len(areas):
            np.testing.assert_allclose(drawn.get_sizes(), areas / areas.max() * 60)
        (box,) = outlines(ax, DISTINCT[query])
        row, column, height, width = boxes_around(positions)[query].tolist()
        assert box == pytest.approx((column - width / 2, row - height / 2, width, height))
    assert ax.get_xlim() == (0, 12)
    assert ax.get_ylim() == (16, 0)


def test_names_in_the_overview_cover_no_other_name() -> None:
    crowd = make_scene(((20, 20), (10, 10)), (3, 5), (40,), 200, distinct=True)
    scores = torch.rand(40)
    record, _ = look(
        crowd,
        0,
        boxes=boxes_around(crowd.positions),
        labels=[f"a long name {i}" for i in range(40)],
        scores=scores,
    )
    ax = draw_overview(crowd.pyramid, record)
    assert isinstance(ax.figure, Figure)
    assert_no_text_covers_another(ax.figure)
    shown = {text.get_text() for text in ax.texts}
    assert 3 < len(shown) < 40
    inside = ((crowd.positions > 3) & (crowd.positions < 17)).all(1)
    surest = int(scores.masked_fill(~inside, -1).argmax())
    assert f"a long name {surest} {float(scores[surest]):.2f}" in shown


def test_an_overview_without_boxes_in_given_axes() -> None:
    record, _ = look(SCENE, IMAGE, labels=["a", "b", "c", "d"])
    ax = Figure().subplots()
    assert draw_overview(SCENE.pyramid, record, image=torch.rand(4, 3), ax=ax) is ax
    assert markers(ax) == record.positions.flip(1).tolist()
    assert len(ax.images) == 1


def test_an_overview_of_three_dimensions() -> None:
    record, _ = look(CUBE, 0)
    ax = draw_overview(CUBE.pyramid, record, axis=1)
    assert ax.get_xlim() == (0, 7)
    assert ax.get_ylim() == (6, 0)


# ----------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (64, 3, 3)])
def test_pictures_come_back_from_png(shape: tuple[int, ...]) -> None:
    picture = torch.randint(256, shape, dtype=torch.uint8)
    decoded = imread(io.BytesIO(encode_png(picture)))
    back = (decoded * 255).round().astype(np.uint8)
    if len(shape) == 2:
        assert not back[..., :-1].any()
        back = back[..., -1]
    np.testing.assert_array_equal(back, picture.numpy())


def test_floating_pictures_are_rounded() -> None:
    assert as_picture(torch.tensor([[0, 0.5, 1]])).tolist() == [[0, 128, 255]]
    assert as_picture(torch.tensor([[0, 128, 255]], dtype=torch.uint8)).tolist() == [[0, 128, 255]]


# ------------------------------------------------------------------------------------------ colours


def luminance(color: str) -> float:
    """Relative luminance, as in the Web Content Accessibility Guidelines 2.1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_colours_stand_out(palette: Palette) -> None:
    for text in (palette.ink, palette.muted):
        assert min(contrast(text, palette.paper), contrast(text, palette.beyond)) > 4.5
    for line in (palette.frame, palette.query, palette.weights[-1]):
        assert contrast(line, palette.paper) > 3
    steps = [luminance(palette.paper), *map(luminance, palette.weights)]
    if palette is LIGHT:
        steps = [-step for step in steps]
    assert steps == sorted(steps)  # lightness alone tells weights apart


# ----------------------------------------------------------------------------------------- refusals


def changed(**fields: Any) -> Callable[[], object]:
    return lambda: dataclasses.replace(look(SCENE, IMAGE)[0], **fields)


def drawn(**options: Any) -> Callable[[], object]:
    fields = {
        name: options.pop(name) for name in list(options) if name in AttentionRecord.__annotations__
    }
    record = dataclasses.replace(look(SCENE, IMAGE)[0], **fields)
    pyramid = options.pop("pyramid", SCENE.pyramid)
    draw = options.pop("draw", draw_attention)
    return lambda: draw(pyramid, record, **options)


WEIGHTS = look(SCENE, IMAGE)[0].weights
HYPERCUBE = make_scene(((2, 2, 2, 2),), (3,), (2,), 4)
REFUSALS: list[tuple[Callable[[], object], str, str]] = [
    (changed(positions=torch.zeros(4, 2).long()), "positions", "int64"),
    (changed(positions=torch.full((4, 2), math.nan)), "positions", "nan"),
    (changed(positions=torch.zeros(3, 2)), "weights.offsets", "[5]"),
    (changed(weights=torch.zeros(3)), "weights", "float32"),
    (changed(weights=WEIGHTS._replace(points=WEIGHTS.points[1:])), "weights.weights", ""),
    (changed(weights=WEIGHTS._replace(offsets=WEIGHTS.offsets.flip(0))), "weights.offsets", ""),
    (changed(weights=WEIGHTS._replace(weights=WEIGHTS.weights / 0)), "weights.weights", "inf"),
    (changed(weights=WEIGHTS._replace(background=torch.zeros(4, 2))), "weights.background", ""),
    (changed(levels=torch.zeros(4)), "levels", "float32"),
    (changed(boxes=torch.zeros(4, 2)), "boxes", "[4, 2]"),
    (changed(boxes=torch.full((4, 4), math.inf)), "boxes", "inf"),
    (changed(scores=torch.zeros(5)), "scores", "[5]"),
    (changed(scores=torch.full((4,), math.nan)), "scores", "nan"),
    (changed(labels=["a"]), "labels", "1"),
    (changed(labels="abcd"), "labels", "abcd"),
    (changed(labels=[1, 2, 3, 4]), "labels", "[1, 2, 3, 4]"),
    (drawn(pyramid=None), "pyramid", "None"),
    (lambda: draw_attention(SCENE.pyramid, WEIGHTS), "record", "NeighborhoodWeights"),  # type: ignore[arg-type]
    (drawn(pyramid=CUBE.pyramid), "positions", "[4, 2]"),
    (drawn(batch_index=2), "batch_index", "2"),
    (drawn(batch_index=0), "weights.points", "image 1"),
    (drawn(weights=WEIGHTS._replace(points=WEIGHTS.points + 123)), "weights.points", "to 2"),
    (drawn(neighborhood_sizes=(3,)), "neighborhood_sizes", "[3]"),
    (drawn(neighborhood_sizes=(3, 4)), "neighborhood_sizes", "[3, 4]"),
    (drawn(levels=torch.tensor([0, 1, 2, 0])), "levels", "2"),
    (
        drawn(weights=WEIGHTS._replace(background=torch.zeros(4, 3, HEADS))),
        "weights.background",
        "3",
    ),
    (drawn(query=4), "query", "4"),
    (drawn(query=-1), "query", "-1"),
    (drawn(heads="all"), "heads", "all"),
    (drawn(heads=[0, 3]), "heads", "[0, 3]"),
    (drawn(heads=[]), "heads", "[]"),
    (drawn(margin=-1), "margin", "-1"),
    (drawn(axis=0), "axis", "0"),
    (drawn(image=torch.zeros(2, 2, 4)), "image", "[2, 2, 4]"),
    (drawn(image=torch.zeros(2, 2).long()), "image", "int64"),
    (drawn(image=torch.full((2, 2), 2.0)), "image", "2"),
    (drawn(image=torch.full((2, 2), math.nan)), "image", "nan"),
    (drawn(image=[[0.0]]), "image", "list"),
    (lambda: draw_attention(CUBE.pyramid, look(CUBE, 0)[0], axis=3), "axis", "3"),
    (lambda: draw_attention(HYPERCUBE.pyramid, look(HYPERCUBE, 0)[0]), "pyramid", "4"),
    (drawn(draw=draw_overview, level=2), "level", "2"),
    (drawn(draw=draw_overview, queries=torch.tensor([4])), "queries", "4"),
    (drawn(draw=draw_overview, queries=torch.tensor([0.5])), "queries", "float32"),
    (lambda: View(SCENE.pyramid, []), "records", "none"),
    (
        lambda: View(SCENE.pyramid, [look(SCENE, 0)[0], look(SCENE, 1)[0]]),
        "records",
        "[0, 1]",
    ),
]


@pytest.mark.parametrize(("call", "name", "came"), REFUSALS)
def test_refusals(call: Callable[[], object], name: str, came: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        call()
    message = str(refusal.value)
    assert message.startswith(f"{name}:") or message.startswith(f"{name} ("), message
    assert came in message.split("got")[-1], message


# ------------------------------------------------------------------------------------------ imports


def test_matplotlib_is_imported_for_figures_only_which_say_so_where_it_is_missing() -> None:
    code = (
        "import sys, vicinal\n"
        "assert 'vicinal.visualize' not in sys.modules\n"
        "import vicinal.visualize\n"
        "assert 'matplotlib' not in sys.modules\n"
        "assert not hasattr(vicinal.visualize, 'draw_nothing')\n"
        "sys.modules['matplotlib'] = None  # cannot be imported\n"
        "try:\n"
        "    from vicinal.visualize import draw_attention\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "del sys.modules['matplotlib']\n"
        "from vicinal.visualize import draw_attention, draw_overview\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    assert "draw_attention needs matplotlib: pip install 'vicinal[visualize]'" in run_python(code)


def test_scipy_is_imported_for_matching_only() -> None:
    assert run_python("import sys, vicinal.detr\nprint('scipy' in sys.modules)") == "False\n"


def test_a_built_package_holds_the_page() -> None:
    root = Path(__file__).parents[2]
    code = (
        f"import os; os.chdir({str(root)!r})\n"
        "from setuptools import Distribution\n"
        "distribution = Distribution()\n"
        "distribution.parse_config_files(['pyproject.toml'])\n"
        "build = distribution.get_command_obj('build_py')\n"
        "build.ensure_finalized()\n"
        "for _, folder, _, names in build.get_data_files_without_manifest():\n"
        "    print(*(os.path.join(folder, name) for name in names), sep='\\n')\n"
    )
    page = {str(path.relative_to(root)) for path in (root / PAGE).iterdir() if path.is_file()}
    assert len(page) >= 3
    assert page <= set(run_python(code).splitlines())
