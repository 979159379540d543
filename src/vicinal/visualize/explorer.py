"""A page to explore: click a query and see what it attends to, in any browser, without network."""

import base64
import html
import json
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import refuse
from ..pyramid import FeaturePyramid
from .flat import Places, find_places, flatten
from .palette import DARK, LIGHT, Palette
from .picture import as_picture, encode_png
from .record import AttentionRecord, check_record

STEPS = 2**16 - 1  # into which a query's largest weight is divided
_SCRIPTS = ("decode.js", "draw.js", "explore.js")


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """One image of a page: its points, and what queries among them attend to.

    Args:
        pyramid: the points.
        records: at least one, all of the same image; say one per layer.
        title: of the image.
        image: ``[H, W]`` intensities, drawn as ink, or ``[H, W, 3]`` colours; floating in [0, 1]
            or uint8; of any resolution, over the whole of the map; None: none.
        axis: the one to look along where there are three; None: the first. Points one behind the
            other are then shown as one, with the sum of their weights.

    Raises:
        ValueError: no record, records of several images or of another pyramid, an image of
            another form, or more than three dimensions.
    """

    pyramid: FeaturePyramid
    records: Sequence[AttentionRecord]
    title: str = "image"
    image: Tensor | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        if not self.records:
            refuse("records", "at least one AttentionRecord", "none")
        for record in self.records:
            check_record(record, self.pyramid)
        images = sorted({record.batch_index for record in self.records})
        if len(images) > 1:
            refuse("records", "queries of one image", f"those of {images}")


def write_explorer(
    path: str | os.PathLike[str],
    views: View | Sequence[View],
    *,
    title: str = "What queries attend to",
) -> None:
    """Writes a page, one file that needs nothing else, on which to explore attention.

    Click a point or a box, or step with the arrow keys: the page shows the query's windows, the
    points it attends to and their weights, a panel per level, for the mean over the heads or one
    of them. Weights are kept in 65,535 steps of the query's largest, so within 1e-5 of that. Eight
    heads and 80 points take about 2 KB per query.

    Args:
        path: of the HTML file, written over if it is there.
        views: the images.
        title: of the page.

    Raises:
        ValueError: no view, or what it holds cannot be drawn.
    """
    views = [views] if isinstance(views, View) else views
    is_sequence = isinstance(views, Sequence) and len(views) > 0
    if not is_sequence or not all(isinstance(view, View) for view in views):
        refuse("views", "at least one View", str(views))
    data = {"steps": STEPS, "views": [_pack_view(view) for view in views]}
    page = {
        "title": html.escape(title),
        "palette": _as_css(LIGHT, DARK),
        "style": _asset("style.css"),
        # Within <script>, "<" would let a label end it.
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "script": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    # In one pass: what is filled in may hold anything.
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: page[match[1]], _asset("explorer.html"))
    Path(path).write_text(text, encoding="utf-8")


def _pack_view(view: View) -> dict[str, Any]:
    places = find_places(view.pyramid, view.records[0].batch_index, view.axis)
    picture = None
    if view.image is not None:
        pixels = as_picture(view.image)
        png = base64.b64encode(encode_png(pixels)).decode()
        picture = {"url": f"data:image/png;base64,{png}", "ink": pixels.dim() == 2}
    return {
        "title": view.title,
        "shapes": places.level_shapes,
        "axes": _axis_names(places),
        "cells": _pack(places.cells, "I"),
        "levels": _pack(places.levels, "B"),
        "picture": picture,
        "records": [_pack_record(record, places) for record in view.records],
    }


def _axis_names(places: Places) -> list[str | None]:
    axes, along = places.projection.axes, places.projection.along
    if len(axes) == 1:
        return [None, "cell"]
    return ["row", "column"] if along is None else [f"axis {axis}" for axis in axes]


def _pack_record(record: AttentionRecord, places: Places) -> dict[str, Any]:
    flat = flatten(record, places)
    row = torch.repeat_interleave(flat.offsets.diff())
    heaviest = flat.weights.new_zeros(len(row)) if not record.n_heads else flat.weights.amax(1)
    largest = torch.zeros(len(record), dtype=torch.float64).scatter_reduce(0, row, heaviest, "amax")
    largest = largest.float()  # as it is stored, or the quotients would be off
    steps = flat.weights / largest.clamp(min=torch.finfo(torch.float32).tiny)[row, None] * STEPS
    sizes, dim = record.neighborhood_sizes, record.positions.shape[1]
    return {
        "name": record.name,
        "heads": record.n_heads,
        "windows": _pack(flat.windows, "f"),
        "sides": None if sizes is None else [" × ".join([str(size)] * dim) for size in sizes],
        "positions": _pack(flat.positions, "f"),
        "levels": _pack(record.levels, "B"),
        "boxes": _pack(flat.boxes, "f"),
        "names": [record.describe(query) for query in range(len(record))],
        "labelled": record.labels is not None or record.scores is not None,
        "scores": _pack(record.scores, "f"),
        "offsets": _pack(flat.offsets, "I"),
        "places": _pack(flat.places, "I"),
        "largest": _pack(largest, "f"),
        "weights": _pack(steps.round().clamp(0, STEPS), "H"),
        "background": _pack(flat.background, "f"),
    }


def _pack(x: Tensor | None, code: str) -> str | None:
    """The numbers one after another, in the form ``code`` of `struct`, as base64."""
    if x is None:
        return None
    numbers = x.detach().cpu().flatten()
    numbers = numbers.float() if code == "f" else numbers.long()
    packed = bytearray()
    for part in numbers.split(2**20):  # as lists, numbers take much more memory
        packed += struct.pack(f"<{len(part)}{code}", *part.tolist())
    return base64.b64encode(packed).decode()


def _as_css(light: Palette, dark: Palette) -> str:
    def rules(palette: Palette) -> str:
        colors = {name: value for name, value in palette._asdict().items() if name != "weights"}
        colors |= {f"weight-{i}": color for i, color in enumerate(palette.weights)}
        return ":root {" + "".join(f" --{name}: {color};" for name, color in colors.items()) + " }"

    return f"{rules(light)}\n@media (prefers-color-scheme: dark) {{ {rules(dark)} }}"


def _asset(name: str) -> str:
    return files(__package__).joinpath("page", name).read_text(encoding="utf-8")
