"""The explorer page: the data in the file, and the page in a browser."""

import dataclasses
import errno
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pages import read, unpack
from problems import Scene, make_scene
from records import CUBE, LINE, boxes_around, busiest_query, make_record
from torch import Tensor

from vicinal import FeaturePyramid, NeighborhoodWeights, Window
from vicinal.visualize import AttentionRecord, View, write_explorer
from vicinal.visualize.explorer import WEIGHT_STEPS
from vicinal.visualize.palette import DARK, LIGHT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

SCENE = make_scene(((32, 24), (16, 12)), (5, 7), (8,), 260, distinct=True)
UNEVEN = make_scene(((6, 10), (9, 4), (9, 12)), (3, 3, 5), (4,), 130, distinct=True)
CellKey = tuple[int, ...]  # level, cell along each axis
CellPosition = tuple[int, float, float]  # level, row and column in its cells


def by_cell(
    weights: dict[int, Tensor], pyramid: FeaturePyramid = SCENE.pyramid
) -> dict[CellKey, Tensor]:
    """The weights ``[H]`` of each cell, in two dimensions."""
    cells: dict[CellKey, Tensor] = {}
    for point, heads in weights.items():
        _, row, column, level = pyramid.coordinates[point].tolist()
        cells[level, row, column] = heads
    return cells


def record_with_boxes(**options: Any) -> tuple[AttentionRecord, dict[int, dict[int, Tensor]]]:
    return make_record(SCENE, 0, boxes=boxes_around(SCENE.positions), **options)


# ---------------------------------------------------------------------------------------- the file


def test_weights_in_the_file_are_within_half_a_step(tmp_path: Path) -> None:
    record, by_point = make_record(SCENE, 0)
    write_explorer(tmp_path / "page.html", View(SCENE.pyramid, [record]))
    data = read(tmp_path / "page.html")
    (view,), steps = data["views"], data["weight_steps"]
    (packed,) = view["records"]
    cells, levels = unpack(view["cells"]), unpack(view["levels"])
    offsets, ids = unpack(packed["offsets"]), unpack(packed["cell_ids"])
    largest, weights = unpack(packed["query_max"]), unpack(packed["weights"])
    assert sum(map(len, by_point.values())) == len(ids) > 100
    for query, (start, stop) in enumerate(itertools.pairwise(offsets)):
        expected = by_cell(by_point[query])
        assert stop - start == len(expected)
        for pair in range(start, stop):
            cell = (levels[ids[pair]], *cells[2 * ids[pair] : 2 * ids[pair] + 2])
            heads = [w * largest[query] / steps for w in weights[3 * pair : 3 * pair + 3]]
            error = (torch.tensor(heads, dtype=torch.float64) - expected[cell]).abs().max()
            assert float(error) <= 0.501 * largest[query] / steps


def test_bytes_per_query(tmp_path: Path) -> None:
    sizes = []
    for n in (50, 300):
        view = View(*random_view(2000, n))
        write_explorer(tmp_path / "page.html", view)
        sizes.append((tmp_path / "page.html").stat().st_size)
    assert (sizes[1] - sizes[0]) / 250 < 2300


def random_view(n_points: int, n_queries: int) -> tuple[FeaturePyramid, list[AttentionRecord]]:
    """Queries of 80 points and 8 heads each, anywhere on a large map."""
    cells = torch.randperm(512 * 512)[:n_points]
    cells = torch.stack((cells // 512, cells % 512), 1)
    levels = torch.arange(n_points) % 4
    coordinates = torch.cat(
        (torch.zeros(n_points, 1).long(), cells >> levels[:, None], levels[:, None]), 1
    )
    shapes = tuple((512 >> level, 512 >> level) for level in range(4))
    pyramid = FeaturePyramid(torch.zeros(n_points, 1), coordinates, shapes, 1)
    weights = NeighborhoodWeights(
        80 * torch.arange(n_queries + 1),
        torch.randint(n_points, (80 * n_queries,)),
        torch.rand(80 * n_queries, 8) / 80,
        None,
    )
    positions = pyramid.positions()[:n_queries]
    return pyramid, [AttentionRecord(positions, weights, (3, 5, 7, 9), levels=levels[:n_queries])]


def test_labels_are_inserted_as_data(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>{{style}}<!--"
    record, _ = make_record(SCENE, 0, labels=[hostile] * 8, name=hostile)
    write_explorer(
        tmp_path / "page.html", View(SCENE.pyramid, [record], title=hostile), title=hostile
    )
    text = (tmp_path / "page.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2
    assert "alert(1)</script>" not in text
    data = read(tmp_path / "page.html")
    assert data["views"][0]["title"] == hostile
    assert data["views"][0]["records"][0]["query_names"] == [hostile] * 8
    assert "<title>&lt;/script&gt;" in text


def test_the_page_refers_to_no_url(tmp_path: Path) -> None:
    record, _ = make_record(SCENE, 0)
    write_explorer(tmp_path / "page.html", View(SCENE.pyramid, [record], image=torch.rand(4, 3)))
    text = (tmp_path / "page.html").read_text()
    assert "://" not in text
    assert re.findall(r"(?:src|href)\s*=\s*\"([^\"]*)", text) == ["data:,"]
    assert "default-src 'none'" in text


@pytest.mark.parametrize("views", [[], None, ["a view"]])
def test_no_view_is_refused(views: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^views: expected"):
        write_explorer(tmp_path / "page.html", views)
    assert not (tmp_path / "page.html").exists()


def test_nothing_is_written_where_something_cannot_be_drawn(tmp_path: Path) -> None:
    record, _ = make_record(SCENE, 0)
    with pytest.raises(ValueError, match=r"^image: expected"):
        write_explorer(
            tmp_path / "page.html", View(SCENE.pyramid, [record], image=torch.full((2, 2), 2.0))
        )
    assert not (tmp_path / "page.html").exists()


def nothing_attended(shapes: tuple[tuple[int, ...], ...]) -> View:
    """One query on a map without points."""
    dim = len(shapes[0])
    pyramid = FeaturePyramid(torch.zeros(0, 1), torch.zeros(0, dim + 2).long(), shapes, 1)
    weights = NeighborhoodWeights(
        torch.zeros(2).long(), torch.zeros(0).long(), torch.zeros(0, 1), None
    )
    return View(pyramid, [AttentionRecord(torch.ones(1, dim, dtype=torch.float64), weights)])


LONE = "half a \ud83d character"
REFUSED: dict[str, Callable[[Path], object]] = {
    "page title": lambda path: write_explorer(path, nothing_attended(((4, 4),)), title=LONE),
    "title": lambda path: write_explorer(
        path, dataclasses.replace(nothing_attended(((4, 4),)), title=LONE)
    ),
    "name": lambda path: make_record(SCENE, 0, name=LONE),
    "label": lambda path: make_record(SCENE, 0, labels=["a"] * 7 + [LONE]),
    "levels": lambda path: write_explorer(path, nothing_attended(((4, 4),) * 256)),
    "size": lambda path: write_explorer(path, nothing_attended(((4, 2**32 + 1),))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_page_cannot_hold_is_refused_and_an_existing_page_stays(
    tmp_path: Path, what: str
) -> None:
    page = tmp_path / "page.html"
    page.write_text("an existing page")
    with pytest.raises(ValueError, match=r": expected"):
        REFUSED[what](page)
    assert page.read_text() == "an existing page"
    assert list(tmp_path.iterdir()) == [page]


def test_the_most_levels_and_the_largest_size(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write_explorer(page, nothing_attended(((4, 2**32),) * 255))
    assert len(read(page)["views"][0]["level_shapes"]) == 255


def test_a_full_disk_keeps_an_existing_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text("an existing page")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"No space left") as error:
        write_explorer(page, nothing_attended(((4, 4),)))
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(page)
    assert page.read_text() == "an existing page"
    assert list(tmp_path.iterdir()) == [page]


def test_a_page_keeps_its_mode_and_a_link_stays(tmp_path: Path) -> None:
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    page.write_text("an existing page")
    page.chmod(0o640)
    link.symlink_to(page)
    write_explorer(link, nothing_attended(((4, 4),)))
    assert link.is_symlink()
    assert page.stat().st_mode & 0o777 == 0o640
    assert read(page)["views"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    page = tmp_path / "missing" / "page.html"
    with pytest.raises(FileNotFoundError) as error:
        write_explorer(page, nothing_attended(((4, 4),)))
    assert error.value.filename == str(page)


# ---------------------------------------------------------------------------- maps of many cells


FAR = 2**30  # cells along the axes of a map; float32 has every 64th of its last ones


def far_view(*, size: int = FAR, dtype: torch.dtype = torch.float64, **options: Any) -> View:
    """Two neighboring points on each of two levels near the end of a map, and their queries."""
    last = size - 3
    fine = torch.tensor([[last, last], [last, last + 1]])
    coordinates = torch.cat(
        [
            torch.nn.functional.pad(torch.nn.functional.pad(cells, (1, 0)), (0, 1), value=level)
            for level, cells in enumerate((fine, fine // 2))
        ]
    ).unique(dim=0)
    shapes = ((size, size), (size // 2, size // 2))
    pyramid = FeaturePyramid(torch.zeros(len(coordinates), 1), coordinates, shapes, 1)
    n = len(pyramid)
    weights = NeighborhoodWeights(
        torch.arange(n + 1), torch.arange(n), torch.linspace(0.2, 1, n)[:, None], None
    )
    positions = pyramid.positions(dtype)
    boxes = torch.cat((positions, torch.full((n, 2), 0.75, dtype=dtype)), 1)
    return View(pyramid, [AttentionRecord(positions, weights, (3, 3), boxes=boxes)], **options)


def test_coordinates_in_the_file_are_exact(tmp_path: Path) -> None:
    view = far_view()
    (record,) = view.records
    write_explorer(tmp_path / "page.html", view)
    (data,) = read(tmp_path / "page.html")["views"]
    (packed,) = data["records"]
    cells = torch.tensor(unpack(data["cells"])).view(-1, 2)
    assert sorted(cells.tolist()) == sorted(view.pyramid.cells.tolist())
    for name in ("positions", "coordinates"):
        assert unpack(packed[name]) == record.positions.flatten().tolist()
    assert record.boxes is not None
    assert unpack(packed["sizes"]) == record.boxes[:, 2:].flatten().tolist()
    low, high = record.positions - 0.375, record.positions + 0.375
    assert unpack(packed["boxes"]) == torch.cat((low, high), 1).flatten().tolist()
    windows = torch.tensor(unpack(packed["windows"]["corners"]), dtype=torch.float64).view(
        -1, 2, 2, 2
    )
    assert windows.diff(dim=2).flatten(1).tolist() == [[3, 3, 6, 6]] * len(record)
    assert windows[0, 0, 0].tolist() == [FAR - 4, FAR - 4]


def test_positions_and_boxes_in_too_narrow_a_dtype_are_refused() -> None:
    view = far_view()
    (record,) = view.records
    assert record.boxes is not None
    narrow = {"positions": record.positions.float(), "boxes": record.boxes.float()}
    for name, value in narrow.items():
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got .*float32"):
            View(view.pyramid, [dataclasses.replace(record, **{name: value})])  # type: ignore[arg-type]


@pytest.mark.parametrize("position", [2.0**24 + 1, 2.0**53 - 1, 0.1, 123456.789])
def test_positions_of_every_size_are_exact(tmp_path: Path, position: float) -> None:
    view = nothing_attended(((4, 4),))
    (record,) = view.records
    positions = torch.full((1, 2), position, dtype=torch.float64)
    record = dataclasses.replace(record, positions=positions)
    write_explorer(tmp_path / "page.html", View(view.pyramid, [record]))
    (data,) = read(tmp_path / "page.html")["views"]
    assert unpack(data["records"][0]["positions"]) == [position] * 2


def test_coordinates_of_small_maps_take_no_more_bytes(tmp_path: Path) -> None:
    sizes = []
    for dtype in (torch.float32, torch.float64):
        write_explorer(tmp_path / "page.html", far_view(size=1024, dtype=dtype))
        sizes.append((tmp_path / "page.html").stat().st_size)
    assert sizes[0] == sizes[1]


def shown(path: Path, view: View) -> list[float]:
    """Top, left, bottom and right of what a page shows first."""
    write_explorer(path, view)
    corners: list[float] = read(path)["views"][0]["view"]
    return corners


def test_a_page_shows_what_is_occupied_the_map_or_a_given_part(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert shown(page, far_view()) == [FAR - 3 - 3, FAR - 3 - 3, FAR, FAR]  # the coarse cell, and 2
    assert shown(page, far_view(crop="map")) == [0, 0, FAR, FAR]
    given = torch.tensor([[1, 2.5], [FAR, FAR - 1]], dtype=torch.float64)
    for crop in (given, given.numpy(), given.long().numpy()):
        expected = torch.as_tensor(crop).flatten().tolist()
        assert shown(page, far_view(crop=crop)) == expected


def test_what_is_occupied_includes_the_queries_of_all_records(tmp_path: Path) -> None:
    view = nothing_attended(((4000, 4000),))
    (record,) = view.records
    records = [
        dataclasses.replace(record, positions=torch.tensor([position], dtype=torch.float64))
        for position in ([100, 700], [1100, 200])
    ]
    records[1] = dataclasses.replace(records[1], boxes=torch.tensor([[1100.0, 200, 200, 20]]))
    corners = shown(tmp_path / "page.html", View(view.pyramid, records))
    margins = 0.02 * 1100, 0.02 * 510
    expected = [100 - margins[0], 190 - margins[1], 1200 + margins[0], 700 + margins[1]]
    assert corners == pytest.approx(expected)


def test_a_crop_in_three_dimensions_and_one(tmp_path: Path) -> None:
    record, _ = make_record(CUBE, 0)
    crop = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    view = View(CUBE.pyramid, [record], axis=1, crop=crop)
    assert shown(tmp_path / "page.html", view) == [1, 3, 4, 6]
    record, _ = make_record(LINE, 0)
    view = View(LINE.pyramid, [record], crop=torch.tensor([[3.0], [9.5]]))
    assert shown(tmp_path / "page.html", view) == [0, 3, 1, 9.5]


@pytest.mark.parametrize(
    "crop",
    [
        "all",
        None,
        torch.zeros(2, 2),
        torch.zeros(2, 3),
        torch.tensor([[0, 0], [torch.inf, 1]]),
        torch.tensor([[0, torch.nan], [1, 1]]),
        torch.tensor([[False, False], [True, True]]),
    ],
)
def test_a_wrong_crop_is_refused(crop: Any) -> None:
    with pytest.raises(ValueError, match=r"^crop: expected .*, got "):
        far_view(crop=crop)


def test_an_image_may_be_an_array(tmp_path: Path) -> None:
    view = nothing_attended(((4, 4),))
    image = torch.rand(4, 4)
    pages = []
    for given in (image, image.numpy()):
        write_explorer(tmp_path / "page.html", dataclasses.replace(view, image=given))  # type: ignore[arg-type]
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]


# ------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def tab(browser: "Browser") -> "Page":
    """The page in which all tests open their files, since another one takes a process."""
    return browser.new_page(viewport={"width": 1200, "height": 760}, service_workers="block")


OpenPage = Callable[..., "Page"]


@pytest.fixture
def open_page(tab: "Page", tmp_path: Path) -> Iterator[OpenPage]:
    """Opens a page, which must request no other URL and log nothing."""
    messages: list[str] = []
    requests: list[str] = []
    file = tmp_path / "page.html"
    listeners: dict[Any, Callable[[Any], None]] = {
        "console": lambda message: messages.append(message.text),
        "pageerror": lambda error: messages.append(str(error)),
        "request": lambda request: requests.append(request.url),
    }

    def open_page(*views: View, scheme: Any = "light", title: str = "A page") -> "Page":
        write_explorer(file, views, title=title)
        tab.emulate_media(color_scheme=scheme)
        tab.goto(file.as_uri())
        return tab

    for event, listener in listeners.items():
        tab.on(event, listener)
    yield open_page
    for event, listener in listeners.items():
        tab.remove_listener(event, listener)
    tab.mouse.up()  # which a test that failed may have left down
    tab.goto("about:blank")
    tab.mouse.move(0, 0)
    assert messages == []
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}


def click(page: "Page", level: int, row: float, column: float) -> None:
    page.mouse.click(*page.evaluate("([l, r, c]) => cellToViewport(l, r, c)", [level, row, column]))


def selected(page: "Page") -> int | None:
    """The selected query, as in the field for its number."""
    value = page.input_value("#query")
    return int(value) if value else None


def table_weights(page: "Page") -> dict[CellKey, float]:
    """The table of points."""
    rows = page.eval_on_selector_all(
        "#points tbody tr",
        "rows => rows.map(row => [row.dataset, [...row.cells].map(cell => cell.textContent)])",
    )
    found = {}
    for data, cells in rows:
        cell = tuple(map(int, data["cell"].split(",")))
        weight = float(data["weight"])
        found[(int(data["level"]), *cell)] = weight
        assert cells[0] == data["level"]
        assert cells[-1] == f"{100 * weight:.2f} %"
        assert tuple(int(text) for text in cells[1:-1]) == cell
    assert len(found) == len(rows)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    return found


def assert_table(page: "Page", expected: dict[CellKey, Tensor], head: int | None = None) -> None:
    """The page shows these points with these weights, of a head or the mean over all."""
    found = table_weights(page)
    assert found.keys() == expected.keys()
    largest = max(float(heads.max()) for heads in expected.values())
    for cell, heads in expected.items():
        weight = float(heads.mean() if head is None else heads[head])
        assert abs(found[cell] - weight) <= largest / WEIGHT_STEPS


def inside(box: Tensor, others: list[Tensor]) -> tuple[float, float]:
    """A point in the box and in none of the others."""
    for row, column in itertools.product(torch.linspace(-0.45, 0.45, 19), repeat=2):
        point = box[:2] + box[2:] * torch.tensor([row, column])
        if point.min() > 0.2 and not any(
            ((point - other[:2]).abs() <= other[2:] / 2 + 0.1).all() for other in others
        ):
            return float(point[0]), float(point[1])
    raise AssertionError("the boxes cover each other")


@pytest.mark.parametrize("scene", [SCENE, UNEVEN])
def test_a_click_on_a_point_shows_its_weights(scene: Scene, open_page: OpenPage) -> None:
    pyramid = scene.pyramid
    queries = torch.randperm(len(pyramid))[:40]
    scene = dataclasses.replace(
        scene,
        positions=pyramid.positions(torch.float64)[queries],
        offsets=torch.tensor([0, 40]),
    )
    record, by_point = make_record(scene, 0, levels=pyramid.levels[queries], name="block 1")
    page = open_page(View(pyramid, [record], image=torch.rand(32, 24)))
    assert selected(page) is None
    for query in (0, 7, 23):
        _, row, column, level = pyramid.coordinates[queries[query]].tolist()
        click(page, level, row, column)
        assert selected(page) == query
        assert f"level {level}" in page.inner_text("#where")
        assert_table(page, by_cell(by_point[query], pyramid))
        shares = page.eval_on_selector_all(
            "#level-sums tbody tr",
            "rows => rows.map(row => [...row.cells].map(x => x.textContent))",
        )
        for at, cells in enumerate(shares):
            of_level = [w for cell, w in by_cell(by_point[query], pyramid).items() if cell[0] == at]
            total = sum(float(heads.mean()) for heads in of_level)
            assert cells[:2] == [str(at), str(len(of_level))]
            assert float(cells[2].split()[0]) == pytest.approx(100 * total, abs=0.02)
    click(page, 0, 0.2 - 20, 0)  # outside the map, where there is no query
    assert selected(page) == 23


def test_a_click_on_a_box_shows_its_weights(open_page: OpenPage) -> None:
    names = [f"digit {i}" for i in range(8)]
    record, by_point = record_with_boxes(
        labels=names, scores=torch.linspace(0, 0.7, 8), name="decoder"
    )
    page = open_page(View(SCENE.pyramid, [record]))
    assert record.boxes is not None
    boxes = list(record.boxes)
    n_attending = 0
    for query in (1, 3, 5, 7):
        others = [box for other, box in enumerate(boxes) if other != query]
        row, column = inside(boxes[query], others)
        click(page, 0, row - 0.5, column - 0.5)
        assert page.inner_text("#name") == f"digit {query} {query / 10:.2f}"
        height, width = boxes[query][2:].tolist()
        assert f"box {height:.1f} × {width:.1f}" in page.inner_text("#where")
        if by_point[query]:
            assert_table(page, by_cell(by_point[query]))
            n_attending += 1
    assert n_attending > 1


def test_repeated_clicks_cycle_through_overlapping_boxes(open_page: OpenPage) -> None:
    record, _ = make_record(SCENE, 0)
    boxes = torch.tensor([[10.0, 12, size, size] for size in (4, 20, 8, 2, 12, 16, 6, 10)])
    positions = boxes[:, :2].contiguous()
    record = dataclasses.replace(record, positions=positions, boxes=boxes)
    page = open_page(View(SCENE.pyramid, [record]))
    chosen = []
    for _ in range(9):
        click(page, 1, 4.6, 5.6)
        chosen.append(selected(page))
    by_size = [3, 0, 6, 2, 7, 4, 5, 1, 3]
    assert chosen == by_size


def test_a_click_in_the_panel_of_a_level_prefers_its_queries(open_page: OpenPage) -> None:
    record, _ = make_record(SCENE, 0)
    positions = torch.arange(8)[:, None] // 2 * 5.0 + torch.tensor([9.0, 3])  # equal pairs
    record = dataclasses.replace(record, positions=positions, levels=torch.tensor([0, 1] * 4))
    page = open_page(View(SCENE.pyramid, [record]))
    for level, query in ((0, 2), (1, 3)):
        click(page, level, 14 / 2**level - 0.5, 8 / 2**level - 0.5)
        assert selected(page) == query


def test_heads_and_levels(open_page: OpenPage) -> None:
    query = busiest_query(SCENE, 0)
    record, by_point = make_record(SCENE, 0, background=True)
    page = open_page(View(SCENE.pyramid, [record]))
    page.fill("#query", str(query))
    page.press("#query", "Enter")
    expected = by_cell(by_point[query])
    assert_table(page, expected)
    empty = record.weights.background
    assert empty is not None
    for head in range(3):
        page.select_option("#head", label=f"head {head}")
        assert_table(page, expected, head)
        on_empty = page.locator("#level-sums tbody tr td:last-child").all_inner_texts()
        assert [float(text.split()[0]) for text in on_empty] == pytest.approx(
            (100 * empty[query, :, head]).tolist(), abs=0.006
        )
    page.get_by_label("0", exact=True).uncheck()
    level_1 = {cell: heads for cell, heads in expected.items() if cell[0] == 1}
    assert_table(page, level_1, 2)
    assert page.evaluate("state.panels.map(panel => panel.level)") == [1]
    page.get_by_label("1", exact=True).click()  # the last level stays
    assert page.get_by_label("1", exact=True).is_checked()
    page.select_option("#head", index=0)
    page.get_by_label("0", exact=True).check()
    assert_table(page, expected)
    page.click("#reset")
    assert selected(page) is None
    assert table_weights(page) == {}


def test_keyboard(open_page: OpenPage) -> None:
    record, by_point = record_with_boxes()
    page = open_page(View(SCENE.pyramid, [record]))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert selected(page) == 1
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert selected(page) == 7
    query = busiest_query(SCENE, 0)
    for _ in range(query + 1):
        page.keyboard.press("ArrowRight")
    expected = by_cell(by_point[query])
    page.keyboard.press("h")
    assert_table(page, expected, 0)
    page.keyboard.press("H")
    page.keyboard.press("H")
    assert_table(page, expected, 2)
    page.keyboard.press("1")
    assert {cell[0] for cell in table_weights(page)} == {0}
    before = page.evaluate("cellToViewport(0, 3, 3)")
    page.keyboard.press("Shift+ArrowRight")
    assert page.evaluate("cellToViewport(0, 3, 3)") == [before[0] - 60, before[1]]
    width = page.evaluate("cellToViewport(0, 3, 4)[0] - cellToViewport(0, 3, 3)[0]")
    page.keyboard.press("+")
    assert page.evaluate(
        "cellToViewport(0, 3, 4)[0] - cellToViewport(0, 3, 3)[0]"
    ) == pytest.approx(1.5 * width)
    page.keyboard.press("-")
    page.keyboard.press("c")
    assert page.is_checked("#close-up")
    page.keyboard.press("r")
    assert not page.is_checked("#close-up")
    assert selected(page) is None
    assert page.locator("#levels input:checked").count() == 2
    # Keys typed into a field are no shortcuts.
    page.fill("#query", "")
    page.focus("#query")
    page.keyboard.type("3")
    page.keyboard.press("Tab")
    assert selected(page) == 3


def test_wheel_and_drag(open_page: OpenPage) -> None:
    record, by_point = make_record(SCENE, 0)
    page = open_page(View(SCENE.pyramid, [record]))
    query = busiest_query(SCENE, 0)
    row, column = (SCENE.positions[query] - 0.5).tolist()
    at = page.evaluate("([r, c]) => cellToViewport(0, r, c)", [row, column])
    side = page.evaluate("cellToViewport(0, 0, 1)[0] - cellToViewport(0, 0, 0)[0]")
    page.mouse.move(*at)
    page.mouse.wheel(0, -600)
    page.wait_for_function("state.zoom > 1")
    # The mouse is on a whole pixel, half of one away at most, and what is below it stays.
    still = page.evaluate("([r, c]) => cellToViewport(0, r, c)", [row, column])
    assert still == pytest.approx(at, abs=page.evaluate("state.zoom"))
    assert page.evaluate("cellToViewport(0, 0, 1)[0] - cellToViewport(0, 0, 0)[0]") > 2 * side
    page.mouse.down()
    page.mouse.move(at[0] + 30, at[1] - 20, steps=4)
    page.mouse.up()
    moved = page.evaluate("([r, c]) => cellToViewport(0, r, c)", [row, column])
    assert moved == pytest.approx([still[0] + 30, still[1] - 20], abs=1)
    assert selected(page) is None  # that was no click
    page.mouse.click(*moved)
    assert selected(page) == query
    assert_table(page, by_cell(by_point[query]))


def test_close_up_every_level_shows_the_window(open_page: OpenPage) -> None:
    record, _ = make_record(SCENE, 0)
    page = open_page(View(SCENE.pyramid, [record]))
    query = busiest_query(SCENE, 0)
    for _ in range(query + 1):
        page.keyboard.press("ArrowRight")
    page.check("#close-up")
    panels = page.evaluate("state.panels")
    corner = page.locator("#map").bounding_box()
    assert corner is not None
    for level, panel in enumerate(panels):
        row, column = (SCENE.positions[query] / 2**level).floor().tolist()
        x, y = page.evaluate("([l, r, c]) => cellToViewport(l, r, c)", [level, row, column])
        # The window's middle is the panel's.
        assert x - corner["x"] == pytest.approx(panel["x"] + panel["w"] / 2)
        assert y - corner["y"] == pytest.approx(panel["y"] + panel["h"] / 2)
        size = SCENE.sizes[level] + 6
        left, top = page.evaluate(
            "([l, r, c]) => cellToViewport(l, r, c)", [level, row - size / 2, column - size / 2]
        )
        gap = min(left - corner["x"] - panel["x"], top - corner["y"] - panel["y"])
        assert gap == pytest.approx(0, abs=1)


def hex_color(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def drawn_colors(page: "Page", points: Sequence[CellPosition]) -> list[list[int]]:
    """Colors of the map, once it is drawn, at positions ``(level, row, column)`` in cells."""
    colors: list[list[int]] = page.evaluate(
        """async (points) => {
          await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
          const corner = canvas.getBoundingClientRect();
          const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return points.map((point) => {
            const [x, y] = cellToViewport(...point);
            const start = 4 * (Math.round(y - corner.y) * canvas.width + Math.round(x - corner.x));
            return [...all.slice(start, start + 3)];
          });
        }""",
        points,
    )
    return colors


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_of_the_map(open_page: OpenPage, scheme: str) -> None:
    record, by_point = make_record(SCENE, 0)
    page = open_page(View(SCENE.pyramid, [record]), scheme=scheme)
    query = busiest_query(SCENE, 0)
    for _ in range(query + 1):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    expected = by_cell(by_point[query])
    heaviest = max(expected, key=lambda cell: float(expected[cell].mean()))
    palette = LIGHT if scheme == "light" else DARK
    level, row, column = heaviest
    center = (SCENE.positions[query] / 2**level).floor().tolist()
    edge = center[1] + SCENE.sizes[level] // 2 + 0.5
    # A third off the middle, where the query's dot may be.
    points = [(level, row + 0.3, column + 0.3), (level, center[0] + 0.2, edge)]
    assert drawn_colors(page, points) == [hex_color(palette.weights[-1]), hex_color(palette.window)]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == f"rgb({', '.join(map(str, hex_color(palette.surface)))})"


def one_query(position: list[float], shapes: Any, sizes: Any) -> View:
    """A query of level 0 on a map without points."""
    pyramid = FeaturePyramid(torch.zeros(0, 1), torch.zeros(0, 4).long(), shapes, 1)
    nothing = NeighborhoodWeights(
        torch.zeros(2).long(), torch.zeros(0).long(), torch.zeros(0, 1), None
    )
    levels = torch.zeros(1).long()
    record = AttentionRecord(torch.tensor([position]), nothing, sizes, levels=levels)
    return View(pyramid, [record], crop="map")


WINDOW_SHAPES = [Window((3, 4), causal=(False, True)), Window(3, dilation=2), 0]


@pytest.mark.parametrize("close_up", [False, True])
def test_windows_of_other_shapes(open_page: OpenPage, close_up: bool) -> None:
    """Colors on the sides of cells: of a dilated window, in its gaps, and on a causal edge."""
    shapes = ((16, 16), (8, 8), (4, 4))
    page = open_page(one_query([9.5, 10.2], shapes, WINDOW_SHAPES))
    page.keyboard.press("ArrowRight")
    if close_up:
        page.keyboard.press("c")
    # The query is in cell (9, 10) of level 0 and (4, 5) of level 1. Cells are at their centers.
    rows, columns, within = (2, 4, 6), (3, 5, 7), (7.7, 8.2, 9.9, 10.3)
    sides: list[CellPosition] = [(0, row, column) for row in within for column in (6.5, 10.5)]
    sides += [(1, row, column + 0.5) for row in rows for column in columns]
    others: list[CellPosition] = [(0, row, 10.5) for row in (7.3, 10.7)]
    others += [(0, 8.2, 7.5), (0, 9.9, 9.5)]  # between cells of a window
    others += [(1, 3, column + 0.5) for column in columns]
    others += [(1, row + 0.5, 4) for row in rows]
    others += [(2, row + 0.5, column) for row in range(4) for column in range(4)]
    others += [(2, row, column + 0.5) for row in range(4) for column in range(4)]
    query: CellPosition = (2, 9.5 / 4 - 0.5, 10.2 / 4 - 0.5)
    colors = drawn_colors(page, [query, *sides, *others])
    assert colors[0] == hex_color(LIGHT.query)
    assert colors[1 : 1 + len(sides)] == [hex_color(LIGHT.window)] * len(sides)
    assert hex_color(LIGHT.window) not in colors[1 + len(sides) :]


def test_a_causal_edge_is_thicker_than_an_outline(open_page: OpenPage) -> None:
    page = open_page(one_query([9.5, 10.2], ((16, 16),), WINDOW_SHAPES[:1]))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    pixel = 1 / page.evaluate("cellToViewport(0, 0, 1)[0] - cellToViewport(0, 0, 0)[0]")
    steps, columns = range(-6, 7), (6.5, 10.5)
    across: list[CellPosition] = [(0, 8.2, x + i * pixel) for x in columns for i in steps]
    is_line = [color == hex_color(LIGHT.window) for color in drawn_colors(page, across)]
    widths = [sum(is_line[: len(steps)]), sum(is_line[len(steps) :])]
    assert widths[0] == 2
    assert widths[1] > 3


def test_a_close_up_shows_a_query_beyond_its_window(open_page: OpenPage) -> None:
    shapes = ((16, 16), (2, 2))
    past = [Window((3, 4), causal=(False, True))] * 2
    page = open_page(one_query([9.5, 14.5], shapes, past))
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    for level, panel in enumerate(page.evaluate("state.panels")):
        scale = 8**level
        x, y = page.evaluate(
            "([l, r, c]) => cellToViewport(l, r, c)", [level, 9.5 / scale - 0.5, 14.5 / scale - 0.5]
        )
        corner = page.locator("#map").bounding_box()
        assert corner is not None
        assert panel["x"] < x - corner["x"] < panel["x"] + panel["w"]
        assert panel["y"] < y - corner["y"] < panel["y"] + panel["h"]


def test_names_are_shown_verbatim(open_page: OpenPage) -> None:
    hostile = ["<img src=x onerror='window.harm = 1'>", "</script><script>window.harm = 1</script>"]
    labels = [*hostile, *["&lt;b&gt;"] * 6]
    record, _ = record_with_boxes(labels=labels, name=hostile[0])
    other, _ = record_with_boxes(labels=labels, name=hostile[1])
    views = [View(SCENE.pyramid, [record, other], title=title) for title in hostile]
    page = open_page(*views, title=hostile[0])
    for label in labels[:3]:
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#name") == label
    assert page.inner_text("h1") == page.title() == hostile[0]
    assert page.locator("#view option").all_inner_texts() == hostile
    assert page.locator("#record option").all_inner_texts() == hostile
    assert page.evaluate("window.harm") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_views_and_records(open_page: OpenPage) -> None:
    first, by_point = record_with_boxes(name="layer 0")
    shuffled = first.weights._replace(weights=first.weights.weights.flip(1))
    second = dataclasses.replace(first, weights=shuffled, name="layer 1")
    elsewhere, _ = make_record(CUBE, 0, name="cubes")
    page = open_page(
        View(SCENE.pyramid, [first, second]), View(CUBE.pyramid, [elsewhere], title="3-D")
    )
    query = busiest_query(SCENE, 0)
    for _ in range(query + 1):
        page.keyboard.press("ArrowRight")
    page.select_option("#head", label="head 0")
    assert_table(page, by_cell(by_point[query]), 0)
    page.select_option("#record", label="layer 1")  # the same queries: the choice stays
    assert selected(page) == query
    assert_table(page, by_cell(by_point[query]), 2)
    page.select_option("#view", label="3-D")
    assert selected(page) is None
    assert page.locator("#record-label").is_hidden()
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    assert selected(page) == 0


def test_three_dimensions_are_projected_along_an_axis(open_page: OpenPage) -> None:
    record, by_point = make_record(CUBE, 0)
    page = open_page(View(CUBE.pyramid, [record], axis=1, axis_names=["axis 0", "y", "axis 2"]))
    query = busiest_query(CUBE, 0)
    for _ in range(query + 1):
        page.keyboard.press("ArrowRight")
    expected: dict[CellKey, Tensor] = {}
    for point, heads in by_point[query].items():
        _, *cell, level = CUBE.pyramid.coordinates[point].tolist()
        expected[(level, *cell)] = expected.get((level, *cell), 0) + heads
    assert len({(level, a, c) for level, a, _, c in expected}) < len(expected)
    assert_table(page, expected)
    headings = page.locator("#points th").all_inner_texts()
    assert headings == ["level", "axis 0", "y", "axis 2", "weight"]
    counts = page.locator("#level-sums tbody tr td:nth-child(2)").all_inner_texts()
    levels = [sum(cell[0] == level for cell in expected) for level in (0, 1)]
    assert counts == [str(count) for count in levels]
    position = record.positions[query].tolist()
    for name, x in zip(("axis 0", "y", "axis 2"), position, strict=True):
        assert f"{name} {x:.1f}" in page.inner_text("#where")


def test_one_dimension_is_a_row(open_page: OpenPage) -> None:
    record, by_point = make_record(LINE, 0)
    page = open_page(View(LINE.pyramid, [record]))
    query = busiest_query(LINE, 0)
    expected: dict[CellKey, Tensor] = {}
    for point, heads in by_point[query].items():
        _, cell, level = LINE.pyramid.coordinates[point].tolist()
        expected[level, cell] = expected.get((level, cell), 0) + heads
    click(page, 0, 0.3, float(LINE.positions[query, 0]) - 0.5)
    assert selected(page) == query
    assert_table(page, expected)
    assert page.locator("#points th").all_inner_texts() == ["level", "cell", "weight"]


def test_queries_without_neighbors_and_no_queries(open_page: OpenPage) -> None:
    pyramid = FeaturePyramid(torch.zeros(0, 4), torch.zeros(0, 4).long(), ((6, 6), (3, 3)), 1)
    nothing = NeighborhoodWeights(
        torch.zeros(2).long(), torch.zeros(0).long(), torch.zeros(0, 2), None
    )
    one = AttentionRecord(torch.tensor([[2.5, 3.5]]), nothing, (3, 5))
    none = AttentionRecord(
        torch.zeros(0, 2), nothing._replace(offsets=torch.zeros(1).long()), (3, 5), name="none"
    )
    page = open_page(View(pyramid, [one, none]))
    click(page, 0, 2, 3)
    assert selected(page) == 0
    assert table_weights(page) == {}
    assert page.inner_text("#points-note")
    page.select_option("#record", label="none")
    assert page.inner_text("#status")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("c")
    assert selected(page) is None


def cell_side(page: "Page", row: int, column: int) -> float:
    """Pixels between two cells of level 0."""
    side: float = page.evaluate(
        "([r, c]) => cellToViewport(0, r, c + 1)[0] - cellToViewport(0, r, c)[0]", [row, column]
    )
    return side


@pytest.mark.parametrize("crop", ["occupied", "map"])
def test_single_cells_of_a_large_map(open_page: OpenPage, crop: str) -> None:
    """They can be zoomed to, have sharp edges, and are told apart by a click."""
    view = far_view(crop=crop)
    page = open_page(view)
    for query in range(len(view.pyramid)):
        page.keyboard.press("ArrowRight")
        row, column = view.pyramid.positions(torch.float64)[query].tolist()
        assert page.inner_text("#where").count(f" {row:.1f}") >= 1
        assert f"column {column:.1f}" in page.inner_text("#where")
    last = FAR - 3
    page.fill("#query", str(view.pyramid.coordinates[:, 1:].tolist().index([last, last, 0])))
    page.press("#query", "Enter")
    page.evaluate("""() => {
      for (let step = 0; step < 200; step++) { zoomBy(1.5); panToQuery(); }
    }""")
    page.evaluate("zoomBy(80 / (cellToViewport(0, 0, 1)[0] - cellToViewport(0, 0, 0)[0]))")
    page.evaluate("panToQuery()")
    assert cell_side(page, last, last) == pytest.approx(80, abs=0.01)
    inner, outer = 0.5 - 3 / 80, 0.5 + 3 / 80  # of a cell, beside its edge
    end = FAR - 0.5  # of the map
    attended, *others, inside, beyond = drawn_colors(
        page,
        [
            (0, last + inner, last - inner),
            (0, last + inner, last - outer),
            (0, last + outer, last - inner),
            (0, end - 0.06, last - 0.8),
            (0, end + 0.06, last - 0.8),
        ],
    )
    assert attended == hex_color(LIGHT.weights[-1])
    assert attended not in others
    assert inside == hex_color(LIGHT.surface)
    assert beyond == hex_color(LIGHT.outside)


def test_a_page_zooms_from_one_cell_to_the_whole_map(open_page: OpenPage) -> None:
    page = open_page(far_view())
    page.evaluate("for (let step = 0; step < 200; step++) zoomBy(1.5)")
    panel = page.evaluate("state.panels[0]")
    assert cell_side(page, 0, 0) >= max(panel["w"], panel["h"])
    page.evaluate("for (let step = 0; step < 400; step++) zoomBy(1 / 1.5)")
    assert FAR * cell_side(page, 0, 0) <= min(panel["w"], panel["h"])
    page.keyboard.press("r")
    assert cell_side(page, 0, 0) > 10


def test_an_image_on_a_large_map_keeps_its_place(open_page: OpenPage) -> None:
    """Each of its pixels covers millions of cells, and their edge is where it should be."""
    half = FAR // 2
    colors = torch.tensor([[[200, 0, 0], [0, 0, 200]], [[0, 200, 0], [200, 200, 0]]])
    crop = torch.tensor([[half - 5, half - 5], [half + 5, half + 5]])
    page = open_page(far_view(image=colors.to(torch.uint8), crop=crop))
    sides = (half - 1.3, half - 0.3)  # 0.8 cells before the middle of the map, and 0.2 after it
    points = [(0, row, column) for row, column in itertools.product(sides, repeat=2)]
    assert drawn_colors(page, points) == colors.flatten(0, 1).tolist()


def test_twenty_thousand_points_stay_quick(open_page: OpenPage) -> None:
    page = open_page(View(*random_view(20_000, 300), image=torch.rand(512, 512)))
    script = """() => {
      const start = performance.now();
      for (let query = 0; query < 5; query++) { selectQuery(query); drawMap(state); }
      canvas.getContext("2d").getImageData(0, 0, 1, 1);  // waits for the drawing
      return (performance.now() - start) / 5;
    }"""
    assert page.evaluate(script) < 500  # milliseconds; about 30 on an idle machine
