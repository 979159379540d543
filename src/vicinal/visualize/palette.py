"""Colors that stay distinguishable in print, on light and dark screens, and if color-blind."""

from typing import NamedTuple


class Palette(NamedTuple):
    """Hex colors by role. The page gets them as CSS custom properties of the same names."""

    surface: str  # the map, and the page around it
    outside: str  # beyond the edge of the map
    text: str  # also the color of an intensity image
    muted: str  # secondary text, and queries that are not selected
    point: str  # points without attention weight, and grid lines
    dot: str  # the same points where cells are too small to be seen
    border: str
    window: str
    query: str  # the selected query and its box
    weights: tuple[str, ...]  # color scale from zero to the largest, monotonic in lightness


LIGHT = Palette(
    "#ffffff",
    "#f1f3f5",
    "#2b303b",
    "#5b6472",
    "#dfe3e8",
    "#8d96a3",
    "#c3c9d1",
    "#0f7c8a",
    "#b3243c",
    ("#d5edf0", "#5fb0ba", "#14697a", "#05242e"),
)
DARK = Palette(
    "#14181f",
    "#1b2029",
    "#e3e7ee",
    "#a3adbb",
    "#333b47",
    "#6b7686",
    "#47505d",
    "#4cc3d1",
    "#ff7a8a",
    ("#123f49", "#1f8696", "#7fd3dc", "#f0fdff"),
)
# Okabe and Ito, "Color Universal Design", 2008, without black and yellow (too pale on white).
CATEGORICAL = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
