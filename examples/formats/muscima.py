"""Annotations of MUSCIMA++: handwritten music, pixel by pixel.

A file describes the symbols of a page: ``<Node>`` (``<CropObject>`` before version 2) with
``<ClassName>``, ``<Top>``, ``<Left>``, ``<Width>``, ``<Height>`` and ``<Mask>``. A mask has the
runs of the pixels of the box, row by row: ``0:3 1:5`` are three pixels outside the symbol, then
five inside. Without a mask the symbol fills its box. See Hajič and Pecina, "The MUSCIMA++ Dataset
for Handwritten Optical Music Recognition", 2017.

There are more than a hundred classes, most of them rare, named differently in each version. Here
they are joined to twelve. Symbols that consist of others, and the space between staff lines, are
left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor

from examples.formats.raw import IGNORED, RawScene, check_scene, find_files, reading, refuse

# The first class fits one of whose patterns matches the whole name, in lower case without marks.
PATTERNS = {
    "notehead": ".*notehead.*",
    "stem": "stem",
    "beam": ".*beam.*",
    "flag": ".*flag.*",
    "rest": "rest.*|.*rest",
    "accidental": "accidental.*|(double)?(sharp|flat)|natural",
    "clef": ".*clef",
    "dot": "(?!staccato).*dot",
    "barline": ".*barline.*",
    "slur or tie": "slur|tie",
    "staff or ledger line": "staffline|led?gerline",
    "other symbol": ".*",
}
CLASSES = tuple(PATTERNS)
NAMES = re.compile(r"CVC-MUSCIMA_W-.*_N-.*\.xml", re.IGNORECASE)
COUNT = r"\d{1,18}"  # digits of a number that int64 holds
LARGEST = 20_000  # pixels: pages of the data set have 3,500 along their longer side
LEFT_OUT = "staff|staffspace|staffgrouping|keysignature|timesignature|measureseparator"


class Node(NamedTuple):
    """A symbol.

    Attributes:
        name: its class, as in the file.
        top, left: the first row and column of its box.
        mask: bool ``[height, width]``, the pixels of the box that belong to it.
    """

    name: str
    top: int
    left: int
    mask: Tensor


def read_nodes(path: Path) -> list[Node]:
    """Reads the symbols of a page, for boxes of a detector or labels of pixels.

    Raises:
        FormatError: the file is missing or not XML, a node lacks an element, or the runs of a mask
            are not those of its box.
    """
    with reading(path, "annotations in XML", Exception):  # such as an unknown encoding
        root = ElementTree.parse(path).getroot()
    return [_node(path, node) for tag in ("Node", "CropObject") for node in root.iter(tag)]


def _node(path: Path, node: ElementTree.Element) -> Node:
    name = node.findtext("ClassName") or node.findtext("MLClassName")
    sizes = [node.findtext(tag) or "" for tag in ("Top", "Left", "Width", "Height")]
    if not name or not all(re.fullmatch(COUNT, size.strip()) for size in sizes):
        came = f"a {node.tag} with {name!r} and {[size[:20] for size in sizes]}"
        refuse(path, "nodes with ClassName, Top, Left, Width and Height", came)
    top, left, width, height = map(int, sizes)
    if max(top + height, left + width) > LARGEST:
        refuse(path, f"a page of at most {LARGEST} x {LARGEST} pixels", f"{name!r} at {sizes}")
    text = (node.findtext("Mask") or f"1:{width * height}").strip()
    if not re.fullmatch(rf"[01]:{COUNT}(\s+[01]:{COUNT})*", text):
        refuse(path, "a mask of runs such as 0:3 1:5", text[:80])
    bits, lengths = zip(*(map(int, run.split(":")) for run in text.split()), strict=True)
    if sum(lengths) != width * height:
        expected = f"a mask of {width} x {height} pixels of {name!r}"
        refuse(path, expected, f"runs of {sum(lengths)} pixels")
    pixels = torch.tensor(bits, dtype=torch.bool).repeat_interleave(torch.tensor(lengths))
    return Node(name, top, left, pixels.view(height, width))


def read_muscima(path: Path) -> RawScene:
    """Reads the labels of the pixels of a page. A pixel of several symbols is of the smallest.

    Args:
        path: the ``.xml`` file.

    Returns:
        the centers of pixels, row and column, float32 ``[n, 2]``; ones ``[n, 1]``; labels.

    Raises:
        FormatError: as for `read_nodes`, or no symbol is left.
    """
    nodes = [node for node in read_nodes(path) if not re.fullmatch(LEFT_OUT, _plain(node.name))]
    if not nodes:
        refuse(path, "at least one symbol", "none")
    rows = max(node.top + node.mask.shape[0] for node in nodes)
    columns = max(node.left + node.mask.shape[1] for node in nodes)
    page = torch.full((rows, columns), IGNORED)
    for node in sorted(nodes, key=lambda node: -int(node.mask.sum())):  # the smallest come last
        height, width = node.mask.shape
        box = page[node.top : node.top + height, node.left : node.left + width]
        box[node.mask] = _class_of(node.name)
    pixels = (page != IGNORED).nonzero()
    values = torch.ones(len(pixels), 1)
    return check_scene(path, RawScene(pixels + 0.5, values, page[tuple(pixels.t())]))


def _plain(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _class_of(name: str) -> int:
    plain = _plain(name)
    matches = (bool(re.fullmatch(pattern, plain)) for pattern in PATTERNS.values())
    return list(matches).index(True)


def find_muscima(folder: Path) -> list[tuple[Path, ...]]:
    """The pages in and below a folder, those with the names of the data set.

    Raises:
        FormatError: there are none.
    """
    expected = "annotations CVC-MUSCIMA_W-*_N-*.xml"
    pages = find_files(folder, expected, lambda path: bool(NAMES.fullmatch(path.name)))
    return [(page,) for page in pages]


def writer_of(page: Path) -> str:
    """Who wrote a page, such as ``"W-01"``."""
    return page.name.split("_")[1].upper()
