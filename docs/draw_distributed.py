"""Draws docs/distributed.svg: a scene in parts, and what one part sees of the others.

``python -m docs.draw_distributed`` writes it. The library itself cuts the scene and says which
points a rank receives.
"""

from pathlib import Path

from torch import Tensor

from benchmarks.ranks.parts import ALIGN, CutScene, world_of_one
from benchmarks.scenes import STRIDES, particle_tracks
from docs.draw_concepts import (
    INK,
    LINE,
    MUTED,
    NEIGHBOR,
    NEIGHBOR_INK,
    POINT,
    WINDOW,
    rectangle,
    text,
)
from docs.draw_windows import GAP, SIDE, TITLE, pyramid_of

N_TRACKS, CELLS = 25, 256  # of the scene, as dense as those of the benchmarks
N_PARTS, SHOWN = 8, 3  # parts of the scene, and the one whose halo is shown
LEGEND = 34


def draw_panel(cut: CutScene, boxes: list[tuple[list[int], list[int]]], level: int) -> list[str]:
    """A level of the scene, from the upper left corner of its title."""
    pyramid, on_level = cut.pyramid, cut.pyramid.levels == level
    own = cut.own(boxes[SHOWN])
    halo = cut.halo(own)
    size = SIDE / pyramid.level_shapes[level][1]  # of a cell

    def cells(chosen: Tensor) -> Tensor:
        return pyramid.cells[on_level & chosen]

    received = int((halo & on_level).sum())
    counts = f"{int((own & on_level).sum())} own points"
    groups = ((~own & ~halo, POINT), (halo, NEIGHBOR), (own, WINDOW))
    return [
        text(0, 16, f"stride {STRIDES[level]}", f'font-weight="700" fill="{INK}"'),
        text(0, 38, counts, f'fill="{WINDOW}"'),
        text(SIDE, 38, f"{received} received", f'fill="{NEIGHBOR_INK}" text-anchor="end"'),
        f'<g transform="translate(0 {TITLE})">',
        rectangle(0, 0, SIDE, SIDE, f'fill="white" stroke="{LINE}"'),
        f'<g transform="scale({size:g})">',
        *(f'<path fill="{color}" d="{bars(cells(chosen))}"/>' for chosen, color in groups),
        "</g>",
        *(draw_box(*box, is_shown=False) for index, box in enumerate(boxes) if index != SHOWN),
        draw_box(*boxes[SHOWN], is_shown=True),
        "</g>",
    ]


def bars(cells: Tensor) -> str:
    """A path of the unit squares at ``cells`` [n, 2], those side by side as one rectangle."""
    found: list[list[int]] = []
    for row, column in cells.tolist():  # row by row
        if found and found[-1][0] == row and found[-1][2] == column:
            found[-1][2] += 1
        else:
            found.append([row, column, column + 1])
    return "".join(f"M{start} {row}H{stop}v1H{start}z" for row, start, stop in found)


def draw_box(low: list[int], high: list[int], *, is_shown: bool) -> str:
    """The border of a part."""
    block = SIDE * ALIGN / CELLS
    top, left = (block * edge for edge in low)
    height, width = (block * (b - a) for a, b in zip(low, high, strict=True))
    style = f'stroke="{WINDOW}" stroke-width="2.5"' if is_shown else f'stroke="{MUTED}"'
    return rectangle(left, top, width, height, f'fill="none" {style}')


def draw_legend(y: float) -> list[str]:
    """What the colors mean."""
    shapes: list[str] = []
    words = ("points of one rank", "its halo, from their owners", "other points")
    for x, color, label in zip((8, 190, 424), (WINDOW, NEIGHBOR, POINT), words, strict=True):
        shapes.append(rectangle(x, y - 12, 14, 14, f'fill="{color}"'))
        shapes.append(text(x + 22, y, label))
    return shapes


def draw() -> str:
    """The drawing: all levels, in two columns."""
    scene = particle_tracks(N_TRACKS, size=CELLS)
    cut = CutScene(pyramid_of(scene), scene.windows)
    with world_of_one():
        boxes = cut.boxes(N_PARTS)
    shapes = []
    for level in range(len(STRIDES)):
        x, y = 8 + (SIDE + GAP) * (level % 2), 8 + (TITLE + SIDE + GAP) * (level // 2)
        shapes += [f'<g transform="translate({x} {y})">', *draw_panel(cut, boxes, level), "</g>"]
    width, height = 16 + 2 * SIDE + GAP, 8 + 2 * (TITLE + SIDE + GAP) + LEGEND - GAP
    shapes += draw_legend(height - 8)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="15" fill="{MUTED}">'
    )
    return "\n".join((head, rectangle(0, 0, width, height, 'fill="white"'), *shapes, "</svg>\n"))


if __name__ == "__main__":
    Path(__file__).with_name("distributed.svg").write_text(draw(), encoding="utf-8")
