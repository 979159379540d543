"""Colours that stay apart in print, on screens light and dark, and without red or green."""

from typing import NamedTuple


class Palette(NamedTuple):
    paper: str
    beyond: str  # outside the map
    ink: str  # text, and what the image shows
    muted: str  # text beside the main thing
    cell: str  # points that nobody attends to
    edge: str  # grids and borders
    frame: str  # windows
    query: str  # the query and its box
    weights: tuple[str, ...]  # from none to the largest: lightness alone tells them apart


LIGHT = Palette(
    "#ffffff",
    "#f1f3f5",
    "#2b303b",
    "#5b6472",
    "#dfe3e8",
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
    "#47505d",
    "#4cc3d1",
    "#ff7a8a",
    ("#123f49", "#1f8696", "#7fd3dc", "#f0fdff"),
)
# Okabe and Ito, "Color Universal Design", 2008, without black, and yellow, too pale on white.
DISTINCT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
